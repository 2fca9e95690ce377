"""What the decorator refuses: every wrong argument is told where it is written, with the thing, the cause and the remedy."""

from __future__ import annotations

import functools

import pytest

from coldstart import Policy, Warmup, coldstart
from coldstart.definition import BUFFER_KINDS
from coldstart.errors import HandlerError
from coldstart.terms import SKIPPABLE_PHASES


def load():
    """A loader."""


def decorated(function, **options):
    """The function as a handler."""
    return coldstart("one", **{"load": load, **options})(function)


def two(event, model):
    """A handler, or a hook of two."""


WRONG_OPTIONS = {
    "no load": ({"load": None}, "@coldstart('one') needs load=", "the function that makes the state"),
    "load is no function": ({"load": "weights.pt"}, "load= must be a function load(ctx) or load()", "'weights.pt'"),
    "load takes two": ({"load": lambda ctx, path: None}, "load '<lambda>' takes 2", "load(ctx) or load()"),
    "no parts": ({"load": {}}, "load= is an empty mapping", "name at least one part"),
    "bad part name": ({"load": {"a b": load}}, "'a b' cannot name a handler", "use letters"),
    "long part name": ({"load": {"a" * 65: load}}, "cannot name a handler", "at most 64"),
    "part is no function": ({"load": {"a": 1}}, "load= must be a function", "not 1"),
    "parts differ": (
        {"load": {"a": load}, "build": {"b": load}},
        "build= has parts ['b'] and load= has ['a']",
        "give both the same names",
    ),
    "parts against none": ({"build": {"a": load}}, "build= has parts ['a'] and load= has ['']", "same names"),
    "build takes two": ({"build": two}, "build 'two' takes 2", "build(ctx) or build()"),
    "init takes one": ({"init": lambda ctx: None}, "init '<lambda>' takes 1", "must be init(ctx, state)"),
    "init takes three": ({"init": lambda ctx, state, more: None}, "init '<lambda>' takes 3", "init(ctx, state)"),
    "compile takes none": ({"compile": lambda: None}, "compile '<lambda>' takes 0", "compile(ctx, state)"),
    "close takes none": ({"close": lambda: None}, "close '<lambda>' takes 0", "close(model)"),
    "init needs a keyword": ({"init": lambda ctx, state, *, path: None}, "keyword-only parameter", "init(ctx, state)"),
    "init is no function": ({"init": 3}, "init= must be a function init(ctx, state)", "not 3"),
    "env and secrets overlap": (
        {"env": ["A", "TOKEN"], "secrets": ["TOKEN"]},
        "TOKEN in both env= and secrets=",
        "choose one",
    ),
    "env is a text": ({"env": "MODEL"}, "env= takes a list of variable names", "env=['MODEL_ID']"),
    "env is a number": ({"env": 1}, "env= takes a list of variable names", "not 1"),
    "env holds no names": ({"env": [1]}, "env= takes a list of variable names", "not [1]"),
    "secrets is a mapping": (
        {"secrets": {"A": "b"}},
        "secrets= takes a list of variable names",
        "secrets=['MODEL_ID']",
    ),
    "unknown kind": ({"kinds": {"cache": "hot"}}, "kinds={'cache': 'hot'}", ", ".join(BUFFER_KINDS)),
    "kinds is a list": ({"kinds": ["cache"]}, "kinds=['cache'] has to map path prefixes", "weights"),
    "version is empty": ({"version": ""}, "version=''", "must be a text that is not empty"),
    "version is a number": ({"version": 2}, "version=2", "must be a text"),
    "warmup is a text": ({"warmup": "hi"}, "warmup= takes a list of inputs", "Warmup(...)"),
    "warmup is one input": ({"warmup": {"texts": ["a"]}}, "warmup= takes a list of inputs", "not {'texts': ['a']}"),
    "warmup is a number": ({"warmup": 3}, "warmup= takes a list of inputs", "not 3"),
    "concurrency is zero": ({"concurrency": 0}, "concurrency=0", "whole number of at least 1"),
    "concurrency is a flag": ({"concurrency": True}, "concurrency=True", "whole number of at least 1"),
    "files is a list": ({"files": ["a.txt"]}, "files= takes a mapping of name -> path", "not ['a.txt']"),
    "policy is a mapping": ({"policy": {}}, "policy= takes a coldstart.Policy(...)", "not {}"),
}


