"""The fetcher process: what ``coldstart.fetch.process`` starts. It reads its task from the wire and fills the arena."""

from __future__ import annotations

import mmap
import os
import queue
import signal
import socket
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from coldstart.devices.cpu import CpuDevice
from coldstart.errors import ColdstartError
from coldstart.fetch.base import Address, FetchRequest, Fillable
from coldstart.fetch.crew import Bounds, next_chunk, queue_of, share_of
from coldstart.fetch.threads import start_threads
from coldstart.fetch.wire import WIRE_FD, receive, send
from coldstart.manifest import Manifest, manifest_from_json, ref_from_json
from coldstart.plan import fetch_order
from coldstart.stores import StoreOptions, open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.stores.base import Store

    _Inbox = queue.SimpleQueue[tuple[dict[str, Any], list[int]]]


def main() -> None:
    """Do the one task that comes over the wire, say how it ended, and leave."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both; the parent decides
    wire = socket.socket(fileno=WIRE_FD)
    inbox: _Inbox = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(wire, inbox), daemon=True).start()
    task, descriptors = inbox.get()
    degraded: list[str] = []
    try:
        store = open_store(*Address(task["url"], StoreOptions(**task["options"])), degraded=degraded.append)
        if "ref_key" in task:
            outcome = _look_up_and_fetch(wire, inbox, task, store)
        else:
            outcome = _fetch(wire, task, manifest_from_json(task["manifest"].encode()), store, descriptors)
        _say(wire, {**outcome, "degraded": degraded})
    except ColdstartError as error:
        _say(wire, {"error": type(error).__name__, "message": str(error), "snapshot": error.snapshot, "key": error.key})
    os._exit(0)  # nothing is to be cleaned up, and the parent waits


def _listen(wire: socket.socket, inbox: _Inbox) -> None:
    """Take what the parent sends; the end of the wire is the end of this process."""
    while True:
        message, descriptors = receive(wire)
        if message is None:
            os._exit(0)
        inbox.put((message, descriptors))


def _say(wire: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    with suppress(OSError):  # the parent has gone, and so will this process
        send(wire, message, descriptors)


# --- what is looked up here --------------------------------------------------------------------------------------------


def _look_up_and_fetch(wire: socket.socket, inbox: _Inbox, task: dict[str, Any], store: Store) -> dict[str, Any]:
    """Send ref and manifest, and fetch. What cannot be read, or held, the parent does itself, and says why."""
    try:
        stored = store.get(task["ref_key"])
        _say_object(wire, task["ref_key"], stored.data, stored.etag)
        key = ref_from_json(stored.data).manifest
        stored = store.get(key)
        manifest = manifest_from_json(stored.data)
        arena = None if _may_be_mapped(store) else _arena_of(manifest)
    except ColdstartError:
        os._exit(0)
    if arena is None or arena.fileno is None:
        _say_object(wire, key, stored.data, stored.etag, is_manifest=True)
        task, descriptors = inbox.get()
        return _fetch(wire, task, manifest, store, descriptors)
    queue_fd = queue_of(fetch_order(manifest))
    _say_object(wire, key, stored.data, stored.etag, is_manifest=True, descriptors=(arena.fileno, queue_fd))
    return _fetch_into(wire, arena, share_of(Bounds(*task["bounds"]), manifest), manifest, store, queue_fd)


def _may_be_mapped(store: Store) -> bool:
    """Whether this host may have the snapshot in flat files, which its parent looks for."""
    return getattr(store, "flat_files", None) is not None


def _arena_of(manifest: Manifest) -> Any:
    return CpuDevice().allocate([segment.length_bytes for segment in manifest.segments])


def _say_object(
    wire: socket.socket,
    key: str,
    data: bytes,
    etag: str,
    *,
    is_manifest: bool = False,
    descriptors: Sequence[int] = (),
) -> None:
    text = data.decode("utf-8", "surrogateescape")
    found = {"key": key, "data": text, "etag": etag, "is_manifest": is_manifest, "found_seconds": time.monotonic()}
    _say(wire, found, descriptors)


# --- fetching ----------------------------------------------------------------------------------------------------------


def _fetch(
    wire: socket.socket, task: dict[str, Any], manifest: Manifest, store: Store, descriptors: Sequence[int]
) -> dict[str, Any]:
    """Fetch as the parent says, into the arena that it has sent; with a queue of chunks where others fetch too."""
    arena_fd, *queue_fds = descriptors
    arena = _Shared(arena_fd, task["segment_offsets"], [segment.length_bytes for segment in manifest.segments])
    return _fetch_into(wire, arena, Bounds(*task["bounds"]), manifest, store, *queue_fds)


def _fetch_into(
    wire: socket.socket, arena: Fillable, bounds: Bounds, manifest: Manifest, store: Store, queue_fd: int | None = None
) -> dict[str, Any]:
    report = start_threads(
        FetchRequest(
            manifest,
            store,
            arena,
            bounds.threads,
            bounds.budget_bytes,
            verify_raw=bounds.verify_raw,
            progress=lambda placed_bytes: _say(wire, {"placed_bytes": placed_bytes}),
            processes=bounds.processes,
            next_chunk=None if queue_fd is None else partial(next_chunk, queue_fd),
        )
    ).wait()
    return {
        "retried_chunks": report.retried_chunks,
        "began_seconds": report.began_monotonic_seconds,
        "ended_seconds": report.ended_monotonic_seconds,
        "reads": report.reads,
    }


class _Shared:
    """The parent's arena, mapped here too: what is written to it is in the parent's memory."""

    def __init__(self, arena_fd: int, offsets: list[int], lengths_bytes: list[int]) -> None:
        self.fileno = arena_fd
        self.segment_offsets = offsets
        self._lengths_bytes = lengths_bytes
        self._map = memoryview(mmap.mmap(arena_fd, 0, flags=mmap.MAP_SHARED))

    def writable(self, segment: int) -> memoryview:
        """The segment's memory."""
        offset = self.segment_offsets[segment]
        return self._map[offset : offset + self._lengths_bytes[segment]]
