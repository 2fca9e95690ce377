"""What the arrays of a state look like at a moment, and which of them differ later: a capture must not store changed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coldstart.capture_sources import kind_of
from coldstart.devices.device_bytes import DeviceBytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coldstart.frameworks import Survey


def marks_of(survey: Survey) -> dict[str, Any]:
    """What every array looks like now: the framework's version counter, or a hash of the bytes where it keeps none."""
    marks: dict[str, Any] = {}
    hashes: dict[int, str] = {}
    for found in survey.leaves:
        index = found.leaf.buffer
        if found.version is not None:
            marks[found.leaf.path] = found.version()
        elif index >= 0:
            if index not in hashes:
                hashes[index] = _hash(survey.storages[index].data)
            marks[found.leaf.path] = hashes[index]
    return marks


def changed_paths(survey: Survey, marks: Mapping[str, Any], kinds: Mapping[str, str]) -> tuple[str, ...]:
    """Paths of the weights that differ from ``marks``; what ``kinds`` declares as changing is left out."""
    hashes: dict[int, str] = {}
    changed = []
    for found in survey.leaves:
        mark, index = marks.get(found.leaf.path), found.leaf.buffer
        if mark is None or kind_of(found.leaf.path, kinds) != "weights":
            continue
        if found.version is not None:
            now: Any = found.version()
        else:
            now = hashes[index] = hashes.get(index) or _hash(survey.storages[index].data)
        if now != mark:
            changed.append(found.leaf.path)
    return tuple(changed)


def _hash(data: Any) -> str:
    from blake3 import blake3

    if isinstance(data, DeviceBytes):
        from coldstart.devices.cuda_hashes import hash_of_device

        return hash_of_device(data)
    return str(blake3(data).hexdigest())
