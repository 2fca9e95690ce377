"""When and how a new generation is made: idle moments, policies, changed weights, failures. Proofs have tests of their own."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldstart import due, events, generation_making, resnapshot
from coldstart.capture import Encoding
from coldstart.definition import Policy
from coldstart.errand import Origin
from coldstart.errors import ProofError, StoreError
from coldstart.fetch import Address
from coldstart.frameworks import survey
from coldstart.generation_plan import Outcome, Plan
from coldstart.manifest import blob_key, newest_ref_key
from coldstart.marks import changed_paths, marks_of
from coldstart.metrics import Transfers
from coldstart.repository import Repository
from coldstart.resnapshot import Resnapshot
from coldstart.save import IN_THREAD, Saving
from coldstart.stores import StoreOptions, open_store
from coldstart.stores.memory import MemoryStore
from coldstart.testing import FakeClock, Fault, FaultyStore
from tests.generations import KEY, OTHER_KEY, capture_of, restored
from tests.starts import RUN_SECONDS, Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from coldstart.manifest import KeyRecord, Manifest
    from coldstart.repository import Lookup

CACHE = {'["cache"]': "other"}


class Proven:
    """A proof that starts no process: it notes what it was given, runs ``at_run`` and is content."""

    asked: list[Any]
    at_run: Callable[[Proven], None]

    def __init__(
        self, origin: Origin, pinned: Mapping[str, str], store_url: str, *, beside: Any, program: Any = None
    ) -> None:
        assert program is None
        self.pinned = dict(pinned)
        self.stopped = threading.Event()
        self.given = (origin, dict(pinned), store_url)

    def run(self, expected: tuple[str, ...]) -> bool:
        type(self).asked.append((*self.given, expected))
        type(self).at_run(self)
        return True

    def stop(self) -> None:
        self.stopped.set()


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> type[Proven]:
    """Proofs without processes; what they were asked, and what they do."""

    class OfThisTest(Proven):
        asked: list[Any] = []
        at_run = staticmethod(lambda proof: None)

    monkeypatch.setattr(generation_making, "Proof", OfThisTest)
    monkeypatch.setattr(resnapshot, "POLL_SECONDS", 0.002)
    return OfThisTest


class World:
    """A store, and captures of a state of this process into it."""

    def __init__(self) -> None:
        self.store = FaultyStore(MemoryStore())
        self.repository = Repository(self.store)
        self.bus = events.EventBus()
        self.seen = Seen("model", self.bus)
        self.saves = Transfers()
        self.served = 0
        self.idles: list[float] = []
        self.at_idle: Callable[[float], None] = lambda seconds: None
        self.open_errors: list[StoreError] = []
        self.at_work: list[Resnapshot] = []
        self.saving = IN_THREAD

    def look_up(self, key: KeyRecord = KEY) -> Lookup:
        return self.repository.look_up("model", key)

    def plan(self, state: Any, *, due_at_once: bool = True, created_seconds: float = 0.0, **options: Any) -> Plan:
        """A plan to capture ``state``, whose arrays are marked as they are now."""
        capture = capture_of(state, generation=0, **options)
        assert capture.survey is not None
        origin = Origin("/handler.py", "handler", "model")
        marks = marks_of(capture.survey)
        return Plan(capture, self.look_up(capture.key), marks, origin, due_at_once, created_seconds)

    def begin(self, *plans: Plan, policy: Policy | None = None) -> Resnapshot:
        found = Resnapshot(
            list(plans),
            self._open,
            encoding=Encoding("raw", 1),
            idle=self._idle,
            idle_seconds=0.5,
            policy=policy or Policy(),
            served=lambda: self.served,
            saves=self.saves,
            bus=self.bus,
            saving=lambda: self.saving,
        )
        self.at_work.append(found)
        return found

    def made(self, *plans: Plan) -> list[Outcome]:
        """What became of plans that are due at once."""
        begun = self.begin(*plans)
        assert begun.wait_first(RUN_SECONDS)
        return begun.outcomes

    def _open(self) -> Repository:
        for error in self.open_errors:
            self.open_errors = []
            raise error
        return self.repository

    def _idle(self, seconds: float) -> None:
        self.idles.append(seconds)
        self.at_idle(seconds)

    def current(self) -> Manifest:
        ref = self.look_up().ref
        assert ref is not None
        return self.repository.manifest(ref.manifest, name="model")

    def state(self) -> Any:
        """The current generation's state."""
        return restored(self.current(), self.store)


