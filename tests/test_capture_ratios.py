"""How much of a large model is written again after a small change: of what is stored, as ratios."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from coldstart.repository import Repository
from coldstart.stores.memory import MemoryStore
from tests.generations import assert_same, capture_of, restored, write

MIB = 1 << 20
WIDTH, LAYERS, WORDS = 1024, 8, 6000


@cache
def numbers():
    """280 MB of noise in 16 bits, of which each transformer has a copy."""
    return np.frombuffer(np.random.default_rng(7).bytes(2 * 140 * MIB), np.uint16)


def transformer():
    """A model of 16-bit numbers, 280 MB: large matrices, and two norms and a bias in every layer. All bytes differ."""
    begin = 0

    def matrix(rows, columns):
        nonlocal begin
        begin += rows * columns
        return numbers()[begin - rows * columns : begin].reshape(rows, columns).copy()

    def layer():
        found = {"norm_1": matrix(1, WIDTH)}
        found |= {name: matrix(WIDTH, WIDTH) for name in ("query", "key", "value", "out")}
        found |= {"out_bias": matrix(1, WIDTH), "norm_2": matrix(1, WIDTH)}
        return found | {name: matrix(WIDTH, 4 * WIDTH) for name in ("gate", "up", "down")}

    return {"embed": matrix(WORDS, WIDTH), "layers": [layer() for _ in range(LAYERS)], "norm": matrix(1, WIDTH)}


@pytest.fixture(scope="module")
def original():
    """The model, the store that holds its first generation, and that generation."""
    store = MemoryStore()
    return store, write(capture_of(transformer()), Repository(store))


def written_part(original, state) -> float:
    """Capture ``state`` as the next generation, which comes back as it is; the part of its stored bytes that was written."""
    store, first = original
    second = write(capture_of(state, follows=first), Repository(store))
    assert second.manifest.raw_bytes > 256 * MIB
    assert second.written_bytes + second.reused_bytes == sum(chunk.stored_bytes for chunk in second.manifest.chunks)
    assert_same(restored(second.manifest, store), state)
    return second.written_bytes / second.manifest.stored_bytes


def test_nothing_changed(original):
    """A model that is as it was writes no blob."""
    assert written_part(original, transformer()) == 0.0


@pytest.mark.parametrize("place", [("layers", 3, "up"), ("layers", 0, "gate"), ("embed",)])
@pytest.mark.parametrize("begin", [0.0, 0.37])
def test_one_percent_changed_in_one_place(original, place, begin):
    """Where 1 % of all bytes changed side by side, at most 5 % of what is stored is written."""
    state = changed = transformer()
    for step in place:
        changed = changed[step]
    items = changed.reshape(-1)
    count = min(len(items), 280 * MIB // 100 // 2)
    first = min(int(begin * len(items)), len(items) - count)
    items[first : first + count] ^= 0x5555
    part = written_part(original, state)
    assert 0.0 < part <= 0.05


@pytest.mark.parametrize("layer", [0, 4, LAYERS - 1])
def test_one_small_tensor_inserted(original, layer):
    """A small array more, wherever it is in the model, writes at most 1 %."""
    state = transformer()
    old = state["layers"][layer]
    state["layers"][layer] = {"query_bias": np.full((1, WIDTH), layer, np.uint16), **old}
    part = written_part(original, state)
    assert 0.0 < part <= 0.01


def test_one_small_tensor_removed(original):
    """A small array less writes at most 1 %."""
    state = transformer()
    del state["layers"][2]["out_bias"]
    assert written_part(original, state) <= 0.01


def test_all_norms_changed(original):
    """Training every norm and bias again, all over the model, writes at most 1 %."""
    state = transformer()
    for layer in state["layers"]:
        for name in ("norm_1", "norm_2", "out_bias"):
            layer[name] ^= 0x0F0F
    state["norm"] ^= 0x0F0F
    part = written_part(original, state)
    assert 0.0 < part <= 0.01
