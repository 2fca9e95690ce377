r"""What a manifest says of each platform's kernel caches, in its ``platform``: the facts, and how they came together.

::

    "platform": {"kernels_0f3a...": "{\"facts\": {...}, \"generation\": 7, \"rounds\": 2}"}
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from coldstart.kernel_caches.kinds import KERNELS_ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coldstart.manifest import Manifest


class Record(NamedTuple):
    """``generation`` was the last to add kernels of this platform, ``rounds`` how many have."""

    facts: Mapping[str, str]
    generation: int
    rounds: int


def roots_of(manifest: Manifest) -> list[str]:
    """The platforms whose caches a generation holds, the newest first."""
    roots = {entry.root for entry in manifest.files if entry.root.startswith(KERNELS_ROOT)}
    return sorted(roots, key=lambda root: (-record_of(manifest, root).generation, root))


def record_of(manifest: Manifest, root: str) -> Record:
    """The record of a platform's caches; an empty one where it is missing or damaged."""
    try:
        document = json.loads(manifest.platform.get(root, ""))
        facts = {str(name): str(value) for name, value in document["facts"].items()}
        return Record(facts, int(document["generation"]), int(document["rounds"]))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return Record({}, 0, 0)


def to_text(record: Record) -> str:
    """The record as a manifest holds it."""
    return json.dumps({**record._asdict(), "facts": dict(record.facts)}, sort_keys=True)
