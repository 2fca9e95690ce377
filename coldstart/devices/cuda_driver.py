"""NVIDIA's driver, called directly: the few functions of libcuda that a restore and a capture need.

The driver comes with the machine, so this needs no package: no import of cupy or torch stands between a start and its first
copy. It works in the device's *primary context*, the one that the CUDA runtime, torch and cupy use, so memory that is
allocated here can be handed to either as it is. Names and constants are those of ``cuda.h`` (driver API 12).

A context is current to a thread. Every call here makes the device's own current for as long as it takes and then puts
back what was, so a caller needs to know nothing of that.

Calls that wait for something release the interpreter lock. Those that only queue work keep it: they take microseconds, and
a thread that lets go of the lock beside one that imports gets it back after 5 ms.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from coldstart.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIBRARY = "libcuda.so.1"

_POINTER, _WORD, _SIZE = ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t
_ADDRESS = ctypes.c_uint64
"""CUdeviceptr."""
_OUT = ctypes.c_void_p
"""Where a result is put: the address of a ctypes value."""

_PROTOTYPES: dict[str, tuple[type, ...]] = {
    "cuInit": (_WORD,),
    "cuDriverGetVersion": (_OUT,),
    "cuDeviceGetCount": (_OUT,),
    "cuDeviceGet": (_OUT, ctypes.c_int),
    "cuDeviceGetName": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "cuDeviceTotalMem_v2": (_OUT, ctypes.c_int),
    "cuDeviceGetAttribute": (_OUT, ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, ctypes.c_int),
    "cuCtxGetCurrent": (_OUT,),
    "cuCtxSetCurrent": (_POINTER,),
    "cuCtxGetStreamPriorityRange": (_OUT, _OUT),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (_OUT, _OUT),
    "cuMemAlloc_v2": (_OUT, _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemHostRegister_v2": (_POINTER, _SIZE, _WORD),
    "cuMemHostUnregister": (_POINTER,),
    "cuMemHostAlloc": (_OUT, _SIZE, _WORD),
    "cuMemFreeHost": (_POINTER,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _POINTER, _SIZE, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, _ADDRESS, _SIZE, _POINTER),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, _SIZE, _POINTER),
    "cuMemsetD8Async": (_ADDRESS, ctypes.c_ubyte, _SIZE, _POINTER),
    "cuStreamCreateWithPriority": (_OUT, _WORD, ctypes.c_int),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamWaitEvent": (_POINTER, _POINTER, _WORD),
    "cuEventCreate": (_OUT, _WORD),
    "cuEventDestroy_v2": (_POINTER,),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventSynchronize": (_POINTER,),
    "cuModuleLoadData": (_OUT, _POINTER),
    "cuModuleGetFunction": (_OUT, _POINTER, ctypes.c_char_p),
    "cuLaunchKernel": (_POINTER, *(_WORD,) * 7, _POINTER, _OUT, _OUT),
}

_QUICK = frozenset(
    """
    cuDriverGetVersion cuDeviceGetCount cuDeviceGet cuDeviceGetName cuDeviceTotalMem_v2 cuDeviceGetAttribute cuCtxGetCurrent
    cuCtxSetCurrent cuCtxGetStreamPriorityRange cuMemcpyHtoDAsync_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoDAsync_v2 cuMemsetD8Async
    cuStreamWaitEvent cuEventCreate cuEventDestroy_v2 cuEventRecord cuModuleGetFunction cuLaunchKernel
    """.split()  # noqa: SIM905  a list of names, not of quotes
)
"""Functions that return at once, so that letting go of the interpreter lock would cost more than they take."""

_OUT_OF_MEMORY = 2
_LASTING = frozenset((214, 700, 702, 709, 710, *range(714, 720)))
"""Errors that every later call of the process gets too: ECC, an illegal address, a time-out, a lost context, failed launches."""
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no waiting for the legacy default stream, on which users compute
_EVENT_FLAGS = 1 | 2  # CU_EVENT_BLOCKING_SYNC: whoever waits sleeps; CU_EVENT_DISABLE_TIMING
_ATTRIBUTES = {"major": 75, "minor": 76}  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


class Memory(NamedTuple):
    """A GPU's memory in bytes."""

    total_bytes: int
    free_bytes: int


