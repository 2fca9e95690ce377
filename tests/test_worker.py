"""The state machine of a worker: the order of a start, one start for all who ask, warm-up and async hooks."""

from __future__ import annotations

import asyncio
import os
import threading
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from coldstart import Warmup, coldstart, events, loops, registry
from coldstart.adapters.local import answer_one, on_one_loop
from coldstart.errors import HandlerError, StartError
from coldstart.registry import forget_workers, worker_for
from coldstart.terms import PHASES
from tests.starts import Seen, in_threads, one, started

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


_numbers = count()
LONG_SECONDS = 60.0


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A handler's name that no test before has used; the workers of the test are closed at its end."""
    monkeypatch.setenv("COLDSTART_LOG", "off")
    yield f"worker-{next(_numbers)}"
    forget_workers()


@pytest.fixture
def seen(name: str) -> Iterator[Seen]:
    """The events of the test's handler."""
    found = Seen(name)
    yield found
    found.stop()


# --- order -----------------------------------------------------------------------------------------------------------


def test_order_of_a_start(name: str, seen: Seen) -> None:
    """A start goes through its states and the five phases in the order that the timeline of the design shows."""
    did = []

    @coldstart(
        name,
        load=lambda: did.append("load") or {"a": 1},
        compile=lambda ctx, state: did.append("compile"),
        init=lambda ctx, state: did.append("init") or [state],
        close=lambda model: did.append("close"),
        warmup=["warm"],
    )
    def handler(event: Any, model: Any) -> Any:
        did.append(event["input"])
        return model

    assert handler({"input": "event"}) == [{"a": 1}]
    worker_for(handler.__coldstart__).close()
    assert did == ["load", "compile", "init", "warm", "event", "close"]
    story = [
        f"{event.old} -> {event.new}"
        if isinstance(event, events.StateChanged)
        else f"{type(event).__name__} {getattr(event, 'phase', '')}".strip()
        for event in seen.all()
    ]
    ran = [f"{kind} {phase}" for phase in PHASES if phase != "pool_alloc" for kind in ("PhaseBegan", "PhaseEnded")]
    assert story == [
        "new -> starting",
        "StartBegan",
        *ran[:2],
        "PhaseEnded pool_alloc",
        *ran[2:],
        "CaptureSkipped",
        "WorkerReady",
        "starting -> ready",
        "ready -> closing",
        "closing -> closed",
    ]


def test_record_of_a_start(name: str) -> None:
    """The record has the phases in order, each after the one before, and says when the worker was ready."""

    @coldstart(name, load=one, init=lambda ctx, state: state)
    def handler(event: Any, model: Any) -> Any:
        return model

    record = started(handler).record
    assert [phase["name"] for phase in record["phases"]] == list(PHASES)
    edges = [edge for phase in record["phases"] for edge in (phase["began_seconds"], phase["ended_seconds"])]
    assert edges == sorted(edges)
    assert edges[-1] <= record["ready_seconds"]
    assert record["pid"] == os.getpid()
    assert (record["name"], record["kind"], record["reason"]) == (name, "cold", "no store")


@pytest.mark.parametrize("kind", ["compile", "init", "warmup"])
def test_nothing_to_do(name: str, kind: str, seen: Seen) -> None:
    """A phase for which the handler gives nothing to do is skipped, and its event says why."""

    @coldstart(name, load=one)
    def handler(event: Any, model: Any) -> Any:
        return model

    started(handler)
    reasons = {event.phase: event.skipped for event in seen.of(events.PhaseEnded)}
    phase = {"compile": "kernel_compile", "init": "custom_init", "warmup": "warmup_inference"}[kind]
    assert reasons[phase].startswith(f"no {kind}=")
    assert reasons["weight_load"] == ""


