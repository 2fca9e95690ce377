"""What a snapshot's rung *arrays* needs to know of a state."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from coldstart.errors import UncapturableError
from coldstart.frameworks import torch as for_torch
from coldstart.frameworks import tree
from coldstart.frameworks.base import FoundLeaf, Survey
from coldstart.frameworks.memory import HOST, span_bytes, to_storages
from coldstart.frameworks.paths import shown
from coldstart.frameworks.walk import Walk
from coldstart.manifest import MAX_LEAVES, NO_BUFFER, Leaf

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.frameworks.base import Storage
    from coldstart.frameworks.memory import Extent, Form
    from coldstart.frameworks.walk import Spot


def survey(state: Any, *, gpu: int = HOST) -> Survey:
    """Find every array of ``state``, the memory behind them, and how to put others in their places.

    Nothing is copied, and nothing of the state is changed. A path (see ``frameworks.paths``) names each array; arrays
    without elements have ``leaf.buffer`` -1; an object at two paths is two leaves, the second ``same_as`` the first.
    ``gpu``: the number of the GPU that arrays may be on beside the host, -1 for none.

    Raises UncapturableError, with the path, for an array that cannot be put back exactly: one without bytes (on the
    meta device, offloaded), distributed, sparse, quantized, nested, of an unknown tensor subclass, of Python objects,
    or sitting where it could not be replaced.
    """
    walk = Walk(state)
    _check(walk.spots)
    forms = [spot.form() for spot in walk.spots]
    storages, positions = _memory(walk.spots, forms, gpu)
    leaves = [_found(spot, form, position) for spot, form, position in zip(walk.spots, forms, positions, strict=True)]
    encoded, obstacle = _encoded(walk)
    modules = {path: bool(module.training) for path, module in walk.modules.items()}
    return Survey(storages, tuple(leaves), modules, encoded, obstacle)


def _check(spots: Sequence[Spot]) -> None:
    for spot in spots:
        reason = spot.refusal()
        if reason:
            _refuse(spot.path, reason)
    if len(spots) > MAX_LEAVES:
        _refuse("$", f"holds {len(spots)} arrays, more than the {MAX_LEAVES} that the format allows")


def _refuse(path: str, reason: str) -> NoReturn:
    raise UncapturableError(
        f"{shown(path)} {reason}; the start keeps to rung files: load runs again from restored files", path=path
    )


def _memory(
    spots: Sequence[Spot], forms: Sequence[Form], gpu: int
) -> tuple[tuple[Storage, ...], list[tuple[int, int]]]:
    """The storages, and for each spot the index of its own (or NO_BUFFER) and its offset there in bytes."""
    extents: list[Extent] = []
    owned: list[int] = []
    for index, (spot, form) in enumerate(zip(spots, forms, strict=True)):
        length_bytes = span_bytes(form)
        if length_bytes:
            extents.append(_on_device(spot, spot.extent(length_bytes), gpu))
            owned.append(index)
    storages, found = to_storages(extents)
    positions = [(NO_BUFFER, 0)] * len(spots)
    for index, extent, position in zip(owned, extents, found, strict=True):
        if position[1] % extent.alignment_bytes:
            _refuse(spots[index].path, "shares its memory with an array of another item size, at an odd distance")
        positions[index] = position
    return storages, positions


def _on_device(spot: Spot, extent: Extent, gpu: int) -> Extent:
    if extent.gpu not in (HOST, gpu):
        place = "the cpu" if gpu == HOST else f"GPU {gpu}"
        _refuse(spot.path, f"is on GPU {extent.gpu}, and this start's state belongs on {place} (COLDSTART_DEVICE)")
    return extent


def _version(tensors: Sequence[Any]) -> int:
    """One counter for a part and its wrappers: a write through a wrapper may raise its own and not its part's."""
    return sum(map(for_torch.version, tensors))


def _found(spot: Spot, form: Form, position: tuple[int, int]) -> FoundLeaf:
    version, requires_grad = None, False
    if spot.framework == "torch":
        tensors = [wrapper.original for wrapper in spot.wrappers] + [spot.array]
        version = None if any(map(for_torch.has_no_version, tensors)) else partial(_version, tensors)
        requires_grad = bool(tensors[0].requires_grad)
    leaf = Leaf(
        path=spot.path,
        framework=spot.framework,
        role=spot.role,
        dtype=form.dtype,
        item_bytes=form.item_bytes,
        shape=form.shape,
        strides=form.strides,
        buffer=position[0],
        offset_bytes=position[1],
        requires_grad=requires_grad,
        same_as=spot.same_as,
    )
    return FoundLeaf(leaf, spot.array, spot.place, version)


def _encoded(walk: Walk) -> tuple[Any, str]:
    paths = {id(spot.array): spot.path for spot in walk.spots if not spot.same_as and not spot.wrappers}
    try:
        return tree.encode(walk.state, paths), ""
    except UncapturableError as error:
        return None, str(error)
