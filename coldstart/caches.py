"""Files that belong to a snapshot: which ones `load` used from its hub caches, and where restored ones are put.

A file entry names a *root*: ``kept`` for files given by ``files=`` or ``ctx.keep``, else the cache that it was found in
(``HF_HOME``, ``TORCH_HOME``). At a restore each root becomes a folder below a private one; the roots' variables then
point there and the hub works offline, so ``load`` finds its files where it expects them and nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from coldstart.config import read_variable, set_variables
from coldstart.errors import StoreSetupError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from coldstart.devices.base import Arena
    from coldstart.manifest import Manifest

KEPT = "kept"
_COMPLETE = ".complete"
_HUB_FOLDER = "hub"
_REPOSITORY_PREFIXES = ("models--", "datasets--", "spaces--")
_LEFT_OUT = ("blobs", ".locks")
WEIGHT_SUFFIXES = frozenset(
    (
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".h5",
        ".msgpack",
        ".onnx",
        ".npz",
        ".npy",
        ".pkl",
        ".data",
    )
)
"""Files of these kinds are not stored beside captured arrays: the arrays are what they held."""


class FileSource(NamedTuple):
    """A file on this machine that shall go into a snapshot under ``name`` below ``root``."""

    root: str
    name: str
    path: str


def cache_roots() -> dict[str, Path]:
    """The hub caches as this process finds them: root name -> folder (which need not exist)."""
    home = Path(read_variable("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {
        "HF_HOME": Path(read_variable("HF_HOME") or home / "huggingface"),
        "TORCH_HOME": Path(read_variable("TORCH_HOME") or home / "torch"),
    }


# --- what a load used ------------------------------------------------------------------------------------------------


class _OpenRecorder:
    """Notes paths below the cache roots that Python opens, by the interpreter's own audit events.

    An audit hook cannot be taken away again, so there is one for the process, installed by the first cold start, and
    silent unless a start records.
    """

    def __init__(self) -> None:
        self._installed = False
        self._prefixes: tuple[str, ...] = ()
        self._paths: set[str] = set()

    def begin(self, folders: Iterable[Path]) -> None:
        self._paths = set()
        self._prefixes = tuple(str(folder) + os.sep for folder in folders)
        if not self._installed:
            sys.addaudithook(self._hook)
            self._installed = True

    def end(self) -> set[str]:
        self._prefixes = ()
        return self._paths

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._prefixes and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            path = os.fspath(arguments[0])
            if isinstance(path, str) and path.startswith(self._prefixes):
                self._paths.add(path)


recorder = _OpenRecorder()


def used_files(paths: Iterable[str], roots: Mapping[str, Path]) -> list[FileSource]:
    """The cache files behind the ``paths`` that a load opened.

    Native readers (safetensors, tokenizers) open files unseen, so one file seen in a hub repository stands for the
    whole of that repository as it is in the cache; elsewhere a file stands for itself.
    """
    found: dict[tuple[str, str], FileSource] = {}
    for path in sorted(paths):
        for root, folder in roots.items():
            if path.startswith(str(folder) + os.sep):
                for source in _expand(root, folder, Path(path).relative_to(folder)):
                    found[source.root, source.name] = source
    return list(found.values())


def _expand(root: str, folder: Path, relative: Path) -> Iterator[FileSource]:
    for depth, part in enumerate(relative.parts):
        if part.startswith(_REPOSITORY_PREFIXES):
            yield from folder_files(root, folder, folder.joinpath(*relative.parts[: depth + 1]))
            return
    path = folder / relative
    if path.is_file() and not relative.name.endswith((".lock", ".incomplete")) and ".locks" not in relative.parts:
        yield FileSource(root, relative.as_posix(), str(path))


def folder_files(root: str, base: Path, folder: Path) -> Iterator[FileSource]:
    """Every file below ``folder``, links followed, named relative to ``base``; a hub's blob store is left out."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(base)
        if path.is_file() and not set(relative.parts) & set(_LEFT_OUT) and path.suffix not in (".lock", ".incomplete"):
            yield FileSource(root, relative.as_posix(), str(path))


# --- putting restored files in place ---------------------------------------------------------------------------------


def place_files(manifest: Manifest, arena: Arena, base: Path) -> Path:
    """Write the files of ``manifest`` from ``arena`` below ``base`` and return their folder (``<folder>/<root>/<name>``).

    A folder written by an earlier start of the same files is used as it is. The folder appears whole or not at all.
    Raises StoreSetupError where it cannot be written.
    """
    folder = folder_of(manifest, base)
    if _is_complete(folder, manifest):
        return folder
    try:
        _write_folder(folder, manifest, arena)
    except OSError as error:
        raise StoreSetupError(
            f"cannot write restored files to {base}: {error}; set COLDSTART_FILES_FOLDER to a folder with room",
            snapshot=manifest.name,
        ) from error
    return folder


