"""Restorations: what is found, what is recovered from and how, and what ends as a reason instead of an error."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldstart import events
from coldstart.devices.cpu import CpuDevice
from coldstart.errors import StateMismatchError, StoreSetupError
from coldstart.repository import Repository
from coldstart.restore import Missing, Request, Restoration, Restored, Unusable, bind_arrays, rebuild_tree
from coldstart.stores.memory import MemoryStore
from coldstart.testing import Fault, FaultyStore
from tests.generations import KEY, OTHER_KEY, capture_of, write
from tests.starts import RUN_SECONDS, Seen

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.capture import Written
    from coldstart.manifest import KeyRecord


class World:
    """A store with generations, and restorations from it."""

    def __init__(self) -> None:
        self.store = FaultyStore(MemoryStore())
        self.repository = Repository(self.store)
        self.bus = events.EventBus()
        self.seen = Seen("model", self.bus)

    def publish(
        self, state: Any, *, follows: Written | None = None, key: KeyRecord = KEY, device: str = "cpu"
    ) -> Written:
        capture = capture_of(state, follows=follows, key=key)._replace(device_type=device)
        written = write(capture, self.repository)
        replaces = self.repository.look_up("model", key)
        self.repository.publish(written.manifest, written.manifest_key, replaces=replaces)
        return written

    def begin(self, **options: Any) -> Restoration:
        values = {
            "name": "model",
            "key": KEY,
            "open_repository": lambda: self.repository,
            "device": CpuDevice(),
            "threads": 2,
            "budget_bytes": 1 << 20,
            "files_folder": "/dev/null/nowhere",
        }
        return Restoration(Request(**{**values, **options}), self.bus)

    def outcome(self, **options: Any) -> Any:
        return self.begin(**options).outcome()


@pytest.fixture
def world() -> World:
    """An empty store."""
    return World()


def state(value: int) -> dict[str, Any]:
    """A state with two blobs, one of which is the same whatever the value."""
    return {"w": np.full(100, value, np.float32), "same": np.arange(10)}


def value_of(restored: Restored) -> int:
    """What ``state`` was made of."""
    restored.arena.seal()
    return int(rebuild_tree(restored)["w"][0])


# --- what is found -----------------------------------------------------------------------------------------------------------


def test_restored(world: World) -> None:
    """The current generation comes into memory, without a listing, and with what is needed to replace it."""
    world.publish(state(1), follows=world.publish(state(0)))
    outcome = world.outcome()
    assert isinstance(outcome, Restored)
    assert (value_of(outcome), outcome.recovered_by, outcome.reason) == (1, "none", "")
    assert outcome.lookup == world.repository.look_up("model", KEY)
    assert world.store.count("list") == 0
    (found,) = world.seen.of(events.SnapshotFound)
    assert found[:3] == ("model", 2, "arrays")
    (ended,) = world.seen.of(events.FetchEnded)
    assert ended.fetched_bytes == outcome.manifest.stored_bytes


def test_no_snapshot(world: World) -> None:
    """Where there is none at all, and where there is one of another key, the reason says so."""
    assert world.outcome() == Missing("no snapshot yet", world.repository.look_up("model", KEY))
    world.publish(state(1), key=OTHER_KEY)
    outcome = world.outcome()
    assert isinstance(outcome, Missing)
    assert outcome.reason == "code changed: load"
    assert world.seen.of(events.FellBack) == []


def test_fresh(world: World) -> None:
    """A fresh start looks the generation up, in order to replace it, and reads nothing of it."""
    world.publish(state(1))
    assert world.outcome(fresh=True) == Missing("a fresh start was asked for", world.repository.look_up("model", KEY))
    assert world.store.count("get", "manifests/*") == world.store.count("read_into") == 0


def test_pinned(world: World) -> None:
    """A pinned generation is restored although it is not current, and every decoded byte is checked."""
    old = world.publish(state(0))
    world.publish(state(1), follows=old)
    before = len(world.store.calls)
    outcome = world.outcome(pinned=old.manifest_key)
    assert value_of(outcome) == 0
    assert not any(call.key.startswith("refs/") for call in world.store.calls[before:])
    chunk = old.manifest.chunks[0]._replace(raw_hash="0" * 64)
    wrong = old.manifest._replace(chunks=(chunk, *old.manifest.chunks[1:]))
    outcome = world.outcome(pinned=world.repository.put_manifest(wrong))
    assert isinstance(outcome, Unusable)
    assert outcome.reason.startswith("BlobCorruptError: ")


def test_manifest_comes_before_the_bytes(world: World) -> None:
    """What is being fetched is known before it is there, so that a skeleton can be built in its shadow."""
    written = world.publish(state(1))
    go = threading.Event()
    read_into = world.store.read_into

    def wait(*arguments: Any, **options: Any) -> None:
        assert go.wait(RUN_SECONDS)
        read_into(*arguments, **options)

    world.store.read_into = wait  # type: ignore[method-assign]
    begun = world.begin()
    assert begun.manifest() == written.manifest
    go.set()
    assert isinstance(begun.outcome(), Restored)
    assert begun.began_monotonic_seconds < begun.found_monotonic_seconds < begun.ended_monotonic_seconds


# --- what is recovered from --------------------------------------------------------------------------------------------------


def test_chunk_that_was_read_wrongly_once(world: World) -> None:
    """A chunk whose bytes arrive damaged is read again, and the start says so."""
    world.publish(state(1))
    world.store.inject(Fault("corrupt", "read_into", times=1))
    outcome = world.outcome()
    assert (value_of(outcome), outcome.recovered_by) == (1, "chunk_retry")


def test_previous_generation(world: World) -> None:
    """Where a blob of the current generation stays damaged, the one before it is restored, with the reason."""
    new = world.publish(state(1), follows=world.publish(state(0)))
    (blob,) = {chunk.blob for chunk in new.manifest.chunks} - _blobs_of_previous(world)
    world.store.inject(Fault("corrupt", "read_into", f"*{blob}", times=None))
    outcome = world.outcome()
    assert (value_of(outcome), outcome.recovered_by) == (0, "previous_generation")
    assert blob in outcome.reason
    assert [event.stage for event in world.seen.of(events.FellBack)] == ["generation"]
    assert [event.generation for event in world.seen.of(events.SnapshotFound)] == [2, 1]


def _blobs_of_previous(world: World) -> set[str]:
    ref = world.repository.look_up("model", KEY).ref
    assert ref is not None
    return {chunk.blob for chunk in world.repository.manifest(ref.previous_manifest, name="model").chunks}


@pytest.mark.parametrize("kind", ["corrupt", "truncate", "missing", "denied"])
def test_no_generation_left(world: World, kind: Any) -> None:
    """Where no generation can be read, the reasons of both are told, and what to replace is known."""
    world.publish(state(1), follows=world.publish(state(0)))
    world.store.inject(Fault(kind, "read_into", times=None))
    outcome = world.outcome()
    assert isinstance(outcome, Unusable)
    assert outcome.reason.count("Error: ") == 2
    assert outcome.lookup == world.repository.look_up("model", KEY)
    assert len(world.seen.of(events.FellBack)) == 2


def test_first_generation_without_a_previous_one(world: World) -> None:
    """The first generation of a key has none before it to recover by."""
    world.publish(state(1))
    world.store.inject(Fault("missing", "read_into", times=None))
    outcome = world.outcome()
    assert isinstance(outcome, Unusable)
    assert outcome.reason.count("Error: ") == 1


def test_generation_of_another_device(world: World) -> None:
    """A generation that was captured on another kind of device is not put into this one's memory."""
    world.publish(state(1), device="cuda")
    outcome = world.outcome()
    assert isinstance(outcome, Unusable)
    assert "for device cuda" in outcome.reason
    assert world.store.count("read_into") == 0


