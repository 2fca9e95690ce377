"""The caches that are kept: their variables, which of their files are worth keeping, and what counts as one entry."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import ManifestError
from coldstart.manifest import check_file_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

KERNELS_ROOT = "kernels_"
"""How the roots of kernel caches begin."""


class Kind(NamedTuple):
    """A library's cache: a folder ``name`` below the private one, which ``variable`` points to."""

    name: str
    variable: str


INDUCTOR = Kind("inductor", "TORCHINDUCTOR_CACHE_DIR")
TRITON = Kind("triton", "TRITON_CACHE_DIR")
CUPY = Kind("cupy", "CUPY_CACHE_DIR")
DRIVER = Kind("driver", "CUDA_CACHE_PATH")
KINDS = (INDUCTOR, TRITON, CUPY, DRIVER)

COMPILER_SWITCH = "TORCHINDUCTOR_VEC_ISA_OK"
SWITCHES: Mapping[str, tuple[Kind, str]] = {
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": (INDUCTOR, "0"),
    COMPILER_SWITCH: (INDUCTOR, "1"),
    "CUDA_CACHE_MAXSIZE": (DRIVER, str(1 << 30)),
}
"""What else is set where the user has not, with the cache that it belongs to: with a user's own folder it would miss all.

Precompiled headers lie in /tmp, 156 MB, and are made even where every kernel is in the cache: six seconds on a fresh machine.
Which vector instructions the compiler takes is tried out in every process, by six more of them: 1.5 s, where it is known
(``compiler``). The driver drops its oldest kernels beyond a size that was 256 MiB once.
"""

GROUP_PREFIX = "__grp__"
"""How Triton's files begin that list other files, by their absolute paths."""

_PASSING = re.compile(r"\.|tmp\.pid_|tmp[a-z0-9_]{8}\Z")
"""How names begin of what a library is writing just now; the names of entries are longer than Python's temporary ones."""
_PASSING_SUFFIXES = (".lock", ".tmp", ".gch", ".pyc")
_PASSING_NAMES = frozenset({"lock", "locks", "__pycache__"})
_KEYED = ("fxgraph", "aotautograd")
"""Folders of Inductor's whose entries are ``<two letters>/<key>/<hash of a pickle>``: the hash differs each time."""


def names_in(folder: str, kinds: Iterable[str]) -> dict[str, str]:
    """The files worth keeping below ``folder``: name in a snapshot -> path. None is a link, none passes away soon."""
    found = {f"{kind}/{name}": path for kind in kinds for name, path in _files(f"{folder}/{kind}")}
    if not any(name.startswith(f"{DRIVER.name}/") for name in found):
        return found
    return _with_driver_set(found)


def _files(folder: str) -> Iterator[tuple[str, str]]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _passes_away(name))
        below = os.path.relpath(parent, folder)
        for file in sorted(files):
            path = os.path.join(parent, file)
            name = file if below == "." else f"{below}/{file}"
            if not _passes_away(file) and not os.path.islink(path) and _is_clean(name):
                yield name, path


def _passes_away(part: str) -> bool:
    return part in _PASSING_NAMES or bool(_PASSING.match(part)) or part.endswith(_PASSING_SUFFIXES)


def _is_clean(name: str) -> bool:
    try:
        check_file_name(name)
    except ManifestError:
        return False
    return True


def _with_driver_set(found: Mapping[str, str]) -> dict[str, str]:
    """The driver's files under the name of their set: an index ties them together, so a set is kept and placed whole."""
    from zlib import crc32

    prefix = f"{DRIVER.name}/"
    members = sorted(name for name in found if name.startswith(prefix))
    identity = f"{crc32(chr(10).join(members).encode()):08x}"
    renamed = {f"{prefix}{identity}/{name[len(prefix) :]}": found[name] for name in members}
    return {**{name: path for name, path in found.items() if not name.startswith(prefix)}, **renamed}


def entry_of(name: str) -> str:
    """What a file belongs to: two files of one entry say the same, whatever is in them."""
    kind, *parts = name.split("/")
    if kind in (TRITON.name, DRIVER.name):
        return f"{kind}/{parts[0]}"
    if kind == INDUCTOR.name and parts[0] in _KEYED:
        return "/".join((kind, *parts[:3]))
    return name


def novel(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Those of ``names`` that belong to no entry of the ``known`` ones, sorted."""
    entries = set(map(entry_of, known))
    return sorted(name for name in names if entry_of(name) not in entries)
