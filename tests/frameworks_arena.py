"""What a capture and a restore do between ``survey`` and ``bind``, without store and manifest: bytes laid out in an arena."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from coldstart.frameworks import arrays, bind, rebuild, survey
from coldstart.manifest import SEGMENT_ALIGNMENT_BYTES, Leaf

if TYPE_CHECKING:
    from collections.abc import Mapping


class Stored(NamedTuple):
    """A state as bytes: ``arena`` holds its storages, each aligned as in a segment."""

    arena: Any
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    modules: Mapping[str, bool]
    tree: Any

    def buffer_array(self, index: int) -> Any:
        """A view of the arena, as a device gives it."""
        return self.arena[self.offsets[index] : self.offsets[index] + self.lengths[index]]

    def into(self, skeleton: Any) -> Any:
        """Bind the stored arrays to a skeleton."""
        return bind(skeleton, self.leaves, self.modules, self.buffer_array)

    def alone(self) -> Any:
        """The state made from the tree alone."""
        return rebuild(self.tree, arrays(self.leaves, self.buffer_array))


def store(state: Any) -> Stored:
    """Survey a state and copy its storages into a fresh arena, through a real bytearray."""
    found = survey(state)
    offsets, end = [], 0
    for storage in found.storages:
        offsets.append(end)
        end += -(-storage.length_bytes // SEGMENT_ALIGNMENT_BYTES) * SEGMENT_ALIGNMENT_BYTES
    memory = np.frombuffer(bytearray(end + SEGMENT_ALIGNMENT_BYTES), np.uint8)
    arena = memory[-memory.ctypes.data % SEGMENT_ALIGNMENT_BYTES :]
    for offset, storage in zip(offsets, found.storages, strict=True):
        arena[offset : offset + storage.length_bytes] = storage.data
    lengths = tuple(storage.length_bytes for storage in found.storages)
    # Through JSON and back, as a manifest would: a leaf or a tree that is not JSON-safe fails here.
    leaves = tuple(_leaf(json.loads(json.dumps(leaf.leaf, allow_nan=False))) for leaf in found.leaves)
    tree = json.loads(json.dumps(found.tree, allow_nan=False))
    return Stored(arena, tuple(offsets), lengths, leaves, dict(found.modules), tree)


def _leaf(row: list[Any]) -> Leaf:
    leaf = Leaf(*row)
    return leaf._replace(shape=tuple(leaf.shape), strides=tuple(leaf.strides))
