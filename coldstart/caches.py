"""Files that belong to a snapshot: which ones `load` used from its hub caches, and where restored ones are put.

A file entry names a *root*: ``kept`` for files given by ``files=`` or ``ctx.keep``, else the cache that it was found in
(``HF_HOME``, ``TORCH_HOME``; ``HF_HUB_CACHE`` where it is not the folder ``hub`` of the first). At a restore each root
becomes a folder below a private one; the roots' variables then point there and the hub works offline, so ``load`` finds
its files where it expects them and nothing is downloaded.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.config import read_variable, set_variables
from coldstart.errors import StoreSetupError
from coldstart.kernel_caches.kinds import KERNELS_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from coldstart.devices.base import Arena
    from coldstart.manifest import FileEntry, Manifest

KEPT = "kept"
_HUB_FOLDER = "hub"
_REPOSITORY_PREFIXES = ("models--", "datasets--", "spaces--")
_SECRETS = ("token", "stored_tokens")
_HUB_CONSTANTS = "huggingface_hub.constants"
PROGRAM_ROOT = "program_"
"""How the roots of programs' files begin."""
_HUB_ROOTS = frozenset(("HF_HOME", "HF_HUB_CACHE"))
WEIGHT_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .h5 .msgpack .onnx .npz .npy .pkl .data".split()  # noqa: SIM905
)
"""Files of these kinds are not stored beside captured arrays: the arrays are what they held."""


class FileSource(NamedTuple):
    """A file on this machine that shall go into a snapshot under ``name`` below ``root``."""

    root: str
    name: str
    path: str


def cache_roots() -> dict[str, Path]:
    """The hub caches that this process uses: root name -> folder (which need not exist).

    What a hub's library has read already counts more than the variable that it read it from.
    """
    above = read_variable("XDG_CACHE_HOME") or "~/.cache"
    home = _folder(_hub_constant("HF_HOME") or read_variable("HF_HOME") or f"{above}/huggingface")
    hub = _folder(
        _hub_constant("HF_HUB_CACHE")
        or read_variable("HF_HUB_CACHE")
        or read_variable("HUGGINGFACE_HUB_CACHE")
        or home / _HUB_FOLDER
    )
    roots = {"HF_HOME": home, "TORCH_HOME": _folder(read_variable("TORCH_HOME") or f"{above}/torch")}
    return roots if hub == home / _HUB_FOLDER else {**roots, "HF_HUB_CACHE": hub}


def _folder(path: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(os.path.expandvars(path))))


def _hub_constant(name: str) -> Any:
    """A constant that huggingface_hub made of its variables when it was imported; None if it is not."""
    return getattr(sys.modules.get(_HUB_CONSTANTS), name, None)


# --- what a load used ------------------------------------------------------------------------------------------------


class _OpenRecorder:
    """Notes paths below the cache roots that Python opens, by the interpreter's own audit events.

    An audit hook cannot be taken away again, so there is one for the process, installed by the first cold start, and
    silent unless a start records. A recording belongs to the thread that begins and ends it, and gets what any thread
    opens: a load may read with threads of its own. So two starts at a time see each other's files, which makes their
    snapshots larger than they need be; that one ends takes nothing from the other.
    """

    def __init__(self) -> None:
        self._installed = False
        self._recordings: dict[int, tuple[tuple[str, ...], set[str]]] = {}

    def begin(self, folders: Iterable[Path]) -> None:
        """Begin this thread's recording of what is opened below ``folders``."""
        prefixes = tuple(form + os.sep for folder in folders for form in _forms(folder))
        self._recordings[threading.get_ident()] = (prefixes, set())
        if not self._installed:
            sys.addaudithook(self._hook)
            self._installed = True

    def end(self) -> set[str]:
        """End this thread's recording and return the paths, absolute; none if it had not begun one."""
        _, paths = self._recordings.pop(threading.get_ident(), ((), set()))
        return paths

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event != "open" or not self._recordings or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        try:
            path = os.path.abspath(os.fsdecode(arguments[0]))
        except OSError:  # a relative path in a working folder that is gone; an error here would be the opener's
            return
        for prefixes, paths in tuple(self._recordings.values()):
            if path.startswith(prefixes):
                paths.add(path)


def _forms(folder: Path) -> tuple[str, ...]:
    """How a path below ``folder`` may begin: as it is given, and with its links resolved."""
    return tuple(dict.fromkeys((os.path.abspath(folder), os.path.realpath(folder))))


recorder = _OpenRecorder()


def used_files(paths: Iterable[str], roots: Mapping[str, Path]) -> list[FileSource]:
    """The cache files behind the ``paths`` that a load opened.

    Native readers (safetensors, tokenizers) open files unseen, so one file seen in a hub repository stands for the
    whole of that repository as it is in the cache; elsewhere a file stands for itself. Access tokens are left out: they
    lie in a root itself, beside the folders of its caches.
    """
    found: dict[tuple[str, str], FileSource] = {}
    for root, folder in roots.items():
        below = {path[len(form) + 1 :] for form in _forms(folder) for path in paths if path.startswith(form + os.sep)}
        for name in sorted({_repository_of(root, name) or name for name in below}):
            for source in _expand(root, folder, name):
                found[source.root, source.name] = source
    return list(found.values())


