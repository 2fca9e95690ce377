"""Where the constants of a program lie in a snapshot: in arrays of the state where they are equal, else in blocks of their own.

Exporters fold and transpose, so many constants are no array of the state. Those that are, are stored once. A constant that
calls write to (a cache) is memory of its own: none is stored where it is all zeros, which is an entry of the allocation plan.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.devices.device_bytes import host_bytes
from coldstart.manifest import NO_BUFFER, Pool
from coldstart.programs.base import item_bytes
from coldstart.programs.folder import RECORD, ArrayReader, read_document, stored_of
from coldstart.programs.record import ConstantPlace, Entry, Program, consumer_of, program_id, signature_from_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from coldstart.frameworks import Survey
    from coldstart.manifest import Leaf
    from coldstart.programs.folder import Stored

SHARED_ALIGNMENT_BYTES = 64
"""A constant is taken from inside an array's memory only where it begins as aligned as runtimes like it."""


class Block(NamedTuple):
    """Bytes that only the program needs, flat uint8."""

    name: str
    item_bytes: int
    kind: str
    data: Any


class Placed(NamedTuple):
    """A program with everything that a capture stores for it.

    ``shared``: indices of the survey's storages that hold constants. ``files``: name -> path.
    """

    program: Program
    blocks: tuple[Block, ...]
    pools: tuple[Pool, ...]
    shared: frozenset[int]
    files: Mapping[str, Path]


def place(folder: Path, survey: Survey | None) -> Placed:
    """Place the constants of the program that was made into ``folder``."""
    document = read_document(folder, RECORD)
    identity = program_id(document["backend"], document["platform"])
    placer = _Placer(consumer_of(identity), ArrayReader(folder), survey)
    written = {
        name: stored_of(row)
        for entry in document["entries"]
        for name, row in entry["constants"]
        if name in entry["mutated"]
    }
    placer.mutated = {stored.offset_bytes for stored in written.values()}
    entries = tuple(
        Entry(
            path=entry["path"],
            signature=signature_from_json(entry["signature"]),
            file=entry["file"],
            constants=tuple(placer.constant(name, stored_of(row)) for name, row in entry["constants"]),
            mutated=tuple(entry["mutated"]),
        )
        for entry in document["entries"]
    )
    program = Program(
        identity, document["backend"], document["platform"], document["options"], document["tolerance"], entries
    )
    files = {entry.file: folder / entry.file for entry in entries}
    return Placed(program, tuple(placer.blocks.values()), tuple(placer.pools.values()), frozenset(placer.shared), files)


class _Placer:
    def __init__(self, consumer: str, arrays: ArrayReader, survey: Survey | None) -> None:
        self.blocks: dict[int, Block] = {}
        self.pools: dict[int, Pool] = {}
        self.shared: set[int] = set()
        self.mutated: set[int] = set()
        self._consumer = consumer
        self._arrays = arrays
        self._survey = survey
        self._by_length = _candidates(survey)
        self._hashes: dict[Any, bytes] = {}

    def constant(self, name: str, stored: Stored) -> ConstantPlace:
        buffer, offset_bytes = self._memory_of(stored)
        return ConstantPlace(name, stored.dtype, stored.shape, buffer, offset_bytes)

    def _memory_of(self, stored: Stored) -> tuple[str, int]:
        """Name of the buffer or pool, and the offset inside it."""
        at = stored.offset_bytes
        name = f"{self._consumer}/{at}"
        data = self._arrays.data(stored)
        if at in self.mutated:
            if not data.any():
                self.pools[at] = Pool(name, "kv_cache", stored.length_bytes)
            else:
                self.blocks[at] = Block(name, item_bytes(stored.dtype), "kv_cache", data)
            return name, 0
        found = self._same(stored, data)
        if found is not None:
            return found
        self.blocks[at] = Block(name, item_bytes(stored.dtype), "weights", data)
        return name, 0

    def _same(self, stored: Stored, data: Any) -> tuple[str, int] | None:
        """The place of an array of the state that has the same bytes, if there is one."""
        wanted = self._hash(("constant", stored.offset_bytes), data)
        for leaf in self._by_length.get(stored.length_bytes, ()):
            assert self._survey is not None
            begin = leaf.offset_bytes
            held = self._survey.storages[leaf.buffer].data[begin : begin + stored.length_bytes]
            if self._hash(("leaf", leaf.path), held) == wanted:
                self.shared.add(leaf.buffer)
                return _buffer_name(self._survey, leaf.buffer), begin
        return None

    def _hash(self, key: Any, data: Any) -> bytes:
        from blake3 import blake3

        if key not in self._hashes:
            self._hashes[key] = blake3(host_bytes(data)).digest()
        return self._hashes[key]


def _candidates(survey: Survey | None) -> dict[int, list[Leaf]]:
    """The arrays of a state that a constant could be, by their length: C-contiguous and aligned."""
    found: dict[int, list[Leaf]] = {}
    for each in survey.leaves if survey is not None else ():
        leaf = each.leaf
        if leaf.buffer != NO_BUFFER and leaf.offset_bytes % SHARED_ALIGNMENT_BYTES == 0 and _is_contiguous(leaf):
            found.setdefault(math.prod(leaf.shape) * leaf.item_bytes, []).append(leaf)
    return found


def _is_contiguous(leaf: Leaf) -> bool:
    expected = 1
    for size, stride in zip(reversed(leaf.shape), reversed(leaf.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _buffer_name(survey: Survey, storage: int) -> str:
    """The name that a capture gives the storage's buffer: the path of its first leaf."""
    return next(each.leaf.path for each in survey.leaves if each.leaf.buffer == storage)
