"""What a call looks like: taking it apart and putting it together, and every way in which a program refuses one."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.errors import ProgramCallError, ProgramError
from coldstart.programs.base import Array, item_bytes
from coldstart.programs.signature import (
    MAX_DEPTH,
    UNBOUNDED,
    Outputs,
    Signature,
    check_call,
    check_structure,
    described,
    framework_of,
    named_arguments,
    put_together,
    taken_apart,
)

IDS = Array("ids", "int64", ("batch", "size"))
MASK = Array("mask", "int64", ("batch", "size"))
SCALE = Array("scale", "float32", ())


def signature(arguments: dict[str, Any], *inputs: Array, **ranges: tuple[int, int]) -> Signature:
    """The signature of a call with these arguments; what it gives does not matter here."""
    structure, _ = taken_apart(arguments, "", entry="")
    return Signature(tuple(arguments), structure, inputs, ["array", 0], (Array("result 0", "float32", ()),), ranges)


def refused(made_for: Signature, given: dict[str, Any], entry: str = "encode") -> str:
    """What is said of a call."""
    structure, arrays = taken_apart(given, "", entry=entry)
    with pytest.raises(ProgramCallError) as caught:
        check_call(made_for, structure, arrays, entry=entry)
    return str(caught.value)


def ids(*shape: int, dtype: Any = np.int64) -> Any:
    """An array of that shape."""
    return np.zeros(shape, dtype)


ENCODE = signature({"ids": ids(2, 3), "mask": ids(2, 3)}, IDS, MASK, batch=(1, 8), size=(2, 16))


# --- structures ------------------------------------------------------------------------------------------------------

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ARRAYS = st.integers(0, 3).map(lambda size: np.arange(size, dtype=np.float32))
VALUES = st.recursive(
    PLAIN | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Equal, of the same types, arrays the very same, NaN like NaN."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return one is other
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return repr(one) == repr(other)


@given(VALUES)
def test_taken_apart_and_put_together(value: Any) -> None:
    """Any value comes back as it was, with its very arrays, also when its structure has been JSON meanwhile."""
    structure, arrays = taken_apart(value, "x", entry="")
    check_structure(structure, len(arrays))
    assert same(put_together(json.loads(json.dumps(structure)), [array for _, array in arrays]), value)
    again, _ = taken_apart(value, "y", entry="")
    assert repr(again) == repr(structure)


def test_names_say_where_an_array_is() -> None:
    """Every array has a name by which a person finds it in the call."""
    value = {"past": [(ids(1), ids(2)), {"k": ids(3)}], "n": 1}
    _, arrays = taken_apart(value, "", entry="")
    assert [name for name, _ in arrays] == ["past[0][0]", "past[0][1]", "past[1].k"]


def test_mapping_of_a_class_of_its_own() -> None:
    """A result like transformers' comes back as something with its keys as attributes, and with places."""
    found = OrderedDict(logits=ids(2), hidden=None)
    structure, arrays = taken_apart(found, "", entry="")
    assert structure == ["outputs", [["logits", ["array", 0]], ["hidden", ["plain", None]]]]
    back = put_together(structure, [array for _, array in arrays])
    assert isinstance(back, Outputs)
    assert back.logits is back["logits"] is back[0] is found["logits"]
    assert (back.hidden, list(back)) == (None, ["logits", "hidden"])
    with pytest.raises(AttributeError, match="no 'loss'; it has logits, hidden"):
        _ = back.loss


def test_scalars_of_numpy_are_arrays() -> None:
    """A numpy number varies like an array does; it is not part of the structure."""
    structure, arrays = taken_apart({"x": np.float32(2)}, "", entry="")
    assert structure == ["dict", [["x", ["array", 0]]]]
    assert arrays[0][1] == 2
    assert (framework_of(np.float32(2)), framework_of([1]), framework_of("numpy")) == ("numpy", "", "")


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, {1, 2}, b"bytes", range(3), 1j], ids=lambda value: type(value).__name__
)
def test_what_cannot_be_passed(value: Any) -> None:
    """Anything but arrays, plain values and containers of them is refused with its place, its type and what can be."""
    with pytest.raises(
        ProgramCallError, match=rf"options\.deep\[0\] is a {type(value).__name__}: arrays, None, numbers"
    ):
        taken_apart({"options": {"deep": [value]}}, "", entry="encode")


