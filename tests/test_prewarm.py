"""The scheduler of warm-ups: their order, their number at a time, their outcomes, and an end that waits for nobody for ever."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coldstart.deploy.prewarm import (
    CANCELLED,
    DONE,
    FAILED,
    TIMED_OUT,
    Outcome,
    Queue,
    Stopped,
    Task,
    Ticket,
    TimeIsOver,
    run_all,
)
from coldstart.errors import UsageError

LONG_SECONDS = 60.0


def nothing(_ticket):
    """The smallest warm-up."""


# --- the bookkeeping -------------------------------------------------------------------------------------------------


class Queues(RuleBasedStateMachine):
    """Submissions, beginnings, ends and verdicts in any order, beside a list of what should be there."""

    def __init__(self):
        super().__init__()
        self.maximum = 3
        self.queue = Queue(max_concurrent=self.maximum)
        self.waiting = []
        self.active = []
        self.ended = {}

    @rule(priority=st.integers(-2, 2))
    def submit(self, priority):
        number = self.queue.submit(Task("task", nothing, priority))
        assert number == len(self.waiting) + len(self.active) + len(self.ended)
        self.waiting.append((-priority, number))

    @rule()
    def take(self):
        taken = self.queue.take()
        if not self.waiting or len(self.active) == self.maximum:
            assert taken is None
            return
        first = min(self.waiting)
        self.waiting.remove(first)
        assert taken[0] == first[1]
        self.active.append(taken[0])

    @precondition(lambda self: self.active)
    @rule(data=st.data(), status=st.sampled_from([DONE, FAILED]), judged=st.booleans())
    def settle(self, data, status, judged):
        number = data.draw(st.sampled_from(self.active))
        self.active.remove(number)
        if judged:
            self.queue.judge(number, Outcome("task", TIMED_OUT, None, "late", 1.0))
            assert self.queue.active_count == len(self.active) + 1
        self.queue.settle(number, Outcome("task", status, None, "", 1.0))
        self.ended[number] = TIMED_OUT if judged else status

    @rule()
    def cancel(self):
        self.queue.cancel_pending("told to")
        self.ended |= {number: CANCELLED for _, number in self.waiting}
        self.waiting.clear()

    @invariant()
    def counts_are_right(self):
        assert self.queue.pending_count == len(self.waiting)
        assert self.queue.active_count == len(self.active) <= self.maximum
        statuses = [outcome.status for outcome in self.queue.outcomes()]
        assert statuses == [self.ended[number] for number in sorted(self.ended)]


TestQueues = Queues.TestCase


def test_at_least_one_at_a_time():
    """With no place nothing would ever begin, which is a mistake in the call."""
    with pytest.raises(UsageError, match="at least one warm-up has to run at a time, not 0"):
        Queue(max_concurrent=0)


# --- runs ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 3), max_size=12))
def test_higher_priorities_first_then_first_come_first_served(priorities):
    """One at a time, warm-ups run by priority, and within one in the order in which they were given."""
    ran = []
    tasks = [
        Task(f"{index}", lambda _ticket, index=index: ran.append(index), priority)
        for index, priority in enumerate(priorities)
    ]
    report = run_all(tasks, max_concurrent=1, timeout_seconds=LONG_SECONDS)
    assert [outcome.name for outcome in report.outcomes] == [task.name for task in tasks]
    assert sorted(ran) == list(range(len(tasks)))
    assert all((-priorities[a], a) < (-priorities[b], b) for a, b in pairwise(ran))
    assert report.good


@given(st.integers(1, 5), st.integers(0, 12))
def test_never_more_than_so_many_at_work_and_as_many_as_may(maximum, count):
    """The most that were ever at work is the limit, or all where there are fewer."""
    lock, active, peak = threading.Lock(), 0, 0
    full = threading.Event()

    def work(ticket):
        nonlocal active, peak
        with lock:
            active += 1
            peak = max(peak, active)
            if active == min(maximum, count):
                full.set()
        assert full.wait(LONG_SECONDS)
        with lock:
            active -= 1

    report = run_all([Task("t", work)] * count, max_concurrent=maximum, timeout_seconds=LONG_SECONDS)
    assert len(report.outcomes) == count
    assert report.good
    assert peak == min(maximum, count)


def test_each_outcome_tells_how_it_ended():
    """Results of those that are done, reasons of those that failed or whose time was over; one failing stops no other."""

    def fail(_ticket):
        raise ValueError("no such worker")

    tasks = [
        Task("good", lambda _ticket: 7),
        Task("bad", fail),
        Task("late", lambda ticket: ticket.wait(LONG_SECONDS)),
        Task("last", lambda ticket: ticket.check()),
    ]
    report = run_all(tasks, max_concurrent=4, timeout_seconds=0.05)
    good, bad, late, last = report.outcomes
    assert (good.status, good.result, good.reason) == (DONE, 7, "")
    assert (bad.status, bad.result, bad.reason) == (FAILED, None, "ValueError: no such worker")
    assert (late.status, late.result, late.reason) == (TIMED_OUT, None, "not done after 0 s")
    assert last.status == DONE
    assert late.seconds >= 0.05
    assert not report.good
    assert not report.interrupted


def test_one_that_ignores_its_time_is_reported_and_left_behind():
    """Its place is not given away, so what waits behind it is cancelled, and the run ends."""
    ignoring, begun = threading.Event(), []

    def ignore(_ticket):
        begun.append(1)
        ignoring.wait(LONG_SECONDS)

    tasks = [Task("stuck", ignore), Task("behind", ignore)]
    report = run_all(tasks, max_concurrent=1, timeout_seconds=0.01, stop_seconds=0.02)
    ignoring.set()
    stuck, behind = report.outcomes
    assert (stuck.status, begun) == (TIMED_OUT, [1])
    assert (behind.status, behind.seconds) == (CANCELLED, 0.0)
    assert behind.reason == "the warm-ups before it did not end, so there was no place for it"


def test_one_that_is_late_frees_its_place_when_it_ends():
    """A warm-up that ends after its time is over stays timed out, and the next begins."""
    tasks = [Task("late", lambda ticket: time.sleep(0.05)), Task("next", lambda _ticket: 1)]
    late, following = run_all(tasks, max_concurrent=1, timeout_seconds=0.01).outcomes
    assert (late.status, following.status) == (TIMED_OUT, DONE)


def ctrl_c():
    """What a terminal sends, to the thread that hears it."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def interrupted(work):
    """The report of a run of two warm-ups, one at a time, of which the first one's work interrupts it."""
    tasks = [Task("active", work), Task("waiting", work)]
    return run_all(tasks, max_concurrent=1, timeout_seconds=LONG_SECONDS, stop_seconds=LONG_SECONDS)