@pytest.mark.parametrize("by", ["decorator", "setting"])
def test_skipped_phases(name: str, by: str, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases can be switched off by the decorator and by a setting; without init the handler gets the state."""
    did = []
    skip = ["kernel_compile", "custom_init", "warmup_inference"]
    if by == "setting":
        monkeypatch.setenv("COLDSTART_SKIP_PHASES", ",".join(skip))

    @coldstart(
        name,
        load=lambda: "state",
        compile=lambda ctx, state: did.append("compile"),
        init=lambda ctx, state: did.append("init"),
        warmup=Warmup([1], skip=skip if by == "decorator" else []),
    )
    def handler(event: Any, model: Any) -> Any:
        return model

    assert handler({"input": 1}) == "state"
    assert did == []
    skipped = {event.phase: event.skipped for event in seen.of(events.PhaseEnded)}
    assert {phase: skipped[phase] for phase in skip} == dict.fromkeys(skip, "switched off")
    assert [event.phase for event in seen.of(events.PhaseBegan)] == ["weight_load"]


def test_slow_phase(name: str, seen: Seen) -> None:
    """A phase that takes longer than its target is reported, one that does not is not."""

    @coldstart(name, load=one, warmup=Warmup([1], target_seconds=0.0))
    def slow(event: Any, model: Any) -> Any:
        return model

    started(slow)
    reported = seen.of(events.PhaseSlow)
    assert [event.phase for event in reported] == ["weight_load", "warmup_inference"]
    assert all(event.seconds > event.target_seconds == 0.0 for event in reported)


def test_compile_replaces_the_state_if_it_returns_one(name: str) -> None:
    """What compile returns goes to init in the state's place; None leaves the state, which it changed itself."""

    @coldstart(name, load=lambda: [0], compile=lambda ctx, state: state.append(1), init=lambda ctx, state: state)
    def in_place(event: Any, model: Any) -> Any:
        return model

    @coldstart(f"{name}-b", load=lambda: [0], compile=lambda ctx, state: (*state, 2), init=lambda ctx, state: state)
    def returned(event: Any, model: Any) -> Any:
        return model

    assert in_place({"input": 0}) == [0, 1]
    assert returned({"input": 0}) == (0, 2)


# --- one start for all -------------------------------------------------------------------------------------------------


def test_one_start_for_many_threads(name: str) -> None:
    """However many threads ask at once, load runs once and all get an answer from its state."""
    loads = []

    @coldstart(name, load=lambda: loads.append(1) or object())
    def handler(event: Any, model: Any) -> Any:
        return model

    answers = in_threads(24, lambda: handler({"input": 1}))
    assert len(loads) == 1
    assert set(map(id, answers)) == {id(started(handler).model)}


def test_async_waiters(name: str) -> None:
    """Coroutines that wait for the start leave their loop free, and all are woken when it is ready."""
    go, loads = threading.Event(), []

    def load() -> str:
        assert go.wait(LONG_SECONDS)
        loads.append(1)
        return "state"

    @coldstart(name, load=load)
    async def handler(event: Any, model: Any) -> Any:
        await asyncio.sleep(0)
        return model, event["input"]

    async def main() -> list[Any]:
        waiting = [asyncio.ensure_future(handler({"input": number})) for number in range(20)]
        await asyncio.sleep(0)
        go.set()  # runs only because the waiters do not hold the loop
        return await asyncio.gather(*waiting)

    assert asyncio.run(main()) == [("state", number) for number in range(20)]
    assert len(loads) == 1


def test_waiters_of_several_loops_and_threads(name: str) -> None:
    """Loops in several threads, and plain threads beside them, wait for the same start."""
    go = threading.Event()

    @coldstart(name, load=lambda: go.wait(LONG_SECONDS))
    async def handler(event: Any, model: Any) -> Any:
        return model

    async def ask() -> Any:
        asyncio.get_running_loop().call_soon(go.set)
        return await handler({"input": 1})

    assert in_threads(4, lambda: asyncio.run(ask())) == [True] * 4


def test_waiter_whose_loop_is_gone(name: str) -> None:
    """A coroutine that gave up and closed its loop while the worker started does not keep others from being woken."""
    go = threading.Event()

    @coldstart(name, load=lambda: go.wait(LONG_SECONDS))
    async def handler(event: Any, model: Any) -> Any:
        return model

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handler({"input": 1}), 0.001)

    asyncio.run(give_up())

    async def ask() -> Any:
        waiting = asyncio.ensure_future(handler({"input": 1}))
        await asyncio.sleep(0)
        go.set()
        return await asyncio.wait_for(waiting, LONG_SECONDS)

    assert asyncio.run(ask()) is True