def _repository_of(root: str, name: str) -> str:
    """The folder of the hub repository that the file ``name`` below ``root`` belongs to, "" if to none."""
    parts = name.split("/")
    for depth, part in enumerate(parts):
        if part.startswith(_REPOSITORY_PREFIXES):
            return "/".join(parts[: depth + 1])
    if root == "TORCH_HOME" and len(parts) > 2 and parts[0] == _HUB_FOLDER and parts[1] != "checkpoints":  # noqa: PLR2004
        return "/".join(parts[:2])
    return ""


def _expand(root: str, folder: Path, name: str) -> Iterator[FileSource]:
    """The files to store for ``name``, a file or a repository. A hub's blobs are left out: links lead to them."""
    path, parts = folder / name, name.split("/")
    if ".locks" in parts:
        return
    if path.is_dir():
        blobs = f"{name}/blobs/"
        yield from (source for source in folder_files(root, folder, path) if not source.name.startswith(blobs))
    elif (
        path.is_file() and len(parts) > 1 and parts[-1] not in _SECRETS and path.suffix not in (".lock", ".incomplete")
    ):
        yield FileSource(root, name, str(path))


def folder_files(root: str, base: Path, folder: Path) -> Iterator[FileSource]:
    """Every file below ``folder``, links followed (but not in a circle), named relative to ``base``."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        above = os.path.realpath(parent) + os.sep
        folders[:] = sorted(name for name in folders if not above.startswith(_real(parent, name) + os.sep))
        for path in (Path(parent, name) for name in sorted(names)):
            if path.is_file():
                yield FileSource(root, path.relative_to(base).as_posix(), str(path))


def _real(parent: str, name: str) -> str:
    return os.path.realpath(os.path.join(parent, name))


# --- putting restored files in place ---------------------------------------------------------------------------------


def own_files(manifest: Manifest) -> tuple[FileEntry, ...]:
    """The files of a state: all but those of programs, which are read by who runs them, and kernel caches."""
    return tuple(entry for entry in manifest.files if not entry.root.startswith((PROGRAM_ROOT, KERNELS_ROOT)))


def place_files(manifest: Manifest, arena: Arena, base: Path) -> Path:
    """Write the files of ``manifest`` from ``arena`` below ``base`` and return their folder: ``<folder>/<root>/<name>``.

    The folder appears whole or not at all. One written by an earlier start of the same files is used as it is; files
    that are missing there, or have another size, are put back one by one. Raises StoreSetupError where it cannot be
    written.
    """
    folder = folder_of(manifest, base)
    if _is_complete(folder, manifest, arena):
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
    """Where ``place_files`` puts the files of ``manifest``; known before they are there, so hubs can be told."""
    return base / manifest.name / _files_digest(manifest)


def _files_digest(manifest: Manifest) -> str:
    """The same for the same files with the same bytes, whatever generation they come from."""
    from blake3 import blake3

    segments = {entry.segment for entry in own_files(manifest)}
    hashes = [chunk.raw_hash for chunk in manifest.chunks if chunk.segment in segments]
    names = [
        f"{entry.root}/{entry.name}/{entry.mode}/{entry.offset_bytes}+{entry.length_bytes}"
        for entry in own_files(manifest)
    ]
    return str(blake3("\n".join(hashes + names).encode()).hexdigest(length=16))


def _is_complete(folder: Path, manifest: Manifest, arena: Arena) -> bool:
    return folder.is_dir() and all(_is_whole(folder, entry, arena) for entry in own_files(manifest))


def _is_whole(folder: Path, entry: FileEntry, arena: Arena) -> bool:
    """Whether the file is there, no link, with the bytes that were fetched and verified."""
    path = folder / entry.root / entry.name
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size != entry.length_bytes:
            return False
        return path.read_bytes() == arena.readable(entry.segment)[entry.offset_bytes :][: entry.length_bytes]
    except OSError:
        return False


def _write_folder(folder: Path, manifest: Manifest, arena: Arena) -> None:
    import shutil

    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = _draft_of(folder)
    try:
        for entry in own_files(manifest):
            path = draft / entry.root / entry.name
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            end = entry.offset_bytes + entry.length_bytes
            path.write_bytes(arena.readable(entry.segment)[entry.offset_bytes : end])
            path.chmod(entry.mode & 0o700 | 0o400)
        try:
            draft.rename(folder)
        except OSError:  # a start beside this one was first, or somebody damaged the folder since an earlier one
            _mend(folder, manifest, draft, arena)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _mend(folder: Path, manifest: Manifest, draft: Path, arena: Arena) -> None:
    """Put files that are missing, cut off or altered back into a folder that other processes may be using."""
    for entry in own_files(manifest):
        if not _is_whole(folder, entry, arena):
            path = folder / entry.root / entry.name
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            (draft / entry.root / entry.name).replace(path)


def _draft_of(path: Path) -> Path:
    """A fresh name beside ``path``, for what takes its place when it is ready."""
    return path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}")


class _Hubs:
    """What this process told its hub libraries, so that it can be taken back."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.before: dict[str, str | None] = {}
        self.offline_before = False


