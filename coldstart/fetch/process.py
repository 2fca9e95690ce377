"""The engine that other work in this process cannot slow down: a second interpreter fills the arena's memory file.

Threads of this process lose their turn to an import at every read. The fetcher has an interpreter lock of its own: it is
given the manifest, the store's address and the descriptor of the arena, runs the threads engine there, and says how it
ended. It ends when this process does, or lets go of it. Where there is no fetcher to be had, or it dies, threads of
this process do the work, and the report says so.

The wire is one message each way on a socket pair: four bytes of length, then JSON. Nothing of it is in argv.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from coldstart import errors
from coldstart.config import child_environment
from coldstart.errors import ColdstartError, SnapshotError
from coldstart.fetch.base import Fetch, FetchReport, FetchRequest
from coldstart.fetch.threads import start_threads
from coldstart.manifest import manifest_to_json

ENGINE = "process"
WIRE_FD, ARENA_FD = 3, 4
"""Descriptors of the fetcher: its end of the wire, and the arena."""

LENGTH = struct.Struct("<I")
_FIRST_FREE_FD = 10
_BOOT = "import sys; sys.path[:] = {path!r}; from coldstart.fetch.child import main; main()"


def can_start(request: FetchRequest) -> bool:
    """Whether a fetcher could do the work: the store can be opened there, and the arena shared with it."""
    address, fileno = request.address, getattr(request.arena, "fileno", None)
    return address is not None and not address.url.startswith("memory:") and fileno is not None and _can_spawn()


def _can_spawn() -> bool:
    return sys.platform == "linux" and hasattr(os, "posix_spawn") and bool(sys.executable)


def start_process(request: FetchRequest) -> Fetch:
    """Begin fetching in a process of its own; on threads of this one where it cannot be started."""
    try:
        return _ProcessFetch(request)
    except OSError as error:
        return _Instead(request, f"the fetcher process could not be started: {error.strerror}")


class _ProcessFetch(Fetch):
    def __init__(self, request: FetchRequest) -> None:
        self._request = request
        self._cancelled = threading.Event()
        self._report: FetchReport | None = None
        self._error: BaseException | None = None
        self._instead: Fetch | None = None
        self._began = time.monotonic()
        self._wire, self._pid = _spawn(request.arena.fileno)  # type: ignore[attr-defined]  # can_start has looked
        self._thread = threading.Thread(target=self._run, name=f"coldstart-fetch-{request.manifest.name}", daemon=True)
        self._thread.start()

    def wait(self) -> FetchReport:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report

    def cancel(self) -> None:
        self._cancelled.set()
        with suppress(OSError):  # it has ended already
            self._wire.shutdown(socket.SHUT_RDWR)
        if self._instead is not None:
            self._instead.cancel()

    def _run(self) -> None:
        try:
            self._report = self._fetch()
        except BaseException as error:  # noqa: BLE001  raised again by wait(), in the thread that asked
            self._error = error

    def _fetch(self) -> FetchReport:
        answer = self._converse()
        self._reap()
        if answer is None and not self._cancelled.is_set():
            self._instead = _Instead(self._request, "the fetcher process ended early")
            if self._cancelled.is_set():  # meanwhile
                self._instead.cancel()
            return self._instead.wait()
        if answer is None or self._cancelled.is_set():
            raise SnapshotError("the fetch was cancelled", snapshot=self._request.manifest.name)
        if "error" in answer:
            raise _error_of(answer)
        fetched_bytes = sum(chunk.stored_bytes for chunk in self._request.manifest.chunks)
        return FetchReport(
            ENGINE,
            fetched_bytes,
            answer["retried_chunks"],
            self._began,
            answer["ended_seconds"],
            tuple(answer["degraded"]),
        )

    def _converse(self) -> dict[str, Any] | None:
        """What the fetcher said of its end, None if it ended without a word."""
        try:
            send(self._wire, _message(self._request))
            return receive(self._wire)
        except OSError:
            return None

    def _reap(self) -> None:
        """End the fetcher, which has nothing left to do, and take its exit status from the kernel."""
        self._wire.close()
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # somebody in this process has waited for all children
            os.waitpid(self._pid, 0)


class _Instead(Fetch):
    """The threads engine, whose report says why it had to do the work."""

    def __init__(self, request: FetchRequest, reason: str) -> None:
        self._reason = reason
        self._fetch = start_threads(request)

    def wait(self) -> FetchReport:
        report = self._fetch.wait()
        return report._replace(engine=f"{report.engine} ({self._reason})")

    def cancel(self) -> None:
        self._fetch.cancel()


def _spawn(arena_fd: int) -> tuple[socket.socket, int]:
    """A fetcher that waits for its message: our end of the wire, and its process id. Raises OSError."""
    ours, theirs = socket.socketpair()
    # Above 4, so that putting one in its place cannot overwrite the other.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD) for fd in (theirs.fileno(), arena_fd)]
    theirs.close()
    code = _BOOT.format(path=list(sys.path))
    try:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", code],
            child_environment(),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, moved[0], WIRE_FD),
                (os.POSIX_SPAWN_DUP2, moved[1], ARENA_FD),
            ],
        )
    except OSError:
        ours.close()
        raise
    finally:
        for fd in moved:
            os.close(fd)
    return ours, pid


def _message(request: FetchRequest) -> dict[str, Any]:
    address = request.address
    assert address is not None
    return {
        "manifest": manifest_to_json(request.manifest).decode(),
        "url": address.url,
        "options": address.options._asdict(),
        "segment_offsets": list(request.arena.segment_offsets),  # type: ignore[attr-defined]
        "threads": request.threads,
        "budget_bytes": request.budget_bytes,
        "verify_raw": request.verify_raw,
    }


def send(wire: socket.socket, document: dict[str, Any]) -> None:
    """Send one message. Raises OSError where the other side has ended."""
    data = json.dumps(document).encode()
    wire.sendall(LENGTH.pack(len(data)) + data)


def receive(wire: socket.socket) -> dict[str, Any] | None:
    """The other side's message, None if it ended before it was whole."""
    head = _exactly(wire, LENGTH.size)
    data = _exactly(wire, *LENGTH.unpack(head)) if head else None
    if data is None:
        return None
    document: dict[str, Any] = json.loads(data)
    return document


def _exactly(wire: socket.socket, size_bytes: int) -> bytes | None:
    data = bytearray()
    while len(data) < size_bytes:
        piece = wire.recv(size_bytes - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _error_of(answer: dict[str, Any]) -> ColdstartError:
    """The error that the fetcher ended with, as the threads engine would have raised it."""
    kind = getattr(errors, answer["error"], SnapshotError)
    made: ColdstartError = kind(answer["message"], snapshot=answer["snapshot"], key=answer["key"])
    return made
