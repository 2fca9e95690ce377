"""The engine that other work in this process cannot slow down: a second interpreter fills the arena's memory file.

Threads of this process lose their turn to an import at every read. The fetcher has an interpreter lock of its own: it is
given the store's address and the descriptor of the arena, runs the threads engine there, and says how it ended. It ends
when this process does, or lets go of it. Where there is no fetcher to be had, or it dies, threads of this process do
the work, and the report says so.

One interpreter reads some 0.6 GB/s over TLS, whatever the link: where there are processors for it, several fetchers
share a large snapshot. They take chunks from one queue, so none waits for another.

What to fetch it is told in a manifest, or it finds out by itself (``ahead``): then it is spawned before anything is known
of the snapshot, and neither its own start nor the look-up waits for the imports of this process.

How it is spawned and spoken with: ``coldstart.children``.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from functools import reduce
from typing import TYPE_CHECKING, Any

from coldstart import children
from coldstart.config import helper_environment
from coldstart.errors import SnapshotError
from coldstart.fetch.base import Fetch, FetchReport, FetchRequest
from coldstart.fetch.crew import Bounds, queue_of, share_of
from coldstart.fetch.threads import start_threads
from coldstart.manifest import manifest_to_json
from coldstart.plan import fetch_order
from coldstart.stores.base import Tally

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.children import Message

ENGINE = "process"


def can_start(request: FetchRequest) -> bool:
    """Whether a fetcher could be asked to do the work: there can be one, and it can open the store."""
    address = request.address
    return address is not None and not address.url.startswith("memory:") and children.can_spawn()


def can_share(request: FetchRequest) -> bool:
    """Whether chunks can reach the arena from another process: it is one memory file, or has a ring."""
    return request.ring is not None or getattr(request.arena, "fileno", None) is not None


def start_process(request: FetchRequest) -> Fetch:
    """Begin fetching in a process of its own; on threads of this one where it cannot be started, or reach the arena."""
    if not can_share(request):
        return _Replacement(request, "this system gives no memory that a fetcher process could share")
    try:
        fetcher = Fetcher()
    except OSError as error:
        return _Replacement(request, f"the fetcher process could not be started: {error.strerror}")
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


def _way_to_arena(request: FetchRequest) -> tuple[dict[str, Any], list[int]]:
    """What a fetcher has to know, and the files that it has to have, for its chunks to reach the arena."""
    ring = request.ring
    if ring is None:
        arena: Any = request.arena
        return {}, [arena.fileno]
    told = {"ring": [ring.slot_bytes, ring.slots], "device_codecs": list(request.device_codecs)}
    return told, [ring.files.memory, ring.files.free_reader, ring.files.filled_writer]


class Fetcher:
    """A fetcher process that waits for messages, and our end of the wire to it. Raises OSError where there can be none."""

    def __init__(self) -> None:
        self._wire, self._pid = children.spawn("coldstart.fetch.child", helper_environment())
        self._lock = threading.Lock()

    def tell(self, document: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a message."""
        with suppress(OSError):  # it has ended, and whoever listens hears of that
            children.send(self._wire, document, descriptors=descriptors)

    def hear(self) -> Message | None:
        """Wait for its next message; None where it has ended."""
        try:
            return children.receive(self._wire)
        except OSError:
            return None

    def hang_up(self) -> None:
        """Let it end by itself; whoever waits for its message hears of the end."""
        children.hang_up(self._wire)

    def end(self) -> None:
        """End it now and take its exit status from the kernel. May be called more than once."""
        with self._lock:
            pid, self._pid = self._pid, 0
        if not pid:
            return
        self._wire.close()
        children.end(pid)