class Driver:
    """The driver of this machine, initialised. Raises DeviceError where there is none, or no GPU that it may use."""

    def __init__(self, library: str = LIBRARY) -> None:
        self._functions = _load(library)
        self.check("cuInit", self._functions["cuInit"](0))

    def version(self) -> str:
        """The newest CUDA that the driver supports, such as ``12.8``."""
        number = self._number("cuDriverGetVersion")
        return f"{number // 1000}.{number % 1000 // 10}"

    def count(self) -> int:
        """How many GPUs this process may use."""
        return self._number("cuDeviceGetCount")

    def call(self, name: str, *arguments: object) -> None:
        """Call a function; arguments as in ``cuda.h``. Raises DeviceError with the driver's own words."""
        self.check(name, self._functions[name](*arguments))

    def status(self, name: str, *arguments: object) -> int:
        """Call a function and return its CUresult, 0 for success."""
        return int(self._functions[name](*arguments))

    def _number(self, name: str, *arguments: object) -> int:
        found = ctypes.c_int()
        self.call(name, ctypes.addressof(found), *arguments)
        return found.value

    def attribute(self, ordinal: int, name: str) -> int:
        """An attribute of a GPU: ``major`` or ``minor`` of its compute capability."""
        return self._number("cuDeviceGetAttribute", _ATTRIBUTES[name], ordinal)

    def name(self, ordinal: int) -> str:
        """A GPU's name, such as ``NVIDIA H100 80GB HBM3``."""
        room = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", room, len(room), ordinal)
        return room.value.decode(errors="replace")

    def total_bytes(self, ordinal: int) -> int:
        """A GPU's whole memory."""
        found = ctypes.c_size_t()
        self.call("cuDeviceTotalMem_v2", ctypes.addressof(found), ordinal)
        return found.value

    def check(self, name: str, status: int) -> None:
        """Raise DeviceError unless a function's CUresult is success."""
        if status:
            _fail(name, status, self._text(status))

    def _text(self, status: int) -> str:
        texts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            found = ctypes.c_char_p()
            if self._functions[function](status, ctypes.addressof(found)) == 0 and found.value:
                texts.append(found.value.decode(errors="replace"))
        return ": ".join(texts) or f"error {status}"


def _load(library: str) -> dict[str, ctypes._NamedFuncPointer]:
    try:
        loaded, quick = ctypes.CDLL(library), ctypes.PyDLL(library)
        found = {name: getattr(quick if name in _QUICK else loaded, name) for name in _PROTOTYPES}
        for name, arguments in _PROTOTYPES.items():
            found[name].argtypes, found[name].restype = arguments, ctypes.c_int
        for name in ("cuGetErrorName", "cuGetErrorString"):
            found[name] = getattr(loaded, name)
            found[name].argtypes, found[name].restype = (ctypes.c_int, _OUT), ctypes.c_int
    except (OSError, AttributeError) as error:
        raise DeviceError(
            f"there is no usable NVIDIA driver here ({error}): run on a machine with a GPU and its driver"
            " (containers need the GPU handed in), or set COLDSTART_DEVICE=cpu"
        ) from error
    return found


def _fail(name: str, status: int, text: str) -> NoReturn:
    remedy = ""
    if name == "cuInit":
        remedy = ": this process may use no GPU; hand one in, or set COLDSTART_DEVICE=cpu"
    elif status == _OUT_OF_MEMORY:
        short = "this machine has too little memory that can be pinned" if "Host" in name else "the GPU has too little"
        remedy = f": {short}"
    elif status in _LASTING:
        remedy = ": this process can use the GPU no more; end it and start another, and look at the machine if that fails too"
    raise DeviceError(f"the NVIDIA driver failed in {name}: {text}{remedy}")


