"""nvCOMP and the kernels, alone on the device: no copies, no store. Rates are of raw bytes, by the device's own events."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.on_gpu import partial
from benchmarks.on_gpu.snapshots import weights
from benchmarks.on_gpu.timing import Clock, rate
from coldstart.codecs.nvcomp import DecodeBatch, EncodeBatch, Nvcomp, status_name
from coldstart.codecs.planes import PlanesCodec, planes_of
from coldstart.devices.cuda_driver import Stream, open_gpu
from coldstart.devices.cuda_hashes import Hashes
from coldstart.devices.cuda_kernels import kernels_on
from coldstart.devices.cuda_memory import DeviceMemory, PinnedMemory, copy_out
from coldstart.errors import CodecError
from coldstart.fetch.threads import processors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.on_gpu.timing import Sizes
    from coldstart.devices.cuda_driver import Gpu

BLOCK_BYTES = (64 << 10, 128 << 10, 256 << 10)
BATCH_BYTES = (8 << 20, 16 << 20, 32 << 20, 64 << 20)
ANS_CHUNK_BYTES = (256 << 10, 512 << 10, 1 << 20)
ANS_BATCH_BYTES = (64 << 20, 256 << 20)
ALIGNMENT_BYTES = 256
GOALS = {"ans_decode_gb_per_second": 107, "ans_encode_gb_per_second": 41}


class Desk:
    """A GPU with what batches need on it. Everything that was put on it lives as long as it does."""

    def __init__(self) -> None:
        self.gpu: Gpu = open_gpu(0)
        self.stream = Stream(self.gpu)
        self.clock = Clock(self.gpu)
        self._kept: list[DeviceMemory] = []

    def room(self, length_bytes: int) -> int:
        """The address of fresh device memory."""
        self._kept.append(DeviceMemory(self.gpu, length_bytes))
        return self._kept[-1].address

    def put(self, data: bytes | memoryview) -> int:
        """The address of a copy in device memory."""
        address, pinned = self.room(len(data)), PinnedMemory(self.gpu, len(data))
        pinned.view[:] = data
        self.stream.copy_in(address, pinned.address, len(data))
        self.stream.synchronize()
        pinned.end()
        return address

    def words(self, values: Sequence[int]) -> int:
        """The address of a table of 64-bit words."""
        return self.put(bytes((ctypes.c_uint64 * len(values))(*values)))

    def items(self, items: Sequence[bytes | memoryview]) -> list[int]:
        """Items one behind another, each aligned; their addresses."""
        places, end = [], 0
        for item in items:
            places.append(end)
            end += aligned(len(item))
        packed = bytearray(end)
        for place, item in zip(places, items, strict=True):
            packed[place : place + len(item)] = item
        base = self.put(memoryview(packed))
        return [base + place for place in places]

    def rooms(self, lengths: Sequence[int]) -> list[int]:
        """Room for items of these lengths; their addresses."""
        places, end = [], 0
        for length in lengths:
            places.append(end)
            end += aligned(length)
        base = self.room(end)
        return [base + place for place in places]

    def timed(self, repeats: int, work: Any) -> list[float]:
        """Seconds of each repeat, after one that warms up."""
        with self.gpu.current():
            self.clock.seconds(self.stream, work)
            return [self.clock.seconds(self.stream, work) for _ in range(repeats)]

    def numbers(self, address: int, count: int, kind: Any) -> list[int]:
        """What a table on the device holds."""
        data = copy_out(self.gpu, address, count * ctypes.sizeof(kind))
        return list((kind * count).from_buffer_copy(data))

    def clear(self) -> None:
        """Give all memory back."""
        for memory in self._kept:
            memory.end()
        self._kept.clear()


def aligned(length_bytes: int) -> int:
    return -(-length_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def zstd(sizes: Sizes) -> dict[str, Any]:
    """Frames of exponent planes, decoded in batches: by block size and raw bytes of the batch."""
    nvcomp, desk = Nvcomp.load(), Desk()
    rows: list[dict[str, Any]] = []
    found = {"nvcomp": nvcomp.version, "rows": rows, "goals": GOALS}
    repeats = min(sizes.repeats, 11)
    for block_bytes in BLOCK_BYTES if not sizes.is_rehearsal else (16 << 10,):
        batches = BATCH_BYTES if not sizes.is_rehearsal else (256 << 10,)
        frames = exponent_frames(block_bytes, max(batches))
        for batch_bytes in batches:
            chosen = frames[: batch_bytes // block_bytes]
            rows.append(_zstd_row(desk, nvcomp, chosen, block_bytes, repeats))
            desk.clear()
            partial.keep(found)
    return found


def exponent_frames(block_bytes: int, plane_bytes: int) -> list[tuple[bytes, bytes]]:
    """Frames as chunks of planes+zstd have them, each with its raw bytes."""
    codec = PlanesCodec(block_bytes=block_bytes)
    piece_bytes = max(2 * block_bytes, min(8 << 20, 2 * plane_bytes))

    def of_piece(number: int) -> list[tuple[bytes, bytes]]:
        raw = weights(piece_bytes, number)
        stored, parameters = codec.encode(memoryview(raw), item_bytes=2)
        planes = planes_of(memoryview(stored), len(raw), item_bytes=2, parameters=parameters)
        exponents = raw[1::2]
        found = []
        for place, block in enumerate(planes.blocks[planes.block_count :]):
            frame = bytes(memoryview(stored)[block.offset_bytes : block.offset_bytes + block.stored_bytes])
            found.append((frame, exponents[place * block_bytes : place * block_bytes + block.raw_bytes]))
        return found

    with ThreadPoolExecutor(min(16, processors())) as pool:
        pieces = pool.map(of_piece, range(-(-2 * plane_bytes // piece_bytes)))
        return [pair for piece in pieces for pair in piece]


def _zstd_row(
    desk: Desk, nvcomp: Nvcomp, frames: Sequence[tuple[bytes, bytes]], block_bytes: int, repeats: int
) -> dict[str, Any]:
    stored, raw = [frame for frame, _ in frames], [each for _, each in frames]
    raw_bytes = sum(map(len, raw))
    with desk.gpu.current():
        scratch_bytes = nvcomp.zstd_temp_bytes(len(raw), largest_raw_bytes=block_bytes, total_raw_bytes=raw_bytes)
    batch, targets = _decode_batch(desk, stored, list(map(len, raw)), scratch_bytes)
    seconds = desk.timed(repeats, lambda: nvcomp.zstd_decode(batch, stream=desk.stream.handle))
    _check(desk, batch.statuses, targets, raw)
    return {
        "block_bytes": block_bytes,
        "frames": len(frames),
        "plane_bytes": raw_bytes,
        "stored_part": round(sum(map(len, stored)) / raw_bytes, 4),
        "scratch_bytes": scratch_bytes,
        "plane": rate(raw_bytes, seconds),
        "bf16_gb_per_second": round(2 * raw_bytes / median(seconds) / 1e9, 2),
    }


def _decode_batch(
    desk: Desk, stored: Sequence[bytes], lengths: Sequence[int], scratch_bytes: int
) -> tuple[DecodeBatch, list[int]]:
    targets, count = desk.rooms(lengths), len(stored)
    batch = DecodeBatch(
        item_count=count,
        stored=desk.words(desk.items(stored)),
        stored_bytes=desk.words(list(map(len, stored))),
        targets=desk.words(targets),
        room_bytes=desk.words(lengths),
        decoded_bytes=desk.room(8 * count),
        statuses=desk.room(4 * count),
        scratch=desk.room(scratch_bytes),
        scratch_bytes=scratch_bytes,
    )
    return batch, targets


def _check(desk: Desk, statuses: int, targets: Sequence[int], raw: Sequence[bytes]) -> None:
    """A rate of wrong bytes is none."""
    failed = {status for status in desk.numbers(statuses, len(raw), ctypes.c_int32) if status}
    if failed:
        raise CodecError(f"nvCOMP failed: {', '.join(map(status_name, failed))}")
    for target, expected in list(zip(targets, raw, strict=True))[:: max(1, len(raw) // 16)]:
        if copy_out(desk.gpu, target, len(expected)) != bytes(expected):
            raise CodecError("nvCOMP decoded to other bytes than were encoded")


def ans(sizes: Sizes) -> dict[str, Any]:
    """ANS of bf16, encoded and decoded: by the size of a chunk and the raw bytes of the batch."""
    nvcomp, desk = Nvcomp.load(), Desk()
    rows: list[dict[str, Any]] = []
    found = {"nvcomp": nvcomp.version, "rows": rows, "goals": GOALS}
    repeats = min(sizes.repeats, 11)
    for chunk_bytes in ANS_CHUNK_BYTES if not sizes.is_rehearsal else (64 << 10,):
        for batch_bytes in ANS_BATCH_BYTES if not sizes.is_rehearsal else (256 << 10,):
            rows.append(_ans_row(desk, nvcomp, chunk_bytes, batch_bytes, repeats))
            desk.clear()
            partial.keep(found)
    return found


def _ans_row(desk: Desk, nvcomp: Nvcomp, chunk_bytes: int, batch_bytes: int, repeats: int) -> dict[str, Any]:
    count = batch_bytes // chunk_bytes
    own = [weights(chunk_bytes, number) for number in range(min(count, 64))]
    raw = [own[number % len(own)] for number in range(count)]
    sizes = {"largest_raw_bytes": chunk_bytes, "total_raw_bytes": batch_bytes, "item_bytes": 2}
    with desk.gpu.current():
        room_bytes = nvcomp.ans_max_stored_bytes(chunk_bytes, item_bytes=2)
        encode_scratch = nvcomp.ans_encode_temp_bytes(count, **sizes)
        decode_scratch = nvcomp.ans_decode_temp_bytes(count, **sizes)
    rooms = desk.rooms([room_bytes] * count)
    encoding = EncodeBatch(
        item_count=count,
        raw=desk.words(desk.items(raw)),
        raw_bytes=desk.words([chunk_bytes] * count),
        largest_raw_bytes=chunk_bytes,
        targets=desk.words(rooms),
        stored_bytes=desk.room(8 * count),
        statuses=desk.room(4 * count),
        scratch=desk.room(encode_scratch),
        scratch_bytes=encode_scratch,
    )
    encoded = desk.timed(repeats, lambda: nvcomp.ans_encode(encoding, item_bytes=2, stream=desk.stream.handle))
    lengths = desk.numbers(encoding.stored_bytes, count, ctypes.c_uint64)
    stored = [copy_out(desk.gpu, room, length) for room, length in zip(rooms, lengths, strict=True)]
    decoding, targets = _decode_batch(desk, stored, [chunk_bytes] * count, decode_scratch)
    decoded = desk.timed(repeats, lambda: nvcomp.ans_decode(decoding, item_bytes=2, stream=desk.stream.handle))
    _check(desk, decoding.statuses, targets, raw)
    return {
        "chunk_bytes": chunk_bytes,
        "batch_bytes": batch_bytes,
        "stored_part": round(sum(lengths) / batch_bytes, 4),
        "encode_scratch_bytes": encode_scratch,
        "decode_scratch_bytes": decode_scratch,
        "encode": rate(batch_bytes, encoded),
        "decode": rate(batch_bytes, decoded),
    }


def kernels(sizes: Sizes) -> dict[str, Any]:
    """Merging planes and BLAKE3, in GB/s of raw bytes."""
    desk = Desk()
    found: dict[str, Any] = {"merge": {}, "blake3": []}
    raw_bytes = min(sizes.raw_bytes, 512 << 20)
    for item_bytes in (2, 4, 8, 1):
        found["merge"][f"{item_bytes} bytes"] = _merge(desk, raw_bytes, item_bytes, sizes)
        desk.clear()
    for chunk_bytes in (4 << 20, 16 << 20) if not sizes.is_rehearsal else (128 << 10,):
        found["blake3"].append(_blake3(desk, raw_bytes, chunk_bytes, sizes))
        desk.clear()
    return {"raw_bytes": raw_bytes, **found}


def _merge(desk: Desk, raw_bytes: int, item_bytes: int, sizes: Sizes) -> dict[str, Any]:
    """In chunks of the size that restores have, one launch for each, blocks as planes+zstd has them."""
    block_bytes = 256 << 10 if not sizes.is_rehearsal else 16 << 10
    plane_bytes = sizes.chunk_bytes // item_bytes
    block_count = -(-plane_bytes // block_bytes)
    source, target = desk.put(weights(sizes.chunk_bytes, 1)), desk.room(raw_bytes)
    starts = [
        source + plane * plane_bytes + block * block_bytes
        for plane in range(item_bytes)
        for block in range(block_count)
    ]
    table, own = desk.words(starts), kernels_on(desk.gpu)

    def work() -> None:
        for begin in range(0, raw_bytes, sizes.chunk_bytes):
            own.merge_planes(
                desk.stream,
                target + begin,
                table,
                plane_bytes=plane_bytes,
                block_bytes=block_bytes,
                block_count=block_count,
                item_bytes=item_bytes,
            )

    return rate(raw_bytes, desk.timed(min(sizes.repeats, 11), work))


def _blake3(desk: Desk, raw_bytes: int, chunk_bytes: int, sizes: Sizes) -> dict[str, Any]:
    data = desk.room(raw_bytes)
    desk.stream.fill(data, 5, raw_bytes)
    ranges = [(data + begin, chunk_bytes) for begin in range(0, raw_bytes - chunk_bytes + 1, chunk_bytes)]
    hashes = Hashes(desk.gpu, len(ranges), chunk_bytes)
    seconds = desk.timed(min(sizes.repeats, 11), lambda: hashes.queue(ranges, desk.stream))
    desk.stream.synchronize()
    hashes.end()
    return {"chunk_bytes": chunk_bytes, "chunks": len(ranges), **rate(chunk_bytes * len(ranges), seconds)}
