"""What a manifest says of a program: its golden bytes, and that a start goes on without what it cannot read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.errors import ProgramError
from coldstart.exports import export
from coldstart.programs.base import Array
from coldstart.programs.record import (
    MAX_ARRAYS,
    MAX_ENTRIES,
    ConstantPlace,
    Entry,
    Program,
    chosen,
    consumer_of,
    options_digest,
    program_from_json,
    program_id,
    programs_of,
    to_json,
)
from coldstart.programs.signature import Signature

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parent / "golden" / "program-v1.json"
PLATFORM = {"device": "cpu", "onnxruntime": "1.23.2", "processor": "x86_64 avx2 fma"}

PROGRAM = Program(
    id="940cbcf308fa1e41",
    backend="onnx",
    platform=PLATFORM,
    options="00112233445566778",
    tolerance={"float32": 1e-05},
    entries=(
        Entry(
            "encoder",
            Signature(
                ("ids", "mask"),
                ["dict", [["ids", ["array", 0]], ["mask", ["array", 1]], ["train", ["plain", False]]]],
                (Array("ids", "int64", ("s0", "s1")), Array("mask", "bool", ("s0", 8))),
                ["tuple", [["array", 0], ["plain", None]]],
                (Array("result 0", "float32", ("s0", 384)),),
                {"s0": (1, 64), "s1": (2, 1 << 40)},
            ),
            "0.onnx",
            (
                ConstantPlace("weight", "float32", (30522, 384), "words.weight", 0),
                ConstantPlace("földed", "bfloat16", (), "program_940cbcf308fa1e41/64", 128),
            ),
            (),
        ),
        Entry(
            '["decoder"]',
            Signature(("x",), ["dict", [["x", ["array", 0]]]], (Array("x", "float16", ()),), ["list", []], (), {}),
            "1.onnx",
            (ConstantPlace("cache", "float16", (2, 0), "program_940cbcf308fa1e41/0", 0),),
            ("cache",),
        ),
    ),
)


def document() -> dict[str, Any]:
    """PROGRAM as it is stored."""
    found: dict[str, Any] = json.loads(json.dumps(to_json(PROGRAM)))
    return found


def test_golden_bytes() -> None:
    """A program is written as it always was, and what was written then is read as it was meant."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert document() == golden
    assert program_from_json(golden) == PROGRAM


def test_identity_is_of_backend_and_platform() -> None:
    """The id is the same on the same platform, whatever the order of its parts, and another for another backend or version."""
    assert program_id("onnx", PLATFORM) == PROGRAM.id
    assert program_id("onnx", dict(reversed(PLATFORM.items()))) == PROGRAM.id
    others = [program_id("aoti", PLATFORM), program_id("onnx", {**PLATFORM, "onnxruntime": "1.23.3"})]
    assert len({PROGRAM.id, *others}) == 3
    assert consumer_of(PROGRAM.id) == f"program_{PROGRAM.id}"


@pytest.mark.parametrize(
    "options",
    [
        {"entry": "encoder"},
        {"entry": ("encoder", "")},
        {"dynamic": {"ids": {0: (1, 64)}}},
        {"dynamic": {"ids": {1: (1, 64)}}},
        {"dynamic": {"ids": {0: (1, 65)}}},
        {"backend": "aoti"},
        {"tolerance": {"float32": 1e-4}},
    ],
)
def test_other_wishes_have_another_digest(options: dict[str, Any]) -> None:
    """Whatever is asked for in another way makes a program another one; the examples only show how it is called."""
    assert options_digest(export(**options)) != options_digest(export())
    assert options_digest(export(**options)) == options_digest(export(**options))
    assert options_digest(export(example={"x": 1})) == options_digest(export())


# --- malformed records -----------------------------------------------------------------------------------------------