@pytest.fixture
def world(proven: type[Proven]) -> Iterator[World]:
    """A store and a worker's state to capture into it; what is at work at the end is stopped."""
    found = World()
    yield found
    for begun in found.at_work:
        begun.stop(RUN_SECONDS)


def weights(number: int = 100) -> dict[str, Any]:
    """A state of an array that nobody changes and one that events may change."""
    return {"w": np.arange(number, dtype=np.float32), "cache": np.zeros(16, np.int64)}


# --- a first generation --------------------------------------------------------------------------------------------------


def test_first_generation(world: World) -> None:
    """What is due at once is written and becomes current; the outcome, an event and the metrics tell how much it was."""
    (outcome,) = world.made(world.plan(weights()))
    assert (outcome.published, outcome.generation, outcome.reason) == (True, 1, "")
    assert outcome.written_bytes == outcome.stored_bytes == world.current().stored_bytes
    assert outcome.reused_bytes == 0
    assert np.array_equal(world.state()["w"], weights()["w"])
    assert world.seen.of(events.CaptureBegan) == [events.CaptureBegan("model", 1, "no usable snapshot")]
    (ended,) = world.seen.of(events.CaptureEnded)
    assert ended[:5] == ("model", 1, outcome.raw_bytes, outcome.written_bytes, 0)
    assert (world.saves.count, world.saves.bytes) == (1, outcome.written_bytes)


def test_proof_comes_before_the_ref(world: World, proven: type[Proven]) -> None:
    """The generation is complete in the store when it is proven, and current only afterwards."""
    at_proof = []

    def look(proof: Proven) -> None:
        at_proof.append(
            (world.look_up().ref, world.repository.manifest(proof.pinned["model"], name="model").generation)
        )

    proven.at_run = staticmethod(look)
    world.made(world.plan(weights()))
    assert at_proof == [(None, 1)]
    ref = world.look_up().ref
    assert ref is not None
    assert proven.asked == [
        (Origin("/handler.py", "handler", "model"), {"model": ref.manifest}, "memory://", ("d" * 32,))
    ]


def test_refused_by_the_proof(world: World, proven: type[Proven]) -> None:
    """A generation that its proof refuses is not published, and the reason is told."""

    def refuse(proof: Proven) -> None:
        raise ProofError("it answered differently")

    proven.at_run = staticmethod(refuse)
    (outcome,) = world.made(world.plan(weights()))
    assert outcome == Outcome.none("it answered differently", "threads")
    assert world.look_up().ref is None
    assert world.seen.of(events.CaptureFailed)[0].error == "ProofError: it answered differently"
    assert world.saves.count == 0


def test_idle_moments(world: World) -> None:
    """A capture waits for an idle moment of the given length, and gives way before every chunk."""
    state = {"a": np.zeros(9 << 18, np.float32), "b": np.arange(100)}
    world.made(world.plan(state))
    assert world.idles[0] == 0.5
    assert set(world.idles[1:]) == {0.0}
    assert len(world.idles) > len(world.current().chunks) > 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_priority(world: World) -> None:
    """The capturing thread gives way to those that serve, and one that is nicer already stays so."""
    found = []
    world.at_idle = lambda seconds: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    world.made(world.plan(weights()))
    assert found
    assert set(found) == {max(10, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))}


