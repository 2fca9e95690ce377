"""The kernels that coldstart brings along, and how each is launched. Their sources lie in ``kernels/``, compiled to PTX.

PTX is compiled for the GPU by its driver, which keeps the result in its own cache.
"""

from __future__ import annotations

from ctypes import c_uint, c_ulonglong
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from coldstart.errors import DeviceError

if TYPE_CHECKING:
    from coldstart.devices.cuda_driver import Gpu, Stream

LEAF_BYTES = 1024
"""What BLAKE3 calls a chunk: the bytes below one leaf of its tree."""
CHAINING_BYTES = 32
"""What is kept of a leaf; and the length of a hash."""

_PTX = Path(__file__).parent / "kernels" / "kernels.ptx"
_NAMES = ("coldstart_merge_planes", "coldstart_blake3_leaves", "coldstart_blake3_tree")
_MERGE_THREADS, _LEAF_THREADS, _TREE_THREADS = 256, 128, 512
_STORE_BYTES = 16
_STORES_A_THREAD = 4
_MOST_ROWS = 65535


class Kernels:
    """The kernels, loaded on one GPU. Every call queues work on a stream and returns."""

    def __init__(self, gpu: Gpu) -> None:
        """Raises DeviceError where the driver does not take them."""
        try:
            image = _PTX.read_bytes()
        except OSError as error:
            raise DeviceError(f"coldstart's kernels are not installed: {error}; install coldstart-gpu again") from error
        functions = gpu.functions(image, _NAMES)
        self._merge, self._leaves, self._tree = (functions[name] for name in _NAMES)

    def merge_planes(
        self,
        stream: Stream,
        target: int,
        blocks: int,
        *,
        plane_bytes: int,
        block_bytes: int,
        block_count: int,
        item_bytes: int,
    ) -> None:
        """Put the bytes of all planes in their places in ``target``.

        ``blocks``: the device address of the addresses (uint64) of the raw blocks, plane after plane, ``block_count`` of each;
        every block has ``block_bytes``, the last of a plane what is left of its ``plane_bytes``.
        """
        stores = -(-min(block_bytes, plane_bytes) * item_bytes // _STORE_BYTES)
        grid = (max(1, -(-stores // (_MERGE_THREADS * _STORES_A_THREAD))), max(1, min(block_count, _MOST_ROWS)))
        arguments = (c_ulonglong(target), c_ulonglong(blocks), c_ulonglong(plane_bytes))
        sizes = (c_uint(block_bytes), c_uint(block_count), c_uint(item_bytes))
        stream.launch(self._merge, grid, _MERGE_THREADS, *arguments, *sizes)

    def blake3(self, stream: Stream, data: int, length_bytes: int, *, chaining: int, digest: int) -> None:
        """Put the BLAKE3 hash of a range (32 bytes) at ``digest``.

        ``chaining``: scratch of ``chaining_bytes(length_bytes)``. All are device addresses.
        """
        leaves = leaf_count(length_bytes)
        grid = (-(-leaves // _LEAF_THREADS), 1)
        stream.launch(
            self._leaves, grid, _LEAF_THREADS, c_ulonglong(data), c_ulonglong(length_bytes), c_ulonglong(chaining)
        )
        stream.launch(
            self._tree, (1, 1), _TREE_THREADS, c_ulonglong(chaining), c_ulonglong(leaves), c_ulonglong(digest)
        )


def leaf_count(length_bytes: int) -> int:
    """Leaves of BLAKE3's tree over so many bytes."""
    return max(1, -(-length_bytes // LEAF_BYTES))


def chaining_bytes(length_bytes: int) -> int:
    """Scratch for hashing so many bytes."""
    return CHAINING_BYTES * leaf_count(length_bytes)


@cache
def kernels_on(gpu: Gpu) -> Kernels:
    """The kernels on ``gpu``, loaded once. Raises DeviceError."""
    return Kernels(gpu)