class Stream:
    """A queue of work on a GPU, in order; work of two streams runs side by side. Not tied to a thread."""

    def __init__(self, gpu: Gpu, *, is_urgent: bool = True) -> None:
        """``is_urgent``: its work goes before that of other streams; otherwise behind the user's."""
        self._gpu = gpu
        least, greatest, made = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        with gpu.current():
            gpu.driver.call("cuCtxGetStreamPriorityRange", ctypes.addressof(least), ctypes.addressof(greatest))
            priority = greatest if is_urgent else least
            gpu.driver.call("cuStreamCreateWithPriority", ctypes.addressof(made), _NON_BLOCKING, priority.value)
        assert made.value is not None
        self.handle: int = made.value

    def copy_in(self, target: int, source: int, length_bytes: int) -> None:
        """From host memory to the device. Pinned memory is read when the stream gets there, any other before this returns."""
        self._gpu.call("cuMemcpyHtoDAsync_v2", target, source, length_bytes, self.handle)

    def copy_out(self, target: int, source: int, length_bytes: int) -> None:
        """From the device to host memory."""
        self._gpu.call("cuMemcpyDtoHAsync_v2", target, source, length_bytes, self.handle)

    def copy_within(self, target: int, source: int, length_bytes: int) -> None:
        """From one place of the device to another."""
        self._gpu.call("cuMemcpyDtoDAsync_v2", target, source, length_bytes, self.handle)

    def fill(self, target: int, value: int, length_bytes: int) -> None:
        """Set bytes of the device."""
        self._gpu.call("cuMemsetD8Async", target, value, length_bytes, self.handle)

    def launch(self, function: int, grid: tuple[int, int], threads: int, *arguments: ctypes._SimpleCData[int]) -> None:
        """Run a kernel: a grid of blocks of ``threads``, with arguments of the kernel's own types."""
        places = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        shape = (*grid, 1, threads, 1, 1, 0)
        self._gpu.call("cuLaunchKernel", function, *shape, self.handle, ctypes.addressof(places), None)

    def wait_for(self, event: Event) -> None:
        """Let what comes next wait for what the event stands for. The caller does not wait."""
        self._gpu.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        """Wait until all is done. Raises DeviceError for what went wrong on the way."""
        self._gpu.call("cuStreamSynchronize", self.handle)

    def drain(self) -> None:
        """Wait until nothing runs any more, however it went. Never raises."""
        if self.handle:
            self._gpu.quietly("cuStreamSynchronize", self.handle)

    def end(self) -> None:
        """Let go of the stream; what is queued still runs. May be called twice, and never raises."""
        handle, self.handle = self.handle, 0
        if handle:
            self._gpu.quietly("cuStreamDestroy_v2", handle)


