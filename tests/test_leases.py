"""Leases: one worker of a fleet captures, the others wait for it, and none of it is needed to be right."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coldstart import events
from coldstart.errors import CaptureError, StoreTransientError
from coldstart.leases import LEASE_SECONDS, Held, Holder, Holding, Lease, Leases, hold
from coldstart.repository import Repository
from coldstart.stores.memory import ALL_CAPABILITIES, MemoryStore
from coldstart.testing import FakeClock, Fault, FaultyStore
from tests.generations import publish
from tests.starts import RUN_SECONDS, in_threads
from tests.test_resnapshot import World, proven, weights, world

__all__ = ["proven", "world"]
KEY = "leases/model"


@pytest.fixture
def clock():
    """The time of the store and of everyone who uses it."""
    return FakeClock()


@pytest.fixture
def store(clock):
    """The store, which a test may let fail."""
    return FaultyStore(MemoryStore(clock=clock.time))


@pytest.fixture
def leases(store, clock):
    """Makes the leases as a worker of that name sees them."""
    return lambda host: Leases(Repository(store, clock=clock.time), Holder(host, 1))


def test_one_of_many_gets_it() -> None:
    """Of workers that ask at the same time just one gets the lease."""
    repository = Repository(MemoryStore())
    taken = in_threads(20, lambda: Leases(repository, Holder("a worker", 1)).take(KEY))
    assert [type(one) for one in taken].count(Lease) == 1
    assert all(isinstance(one, (Lease, Held)) for one in taken)


def test_it_is_another_s_until_it_is_released(leases) -> None:
    """A lease that is held is told with its holder and what is left of it; a released one is free at once."""
    first, second = leases("first"), leases("second")
    lease = first.take(KEY)
    assert second.take(KEY) == Held("process 1 of first", LEASE_SECONDS)
    first.release(lease)
    assert isinstance(second.take(KEY), Lease)


def test_it_ends_by_itself(leases, clock) -> None:
    """The lease of a worker that was killed is free when its time is over, and what it does then changes nothing."""
    first, second = leases("first"), leases("second")
    lost = first.take(KEY)
    clock.advance(LEASE_SECONDS - 1)
    assert second.take(KEY) == Held("process 1 of first", 1.0)
    clock.advance(2)
    taken = second.take(KEY)
    assert isinstance(taken, Lease)
    assert first.renew(lost) is None
    first.release(lost)
    assert isinstance(first.take(KEY), Held)


def test_a_process_of_this_host_that_is_no_more_holds_nothing(store, clock) -> None:
    """Whoever starts again after a kill need not wait for the lease that the killed process had."""
    repository = Repository(store, clock=clock.time)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    gone, alive = Holder(os.uname().nodename, process.pid), Holder(os.uname().nodename, os.getpid())
    Leases(repository, gone).take(KEY)
    assert isinstance(Leases(repository, alive).take(KEY), Lease)
    assert Leases(repository).take(KEY) == Held(str(alive), LEASE_SECONDS)


def test_it_is_renewed_at_work(leases, clock) -> None:
    """A renewed lease lasts from then on, and its renewal is what can be released."""
    first, second = leases("first"), leases("second")
    lease = first.take(KEY)
    clock.advance(LEASE_SECONDS / 2)
    renewed = first.renew(lease)
    clock.advance(LEASE_SECONDS / 2 + 1)
    assert isinstance(second.take(KEY), Held)
    first.release(renewed)
    assert isinstance(second.take(KEY), Lease)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"host": 1, "process": 1, "until_seconds": 9e9}',
        b'{"host": "a", "process": 1}',
        b'{"host": "a", "process": 0, "until_seconds": 1700000001}',
        b'{"host": "a", "process": 1, "until_seconds": 1e300}',
        b'{"host": "a", "process": 1, "until_seconds": true}',
        b"[" * 5000,
    ],
)
def test_what_is_no_lease_is_free(leases, store, data) -> None:
    """Whatever stands in a lease's place, or claims to last for ever, does not keep a fleet from its snapshot."""
    store.put(KEY, data)
    assert isinstance(leases("first").take(KEY), Lease)


def test_a_lost_answer_is_settled(leases, store) -> None:
    """A lease whose answer was lost is held if it is there with this write's id."""
    store.inject(Fault("transient_after", "put", key=KEY))
    assert isinstance(leases("first").take(KEY), Lease)
    store.inject(Fault("transient_before", "put", key="leases/other"))
    assert isinstance(leases("first").take("leases/other"), Held)


def test_no_conditions_no_leases(clock) -> None:
    """Where a store enforces no conditions nobody claims anything, and nothing is written."""
    lax = ALL_CAPABILITIES._replace(compare_and_swap=False)
    store = FaultyStore(MemoryStore(clock=clock.time, capabilities=lax))
    holding = hold(Repository(store, clock=clock.time), "model")
    assert isinstance(holding, Holding)
    holding.keep()
    holding.end()
    assert store.calls == []


