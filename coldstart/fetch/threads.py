"""The engine that works everywhere: threads of this process, standard library calls into the arena.

A raw chunk is read straight into its final place and hashed there; an encoded one is read into a buffer of its own,
hashed, and only then shown to its decoder. A chunk whose bytes are wrong is read once more before the fetch fails.

Reads wait for the network and there are many of them; decoding needs a processor, and no more chunks are decoded at
once than there are processors. Where the arena is a memory file, a chunk is decoded into memory that is used again and
again, and from there written to the file: a write fills a fresh page of the file at half the cost of the page fault
that a store through a mapping takes (0.38 against 0.79 s of a processor for 1 GiB).
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from coldstart.codecs import codec
from coldstart.errors import BlobCorruptError, SnapshotError
from coldstart.fetch.base import PROGRESS_SECONDS, Fetch, FetchReport, FetchRequest
from coldstart.fetch.width import Width
from coldstart.manifest import blob_key
from coldstart.pipeline import Job, run_all
from coldstart.plan import fetch_order

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        encoded = [chunk for chunk in chunks if chunk.codec != RAW]
        self._width = Width(most=max(1, min(request.threads, len(chunks))))
        self._buffers = _Buffers(max((chunk.stored_bytes for chunk in encoded), default=0))
        self._rooms = _Buffers(max((chunk.length_bytes for chunk in encoded), default=0))
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
        return FetchReport("threads", fetched_bytes, self._retried, self._began, self._ended, self._width.reads)

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
            yield Job(0 if chunk.codec == RAW else self._buffers.size_bytes, partial(self._place, chunk))

    def _place(self, chunk: Chunk) -> None:
        try:
            self._read(chunk)
        except BlobCorruptError:
            self._retried += 1
            self._read(chunk)
        self._count(chunk.stored_bytes)

    def _count(self, placed_bytes: int) -> None:
        with self._lock:
            self._placed_bytes += placed_bytes
            now = time.monotonic()
            if self._request.progress is not None and now >= self._tells_seconds:
                self._tells_seconds = now + PROGRESS_SECONDS
                self._request.progress(self._placed_bytes)

    def _read(self, chunk: Chunk) -> None:
        if chunk.codec != RAW:
            self._read_encoded(chunk)
            return
        if chunk.stored_bytes != chunk.length_bytes:
            raise BlobCorruptError(f"raw chunk {chunk.blob} has another length than its place", key=chunk.blob)
        target = self._place_of(chunk)
        self._read_verified(chunk, target)
        self._verify_raw(chunk, target)

    def _place_of(self, chunk: Chunk) -> memoryview:
        end = chunk.offset_bytes + chunk.length_bytes
        return self._request.arena.writable(chunk.segment)[chunk.offset_bytes : end]

    def _verify_raw(self, chunk: Chunk, raw: memoryview) -> None:
        if self._request.verify_raw:
            _check(raw, chunk.raw_hash, chunk.blob)

    def _read_verified(self, chunk: Chunk, target: memoryview) -> None:
        self._request.store.read_into(blob_key(chunk.blob), target)
        self._width.finished(len(target))
        _check(target, chunk.blob, chunk.blob)

    def _read_encoded(self, chunk: Chunk) -> None:
        with self._buffers.one() as buffer:
            stored = buffer[: chunk.stored_bytes]
            self._read_verified(chunk, stored)
            with self._decoding:
                self._decode(chunk, stored)

    def _decode(self, chunk: Chunk, stored: memoryview) -> None:
        file = getattr(self._request.arena, "fileno", None)
        if file is None:
            self._decode_into(self._place_of(chunk), chunk, stored)
            return
        with self._rooms.one() as room:
            raw = room[: chunk.length_bytes]
            self._decode_into(raw, chunk, stored)
            arena: Any = self._request.arena
            write_all(file, raw, arena.segment_offsets[chunk.segment] + chunk.offset_bytes)

    def _decode_into(self, target: memoryview, chunk: Chunk, stored: memoryview) -> None:
        item_bytes = self._request.manifest.segments[chunk.segment].item_bytes
        codec(chunk.codec).decode(stored, target, item_bytes=item_bytes, parameters=chunk.parameters)
        self._verify_raw(chunk, target)


class _Buffers:
    """Memory for encoded chunks, used again and again: fresh memory costs a page fault and a zeroed page each 4 KiB.

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


def processors() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_all(file: int, data: memoryview, offset_bytes: int) -> None:
    """Write ``data`` at ``offset_bytes`` of a file. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset_bytes + done)


def _check(data: memoryview, expected: str, blob: str) -> None:
    from blake3 import blake3

    if blake3(data).hexdigest() != expected:
        raise BlobCorruptError(
            f"blob {blob} is not what its name says: altered or damaged in the store", key=blob_key(blob)
        )
