"""The kernels that coldstart brings along, loaded on a GPU: each call queues work on a stream and returns."""

from __future__ import annotations

from ctypes import c_uint, c_ulonglong
from functools import cache, cached_property
from typing import TYPE_CHECKING, Literal

from coldstart.devices import kernels

if TYPE_CHECKING:
    from ctypes import _SimpleCData

    from coldstart.devices.cuda_driver import Gpu, Stream


class Kernels:
    """The kernels of one GPU. Their modules are compiled by its driver when one of their kernels is first used."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

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
        """Put the bytes of all planes in their places in ``target``. Raises DeviceError.

        ``blocks``: the device address of the addresses (uint64) of the raw blocks, plane after plane, ``block_count`` of each;
        every block has ``block_bytes``, the last of a plane what is left of its ``plane_bytes``.
        """
        launch = kernels.merge(plane_bytes=plane_bytes, block_bytes=block_bytes, block_count=block_count)
        places = (c_ulonglong(target), c_ulonglong(blocks), c_ulonglong(plane_bytes))
        sizes = (c_uint(block_bytes), c_uint(block_count), c_uint(item_bytes))
        self._launch(stream, self._planes, launch, *places, *sizes)

    def blake3(self, stream: Stream, data: int, length_bytes: int, *, chaining: int, digest: int) -> None:
        """Put the BLAKE3 hash of a range (32 bytes) at ``digest``. Raises DeviceError.

        ``chaining``: scratch of ``kernels.chaining_bytes(length_bytes)``. All are device addresses.
        """
        leaves = c_ulonglong(kernels.leaf_count(length_bytes))
        scratch = c_ulonglong(chaining)
        launch = kernels.leaves(length_bytes)
        self._launch(stream, self._hashing, launch, c_ulonglong(data), c_ulonglong(length_bytes), scratch)
        self._launch(stream, self._hashing, kernels.tree(), scratch, leaves, c_ulonglong(digest))

    def open_planes(self) -> None:
        """Have the driver compile what ``merge_planes`` needs now, and not with the first chunk. Raises DeviceError."""
        self._planes  # noqa: B018

    def open_hashing(self) -> None:
        """The same for ``blake3``."""
        self._hashing  # noqa: B018

    @cached_property
    def _planes(self) -> dict[str, int]:
        return self._load(kernels.PLANES, "coldstart_merge_planes")

    @cached_property
    def _hashing(self) -> dict[str, int]:
        return self._load(kernels.BLAKE3, "coldstart_blake3_leaves", "coldstart_blake3_tree")

    def _load(self, module: Literal["planes", "blake3"], *names: str) -> dict[str, int]:
        return self._gpu.functions(kernels.module(module), names)

    def _launch(
        self, stream: Stream, loaded: dict[str, int], launch: kernels.Launch, *arguments: _SimpleCData[int]
    ) -> None:
        stream.launch(loaded[launch.kernel], launch.grid, launch.threads, *arguments)


@cache
def kernels_on(gpu: Gpu) -> Kernels:
    """The kernels of ``gpu``, one instance for the process."""
    return Kernels(gpu)
