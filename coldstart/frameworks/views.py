"""Arrays that are views of a snapshot's buffers, as the leaves of a manifest describe them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coldstart.errors import ManifestError
from coldstart.frameworks import cupy as for_cupy
from coldstart.frameworks import numpy as for_numpy
from coldstart.frameworks import torch as for_torch
from coldstart.manifest import NO_BUFFER, Leaf

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Views:
    """Makes arrays over buffers. Each buffer is asked for once; the arrays keep it alive."""

    def __init__(self, buffer_array: Callable[[int], Any]) -> None:
        self._buffer_array = buffer_array
        self._buffers: dict[int, Any] = {NO_BUFFER: None}
        self._torch_storages: dict[int, Any] = {NO_BUFFER: None}

    def plain(self, leaf: Leaf) -> Any:
        """An array of numpy or cupy, or a tensor that is no Parameter and requires no gradient. Raises ManifestError."""
        if leaf.buffer == NO_BUFFER and 0 not in leaf.shape:
            raise ManifestError(f"leaf {leaf.path!r} has elements and no buffer")
        if leaf.framework == "torch":
            return for_torch.view(leaf, self._torch_storage(leaf.buffer))
        if leaf.framework == "numpy":
            return for_numpy.view(leaf, self._buffer(leaf.buffer))
        if leaf.framework == "cupy":
            return for_cupy.view(leaf, self._buffer(leaf.buffer))
        raise ManifestError(f"leaf {leaf.path!r} is an array of {leaf.framework!r}, which this coldstart does not know")

    def finished(self, leaf: Leaf) -> Any:
        """The array as it was in the state: a Parameter where it was one. Raises ManifestError."""
        array = self.plain(leaf)
        return for_torch.finish(leaf, array) if leaf.framework == "torch" else array

    def _buffer(self, index: int) -> Any:
        if index not in self._buffers:
            self._buffers[index] = self._buffer_array(index)
        return self._buffers[index]

    def _torch_storage(self, index: int) -> Any:
        if index not in self._torch_storages:
            self._torch_storages[index] = for_torch.storage_of(self._buffer(index))
        return self._torch_storages[index]


def same_as(leaf: Leaf, leaves: Mapping[str, Leaf]) -> Leaf:
    """The leaf that holds the very object that is at ``leaf``, ``leaf`` itself for most. Raises ManifestError."""
    if not leaf.same_as:
        return leaf
    first = leaves.get(leaf.same_as)
    if first is None or first.same_as:
        raise ManifestError(f"leaf {leaf.path!r} is the same as {leaf.same_as!r}, which is no leaf of its own")
    if _array_of(leaf) != _array_of(first):
        raise ManifestError(f"leaf {leaf.path!r} is the same as {leaf.same_as!r} and differs from it")
    return first


def _array_of(leaf: Leaf) -> tuple[Any, ...]:
    # Without role and gradient: they are the holder's, and one holder may be a module, the other a tensor subclass.
    return leaf.framework, leaf.dtype, leaf.item_bytes, leaf.shape, leaf.strides, leaf.buffer, leaf.offset_bytes


def arrays(leaves: Sequence[Leaf], buffer_array: Callable[[int], Any]) -> dict[str, Any]:
    """The arrays that ``leaves`` describe, by path, as views of the buffers and never copies.

    ``buffer_array(i)`` is a writable uint8 array over buffer ``i``. A leaf that is ``same_as`` another is the very same
    object. Raises ManifestError for leaves that no capture writes, StateMismatchError where torch is missing.
    """
    views = Views(buffer_array)
    by_path = {leaf.path: leaf for leaf in leaves}
    made: dict[str, Any] = {}
    for leaf in leaves:
        first = same_as(leaf, by_path)
        if first.path not in made:
            made[first.path] = views.finished(first)
        made[leaf.path] = made[first.path]
    return made