def set_at(*path: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """What puts a value at a place of a record."""

    def put(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(record: dict[str, Any]) -> None:
            held: Any = record
            for step in path[:-1]:
                held = held[step]
            held[path[-1]] = value

        return change

    return put


ENTRY = ("entries", 0)
SIGNATURE = (*ENTRY, "signature")
DAMAGE = {
    "no entries": set_at("entries")([]),
    "too many entries": lambda record: record["entries"].extend(record["entries"] * MAX_ENTRIES),
    "entries of another type": set_at("entries")({"0": {}}),
    "an entry of another type": set_at("entries", 0)("encoder"),
    "another id": set_at("id")("0" * 16),
    "id of another type": set_at("id")(7),
    "platform of another type": set_at("platform")([["device", "cpu"]]),
    "platform with a number": set_at("platform", "device")(1),
    "another platform": set_at("platform", "device")("cuda"),
    "no backend": lambda record: record.pop("backend"),
    "tolerance of a text": set_at("tolerance", "float32")("tight"),
    "no number as a tolerance": set_at("tolerance", "float32")("1e-5"),
    "NaN as a tolerance": set_at("tolerance", "float32")(float("nan")),
    "negative tolerance": set_at("tolerance", "float32")(-1.0),
    "tolerance of another type": set_at("tolerance")([1]),
    "no path": lambda record: record["entries"][0].pop("path"),
    "path of another type": set_at(*ENTRY, "path")(None),
    "endless text": set_at(*ENTRY, "file")("x" * 5000),
    "no file": lambda record: record["entries"][0].pop("file"),
    "constants of another type": set_at(*ENTRY, "constants")("weights"),
    "short constant": set_at(*ENTRY, "constants", 0)(["weight", "float32"]),
    "negative offset": set_at(*ENTRY, "constants", 0, 4)(-1),
    "huge offset": set_at(*ENTRY, "constants", 0, 4)(1 << 60),
    "offset with a fraction": set_at(*ENTRY, "constants", 0, 4)(0.5),
    "true as an offset": set_at(*ENTRY, "constants", 0, 4)(True),
    "negative size": set_at(*ENTRY, "constants", 0, 2)([-1, 2]),
    "shape of a constant": set_at(*ENTRY, "constants", 0, 2)(3),
    "mutated of another type": set_at(*ENTRY, "mutated")([1]),
    "no signature": lambda record: record["entries"][0].pop("signature"),
    "signature of another type": set_at(*SIGNATURE)([]),
    "parameter of another type": set_at(*SIGNATURE, "parameters")([1]),
    "input without a shape": set_at(*SIGNATURE, "inputs", 0)(["ids", "int64"]),
    "unknown symbol": set_at(*SIGNATURE, "inputs", 0, 2, 0)("s9"),
    "size of another type": set_at(*SIGNATURE, "inputs", 0, 2, 0)(None),
    "negative input": set_at(*SIGNATURE, "inputs", 0, 2, 0)(-4),
    "too many inputs": lambda record: record["entries"][0]["signature"]["inputs"].extend(
        [["x", "int8", []]] * MAX_ARRAYS
    ),
    "range of a text": set_at(*SIGNATURE, "ranges", "s0")("1 to 64"),
    "range of one": set_at(*SIGNATURE, "ranges", "s0")([1]),
    "negative range": set_at(*SIGNATURE, "ranges", "s0")([-1, 4]),
    "arguments of no structure": set_at(*SIGNATURE, "arguments")({"ids": 0}),
    "arguments with an array too many": set_at(*SIGNATURE, "arguments")(["array", 2]),
    "results of no structure": set_at(*SIGNATURE, "results")(None),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_malformed_records(damage: Callable[[dict[str, Any]], None]) -> None:
    """A record that is not as it should be is a ProgramError, and the start's choice goes on to the programs beside it."""
    record = document()
    damage(record)
    with pytest.raises(ProgramError):
        program_from_json(record)
    other = to_json(PROGRAM._replace(id=program_id("aoti", PLATFORM), backend="aoti"))
    assert [program.backend for program in programs_of([record, other])] == ["aoti"]
    assert chosen([record], [PROGRAM.id]) is None


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_any_damage(data: st.DataObject) -> None:
    """Whatever stands anywhere in a record, reading it gives a program or a ProgramError, and nothing else."""
    record: Any = document()
    held, place = {"": record}, ""
    while isinstance(held[place], (dict, list)) and held[place] and data.draw(st.integers(0, 4)):
        held = held[place]
        place = data.draw(st.sampled_from(sorted(held) if isinstance(held, dict) else range(len(held))))
    held[place] = data.draw(JUNK)
    try:
        found = program_from_json(record)
    except ProgramError:
        return
    assert program_from_json(json.loads(json.dumps(to_json(found)))) == found


def test_records_of_another_kind() -> None:
    """Anything that is no object at all is malformed too."""
    for record in (None, 1, "program", [], [{}]):
        with pytest.raises(ProgramError, match="malformed"):
            program_from_json(record)  # type: ignore[arg-type]


# --- the choice ------------------------------------------------------------------------------------------------------


def test_choice_by_preference() -> None:
    """Of the programs that a start accepts it takes the one it prefers, not the manifest's first; of none it takes none."""
    aoti = PROGRAM._replace(id=program_id("aoti", PLATFORM), backend="aoti")
    documents = [to_json(PROGRAM), to_json(aoti)]
    assert chosen(documents, [aoti.id, PROGRAM.id]) == aoti
    assert chosen(documents, ["0" * 16, PROGRAM.id]) == PROGRAM
    assert chosen(documents, ["0" * 16]) is None
    assert chosen(documents, []) is None
    assert chosen([], [PROGRAM.id]) is None


def test_nothing_is_changed_by_reading() -> None:
    """Reading leaves the manifest's own object as it is: it is written again by the next generation."""
    record = document()
    before = copy.deepcopy(record)
    program_from_json(record)
    assert record == before
