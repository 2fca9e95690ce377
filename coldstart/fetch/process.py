"""The engine that other work in this process cannot slow down: a second interpreter fills the arena's memory file.

Threads of this process lose their turn to an import at every read. The fetcher has an interpreter lock of its own: it is
given the store's address and the descriptor of the arena, runs the threads engine there, and says how it ended. It ends
when this process does, or lets go of it. Where there is no fetcher to be had, or it dies, threads of this process do
the work, and the report says so.

One interpreter reads some 0.6 GB/s over TLS, whatever the link: where there are processors for it, several fetchers
share a large snapshot. They take chunks from one queue, so none waits for another.

What to fetch it is told in a manifest, or it finds out by itself (``ahead``): then it is spawned before anything is known
of the snapshot, and neither its own start nor the look-up waits for the imports of this process.

The wire is a socket pair that carries messages (``wire``). Nothing of them is in argv.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from coldstart import errors
from coldstart.config import child_environment
from coldstart.errors import ColdstartError, SnapshotError
from coldstart.fetch.base import Fetch, FetchReport, FetchRequest
from coldstart.fetch.crew import Bounds, queue_of, share_of
from coldstart.fetch.threads import start_threads
from coldstart.fetch.wire import WIRE_FD, receive, send
from coldstart.manifest import manifest_to_json
from coldstart.plan import fetch_order

if TYPE_CHECKING:
    from collections.abc import Sequence

ENGINE = "process"
_FIRST_FREE_FD = 10
_BOOT = "import sys; sys.path[:] = {path!r}; from coldstart.fetch.child import main; main()"


def can_start(request: FetchRequest) -> bool:
    """Whether a fetcher could do the work: the store can be opened there, and the arena shared with it."""
    address = request.address
    return address is not None and not address.url.startswith("memory:") and can_share(request) and can_spawn()


def can_share(request: FetchRequest) -> bool:
    """Whether the arena is one memory file."""
    return getattr(request.arena, "fileno", None) is not None


def can_spawn() -> bool:
    """Whether this platform has what a fetcher needs."""
    return sys.platform == "linux" and hasattr(os, "posix_spawn") and bool(sys.executable)


def start_process(request: FetchRequest) -> Fetch:
    """Begin fetching in a process of its own; on threads of this one where it cannot be started."""
    try:
        fetcher = Fetcher()
    except OSError as error:
        return _Instead(request, f"the fetcher process could not be started: {error.strerror}")
    return _ProcessFetch(request, fetcher, _whole_task(request))


def start_with(fetcher: Fetcher, request: FetchRequest, queue_fd: int | None) -> Fetch:
    """Have ``fetcher``, which knows manifest and store, do a fetch. ``queue_fd``, now ours: it is at it already."""
    return _ProcessFetch(request, fetcher, {} if queue_fd is None else None, queue_fd)


def _whole_task(request: FetchRequest) -> dict[str, Any]:
    """What a fetcher is told that knows nothing yet."""
    address = request.address
    assert address is not None
    return {
        "manifest": manifest_to_json(request.manifest).decode(),
        "url": address.url,
        "options": address.options._asdict(),
    }


class Fetcher:
    """A fetcher process that waits for messages, and our end of the wire to it. Raises OSError where there can be none."""

    def __init__(self) -> None:
        self.wire, self._pid = _spawn()
        self._lock = threading.Lock()

    def tell(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> bool:
        """Send a message; False where the fetcher has ended."""
        try:
            send(self.wire, message, descriptors)
        except OSError:
            return False
        return True

    def hear(self) -> tuple[dict[str, Any] | None, list[int]]:
        """Wait for its next message and the descriptors that come with it; None where it has ended."""
        try:
            return receive(self.wire)
        except OSError:
            return None, []

    def hang_up(self) -> None:
        """Let it end by itself; whoever waits for its message hears of the end."""
        with suppress(OSError):  # it has ended already
            self.wire.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """End it now and take its exit status from the kernel. May be called more than once."""
        with self._lock:
            pid, self._pid = self._pid, 0
        if not pid:
            return
        self.wire.close()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # somebody in this process has waited for all children
            os.waitpid(pid, 0)


class _ProcessFetch(Fetch):
    """A fetch that one fetcher does, or several of them, which take chunks from one queue."""

    def __init__(
        self, request: FetchRequest, fetcher: Fetcher, task: dict[str, Any] | None, queue_fd: int | None = None
    ) -> None:
        self._request = request
        self._cancelled = threading.Event()
        self._report: FetchReport | None = None
        self._error: BaseException | None = None
        self._instead: Fetch | None = None
        self._share = share_of(_bounds_of(request), request.manifest)
        self._crew = [_Member(fetcher, task), *_helpers(request, self._share.processes - 1)]
        self._queue_fd = queue_fd
        if queue_fd is None and len(self._crew) > 1:
            self._queue_fd = queue_of(fetch_order(request.manifest))
        self._lock = threading.Lock()
        self._ending: _Member | None = None
        """The first whose end was no success."""
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
        self._hang_up()
        if self._instead is not None:
            self._instead.cancel()

    def _run(self) -> None:
        try:
            self._report = self._fetch()
        except BaseException as error:  # noqa: BLE001  raised again by wait(), in the thread that asked
            self._error = error

    def _fetch(self) -> FetchReport:
        self._converse_with_all()
        for member in self._crew:
            member.fetcher.end()
        if self._cancelled.is_set():
            raise SnapshotError("the fetch was cancelled", snapshot=self._request.manifest.name)
        if self._ending is None:
            return self._success()
        if self._ending.answer is not None:
            raise _error_of(self._ending.answer)
        self._instead = _Instead(self._request, "the fetcher process ended early")
        if self._cancelled.is_set():  # meanwhile
            self._instead.cancel()
        return self._instead.wait()

    def _converse_with_all(self) -> None:
        others = [
            threading.Thread(target=self._converse, args=(member,), name="coldstart-fetch-wire", daemon=True)
            for member in self._crew[1:]
        ]
        for thread in others:
            thread.start()
        self._converse(self._crew[0])
        for thread in others:
            thread.join()
        if self._queue_fd is not None:
            os.close(self._queue_fd)

    def _converse(self, member: _Member) -> None:
        """Give a fetcher its task and listen until it has ended; if that is no success, the others are to end too."""
        if member.task is not None:
            arena: Any = self._request.arena
            told = {**member.task, "segment_offsets": list(arena.segment_offsets), "bounds": list(self._share)}
            member.fetcher.tell(told, [fd for fd in (arena.fileno, self._queue_fd) if fd is not None])
        while (answer := member.fetcher.hear()[0]) is not None and "placed_bytes" in answer:
            member.placed_bytes = answer["placed_bytes"]
            if self._request.progress is not None:
                self._request.progress(sum(each.placed_bytes for each in self._crew))
        member.answer = answer
        if answer is None or "error" in answer:
            with self._lock:
                self._ending = self._ending or member
            self._hang_up()

    def _hang_up(self) -> None:
        for member in self._crew:
            member.fetcher.hang_up()

    def _success(self) -> FetchReport:
        answers = [member.answer for member in self._crew if member.answer is not None]
        return FetchReport(
            ENGINE if len(answers) == 1 else f"{len(answers)} processes",
            sum(chunk.stored_bytes for chunk in self._request.manifest.chunks),
            sum(answer["retried_chunks"] for answer in answers),
            min(answer["began_seconds"] for answer in answers),
            max(answer["ended_seconds"] for answer in answers),
            sum(answer["reads"] for answer in answers),
            tuple(dict.fromkeys(reason for answer in answers for reason in answer["degraded"])),
        )


class _Member:
    """One of the fetchers of a fetch, what it is told (None: it needs no more), how far it is, the last that it said."""

    def __init__(self, fetcher: Fetcher, task: dict[str, Any] | None) -> None:
        self.fetcher = fetcher
        self.task = task
        self.placed_bytes = 0
        self.answer: dict[str, Any] | None = None


def _helpers(request: FetchRequest, wanted: int) -> list[_Member]:
    """Further fetchers, as many as the system lets us have."""
    helpers: list[_Member] = []
    with suppress(OSError):  # those that there are do it all
        while len(helpers) < wanted:
            helpers.append(_Member(Fetcher(), _whole_task(request)))
    return helpers


def _bounds_of(request: FetchRequest) -> Bounds:
    return Bounds(request.threads, request.budget_bytes, request.processes, request.verify_raw)


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


def _spawn() -> tuple[socket.socket, int]:
    """A fetcher that waits for its message: our end of the wire, and its process id. Raises OSError."""
    ours, theirs = socket.socketpair()
    moved = fcntl.fcntl(
        theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD
    )  # dup2 to itself would stay close-on-exec
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
                (os.POSIX_SPAWN_DUP2, moved, WIRE_FD),
            ],
        )
    except OSError:
        ours.close()
        raise
    finally:
        os.close(moved)
    return ours, pid


def _error_of(answer: dict[str, Any]) -> ColdstartError:
    """The error that the fetcher ended with, as the threads engine would have raised it."""
    kind = getattr(errors, answer["error"], SnapshotError)
    made: ColdstartError = kind(answer["message"], snapshot=answer["snapshot"], key=answer["key"])
    return made
