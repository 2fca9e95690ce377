"""A GPU of NVIDIA: an arena in its memory that chunks reach by way of pinned host memory.

All segments that belong on the device lie in one allocation, made once from the manifest, so a state's arrays keep their
places for as long as one of them lives. What belongs to the host on any device (files, arrays that were numpy's when
they were captured) lies in host memory beside it, as on a CPU.

Opening the device takes a third of a second and more (the driver's initialisation and a context), some hundred MB of its memory,
and the right to fork: so it is opened by the first who has something to do there, which is the restoration's thread once it
knows that the snapshot has bytes for it. Meanwhile fetchers fill the ring.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from coldstart.devices.base import Arena, Device, DeviceInfo
from coldstart.devices.cpu import CpuDevice
from coldstart.devices.cuda_driver import Stream, is_open, open_gpu
from coldstart.devices.cuda_memory import ALIGNMENT_BYTES, DeviceMemory, copy_out, host_address
from coldstart.devices.device_bytes import DeviceBytes
from coldstart.devices.nvml import gpu_facts
from coldstart.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from coldstart.devices.cuda_driver import Gpu

MARGIN_BYTES = 256 << 20
"""Device memory that an arena leaves free: scratch of the restore, and room for the kernels of whoever computes."""


class CudaDevice(Device):
    """The GPU of this number, counted among those that the process may use."""

    type = "cuda"
    has_own_memory = True

    def __init__(self, ordinal: int = 0) -> None:
        self.ordinal = ordinal

    @property
    def label(self) -> str:
        """What frameworks call it: ``cuda`` for the first, else ``cuda:<number>``."""
        return f"cuda:{self.ordinal}" if self.ordinal else "cuda"

    @property
    def gpu(self) -> Gpu:
        """The opened device. Raises DeviceError where there is no driver, or no such GPU."""
        return open_gpu(self.ordinal)

    def info(self) -> DeviceInfo:
        """The GPU's name and memory. Raises DeviceError."""
        memory = self.gpu.memory()
        return DeviceInfo(self.type, self.gpu.name, memory.total_bytes, memory.free_bytes)

    def known(self) -> DeviceInfo:
        """The name alone, as long as nobody has used the device: opening it takes a context and its memory."""
        return self.info() if is_open(self.ordinal) else DeviceInfo(self.type, gpu_facts().get("gpu", ""), 0, 0)

    def allocate(self, segment_bytes: Sequence[int], *, host_segments: Collection[int] = ()) -> CudaArena:
        """One allocation for all segments but those of the host. Raises DeviceError with what was asked and what is free."""
        return CudaArena(self.gpu, segment_bytes, host_segments)

    def zeros(self, length_bytes: int) -> DeviceBytes:
        """Fresh device memory, zeroed. Raises DeviceError."""
        gpu = self.gpu
        memory, stream = DeviceMemory(gpu, length_bytes), Stream(gpu)
        try:
            stream.fill(memory.address, 0, max(1, length_bytes))
            stream.synchronize()
        finally:
            stream.end()
        return DeviceBytes(memory.address, length_bytes, gpu.ordinal, memory)


class CudaArena(Arena):
    """Segments in device memory, those of the host in host memory. Its arrays there are ``DeviceBytes``."""

    def __init__(self, gpu: Gpu, segment_bytes: Sequence[int], host_segments: Collection[int]) -> None:
        self.gpu = gpu
        self._segment_bytes = tuple(segment_bytes)
        self._on_host = frozenset(host_segments)
        self._sealed = False
        own = [0 if index in self._on_host else length for index, length in enumerate(segment_bytes)]
        ends = list(accumulate(map(_aligned, own), initial=0))
        self._offsets = tuple(ends[:-1])
        self._host = CpuDevice().allocate([length - kept for length, kept in zip(segment_bytes, own, strict=True)])
        _check_room(gpu, ends[-1])
        self._memory = DeviceMemory(gpu, ends[-1])

    @property
    def segment_bytes(self) -> Sequence[int]:
        """The size of each segment."""
        return self._segment_bytes

    def is_on_device(self, segment: int) -> bool:
        """Whether the segment is in device memory."""
        return segment not in self._on_host

    def address(self, segment: int, offset_bytes: int, length_bytes: int) -> int:
        """The device address of a range of a segment. Raises ValueError where it is not inside, or not on the device."""
        if not self.is_on_device(segment) or not 0 <= offset_bytes <= self._segment_bytes[segment] - length_bytes:
            raise ValueError(f"{length_bytes} bytes at {offset_bytes} are not inside segment {segment} on the device")
        return self._memory.address + self._offsets[segment] + offset_bytes

    def writable(self, segment: int) -> memoryview:
        """Host memory of a segment that belongs there. Raises RuntimeError for one on the device: use ``place``."""
        if self._sealed or self.is_on_device(segment):
            raise RuntimeError(f"segment {segment} is sealed, or in device memory, which the host cannot write to")
        return self._host.writable(segment)

    def place(self, segment: int, offset_bytes: int, data: memoryview) -> None:
        """Copy to the device at once: simple and slow. What restores is ``fetch.landing``."""
        if self._sealed:
            raise RuntimeError("the arena is sealed: no fetch may write to it")
        if not self.is_on_device(segment):
            self._host.place(segment, offset_bytes, data)
            return
        target = self.address(segment, offset_bytes, len(data))
        if not data:
            return
        source, kept = host_address(data)
        stream = Stream(self.gpu)
        try:
            stream.copy_in(target, source, len(data))
            stream.synchronize()
        finally:
            stream.end()
            del kept

    def readable(self, segment: int) -> memoryview:
        """The segment's bytes: of one on the device a copy, which takes host memory for all of it."""
        if self._sealed:
            raise RuntimeError("the arena is sealed, and users may have written to it")
        if not self.is_on_device(segment):
            return self._host.readable(segment)
        length_bytes = self._segment_bytes[segment]
        return memoryview(copy_out(self.gpu, self.address(segment, 0, length_bytes), length_bytes))

    def seal(self) -> None:
        """No fetch writes any more."""
        self._sealed = True
        self._host.seal()

    def array(self, segment: int, offset_bytes: int, length_bytes: int) -> Any:
        """A ``DeviceBytes`` over a range on the device, a numpy array over one of the host."""
        if not self.is_on_device(segment):
            return self._host.array(segment, offset_bytes, length_bytes)
        address = self.address(segment, offset_bytes, length_bytes)
        return DeviceBytes(address, length_bytes, self.gpu.ordinal, self._memory)


def _aligned(length_bytes: int) -> int:
    return -(-length_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _check_room(gpu: Gpu, asked_bytes: int) -> None:
    memory = gpu.memory()
    if asked_bytes + MARGIN_BYTES > memory.free_bytes:
        raise DeviceError(
            f"the snapshot needs {asked_bytes} bytes of GPU {gpu.ordinal} ({gpu.name}) and {memory.free_bytes} of"
            f" {memory.total_bytes} are free ({MARGIN_BYTES} stay reserved): end what else uses it, or take a larger one"
        )
