"""The engine that works everywhere: a few threads of this process, standard library calls into the arena.

A raw chunk is read straight into its final place and hashed there; an encoded one is read into a buffer of its own,
hashed, and only then shown to its decoder. A chunk whose bytes are wrong is read once more before the fetch fails.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from coldstart.codecs import codec
from coldstart.errors import BlobCorruptError, SnapshotError
from coldstart.fetch.base import Fetch, FetchReport, FetchRequest
from coldstart.manifest import blob_key
from coldstart.pipeline import Job, run_all
from coldstart.plan import fetch_order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstart.manifest import Chunk


def start_threads(request: FetchRequest) -> Fetch:
    """Begin fetching on threads of this process."""
    return _ThreadFetch(request)


class _ThreadFetch(Fetch):
    def __init__(self, request: FetchRequest) -> None:
        self._request = request
        self._stop = threading.Event()
        self._retried = 0
        self._error: BaseException | None = None
        self._began = time.monotonic()
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
        return FetchReport("threads", fetched_bytes, self._retried, self._began, self._ended)

    def cancel(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        request = self._request
        try:
            run_all(
                self._jobs(),
                threads=max(1, min(request.threads, len(request.manifest.chunks))),
                budget_bytes=request.budget_bytes,
                name="coldstart-fetch",
                stop=self._stop,
            )
        except BaseException as error:  # noqa: BLE001  raised again by wait(), in the thread that asked
            self._error = error
        self._ended = time.monotonic()

    def _jobs(self) -> Iterator[Job]:
        for index in fetch_order(self._request.manifest):
            chunk = self._request.manifest.chunks[index]
            cost = 0 if chunk.codec == "raw" else chunk.stored_bytes
            yield Job(cost, partial(self._place, chunk))

    def _place(self, chunk: Chunk) -> None:
        try:
            self._read(chunk)
        except BlobCorruptError:
            self._retried += 1
            self._read(chunk)

    def _read(self, chunk: Chunk) -> None:
        end = chunk.offset_bytes + chunk.length_bytes
        target = self._request.arena.writable(chunk.segment)[chunk.offset_bytes : end]
        if chunk.codec == "raw":
            if chunk.stored_bytes != chunk.length_bytes:
                raise BlobCorruptError(f"raw chunk {chunk.blob} has another length than its place", key=chunk.blob)
            self._request.store.read_into(blob_key(chunk.blob), target)
            _check(target, chunk.blob, chunk.blob)
        else:
            stored = memoryview(bytearray(chunk.stored_bytes))
            self._request.store.read_into(blob_key(chunk.blob), stored)
            _check(stored, chunk.blob, chunk.blob)
            item_bytes = self._request.manifest.segments[chunk.segment].item_bytes
            codec(chunk.codec).decode(stored, target, item_bytes=item_bytes, parameters=chunk.parameters)
        if self._request.verify_raw:
            _check(target, chunk.raw_hash, chunk.blob)


def _check(data: memoryview, expected: str, blob: str) -> None:
    from blake3 import blake3

    if blake3(data).hexdigest() != expected:
        raise BlobCorruptError(
            f"blob {blob} is not what its name says: altered or damaged in the store", key=blob_key(blob)
        )
