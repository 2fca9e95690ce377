"""Bounded parallel work: jobs that say what they cost in bytes, run by a few threads under one byte budget.

Knows no store, codec or device. A job larger than the budget runs alone rather than never. The first error stops the
run: jobs under way end, none is begun after it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Job(NamedTuple):
    """A piece of work. ``cost_bytes``: memory that it holds while it runs, over what its caller already holds."""

    cost_bytes: int
    run: Callable[[], None]


class _Budget:
    """Bytes that may be held at once; ``acquire`` waits for room."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._changed = threading.Condition()

    def acquire(self, amount: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + amount <= self._limit)
            self._held += amount

    def release(self, amount: int) -> None:
        with self._changed:
            self._held -= amount
            self._changed.notify_all()


class _Run:
    """One call of ``run_all``: the shared queue of its threads, and the first error."""

    def __init__(
        self,
        jobs: Iterable[Job],
        budget_bytes: int,
        name: str,
        stop: threading.Event,
        width: Callable[[Job], int] | None,
    ) -> None:
        self._jobs = iter(jobs)
        self._lock = threading.Lock()
        self._budget = _Budget(budget_bytes)
        self._name = name
        self._stop = stop
        self._width = width
        self._others: list[threading.Thread] = []
        self._begun = 0
        self.error: BaseException | None = None

    def widen(self, threads: int) -> None:
        """Have as many threads beside the caller's at work; never fewer than before, and no more than there can be."""
        with self._lock:
            while self._begun < threads:
                thread = threading.Thread(target=self.work, name=f"{self._name}-{self._begun}", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # a limit of the container: those at work, the caller at least, do it all
                    self._width = None
                    return
                self._others.append(thread)
                self._begun += 1

    def work(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._do(job)
                if self._width is not None and not self._is_over():
                    self.widen(self._width(job) - 1)
        except BaseException as error:  # noqa: BLE001  what `jobs` or `width` itself raised
            self._fail(error)

    def join(self) -> None:
        """Wait for the other threads, those that they begin meanwhile included."""
        while self._others:
            self._others[-1].join()
            with self._lock:
                self._others = [thread for thread in self._others if thread.is_alive()]

    def _do(self, job: Job) -> None:
        self._budget.acquire(job.cost_bytes)
        try:
            if not self._is_over():  # it may have ended while this job waited for room
                job.run()
        except BaseException as error:  # noqa: BLE001  carried to run_all's caller, nothing is swallowed
            self._fail(error)  # before the budget is released: whoever waits for it must see the end
        finally:
            self._budget.release(job.cost_bytes)

    def _next(self) -> Job | None:
        with self._lock:
            return None if self._is_over() else next(self._jobs, None)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error

    def _is_over(self) -> bool:
        return self.error is not None or self._stop.is_set()


def run_all(
    jobs: Iterable[Job],
    *,
    threads: int,
    budget_bytes: int,
    name: str,
    stop: threading.Event | None = None,
    width: Callable[[Job], int] | None = None,
) -> None:
    """Run all jobs on ``threads`` threads, the caller's among them, and raise the first error of any of them.

    ``name`` is that of the other threads, with a number each. ``stop``: once it is set, no further job is begun and
    the call returns early without an error. ``jobs`` is read by one thread at a time, as jobs are begun; what it raises
    counts as a job's error. ``width`` is told of each job that has ended, by the thread that ran it, and says how many
    threads there should be from now on: there are never fewer than before.
    """
    run = _Run(jobs, budget_bytes, name, stop or threading.Event(), width)
    run.widen(threads - 1)
    run.work()
    run.join()
    if run.error is not None:
        raise run.error
