"""The decorator: handlers stay real functions of their kind, nothing starts early, and answer with their state."""

from __future__ import annotations

import asyncio
import inspect
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart import Handler, Policy, Warmup, coldstart, manifest
from coldstart.definition import definition_of
from coldstart.errors import ColdstartError, HandlerError, PhaseError, StartError
from coldstart.registry import worker_for

KINDS = ("sync", "generator", "async", "async_generator")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Workers of these tests write no log lines."""
    monkeypatch.setenv("COLDSTART_LOG", "off")


def load():
    """A state that every handler here can use."""
    return {"factor": 2}


def decorated(function, name="one", **options):
    """The function as a handler."""
    return coldstart(name, **{"load": load, **options})(function)


def of_kind(kind):
    """A function of one kind that multiplies."""

    def sync(event, model):
        """Multiply."""
        return model["factor"] * event["input"]

    def generator(event, model):
        """Multiply."""
        yield model["factor"]
        yield model["factor"] * event["input"]

    async def asynchronous(event, model):
        """Multiply."""
        await asyncio.sleep(0)
        return model["factor"] * event["input"]

    async def async_generator(event, model):
        """Multiply."""
        yield model["factor"]
        yield model["factor"] * event["input"]

    return {"sync": sync, "generator": generator, "async": asynchronous, "async_generator": async_generator}[kind]


def answer(result):
    """What a call came to, whatever its kind: a value, or the list of the pieces."""

    async def collect():
        return [piece async for piece in result]

    if inspect.isasyncgen(result):
        return asyncio.run(collect())
    if inspect.iscoroutine(result):
        return asyncio.run(result)
    return list(result) if inspect.isgenerator(result) else result


def kind_of(function):
    """The kind of a function by the standard library's judgement."""
    tests = {
        "generator": inspect.isgeneratorfunction,
        "async": inspect.iscoroutinefunction,
        "async_generator": inspect.isasyncgenfunction,
    }
    return next((kind for kind, test in tests.items() if test(function)), "sync")


# --- what a handler is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_handlers_keep_their_kind(kind):
    """A decorated function is a real function of the same kind, and its definition says which."""
    handler = decorated(of_kind(kind))
    assert inspect.isfunction(handler)
    assert kind_of(handler) == kind_of(of_kind(kind)) == kind == handler.__coldstart__.kind


@pytest.mark.parametrize("kind", KINDS)
def test_handlers_keep_name_doc_and_module(kind):
    """What people and tools read of a function is the user's own."""
    function = of_kind(kind)
    handler = decorated(function)
    kept = ("__name__", "__qualname__", "__module__", "__doc__")
    assert [getattr(handler, name) for name in kept] == [getattr(function, name) for name in kept]
    assert handler.__doc__ == "Multiply."
    assert not hasattr(handler, "__wrapped__")


@pytest.mark.parametrize("kind", KINDS)
def test_handlers_take_the_event_alone(kind):
    """Platforms that look at the signature see one parameter, the event, in every kind."""
    assert str(inspect.signature(decorated(of_kind(kind)))) == "(event)"


def test_annotations_follow_the_event_and_the_answer():
    """The event's annotation is kept under the wrapper's own parameter name, the model's is gone."""

    def handler(job: dict, model: int) -> str: ...

    class Model:
        def load(self, ctx): ...

        def handle(self, job: dict) -> str: ...

    expected = {"event": "dict", "return": "str"}
    assert decorated(handler).__annotations__ == coldstart("two")(Model).__annotations__ == expected


def test_annotations_of_variable_arguments_are_left_out():
    """A handler that takes anything has no event to annotate."""

    def handler(*arguments: int) -> str: ...

    class Model:
        def load(self): ...

        def handle(*arguments: int) -> str: ...

    assert decorated(handler).__annotations__ == coldstart("two")(Model).__annotations__ == {"return": "str"}


def test_the_handler_type_can_be_written_in_annotations():
    """``Handler[Event, Answer]`` is a name for checkers that an annotation may evaluate, too."""
    assert Handler[dict, int] is Handler


@pytest.mark.parametrize("kind", KINDS)
def test_handlers_answer(kind):
    """An event is answered with the loaded state, by the first call and by later ones."""
    handler = decorated(of_kind(kind))
    expected = [2, 6] if kind.endswith("generator") else 6
    assert [answer(handler({"input": 3})) for _ in range(2)] == [expected, expected]