class Event:
    """A point in a stream that others can wait for."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        made = ctypes.c_void_p()
        gpu.call("cuEventCreate", ctypes.addressof(made), _EVENT_FLAGS)
        assert made.value is not None
        self.handle: int = made.value

    def record(self, stream: Stream) -> Event:
        """Stand for what is in the stream by now. Raises DeviceError, and then the event has ended."""
        try:
            self._gpu.call("cuEventRecord", self.handle, stream.handle)
        except DeviceError:
            self.end()
            raise
        return self

    def wait(self) -> None:
        """Wait, asleep, until that is done. Raises DeviceError for what went wrong on the way."""
        self._gpu.call("cuEventSynchronize", self.handle)

    def end(self) -> None:
        """Let go of the event. May be called twice, and never raises."""
        handle, self.handle = self.handle, 0
        if handle:
            self._gpu.quietly("cuEventDestroy_v2", handle)


class Gpu:
    """One GPU, with its primary context. ``ordinal`` counts the GPUs that this process may use."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        """Raises DeviceError where there is no such GPU, or it refuses a context."""
        self.driver = driver
        self.ordinal = ordinal
        count = driver.count()
        if ordinal >= count:
            raise DeviceError(
                f"there is no GPU {ordinal} for this process, which may use {count}: see COLDSTART_DEVICE"
                " and CUDA_VISIBLE_DEVICES"
            )
        device, made = ctypes.c_int(), ctypes.c_void_p()
        driver.call("cuDeviceGet", ctypes.addressof(device), ordinal)
        driver.call("cuDevicePrimaryCtxRetain", ctypes.addressof(made), device.value)
        self._context = made.value

    @property
    def name(self) -> str:
        """The GPU's name."""
        return self.driver.name(self.ordinal)

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability: (9, 0) for an H100."""
        return self.driver.attribute(self.ordinal, "major"), self.driver.attribute(self.ordinal, "minor")

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current to this thread, and put back the one that was."""
        before = ctypes.c_void_p()
        self.driver.status("cuCtxGetCurrent", ctypes.addressof(before))  # what is wrong the call itself will say
        if before.value == self._context:
            yield
            return
        self.driver.status("cuCtxSetCurrent", self._context)
        try:
            yield
        finally:
            self.driver.status("cuCtxSetCurrent", before.value)

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the driver in this GPU's context. Raises DeviceError."""
        with self.current():
            self.driver.call(name, *arguments)

    def memory(self) -> Memory:
        """All memory, and what is free."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.addressof(free), ctypes.addressof(total))
        return Memory(total.value, free.value)

    def allocate(self, length_bytes: int) -> int:
        """The address of fresh device memory, 256-byte aligned. Raises DeviceError with what was asked and what is free."""
        made = ctypes.c_uint64()
        with self.current():
            status = self.driver.status("cuMemAlloc_v2", ctypes.addressof(made), length_bytes)
            if status == _OUT_OF_MEMORY:
                memory = self.memory()
                raise DeviceError(
                    f"GPU {self.ordinal} ({self.name}) was asked for {length_bytes} bytes and has {memory.free_bytes} free"
                    f" of {memory.total_bytes}: end what else uses it, or take a larger one"
                )
            self.driver.check("cuMemAlloc_v2", status)
        return made.value

    def synchronize(self) -> None:
        """Wait until all that anybody has queued by now is done. Raises DeviceError for what went wrong on the way."""
        self.call("cuCtxSynchronize")

    def free_quietly(self, address: int) -> None:
        """Give memory back, once all that is under way on the device is done."""
        self.quietly("cuMemFree_v2", address)

    def quietly(self, name: str, argument: int) -> None:
        """Call what ends something, or gives it back. Never raises: where the device failed, somebody has heard of it already."""
        with self.current():
            self.driver.status(name, argument)

    def pin(self, address: int, length_bytes: int) -> None:
        """Lock pages of host memory, so that the copy engine reads and writes them by itself. About 0.4 s a GB."""
        self.call("cuMemHostRegister_v2", address, length_bytes, 1)  # CU_MEMHOSTREGISTER_PORTABLE

    def unpin(self, address: int) -> None:
        """Undo ``pin``. Never raises."""
        self.quietly("cuMemHostUnregister", address)

    def pinned(self, length_bytes: int) -> int:
        """The address of fresh host memory that is pinned."""
        made = ctypes.c_void_p()
        self.call("cuMemHostAlloc", ctypes.addressof(made), length_bytes, 1)  # CU_MEMHOSTALLOC_PORTABLE
        assert made.value is not None
        return made.value

    def free_pinned_quietly(self, address: int) -> None:
        """Give back what ``pinned`` gave. Never raises."""
        self.quietly("cuMemFreeHost", address)

    def functions(self, image: bytes, names: Sequence[str]) -> dict[str, int]:
        """Load a module (PTX text or machine code), and find kernels in it by name. It stays loaded."""
        module, found = ctypes.c_void_p(), {}
        data = ctypes.create_string_buffer(image)  # ends with a zero byte, as PTX text must
        with self.current():
            self.driver.call("cuModuleLoadData", ctypes.addressof(module), ctypes.addressof(data))
            for name in names:
                function = ctypes.c_void_p()
                self.driver.call("cuModuleGetFunction", ctypes.addressof(function), module, name.encode())
                assert function.value is not None
                found[name] = function.value
        return found


_opened: dict[tuple[str, int], Gpu] = {}
_opening = threading.Lock()


def is_open(ordinal: int, library: str = LIBRARY) -> bool:
    """Whether ``open_gpu`` has opened it."""
    return (library, ordinal) in _opened


def open_gpu(ordinal: int, library: str = LIBRARY) -> Gpu:
    """The GPU of this number, opened once a process: 0.3 s and more the first time. Raises DeviceError."""
    with _opening:
        gpu = _opened.get((library, ordinal))
        if gpu is None:
            gpu = _opened[library, ordinal] = Gpu(Driver(library), ordinal)
        return gpu