@pytest.mark.parametrize("kind", ["transient_before", "denied"])
def test_store_that_fails(world: World, kind: Any) -> None:
    """A store that does not answer is a reason; whether there is a snapshot is then unknown."""
    world.publish(state(1))
    world.store.inject(Fault(kind, "get", "refs/*"))
    outcome = world.outcome()
    assert isinstance(outcome, Unusable)
    assert "injected" in outcome.reason
    assert outcome.lookup is None


def test_store_that_cannot_be_opened(world: World) -> None:
    """A store that cannot even be opened is a reason too."""
    outcome = world.outcome(open_repository=_raiser(StoreSetupError("no such scheme")))
    assert outcome == Unusable("StoreSetupError: no such scheme", None)


def test_error_that_nobody_foresaw(world: World) -> None:
    """Any other error is raised where the outcome is asked for, and nobody waits for ever."""
    begun = world.begin(open_repository=_raiser(ZeroDivisionError("by us")))
    assert begun.manifest() is None
    with pytest.raises(ZeroDivisionError, match="by us"):
        begun.outcome()


def _raiser(error: Exception) -> Callable[[], Repository]:
    def open_repository() -> Repository:
        raise error

    return open_repository


def test_cancel(world: World) -> None:
    """A restoration that is not wanted any more begins no further read."""
    world.publish({f"a{number}": np.full(3 << 18, number, np.float32) for number in range(12)})
    reading, go, reads = threading.Event(), threading.Event(), []
    read_into = world.store.read_into

    def wait(key: str, target: memoryview, **options: Any) -> None:
        reads.append(key)
        if len(reads) == 2:
            reading.set()
            assert go.wait(RUN_SECONDS)
        read_into(key, target, **options)

    world.store.read_into = wait  # type: ignore[method-assign]
    begun = world.begin(threads=1)
    assert reading.wait(RUN_SECONDS)
    begun.cancel()
    go.set()
    assert isinstance(begun.outcome(), Unusable)
    assert len(reads) == 2
    fallen = [event for event in world.seen.all() if isinstance(event, events.FellBack)]
    assert not fallen, "that nobody wants it is no trouble to be told of"


# --- arrays in their places -----------------------------------------------------------------------------------------------------


class Net:
    """What build makes."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights


def test_bind(world: World) -> None:
    """Restored arrays replace those of a skeleton, as writable views of the one arena."""
    world.publish(Net(np.arange(100.0)))
    outcome = world.outcome()
    outcome.arena.seal()
    skeleton = Net(np.zeros(100))
    bound = bind_arrays(outcome, skeleton)
    assert bound is skeleton
    assert np.array_equal(bound.weights, np.arange(100.0))
    bound.weights += 1
    assert bound.weights[99] == 100.0


def test_bind_to_something_else(world: World) -> None:
    """A skeleton that differs from what was captured is refused, with the differences."""
    world.publish(Net(np.arange(100.0)))
    outcome = world.outcome()
    outcome.arena.seal()
    with pytest.raises(StateMismatchError) as caught:
        bind_arrays(outcome, Net(np.zeros(99)))
    assert len(caught.value.differences) == 1
