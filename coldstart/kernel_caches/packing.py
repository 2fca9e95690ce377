"""Packing what a start has added to its kernel caches, for a capture: copies, since the libraries go on writing.

Added is what belongs to no entry that the snapshot has for this platform, by its name alone: the bytes of an entry differ
from one compilation to the next. What a list of Triton's says of this machine is taken out of it.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import ManifestError
from coldstart.kernel_caches.kinds import GROUP_PREFIX, names_in, novel
from coldstart.kernel_caches.placing import without_places
from coldstart.kernel_caches.record import Record, record_of, to_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from coldstart.kernel_caches.home import Kernels
    from coldstart.manifest import Manifest

MOST_FILES = 8192
MOST_BYTES = 1 << 30
"""Files and bytes of one platform: more of them would take longer to fetch than to do without. What is beyond is left out."""
MOST_ROUNDS = 8
"""Generations that add kernels of one platform to one key's: who compiles something else at every start is not followed."""


SETTLED_SECONDS = 2.0
"""C++ compilers write libraries where they will lie: one that another worker of the host is writing is left to it."""


class Packed(NamedTuple):
    """Additions as files to be captured: name -> path. ``record``: what the manifest says of the platform then.

    ``alone``: the generation is its parent with these beside it. ``left_out``: additions that there was no room for.
    """

    root: str
    files: Mapping[str, str]
    record: str
    alone: bool
    left_out: int


def additions(kernels: Kernels, known: frozenset[str], rounds: int) -> list[str]:
    """Names of what is in the folder now and in no entry of the ``known`` names; none after so many ``rounds``."""
    if kernels.obstacle or rounds >= MOST_ROUNDS or kernels.capture_distrust():
        return []
    return novel(names_in(kernels.folder, kernels.kinds), known)


@contextmanager
def packed(
    kernels: Kernels | None, parent: Manifest | None, generation: int, *, alone: bool = False
) -> Iterator[Packed | None]:
    """What there is to add to ``parent`` (None: to nothing), while the block runs; None where there is nothing."""
    if kernels is None:
        yield None
        return
    held = [entry for entry in parent.files if entry.root == kernels.root] if parent is not None else []
    rounds = record_of(parent, kernels.root).rounds if parent is not None else 0
    names = additions(kernels, frozenset(entry.name for entry in held), rounds)
    if not names:
        yield None
        return
    from tempfile import TemporaryDirectory  # 10 ms that only a capture pays

    with TemporaryDirectory(prefix="coldstart-kernels-") as target:
        room = (MOST_FILES - len(held), MOST_BYTES - sum(entry.length_bytes for entry in held))
        files = _copies(kernels, names, target, *room)
        record = to_text(Record(kernels.facts, generation, rounds + 1))
        yield Packed(kernels.root, files, record, alone, len(names) - len(files)) if files else None


def _copies(kernels: Kernels, names: list[str], target: str, most_files: int, most_bytes: int) -> dict[str, str]:
    """Copy what fits, in the order of the names; what went away meanwhile, or cannot be moved elsewhere, is left out."""
    paths = names_in(kernels.folder, kernels.kinds)
    found: dict[str, str] = {}
    for name in _settled(names, paths):
        try:
            with open(paths[name], "rb") as file:
                data = file.read(most_bytes + 1)
            if os.path.basename(name).startswith(GROUP_PREFIX):
                data = without_places(data, f"{kernels.folder}/")
        except (OSError, KeyError, ManifestError):
            continue
        if len(found) == most_files or len(data) > most_bytes:
            continue
        most_bytes -= len(data)
        copy = f"{target}/{len(found)}"
        with open(copy, "wb") as file:
            file.write(data)
        os.chmod(copy, 0o700 if os.access(paths[name], os.X_OK) else 0o600)
        found[name] = copy
    return found


def _settled(names: list[str], paths: Mapping[str, str]) -> list[str]:
    """The names of files that nobody is writing to. Waits for libraries of a moment ago; other files appear whole."""
    before = {name: _state(paths.get(name, "")) for name in names if name.endswith(".so")}
    if any(time.time_ns() - changed_ns < SETTLED_SECONDS * 1e9 for _, changed_ns in before.values()):
        time.sleep(SETTLED_SECONDS)
    return [name for name in names if name not in before or before[name] == _state(paths.get(name, ""))]


def _state(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (-1, 0)
    return (status.st_size, status.st_mtime_ns)
