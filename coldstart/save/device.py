"""Chunks of a state that is in a GPU's memory: hashed there, and copied out by way of pinned memory only when they are new.

All work goes on one stream of the lowest priority, so that the user's kernels go first. A chunk that is one range of one
array is hashed where it is; of a run of small arrays a copy is made on the device first, with zeros between them, as it
lies in the snapshot.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

from coldstart.devices.cuda_driver import Stream
from coldstart.devices.cuda_hashes import Hashes
from coldstart.devices.cuda_memory import DeviceMemory, PinnedMemory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coldstart.devices.cuda_driver import Gpu


_ALIGNMENT_BYTES = 16


class Part(NamedTuple):
    """Bytes of an array in a chunk: where in the chunk they begin, their device address, and how many they are."""

    offset_bytes: int
    address: int
    length_bytes: int


class DeviceChunks:
    """Reads the chunks of one capture. For one thread; what ``read`` gives is good until it is called again."""

    def __init__(self, gpu: Gpu, largest_bytes: int) -> None:
        """Raises DeviceError where the GPU has no room for the scratch: one chunk, and a little for hashes."""
        gpu.synchronize()  # what load and the warm-up queued on streams of their own: this one is not ordered behind them
        self.gpu = gpu
        self.stream = Stream(gpu, is_urgent=False)
        weakref.finalize(self, self.stream.end)
        self._hashes = Hashes(gpu, 1, largest_bytes)
        self._scratch = DeviceMemory(gpu, largest_bytes)
        self._pinned = PinnedMemory(gpu, largest_bytes)

    def raw_hash(self, parts: Sequence[Part], length_bytes: int) -> str:
        """The hash of a chunk as it is now. Raises DeviceError."""
        self._hashes.queue([(self._together(parts, length_bytes), length_bytes)], self.stream)
        self.stream.synchronize()
        return self._hashes.found()[0]

    def read(self, parts: Sequence[Part], length_bytes: int) -> Iterator[memoryview]:
        """The bytes of a chunk as they are now, in one piece. Raises DeviceError."""
        self.stream.copy_out(self._pinned.address, self._together(parts, length_bytes), length_bytes)
        self.stream.synchronize()
        yield self._pinned.view[:length_bytes]

    def _together(self, parts: Sequence[Part], length_bytes: int) -> int:
        """The device address of the whole chunk, once the stream is there."""
        if [part[::2] for part in parts] == [(0, length_bytes)]:
            return parts[0].address
        self.stream.fill(self._scratch.address, 0, length_bytes)
        for part in parts:
            self.stream.copy_within(self._scratch.address + part.offset_bytes, part.address, part.length_bytes)
        return self._scratch.address

    def aligned(self, parts: Sequence[Part], length_bytes: int) -> int:
        """The same, at a multiple of 16: for nvCOMP."""
        address = self._together(parts, length_bytes)
        if address % _ALIGNMENT_BYTES:
            self.stream.copy_within(self._scratch.address, address, length_bytes)
            address = self._scratch.address
        return address
