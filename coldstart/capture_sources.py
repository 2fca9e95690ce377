"""What a capture stores, item by item, and the way to the bytes of each: arrays of the state, constants of a program, files.

Each item says who needs it (its segment's consumer): every start, one with the program, one without, or one that loads.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import others, plan
from coldstart.caches import WEIGHT_SUFFIXES, FileSource
from coldstart.devices.device_bytes import DeviceBytes
from coldstart.errors import CaptureError, StateChangedError
from coldstart.manifest import MAX_ITEM_BYTES, NO_BUFFER
from coldstart.programs.record import consumer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coldstart.capture import Capture
    from coldstart.manifest import Leaf
    from coldstart.plan import Item


class Source(NamedTuple):
    """An item of the layout with the way to its bytes: ``read(begin, end)`` gives a view of them."""

    item: Item
    read: Callable[[int, int], memoryview]
    on_device: DeviceBytes | None = None
    """The bytes, where they are in a GPU's memory; ``read`` then copies them out one by one."""


def sources_of(capture: Capture) -> list[Source]:
    """All items of a capture, files last. Raises CaptureError for a file that went away."""
    return _array_sources(capture) + _file_sources(capture)


def _array_sources(capture: Capture) -> list[Source]:
    if capture.survey is None:
        return _constant_sources(capture)
    leaves_of: dict[int, Any] = {}
    for found in capture.survey.leaves:
        if found.leaf.buffer != NO_BUFFER:
            leaves_of.setdefault(found.leaf.buffer, found.leaf)
    sources = []
    both = _storages_of_both(capture)
    for index, storage in enumerate(capture.survey.storages):
        leaf = leaves_of[index]
        item = plan.Item(
            leaf.path,
            storage.length_bytes,
            _plane_bytes(leaf),
            kind_of(leaf.path, capture.kinds),
            plan.BOTH if index in both else plan.EAGER,
            is_file=False,
            on_device=isinstance(storage.data, DeviceBytes),
        )
        sources.append(_array_source(item, storage.data))
    return sources + _constant_sources(capture)


def _array_source(item: Item, data: Any) -> Source:
    if isinstance(data, DeviceBytes):
        return Source(item, data.read, data)
    return Source(item, partial(_slice, memoryview(data)))


def _storages_of_both(capture: Capture) -> set[int]:
    """The storages that a start with a program needs too: with constants of one, or with arrays around what it replaces."""
    assert capture.survey is not None
    if capture.program is None:
        return set()
    found = set(capture.program.shared)
    kept_names = others.shared_buffers(capture.parent, capture.program.program.id) if is_replaced(capture) else set()
    for each in capture.survey.leaves:
        leaf = each.leaf
        if leaf.buffer != NO_BUFFER and (
            leaf.path in kept_names or (capture.outside is not None and capture.outside(leaf.path))
        ):
            found.add(leaf.buffer)
    return found


def _constant_sources(capture: Capture) -> list[Source]:
    """The constants of the program that are no arrays of the state."""
    if capture.program is None:
        return []
    consumer = consumer_of(capture.program.program.id)
    return [
        Source(
            plan.Item(
                block.name,
                len(block.data),
                block.item_bytes,
                block.kind,
                consumer,
                on_device=capture.device_type != "cpu",
            ),
            partial(_slice, memoryview(block.data)),
        )
        for block in capture.program.blocks
    ]


def _plane_bytes(leaf: Leaf) -> int:
    """The item size that a segment has: long numpy texts are no items that a codec could split, so they count as bytes."""
    return leaf.item_bytes if leaf.item_bytes <= MAX_ITEM_BYTES else 1


def _slice(view: memoryview, begin: int, end: int) -> memoryview:
    return view[begin:end]


def kind_of(path: str, kinds: Mapping[str, str]) -> str:
    """The kind that ``kinds`` declares for ``path`` or for the nearest place above it, else ``weights``."""
    prefix = max((prefix for prefix in kinds if _is_at_or_below(path, prefix)), key=len, default=None)
    return "weights" if prefix is None else kinds[prefix]


def _is_at_or_below(path: str, prefix: str) -> bool:
    """``layers.1`` is above ``layers.1.bias`` and ``layers.1[0]``, and not above ``layers.10``."""
    return path.startswith(prefix) and (path == prefix or prefix.endswith((".", "[")) or path[len(prefix)] in ".[")


def _file_sources(capture: Capture) -> list[Source]:
    sources = []
    for file in files_of(capture):
        try:
            length_bytes = os.stat(file.path).st_size
        except OSError as error:
            raise CaptureError(
                f"cannot read {file.path}, which the snapshot should hold: {error}", snapshot=capture.name
            ) from error
        item = plan.Item(
            plan.file_item_name(file.root, file.name), length_bytes, 1, "other", _reader_of(file, capture), is_file=True
        )
        sources.append(Source(item, _file_reader(file.path, length_bytes, capture.name)))
    return sources


def files_of(capture: Capture) -> list[FileSource]:
    """The files of a capture: those of the state, those of its program, then kernel caches."""
    files = list(capture.files)
    if capture.program is not None:
        root = consumer_of(capture.program.program.id)
        files += [FileSource(root, name, str(path)) for name, path in capture.program.files.items()]
    if capture.kernels is not None:
        files += [FileSource(capture.kernels.root, name, path) for name, path in capture.kernels.files.items()]
    return files


def _reader_of(file: FileSource, capture: Capture) -> str:
    """The consumer of a file's segment. A start with a program reads no weights from files: its constants are there."""
    if capture.kernels is not None and file.root == capture.kernels.root:
        return file.root
    if capture.program is None:
        return plan.FILES
    if file.root == consumer_of(capture.program.program.id):
        return file.root
    return plan.LOAD if Path(file.name).suffix in WEIGHT_SUFFIXES else plan.FILES


def _file_reader(path: str, length_bytes: int, snapshot: str) -> Callable[[int, int], memoryview]:
    def read(begin: int, end: int) -> memoryview:
        try:
            with open(path, "rb") as file:
                data = os.pread(file.fileno(), end - begin, begin)
                now_bytes = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise CaptureError(
                f"cannot read {path}, which the snapshot should hold: {error}", snapshot=snapshot
            ) from error
        if now_bytes != length_bytes or len(data) != end - begin:
            raise StateChangedError(
                f"{path} had {length_bytes} bytes and has {now_bytes} while it is captured", snapshot=snapshot
            )
        return memoryview(data)

    return read


def is_replaced(capture: Capture) -> bool:
    """Whether the parent is the generation that this one replaces, and not one of another key."""
    parent = capture.parent
    return parent is not None and parent.key == capture.key and parent.generation == capture.generation - 1
