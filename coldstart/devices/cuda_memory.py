"""A GPU's memory as Python objects: an allocation that lives as long as something refers to it, and runs of its bytes."""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING, Any

from coldstart.devices.cuda_driver import Stream

if TYPE_CHECKING:
    from coldstart.devices.cuda_driver import Gpu

ALIGNMENT_BYTES = 512
"""Where runs of one allocation begin: what cudaMalloc gives to users too."""


class DeviceMemory:
    """Device memory, given back when nobody refers to it any more. Raises DeviceError like ``Gpu.allocate``."""

    def __init__(self, gpu: Gpu, length_bytes: int) -> None:
        self.gpu = gpu
        self.length_bytes = length_bytes
        self.address = gpu.allocate(max(1, length_bytes))
        self._end = weakref.finalize(self, gpu.free_quietly, self.address)
        self._end.atexit = False  # the driver takes everything back when the process ends

    def end(self) -> None:
        """Give it back now; nothing may be using it."""
        self._end()


class PinnedMemory:
    """Host memory that the copy engine can read and write, given back when nobody refers to it any more."""

    def __init__(self, gpu: Gpu, length_bytes: int) -> None:
        self.address = gpu.pinned(max(1, length_bytes))
        self.view = memoryview((ctypes.c_ubyte * length_bytes).from_address(self.address)).cast("B")
        self._end = weakref.finalize(self, gpu.free_pinned_quietly, self.address)
        self._end.atexit = False

    def end(self) -> None:
        """Give it back now; nothing may be using it."""
        self._end()


def host_address(data: memoryview) -> tuple[int, Any]:
    """The address of host bytes, and what has to be kept until they are not needed at that address any more."""
    if data.readonly:
        kept: Any = (ctypes.c_char * len(data)).from_buffer_copy(data)
    else:
        kept = (ctypes.c_char * len(data)).from_buffer(data)
    return ctypes.addressof(kept), kept


def copy_out(gpu: Gpu, address: int, length_bytes: int) -> bytes:
    """Bytes of the device, copied at once: for what is small, or for looking at it."""
    room = bytearray(length_bytes)
    if length_bytes:
        gpu.synchronize()  # what computed the bytes was queued on a stream that ours is not ordered behind
        stream = Stream(gpu)
        try:
            target, _ = host_address(memoryview(room))
            stream.copy_out(target, address, length_bytes)
            stream.synchronize()
        finally:
            stream.end()
    return bytes(room)
