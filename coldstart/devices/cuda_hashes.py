"""BLAKE3 of ranges of device memory, computed on the GPU: the hashes that manifests name, without copying a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.devices.cuda_driver import Stream, open_gpu
from coldstart.devices.cuda_kernels import kernels_on
from coldstart.devices.cuda_memory import DeviceMemory, PinnedMemory
from coldstart.devices.kernels import DIGEST_BYTES, chaining_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.devices.cuda_driver import Gpu
    from coldstart.devices.device_bytes import DeviceBytes


_PIECE_BYTES = 16 << 20


class Hashes:
    """Scratch for hashing up to ``ranges`` ranges of at most ``largest_bytes`` at a time."""

    def __init__(self, gpu: Gpu, ranges: int, largest_bytes: int) -> None:
        """Raises DeviceError where the GPU has no room for the scratch."""
        self._kernels = kernels_on(gpu)
        self._kernels.open_hashing()
        self._scratch_bytes = chaining_bytes(largest_bytes)
        self._chaining = DeviceMemory(gpu, ranges * self._scratch_bytes)
        self._digests = DeviceMemory(gpu, ranges * DIGEST_BYTES)
        self._results = PinnedMemory(gpu, ranges * DIGEST_BYTES)
        self._count = 0

    def queue(self, ranges: Sequence[tuple[int, int]], stream: Stream) -> None:
        """Queue the hashes of ranges (device address, bytes). The ones before must have been taken, or given up."""
        self._count = len(ranges)
        for index, (address, length_bytes) in enumerate(ranges):
            self._kernels.blake3(
                stream,
                address,
                length_bytes,
                chaining=self._chaining.address + index * self._scratch_bytes,
                digest=self._digests.address + index * DIGEST_BYTES,
            )
        stream.copy_out(self._results.address, self._digests.address, self._count * DIGEST_BYTES)

    def found(self) -> list[str]:
        """After the stream is done: the hashes, in hexadecimal."""
        digests = bytes(self._results.view[: self._count * DIGEST_BYTES])
        return [digests[begin : begin + DIGEST_BYTES].hex() for begin in range(0, len(digests), DIGEST_BYTES)]

    def end(self) -> None:
        """Give the scratch back; nothing may be queued any more."""
        for memory in (self._chaining, self._digests, self._results):
            memory.end()


def hash_of_device(data: DeviceBytes) -> str:
    """One hash of device memory, made of those of its pieces: to be compared with itself alone. Raises DeviceError."""
    from blake3 import blake3

    gpu = open_gpu(data.ordinal)
    gpu.synchronize()  # what computed the bytes was queued on a stream that ours is not ordered behind
    ranges = [
        (data.address + begin, min(_PIECE_BYTES, data.length_bytes - begin))
        for begin in range(0, data.length_bytes, _PIECE_BYTES)
    ]
    hashes, stream = Hashes(gpu, max(1, len(ranges)), _PIECE_BYTES), Stream(gpu, is_urgent=False)
    try:
        hashes.queue(ranges, stream)
        stream.synchronize()
        return str(blake3("".join(hashes.found()).encode()).hexdigest())
    finally:
        stream.end()
        hashes.end()