def folder_of(manifest: Manifest, base: Path) -> Path:
    """Where ``place_files`` puts the files of ``manifest``; known before they are there, so hubs can be pointed to it."""
    return base / manifest.name / _files_digest(manifest)


def _files_digest(manifest: Manifest) -> str:
    """The same for the same files with the same bytes, whatever generation they come from."""
    from blake3 import blake3

    segments = {entry.segment for entry in manifest.files}
    hashes = [chunk.raw_hash for chunk in manifest.chunks if chunk.segment in segments]
    names = [f"{entry.root}/{entry.name}/{entry.mode}/{entry.offset_bytes}" for entry in manifest.files]
    return str(blake3("\n".join(hashes + names).encode()).hexdigest(length=16))


def _is_complete(folder: Path, manifest: Manifest) -> bool:
    def has_size(path: Path, length_bytes: int) -> bool:
        try:
            return path.stat().st_size == length_bytes
        except OSError:
            return False

    return (folder / _COMPLETE).exists() and all(
        has_size(folder / entry.root / entry.name, entry.length_bytes) for entry in manifest.files
    )


def _write_folder(folder: Path, manifest: Manifest, arena: Arena) -> None:
    import shutil

    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = folder.with_name(f".{folder.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        for entry in manifest.files:
            path = draft / entry.root / entry.name
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            end = entry.offset_bytes + entry.length_bytes
            path.write_bytes(arena.writable(entry.segment)[entry.offset_bytes : end])
            path.chmod(entry.mode & 0o700 | 0o400)
        (draft / _COMPLETE).touch()
        if folder.exists() and not _is_complete(folder, manifest):
            shutil.rmtree(folder)
        try:
            draft.rename(folder)
        except OSError:
            if not _is_complete(folder, manifest):  # a start beside this one was first, and that is as good
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class _Hubs:
    """What this process told its hub libraries, so that it can be taken back."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.before: dict[str, str | None] = {}


_hubs = _Hubs()


def point_to(folder: Path, manifest: Manifest) -> str:
    """Let the hubs of this process find the restored files below ``folder``, offline.

    Returns "" or, where a hub's library was imported before and so has read its variables already, what was done instead: the
    files were linked into the cache that it uses.
    """
    roots = sorted({entry.root for entry in manifest.files} - {KEPT})
    if not roots or _hubs.folder == folder:
        return ""
    _hubs.folder = folder
    if "HF_HOME" in roots and "huggingface_hub" in sys.modules:
        _link_into_live_caches(folder, manifest)
        _set_offline(offline=True)
        return "hub libraries were imported before the start, so restored files were linked into their live caches"
    variables = {root: str(folder / root) for root in roots}
    if "HF_HOME" in roots:
        variables |= {
            "HF_HUB_CACHE": str(folder / "HF_HOME" / _HUB_FOLDER),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
    _hubs.before = {name: read_variable(name) for name in variables}
    set_variables(variables)
    return ""


def point_back() -> None:
    """Undo ``point_to``: hub libraries use this machine's caches again (as far as they ask anew) and go online."""
    if _hubs.folder is None:
        return
    set_variables(_hubs.before)
    _set_offline(offline=False)
    _hubs.folder, _hubs.before = None, {}


def _link_into_live_caches(folder: Path, manifest: Manifest) -> None:
    live = cache_roots()
    for entry in manifest.files:
        if entry.root == KEPT:
            continue
        target = live[entry.root] / entry.name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(folder / entry.root / entry.name)


def _set_offline(*, offline: bool) -> None:
    """Tell hub libraries that are already imported: they keep the variable's value as a constant."""
    for module, name in (
        ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
        ("transformers.utils.hub", "_is_offline_mode"),
    ):
        if hasattr(sys.modules.get(module), name):
            setattr(sys.modules[module], name, offline)


class _ImportWatch:
    """A finder that finds nothing: it runs a function just before one module is imported for the first time."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self._module = module
        self._then = then

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:  # noqa: ARG002  the finders' protocol
        if name == self._module:
            sys.meta_path.remove(self)
            self._then()


def before_import(module: str, then: Callable[[], None]) -> None:
    """Run ``then`` just before ``module`` is imported, if it ever is and has not been."""
    if module not in sys.modules:
        sys.meta_path.insert(0, _ImportWatch(module, then))
