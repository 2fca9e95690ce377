"""The fetcher process: what ``coldstart.fetch.process`` starts. It reads its task from the wire and fills the arena."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from coldstart.children import WIRE_FD, Message, receive, send, told
from coldstart.devices.cpu import CpuDevice
from coldstart.errors import ColdstartError, StoreTransientError
from coldstart.fetch.base import Address, FetchRequest, Fillable
from coldstart.fetch.crew import Bounds, next_chunk, queue_of, share_of
from coldstart.fetch.ring import Ring, RingFiles, shape_of
from coldstart.fetch.threads import start_threads
from coldstart.manifest import Manifest, manifest_from_json, ref_from_json
from coldstart.plan import fetch_order, in_forms, needed
from coldstart.programs.record import chosen, consumer_of
from coldstart.stores import StoreOptions, open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.stores.base import Store, StoredObject

    _Inbox = queue.SimpleQueue[Message]


def main() -> None:
    """Do the one task that comes over the wire, say how it ended, and leave."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both; the parent decides
    wire = socket.socket(fileno=WIRE_FD)
    inbox: _Inbox = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(wire, inbox), daemon=True).start()
    outbox = _Outbox(wire)
    task, _, descriptors = inbox.get()
    degraded: list[str] = []
    try:
        store = open_store(*Address(task["url"], StoreOptions(**task["options"])), degraded=degraded.append)
        if "ref_key" in task:
            outcome = _look_up_and_fetch(outbox, inbox, task, store)
        else:
            outcome = _fetch(outbox, task, manifest_from_json(task["manifest"].encode()), store, descriptors)
        outbox.say({**outcome, "degraded": degraded + outcome["degraded"], "tally": list(store.tally)})
    except ColdstartError as error:
        outbox.say(told(error))
    outbox.leave()


def _listen(wire: socket.socket, inbox: _Inbox) -> None:
    """Take what the parent sends; the end of the wire is the end of this process."""
    try:
        while (message := receive(wire)) is not None:
            inbox.put(message)
    finally:  # also where a message cannot be read: nobody would hear the parent any more
        os._exit(0)