def test_parent_of_another_key(world: World) -> None:
    """The first generation of a key reuses what the newest one of another key has stored, and counts from 1."""
    world.made(world.plan(weights(), key=OTHER_KEY))
    (outcome,) = world.made(world.plan(weights()))
    assert (outcome.published, outcome.generation) == (True, 1)
    assert outcome.written_bytes == 0
    assert outcome.reused_bytes == outcome.stored_bytes
    newest = world.look_up(OTHER_KEY).ref
    assert newest is not None
    assert world.current().parent == newest.manifest


def test_unreadable_parent(world: World) -> None:
    """A parent whose manifest is gone is no obstacle to the next generation."""
    world.made(world.plan(weights()))
    ref = world.look_up().ref
    assert ref is not None
    world.store.delete(ref.manifest)
    (outcome,) = world.made(world.plan(weights()))
    assert (outcome.published, outcome.generation) == (True, 2)
    assert world.current().parent == ""


def test_parent_of_a_deleted_snapshot(world: World) -> None:
    """What a deleted snapshot's newest ref still names is nothing to build on: its blobs are the collector's."""
    world.made(world.plan(weights()))
    newest = world.store.get(newest_ref_key("model")).data
    world.repository.delete("model", KEY.digest)
    world.store.put(newest_ref_key("model"), newest)
    (outcome,) = world.made(world.plan(weights()))
    assert (outcome.published, outcome.generation) == (True, 2)
    assert world.current().parent == ""


def test_what_the_store_loses_before_the_ref_moves(world: World, proven: type[Proven]) -> None:
    """A blob that goes while the generation is proven keeps it from becoming current, and the lease is free again."""
    proven.at_run = staticmethod(
        lambda proof: [world.store.delete(info.key) for info in list(world.store.list("blobs/"))] and None
    )
    (outcome,) = world.made(world.plan(weights()))
    assert not outcome.published
    assert "nothing is stored under 'blobs/" in outcome.reason
    assert world.look_up().ref is None
    proven.at_run = staticmethod(lambda proof: None)
    assert world.made(world.plan(weights()))[0].published


def test_damaged_blobs_are_mended(world: World) -> None:
    """A generation that replaces an unreadable one writes its blobs again, whatever lies under their names."""
    world.made(world.plan(weights()))
    for chunk in world.current().chunks:
        world.store.put(blob_key(chunk.blob), b"\0" * chunk.stored_bytes)
    (outcome,) = world.made(world.plan(weights(), mends=True))
    assert (outcome.published, outcome.generation, outcome.reused_bytes) == (True, 2, 0)
    assert np.array_equal(world.state()["w"], weights()["w"])


def test_another_worker_was_first(world: World, proven: type[Proven]) -> None:
    """Of two workers that capture for the same key at once the first one's generation stays, and the other says so."""
    late = world.plan(weights(7))
    world.made(world.plan(weights(5)))
    (outcome,) = world.made(late)
    assert not outcome.published
    assert "another worker published" in outcome.reason
    assert len(world.state()["w"]) == 5


# --- failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["blobs/*", "manifests/*", "refs/*"])
def test_failing_store(world: World, key: str) -> None:
    """A store that refuses a write ends the attempt with an event, not the thread: the next plan is made."""
    world.made(world.plan(weights(5)))
    world.store.inject(Fault("denied", "put", key, times=1))
    failed, made = world.made(world.plan(weights(50)), world.plan(weights(51)))
    assert not failed.published
    assert "injected" in failed.reason
    assert made.published
    assert len(world.state()["w"]) == 51
    (event,) = world.seen.of(events.CaptureFailed)
    assert event.error.startswith("AccessDeniedError: ")