def test_module_imported_twice(name: str, tmp_path: Path) -> None:
    """A handler's file imported under a second name finds the start that the first one began."""
    path = tmp_path / "twice.py"
    path.write_text(
        "import builtins\n"
        "from coldstart import coldstart\n"
        "def load():\n"
        "    builtins.loads_of_twice = getattr(builtins, 'loads_of_twice', 0) + 1\n"
        "    return builtins.loads_of_twice\n"
        f"@coldstart({name!r}, load=load)\n"
        "def handler(event, model):\n"
        "    return model\n"
    )
    modules = [_import(path, module) for module in ("twice_a", "twice_b")]
    assert [module.handler({"input": 1}) for module in modules] == [1, 1]
    assert worker_for(modules[0].handler.__coldstart__) is worker_for(modules[1].handler.__coldstart__)


def _import(path: Path, name: str) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_handlers_of_one_name(name: str) -> None:
    """Two different handlers cannot share a name: the second is refused, and both places are told."""

    @coldstart(name, load=one)
    def first(event: Any, model: Any) -> Any:
        return model

    @coldstart(name, load=one)
    def second(event: Any, model: Any) -> Any:
        return model

    first({"input": 1})
    with pytest.raises(HandlerError, match="two handlers are named") as caught:
        second({"input": 1})
    assert str(first.__coldstart__.code.co_firstlineno) in str(caught.value)
    assert str(second.__coldstart__.code.co_firstlineno) in str(caught.value)


# --- the warm-up -----------------------------------------------------------------------------------------------------


def test_warm_up_is_past_the_gate(name: str, seen: Seen) -> None:
    """Warm-up events reach the user's function before the worker is ready, as events, and are not counted."""
    states, warm = [], []

    @coldstart(name, load=one, warmup=Warmup(["a", "b"], iterations=2))
    def handler(event: Any, model: Any) -> Any:
        warm.append((event["id"], event["input"]))
        states.append(worker_for(handler.__coldstart__).state)
        return model

    made = started(handler)
    assert warm == [("warmup-0", "a"), ("warmup-1", "b")] * 2
    assert set(states) == {"starting"}
    assert made.stats == (0, 0, 0)
    assert made.metrics.warm.count == 0
    assert made.warmup.iterations == 2
    assert seen.wait_for(events.WorkerReady).kind == "cold"


@pytest.mark.parametrize("kind", ["sync", "generator", "async", "async_generator"])
def test_warm_up_of_every_kind(name: str, kind: str) -> None:
    """Handlers of every kind are warmed up to the end of their answers, and their digests are kept."""
    ended = []

    def sync(event: Any, model: Any) -> Any:
        ended.append(event["id"])
        return [1, 2]

    def generator(event: Any, model: Any) -> Any:
        yield 1
        yield 2
        ended.append(event["id"])

    async def asynchronous(event: Any, model: Any) -> Any:
        await asyncio.sleep(0)
        ended.append(event["id"])
        return [1, 2]

    async def async_generator(event: Any, model: Any) -> Any:
        yield 1
        await asyncio.sleep(0)
        yield 2
        ended.append(event["id"])

    function = {"sync": sync, "generator": generator, "async": asynchronous, "async_generator": async_generator}[kind]
    handler = coldstart(name, load=one, warmup=["x"])(function)
    made = worker_for(handler.__coldstart__)
    assert on_one_loop(made, lambda: answer_one(handler, {"id": "event", "input": 1})) == [1, 2]
    assert ended == ["warmup-0", "event"]
    assert len(made.warmup.digests[0][0]) == 32


