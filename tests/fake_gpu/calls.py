"""A driver library called by name, real or fake, for tests: integers in, codes out."""

from __future__ import annotations

import ctypes
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.fake_gpu.libraries import report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, NO_DEVICE, INVALID_DEVICE = 0, 1, 2, 3, 100, 101
INVALID_IMAGE, INVALID_CONTEXT, NO_BINARY, INVALID_PTX, UNSUPPORTED_PTX = 200, 201, 209, 218, 222
INVALID_HANDLE, NOT_FOUND, NOT_READY, ILLEGAL_ADDRESS, CONTEXT_IS_DESTROYED = 400, 500, 600, 700, 709
ALREADY_REGISTERED, NOT_REGISTERED, LAUNCH_FAILED, NOT_PERMITTED = 712, 713, 719, 800
NON_BLOCKING = 1
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
WAIT_SECONDS = 60

ADD_TO_BYTES = b"""//
.version 7.0
.target sm_75
.address_size 64

.visible .entry add_to_bytes(
    .param .u64 add_to_bytes_param_0,
    .param .u32 add_to_bytes_param_1,
    .param .u32 add_to_bytes_param_2
)
{
    .reg .pred %p;
    .reg .u32 %n, %block, %blocks, %at, %count, %added, %byte;
    .reg .u64 %base, %address;
    ld.param.u64 %base, [add_to_bytes_param_0];
    ld.param.u32 %count, [add_to_bytes_param_1];
    ld.param.u32 %added, [add_to_bytes_param_2];
    cvta.to.global.u64 %base, %base;
    mov.u32 %n, %tid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %blocks, %ntid.x;
    mad.lo.u32 %at, %block, %blocks, %n;
    setp.ge.u32 %p, %at, %count;
    @%p bra DONE;
    cvt.u64.u32 %address, %at;
    add.u64 %address, %address, %base;
    ld.global.u8 %byte, [%address];
    add.u32 %byte, %byte, %added;
    st.global.u8 [%address], %byte;
DONE:
    ret;
}
"""
"""A kernel of the tests' own: (address, count, added) adds to each of so many bytes."""


class Driver:
    """The library, with the primary context of device 0 current on this thread once ``open`` was called."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self._kept: list[Any] = []

    def open(self) -> None:
        """Initialise, and make the context current."""
        self.do("cuInit", 0)
        self.context = self.make("cuDevicePrimaryCtxRetain", 0)
        self.do("cuCtxSetCurrent", self.context)

    def call(self, name: str, *arguments: Any) -> int:
        """What the function returns. Integers are passed as they are, whatever their width."""
        passed = [ctypes.c_uint64(each & (1 << 64) - 1) if isinstance(each, int) else each for each in arguments]
        return int(getattr(self.library, name)(*passed))

    def do(self, name: str, *arguments: Any) -> None:
        """Call, and succeed."""
        assert (name, self.call(name, *arguments)) == (name, SUCCESS)

    def make(self, name: str, *arguments: Any) -> int:
        """Call a function that writes a handle, an address or a number through its first argument; return that."""
        made = ctypes.c_uint64()
        self.do(name, ctypes.byref(made), *arguments)
        return made.value

    def pair(self, name: str, *arguments: Any) -> tuple[int, int]:
        """Call a function that writes two numbers through its first arguments."""
        first, second = ctypes.c_uint64(), ctypes.c_uint64()
        self.do(name, ctypes.byref(first), ctypes.byref(second), *arguments)
        return first.value, second.value

    def stream(self, flags: int = NON_BLOCKING, priority: int = 0) -> int:
        return self.make("cuStreamCreateWithPriority", flags, priority)

    def memory(self, content: bytes) -> int:
        """Device memory that holds ``content``."""
        address = self.make("cuMemAlloc_v2", len(content))
        self.do("cuMemcpyHtoDAsync_v2", address, content, len(content), 0)
        self.do("cuStreamSynchronize", 0)
        return address

    def pinned(self, content: bytes) -> Any:
        """Host memory that the driver gave, as a ctypes array."""
        array = (ctypes.c_ubyte * len(content)).from_address(self.make("cuMemHostAlloc", len(content), 0))
        array[:] = content
        return array

    def content(self, address: int, length_bytes: int) -> bytes:
        """What is in device memory once all is done."""
        self.do("cuCtxSynchronize")
        host = (ctypes.c_ubyte * length_bytes)()
        self.do("cuMemcpyDtoHAsync_v2", host, address, length_bytes, 0)
        self.do("cuStreamSynchronize", 0)
        return bytes(host)

    def kernel(self) -> tuple[int, int]:
        """The module of ADD_TO_BYTES, and its function."""
        module = self.make("cuModuleLoadData", ADD_TO_BYTES)
        return module, self.make("cuModuleGetFunction", module, b"add_to_bytes")

    def launch(self, function: int, stream: int, address: int, count: int, added: int) -> int:
        """Queue ADD_TO_BYTES; the arguments are gone when this returns."""
        values = (ctypes.c_uint64(address), ctypes.c_uint32(count), ctypes.c_uint32(added))
        pointers = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))
        code = self.call("cuLaunchKernel", function, -(-count // 256), 1, 1, 256, 1, 1, 0, stream, pointers, None)
        for value in values:
            ctypes.memset(ctypes.addressof(value), 0xFF, ctypes.sizeof(value))
        return code

    def host_function(self, stream: int, function: Callable[[], None]) -> None:
        """Queue a call of ``function``."""
        callback = HOST_FUNCTION(lambda _: function())
        self._kept.append(callback)
        self.do("cuLaunchHostFunc", stream, callback, 0)

    @contextmanager
    def held(self, stream: int) -> Iterator[threading.Event]:
        """While inside, nothing that is queued to the stream from now on happens, unless the event given is set before."""
        gate = threading.Event()
        self.host_function(stream, lambda: gate.wait(WAIT_SECONDS) and None)
        try:
            yield gate
        finally:
            gate.set()

    def report(self) -> dict[str, Any]:
        """What a fake counted."""
        return report(self.library)
