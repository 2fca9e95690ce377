"""What a stage has found so far, kept in a file: it is in the document too if the stage fails, or its time ends."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

SUFFIX = ".part"
_into: list[Path] = []


def keep_in(path: Path) -> None:
    """Name the file in which the stage's result will be: what comes before it goes beside it."""
    _into[:] = [part_of(path)]


def part_of(path: Path) -> Path:
    """Where what was found before the result is."""
    return path.with_name(path.name + SUFFIX)


def keep(found: Any) -> None:
    """This much is known by now."""
    for path in _into:
        unfinished = path.with_name(f"{path.name}.new")
        unfinished.write_text(json.dumps(found))
        unfinished.replace(path)
