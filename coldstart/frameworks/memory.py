"""The memory behind a state's arrays: which of them share bytes, and the runs of bytes to store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.frameworks.base import Storage

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

SLACK_BYTES = 4096
"""Views of one allocation stay in one storage when no more than this lies between them: padding, not another array."""


HOST = -1
"""In place of a GPU's number: memory of the host."""


class Form(NamedTuple):
    """What an array looks like. ``strides`` are in items."""

    dtype: str
    item_bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Extent(NamedTuple):
    """The bytes that an array with elements uses.

    ``allocation`` is equal for views of one allocation, which starts at ``base_address`` or before; ``owner`` keeps the
    bytes alive; ``alignment_bytes`` is what the array's offset in its storage must be a multiple of. ``gpu`` is the number of
    the GPU whose memory it is, -1 for the host's: no address is of both.
    """

    address: int
    length_bytes: int
    base_address: int
    allocation: Hashable
    alignment_bytes: int
    owner: Any
    gpu: int = HOST

    @property
    def end(self) -> int:
        """Address of the first byte behind it."""
        return self.address + self.length_bytes


class _Window:
    """Memory as numpy sees it by ``__array_interface__``: the array holds on to this object, and so to the owners."""

    def __init__(self, address: int, length_bytes: int, owners: tuple[Any, ...]) -> None:
        self.owners = owners
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (length_bytes,),
            "data": (address, True),  # read-only: a capture reads
        }


def span_bytes(form: Form) -> int:
    """Bytes from the first element to the end of the last one; 0 without elements."""
    if 0 in form.shape:
        return 0
    last_item = sum((size - 1) * stride for size, stride in zip(form.shape, form.strides, strict=True))
    return (last_item + 1) * form.item_bytes


def to_storages(extents: Sequence[Extent]) -> tuple[tuple[Storage, ...], list[tuple[int, int]]]:
    """Storages, in the order of their first extent, and for each extent its storage's index and its offset in bytes.

    Extents that overlap share a storage; so do near neighbours of one allocation, so that what was laid out together
    stays together. Mere neighbours in memory do not: that would be an accident of the allocator.
    """
    groups = _groups(extents)
    groups.sort(key=min)
    storages, positions = [], [(0, 0)] * len(extents)
    for number, group in enumerate(groups):
        members = [extents[index] for index in group]
        start = _aligned_start(members)
        length_bytes = max(extent.end for extent in members) - start
        storages.append(Storage(start, length_bytes, _bytes_at(start, length_bytes, members)))
        for index in group:
            positions[index] = (number, extents[index].address - start)
    return tuple(storages), positions


def _groups(extents: Sequence[Extent]) -> list[list[int]]:
    groups: list[list[int]] = []
    end, allocations = -1, set[Any]()
    for index in sorted(range(len(extents)), key=lambda index: extents[index].address):
        extent = extents[index]
        gap = extent.address - end
        if gap < 0 or (extent.allocation in allocations and gap <= SLACK_BYTES):
            groups[-1].append(index)
            end = max(end, extent.end)
        else:
            groups.append([index])
            end, allocations = extent.end, set()
        allocations.add(extent.allocation)
    return groups


def _aligned_start(members: Iterable[Extent]) -> int:
    """The first address in use, or a little before it, where the offset of the largest item comes out even."""
    members = list(members)
    start = min(extent.address for extent in members)
    largest = max(members, key=lambda extent: extent.alignment_bytes)
    earlier = start - (start - largest.address) % largest.alignment_bytes
    return earlier if earlier >= min(extent.base_address for extent in members) else start


def _bytes_at(address: int, length_bytes: int, members: Sequence[Extent]) -> Any:
    owners = tuple(extent.owner for extent in members)
    if members[0].gpu != HOST:
        from coldstart.devices.device_bytes import DeviceBytes

        return DeviceBytes(address, length_bytes, members[0].gpu, owners)
    import numpy as np

    return np.asarray(_Window(address, length_bytes, owners))
