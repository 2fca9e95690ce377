"""The bounded pipeline: what runs at once, in which budget, and how a run ends."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstart.pipeline import Job, run_all

PATIENCE_SECONDS = 60.0


class Ledger:
    """What runs at every moment: each job enters its cost, and ``wrong`` says where the budget was broken."""

    def __init__(self, budget_bytes: int) -> None:
        self.finished: list[int] = []
        self.wrong: list[str] = []
        self._budget_bytes = budget_bytes
        self._running: dict[int, int] = {}
        self._lock = threading.Lock()

    def job(self, number: int, cost_bytes: int) -> Job:
        """A job that stays a moment, so that others get their turn while it runs."""

        def run() -> None:
            with self._lock:
                self._running[number] = cost_bytes
                costs = [cost for cost in self._running.values() if cost]
                if sum(costs) > self._budget_bytes and len(costs) > 1:
                    self.wrong.append(f"{costs} at once, {self._budget_bytes} allowed")
            threading.Event().wait(0.0002)
            with self._lock:
                del self._running[number]
                self.finished.append(number)

        return Job(cost_bytes, run)


def names_now(prefix: str) -> list[str]:
    """Names of this process' living threads that begin with ``prefix``."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(prefix)]


@settings(deadline=None, max_examples=60)
@given(costs=st.lists(st.integers(0, 30), max_size=40), threads=st.integers(1, 8), budget_bytes=st.integers(0, 40))
def test_every_job_runs_once_within_the_budget(costs, threads, budget_bytes):
    """Whatever jobs cost, each runs exactly once, and those at once fit the budget or one of them is alone."""
    ledger = Ledger(budget_bytes)
    jobs = (ledger.job(number, cost) for number, cost in enumerate(costs))
    run_all(jobs, threads=threads, budget_bytes=budget_bytes, name="bounded")
    assert ledger.wrong == []
    assert sorted(ledger.finished) == list(range(len(costs)))


def test_jobs_run_side_by_side():
    """As many jobs run at once as there are threads, the caller's own among them, under the name given."""
    together = threading.Barrier(3, timeout=PATIENCE_SECONDS)
    names = []

    def meet() -> None:
        together.wait()
        names.append(threading.current_thread().name)

    run_all([Job(1, meet)] * 3, threads=3, budget_bytes=3, name="side")
    assert sorted(names) == sorted([threading.current_thread().name, "side-0", "side-1"])


def test_nothing_is_left_running():
    """When the call returns, its threads have ended."""
    run_all([Job(0, lambda: None)] * 20, threads=4, budget_bytes=1, name="ended")
    assert names_now("ended") == []


def test_one_thread_keeps_the_order():
    """On one thread jobs run in the order given, in the caller's thread."""
    order = []
    jobs = [Job(number, lambda number=number: order.append((number, threading.get_ident()))) for number in range(5)]
    run_all(jobs, threads=1, budget_bytes=2, name="one")
    assert order == [(number, threading.get_ident()) for number in range(5)]


def test_a_job_over_the_budget_runs_alone():
    """A job that is larger than the budget begins when nothing else holds memory, and nothing joins it."""
    ledger = Ledger(10)
    jobs = [ledger.job(number, cost) for number, cost in enumerate([4, 4, 1000, 4, 4, 2000, 4])]
    run_all(jobs, threads=4, budget_bytes=10, name="large")
    assert ledger.wrong == []
    assert len(ledger.finished) == 7


def test_no_jobs_are_no_work():
    """A run of nothing returns."""
    run_all([], threads=4, budget_bytes=0, name="none")