def test_a_worker_that_may_not_write_leases_captures_without(store, clock) -> None:
    """A credential that leaves leases out costs the fleet its order and not its snapshot."""
    store.inject(Fault("denied", "put", key=KEY))
    assert isinstance(hold(Repository(store, clock=clock.time), "model"), Holding)
    store.inject(Fault("transient_before", "get", key=KEY))
    with pytest.raises(StoreTransientError):
        hold(Repository(store, clock=clock.time), "model")


def test_retries_are_spread() -> None:
    """Workers that were refused ask again in a minute or two, or soon after the lease's end, not all at once."""
    assert Held("first", 500.0).retry_seconds(lambda: 0.0) == 60.0
    assert Held("first", 500.0).retry_seconds(lambda: 0.5) == 90.0
    assert Held("first", 5.0).retry_seconds(lambda: 0.5) == 35.0


# --- captures ------------------------------------------------------------------------------------------------------------


def test_a_capture_holds_the_lease(world: World, proven) -> None:
    """From its first chunk to its end a capture holds the lease, and afterwards it is free."""
    others = Leases(world.repository, Holder("another", 1))
    seen = []
    world.at_idle = lambda seconds: seen.append(others.take(KEY)) if seconds == 0.0 else None
    proven.at_run = staticmethod(lambda proof: seen.append(others.take(KEY)))
    (outcome,) = world.made(world.plan(weights()))
    assert outcome.published
    assert len(seen) > 1
    assert all(isinstance(one, Held) for one in seen)
    assert isinstance(others.take(KEY), Lease)


def test_a_failed_capture_releases_the_lease(world: World) -> None:
    """A capture that fails leaves nothing that the next one would have to wait for."""
    world.store.inject(Fault("denied", "put", "blobs/*"))
    failed, made = world.made(world.plan(weights(50)), world.plan(weights(51)))
    assert (failed.published, made.published) == (False, True)


def test_who_does_not_get_the_lease_captures_nothing(world: World) -> None:
    """The outcome and an event say who captures, and nothing is written."""
    other = Leases(world.repository, Holder("host 7", 1))
    other.take(KEY)
    before = world.store.count("put")
    (outcome,) = world.made(world.plan(weights()))
    assert (outcome.published, outcome.reason) == (False, "process 1 of host 7 captures this snapshot")
    assert world.seen.of(events.CaptureSkipped) == [events.CaptureSkipped("model", outcome.reason)]
    assert world.store.count("put") == before


@pytest.mark.parametrize("is_published", [False, True])
def test_a_refused_capture_is_tried_again_if_it_is_still_missing(world: World, monkeypatch, is_published) -> None:
    """When the lease is over the capture is made, unless its holder has published meanwhile."""
    other = Leases(world.repository, Holder("host 7", 1))
    lease = other.take(KEY)
    monkeypatch.setattr(Held, "retry_seconds", lambda held: 0.05)
    begun = world.begin(world.plan(weights(7)))
    assert begun.wait_first(RUN_SECONDS)
    assert not begun.outcomes[0].published
    if is_published:
        publish(world.repository)
    other.release(lease)
    begun._thread.join(RUN_SECONDS)
    assert not begun._thread.is_alive()
    last = begun.outcomes[-1]
    assert world.look_up().ref.generation == 1
    assert last.published != is_published
    assert ("another worker published" in last.reason) == is_published


def test_a_fleet_makes_one_generation(world: World) -> None:
    """Of several workers that start without a snapshot one captures; the others are done when it is."""
    plans = [world.plan(weights(5)) for _ in range(4)]
    begun = [world.begin(plan) for plan in plans]
    assert all(one.wait_first(RUN_SECONDS) for one in begun)
    published = [outcome for one in begun for outcome in one.outcomes if outcome.published]
    assert len(published) == 1
    ref = world.look_up().ref
    assert ref is not None
    assert ref.generation == 1


def test_a_lease_that_cannot_be_given_back_is_no_error() -> None:
    """A worker that is stopped has nobody who writes for it any more: its lease ends by itself, and its capture thread lives on."""

    class Stopped(MemoryStore):
        refuses = False

        def put(self, key, data, **conditions):
            if self.refuses:
                raise CaptureError("the worker ended while its state was captured")
            return super().put(key, data, **conditions)

    store = Stopped()
    holding = hold(Repository(store), "model")
    assert isinstance(holding, Holding)
    store.refuses = True
    holding.end()
    assert isinstance(Leases(Repository(store), Holder("another host", 1)).take("leases/model"), Held)
