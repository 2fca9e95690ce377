"""Where a program's constants lie: in the state's arrays where they are equal, in blocks of their own, or in pools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from coldstart.frameworks import survey
from coldstart.manifest import Pool
from coldstart.programs.base import Array
from coldstart.programs.folder import ArrayReader, ArrayWriter
from coldstart.programs.placing import place
from coldstart.programs.record import program_id
from coldstart.programs.signature import Signature
from tests.programs import written_record

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from coldstart.programs.placing import Placed

SIGNATURE = Signature(("x",), ["dict", [["x", ["array", 0]]]], (Array("x", "float32", ()),), ["list", []], (), {})
OWN = f"program_{program_id('onnx', {'device': 'cpu'})}"


def placed(folder: Path, state: Any, *entries: Mapping[str, Any], mutated: frozenset[str] = frozenset()) -> Placed:
    """A program with these constants, an entry point a mapping, beside a state."""
    written_record(folder, [(SIGNATURE, constants, mutated & set(constants)) for constants in entries])
    return place(folder, survey(state) if state is not None else None)


def places(found: Placed) -> list[tuple[str, str, int]]:
    """Each constant's name, buffer and offset, of all entry points."""
    return [(each.name, each.buffer, each.offset_bytes) for entry in found.program.entries for each in entry.constants]


def numbers(count: int = 32, *, seed: int = 0) -> Any:
    """Arrays that differ by their seed."""
    return np.random.default_rng(seed).standard_normal(count, np.float32)


def test_equal_to_an_array_of_the_state(tmp_path: Path) -> None:
    """A constant with the bytes of an array of the state is that array: it needs no memory and is stored once."""
    weight, folded = numbers(seed=1), numbers(seed=2)
    found = placed(tmp_path, {"w": weight, "other": numbers(seed=3)}, {"0.weight": weight.copy(), "folded": folded})
    assert places(found)[0] == ("0.weight", '["w"]', 0)
    assert found.shared == {0}
    (block,) = found.blocks
    assert places(found)[1] == ("folded", block.name, 0)
    assert (block.item_bytes, block.kind, bytes(block.data)) == (4, "weights", folded.tobytes())
    assert block.name.startswith(f"{OWN}/")
    assert found.pools == ()


def test_inside_a_larger_buffer(tmp_path: Path) -> None:
    """An array of the state that begins inside memory that others share is found there, if it begins aligned."""
    base = numbers(64)
    found = placed(tmp_path, {"whole": base, "tail": base[32:], "odd": base[1:33]}, {"t": base[32:], "o": base[1:33]})
    assert places(found)[0] == ("t", '["whole"]', 128)
    assert places(found)[1][1].startswith(OWN)


def test_transposed(tmp_path: Path) -> None:
    """A transposed view of the state's has other bytes in C order: the constant is stored by itself, and rightly."""
    square = numbers(64).reshape(8, 8)
    found = placed(tmp_path, {"w": square.T}, {"w": np.ascontiguousarray(square.T)})
    assert places(found)[0][1].startswith(OWN)
    assert bytes(found.blocks[0].data) == np.ascontiguousarray(square.T).tobytes()


def test_equal_constants_of_two_entry_points(tmp_path: Path) -> None:
    """Constants with the same bytes are stored once, whichever entry point has them."""
    found = placed(tmp_path, None, {"a": numbers(), "b": numbers(seed=1)}, {"a of another name": numbers()})
    first, second, third = places(found)
    assert first[1:] == third[1:] != second[1:]
    assert len(found.blocks) == 2
    assert found.shared == frozenset()


def test_caches(tmp_path: Path) -> None:
    """Two caches that are both zeros stay two, in pools that no snapshot holds; one with bytes in it is stored, by itself."""
    caches = {"keys": np.zeros(256, np.float16), "values": np.zeros(256, np.float16), "bias": np.ones(256, np.float16)}
    state = {"bias": np.ones(256, np.float16), "zeros": np.zeros(256, np.float16)}
    constants = {**caches, "zeros": np.zeros(256, np.float16)}
    found = placed(tmp_path, state, constants, mutated=frozenset(caches))
    keys, values, bias, zeros = (each[1] for each in places(found))
    assert len({keys, values, bias, zeros}) == 4
    assert set(found.pools) == {Pool(keys, "kv_cache", 512), Pool(values, "kv_cache", 512)}
    (block,) = found.blocks
    assert (block.name, block.kind, block.item_bytes, bytes(block.data)) == (
        bias,
        "kv_cache",
        2,
        caches["bias"].tobytes(),
    )
    assert zeros == '["zeros"]'
    assert found.shared == {1}
    assert found.program.entries[0].mutated == ("bias", "keys", "values")


def test_cache_of_two_entry_points(tmp_path: Path) -> None:
    """A cache that two entry points write to is one: what the first leaves in it the second finds."""
    cache = np.zeros(64, np.float32)
    found = placed(tmp_path, None, {"cache": cache}, {"cache": cache}, mutated=frozenset({"cache"}))
    assert len({buffer for _, buffer, _ in places(found)}) == 1
    assert len(found.pools) == 1


def test_files(tmp_path: Path) -> None:
    """Each entry point's file goes with the program, under its own name."""
    found = placed(tmp_path, None, {}, {})
    assert {name: path.read_bytes() for name, path in found.files.items()} == {"0.onnx": b"file 0", "1.onnx": b"file 1"}
    assert [entry.file for entry in found.program.entries] == ["0.onnx", "1.onnx"]


def test_arrays_are_kept_exactly(tmp_path: Path) -> None:
    """Arrays of any dtype and shape come back from the folder as they were, equal ones from the same place."""
    arrays = [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.array(2.5, np.float16),
        np.array([True, False]),
        np.zeros((0, 4), np.float32),
        np.arange(6, dtype=np.int64).reshape(3, 2),
    ]
    writer = ArrayWriter(tmp_path)
    stored = [writer.add(each.reshape(-1).view(np.uint8), each.dtype.name, each.shape) for each in arrays]
    writer.close()
    reader = ArrayReader(tmp_path)
    for array, where in zip(arrays, stored, strict=True):
        back = reader.array(where)
        assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert where.offset_bytes % 64 == 0
    assert stored[0].offset_bytes == stored[4].offset_bytes