@pytest.mark.skipif(sys.platform != "linux", reason="the saver process is for Linux")
@pytest.mark.parametrize("when", ["while it saves", "while it is proven"])
def test_killed_saver(world: World, proven: type[Proven], tmp_path: Path, when: str) -> None:
    """A saver process that is killed is no obstacle: the generation is published, and its outcome says who made it."""
    address = Address(f"file://{tmp_path / 'store'}", StoreOptions())
    world.store = FaultyStore(open_store(*address))
    world.repository = Repository(world.store)
    world.saving = Saving("process", address, 64 << 20, 0)
    killed = []

    def kill(_: Any = None) -> None:
        writing = world.at_work[0]._making._writing
        if writing is not None and not killed:
            killed.append(writing.saver._pid)  # type: ignore[attr-defined]
            os.kill(killed[0], signal.SIGKILL)

    if when == "while it saves":
        world.at_idle = lambda seconds: kill() if seconds == 0.0 else None
    else:
        proven.at_run = staticmethod(kill)
    (outcome,) = world.made(world.plan(weights()))
    assert killed
    assert (outcome.published, outcome.reason) == (True, "")
    assert outcome.engine == "threads (the saver process ended early)"
    assert np.array_equal(world.state()["w"], weights()["w"])


@pytest.mark.skipif(sys.platform != "linux", reason="the saver process is for Linux")
def test_failing_store_of_a_saver(world: World, tmp_path: Path) -> None:
    """An error that the saver process meets is the outcome's reason, as if it had been met here."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "blobs").touch()
    address = Address(f"file://{tmp_path / 'store'}", StoreOptions())
    world.repository = Repository(open_store(*address))
    world.saving = Saving("process", address, 64 << 20, 0)
    (outcome,) = world.made(world.plan(weights()))
    assert (outcome.published, outcome.engine) == (False, "process")
    assert "blobs" in outcome.reason
    assert world.seen.of(events.CaptureFailed)[0].error.startswith("StoreSetupError: ")


def test_failure_of_another_kind(world: World) -> None:
    """An error that nobody foresaw ends the attempt in the same way, with its class in the reason."""

    def at_idle(seconds: float) -> None:
        world.at_idle = lambda seconds: None
        raise ZeroDivisionError("by the user")

    world.at_idle = at_idle
    failed, made = world.made(world.plan(weights(50)), world.plan(weights(51)))
    assert failed.reason == "ZeroDivisionError: by the user"
    assert made.published


def test_store_that_cannot_be_opened(world: World) -> None:
    """A store that cannot be opened fails the attempt, and is asked again by the next one."""
    first, second = world.plan(weights(50)), world.plan(weights(51))
    world.open_errors = [StoreError("no such store")]
    assert [outcome.reason for outcome in world.made(first, second)] == ["no such store", ""]


# --- changed weights -------------------------------------------------------------------------------------------------------


def test_weights_changed_before(world: World) -> None:
    """Arrays that changed since load are reported by path and nothing is published, nor even written."""
    state = weights()
    plan = world.plan(state)
    state["w"][3] += 1
    (outcome,) = world.made(plan)
    assert not outcome.published
    assert """kinds={'["w"]': 'other'}""" in outcome.reason
    assert world.seen.of(events.WeightsChanged) == [events.WeightsChanged("model", ('["w"]',))]
    assert world.store.count("put") == 0


def test_weights_changed_meanwhile(world: World) -> None:
    """Arrays that change while they are written make the generation a torn one, which is dropped."""
    state = weights()

    def at_idle(seconds: float) -> None:
        state["w"][0] = len(world.idles)

    plan = world.plan(state)
    world.at_idle = lambda seconds: at_idle(seconds) if seconds == 0.0 else None
    (outcome,) = world.made(plan)
    assert not outcome.published
    assert "changed" in outcome.reason
    assert world.look_up().ref is None


def test_weights_changed_while_they_are_sent(world: World) -> None:
    """A change during the very write of a blob is noticed: what is published is what the names say."""
    state = weights()
    plan = world.plan(state)
    original = world.store.put

    def put(key: str, data: Any, **options: Any) -> str:
        state["w"][0] = 5
        return original(key, data, **options)

    world.store.put = put  # type: ignore[method-assign]
    (outcome,) = world.made(plan)
    assert not outcome.published
    assert world.look_up().ref is None


def test_declared_kinds_are_published(world: World) -> None:
    """Buffers that are declared to change go into the generation with the bytes they have then."""
    state = weights()
    plan = world.plan(state, kinds=CACHE)
    state["cache"][:] = 7
    (outcome,) = world.made(plan)
    assert outcome.published
    assert set(world.state()["cache"]) == {7}
    assert {buffer.name: buffer.kind for buffer in world.current().buffers} == {
        '["w"]': "weights",
        '["cache"]': "other",
    }
    assert world.seen.of(events.WeightsChanged) == []


def test_marks() -> None:
    """Marks tell changed arrays by path: all views of one memory change together, others stay."""
    base = np.arange(10.0)
    state = {"a": base[:6], "b": base[4:], "c": np.arange(4), "empty": np.zeros(0)}
    found = survey(state)
    marks = marks_of(found)
    assert changed_paths(found, marks, {}) == ()
    base[9] = -1
    assert changed_paths(found, marks, {}) == ('["a"]', '["b"]')
    assert changed_paths(found, marks, {'["a"]': "kv_cache"}) == ('["b"]',)
    assert changed_paths(found, marks, {"[": "other"}) == ()


@pytest.mark.demo
def test_marks_of_tensors() -> None:
    """An in-place operation on a tensor is seen, reading one is not."""
    torch = pytest.importorskip("torch")
    state = {"a": torch.ones(4), "b": torch.ones(4)}
    found = survey(state)
    marks = marks_of(found)
    state["a"].sum()
    assert changed_paths(found, marks, {}) == ()
    state["b"].add_(1)
    assert changed_paths(found, marks, {}) == ('["b"]',)


# --- policies ----------------------------------------------------------------------------------------------------------------


def test_no_policy(world: World) -> None:
    """Without a policy what is not due at once is never made, and the thread ends."""
    begun = world.begin(world.plan(weights(), due_at_once=False))
    assert begun.wait_first(RUN_SECONDS)
    begun._thread.join(RUN_SECONDS)
    assert not begun._thread.is_alive()
    assert begun.outcomes == []


def test_policy_after_events(world: World) -> None:
    """Once enough events were served a further generation is made: of changed chunks, the rest is the parent's."""
    state = weights()
    world.made(world.plan(state, kinds=CACHE))
    begun = world.begin(world.plan(state, kinds=CACHE, due_at_once=False), policy=Policy(after_events=3))
    state["cache"][0] = 11
    world.served = 3
    assert world.seen.wait_for(events.CaptureEnded, 2).generation == 2
    assert world.seen.of(events.CaptureBegan)[1].reason == "policy"
    assert world.state()["cache"][0] == 11
    state["cache"][0] = 12
    world.served = 6
    ended = world.seen.wait_for(events.CaptureEnded, 3)
    assert (ended.generation, world.state()["cache"][0]) == (3, 12)
    assert 0 < ended.written_bytes < ended.reused_bytes
    begun.stop(RUN_SECONDS)  # an outcome is noted when its lease is released, after the event
    assert [outcome.generation for outcome in begun.outcomes] == [2, 3]


