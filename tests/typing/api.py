"""What type checkers see of the public face. Never run: ``mypy`` checks this file, and an unused ignore is an error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypedDict, assert_type

from coldstart import Context, Handler, Policy, Warmup, coldstart, export, prefetch, serve, subscribe
from coldstart.decorator import ClassHandler
from coldstart.exports import Export
from coldstart.testing import CheckReport, check


class Event(TypedDict):
    """An event."""

    id: str
    input: list[str]


class Model:
    """What ``init`` returns."""


def load(ctx: Context) -> dict[str, float]:
    """Make the state."""
    assert_type(ctx.device, str)
    assert_type(ctx.env("MODEL"), str | None)
    assert_type(ctx.secret("TOKEN"), str)
    assert_type(ctx.files["tokenizer.json"], str)
    ctx.pool("cache", (2, 8), "float32", kind="activations").fill(0)
    return {}


def init(ctx: Context, state: dict[str, float]) -> Model:
    """Make the model."""
    with ctx.phase("tokenizer"), ctx.meta():
        ctx.log("ready", buffers=len(state))
    return Model()


# --- handlers keep the types of their event and of what they return --------------------------------------------------


@coldstart("sync", load=load, init=init, warmup=Warmup([["a"]]), policy=Policy(after_events=10))
def sync_handler(event: Event, model: Model) -> dict[str, int]:
    """Answer at once."""
    return {"length": len(event["input"])}


@coldstart("generator", load=load, build={"": load}, warmup=[["a"]], env=["MODEL"], secrets=("TOKEN",))
def generator_handler(event: Event, model: dict[str, float]) -> Iterator[str]:
    """Answer piece by piece."""
    yield from event["input"]


@coldstart("async", load={"encoder": load, "adapter": load}, kinds={"cache": "kv_cache"}, version="1", concurrency=4)
async def async_handler(event: Event, model: dict[str, dict[str, float]]) -> int:
    """Answer on the loop."""
    return len(model)


@coldstart("async-generator", load=lambda: None, files={"vocab.txt": "assets/vocab.txt"}, close=lambda model: None)
async def async_generator_handler(event: Event, model: None) -> AsyncIterator[bytes]:
    """Answer piece by piece on the loop."""
    yield b""


@coldstart("program", load=load, program=export(), warmup=[["a"]])
def program_handler(event: Event, model: dict[str, float]) -> int:
    """Answer with a program."""
    return len(model)


@coldstart("entries", load=load, build=load, program=export(("encoder", "decoder"), backend="onnx"))
def entries_handler(event: Event, model: dict[str, float]) -> Iterator[int]:
    """Answer with two programs, piece by piece."""
    yield len(model)


@coldstart("class", program=export(entry="encoder", dynamic={"ids": {0: (1, 64)}}), warmup=[["a"]])
class ClassModel:
    """A model as a class."""

    def load(self, ctx: Context) -> None:
        """Make the state."""

    def handle(self, event: Event) -> int:
        """Answer."""
        return 1

    def size(self) -> int:
        """Tell more."""
        return 1


an_event = Event(id="1", input=["a"])

assert_type(sync_handler, Handler[Event, dict[str, int]])
assert_type(sync_handler(an_event), dict[str, int])
assert_type(sync_handler.run(an_event, Model()), Any)
assert_type(generator_handler(an_event), Iterator[str])
assert_type(async_generator_handler(an_event), AsyncIterator[bytes])
assert_type(program_handler(an_event), int)
assert_type(entries_handler(an_event), Iterator[int])
assert_type(export(tolerance={"float32": 1e-4}, example={"ids": [1]}), Export)
assert_type(sync_handler.__name__, str)

# mypy does not see what a class decorator returns, so a handler made of a class is typed where the decorator is called.
class_handler = coldstart("class")(ClassModel)
assert_type(class_handler, ClassHandler)
assert_type(class_handler(an_event), Any)
assert_type(class_handler.size, Callable[..., Any])


async def asynchronous() -> None:
    """Await and iterate as with the functions themselves."""
    answer = assert_type(async_handler(an_event), Coroutine[Any, Any, int])
    assert_type(await answer, int)
    async for piece in async_generator_handler(an_event):
        assert_type(piece, bytes)


assert_type(serve(sync_handler), None)
assert_type(coldstart.serve(class_handler), None)
assert_type(serve(ClassModel), None)
assert_type(prefetch("sync"), None)
assert_type(coldstart.prefetch("sync"), None)
assert_type(subscribe(print), Callable[[], None])
assert_type(coldstart.subscribe(print), Callable[[], None])
assert_type(check(sync_handler, inputs=[["a"]]), CheckReport)

# --- wrong use is an error -------------------------------------------------------------------------------------------


def one_parameter(event: Event) -> int:
    """No handler."""
    return 1


def plain(event: Event, model: Model) -> int:
    """No handler yet."""
    return 1


coldstart("x", load=load)(one_parameter)  # type: ignore[arg-type]
coldstart("x")(plain)  # type: ignore[arg-type]
coldstart(load=load)  # type: ignore[call-overload]
coldstart("x", load=3)  # type: ignore[call-overload]
coldstart("x", load=load, warm_up=[1])  # type: ignore[call-overload]
coldstart("x", load=load, warmup=3)  # type: ignore[call-overload]
coldstart("x", load=load, version=2)  # type: ignore[call-overload]
coldstart("x", load=load, env=[1])  # type: ignore[list-item]
coldstart("x", load=load, policy={"after_events": 1})  # type: ignore[call-overload]
coldstart("x", load=load, program=True)  # type: ignore[call-overload]
coldstart("x", load=load, program="encoder")  # type: ignore[call-overload]
export(3)  # type: ignore[arg-type]
export("", {})  # type: ignore[call-arg, call-arg]
export(backend=1)  # type: ignore[arg-type]
export(tolerance={"float32": "tight"})  # type: ignore[dict-item]
coldstart("x", load)  # type: ignore[call-overload]
sync_handler("text")  # type: ignore[arg-type]
sync_handler(an_event, Model())  # type: ignore[call-arg]
sync_handler.missing  # type: ignore[attr-defined]
serve(plain)  # type: ignore[arg-type]
check(plain, inputs=[1])  # type: ignore[arg-type]
check(sync_handler, [1])  # type: ignore[call-arg]
Warmup(["a"], 2)  # type: ignore[call-arg]
Policy(10)  # type: ignore[call-arg]
