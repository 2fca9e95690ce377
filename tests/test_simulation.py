"""Commit, lease and collection in a simulated world: thousands of seeded runs with lost requests, lost answers and kills."""

from __future__ import annotations

import pytest

from coldstart.errors import ConditionFailedError, StateChangedError
from coldstart.repository import Repository
from coldstart.stores.retrying import RetryingStore
from tests.simulation import Protocol, Violation, simulate

SEEDS = 500
MORE_SEEDS = 3000


class _ForgetfulRepository(Repository):
    """Takes every swap that seems to fail for one that was lost."""

    def _read_back(self, target, ref, error):
        raise StateChangedError("another worker was first") from error


class _ForgetfulStore(RetryingStore):
    """Does not read back whether its first attempt took effect."""

    def _settle(self, key, data, lost, *, creates):
        raise ConditionFailedError("the repetition lost") from lost


class _CarelessRepository(Repository):
    """Relies on whatever is stored, however old."""

    def is_young(self, age_seconds):
        return age_seconds is not None


BROKEN = {
    "no read-back": Protocol(repository=_ForgetfulRepository, retrying=_ForgetfulStore),
    "no grace": Protocol(collector_grace_seconds=0.0),
    "no settling": Protocol(settle_seconds=0.0),
    "old blobs are relied on": Protocol(repository=_CarelessRepository, confirms=False),
}


@pytest.mark.parametrize("part", range(3))
def test_nothing_is_lost(part: int) -> None:
    """Whatever is lost, late or killed: acknowledged generations stay, live ones restore, numbers are given once."""
    for seed in range(part * SEEDS // 3, (part + 1) * SEEDS // 3):
        _run(seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_nothing_is_lost_in_3000_runs(part: int) -> None:
    """The same, 3,000 times: ``pytest -m slow tests/test_simulation.py``."""
    for seed in range(part * MORE_SEEDS // 10, (part + 1) * MORE_SEEDS // 10):
        _run(seed)


def _run(seed: int) -> None:
    try:
        simulate(seed)
    except Violation as violation:
        raise AssertionError(f"seed {seed}: {violation}") from violation


def test_runs_repeat() -> None:
    """A seed gives the same run again, to the last byte in the store: what it finds can be looked at."""
    first, again = simulate(7), simulate(7)
    assert first.steps == again.steps
    assert first.acknowledged == again.acknowledged
    assert {key: entry[1:] for key, entry in first.entries.items()} == {
        key: entry[1:] for key, entry in again.entries.items()
    }


def test_runs_do_what_they_are_for() -> None:
    """The runs publish, collect, roll back and lose races: a simulation in which nothing happens proves nothing."""
    worlds = [simulate(seed) for seed in range(40)]
    assert sum(len(world.acknowledged) for world in worlds) > 80
    assert sum(world.collected for world in worlds) > 80
    assert sum(world.lost for world in worlds) > 5
    assert sum(world.unsettled for world in worlds) > 5


@pytest.mark.parametrize("protocol", BROKEN.values(), ids=BROKEN)
def test_broken_protocols_are_found(protocol: Protocol) -> None:
    """A protocol without one of its rules breaks a promise within a few runs, so the runs above would have shown it."""
    with pytest.raises(Violation):
        for seed in range(SEEDS):
            simulate(seed, protocol)
