"""Warm-ups in order and not too many at once: which is begun next, how each ended, and an end that waits for nobody for ever.

``Queue`` is the bookkeeping alone: no thread, no clock. ``run_all`` drives one with a thread for each warm-up that is
active. Threads cannot be ended from outside, so a warm-up gets a ``Ticket`` and waits through it: the ticket raises once
the time is over or the run was told to end. One that does not look at its ticket keeps its place (there are never
more than ``max_concurrent`` at work), is reported as timed out, and is left behind when the run ends.
"""

from __future__ import annotations

import heapq
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DONE, FAILED, TIMED_OUT, CANCELLED = "done", "failed", "timed out", "cancelled"

STOP_SECONDS = 10.0
"""How long a warm-up whose time is over, or whose run was told to end, has to notice it."""


class Task(NamedTuple):
    """One warm-up. ``work`` gets its ticket; higher ``priority`` goes first, first come first served within one."""

    name: str
    work: Callable[[Ticket], Any]
    priority: int = 0


class Outcome(NamedTuple):
    """How a warm-up ended: ``status`` is done, failed, timed out or cancelled; ``reason`` is "" where it is done.

    ``result`` is what the work returned, None unless done. ``seconds``: from its beginning, 0 if it never began.
    """

    name: str
    status: str
    result: Any
    reason: str
    seconds: float


class TimeIsOver(Exception):  # noqa: N818  what a ticket raises: an end, not an error
    """The warm-up's time is over."""


class Stopped(Exception):  # noqa: N818
    """The run was told to end."""


class Queue:
    """Which warm-ups wait, which are active, and how the others ended. Not safe from several threads: one drives it."""

    def __init__(self, *, max_concurrent: int) -> None:
        if max_concurrent < 1:
            raise UsageError(f"at least one warm-up has to run at a time, not {max_concurrent}")
        self.max_concurrent = max_concurrent
        self._waiting: list[tuple[int, int, Task]] = []
        self._active: dict[int, Task] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._submitted = 0

    def submit(self, task: Task) -> int:
        """Add a warm-up and return its number: 0, 1, 2 ... in the order of the calls."""
        number = self._submitted
        self._submitted += 1
        heapq.heappush(self._waiting, (-task.priority, number, task))
        return number

    @property
    def pending_count(self) -> int:
        """How many have not begun."""
        return len(self._waiting)

    @property
    def active_count(self) -> int:
        """How many are at work, ``max_concurrent`` at most."""
        return len(self._active)

    def take(self) -> tuple[int, Task] | None:
        """The warm-up to begin now, which is active from here on; None while there is no place, or nothing to begin."""
        if not self._waiting or len(self._active) >= self.max_concurrent:
            return None
        _, number, task = heapq.heappop(self._waiting)
        self._active[number] = task
        return number, task

    def settle(self, number: int, outcome: Outcome) -> None:
        """Note how an active warm-up ended, and free its place. A first verdict (it was overdue) stays."""
        self._active.pop(number, None)
        self._outcomes.setdefault(number, outcome)

    def judge(self, number: int, outcome: Outcome) -> None:
        """Note how an active warm-up ended that still holds its place."""
        self._outcomes.setdefault(number, outcome)

    def cancel_pending(self, reason: str) -> None:
        """Let nothing begin any more: what waits is cancelled."""
        for _, number, task in self._waiting:
            self._outcomes[number] = Outcome(task.name, CANCELLED, None, reason, 0.0)
        self._waiting.clear()

    def active(self) -> dict[int, Task]:
        """Those at work, by number."""
        return dict(self._active)

    def outcomes(self) -> list[Outcome]:
        """Those that ended, in the order in which they were submitted."""
        return [self._outcomes[number] for number in sorted(self._outcomes)]


class Ticket:
    """What a warm-up at work knows of its run: how much time is left, and whether to end."""

    def __init__(self, deadline_seconds: float, stopping: threading.Event, clock: Callable[[], float]) -> None:
        self._deadline_seconds = deadline_seconds
        self._stopping = stopping
        self._clock = clock

    @property
    def remaining_seconds(self) -> float:
        """Seconds until the time is over, never below 0."""
        return max(0.0, self._deadline_seconds - self._clock())

    def check(self) -> None:
        """Raise TimeIsOver or Stopped if the warm-up is to end."""
        self.wait(0.0)

    def wait(self, seconds: float) -> None:
        """Sleep for ``seconds`` or until the warm-up is to end, which is raised: TimeIsOver or Stopped."""
        if self._stopping.wait(min(seconds, self.remaining_seconds)):
            raise Stopped
        if not self.remaining_seconds:
            raise TimeIsOver


class Report(NamedTuple):
    """What became of a run. ``interrupted``: Ctrl-C ended it early."""

    outcomes: list[Outcome]
    interrupted: bool

    @property
    def good(self) -> bool:
        """Whether every warm-up is done."""
        return not self.interrupted and all(outcome.status == DONE for outcome in self.outcomes)


class _Active(NamedTuple):
    task: Task
    began_seconds: float
    deadline_seconds: float