@pytest.mark.parametrize(("options", "cause", "remedy"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_options_that_cannot_work_are_told(options, cause, remedy):
    """Each wrong argument is a HandlerError when the function is decorated, with the cause and the remedy."""
    with pytest.raises(HandlerError) as caught:
        decorated(two, **options)
    assert cause in str(caught.value)
    assert remedy in str(caught.value)


def without_second(event):
    """A handler of one."""


def with_third(event, model, more):
    """A handler of three."""


def with_keyword(event, model, *, more):
    """A handler that needs more."""


class Callable:
    """An object that can be called."""

    def __call__(self, event, model): ...

    def method(self, event, model): ...


WRONG_TARGETS = {
    "no second parameter": (without_second, "'without_second' has no second parameter", "(event, model)"),
    "a third parameter": (with_third, "'with_third' takes 3 argument(s)", "handler(event, model)"),
    "a needed keyword": (with_keyword, "'with_keyword' has a keyword-only parameter", "handler(event, model)"),
    "a callable object": (Callable(), "a function or a class, not Callable", "directly above the def"),
    "a method": (Callable().method, "a function or a class, not method", "directly above the def"),
    "a partial": (functools.partial(two, 1), "a function or a class, not partial", "directly above the def"),
    "a builtin": (print, "a function or a class, not builtin_function_or_method", "directly above the def"),
    "a static method": (staticmethod(two), "a function or a class, not staticmethod", "directly above the def"),
    "nothing": (None, "a function or a class, not NoneType", "directly above the def"),
    "a handler": (decorated(two), "'two' is decorated with @coldstart(...) already", "decorate it once"),
}


@pytest.mark.parametrize(("target", "cause", "remedy"), WRONG_TARGETS.values(), ids=WRONG_TARGETS)
def test_what_cannot_be_decorated_is_told(target, cause, remedy):
    """Only a function of event and model, or a class, becomes a handler; the rest is told what to do."""
    with pytest.raises(HandlerError) as caught:
        decorated(target)
    assert cause in str(caught.value)
    assert remedy in str(caught.value)


def made_class(**members):
    """A class named Wrong with ``load`` and ``handle``, unless they are given as None."""
    found = {"load": lambda self, ctx: None, "handle": lambda self, event: None, **members}
    return type("Wrong", (), {name: member for name, member in found.items() if member is not None})


WRONG_CLASSES = {
    "init": (made_class(__init__=lambda self: None), {}, "class Wrong has an __init__", "move it into load(self, ctx)"),
    "no load": (made_class(load=None), {}, "class Wrong needs the methods load(self, ctx)", "handle(self, event)"),
    "no handle": (made_class(handle=None), {}, "class Wrong needs the methods", "handle(self, event)"),
    "options": (
        made_class(),
        {"load": load, "init": two},
        "class Wrong was decorated with init=, load=",
        "write methods of these names",
    ),
    "static": (made_class(load=staticmethod(load)), {}, "Wrong.load is a staticmethod", "make it an ordinary method"),
    "class method": (
        made_class(load=classmethod(two)),
        {},
        "Wrong.load is a classmethod",
        "make it an ordinary method",
    ),
    "attribute": (made_class(handle=3), {}, "Wrong.handle is a int", "def handle(self, ...)"),
    "handle takes more": (
        made_class(handle=with_third),
        {},
        "Wrong.handle 'with_third' takes 3",
        "handle(self, event)",
    ),
    "load takes more": (made_class(load=with_third), {}, "Wrong.load 'with_third' takes 3", "load(self, ctx)"),
    "close takes more": (made_class(close=two), {}, "Wrong.close 'two' takes 2", "close(self)"),
    "run": (made_class(run=two), {}, "class Wrong has a public 'run'", "rename it"),
}


@pytest.mark.parametrize(("owner", "options", "cause", "remedy"), WRONG_CLASSES.values(), ids=WRONG_CLASSES)
def test_classes_that_cannot_work_are_told(owner, options, cause, remedy):
    """Each mistake in a class is a HandlerError when it is decorated, with the cause and the remedy."""
    with pytest.raises(HandlerError) as caught:
        coldstart("one", **options)(owner)
    assert cause in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "-a", "é", "a\n", "x" * 101, 3, ["a"]])
