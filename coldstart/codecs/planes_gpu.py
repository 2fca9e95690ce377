"""Decoding ``planes+zstd`` on a GPU: nvCOMP decodes the frames, one kernel puts the bytes of all planes in their places.

Many chunks are decoded at once, since one has too few frames to fill a GPU. What is queued for a batch: the tables of
addresses go up, frames are decoded to scratch (blocks that were stored as they are stay where they are), the planes are
merged into their final place, and what nvCOMP says of each frame comes back. Nothing waits for the GPU here; the caller
waits for the stream, and then asks ``Batch.check``.

Everything that a chunk says of itself was checked before: its stored bytes by their hash, and the claims of its table and
frames by ``PlanesCodec.check``. nvCOMP itself may not be given anything but valid frames.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

from coldstart.codecs.gpu_batches import ADDRESS_BYTES, COLUMNS, RESULT_BYTES, check_results, decode_batch
from coldstart.devices.cuda_kernels import kernels_on
from coldstart.devices.cuda_memory import DeviceMemory, PinnedMemory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coldstart.codecs.nvcomp import DecodeBatch
    from coldstart.codecs.planes import Block, Planes
    from coldstart.devices.cuda_driver import Gpu, Stream

SMALLEST_BLOCK_BYTES = 4096
"""Blocks that are shorter would make tables of millions: such chunks are decoded on the host."""

_PLACE_BYTES = 16
"""Frames are decoded to addresses that are multiples of this, for the merge to read whole words."""


class FrameDecoder(Protocol):
    """What is needed of nvCOMP (``codecs.nvcomp.Nvcomp``)."""

    def zstd_temp_bytes(self, count: int, *, largest_raw_bytes: int, total_raw_bytes: int) -> int:
        """Scratch for decoding so many frames."""

    def zstd_decode(self, batch: DecodeBatch, *, stream: int) -> None:
        """Queue the decoding of a batch. Raises CodecError."""


class Limits(NamedTuple):
    """What a batch has at most."""

    raw_bytes: int
    blocks: int
    block_bytes: int
    """Raw bytes of the largest block."""


class Encoded(NamedTuple):
    """A chunk to decode: device addresses of its stored bytes and of its place, and its table."""

    stored: int
    target: int
    raw_bytes: int
    item_bytes: int
    planes: Planes


class PlanesDecoder:
    """Scratch for one batch at a time on one GPU: for any number of batches, one after another on one stream."""

    def __init__(self, gpu: Gpu, frames: FrameDecoder, limits: Limits) -> None:
        """Raises DeviceError where the GPU has no room for the scratch."""
        self._gpu = gpu
        self._kernels = kernels_on(gpu)
        self._kernels.open_planes()
        self._frames = frames
        self._limits = limits
        self._table = PinnedMemory(gpu, limits.blocks * ADDRESS_BYTES * (COLUMNS + 1))
        self._results = PinnedMemory(gpu, limits.blocks * RESULT_BYTES)
        with gpu.current():
            self._temp_bytes = frames.zstd_temp_bytes(
                limits.blocks,
                largest_raw_bytes=limits.block_bytes,
                total_raw_bytes=min(limits.blocks * limits.block_bytes, limits.raw_bytes),
            )
        self._device_table = DeviceMemory(gpu, len(self._table.view))
        self._device_results = DeviceMemory(gpu, len(self._results.view))
        self._temp = DeviceMemory(gpu, self._temp_bytes)
        self._planes = DeviceMemory(gpu, limits.raw_bytes + limits.blocks * _PLACE_BYTES)
        self._rooms: list[int] = []

    def decode(self, batch: Sequence[Encoded], stream: Stream) -> None:
        """Queue a batch. The one before it must have been checked, or given up."""
        self._rooms = []
        frames: list[tuple[int, int, int, int]] = []
        addresses: list[int] = []
        place = self._planes.address
        for encoded, block in _blocks_of(batch):
            address = encoded.stored + block.offset_bytes
            if block.is_frame:
                frames.append((address, block.stored_bytes, block.raw_bytes, place))
                self._rooms.append(block.raw_bytes)
                address = place
                place += -(-block.raw_bytes // _PLACE_BYTES) * _PLACE_BYTES
            addresses.append(address)
        words = [word for column in zip(*frames, strict=True) for word in column] + addresses
        struct.pack_into(f"<{len(words)}Q", self._table.view, 0, *words)
        stream.copy_in(self._device_table.address, self._table.address, ADDRESS_BYTES * len(words))
        if frames:
            self._decode_frames(len(frames), stream)
        self._merge(batch, self._device_table.address + ADDRESS_BYTES * COLUMNS * len(frames), stream)

    def _decode_frames(self, count: int, stream: Stream) -> None:
        table, results = self._device_table.address, self._device_results.address
        scratch = (self._temp.address, self._temp_bytes)
        batch = decode_batch(count, table, results, results + ADDRESS_BYTES * count, scratch)
        with self._gpu.current():
            self._frames.zstd_decode(batch, stream=stream.handle)
        stream.copy_out(self._results.address, results, RESULT_BYTES * count)

    def _merge(self, batch: Sequence[Encoded], blocks: int, stream: Stream) -> None:
        for encoded in batch:
            planes, plane_bytes = encoded.planes, encoded.raw_bytes // encoded.item_bytes
            if planes.blocks:
                self._kernels.merge_planes(
                    stream,
                    encoded.target,
                    blocks,
                    plane_bytes=plane_bytes,
                    block_bytes=planes.block_bytes,
                    block_count=planes.block_count,
                    item_bytes=encoded.item_bytes,
                )
            whole_bytes = plane_bytes * encoded.item_bytes
            if encoded.raw_bytes > whole_bytes:
                tail = encoded.stored + planes.tail_offset_bytes
                stream.copy_within(encoded.target + whole_bytes, tail, encoded.raw_bytes - whole_bytes)
            blocks += ADDRESS_BYTES * len(planes.blocks)

    def check(self) -> None:
        """After the stream is done: raise CodecError unless every frame of the batch gave what it had to."""
        check_results(self._results.view, self._rooms, "a zstd frame")

    def end(self) -> None:
        """Give the scratch back; nothing may be queued any more."""
        for memory in (self._device_table, self._device_results, self._temp, self._planes, self._table, self._results):
            memory.end()


def _blocks_of(batch: Sequence[Encoded]) -> Iterator[tuple[Encoded, Block]]:
    return ((encoded, block) for encoded in batch for block in encoded.planes.blocks)