_hubs = _Hubs()


def point_to(folder: Path, manifest: Manifest) -> str:
    """Let the hubs of this process find the restored files below ``folder``, offline.

    Returns "" or, where a hub's library has read its variables already, what was done instead: the files were linked
    into the cache that it uses. Raises StoreSetupError where that cannot be written.
    """
    roots = {entry.root for entry in own_files(manifest)} - {KEPT}
    if not roots or _hubs.folder == folder:
        return ""
    if _hubs.folder is None:
        _hubs.offline_before = _is_offline()
    _hubs.folder = folder
    if roots & _HUB_ROOTS and _HUB_CONSTANTS in sys.modules:
        _link_into_live_caches(folder, manifest)
        _set_offline(offline=True)
        return "hub libraries were imported before the start, so restored files were linked into their live caches"
    variables = {root: str(folder / root) for root in sorted(roots)}
    if "HF_HOME" in roots:
        variables.setdefault("HF_HUB_CACHE", str(folder / "HF_HOME" / _HUB_FOLDER))
    if roots & _HUB_ROOTS:
        variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    _hubs.before = {name: read_variable(name) for name in variables} | _hubs.before
    set_variables(variables)
    return ""


def point_back() -> None:
    """Undo ``point_to``: hub libraries use this machine's caches again, as far as they ask anew, and go online."""
    if _hubs.folder is None:
        return
    set_variables(_hubs.before)
    _set_offline(offline=_hubs.offline_before)
    _hubs.folder, _hubs.before = None, {}


def _link_into_live_caches(folder: Path, manifest: Manifest) -> None:
    roots = cache_roots()
    for entry in own_files(manifest):
        target = _live_place(entry, roots)
        if target is None or target.exists():
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(folder / entry.root / entry.name, target, copies="refs" in entry.name.split("/"))
        except OSError as error:
            raise StoreSetupError(
                f"cannot link a restored file to {target}: {error}; import hub libraries in load and not before",
                snapshot=manifest.name,
            ) from error


def _live_place(entry: FileEntry, roots: Mapping[str, Path]) -> Path | None:
    """Where a hub's library looks for this file; None for files that are no hub's."""
    hub = roots.get("HF_HUB_CACHE", roots["HF_HOME"] / _HUB_FOLDER)
    if entry.root == "HF_HUB_CACHE":
        return hub / entry.name
    if entry.root == "HF_HOME" and entry.name.startswith(f"{_HUB_FOLDER}/"):
        return hub / entry.name.removeprefix(f"{_HUB_FOLDER}/")
    return roots[entry.root] / entry.name if entry.root in roots else None


def _link(source: Path, target: Path, *, copies: bool) -> None:
    """Let ``target`` be ``source``, in one step; a copy where hubs write in place, which must not reach the source."""
    draft = _draft_of(target)
    if copies:
        draft.write_bytes(source.read_bytes())
    else:
        draft.symlink_to(source)
    draft.replace(target)


def _is_offline() -> bool:
    """Whether hub libraries are told to stay offline: by their constant, or by the variables that it is made from."""
    known = _hub_constant("HF_HUB_OFFLINE")
    if known is not None:
        return bool(known)
    value = read_variable("HF_HUB_OFFLINE") or read_variable("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def _set_offline(*, offline: bool) -> None:
    """Tell hub libraries that are already imported: they keep the variable's value as a constant."""
    for module, name in ((_HUB_CONSTANTS, "HF_HUB_OFFLINE"), ("transformers.utils.hub", "_is_offline_mode")):
        if hasattr(sys.modules.get(module), name):
            setattr(sys.modules[module], name, offline)


class _ImportWatch:
    """A finder of one module, which others find for it: it only sees to it that a function runs before the module does.

    Finders are asked under the interpreter's one import lock. The function may wait for a thread that has to import
    something itself, so it runs in the loader, which is not under that lock.
    """

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self._module = module
        self._then = then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._module:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec: Any = next((found for finder in finders if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _WatchedLoader(spec.loader, self)
        return spec

    def end(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._then()


class _WatchedLoader:
    """A module's own loader, after its watch has ended. No trace of it is left in the module."""

    def __init__(self, loader: Any, watch: _ImportWatch) -> None:
        self._loader = loader
        self._watch = watch

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._watch.end()
        self._loader.exec_module(module)


def before_import(module: str, then: Callable[[], None]) -> None:
    """Run ``then`` just before ``module`` is imported, if it ever is and has not been. ``then`` may wait for threads."""
    if module not in sys.modules:
        sys.meta_path.insert(0, _ImportWatch(module, then))
