"""What a survey of a state finds: its arrays, the memory that they are views of, and how to put other arrays there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coldstart.manifest import Leaf


class Storage(NamedTuple):
    """A run of memory that leaves are views of, trimmed to what they use.

    ``address`` is the device address of the first byte (an identity while the owner lives); ``data`` a one-dimensional
    uint8 array over the run (numpy for host memory, ``DeviceBytes`` for a GPU's), a view and never a copy.
    """

    address: int
    length_bytes: int
    data: Any


class FoundLeaf(NamedTuple):
    """An array of a state.

    ``leaf.buffer`` is an index into ``Survey.storages``. ``array`` is the object itself, ``place(other)`` puts another
    object at its path, ``version()`` reads a counter that in-place writes raise (None where the framework keeps none).
    """

    leaf: Leaf
    array: Any
    place: Callable[[Any], None]
    version: Callable[[], int] | None


class Survey(NamedTuple):
    """All that a snapshot's rung *arrays* needs to know of a state.

    ``tree`` is the encoded shape of a state that is nothing but a tree of arrays and plain values (see
    ``frameworks.tree``), and None when anything else is in it, so that only ``build`` can make it again; ``tree_obstacle``
    then says what and where. ``modules`` maps the path of every torch module to its training mode.
    """

    storages: tuple[Storage, ...]
    leaves: tuple[FoundLeaf, ...]
    modules: Mapping[str, bool]
    tree: Any
    tree_obstacle: str