@pytest.mark.parametrize("kind", KINDS)
def test_run_is_the_function_alone(kind):
    """``.run`` calls the user's own function with any state: nothing is loaded, and no worker made."""

    def load():
        raise AssertionError

    handler = decorated(of_kind(kind), load=load)
    assert handler.run is handler.__coldstart__.function
    expected = [10, 30] if kind.endswith("generator") else 30
    assert answer(handler.run({"input": 3}, {"factor": 10})) == expected
    assert handler.__coldstart__.ready_worker is None


def test_decorating_starts_nothing():
    """Neither decorating nor making a generator or coroutine begins a start; the first step of the call does."""
    calls = []

    def load():
        calls.append(threading.current_thread())
        return {"factor": 2}

    handler = decorated(of_kind("generator"), load=load)
    pieces = handler({"input": 3})
    assert calls == []
    assert next(pieces) == 2
    assert len(calls) == 1
    assert list(pieces) == [6]


def test_one_start_serves_callers_of_several_threads():
    """Events that arrive together wait for one and the same start."""
    calls = []

    def load():
        calls.append(1)
        return {"factor": 2}

    handler = decorated(of_kind("sync"), load=load)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(handler({"input": 3}))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (answers, calls) == ([6] * 8, [1])


def test_init_gives_the_second_argument_and_close_gets_it():
    """``init(ctx, state)`` makes what the handler and ``close`` are given."""
    closed = []

    def handler(event, model):
        return model

    handler = decorated(handler, init=lambda ctx, state: (ctx.device, state), close=closed.append)
    assert handler({"input": 1}) == ("cpu", {"factor": 2})
    handler.__coldstart__.ready_worker.close()
    assert closed == [("cpu", {"factor": 2})]
    assert handler.__coldstart__.ready_worker is None


def test_parts_come_by_name():
    """Named loaders give a state that is a mapping of the same names."""
    handler = decorated(lambda event, model: model, load={"encoder": lambda: 1, "adapter": lambda ctx: ctx.kind})
    assert handler({"input": 0}) == {"encoder": 1, "adapter": "cold"}


def test_a_failing_load_reaches_every_caller():
    """A start that fails raises the same error, with the user's own as its cause, at every call."""

    def load():
        raise KeyError("weights")

    handler = decorated(of_kind("sync"), load=load)
    for _ in range(2):
        with pytest.raises(PhaseError, match=r"weight_load of 'one' failed: KeyError: 'weights'") as caught:
            handler({"input": 1})
        assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_the_handler_passes_as_it_is():
    """What the user's function raises reaches the caller unchanged, and the next event is served."""
    handler = decorated(lambda event, model: model[event["input"]])
    with pytest.raises(KeyError, match="absent"):
        handler({"input": "absent"})
    assert handler({"input": "factor"}) == 2


def test_one_name_stands_for_one_handler():
    """A second handler of the same name is refused when it would start, with both places."""
    first, second = decorated(of_kind("sync")), decorated(of_kind("generator"))
    assert first({"input": 1}) == 2
    with pytest.raises(HandlerError, match=r"two handlers are named 'one'.*test_decorator"):
        list(second({"input": 1}))


# --- classes ---------------------------------------------------------------------------------------------------------


class Model:
    """A model as a class."""

    scale = 10

    def load(self, ctx):
        self.factor = 2
        self.device = ctx.device

    def init(self):
        self.ready = True

    def handle(self, event):
        """Multiply."""
        return self.factor * event["input"]

    def described(self, *names):
        """Attributes by name."""
        return [getattr(self, name) for name in names]

    def counted(self, count):
        yield from range(count)
        return "end"

    async def waited(self):
        await asyncio.sleep(0)
        return self.factor

    async def streamed(self, count):
        for number in range(count):
            yield number * self.factor

    @classmethod
    def scaled(cls, number):
        return number * cls.scale

    @staticmethod
    def negative(number):
        return -number

    def _private(self): ...


def test_a_class_becomes_a_handler():
    """What ``load`` sets on ``self`` is the state; ``handle`` answers; name, doc and module are the class's."""
    handler = coldstart("model")(Model)
    assert (handler.__name__, handler.__doc__, handler.__module__) == ("Model", "A model as a class.", __name__)
    assert str(inspect.signature(handler)) == "(event)"
    assert handler({"input": 4}) == 8
    assert handler.described("device", "ready") == ["cpu", True]


def test_a_class_handler_runs_alone_on_any_object():
    """``.run(event, instance)`` is the unit test of a class: ``handle`` with whatever stands for ``self``."""

    class Stub:
        factor = 5

    assert coldstart("model")(Model).run({"input": 4}, Stub()) == 20


