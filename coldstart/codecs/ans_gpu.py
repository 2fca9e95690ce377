"""ANS on a GPU: nvCOMP decodes the blocks of many chunks at once to their final places, and encodes those of one chunk.

Decoding is queued like that of planes (``planes_gpu``), and nothing waits for it here: blocks go straight to where they
belong, those that were stored as they are by a copy. What a chunk says of itself was checked before (``AnsCodec.check``), its
bytes by their hash.

Encoding waits for the GPU, twice a chunk: for the lengths that came out, and for the bytes. What came out is decoded
again, and hashed, before anybody stores it: that it gives the chunk's bytes is known, however the memory changed meanwhile.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

from coldstart.codecs.ans import ALIGNMENT_BYTES, BLOCK_BYTES, AnsBlock, is_whole, places, raw_sizes, table
from coldstart.codecs.gpu_batches import ADDRESS_BYTES, COLUMNS, RESULT_BYTES, check_results, decode_batch
from coldstart.codecs.nvcomp import EncodeBatch
from coldstart.devices.cuda_hashes import Hashes
from coldstart.devices.cuda_memory import DeviceMemory, PinnedMemory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from coldstart.codecs.nvcomp import DecodeBatch
    from coldstart.devices.cuda_driver import Gpu, Stream

_HALVES, _BYTES = 2, 1
"""The item sizes that nvCOMP tells apart: what is not of halves is coded byte by byte."""
_LARGEST_WORTHWHILE_PART = 0.95
"""Stored over raw bytes above which a block is stored as it is."""


class BlockDecoder(Protocol):
    """What decoding needs of nvCOMP (``codecs.nvcomp.Nvcomp``)."""

    def ans_decode_temp_bytes(
        self, count: int, *, largest_raw_bytes: int, total_raw_bytes: int, item_bytes: int
    ) -> int:
        """Scratch for decoding so many blocks."""

    def ans_decode(self, batch: DecodeBatch, *, item_bytes: int, stream: int) -> None:
        """Queue the decoding of a batch. Raises CodecError."""


class BlockEncoder(BlockDecoder, Protocol):
    """What encoding needs of it besides."""

    version: str

    def ans_max_stored_bytes(self, raw_bytes: int, *, item_bytes: int) -> int:
        """Room for an encoded block."""

    def ans_encode_temp_bytes(
        self, count: int, *, largest_raw_bytes: int, total_raw_bytes: int, item_bytes: int
    ) -> int:
        """Scratch for encoding so many blocks."""

    def ans_encode(self, batch: EncodeBatch, *, item_bytes: int, stream: int) -> None:
        """Queue the encoding of a batch. Raises CodecError."""


class AnsLimits(NamedTuple):
    """What a batch has at most: blocks, and the raw bytes of the largest."""

    blocks: int
    block_bytes: int


class EncodedBlocks(NamedTuple):
    """A chunk to decode: device addresses of its stored bytes and of its place, and its blocks."""

    stored: int
    target: int
    item_bytes: int
    blocks: tuple[AnsBlock, ...]


class AnsDecoder:
    """Scratch for one batch at a time on one GPU: for any number of batches, one after another on one stream."""

    def __init__(self, gpu: Gpu, library: BlockDecoder, limits: AnsLimits) -> None:
        """Raises DeviceError where the GPU has no room for the scratch."""
        self._gpu = gpu
        self._library = library
        self._table = PinnedMemory(gpu, limits.blocks * ADDRESS_BYTES * COLUMNS)
        self._results = PinnedMemory(gpu, limits.blocks * RESULT_BYTES)
        with gpu.current():
            self._temp_bytes = max(
                library.ans_decode_temp_bytes(
                    limits.blocks,
                    largest_raw_bytes=limits.block_bytes,
                    total_raw_bytes=limits.blocks * limits.block_bytes,
                    item_bytes=item_bytes,
                )
                for item_bytes in (_HALVES, _BYTES)
            )
        self._device_table = DeviceMemory(gpu, len(self._table.view))
        self._device_results = DeviceMemory(gpu, len(self._results.view))
        self._temp = DeviceMemory(gpu, self._temp_bytes)
        self._rooms: list[int] = []

    def decode(self, batch: Sequence[EncodedBlocks], stream: Stream) -> None:
        """Queue a batch. The one before it must have been checked, or given up."""
        groups: dict[int, list[tuple[int, int, int, int]]] = {_HALVES: [], _BYTES: []}
        for encoded, block, target in _blocks_of(batch):
            address = encoded.stored + block.offset_bytes
            if block.is_encoded:
                group = groups[_HALVES if encoded.item_bytes == _HALVES else _BYTES]
                group.append((address, block.stored_bytes, block.raw_bytes, target))
            else:
                stream.copy_within(target, address, block.raw_bytes)
        self._rooms = [room for group in groups.values() for _, _, room, _ in group]
        words = [word for group in groups.values() for column in zip(*group, strict=True) for word in column]
        if not words:
            return
        struct.pack_into(f"<{len(words)}Q", self._table.view, 0, *words)
        stream.copy_in(self._device_table.address, self._table.address, ADDRESS_BYTES * len(words))
        first = 0
        for item_bytes, group in groups.items():
            if group:
                self._decode_group(first, len(group), item_bytes, stream)
                first += len(group)
        stream.copy_out(self._results.address, self._device_results.address, RESULT_BYTES * len(self._rooms))

    def _decode_group(self, first: int, count: int, item_bytes: int, stream: Stream) -> None:
        results = self._device_results.address
        batch = decode_batch(
            count,
            self._device_table.address + first * ADDRESS_BYTES * COLUMNS,
            results + first * ADDRESS_BYTES,
            results + ADDRESS_BYTES * len(self._rooms) + first * (RESULT_BYTES - ADDRESS_BYTES),
            (self._temp.address, self._temp_bytes),
        )
        with self._gpu.current():
            self._library.ans_decode(batch, item_bytes=item_bytes, stream=stream.handle)

    def check(self) -> None:
        """After the stream is done: raise CodecError unless every block of the batch gave what it had to."""
        check_results(self._results.view, self._rooms, "a block of ANS")

    def end(self) -> None:
        """Give the scratch back; nothing may be queued any more."""
        for memory in (self._device_table, self._device_results, self._temp, self._table, self._results):
            memory.end()


def _blocks_of(batch: Sequence[EncodedBlocks]) -> Iterator[tuple[EncodedBlocks, AnsBlock, int]]:
    """Every block of a batch, with the address of its place."""
    for encoded in batch:
        target = encoded.target
        for block in encoded.blocks:
            yield encoded, block, target
            target += block.raw_bytes


class Stored(NamedTuple):
    """A chunk in this form: ``data`` is good until the next is encoded. ``raw_hash`` is of what it decodes to."""

    data: memoryview
    parameters: Mapping[str, int | str]
    raw_hash: str


class AnsEncoder:
    """Scratch for encoding one chunk of at most ``largest_bytes`` at a time on one GPU."""

    def __init__(self, gpu: Gpu, library: BlockEncoder, largest_bytes: int, *, block_bytes: int = BLOCK_BYTES) -> None:
        """Raises DeviceError where the GPU has no room for the scratch: four times the chunk, and what nvCOMP asks for."""
        self._gpu = gpu
        self._library = library
        self._block_bytes = block_bytes
        self._count = len(raw_sizes(largest_bytes, block_bytes))
        with gpu.current():
            self._room_bytes = _aligned(
                max(library.ans_max_stored_bytes(block_bytes, item_bytes=each) for each in (_HALVES, _BYTES))
            )
            self._temp_bytes = max(
                library.ans_encode_temp_bytes(
                    self._count,
                    largest_raw_bytes=block_bytes,
                    total_raw_bytes=self._count * block_bytes,
                    item_bytes=each,
                )
                for each in (_HALVES, _BYTES)
            )
        self._rooms = DeviceMemory(gpu, self._count * self._room_bytes)
        self._temp = DeviceMemory(gpu, self._temp_bytes)
        self._table = PinnedMemory(gpu, self._count * ADDRESS_BYTES * 3)
        self._results = PinnedMemory(gpu, self._count * RESULT_BYTES)
        self._device_table = DeviceMemory(gpu, len(self._table.view))
        self._device_results = DeviceMemory(gpu, len(self._results.view))
        self._stored = PinnedMemory(gpu, largest_bytes + self._count * (ALIGNMENT_BYTES + ADDRESS_BYTES))
        self._decoder = AnsDecoder(gpu, library, AnsLimits(self._count, block_bytes))
        self._again = DeviceMemory(gpu, largest_bytes)
        self._hashes = Hashes(gpu, 1, largest_bytes)

    def encode(
        self, address: int, length_bytes: int, *, item_bytes: int, most_bytes: int, stream: Stream
    ) -> Stored | None:
        """The chunk at a device address that is a multiple of 16; None where that takes more than ``most_bytes``.

        Raises CodecError where what nvCOMP encoded it does not decode.
        """
        sizes = raw_sizes(length_bytes, self._block_bytes)
        lengths = self._encoded_lengths(address, sizes, item_bytes, stream)
        begins, end = places(lengths)
        if end > most_bytes:
            return None
        blocks = []
        for number, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
            room = number * self._room_bytes
            if length == size:
                stream.copy_within(self._rooms.address + room, address + number * self._block_bytes, size)
            stream.copy_out(self._stored.address + begins[number], self._rooms.address + room, length)
            blocks.append(AnsBlock(room, length, size))
        self._decoder.decode(
            [EncodedBlocks(self._rooms.address, self._again.address, item_bytes, tuple(blocks))], stream
        )
        self._hashes.queue([(self._again.address, length_bytes)], stream)
        stream.synchronize()
        self._decoder.check()
        self._fill_in(lengths, begins)
        parameters: dict[str, int | str] = {"block_bytes": self._block_bytes, "nvcomp": self._library.version}
        return Stored(self._stored.view[:end], parameters, self._hashes.found()[0])

    def _encoded_lengths(self, address: int, sizes: Sequence[int], item_bytes: int, stream: Stream) -> list[int]:
        """Encode the blocks into their rooms; the length of each, its raw length where that does not pay."""
        wanted = [number for number, size in enumerate(sizes) if is_whole(size, item_bytes)]
        if not wanted:
            return list(sizes)
        columns = (
            [address + number * self._block_bytes for number in wanted],
            [sizes[number] for number in wanted],
            [self._rooms.address + number * self._room_bytes for number in wanted],
        )
        words = [word for column in columns for word in column]
        struct.pack_into(f"<{len(words)}Q", self._table.view, 0, *words)
        stream.copy_in(self._device_table.address, self._table.address, ADDRESS_BYTES * len(words))
        self._encode_blocks(len(wanted), max(columns[1]), item_bytes, stream)
        stream.synchronize()
        found = struct.unpack_from(f"<{len(wanted)}Q", self._results.view, 0)
        statuses = struct.unpack_from(f"<{len(wanted)}i", self._results.view, ADDRESS_BYTES * len(wanted))
        lengths = list(sizes)
        for number, length, status in zip(wanted, found, statuses, strict=True):
            if not status and 0 < length < _LARGEST_WORTHWHILE_PART * sizes[number]:
                lengths[number] = length
        return lengths

    def _encode_blocks(self, count: int, largest_bytes: int, item_bytes: int, stream: Stream) -> None:
        entries, results = self._device_table.address, self._device_results.address
        batch = EncodeBatch(
            item_count=count,
            raw=entries,
            raw_bytes=entries + ADDRESS_BYTES * count,
            largest_raw_bytes=largest_bytes,
            targets=entries + 2 * ADDRESS_BYTES * count,
            stored_bytes=results,
            statuses=results + ADDRESS_BYTES * count,
            scratch=self._temp.address,
            scratch_bytes=self._temp_bytes,
        )
        with self._gpu.current():
            self._library.ans_encode(
                batch, item_bytes=_HALVES if item_bytes == _HALVES else _BYTES, stream=stream.handle
            )
        stream.copy_out(self._results.address, results, RESULT_BYTES * count)

    def _fill_in(self, lengths: Sequence[int], begins: Sequence[int]) -> None:
        """Write the table, and zeros where blocks leave a gap: the memory was used before."""
        head = table(lengths)
        self._stored.view[: len(head)] = head
        end = len(head)
        for begin, length in zip(begins, lengths, strict=True):
            self._stored.view[end:begin] = bytes(begin - end)
            end = begin + length


def _aligned(length_bytes: int) -> int:
    return -(-length_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
