"""How a worker ends: failed starts, and closing at every moment; and what it counted until then."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from coldstart import coldstart, events
from coldstart.errors import PhaseError, StartError, UndeclaredNameError
from coldstart.registry import forget_workers, worker_for
from tests.starts import Seen, in_threads, one, started

if TYPE_CHECKING:
    from collections.abc import Iterator


_numbers = count()
LONG_SECONDS = 60.0


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A handler's name that no test before has used; the workers of the test are closed at its end."""
    monkeypatch.setenv("COLDSTART_LOG", "off")
    yield f"ends-{next(_numbers)}"
    forget_workers()


@pytest.fixture
def seen(name: str) -> Iterator[Seen]:
    """The events of the test's handler."""
    found = Seen(name)
    yield found
    found.stop()


# --- failures --------------------------------------------------------------------------------------------------------


class Broken(Exception):
    """The user's own error."""


def _break(*_: Any) -> Any:
    raise Broken("by the user")


@pytest.mark.parametrize(
    ("hook", "phase"),
    [
        ("load", "weight_load"),
        ("compile", "kernel_compile"),
        ("init", "custom_init"),
        ("handler", "warmup_inference"),
    ],
)
def test_failing_hook(name: str, hook: str, phase: str, seen: Seen) -> None:
    """A hook that raises fails the start under its phase's name, with the user's own error as the cause."""
    hooks: dict[str, Any] = {"load": one, hook: _break}
    function = hooks.pop("handler", lambda event, model: model)
    handler = coldstart(name, **hooks, warmup=["x"])(function)
    with pytest.raises(PhaseError, match=f"phase {phase} of '{name}' failed: Broken: by the user") as caught:
        handler({"input": 1})
    assert caught.value.phase == phase
    assert caught.value.snapshot == name
    assert isinstance(caught.value.__cause__, Broken)
    assert seen.of(events.StateChanged)[-1][1:] == ("starting", "failed")
    assert seen.of(events.WorkerFailed)[0].error.startswith("PhaseError: ")
    assert seen.of(events.WorkerReady) == []
    assert [event.phase for event in seen.of(events.PhaseEnded)][-1] == phase
    assert worker_for(handler.__coldstart__).metrics.failures == 1


def test_all_callers_get_the_error(name: str) -> None:
    """Everybody who waited for a failed start gets its error, and so do later callers, without another attempt."""
    loads = []

    def load() -> Any:
        loads.append(1)
        raise Broken("once")

    @coldstart(name, load=load)
    async def handler(event: Any, model: Any) -> Any:
        return model

    got = in_threads(12, lambda: asyncio.run(handler({"input": 1})))
    got += in_threads(3, worker_for(handler.__coldstart__).wait)
    assert len(loads) == 1
    assert {type(error) for error in got} == {PhaseError}
    assert len(set(map(id, got))) == 1


def test_traceback_of_a_failed_start(name: str) -> None:
    """A failed worker that is asked again and again raises the same short traceback, which leads to the user's line."""

    @coldstart(name, load=_break)
    def handler(event: Any, model: Any) -> Any:
        return model

    def depth() -> int:
        with pytest.raises(PhaseError) as caught:
            handler({"input": 1})
        return len(traceback.extract_tb(caught.value.__traceback__))

    depths = [depth() for _ in range(5)]
    assert len(set(depths)) == 1
    with pytest.raises(PhaseError) as caught:
        handler({"input": 1})
    assert traceback.extract_tb(caught.value.__cause__.__traceback__)[-1].name == "_break"


def test_error_of_ours_in_a_hook(name: str) -> None:
    """An error of the library inside a hook keeps its class, and learns in which phase it was raised."""

    @coldstart(name, load=lambda ctx: ctx.env("NOT_DECLARED"))
    def handler(event: Any, model: Any) -> Any:
        return model

    with pytest.raises(UndeclaredNameError, match="NOT_DECLARED") as caught:
        handler({"input": 1})
    assert caught.value.phase == "weight_load"


