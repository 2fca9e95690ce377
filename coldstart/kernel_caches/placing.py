"""Putting the kernel caches of a snapshot into the private folder: beside what is there, and never over it.

Names come from a manifest, so that none leads out of the folder; a link in the folder is not followed. A file that cannot
be written is left out: the library compiles what it does not find.
"""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import ManifestError
from coldstart.kernel_caches.kinds import DRIVER, GROUP_PREFIX
from coldstart.kernel_caches.platform import difference
from coldstart.kernel_caches.record import record_of, roots_of
from coldstart.manifest import check_file_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from coldstart.devices.base import Arena
    from coldstart.kernel_caches.home import Kernels
    from coldstart.manifest import FileEntry, Manifest


class Placed(NamedTuple):
    """Kernel caches of a snapshot in a start: what is in place now, and why what is there is not used, "" if it is.

    ``names``: all that the snapshot has for this platform, in place or not; ``rounds``: generations that added to it.
    """

    files: int
    total_bytes: int
    obstacle: str
    names: frozenset[str]
    rounds: int


NOTHING = Placed(0, 0, "", frozenset(), 0)


def place_kernels(
    kernels: Kernels | None, whole: Manifest, narrowed: Manifest, arena: Arena, unread: str = ""
) -> Placed:
    """Put the caches that ``narrowed`` holds of the generation ``whole`` in place, from its ``arena``. Never raises OSError.

    ``unread``: why it holds none, where they could not be fetched.
    """
    roots = roots_of(whole)
    if kernels is None or not roots:
        return NOTHING
    if not kernels.wanted:
        return NOTHING._replace(obstacle=kernels.obstacle or kernels.distrust)
    if kernels.root not in roots:
        theirs = record_of(whole, roots[0]).facts
        return NOTHING._replace(obstacle=f"they are of another platform ({difference(kernels.facts, theirs)})")
    entries = [entry for entry in narrowed.files if entry.root == kernels.root]
    placer = _Placer(kernels)
    for entry in _one_driver_set(entries):
        placer.place(entry, arena)
    names = frozenset(entry.name for entry in whole.files if entry.root == kernels.root)
    obstacle = unread or "; ".join(sorted(placer.problems))
    return Placed(placer.files, placer.total_bytes, obstacle, names, record_of(whole, kernels.root).rounds)


def _one_driver_set(entries: Iterable[FileEntry]) -> list[FileEntry]:
    """All but the driver's older sets: the newest is the first in a manifest."""
    newest, kept = "", []
    for entry in entries:
        kind, _, rest = entry.name.partition("/")
        identity = rest.partition("/")[0]
        if kind == DRIVER.name:
            newest = newest or identity
            if identity != newest:
                continue
        kept.append(entry)
    return kept


class _Placer:
    def __init__(self, kernels: Kernels) -> None:
        self.files = 0
        self.total_bytes = 0
        self.problems: set[str] = set()
        self._kernels = kernels
        self._folders: set[str] = set()
        self._has_driver_set = any(name.startswith(f"{DRIVER.name}/") for name in kernels.before)

    def place(self, entry: FileEntry, arena: Arena) -> None:
        """Write the file, unless there is one."""
        kind, _, rest = entry.name.partition("/")
        if kind not in self._kernels.kinds or not rest:
            return
        if kind == DRIVER.name:
            rest = rest.partition("/")[2]
            if self._has_driver_set or not rest:
                return
        path = f"{self._kernels.folder}/{kind}/{rest}"
        try:
            self._prepare(os.path.dirname(path))
            if not os.path.lexists(path):
                begin, end = entry.offset_bytes, entry.offset_bytes + entry.length_bytes
                self._write(path, bytes(arena.readable(entry.segment)[begin:end]), entry.mode)
        except (OSError, ManifestError) as error:
            self.problems.add(f"some of them could not be put in place: {error}")
            return
        self.files += 1
        self.total_bytes += entry.length_bytes

    def _write(self, path: str, data: bytes, mode: int) -> None:
        if os.path.basename(path).startswith(GROUP_PREFIX):
            data = with_places(data, f"{self._kernels.folder}/")
        draft = f"{os.path.dirname(path)}/.{os.getpid()}-{os.urandom(4).hex()}.tmp"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode & 0o700 | 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.rename(draft, path)
        except OSError:
            os.unlink(draft)
            raise

    def _prepare(self, folder: str) -> None:
        """Make a folder below the private one, through no link. Raises OSError."""
        if folder in self._folders:
            return
        if folder != self._kernels.folder:
            self._prepare(os.path.dirname(folder))
            try:
                os.mkdir(folder, 0o700)
            except FileExistsError:
                if not stat.S_ISDIR(os.lstat(folder).st_mode):
                    raise
        self._folders.add(folder)


def with_places(data: bytes, above: str) -> bytes:
    """One of Triton's lists of files with the paths of this machine. Raises ManifestError for what is none."""
    return _mapped(data, lambda name: above + check_file_name(name))


def without_places(data: bytes, above: str) -> bytes:
    """The same with names that say nothing of this machine. Raises ManifestError where a path leads elsewhere."""

    def named(path: str) -> str:
        if not path.startswith(above):
            raise ManifestError(f"{path} is not below {above}")
        return check_file_name(path.removeprefix(above))

    return _mapped(data, named)


def _mapped(data: bytes, change: Callable[[str], str]) -> bytes:
    try:
        document: Mapping[str, Mapping[str, str]] = json.loads(data)
        paths = {str(name): change(path) for name, path in document["child_paths"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"a list of Triton's kernels cannot be read: {error}") from None
    return json.dumps({"child_paths": paths}).encode()
