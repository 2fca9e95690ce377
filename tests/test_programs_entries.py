"""Entry points: what a path leads to, what takes its place, and what a handler gets where only the program is there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from coldstart.errors import HandlerError
from coldstart.exports import export
from coldstart.program_start import eager_entries, in_place, is_below, owners, stands_alone
from coldstart.programs.entries import Entries, entry_point, put_in, standing_alone


class Decoder:
    """An object with methods, one of them its own call."""

    gain = 2

    def __call__(self, x: Any, *, deep: bool = False) -> Any:
        return ("called", x, deep)

    def step(self, token: Any, past: Any = None) -> Any:
        return ("step", token, past)

    def many(self, first: Any, *rest: Any) -> Any:
        return ("many", first, rest)

    @staticmethod
    def plain(x: Any) -> Any:
        return ("plain", x)


def state() -> Any:
    """A state with everything that a path can lead through."""
    return {"parts": [Decoder(), SimpleNamespace(inner=Decoder())], 'quo"ted': Decoder(), "call": lambda a, b: (a, b)}


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "parameters", "owner"),
    [
        ('["call"]', ("a", "b"), ""),
        ('["parts"][0]', ("x",), '["parts"]'),
        ('["parts"][-1].inner.step', ("token", "past"), '["parts"][-1].inner'),
        ('["parts"][0].plain', ("x",), '["parts"][0]'),
        ('["quo\\"ted"].step', ("token", "past"), '["quo\\"ted"]'),
    ],
)
def test_paths(path: str, parameters: tuple[str, ...], owner: str) -> None:
    """A path goes through attributes, keys and indices to a function, a method or an object with a call."""
    point = entry_point(state(), path, alone=False)
    assert (point.path, point.parameters, point.owner, point.is_module) == (path, parameters, owner, False)
    assert callable(point.function)


def test_any_number_of_arguments() -> None:
    """Parameters behind a * have names by their places."""
    names = entry_point(Decoder(), "many", alone=False).parameters
    assert names[:2] == ("first", "argument_1")
    assert len(names) == 16
    assert entry_point(max, "", alone=False).parameters[:2] == ("argument_0", "argument_1")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("absent", r"a dict has no 'absent'"),
        ('["absent"].x', r"a dict has no 'absent'"),
        ('["parts"][7]', r"a list has no 7"),
        ('["parts"].first', r"a list has no 'first'"),
        ('["parts"][0].absent', r"a Decoder has no 'absent'"),
        ('["parts"][0].gain', r"leads to a int, which cannot be called"),
        ('["parts"]', r"leads to a list, which cannot be called"),
        ("", r"leads to a dict, which cannot be called"),
        ("a..b", "is no path such as 'encoder'"),
        ("a b", "is no path such as 'encoder'"),
        (".a", "is no path such as 'encoder'"),
        ("[x]", "is no path such as 'encoder'"),
        ('["a', "is no path such as 'encoder'"),
        ("a()", "is no path such as 'encoder'"),
        ("a[0]b", "is no path such as 'encoder'"),
    ],
)
def test_paths_that_lead_nowhere(path: str, said: str) -> None:
    """What is not there, cannot be called or is no path is told with the path and the type of what has no such thing."""
    with pytest.raises(HandlerError, match=said) as caught:
        entry_point(state(), path, alone=False)
    assert f"export(entry={path!r})" in str(caught.value)


# --- in place ----------------------------------------------------------------------------------------------------------


def program(*arguments: Any, **options: Any) -> Any:
    """What takes the place of an entry point."""
    return ("program", arguments, options)


@pytest.mark.parametrize(
    "path", ['["parts"][0].step', '["parts"][1].inner', '["parts"][0]', '["quo\\"ted"]', '["call"]']
)
def test_something_else_in_its_place(path: str) -> None:
    """Whoever calls the entry point where it is gets what was put there, and the rest stays."""
    whole = state()
    before = entry_point(whole, path, alone=False).holder
    put_in(entry_point(whole, path, alone=False), program)
    found = entry_point(whole, path, alone=False)
    assert found.holder is before
    assert found.function(1, b=2) == ("program", (1,), {"b": 2})
    assert whole["parts"][1].inner is not None
    if path.endswith("step"):
        assert whole["parts"][0](3) == ("called", 3, False)


@pytest.mark.parametrize("where", ["tuple", "slots", "property"])
def test_no_place(where: str) -> None:
    """Where nothing can be put the error says so, with the path."""

    class Slotted:
        __slots__ = ()

        def step(self) -> None: ...

    class Fixed:
        @property
        def step(self) -> Any:
            return print

    holders: dict[str, Any] = {"tuple": (print,), "slots": Slotted(), "property": Fixed()}
    path = "[0]" if where == "tuple" else "step"
    with pytest.raises(HandlerError, match=r"the program cannot take its place"):
        put_in(entry_point(holders[where], path, alone=False), program)


@pytest.mark.demo
def test_module_in_place() -> None:
    """A torch module stays the module that it is, with its hooks; its forward becomes what was put there."""
    torch = pytest.importorskip("torch")
    whole = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    hooked = []
    whole[0].register_forward_hook(lambda *_: hooked.append(1))
    point = entry_point(whole, "[0]", alone=False)
    assert (point.is_module, point.owner, point.parameters) == (True, "[0]", ("input",))
    put_in(point, lambda x: x - 1)
    assert whole(torch.tensor([3.0, 0.5])).tolist() == [2.0, 0.0]
    assert hooked == [1]
    assert isinstance(whole[0], torch.nn.Linear)


@pytest.mark.demo
def test_module_alone_is_called_with_its_hooks() -> None:
    """Where the program stands for the whole state a module is exported as it is called; inside one, its forward alone."""
    torch = pytest.importorskip("torch")
    module = torch.nn.Identity()
    module.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 2,))
    assert entry_point(module, "", alone=True).function(torch.ones(1)).item() == 2.0
    assert entry_point(module, "", alone=False).function(torch.ones(1)).item() == 1.0


# --- alone -------------------------------------------------------------------------------------------------------------


def test_call_alone() -> None:
    """A state that is its call is the program's call."""
    assert standing_alone({"": program}) is program


