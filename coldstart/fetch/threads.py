"""The engine that works everywhere: threads of this process, standard library calls, one chunk a thread.

A chunk is received in a buffer that is used again and again, hashed there while a processor's cache still has it, decoded
if it is encoded, and put in its place. So no byte is in the arena that was not verified, and the arena's pages are
written whole: a write to a memory file fills a fresh page at half the cost of the page fault that a store through a
mapping takes (0.38 against 0.79 s of a processor for 1 GiB). Receiving straight into the mapping, without the copy, took a
tenth more of a processor's time. A chunk whose bytes are wrong is read once more before the fetch fails.

Reads wait for the network and there are many of them; decoding needs a processor, and no more chunks are decoded at
once than there are processors.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from coldstart.codecs import codec
from coldstart.errors import BlobCorruptError, CodecError, ObjectMissingError, SnapshotError
from coldstart.fetch.base import PROGRESS_SECONDS, Fetch, FetchReport, FetchRequest
from coldstart.fetch.width import Width
from coldstart.manifest import blob_key
from coldstart.pipeline import Job, run_all
from coldstart.plan import fetch_order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstart.fetch.ring import Ring
    from coldstart.manifest import Chunk

RAW = "raw"


def start_threads(request: FetchRequest) -> Fetch:
    """Begin fetching on threads of this process."""
    return _ThreadFetch(request)


class _ThreadFetch(Fetch):
    def __init__(self, request: FetchRequest) -> None:
        self._request = request
        self._stop = threading.Event()
        self._retried = 0
        self._error: BaseException | None = None
        chunks = request.manifest.chunks
        self._width = Width(most=max(1, min(request.threads, len(chunks))))
        self._others = {form.chunk: form.of(chunks[form.chunk]) for form in request.manifest.forms}
        """What is read where a chunk cannot be had in the form that the manifest has in its place."""
        self._replaced = 0
        stored = [*chunks, *self._others.values()]
        self._buffers = _Buffers(max((chunk.stored_bytes for chunk in stored), default=0))
        self._rooms = _Buffers(max((chunk.length_bytes for chunk in chunks if chunk.codec != RAW), default=0))
        decoders = _decoders(request, self._rooms.size_bytes)
        self._budget_bytes = request.budget_bytes - decoders * self._rooms.size_bytes
        self._decoding = threading.Semaphore(decoders)
        self._lock = threading.Lock()
        self._placed_bytes = 0
        self._began = time.monotonic()
        self._tells_seconds = self._began + PROGRESS_SECONDS
        self._ended = self._began
        self._thread = threading.Thread(target=self._run, name=f"coldstart-fetch-{request.manifest.name}", daemon=True)
        self._thread.start()

    def wait(self) -> FetchReport:
        self._thread.join()
        if self._error is not None:
            raise self._error
        manifest = self._request.manifest
        if self._stop.is_set():
            raise SnapshotError("the fetch was cancelled", snapshot=manifest.name)
        fetched_bytes = sum(chunk.stored_bytes for chunk in manifest.chunks)
        degraded = (f"{self._replaced} chunks had to be read in another form",) if self._replaced else ()
        return FetchReport(
            "threads", fetched_bytes, self._retried, self._began, self._ended, self._width.reads, degraded
        )

    def cancel(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        try:
            run_all(
                self._jobs(),
                threads=self._width.reads,
                budget_bytes=self._budget_bytes,
                name="coldstart-fetch",
                stop=self._stop,
                width=lambda _: self._width.reads,
            )
        except BaseException as error:  # noqa: BLE001  raised again by wait(), in the thread that asked
            self._error = error
        self._ended = time.monotonic()

    def _jobs(self) -> Iterator[Job]:
        ordered = iter(fetch_order(self._request.manifest))
        following = self._request.next_chunk or (lambda: next(ordered, None))
        while (index := following()) is not None:
            chunk = self._request.manifest.chunks[index]
            work = (
                self._fetch if self._request.ring is None else partial(self._fetch_to_ring, self._request.ring, index)
            )
            yield Job(self._buffers.size_bytes, partial(work, chunk))

    def _fetch(self, chunk: Chunk) -> None:
        with self._read(chunk) as stored:
            if chunk.codec == RAW:
                self._place(chunk, stored)
            else:
                self._decode_and_place(chunk, stored)
        self._count(chunk.stored_bytes)

    def _fetch_to_ring(self, ring: Ring, index: int, chunk: Chunk) -> None:
        if not self._goes_as_stored(chunk):
            with self._read(chunk) as stored, ring.taken() as (slot, epoch):
                with self._decoding:
                    self._decode(chunk, stored, ring.slot(slot, chunk.length_bytes))
                ring.hand_over(slot, epoch, index, is_raw=True)
        else:
            with ring.taken() as (slot, epoch):
                is_raw = self._read_to_slot(ring, slot, index, chunk)
                ring.hand_over(slot, epoch, index, is_raw=is_raw)
        self._count(chunk.stored_bytes)

    def _read_to_slot(self, ring: Ring, slot: int, index: int, chunk: Chunk) -> bool:
        """Fill a slot with a chunk as it is stored, or else from its other form; whether it has raw bytes now."""
        try:
            self._read_as_stored(chunk, ring.slot(slot, chunk.stored_bytes))
        except (BlobCorruptError, CodecError, ObjectMissingError):
            if index not in self._others:
                raise
            self._read_other(index, ring.slot(slot, chunk.length_bytes))
            self._replaced += 1
            return True
        if self._request.verify_raw and index in self._others:
            self._read_other(index, memoryview(bytearray(chunk.length_bytes)))
        return chunk.codec == RAW

    def _read_as_stored(self, chunk: Chunk, room: memoryview) -> None:
        """Fill ``room`` with the stored bytes of a chunk, whose claims are right too."""
        self._read_into(chunk, room)
        if chunk.codec != RAW:
            codec(chunk.codec).check(
                room, chunk.length_bytes, item_bytes=self._item_bytes(chunk), parameters=chunk.parameters
            )

    def _read_other(self, index: int, raw: memoryview) -> None:
        """Fill ``raw`` from the other form of a chunk."""
        other = self._others[index]
        with self._read(other) as stored, self._decoding:
            self._decode(other, stored, raw)

    def _count(self, placed_bytes: int) -> None:
        with self._lock:
            self._placed_bytes += placed_bytes
            now = time.monotonic()
            if self._request.progress is not None and now >= self._tells_seconds:
                self._tells_seconds = now + PROGRESS_SECONDS
                self._request.progress(self._placed_bytes)

    def _goes_as_stored(self, chunk: Chunk) -> bool:
        if chunk.codec == RAW:
            return chunk.stored_bytes == chunk.length_bytes  # any other is refused where it is decoded
        return chunk.codec in self._request.device_codecs and chunk.segment not in self._request.manifest.host_segments

    @contextmanager
    def _read(self, chunk: Chunk) -> Iterator[memoryview]:
        """The stored bytes of a chunk, verified, for as long as the block lasts."""
        with self._buffers.one() as buffer:
            stored = buffer[: chunk.stored_bytes]
            self._read_into(chunk, stored)
            yield stored

    def _read_into(self, chunk: Chunk, room: memoryview) -> None:
        """Fill ``room`` with the stored bytes of a chunk; what is not what its name says is read once more."""
        try:
            self._read_once(chunk, room)
        except BlobCorruptError:
            self._retried += 1
            self._read_once(chunk, room)

    def _read_once(self, chunk: Chunk, room: memoryview) -> None:
        self._request.store.read_into(blob_key(chunk.blob), room)
        self._width.finished(len(room))
        _check(room, chunk.blob, chunk.blob)

    def _decode_and_place(self, chunk: Chunk, stored: memoryview) -> None:
        with self._decoding, self._rooms.one() as room:
            self._decode(chunk, stored, room[: chunk.length_bytes])
            self._put(chunk, room[: chunk.length_bytes])

    def _decode(self, chunk: Chunk, stored: memoryview, raw: memoryview) -> None:
        item_bytes = self._item_bytes(chunk)
        codec(chunk.codec).decode(stored, raw, item_bytes=item_bytes, parameters=chunk.parameters)
        if self._request.verify_raw:
            _check(raw, chunk.raw_hash, chunk.blob)

    def _item_bytes(self, chunk: Chunk) -> int:
        return self._request.manifest.segments[chunk.segment].item_bytes

    def _place(self, chunk: Chunk, raw: memoryview) -> None:
        if len(raw) != chunk.length_bytes:
            raise BlobCorruptError(f"raw chunk {chunk.blob} has another length than its place", key=chunk.blob)
        if self._request.verify_raw:
            _check(raw, chunk.raw_hash, chunk.blob)
        self._put(chunk, raw)

    def _put(self, chunk: Chunk, raw: memoryview) -> None:
        assert self._request.arena is not None
        self._request.arena.place(chunk.segment, chunk.offset_bytes, raw)


class _Buffers:
    """Memory for one chunk each, used again and again: fresh memory costs a page fault and a zeroed page each 4 KiB.

    There are never more than were in use at once, which the byte budget bounds.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._free: list[bytearray] = []

    @contextmanager
    def one(self) -> Iterator[memoryview]:
        """A buffer for as long as the block lasts."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = bytearray(self.size_bytes)
        try:
            yield memoryview(buffer)
        finally:
            self._free.append(buffer)


def _decoders(request: FetchRequest, raw_bytes: int) -> int:
    """How many chunks of ``raw_bytes`` to decode at once: a processor each, and half of the budget for all at most."""
    affordable = request.budget_bytes // 2 // raw_bytes if raw_bytes else 1
    return max(1, min(processors() // request.processes, affordable))


def processors(quota_file: str = "/sys/fs/cgroup/cpu.max") -> int:
    """How many processors this process may keep busy: those it may run on, or its container's share of their time."""
    runs_on = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open(quota_file, encoding="ascii") as file:
            quota, period = map(int, file.read().split())
    except (OSError, ValueError):  # no such limit: the file says "max"
        return runs_on
    return max(1, min(runs_on, round(quota / period)))


def _check(data: memoryview, expected: str, blob: str) -> None:
    from blake3 import blake3

    if blake3(data).hexdigest() != expected:
        raise BlobCorruptError(
            f"blob {blob} is not what its name says: altered or damaged in the store", key=blob_key(blob)
        )