class _Run:
    def __init__(self, queue: Queue, timeout_seconds: float, stop_seconds: float, clock: Callable[[], float]) -> None:
        self._queue = queue
        self._timeout_seconds = timeout_seconds
        self._stop_seconds = stop_seconds
        self._clock = clock
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._ended: list[tuple[int, Outcome]] = []
        self._active: dict[int, _Active] = {}

    def drive(self) -> None:
        """Begin what may begin and wait for what ends, until nothing is left but warm-ups that ignore their tickets."""
        while True:
            self._begin()
            if not self._active:
                return
            self._collect()
            if self._is_stuck():
                self._queue.cancel_pending("the warm-ups before it did not end, so there was no place for it")
                return

    def stop(self) -> None:
        """Begin nothing more, and give what is active ``stop_seconds`` to end."""
        self._queue.cancel_pending("interrupted before it began")
        self._stopping.set()
        deadline_seconds = self._clock() + self._stop_seconds
        while self._active and self._clock() < deadline_seconds:
            self._collect(deadline_seconds)
        self.abandon()

    def abandon(self) -> None:
        """Note what is still active as cancelled; its thread is left behind."""
        for number, task in self._queue.active().items():
            seconds = self._clock() - self._active[number].began_seconds if number in self._active else 0.0
            reason = "interrupted; it did not end in time"
            self._queue.judge(number, Outcome(task.name, CANCELLED, None, reason, seconds))

    def _begin(self) -> None:
        while (taken := self._queue.take()) is not None:
            number, task = taken
            began = self._clock()
            active = self._active[number] = _Active(task, began, began + self._timeout_seconds)
            name = f"coldstart-prewarm-{number}"
            threading.Thread(target=self._work, args=(number, active), name=name, daemon=True).start()

    def _work(self, number: int, active: _Active) -> None:
        outcome = _attempt(active, Ticket(active.deadline_seconds, self._stopping, self._clock), self._clock)
        with self._changed:
            self._ended.append((number, outcome))
            self._changed.notify()

    def _collect(self, until_seconds: float = float("inf")) -> None:
        """Wait until something ended, or the next limit has passed, and note both."""
        with self._changed:
            if not self._ended:
                self._changed.wait(max(0.0, min(until_seconds, self._next_limit_seconds()) - self._clock()))
            while self._ended:  # one by one, and again rather than never: Ctrl-C may come between any two lines
                number, outcome = self._ended[0]
                self._queue.settle(number, outcome)
                self._active.pop(number, None)
                self._ended.pop(0)
        for number, active in self._active.items():
            if self._clock() >= active.deadline_seconds:
                self._queue.judge(number, _timed_out(active, self._clock() - active.began_seconds))

    def _next_limit_seconds(self) -> float:
        now = self._clock()
        limits = [
            limit
            for active in self._active.values()
            for limit in (active.deadline_seconds, active.deadline_seconds + self._stop_seconds)
            if limit > now
        ]
        return min(limits, default=now)

    def _is_stuck(self) -> bool:
        """Whether every place is held by a warm-up that should have ended ``stop_seconds`` ago."""
        now = self._clock()
        overdue = [active.deadline_seconds + self._stop_seconds <= now for active in self._active.values()]
        return all(overdue) and (len(overdue) >= self._queue.max_concurrent or not self._queue.pending_count)


def _attempt(active: _Active, ticket: Ticket, clock: Callable[[], float]) -> Outcome:
    name = active.task.name
    try:
        result = active.task.work(ticket)
    except TimeIsOver:
        return _timed_out(active, clock() - active.began_seconds)
    except Stopped:
        return Outcome(name, CANCELLED, None, "interrupted", clock() - active.began_seconds)
    except Exception as error:  # noqa: BLE001  the thread's edge: whatever failed is this warm-up's reason
        return Outcome(name, FAILED, None, f"{type(error).__name__}: {error}", clock() - active.began_seconds)
    return Outcome(name, DONE, result, "", clock() - active.began_seconds)


def _timed_out(active: _Active, seconds: float) -> Outcome:
    limit_seconds = active.deadline_seconds - active.began_seconds
    return Outcome(active.task.name, TIMED_OUT, None, f"not done after {limit_seconds:.0f} s", seconds)


def run_all(
    tasks: Sequence[Task],
    *,
    max_concurrent: int,
    timeout_seconds: float,
    stop_seconds: float = STOP_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Run all ``tasks``, at most ``max_concurrent`` at a time, each for at most ``timeout_seconds``.

    Ctrl-C begins nothing more and gives what is active ``stop_seconds``; a second one gives it none. Outcomes come in
    the order of ``tasks``. Raises UsageError for ``max_concurrent`` below 1.
    """
    queue = Queue(max_concurrent=max_concurrent)
    for task in tasks:
        queue.submit(task)
    run = _Run(queue, timeout_seconds, stop_seconds, clock)
    interrupted = False
    try:
        run.drive()
    except KeyboardInterrupt:
        interrupted = True
        try:
            run.stop()
        except KeyboardInterrupt:
            run.abandon()
    return Report(queue.outcomes(), interrupted)
