"""States that are trees of arrays and plain values: encoded, and made again without any skeleton."""

from __future__ import annotations

import collections
import contextlib
import enum
import json
import math
import typing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coldstart.errors import ManifestError
from coldstart.frameworks import rebuild, survey
from coldstart.frameworks.tree import MAX_DEPTH
from tests.frameworks_arena import store

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=[]))  # lone surrogates too
    | st.binary()
)
KEYS = st.recursive(SCALARS, lambda keys: st.lists(keys, max_size=2).map(tuple), max_leaves=3)
DTYPES = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="?")
    | hnp.floating_dtypes(endianness="?")
    | hnp.complex_number_dtypes()
    | hnp.datetime64_dtypes()
    | hnp.timedelta64_dtypes()
    | hnp.unicode_string_dtypes(min_len=1)
    | hnp.byte_string_dtypes(min_len=1)
)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
STATES = st.recursive(
    SCALARS | ARRAYS,
    lambda states: (
        st.lists(states, max_size=3)
        | st.lists(states, max_size=3).map(tuple)
        | st.dictionaries(KEYS, states, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Whether two trees are the same to the last bit, their types and the order of their keys included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return len(one) == len(other) and all(map(same, one.items(), other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or one.hex() == other.hex()
    if isinstance(one, complex):
        return same((one.real, one.imag), (other.real, other.imag))
    return bool(one == other)


@settings(max_examples=200, deadline=None)
@given(STATES)
def test_every_tree_comes_back_exactly(state: Any):
    """Any nest of plain values and arrays goes through JSON and the arena, and is the same state again."""
    assert same(state, store(state).alone())


@settings(max_examples=100, deadline=None)
@given(st.recursive(SCALARS, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=8), s, max_size=3)))
def test_reading_a_tree_that_nobody_wrote_raises_one_error(document: Any):
    """Whatever JSON stands where a tree should be, the answer is a value or a ManifestError."""
    try:
        node = json.loads(json.dumps(document, allow_nan=False, default=str))
    except (ValueError, TypeError):
        return
    with contextlib.suppress(ManifestError):
        rebuild(node, {})


@pytest.mark.parametrize(
    ("state", "node"),
    [
        ({"a": 1, 2: None}, ["dict", [["a", 1], [2, ["none"]]]]),
        ([True, 1.5, "x", b"\x01"], ["list", [True, 1.5, "x", ["bytes", "01"]]]),
        (
            (1j, float("inf"), 1 << 60),
            ["tuple", [["complex", 0.0, 1.0], ["float", "inf"], ["int", "0x1000000000000000"]]],
        ),
        ({"w": np.zeros(2)}, ["dict", [["w", ["array", '["w"]']]]]),
        (np.zeros(2), ["array", "$"]),
        ("\ud800", ["str", "eda080"]),
    ],
)
def test_the_written_form(state: Any, node: Any):
    """The nodes are part of the format: what a worker of today reads, one of tomorrow must."""
    assert survey(state).tree == node


def test_integer_keys_and_their_order_stay():
    """JSON would make keys text; here an int is an int and a tuple a tuple."""
    state = {3: "c", 1: "a", (1, "x"): 2, None: 0, False: "f"}
    assert same(store(state).alone(), state)


def test_arrays_come_back_as_views_of_the_arena():
    """Nothing is copied: a byte written to the arena shows in the array, and the array can be written."""
    stored = store({"w": np.zeros(3, "<u4")})
    made = stored.alone()
    stored.arena[0] = 9
    assert made["w"].tolist() == [9, 0, 0]
    made["w"][1] = 1
    assert stored.arena[4] == 1


def test_one_array_in_two_places_is_one_again():
    """The same object at two paths is the same object after a rebuild."""
    array = np.arange(4)
    made = store({"a": array, "b": (array, array)}).alone()
    assert made["a"] is made["b"][0]
    assert made["a"] is made["b"][1]


def test_views_of_one_array_share_their_bytes_again():
    """A slice, a transpose and a strided view keep being views of the same memory."""
    base = np.arange(24, dtype="<i2").reshape(4, 6)
    made = store({"base": base, "columns": base.T, "steps": base[1:, ::2]}).alone()
    assert np.array_equal(made["steps"], base[1:, ::2])
    made["base"][1, 2] = 99
    assert (made["columns"][2, 1], made["steps"][0, 1]) == (99, 99)


def test_plain_tuples_may_be_shared():
    """Python shares constant tuples on its own, so a shared tuple of plain values is no obstacle."""
    constant = (1, (2, "x"))
    assert store({"a": constant, "b": constant}).alone() == {"a": constant, "b": constant}


class Color(enum.IntEnum):
    RED = 1


class Tokenizer:
    pass


class Point(typing.NamedTuple):
    x: int


SHARED: list[int] = [1]
CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("state", "obstacle"),
    [
        ({"tokenizer": Tokenizer()}, 'state["tokenizer"] is a Tokenizer'),
        (Tokenizer(), "state is a Tokenizer"),
        ([0, (Color.RED,)], "state[1][0] is a Color"),
        ([np.float64(1)], "state[0] is a float64"),
        ({np.int64(1): 0}, "state[int64#0] (its key) is a int64"),
        ([collections.OrderedDict()], "state[0] is a OrderedDict"),
        ([Point(1)], "state[0] is a Point"),
        ([{1}], "state[0] is a set"),
        ([bytearray(b"x")], "state[0] is a bytearray"),
        ([lambda: 0], "state[0] is a function"),
        ({"a": SHARED, "b": SHARED}, 'state["b"] is the same list as state["a"]'),
        (CYCLE, "state[0] is the same list as state"),
        ([b"x" * (17 << 20), 0], "state[1] is beyond the size of plain values"),
    ],
)
def test_what_no_tree_can_hold_is_named(state: Any, obstacle: str):
    """Anything but plain values, exact containers and arrays leaves the tree out, and says what and where."""
    found = survey(state)
    assert found.tree is None
    assert found.tree_obstacle.startswith(obstacle)


def nested(depth: int) -> Any:
    """A state of so many levels."""
    state: Any = 1
    for level in range(depth):
        state = [[state], {"k": state}, (state,)][level % 3]
    return state


def test_the_deepest_tree_that_is_allowed():
    """A hundred levels are encoded and read back, one more is an obstacle."""
    assert store(nested(MAX_DEPTH)).alone() == nested(MAX_DEPTH)
    assert f"nests deeper than {MAX_DEPTH}" in survey(nested(MAX_DEPTH + 1)).tree_obstacle


def test_a_very_deep_state_is_an_obstacle_and_no_overflow():
    """A state of twenty thousand levels is answered like one of a hundred and one."""
    assert "nests deeper" in survey(nested(20_000)).tree_obstacle


def deep_node(depth: int) -> Any:
    """A tree of so many levels, as somebody else may have written it."""
    node: Any = 1
    for _ in range(depth):
        node = ["list", [node]]
    return node


@pytest.mark.parametrize(
    "node",
    [
        None,
        {},
        [],
        [1],
        [["list"]],
        ["set", []],
        ["none", 1],
        ["int", "12"],
        ["int", 12],
        ["int", "0x1 "],
        ["float", "1.0"],
        ["float", float("nan")],
        ["str", "zz"],
        ["str", "ff"],
        ["bytes", "0"],
        ["bytes", "00", "00"],
        ["complex", 1.0],
        ["complex", 1, 2],
        ["list", {}],
        ["list", [None]],
        ["tuple"],
        ["dict", [["a"]]],
        ["dict", ["ab"]],
        ["dict", [["a", 1], ["a", 2]]],
        ["dict", [[1, 1], [True, 2]]],
        ["dict", [[["list", []], 1]]],
        ["array", "elsewhere"],
        ["array", 3],
        deep_node(MAX_DEPTH + 2),
        deep_node(50_000),
        [deep_node(50_000)],
    ],
    ids=[str(number) for number in range(31)],
)
def test_an_odd_tree_is_a_manifest_error(node: Any):
    """A tree is read strictly: one error for whatever coldstart did not write."""
    with pytest.raises(ManifestError):
        rebuild(node, {"$": np.zeros(1)})