def test_policy_interval(world: World) -> None:
    """With an interval, generations follow one another as time passes."""
    begun = world.begin(world.plan(weights()), policy=Policy(interval_seconds=0.001))
    assert world.seen.wait_for(events.CaptureEnded, 3).generation == 3
    begun.stop(RUN_SECONDS)
    assert world.current().generation >= 3


def test_policy_age(world: World) -> None:
    """A worker that started from an old generation makes a new one, once."""
    world.made(world.plan(weights()))
    old = world.plan(weights(), due_at_once=False, created_seconds=1_000_000_000.0)
    begun = world.begin(old, policy=Policy(maximum_age_seconds=86_400.0))
    assert world.seen.wait_for(events.CaptureEnded, 2).generation == 2
    begun.stop(RUN_SECONDS)
    assert len(begun.outcomes) == 1


def test_policy_follows_other_workers(world: World) -> None:
    """A further generation replaces the one that is current then, also if another worker made it."""
    plan = world.plan(weights(), due_at_once=False)
    world.made(world.plan(weights(5)))
    world.begin(plan, policy=Policy(after_events=1))
    world.served = 1
    assert world.seen.wait_for(events.CaptureEnded, 2).generation == 2
    assert len(world.state()["w"]) == 100


@pytest.mark.parametrize(
    ("policy", "before", "after"),
    [
        (Policy(after_events=3), (2, 1e9), (3, 0.0)),
        (Policy(interval_seconds=60.0), (1000, 59.0), (0, 60.0)),
        (Policy(maximum_age_seconds=60.0), (1000, 59.0), (0, 60.0)),
        (Policy(after_events=3, interval_seconds=60.0), (2, 59.0), (2, 60.0)),
    ],
    ids=["events", "interval", "age", "either"],
)
def test_when_a_plan_is_due(
    policy: Policy, before: tuple[int, float], after: tuple[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy's condition holds from its number or its second on, and is counted anew after every attempt."""
    clock = FakeClock()
    monkeypatch.setattr(due, "time", clock)
    plan = World().plan(weights(), created_seconds=clock.time())
    for round_ in range(2):
        begun_seconds, served = clock.monotonic(), 100 * round_
        condition = due.Due(plan, policy, 0)
        clock.advance(1e6)
        condition.restart(served)
        clock.advance(before[1])
        assert not condition.is_met(served + before[0])
        clock.advance(max(0.0, after[1] - before[1]))
        assert condition.is_met(served + after[0])
        assert clock.monotonic() > begun_seconds


# --- the end -------------------------------------------------------------------------------------------------------------------


def test_stop_while_writing(world: World) -> None:
    """Stopped in the middle of a capture it begins no further chunk, and the previous generation stays."""
    world.made(world.plan(weights(5)))
    at_chunk, go = threading.Event(), threading.Event()

    def at_idle(seconds: float) -> None:
        if seconds == 0.0:
            at_chunk.set()
            assert go.wait(RUN_SECONDS)

    world.at_idle = at_idle
    begun = world.begin(world.plan({"a": np.zeros(9 << 18, np.float32), "b": np.arange(100)}))
    assert at_chunk.wait(RUN_SECONDS)
    before = world.store.count("put")
    begun.stop(0.0)
    go.set()
    assert begun.wait_first(RUN_SECONDS)
    assert "the worker ended" in begun.outcomes[0].reason
    assert world.store.count("put") - before <= 1
    assert len(world.state()["w"]) == 5


def test_stop_while_proving(world: World, proven: type[Proven]) -> None:
    """Stopped during the proof it ends the proof and publishes nothing, even if the proof was content."""
    proving = threading.Event()

    def run(proof: Proven) -> None:
        proving.set()
        assert proof.stopped.wait(RUN_SECONDS)

    proven.at_run = staticmethod(run)
    begun = world.begin(world.plan(weights()))
    assert proving.wait(RUN_SECONDS)
    begun.stop(RUN_SECONDS)
    assert begun.outcomes[0].reason == "the worker ended before the generation was published"
    assert world.look_up().ref is None


def test_stop_while_waiting(world: World) -> None:
    """Stopped while a policy's condition is awaited the thread ends."""
    begun = world.begin(world.plan(weights()), policy=Policy(after_events=100))
    assert begun.wait_first(RUN_SECONDS)
    begun.stop(RUN_SECONDS)
    assert not begun._thread.is_alive()