def test_handler_called_from_its_own_start(name: str) -> None:
    """A hook that calls the handler it belongs to would wait for itself: the start fails and says what to call."""

    @coldstart(name, load=one, init=lambda ctx, state: handler({"input": 1}))
    def handler(event: Any, model: Any) -> Any:
        return model

    with pytest.raises(StartError, match=r"handler\.run") as caught:
        handler({"input": 1})
    assert caught.value.phase == "custom_init"


# --- async hooks -------------------------------------------------------------------------------------------------------


def test_async_hooks_of_a_sync_handler(name: str) -> None:
    """The async hooks of a sync handler run on one private loop in a thread of its own, which ends with the worker."""
    places: list[Any] = []

    async def load(ctx: Any) -> str:
        places.append((asyncio.get_running_loop(), threading.current_thread()))
        await asyncio.sleep(0)
        return "state"

    async def init(ctx: Any, state: str) -> str:
        places.append((asyncio.get_running_loop(), threading.current_thread()))
        return state + "!"

    async def close(model: str) -> None:
        places.append((asyncio.get_running_loop(), threading.current_thread()))

    @coldstart(name, load=load, init=init, close=close)
    def handler(event: Any, model: Any) -> Any:
        return model

    assert handler({"input": 1}) == "state!"
    worker_for(handler.__coldstart__).close()
    ((loop, thread),) = set(places)
    assert len(places) == 3
    assert thread.name == "coldstart-loop"
    thread.join(LONG_SECONDS)
    assert not thread.is_alive()
    assert not loop.is_running()
    assert loop.is_closed()


def test_async_hooks_of_an_async_handler(name: str) -> None:
    """The async hooks of an async handler run on the loop that serves, so clients made there belong to it."""
    found: list[Any] = []

    async def load(ctx: Any) -> str:
        found.append(asyncio.get_running_loop())
        return "state"

    async def init(ctx: Any, state: str) -> str:
        found.append(asyncio.get_running_loop())
        return state

    async def close(model: str) -> None:
        found.append(asyncio.get_running_loop())

    @coldstart(name, load=load, init=init, close=close, warmup=[1])
    async def handler(event: Any, model: Any) -> Any:
        found.append(asyncio.get_running_loop())
        return model

    async def main() -> asyncio.AbstractEventLoop:
        assert await handler({"input": 1}) == "state"
        await asyncio.get_running_loop().run_in_executor(None, worker_for(handler.__coldstart__).close)
        return asyncio.get_running_loop()

    serving = asyncio.run(main())
    assert len(found) == 5
    assert set(found) == {serving}


def test_async_hooks_without_a_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no loop ever serves an async handler, its async hooks fail the start instead of waiting for ever."""
    monkeypatch.setattr(loops, "LOOP_SECONDS", 0.01)

    class Awaitable:
        def __await__(self) -> Any:
            raise AssertionError("nothing awaits this")

    @coldstart(name, load=lambda: Awaitable())
    async def handler(event: Any, model: Any) -> Any:
        return model

    with pytest.raises(StartError, match="no event loop"):
        worker_for(handler.__coldstart__).wait()


# --- stores that are not touched ---------------------------------------------------------------------------------------


def test_plain_call_touches_no_store(name: str, tmp_path: Path) -> None:
    """A call in a process that does not serve, with no store named, leaves the user's own snapshots alone."""

    @coldstart(name, load=lambda: {"a": 1})
    def handler(event: Any, model: Any) -> Any:
        return model

    handler({"input": 1})
    made = started(handler)
    made.close()
    assert made.record["reason"] == "no store"
    assert made.record["key"] == ""
    assert made.capture_reason == "no store"
    assert not (tmp_path / "cache").exists()


def test_store_is_off(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COLDSTART_STORE=off keeps a process that serves from any store."""
    monkeypatch.setenv("COLDSTART_STORE", "off")
    registry.enter_serving()

    @coldstart(name, load=lambda: {"a": 1})
    def handler(event: Any, model: Any) -> Any:
        return model

    handler({"input": 1})
    made = started(handler)
    made.close()
    assert made.record["reason"] == "no store"
    assert not (tmp_path / "cache").exists()