class _ProcessFetch(Fetch):
    """A fetch that one fetcher does, or several of them, which take chunks from one queue."""

    def __init__(
        self, request: FetchRequest, fetcher: Fetcher, task: dict[str, Any] | None, queue_fd: int | None = None
    ) -> None:
        self._request = request
        self._cancelled = threading.Event()
        self._report: FetchReport | None = None
        self._error: BaseException | None = None
        self._replacement: Fetch | None = None
        self._share = share_of(_bounds_of(request), request.manifest)
        self._crew = [_Member(fetcher, task), *_further_members(request, self._share.processes - 1)]
        self._queue_fd = queue_fd
        self._lock = threading.Lock()
        self._ending: _Member | None = None
        """The first whose end was no success."""
        self._thread = threading.Thread(target=self._run, name=f"coldstart-fetch-{request.manifest.name}", daemon=True)
        try:
            if queue_fd is None and len(self._crew) > 1:
                self._queue_fd = queue_of(fetch_order(request.manifest))
            self._thread.start()
        except BaseException:  # a limit of the container, on threads or descriptors
            self._end_all()
            raise

    def wait(self) -> FetchReport:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report

    def cancel(self) -> None:
        self._cancelled.set()
        self._hang_up()
        if self._replacement is not None:
            self._replacement.cancel()

    def _run(self) -> None:
        try:
            self._report = self._fetch()
        except BaseException as error:  # noqa: BLE001  raised again by wait(), in the thread that asked
            self._error = error

    def _fetch(self) -> FetchReport:
        try:
            self._converse_with_all()
        finally:
            self._end_all()
        if self._cancelled.is_set():
            raise SnapshotError("the fetch was cancelled", snapshot=self._request.manifest.name)
        if self._ending is None:
            return self._success()
        if self._ending.answer is not None:
            raise children.error_of(self._ending.answer, SnapshotError)
        if self._request.ring is not None:
            self._request.ring.recover()  # the slots that it had
        self._replacement = _Replacement(self._request, "the fetcher process ended early")
        if self._cancelled.is_set():  # meanwhile
            self._replacement.cancel()
        return self._replacement.wait()

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

    def _end_all(self) -> None:
        for member in self._crew:
            member.fetcher.end()
        if self._queue_fd is not None:
            os.close(self._queue_fd)

    def _converse(self, member: _Member) -> None:
        """Give a fetcher its task and listen until it has ended; if that is no success, the others are to end too."""
        if member.task is not None:
            told, files = _way_to_arena(self._request)
            if self._queue_fd is not None:
                files.append(self._queue_fd)
            member.fetcher.tell({**member.task, **told, "bounds": list(self._share)}, files)
        while (message := member.fetcher.hear()) is not None and "placed_bytes" in message.document:
            member.placed_bytes = message.document["placed_bytes"]
            if self._request.progress is not None:
                self._request.progress(sum(each.placed_bytes for each in self._crew))
        member.answer = None if message is None else message.document
        if member.answer is None or "error" in member.answer:
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
            min(answer["began_monotonic_seconds"] for answer in answers),
            max(answer["ended_monotonic_seconds"] for answer in answers),
            sum(answer["reads"] for answer in answers),
            tuple(dict.fromkeys(reason for answer in answers for reason in answer["degraded"])),
            reduce(Tally.__add__, (Tally(*answer["tally"]) for answer in answers), Tally()),
        )


class _Member:
    """One of the fetchers of a fetch, what it is told (None: it needs no more), how far it is, the last that it said."""

    def __init__(self, fetcher: Fetcher, task: dict[str, Any] | None) -> None:
        self.fetcher = fetcher
        self.task = task
        self.placed_bytes = 0
        self.answer: dict[str, Any] | None = None


def _further_members(request: FetchRequest, wanted: int) -> list[_Member]:
    """Further fetchers, as many as the system lets us have."""
    members: list[_Member] = []
    with suppress(OSError):  # those that there are do it all
        while len(members) < wanted:
            members.append(_Member(Fetcher(), _whole_task(request)))
    return members


def _bounds_of(request: FetchRequest) -> Bounds:
    return Bounds(request.threads, request.budget_bytes, request.processes, request.verify_raw)


class _Replacement(Fetch):
    """The threads engine, whose report says why it had to do the work."""

    def __init__(self, request: FetchRequest, reason: str) -> None:
        self._reason = reason
        self._fetch = start_threads(request)

    def wait(self) -> FetchReport:
        report = self._fetch.wait()
        return report._replace(engine=f"{report.engine} ({self._reason})")

    def cancel(self) -> None:
        self._fetch.cancel()