class _Outbox:
    """What the parent is told, in order, by a thread of its own: it may be long before it listens, and no fetch waits for that.

    The wire takes some 200 KB that nobody has read; the manifest of a large model is larger.
    """

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def say(self, document: dict[str, Any], data: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Have it told soon; the descriptors may be closed at once."""
        self._messages.put(Message(document, data, tuple(map(os.dup, descriptors))))

    def leave(self) -> NoReturn:
        """End this process when all is told: nothing is to be cleaned up, and the parent waits."""
        self._messages.put(None)
        self._thread.join()
        os._exit(0)

    def _send(self) -> None:
        with suppress(OSError):  # the parent has gone, and so will this process
            while (message := self._messages.get()) is not None:
                send(self._wire, *message)
                for descriptor in message.descriptors:
                    os.close(descriptor)


# --- what is looked up here --------------------------------------------------------------------------------------------


def _look_up_and_fetch(outbox: _Outbox, inbox: _Inbox, task: dict[str, Any], store: Store) -> dict[str, Any]:
    """Send ref and manifest, and fetch. What cannot be read, or held, the parent does itself, and says why.

    Raises StoreTransientError for a store that does not answer.
    """
    try:
        stored = store.get(task["ref_key"])
        _say_object(outbox, task["ref_key"], stored.data, stored.etag)
        key = ref_from_json(stored.data).manifest
        stored = store.get(key)
        manifest = _needed(manifest_from_json(stored.data), task["programs"], task["kernels"])
        ring = arena = None
        if "ring_bytes" in task and manifest.device_segments:
            manifest = in_forms(manifest, task["device_codecs"])
            ring = Ring.make(*shape_of(manifest, task["ring_bytes"]))
        elif not _may_be_mapped(store):
            arena = CpuDevice().allocate(_lengths(manifest))
    except StoreTransientError:
        raise  # it was asked again and again, for as long as that is sensible: the parent need not
    except ColdstartError:
        outbox.leave()
    if ring is not None:
        return _fetch_to_new_ring(outbox, task, stored, key, manifest, store, ring)
    if arena is None or arena.fileno is None:
        _say_object(outbox, key, stored.data, stored.etag, is_manifest=True)
        message = inbox.get()
        return _fetch(outbox, message.document, manifest, store, message.descriptors)
    queue_fd = queue_of(fetch_order(manifest))
    _say_object(outbox, key, stored.data, stored.etag, is_manifest=True, descriptors=(arena.fileno, queue_fd))
    return _fetch_into(outbox, _Way(arena), share_of(Bounds(*task["bounds"]), manifest), manifest, store, queue_fd)


def _fetch_to_new_ring(
    outbox: _Outbox, task: dict[str, Any], stored: StoredObject, key: str, manifest: Manifest, store: Store, ring: Ring
) -> dict[str, Any]:
    """Fill a ring that the parent copies from, and which it has not seen yet: it may be long before it can take anything."""
    queue_fd = queue_of(fetch_order(manifest))
    files = (*ring.files, queue_fd)
    shape = [ring.slot_bytes, ring.slots]
    _say_object(outbox, key, stored.data, stored.etag, is_manifest=True, descriptors=files, ring=shape)
    ring.take_no_more()
    way = _Way(None, ring, tuple(task["device_codecs"]))
    return _fetch_into(outbox, way, share_of(Bounds(*task["bounds"]), manifest), manifest, store, queue_fd)


def _needed(manifest: Manifest, accepted: Sequence[str], kernels: str) -> Manifest:
    """What the start will need of the generation: it chooses the program in the same way."""
    program = chosen(manifest.programs, accepted)
    return needed(manifest, consumer_of(program.id) if program else "", kernels)


def _may_be_mapped(store: Store) -> bool:
    """Whether this host may have the snapshot in flat files, which its parent looks for."""
    return getattr(store, "flat_files", None) is not None


def _lengths(manifest: Manifest) -> list[int]:
    return [segment.length_bytes for segment in manifest.segments]


def _say_object(
    outbox: _Outbox,
    key: str,
    data: bytes,
    etag: str,
    *,
    is_manifest: bool = False,
    descriptors: Sequence[int] = (),
    **further: object,
) -> None:
    found = {
        "key": key,
        "etag": etag,
        "is_manifest": is_manifest,
        "found_monotonic_seconds": time.monotonic(),
        **further,
    }
    outbox.say(found, data, descriptors)


# --- fetching ----------------------------------------------------------------------------------------------------------


def _fetch(
    outbox: _Outbox, task: dict[str, Any], manifest: Manifest, store: Store, descriptors: Sequence[int]
) -> dict[str, Any]:
    """Fetch as the parent says, into the arena or the ring that it has sent; with a queue of chunks where others fetch too."""
    if "ring" in task:
        memory, free_reader, filled_writer, *queue_fds = descriptors
        ring = Ring(RingFiles(memory, free_reader, -1, -1, filled_writer), *task["ring"])
        way = _Way(None, ring, tuple(task["device_codecs"]))
    else:
        arena_fd, *queue_fds = descriptors
        way = _Way(CpuDevice().adopt(arena_fd, _lengths(manifest)))
    return _fetch_into(outbox, way, Bounds(*task["bounds"]), manifest, store, *queue_fds)


class _Way(NamedTuple):
    """Where chunks go: into an arena, or a ring."""

    arena: Fillable | None
    ring: Ring | None = None
    device_codecs: tuple[str, ...] = ()


def _fetch_into(
    outbox: _Outbox, way: _Way, bounds: Bounds, manifest: Manifest, store: Store, queue_fd: int | None = None
) -> dict[str, Any]:
    report = start_threads(
        FetchRequest(
            manifest,
            store,
            way.arena,
            bounds.threads,
            bounds.budget_bytes,
            verify_raw=bounds.verify_raw,
            progress=lambda placed_bytes: outbox.say({"placed_bytes": placed_bytes}),
            processes=bounds.processes,
            next_chunk=None if queue_fd is None else partial(next_chunk, queue_fd),
            ring=way.ring,
            device_codecs=way.device_codecs,
        )
    ).wait()
    return {
        "retried_chunks": report.retried_chunks,
        "began_monotonic_seconds": report.began_monotonic_seconds,
        "ended_monotonic_seconds": report.ended_monotonic_seconds,
        "reads": report.reads,
        "degraded": list(report.degraded),
    }
