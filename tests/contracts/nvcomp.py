"""What coldstart relies on in nvCOMP, for the fake on the fake driver and for the real one on a GPU alike."""

from __future__ import annotations

import random
import struct
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import zstandard

from coldstart.codecs.nvcomp import CANNOT_DECOMPRESS, SUCCESS, DecodeBatch, EncodeBatch, Nvcomp
from coldstart.codecs.planes import BLOCK_BYTES, PlanesCodec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.fake_gpu.calls import Driver

NOISE = random.Random(8).randbytes(BLOCK_BYTES)
TEXT = b"".join(b"%d bottles of beer on the wall, " % (n * n) for n in range(2_000))


def bf16_weights(count: int) -> bytes:
    """Trained-looking numbers as bfloat16."""
    numbers = np.random.default_rng(3).normal(0, 0.02, count).astype(np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def frames_of_planes(raw: bytes) -> list[tuple[bytes, bytes]]:
    """The zstd frames in a chunk of planes+zstd, each with what it decodes to, by the form that planes.py describes."""
    stored, _ = PlanesCodec().encode(memoryview(raw), item_bytes=2)
    pieces = [
        raw[plane::2][start : start + BLOCK_BYTES] for plane in (0, 1) for start in range(0, len(raw) // 2, BLOCK_BYTES)
    ]
    lengths = struct.unpack_from(f"<{len(pieces)}I", stored)
    ends = list(accumulate(lengths, initial=4 * len(pieces)))
    blocks = [bytes(stored[start:end]) for start, end in pairwise(ends)]
    return [(block, piece) for block, piece in zip(blocks, pieces, strict=True) if len(block) != len(piece)]


class Queued(NamedTuple):
    """A batch that was queued: where its results are."""

    targets: list[int]
    sizes: int
    statuses: int


class Bench:
    """Batches on the device."""

    def __init__(self, driver: Driver, nvcomp: Nvcomp, stream: int) -> None:
        self.driver, self.nvcomp, self.stream = driver, nvcomp, stream

    def addresses(self, values: Sequence[int]) -> int:
        return self.driver.memory(struct.pack(f"<{len(values)}Q", *values))

    def room(self, length_bytes: int) -> int:
        return self.driver.make("cuMemAlloc_v2", max(length_bytes, 1))

    def batch(self, stored: Sequence[bytes], room: Sequence[int]) -> DecodeBatch:
        """Everything that decoding these takes, in device memory."""
        scratch_bytes = self.nvcomp.zstd_temp_bytes(len(room), largest_raw_bytes=max(room), total_raw_bytes=sum(room))
        return DecodeBatch(
            item_count=len(stored),
            stored=self.addresses([self.driver.memory(each) for each in stored]),
            stored_bytes=self.addresses([len(each) for each in stored]),
            targets=self.addresses([self.room(each) for each in room]),
            room_bytes=self.addresses(room),
            decoded_bytes=self.addresses([0] * len(stored)),
            statuses=self.room(4 * len(stored)),
            scratch=self.room(scratch_bytes),
            scratch_bytes=scratch_bytes,
        )

    def results(self, count: int, targets: int, sizes: int, statuses: int) -> list[tuple[int, bytes]]:
        """The status of each item, and what was written."""
        read = self.driver.content
        places = struct.unpack(f"<{count}Q", read(targets, 8 * count))
        lengths = struct.unpack(f"<{count}Q", read(sizes, 8 * count))
        codes = struct.unpack(f"<{count}i", read(statuses, 4 * count))
        return [
            (code, read(place, length) if code == SUCCESS and length else b"")
            for code, place, length in zip(codes, places, lengths, strict=True)
        ]

    def decoded(self, batch: DecodeBatch) -> list[tuple[int, bytes]]:
        return self.results(batch.item_count, batch.targets, batch.decoded_bytes, batch.statuses)

    def zstd(self, stored: Sequence[bytes], room: Sequence[int]) -> list[tuple[int, bytes]]:
        """Statuses and bytes of a batch of zstd frames."""
        batch = self.batch(stored, room)
        self.nvcomp.zstd_decode(batch, stream=self.stream)
        return self.decoded(batch)

    def ans_encoded(self, raw: Sequence[bytes], *, item_bytes: int) -> list[tuple[int, bytes]]:
        """Statuses and stored bytes of a batch of raw chunks."""
        sizes = [len(each) for each in raw]
        rooms = [self.nvcomp.ans_max_stored_bytes(size, item_bytes=item_bytes) for size in sizes]
        scratch_bytes = self.nvcomp.ans_encode_temp_bytes(
            len(raw), largest_raw_bytes=max(sizes), total_raw_bytes=sum(sizes), item_bytes=item_bytes
        )
        batch = EncodeBatch(
            item_count=len(raw),
            raw=self.addresses([self.driver.memory(each) for each in raw]),
            raw_bytes=self.addresses(sizes),
            largest_raw_bytes=max(sizes),
            targets=self.addresses([self.room(each) for each in rooms]),
            stored_bytes=self.addresses([0] * len(raw)),
            statuses=self.room(4 * len(raw)),
            scratch=self.room(scratch_bytes),
            scratch_bytes=scratch_bytes,
        )
        self.nvcomp.ans_encode(batch, item_bytes=item_bytes, stream=self.stream)
        return self.results(len(raw), batch.targets, batch.stored_bytes, batch.statuses)

    def ans(self, stored: Sequence[bytes], room: Sequence[int], *, item_bytes: int) -> list[tuple[int, bytes]]:
        """Statuses and bytes of a batch of ANS chunks."""
        batch = self.batch(stored, room)
        self.nvcomp.ans_decode(batch, item_bytes=item_bytes, stream=self.stream)
        return self.decoded(batch)


class NvcompContract:
    """Give a fixture ``bench``: a ``Bench`` on an open driver."""

    def test_frames_of_any_writer_are_decoded_in_one_batch(self, bench: Bench):
        """Blocks of a chunk of planes and frames of other levels, of one byte to 256 KiB, come out bit for bit."""
        compressors = [zstandard.ZstdCompressor(level=level) for level in (1, 3, 19)]
        raw = [b"x", b"ab" * 5, TEXT, NOISE, bytes(BLOCK_BYTES), bf16_weights(5_000)]
        pairs = [(compressor.compress(each), each) for compressor in compressors for each in raw]
        pairs += frames_of_planes(bf16_weights(BLOCK_BYTES + 12_345))
        assert len(pairs) >= 20
        results = bench.zstd([stored for stored, _ in pairs], [len(each) for _, each in pairs])
        assert results == [(SUCCESS, each) for _, each in pairs]

    def test_a_target_that_is_too_small_is_reported(self, bench: Bench):
        """The item's status says so, and the others of the batch are decoded."""
        frame = zstandard.compress(TEXT)
        results = bench.zstd([frame, frame, frame], [len(TEXT), len(TEXT) - 1, len(TEXT) + 100])
        assert results == [(SUCCESS, TEXT), (CANNOT_DECOMPRESS, b""), (SUCCESS, TEXT)]

    def test_a_batch_is_decoded_in_its_streams_turn(self, bench: Bench):
        """What is copied to the device before it in the stream, after the call or not, is what is decoded."""
        driver, stored = bench.driver, zstandard.compress(TEXT)
        batch = bench.batch([bytes(len(stored))], [len(TEXT)])
        (place,) = struct.unpack("<Q", driver.content(batch.stored, 8))
        source = driver.pinned(bytes(len(stored)))
        with driver.held(bench.stream):
            driver.do("cuMemcpyHtoDAsync_v2", place, source, len(stored), bench.stream)
            bench.nvcomp.zstd_decode(batch, stream=bench.stream)
            source[:] = stored
        assert bench.decoded(batch) == [(SUCCESS, TEXT)]

    def test_ans_of_halves_comes_back_smaller(self, bench: Bench):
        """bf16 weights in chunks of several sizes are stored in less than they were, and decode to the same bytes."""
        weights = bf16_weights(300_000)
        raw = [weights[:524_288], weights[:20_000], weights[100:65_636]]
        encoded = bench.ans_encoded(raw, item_bytes=2)
        assert [status for status, _ in encoded] == [SUCCESS] * 3
        stored = [each for _, each in encoded]
        assert len(stored[0]) < len(raw[0])
        assert bench.ans(stored, list(map(len, raw)), item_bytes=2) == [(SUCCESS, each) for each in raw]

    def test_ans_of_bytes_comes_back(self, bench: Bench):
        """Items of other sizes are coded byte by byte; noise fits the room that was asked for."""
        raw = [NOISE, TEXT, b"x", bytes(10_000)]
        encoded = bench.ans_encoded(raw, item_bytes=1)
        assert [status for status, _ in encoded] == [SUCCESS] * 4
        stored = [each for _, each in encoded]
        assert len(stored[1]) < len(TEXT)
        assert bench.ans(stored, list(map(len, raw)), item_bytes=1) == [(SUCCESS, each) for each in raw]

    def test_sizes_are_told_beforehand(self, bench: Bench):
        """Scratch grows with the batch; ANS may need more room than the raw bytes; alignments are powers of two."""
        nvcomp = bench.nvcomp
        one, ten = (
            nvcomp.zstd_temp_bytes(count, largest_raw_bytes=BLOCK_BYTES, total_raw_bytes=count * BLOCK_BYTES)
            for count in (1, 10)
        )
        assert BLOCK_BYTES < one < ten <= 10 * 4 * BLOCK_BYTES
        assert nvcomp.ans_max_stored_bytes(1 << 20, item_bytes=2) > 1 << 20
        found = [nvcomp.zstd_alignments(), nvcomp.ans_encode_alignments(item_bytes=2)]
        found.append(nvcomp.ans_decode_alignments(item_bytes=2))
        assert all(number & (number - 1) == 0 < number <= 256 for each in found for number in each)
        assert nvcomp.version.startswith("6.")