def test_entry_points_alone() -> None:
    """Several entry points are found at their paths, and whatever else the state had is missed with the remedy."""
    found = standing_alone({"encoder": "e", 'parts[0]["k"]': "k", "parts[0].step": "s"})
    assert isinstance(found, Entries)
    assert (found.encoder, found.parts[0]["k"], found.parts[0].step) == ("e", "k", "s")
    with pytest.raises(
        AttributeError, match=r"'tokenizer': a start with a program has of the state only .*\(encoder, parts\)"
    ):
        _ = found.tokenizer
    with pytest.raises(KeyError, match=r"ctx\.keep"):
        _ = found.parts[1]
    assert not hasattr(found, "__array__")


def definition(entry: Any = "", *, build: bool = False, owner: type | None = None) -> Any:
    """What of a handler's definition decides how its program is given to it."""
    return SimpleNamespace(program=export(entry), build={"": None} if build else {}, owner=owner)


@pytest.mark.parametrize(
    ("entry", "build", "owner", "alone"),
    [
        ("", False, None, True),
        ("", True, None, True),
        ("encoder", False, None, True),
        ("encoder", True, None, False),
        ("encoder", False, Decoder, False),
    ],
)
def test_what_stands_alone(entry: str, build: bool, owner: type | None, alone: bool) -> None:
    """The program is all that there is where it is the state's own call, or nothing builds what is around it."""
    assert stands_alone(definition(entry, build=build, owner=owner)) is alone


@pytest.mark.demo
def test_eager_and_restored_are_used_alike() -> None:
    """A handler finds the same calls at the same places, whether the state's own code is behind them or a program."""
    pytest.importorskip("torch")
    whole = SimpleNamespace(double=lambda x: x * 2, words=["a"])
    given = definition("double")
    eager = eager_entries(given, whole, None)
    restored = in_place(given, None, {"double": lambda x: x * 2})
    for found in (eager, restored):
        assert found.double(np.ones(2)).tolist() == [2.0, 2.0]
        with pytest.raises(AttributeError, match="words"):
            _ = found.words
    built = in_place(
        definition("double", build=True), SimpleNamespace(double=None or print, words=["b"]), {"double": program}
    )
    assert (built.double(1), built.words) == (("program", (1,), {}), ["b"])


def test_class_without_build() -> None:
    """In class form a start with a program has an instance with its entry points on it and its methods."""
    instance = in_place(
        definition(("encoder", "parts[0].step"), owner=Decoder), None, {"encoder": 1, "parts[0].step": 2}
    )
    assert isinstance(instance, Decoder)
    assert (instance.encoder, instance.parts[0].step) == (1, 2)  # type: ignore[attr-defined]
    assert instance.plain(3) == ("plain", 3)


def test_class_with_two_entry_points_below_one_name() -> None:
    """Entry points below the same attribute of the class are all there."""
    calls = {"net.encode": 1, "net.decode": 2}
    instance = in_place(definition(tuple(calls), owner=Decoder), None, calls)
    assert (instance.net.encode, instance.net.decode) == (1, 2)


# --- what a program makes superfluous --------------------------------------------------------------------------------


def test_owners() -> None:
    """What an entry point computes with is the object that it is a method of."""
    whole = SimpleNamespace(unet=Decoder(), vae=Decoder())
    assert owners(definition(("unet.step", "vae.step"), build=True), whole) == ("unet", "vae")


def test_owners_in_class_form() -> None:
    """In class form the state is the mapping of what is on self, and paths of its arrays begin with a key."""
    instance: Any = Decoder()
    instance.net, instance.parts = Decoder(), [Decoder()]
    given = definition(("net.step", "parts[0].step", "step"), owner=Decoder)
    assert owners(given, instance) == ('["net"]', '["parts"][0]', "")


@pytest.mark.parametrize(
    ("path", "owner", "below"),
    [
        ("unet.weight", "unet", True),
        ("unet[0]", "unet", True),
        ("unet", "unet", True),
        ("unet2.weight", "unet", False),
        ("vae.unet.weight", "unet", False),
        ("anything", "", True),
    ],
)
def test_below(path: str, owner: str, below: bool) -> None:
    """An array belongs to an object if its path leads through it, not if it only begins alike."""
    assert is_below(path, owner) is below
