"""The fetcher process: what ``coldstart.fetch.process`` starts. It reads its task from the wire and fills the arena."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import threading
from typing import Any

from coldstart.errors import ColdstartError
from coldstart.fetch.base import Address, FetchRequest
from coldstart.fetch.process import ARENA_FD, WIRE_FD, receive, send
from coldstart.fetch.threads import start_threads
from coldstart.manifest import manifest_from_json
from coldstart.stores import StoreOptions, open_store


def main() -> None:
    """Do the one task that comes over the wire, say how it ended, and leave."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both; the parent decides
    wire = socket.socket(fileno=WIRE_FD)
    task = receive(wire)
    if task is None:
        os._exit(0)
    threading.Thread(target=_leave_with_parent, args=(wire,), daemon=True).start()
    send(wire, _outcome(task))
    os._exit(0)  # nothing is to be cleaned up, and the parent waits


def _leave_with_parent(wire: socket.socket) -> None:
    """The parent sends nothing more: what comes is the end of the wire, and so of this process."""
    wire.recv(1)
    os._exit(0)


def _outcome(task: dict[str, Any]) -> dict[str, Any]:
    degraded: list[str] = []
    try:
        report = start_threads(_request(task, degraded)).wait()
    except ColdstartError as error:
        return {"error": type(error).__name__, "message": str(error), "snapshot": error.snapshot, "key": error.key}
    return {
        "retried_chunks": report.retried_chunks,
        "ended_seconds": report.ended_monotonic_seconds,
        "degraded": degraded,
    }


def _request(task: dict[str, Any], degraded: list[str]) -> FetchRequest:
    manifest = manifest_from_json(task["manifest"].encode())
    address = Address(task["url"], StoreOptions(**task["options"]))
    lengths = [segment.length_bytes for segment in manifest.segments]
    return FetchRequest(
        manifest,
        open_store(*address, degraded=degraded.append),
        _Shared(task["segment_offsets"], lengths),
        task["threads"],
        task["budget_bytes"],
        verify_raw=task["verify_raw"],
    )


class _Shared:
    """The parent's arena, mapped here too: what is written to it is in the parent's memory."""

    def __init__(self, offsets: list[int], lengths_bytes: list[int]) -> None:
        self._places = list(zip(offsets, lengths_bytes, strict=True))
        self._map = memoryview(mmap.mmap(ARENA_FD, 0, flags=mmap.MAP_SHARED))

    def writable(self, segment: int) -> memoryview:
        """The segment's memory."""
        offset, length_bytes = self._places[segment]
        return self._map[offset : offset + length_bytes]
