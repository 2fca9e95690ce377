"""Arrays of a state that are views of pools: told apart from those that a snapshot holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from coldstart.frameworks.fresh import address_of
from coldstart.frameworks.memory import span_bytes
from coldstart.frameworks.paths import shown
from coldstart.manifest import NO_BUFFER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from coldstart.frameworks.base import FoundLeaf, Survey
    from coldstart.frameworks.memory import Form


class Memory(NamedTuple):
    """The memory of a pool that is an array: from ``address`` on, and what the whole of it looks like."""

    name: str
    address: int
    framework: str
    form: Form

    @classmethod
    def of(cls, name: str, framework: str, form: Form, array: Any) -> Memory:
        """The memory of ``array``, which is the pool."""
        return cls(name, address_of(array), framework, form)

    def holds(self, address: int) -> bool:
        """Whether the byte at ``address`` is the pool's."""
        return self.address <= address < self.address + span_bytes(self.form)


def without_pools(survey: Survey, pools: Sequence[Memory]) -> tuple[Survey, Mapping[str, str]]:
    """The survey without the arrays that are memory of ``pools``; and their paths, each with its pool's name.

    A tree that has only a part of a pool at some place cannot be made again without ``build``: the survey says so.
    """
    owners = {
        index: pool for index, storage in enumerate(survey.storages) for pool in pools if pool.holds(storage.address)
    }
    if not owners:
        return survey, {}
    kept = [index for index in range(len(survey.storages)) if index not in owners]
    places = {NO_BUFFER: NO_BUFFER, **{old: new for new, old in enumerate(kept)}}
    found = [leaf for leaf in survey.leaves if leaf.leaf.buffer in owners]
    left = survey._replace(
        storages=tuple(survey.storages[index] for index in kept),
        leaves=tuple(
            each._replace(leaf=each.leaf._replace(buffer=places[each.leaf.buffer]))
            for each in survey.leaves
            if each.leaf.buffer in places
        ),
    )
    partial = next((each for each in found if not _is_whole(each, owners[each.leaf.buffer])), None)
    if partial is not None and survey.tree is not None:
        name = owners[partial.leaf.buffer].name
        left = left._replace(tree=None, tree_obstacle=f"{shown(partial.leaf.path)} is a part of pool {name!r}")
    return left, {each.leaf.path: owners[each.leaf.buffer].name for each in found}


def _is_whole(each: FoundLeaf, pool: Memory) -> bool:
    leaf, form = each.leaf, pool.form
    looks = (leaf.framework, leaf.role, leaf.dtype, leaf.shape, leaf.strides, leaf.requires_grad)
    role = "tensor" if pool.framework == "torch" else "array"
    return looks == (pool.framework, role, form.dtype, form.shape, form.strides, False) and not leaf.offset_bytes