def test_ctrl_c_lets_what_is_active_end_and_begins_nothing_more():
    """What is active may finish; what waited is cancelled; the report says that it was interrupted."""
    begun = []

    def work(ticket):
        begun.append(1)
        ctrl_c()
        with pytest.raises(Stopped):
            ticket.wait(LONG_SECONDS)
        return "finished"

    report = interrupted(work)
    active, waiting = report.outcomes
    assert (active.status, active.result) == (DONE, "finished")
    assert (waiting.status, waiting.reason) == (CANCELLED, "interrupted before it began")
    assert begun == [1]
    assert report.interrupted
    assert not report.good


def test_what_ctrl_c_stopped_is_cancelled():
    """A warm-up that lets its ticket's word pass is cancelled, not failed."""

    def work(ticket):
        ctrl_c()
        ticket.wait(LONG_SECONDS)

    active, _ = interrupted(work).outcomes
    assert (active.status, active.reason) == (CANCELLED, "interrupted")


def test_a_second_ctrl_c_waits_for_nobody():
    """What is active is left behind and reported as cancelled."""
    release = threading.Event()

    def work(ticket):
        ctrl_c()
        with suppress(Stopped):
            ticket.wait(LONG_SECONDS)
        ctrl_c()
        release.wait(LONG_SECONDS)

    report = interrupted(work)
    release.set()
    assert report.interrupted
    assert [outcome.status for outcome in report.outcomes] == [CANCELLED, CANCELLED]
    assert report.outcomes[0].reason == "interrupted; it did not end in time"


# --- tickets ---------------------------------------------------------------------------------------------------------


def test_a_ticket_ends_a_wait_by_time_and_by_the_runs_end():
    """Time that is over raises TimeIsOver, a run told to end raises Stopped, and neither is slept through."""
    now, stopping = [0.0], threading.Event()
    ticket = Ticket(10.0, stopping, lambda: now[0])
    ticket.check()
    assert ticket.remaining_seconds == 10.0
    now[0] = 10.5
    assert ticket.remaining_seconds == 0.0
    with pytest.raises(TimeIsOver):
        ticket.wait(LONG_SECONDS)
    now[0] = 0.0
    stopping.set()
    with pytest.raises(Stopped):
        ticket.wait(LONG_SECONDS)