def test_depth_has_a_limit() -> None:
    """What contains itself ends with an error that names the argument, not with the stack."""
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(
        ProgramCallError, match=rf"entry point 'e' of the program: x(\[0\])+ nests deeper than {MAX_DEPTH}"
    ):
        taken_apart({"x": endless}, "", entry="e")


@pytest.mark.parametrize(
    "node",
    [
        None,
        [],
        ["array"],
        ["array", 0, 0],
        ["array", -1],
        ["array", 2],
        ["array", True],
        ["array", "0"],
        ["plain", [1]],
        ["list", {}],
        ["dict", [["k"]]],
        ["dict", [[1, ["plain", 1]]]],
        ["dict", [["k", ["strange", 1]]]],
        ["call", "os.system"],
        ("plain", 1),
        ["list", [["tuple", [["array", 9]]]]],
    ],
)
def test_malformed_structures(node: Any) -> None:
    """A structure of a manifest that is none is refused before anything is put together by it."""
    with pytest.raises(ProgramError, match="malformed structure"):
        check_structure(node, 2)


def test_structure_that_is_too_deep() -> None:
    """A structure that nests without end is malformed: reading it must not end with the stack."""
    node: Any = ["plain", 1]
    for _ in range(5000):
        node = ["list", [node]]
    with pytest.raises(ProgramError, match="malformed structure"):
        check_structure(node, 0)


# --- names of arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((1, 2), {}, {"ids": 1, "mask": 2}),
        ((1,), {"mask": 2}, {"ids": 1, "mask": 2}),
        ((), {"mask": 2, "ids": 1}, {"ids": 1, "mask": 2}),
        ((1,), {"zeta": 4, "alpha": 3}, {"ids": 1, "alpha": 3, "zeta": 4}),
        ((), {}, {}),
    ],
)
def test_arguments_by_name(arguments: tuple[Any, ...], options: dict[str, Any], expected: dict[str, Any]) -> None:
    """However they are passed, the same arguments are the same call: in the order of the parameters, then by name."""
    found = named_arguments(("ids", "mask"), arguments, options, entry="")
    assert list(found.items()) == list(expected.items())


def test_arguments_that_no_function_takes() -> None:
    """Too many, or one twice: the error says so as Python would, with the entry point."""
    with pytest.raises(
        ProgramCallError, match=r"the program's call: takes at most 2 positional arguments, 3 were given"
    ):
        named_arguments(("ids", "mask"), (1, 2, 3), {}, entry="")
    with pytest.raises(ProgramCallError, match=r"entry point 'encode' of the program: got the argument 'ids' twice"):
        named_arguments(("ids", "mask"), (1,), {"ids": 2}, entry="encode")


# --- calls that a program was not made for -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2), (8, 16), (3, 5)])
def test_calls_inside_the_ranges(shape: tuple[int, int]) -> None:
    """Both ends of a range are allowed, and whatever lies between."""
    structure, arrays = taken_apart({"ids": ids(*shape), "mask": ids(*shape)}, "", entry="")
    check_call(ENCODE, structure, arrays, entry="")


TAKES = r"the program takes int64 \(batch, size\) with batch 1 to 8, size 2 to 16"


@pytest.mark.parametrize(
    ("given_ids", "mask", "said"),
    [
        (ids(9, 4), ids(9, 4), rf"ids is int64 \(9, 4\), {TAKES}"),
        (ids(0, 4), ids(0, 4), rf"ids is int64 \(0, 4\), {TAKES}"),
        (ids(2, 17), ids(2, 17), rf"ids is int64 \(2, 17\), {TAKES}"),
        (ids(2, 1), ids(2, 1), rf"ids is int64 \(2, 1\), {TAKES}"),
        (ids(2, 4, dtype=np.int32), ids(2, 4), rf"ids is int32 \(2, 4\), {TAKES}"),
        (ids(4), ids(2, 4), rf"ids is int64 \(4,\), {TAKES}"),
        (ids(2, 4, 1), ids(2, 4), rf"ids is int64 \(2, 4, 1\), {TAKES}"),
        (ids(2, 4), ids(2, 5), rf"mask is int64 \(2, 5\), {TAKES}; by the arguments before it batch is 2, size is 4"),
        (ids(2, 4), ids(3, 4), rf"mask is int64 \(3, 4\), {TAKES}; by the arguments before it batch is 2, size is 4"),
    ],
)
def test_arrays_outside(given_ids: Any, mask: Any, said: str) -> None:
    """An array of another dtype, rank or size is refused by its name, with what it is and what is taken."""
    with pytest.raises(ProgramCallError, match=f"entry point 'encode' of the program: {said}; the calls of warmup="):
        structure, arrays = taken_apart({"ids": given_ids, "mask": mask}, "", entry="encode")
        check_call(ENCODE, structure, arrays, entry="encode")


