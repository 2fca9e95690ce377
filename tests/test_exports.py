"""What ``export(...)`` takes: every value that cannot be meant is an error that says what can."""

from __future__ import annotations

from typing import Any

import pytest

from coldstart import coldstart, export
from coldstart.errors import HandlerError
from coldstart.exports import Export


def one() -> int:
    """The smallest load."""
    return 1


def handler(event: Any, model: Any) -> Any:
    """The smallest handler."""
    return model


def test_nothing_given() -> None:
    """By default the state itself is called, as the warm-up calls it, with the device's own backend."""
    made = export()
    assert (made.entry, made.dynamic, made.example, made.backend, made.tolerance) == (("",), {}, {}, "", {})


def test_one_entry_point() -> None:
    """For a single entry point ranges and examples may be given alone, or by its name."""
    ranges, call = {"ids": {0: (1, 64), 1: [2, 16]}}, {"ids": [1]}
    for made in (
        export("encoder", dynamic=ranges, example=call),
        export(["encoder"], dynamic={"encoder": ranges}, example={"encoder": [call]}),
    ):
        assert (made.entry, made.dynamic, made.example) == (("encoder",), {"encoder": ranges}, {"encoder": (call,)})


def test_several_entry_points() -> None:
    """Several entry points have ranges and examples each, or none."""
    made = export(
        ("prefill", "decode"), dynamic={"prefill": {"ids": {1: (1, 4)}}}, example={"decode": ({"x": 1}, {"x": 2})}
    )
    assert made.dynamic == {"prefill": {"ids": {1: (1, 4)}}}
    assert made.example == {"decode": ({"x": 1}, {"x": 2})}


def test_it_cannot_be_changed() -> None:
    """What was asked for is part of what a program is recognised by: it stays as it was given."""
    made = export("encoder", tolerance={"float32": 1})
    assert made.tolerance == {"float32": 1.0}
    with pytest.raises(AttributeError):
        made.entry = ("other",)


REFUSED = {
    "entry that is no path": ({"entry": 3}, r"export\(entry=3\) takes the path of what is called"),
    "no entry": ({"entry": ()}, r"export\(entry=\(\)\) takes the path"),
    "one entry twice": ({"entry": ("a", "a")}, r"export\(entry=\('a', 'a'\)\) takes the path"),
    "entries of another type": ({"entry": ("a", 1)}, r"takes the path of what is called, such as 'encoder'"),
    "unknown backend": ({"backend": "tvm"}, r"export\(backend='tvm'\): there are onnx, aoti"),
    "ranges that are no mapping": ({"dynamic": [0, 1]}, r"export\(dynamic=\[0, 1\]\) takes a mapping"),
    "argument without dimensions": (
        {"dynamic": {"ids": (1, 64)}},
        r"'ids' needs a mapping of dimension -> \(least, largest\)",
    ),
    "dimension of another type": ({"dynamic": {"ids": {"0": (1, 64)}}}, r"such as \{0: \(1, 64\)\}, not"),
    "range of one number": ({"dynamic": {"ids": {0: 64}}}, r"'ids' needs a mapping"),
    "range of three": ({"dynamic": {"ids": {0: (1, 2, 3)}}}, r"'ids' needs a mapping"),
    "range from nothing": ({"dynamic": {"ids": {0: (0, 3)}}}, r"'ids' needs a mapping"),
    "range the wrong way round": ({"dynamic": {"ids": {0: (4, 3)}}}, r"'ids' needs a mapping"),
    "range of fractions": ({"dynamic": {"ids": {0: (1.0, 3.0)}}}, r"'ids' needs a mapping"),
    "negative dimension": ({"dynamic": {"ids": {-1: (1, 3)}}}, r"'ids' needs a mapping"),
    "ranges of no entry point": (
        {"entry": ("a", "b"), "dynamic": {"c": {"x": {0: (1, 2)}}}},
        r"export\(dynamic=...\) names 'c'; the entry points are a, b",
    ),
    "ranges of a whole entry point": ({"entry": ("a", "b"), "dynamic": {"a": (1, 2)}}, r"'dynamic' needs a mapping"),
    "example that is no mapping": ({"example": 3}, r"export\(example=3\) takes a mapping"),
    "example of no entry point": (
        {"entry": ("a", "b"), "example": {"x": {"y": 1}}},
        r"export\(example=...\) names 'x'; the entry points are a, b",
    ),
    "example without names": (
        {"entry": ("a", "b"), "example": {"a": [[1, 2]]}},
        r"export\(example=...\) takes a call as a mapping of argument names",
    ),
    "tolerance that is no mapping": ({"tolerance": 1e-4}, r"export\(tolerance=0.0001\) takes dtype -> number"),
    "tolerance that is no number": ({"tolerance": {"float32": "tight"}}, r"such as \{'float32': 1e-4\}"),
    "negative tolerance": ({"tolerance": {"float32": -1.0}}, r"takes dtype -> number"),
    "boundless tolerance": ({"tolerance": {"float32": float("inf")}}, r"takes dtype -> number"),
    "tolerance of no dtype": ({"tolerance": {32: 1.0}}, r"takes dtype -> number"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_refused(options: dict[str, Any], said: str) -> None:
    """A value that cannot be meant is named with what can be given instead."""
    with pytest.raises(HandlerError, match=said):
        export(**options)


class Model:
    """A handler in class form."""

    def load(self, ctx: Any) -> None: ...

    def handle(self, event: Any) -> Any: ...


MISFITS = {
    "no export": (
        lambda: coldstart("a", load=one, program=True)(handler),  # type: ignore[call-overload]
        r"program= takes coldstart.export\(...\), not True",
    ),
    "export without its call": (
        lambda: coldstart("a", load=one, program=export)(handler),  # type: ignore[call-overload]
        r"program= takes coldstart.export\(...\), not <function export",
    ),
    "parts": (
        lambda: coldstart("a", load={"x": one, "y": one}, program=export())(handler),
        "program= needs an undivided state, and load= has named parts",
    ),
    "own call in class form": (
        lambda: coldstart("a", program=export())(Model),
        r"in class form, and beside other entry points, name what is called, such as export\(entry='encoder'\)",
    ),
    "own call beside another": (
        lambda: coldstart("a", load=one, program=export(("", "decoder")))(handler),
        r"is the state's own call: in class form, and beside other entry points",
    ),
}


@pytest.mark.parametrize(("decorate", "said"), MISFITS.values(), ids=MISFITS)
def test_programs_that_do_not_fit(decorate: Any, said: str) -> None:
    """A program= that cannot work with the rest of the decorator is an error where it is written."""
    with pytest.raises(HandlerError, match=said):
        decorate()


def test_programs_that_fit() -> None:
    """A program may be of the state itself, of something in it, and in class form of what is on self."""
    assert isinstance(coldstart("a", load=one, program=export())(handler).__coldstart__.program, Export)
    assert coldstart("b", load=one, program=None)(handler).__coldstart__.program is None
    made: Any = coldstart("c", program=export(("encoder", "decoder.step")))(Model)
    assert made.__coldstart__.program.entry == ("encoder", "decoder.step")
