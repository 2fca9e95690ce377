"""Our code for GPUs: the text of its modules, and the shape in which each kernel is launched.

There are two modules, because a driver compiles all of one before it runs any of it: a start needs ``planes`` alone, a
capture ``blake3``. What the kernels take and give is said in the ``.cu`` files beside this one; ``build.py`` makes the
``.ptx`` files of them.
"""

from __future__ import annotations

import os
from typing import Final, Literal, NamedTuple

PLANES: Final = "planes"
BLAKE3: Final = "blake3"
SUFFIX = ".ptx"

LEAF_BYTES = 1024
GROUP_LEAVES = 8
"""Leaves whose hashes the first kernel leaves to the second as one."""
CHAINING_BYTES = 32
"""Bytes of device memory that each such group takes between the two."""
DIGEST_BYTES = 32

_MERGE_THREADS = 256
_MERGE_ITEMS = 32
"""Items that a thread should merge: some stores each, so that reading the addresses of planes is little of its work."""
_LEAF_THREADS = 128
_TREE_THREADS = 512
_LARGEST_GRID_Y = 65535


class Launch(NamedTuple):
    """A kernel's name, its grid of blocks (x, y; z is 1), and the threads of each block (x)."""

    kernel: str
    grid: tuple[int, int]
    threads: int


def module(name: Literal["planes", "blake3"]) -> bytes:
    """The PTX text of a module, for ``cuModuleLoadData``, which wants a zero byte after it (ctypes adds one)."""
    with open(os.path.join(os.path.dirname(__file__), name + SUFFIX), "rb") as file:
        return file.read()


def merge(*, plane_bytes: int, block_bytes: int, block_count: int) -> Launch:
    """How ``coldstart_merge_planes`` is launched for planes of so many bytes in so many blocks."""
    columns = -(-min(plane_bytes, block_bytes) // (_MERGE_THREADS * _MERGE_ITEMS))
    rows = min(block_count, _LARGEST_GRID_Y)
    return Launch("coldstart_merge_planes", (max(columns, 1), max(rows, 1)), _MERGE_THREADS)


def leaf_count(length_bytes: int) -> int:
    """Into how many leaves BLAKE3 cuts so many bytes: one at least."""
    return max(-(-length_bytes // LEAF_BYTES), 1)


def chaining_bytes(length_bytes: int) -> int:
    """The room in device memory that hashing so many bytes needs between its two kernels."""
    return -(-leaf_count(length_bytes) // GROUP_LEAVES) * CHAINING_BYTES


def leaves(length_bytes: int) -> Launch:
    """How ``coldstart_blake3_leaves`` is launched for so many bytes."""
    return Launch("coldstart_blake3_leaves", (-(-leaf_count(length_bytes) // _LEAF_THREADS), 1), _LEAF_THREADS)


def tree() -> Launch:
    """How ``coldstart_blake3_tree`` is launched, always."""
    return Launch("coldstart_blake3_tree", (1, 1), _TREE_THREADS)