def test_one_symbol_twice_in_an_array() -> None:
    """Sizes that belong together have to agree inside one array too."""
    square = signature({"x": ids(2, 2)}, Array("x", "int64", ("n", "n")), n=(1, UNBOUNDED))
    assert refused(square, {"x": ids(2, 3)}, "").startswith("the program's call: x is int64 (2, 3), the program takes")
    assert described(square.inputs[0], square.ranges) == "int64 (n, n) with n 1 or more"


def test_fixed_sizes_and_scalars() -> None:
    """A size that is a number is that number; a scalar is an array without dimensions."""
    fixed = signature({"x": ids(2), "scale": np.float32(1)}, Array("x", "int64", (2,)), SCALE)
    assert "x is int64 (3,), the program takes int64 (2,)" in refused(fixed, {"x": ids(3), "scale": np.float32(1)})
    assert "scale is float64 ()" in refused(fixed, {"x": ids(2), "scale": np.float64(1)})


WITH_OPTIONS = signature(
    {"ids": ids(2, 3), "past": [ids(1), None], "train": False, "scale": 1.0, "mode": {"a": 1, "b": 2}},
    IDS,
    Array("past[0]", "int64", (1,)),
    batch=(1, 8),
    size=(1, 8),
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": True}, "train is True, it was False when the program was made: what varies has to be an array"),
        ({"train": 0}, "train is 0, it was False when the program was made"),
        ({"scale": 1}, "scale is 1, it was 1.0 when the program was made"),
        ({"past": [ids(1), ids(1)]}, r"past\[1\] is an array, it was None"),
        ({"past": None}, "past is None, it was a list of 2"),
        ({"past": [ids(1)]}, "past is a list of 1, it was a list of 2"),
        ({"past": (ids(1), None)}, "past is a tuple of 2, it was a list of 2"),
        ({"ids": 3}, "ids is 3, it was an array"),
        ({"mode": {"a": 1, "b": 2, "c": 3}}, r"got the argument 'mode\.c', which no recorded call had"),
        ({"mode": {"a": 1}}, r"misses the argument 'mode\.b', which every recorded call had"),
        ({"mode": {"b": 2, "a": 1}}, "mode has its keys in another order"),
        ({"mode": {"a": 1, "b": 3}}, r"mode\.b is 3, it was 2"),
        ({"extra": None}, "got the argument 'extra', which no recorded call had"),
    ],
)
def test_calls_of_another_structure(change: dict[str, Any], said: str) -> None:
    """Whatever is no array has to be as it was: the error names the argument, both values and the remedy."""
    call = {"ids": ids(2, 3), "past": [ids(1), None], "train": False, "scale": 1.0, "mode": {"a": 1, "b": 2}}
    structure, arrays = taken_apart(call, "", entry="")
    check_call(WITH_OPTIONS, structure, arrays, entry="")
    with pytest.raises(ProgramCallError, match=said):
        structure, arrays = taken_apart({**call, **change}, "", entry="")
        check_call(WITH_OPTIONS, structure, arrays, entry="")


def test_missing_argument() -> None:
    """An argument that the recorded calls had and this one lacks is named."""
    assert (
        refused(ENCODE, {"ids": ids(2, 3)})
        .partition(";")[0]
        .endswith("misses the argument 'mask', which every recorded call had")
    )


def test_nan_is_nan() -> None:
    """A plain NaN is the value that it was when the program was made, though it equals nothing."""
    made_for = signature({"x": ids(1), "fill": float("nan")}, Array("x", "int64", (1,)))
    stored = made_for._replace(arguments=json.loads(json.dumps(made_for.arguments)))
    structure, arrays = taken_apart({"x": ids(1), "fill": float("nan")}, "", entry="")
    check_call(stored, structure, arrays, entry="")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", 4),
        ("bfloat16", 2),
        ("float8_e4m3fn", 1),
        ("bool", 1),
        ("int64", 8),
        ("complex128", 16),
        ("uint4", 1),
    ],
)
def test_item_sizes(dtype: str, expected: int) -> None:
    """The item size of a dtype, by its name alone."""
    assert item_bytes(dtype) == expected