def test_the_first_error_is_raised_and_ends_the_run():
    """A failing job's own error is raised, and no job behind it is begun."""
    begun = []
    problem = ValueError("the third")

    def run(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise problem

    jobs = (Job(1, lambda number=number: run(number)) for number in range(500))
    with pytest.raises(ValueError, match="the third") as raised:
        run_all(jobs, threads=1, budget_bytes=1, name="failing")
    assert raised.value is problem
    assert begun == [0, 1, 2]


def test_later_errors_do_not_replace_the_first():
    """Of two jobs that fail, the error of the one that failed first is raised."""
    together = threading.Barrier(2, timeout=PATIENCE_SECONDS)

    def fail() -> None:
        others = [thread for thread in threading.enumerate() if thread.name == "both-0"]
        together.wait()
        if threading.current_thread() in others:
            raise ValueError("first")
        others[0].join(PATIENCE_SECONDS)
        raise KeyError("later")

    with pytest.raises(ValueError, match="first"):
        run_all([Job(0, fail)] * 2, threads=2, budget_bytes=1, name="both")


@pytest.mark.parametrize("ends_by", ["error", "stop"])
def test_a_job_that_waits_for_room_is_not_begun_after_the_end(ends_by):
    """A job that a thread has taken, and that waits for the budget when the run ends, does not run."""
    taken, stop, begun = threading.Event(), threading.Event(), []

    def last() -> None:
        assert taken.wait(PATIENCE_SECONDS)
        if ends_by == "error":
            raise ValueError("the end")
        stop.set()

    def jobs():
        yield Job(10, last)
        taken.set()
        yield Job(10, lambda: begun.append("waiting"))

    try:
        run_all(jobs(), threads=2, budget_bytes=10, name="waiting", stop=stop)
    except ValueError:
        assert ends_by == "error"
    assert begun == []


def test_an_error_of_the_jobs_themselves_is_raised():
    """When the iterable of jobs fails, the run fails with its error, whichever thread asked for the next job."""
    asked = threading.Event()

    def jobs():
        yield Job(0, lambda: asked.wait(PATIENCE_SECONDS))  # keeps one thread busy, so that the other meets the error
        asked.set()
        raise ValueError("no more jobs")

    for _ in range(5):
        asked.clear()
        with pytest.raises(ValueError, match="no more jobs"):
            run_all(jobs(), threads=2, budget_bytes=1, name="source")


def test_even_an_exit_in_a_thread_reaches_the_caller():
    """What is no ordinary exception is carried too: a run that did not finish never looks like one that did."""
    together = threading.Barrier(2, timeout=PATIENCE_SECONDS)

    def leave() -> None:
        together.wait()
        if threading.current_thread() is not threading.main_thread():
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        run_all([Job(0, leave)] * 2, threads=2, budget_bytes=1, name="exit")


def test_a_run_that_is_stopped_beforehand_begins_nothing():
    """With the stop event set, no job is begun and no error is raised."""
    stop = threading.Event()
    stop.set()
    run_all([Job(0, lambda: pytest.fail("begun"))] * 3, threads=2, budget_bytes=1, name="stopped", stop=stop)


def test_a_stop_ends_the_run_after_the_jobs_under_way():
    """Jobs under way when the stop comes are finished, none is begun after it, and the call returns without an error."""
    stop, finished, numbers = threading.Event(), [], iter(range(100))

    def run(number: int) -> None:
        if number == 3:
            stop.set()
        finished.append(number)

    jobs = (Job(0, lambda number=number: run(number)) for number in numbers)
    run_all(jobs, threads=1, budget_bytes=1, name="stopping", stop=stop)
    assert finished == [0, 1, 2, 3]
    assert next(numbers) == 4, "jobs that are not begun are not even asked for"


def test_the_budget_is_given_back_after_a_failure():
    """A run after a failed one starts from an empty budget: runs share nothing."""

    def fail() -> None:
        raise ValueError

    for _ in range(3):
        with pytest.raises(ValueError):
            run_all([Job(5, fail)], threads=2, budget_bytes=5, name="again")
    done = []
    run_all([Job(5, lambda: done.append(1))] * 3, threads=2, budget_bytes=5, name="again")
    assert len(done) == 3