def test_names_that_cannot_be_stored_are_refused(name):
    """A name is a part of object keys and paths, so its letters are few; the error says which."""
    with pytest.raises(HandlerError, match=r"cannot name a handler: use letters, digits, '.', '_' and '-'"):
        coldstart(name, load=load)


def test_a_decorator_without_brackets_or_name_is_told():
    """``@coldstart`` bare, and ``@coldstart(load=...)``, fail where they are written and not at the first event."""
    for wrong in (lambda: coldstart(two), lambda: coldstart(load=load)):
        with pytest.raises(HandlerError, match=r"needs a name: write @coldstart\('my-model', load=...\)"):
            wrong()


def test_unknown_options_are_told_with_the_nearest():
    """A misspelt option names the one that was meant, any other the whole list."""
    with pytest.raises(HandlerError, match=r"no option 'warm_up': did you mean warmup=\?"):
        coldstart("one", load=load, warm_up=[1])
    with pytest.raises(
        HandlerError, match=r"no option 'gpu': there are load, build, init, compile, close, before_snapshot"
    ):
        coldstart("one", load=load, gpu="H200")


def test_a_loader_without_its_keyword_is_told():
    """``@coldstart("one", load)`` is a HandlerError that says how to write it."""
    with pytest.raises(HandlerError, match=r"one argument without a keyword, the name: write load="):
        coldstart("one", load)


def test_what_is_no_handler_is_told():
    """Whoever passes a plain function where a handler is wanted learns what is missing."""
    with pytest.raises(HandlerError, match=r"two.* is not a handler: decorate it with @coldstart"):
        coldstart.serve(two)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"iterations": 0}, "iterations=0) must be a whole number of at least 1"),
        ({"iterations": "2"}, "iterations='2') must be a whole number"),
        ({"iterations": 1.5}, "iterations=1.5) must be a whole number"),
        ({"skip": ["weight_load"]}, f"it may name {', '.join(SKIPPABLE_PHASES)}"),
        ({"skip": ["warmup"]}, "takes a list of phases"),
        ({"skip": "custom_init"}, "takes a list of phases"),
        ({"target_seconds": -1}, "takes seconds of 0 or more"),
        ({"maximum_seconds": "10"}, "takes seconds of 0 or more"),
        ({"inputs": {"texts": []}}, "takes a list of inputs"),
    ],
)
def test_warmups_that_cannot_be_meant_are_told(options, text):
    """Values of Warmup are checked where it is made."""
    with pytest.raises(HandlerError) as caught:
        Warmup(**options)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"after_events": -1}, {"after_events": 1.5}, {"interval_seconds": "60"}, {"maximum_age_seconds": -0.1}]
)
def test_policies_that_cannot_be_meant_are_told(options):
    """Values of Policy are checked where it is made."""
    with pytest.raises(HandlerError, match=r"a whole number of events, and seconds, of 0 or more"):
        Policy(**options)


def test_a_class_as_load_is_a_loader_and_no_mapping() -> None:
    """A class with an ``items`` method, such as dict, is called to make the state; it is not taken for named parts."""

    @coldstart("made", load=dict)
    def handler(event, model):
        return model

    assert list(handler.__coldstart__.load) == [""]