def test_exit_in_a_hook(name: str) -> None:
    """A hook that ends its thread by SystemExit does not leave the callers waiting."""

    @coldstart(name, load=lambda: sys.exit("enough"))
    def handler(event: Any, model: Any) -> Any:
        return model

    with pytest.raises(StartError, match="SystemExit: enough"):
        handler({"input": 1})


def test_failing_subscriber(name: str, seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    """A subscriber that raises on every event changes nothing about a start or an answer."""
    stop = events.bus.subscribe(lambda event: _break())
    try:

        @coldstart(name, load=one, warmup=[1])
        def handler(event: Any, model: Any) -> Any:
            return model

        assert handler({"input": 1}) == 1
        assert seen.of(events.WorkerReady)
    finally:
        stop()
    assert "Broken" in capsys.readouterr().err


# --- counts ------------------------------------------------------------------------------------------------------------


def test_counts(name: str) -> None:
    """Served, failed and running events are counted, durations are kept, and the start counts as the cold one."""
    asked, go = threading.Event(), threading.Event()

    @coldstart(name, load=one, warmup=["warm"])
    def handler(event: Any, model: Any) -> Any:
        if event["input"] == "bad":
            raise Broken
        if event["input"] == "slow":
            asked.set()
            go.wait(LONG_SECONDS)
        return model

    made = started(handler)
    with pytest.raises(Broken):
        handler({"input": "bad"})
    thread = threading.Thread(target=handler, args=({"input": "slow"},))
    thread.start()
    assert asked.wait(LONG_SECONDS)
    assert made.stats == (1, 1, 1)
    go.set()
    thread.join()
    assert made.stats == (2, 1, 0)
    counted = made.metrics.to_dict()
    assert counted["warm"]["count"] == 2
    assert counted["cold"]["count"] == 1
    assert counted["failures"] == 0
    assert counted["saves"]["count"] == counted["restores"]["count"] == 0


def test_counts_of_streams(name: str) -> None:
    """A stream that is left early counts as served, one that raises as failed too."""

    @coldstart(name, load=one)
    def handler(event: Any, model: Any) -> Any:
        yield 1
        if event["input"] == "bad":
            raise Broken
        yield 2

    stream = handler({"input": "good"})
    assert next(stream) == 1
    assert started(handler).stats == (0, 0, 1)
    stream.close()
    assert started(handler).stats == (1, 0, 0)
    with pytest.raises(Broken):
        list(handler({"input": "bad"}))
    assert started(handler).stats == (2, 1, 0)


def test_counts_of_async_streams(name: str) -> None:
    """An async stream counts like any other, however it ends; one that is left ends the user's own at once."""
    ended = []

    @coldstart(name, load=one)
    async def handler(event: Any, model: Any) -> Any:
        try:
            yield 1
            if event["input"] == "bad":
                raise Broken
            yield 2
        finally:
            ended.append(event["input"])

    async def main() -> None:
        assert [piece async for piece in handler({"input": "good"})] == [1, 2]
        left = handler({"input": "left"})
        assert await anext(left) == 1
        await left.aclose()
        assert ended == ["good", "left"]
        with pytest.raises(Broken):
            [piece async for piece in handler({"input": "bad"})]

    asyncio.run(main())
    assert started(handler).stats == (3, 1, 0)


# --- the end -----------------------------------------------------------------------------------------------------------


def test_close_runs_once(name: str, seen: Seen) -> None:
    """However often and from however many threads a worker is closed, the user's close runs once, with the model."""
    closed = []

    @coldstart(name, load=lambda: "state", init=lambda ctx, state: "model", close=closed.append)
    def handler(event: Any, model: Any) -> Any:
        return model

    made = started(handler)
    in_threads(8, made.close)
    made.close()
    assert closed == ["model"]
    assert made.state == "closed"
    assert [event.new for event in seen.of(events.StateChanged)] == ["starting", "ready", "closing", "closed"]


def test_closed_worker_takes_no_events(name: str) -> None:
    """A call after the end is an error, not an answer from a closed model."""

    @coldstart(name, load=one)
    def handler(event: Any, model: Any) -> Any:
        return model

    started(handler).close()
    with pytest.raises(StartError, match="is closed"):
        handler({"input": 1})


def test_close_before_the_start(name: str) -> None:
    """A worker that is closed before anybody asked never starts, and says so to whoever asks then."""

    @coldstart(name, load=_break, close=_break)
    def handler(event: Any, model: Any) -> Any:
        return model

    made = worker_for(handler.__coldstart__)
    made.close()
    with pytest.raises(StartError, match="is closed"):
        handler({"input": 1})
    assert made.state == "closed"


def test_close_during_the_start(name: str, seen: Seen) -> None:
    """Closing a worker that is starting releases its waiters at once; what the start makes is closed when it is made."""
    loading, go, closed = threading.Event(), threading.Event(), []

    def load() -> str:
        loading.set()
        assert go.wait(LONG_SECONDS)
        return "state"

    @coldstart(name, load=load, close=closed.append)
    def handler(event: Any, model: Any) -> Any:
        return model

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(handler, {"input": 1})
        assert loading.wait(LONG_SECONDS)
        made = worker_for(handler.__coldstart__)
        made.close()
        with pytest.raises(StartError, match="is closed"):
            waiting.result(LONG_SECONDS)
    assert closed == []
    go.set()
    assert seen.wait_for(events.StateChanged, 3).new == "closed"
    assert closed == ["state"]
    with pytest.raises(StartError, match="is closed"):
        handler({"input": 1})


def test_close_during_a_start_that_fails(name: str, seen: Seen) -> None:
    """A start that fails after its worker was closed ends as closed, and has nothing for the user's close."""
    loading, go = threading.Event(), threading.Event()

    def load() -> str:
        loading.set()
        assert go.wait(LONG_SECONDS)
        raise Broken

    @coldstart(name, load=load, close=_break)
    def handler(event: Any, model: Any) -> Any:
        return model

    made = worker_for(handler.__coldstart__)
    made.begin()
    assert loading.wait(LONG_SECONDS)
    made.close()
    go.set()
    assert seen.wait_for(events.StateChanged, 3)[1:] == ("closing", "closed")


def test_close_after_a_failed_start(name: str) -> None:
    """A worker whose start failed can be closed; its error stays, and there is nothing for the user's close."""

    @coldstart(name, load=_break, close=_break)
    def handler(event: Any, model: Any) -> Any:
        return model

    with pytest.raises(PhaseError):
        handler({"input": 1})
    worker_for(handler.__coldstart__).close()
    with pytest.raises(PhaseError):
        handler({"input": 1})


def test_failing_close(name: str) -> None:
    """An error of the user's close reaches whoever closes, and the worker is closed all the same."""

    @coldstart(name, load=one, close=_break)
    def handler(event: Any, model: Any) -> Any:
        return model

    made = started(handler)
    with pytest.raises(Broken):
        made.close()
    assert made.state == "closed"


# --- the class form ----------------------------------------------------------------------------------------------------


def test_class_form(name: str) -> None:
    """A class is loaded, initialised, warmed up and closed on one instance, which answers the events."""

    @coldstart(name, warmup=[0])
    class Model:
        def load(self, ctx: Any) -> None:
            self.did = ["load"]

        def init(self, ctx: Any) -> None:
            self.did.append("init")

        def handle(self, event: Any) -> Any:
            self.did.append(f"handle {event['input']}")
            return self

        def close(self) -> None:
            self.did.append("close")

        def further(self, text: str) -> str:
            return f"{text} {self.did[0]}"

    assert Model.further("did") == "did load"
    instance = Model({"input": 1})
    worker_for(Model.__coldstart__).close()
    assert instance.did == ["load", "init", "handle 0", "handle 1", "close"]