def test_public_methods_are_gated_and_keep_their_kind():
    """Each further public method starts the worker if need be and runs on its instance, as the kind it is."""
    names = ("described", "counted", "waited", "streamed", "scaled", "negative")
    handler = coldstart("model")(Model)
    kinds = [kind_of(getattr(handler, name)) for name in names]
    assert kinds == ["sync", "generator", "async", "async_generator", "sync", "sync"]
    assert [getattr(handler, name).__name__ for name in names] == list(names)
    assert handler.described.__doc__ == "Attributes by name."
    assert not hasattr(handler, "_private")
    assert not hasattr(handler, "load")


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("described", ["factor"], [2]),
        ("counted", [3], [0, 1, 2]),
        ("waited", [], 2),
        ("streamed", [3], [0, 2, 4]),
        ("scaled", [3], 30),
        ("negative", [3], -3),
    ],
)
def test_a_public_method_may_be_the_first_call(name, arguments, expected):
    """The worker is started by whichever method is asked first."""
    handler = coldstart("model")(Model)
    assert handler.__coldstart__.ready_worker is None
    assert answer(getattr(handler, name)(*arguments)) == expected
    assert handler.__coldstart__.ready_worker is not None


def test_a_gated_generator_returns_what_the_method_returns():
    """The value of a generator method's ``return`` is passed on."""

    def consume():
        outcome.append((yield from coldstart("model")(Model).counted(1)))

    outcome = []
    assert list(consume()) == [0]
    assert outcome == ["end"]


@pytest.mark.parametrize("kind", KINDS)
def test_class_handlers_keep_the_kind_of_handle(kind):
    """A class answers in the kind of its ``handle``."""

    def load(self, ctx):
        self.factor = 2

    plain = of_kind(kind)
    handles = {
        "sync": lambda self, event: plain(event, vars(self)),
        "generator": lambda self, event: (yield from plain(event, vars(self))),
    }

    async def async_handle(self, event):
        return await plain(event, vars(self))

    async def async_generator_handle(self, event):
        async for piece in plain(event, vars(self)):
            yield piece

    handles |= {"async": async_handle, "async_generator": async_generator_handle}
    handler = coldstart("model")(type("Kind", (), {"load": load, "handle": handles[kind]}))
    assert kind_of(handler) == kind
    assert answer(handler({"input": 3})) == ([2, 6] if kind.endswith("generator") else 6)


# --- values and warm-up -----------------------------------------------------------------------------------------------


def test_warmup_and_policy_are_values():
    """They compare, hash and print by what they hold, and cannot be changed."""
    one, same, other = Warmup([1], iterations=2), Warmup((1,), iterations=2), Warmup([1])
    assert one == same != other
    assert hash(one) == hash(same)
    assert repr(Policy(after_events=3)) == "Policy(after_events=3, interval_seconds=0.0, maximum_age_seconds=0.0)"
    assert Policy() != Warmup()
    with pytest.raises(AttributeError, match="Warmup cannot be changed"):
        one.iterations = 3


def test_a_list_of_inputs_is_a_warmup():
    """``warmup=[...]`` and ``warmup=Warmup([...])`` mean the same."""
    assert decorated(lambda event, model: None, warmup=[1, 2]).__coldstart__.warmup == Warmup((1, 2))


def test_warmup_inputs_go_through_the_handler_before_the_first_event():
    """Warm-up events are answered while the worker starts, each under an id of its own, as often as asked."""
    seen = []

    def handler(event, model):
        seen.append((event["id"], event["input"]))
        return len(seen)

    handler = decorated(handler, warmup=Warmup([7, 8], iterations=2))
    worker = worker_for(handler.__coldstart__).wait()
    assert seen == [("warmup-0", 7), ("warmup-1", 8)] * 2
    assert worker.stats.served == 0
    assert handler({"id": "x", "input": 9}) == 5


def test_errors_of_hooks_are_start_errors():
    """Whatever a hook raises is a ColdstartError for the caller, who can tell it from an answer."""

    def init(ctx, state):
        raise OSError("no disk")

    with pytest.raises(ColdstartError) as caught:
        decorated(lambda event, model: None, init=init)({"input": 1})
    assert isinstance(caught.value, StartError)
    assert caught.value.phase == "custom_init"


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True))
def test_names_of_plain_letters_are_taken(name):
    """Every name of letters, digits, dots, dashes and underscores, the first a letter or digit, names a snapshot too."""
    assert definition_of(decorated(lambda event, model: None, name)).name == name == manifest.check_name(name)
