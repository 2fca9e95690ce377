"""``ctx``: what ``load``, ``build``, ``compile`` and ``init`` are given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.caches import KEPT, FileSource
from coldstart.config import read_variable
from coldstart.errors import HandlerError, ManifestError, UndeclaredNameError
from coldstart.manifest import check_file_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager


class Declared(NamedTuple):
    """The variables that a handler declares."""

    env: tuple[str, ...]
    secrets: tuple[str, ...]


class Files(dict[str, str]):
    """Name -> path of the snapshot's files; a missing name says which there are."""

    def __missing__(self, name: str) -> str:
        known = ", ".join(sorted(self)) or "none"
        raise HandlerError(
            f"ctx.files has no {name!r} (there: {known}); keep it in load with ctx.keep(path, name={name!r})"
        )


class Context:
    """What a user's hooks see of the start they run in.

    ``device``: ``cpu``, ``cuda`` or ``cuda:<number>``. ``kind``: the start's kind so far (``restored``, ``cold``, ``fallback``).
    ``files``: name -> path of the files that were kept, in every start. ``log(message, **fields)`` publishes a line to
    the subscribers. ``phase(name)`` is a context manager that puts a named span of your own on the timeline.
    """

    def __init__(
        self,
        *,
        device: str,
        declared: Declared,
        span: Callable[[str], AbstractContextManager[Any]],
        log: Callable[[str, Mapping[str, Any]], None],
        scratch: Path,
        pool: Callable[[str, Sequence[int], Any, str], Any],
    ) -> None:
        self.device = device
        self.kind = "cold"
        self.files = Files()
        self.kept: list[FileSource] = []
        self._declared = declared
        self._downloads: dict[str, str] = {}
        self._kept_folder: Path | None = None
        self._span = span
        self._log = log
        self._scratch = scratch
        self._pool = pool

    def use_restored(self, folder: Path, names: tuple[str, ...]) -> None:
        """Let ``files`` and ``keep`` find the files that a restore put below ``folder``."""
        self._kept_folder = folder / KEPT
        self.kept += [FileSource(KEPT, name, str(self._kept_folder / name)) for name in names]
        self.files.update({name: str(self._kept_folder / name) for name in names})

    def keep(self, path: str | Path, *, name: str | None = None) -> Path:
        """Keep a file or a folder in the snapshot, and return where it is in this start.

        Call it in ``load``: the first start returns ``path`` itself, a start from a snapshot the restored copy.
        ``name`` (default: the last part of the path) is its key in ``ctx.files``; files of a folder are at
        ``name/...``. Raises HandlerError when nothing is there, and for a name that another file has.
        """
        label = _label(name or Path(path).name)
        restored = self._restored(label)
        if restored is not None:
            return restored
        found = _sources(Path(path), label)
        for item in found:
            if self.files.get(item.name, item.path) != item.path:
                raise HandlerError(
                    f"ctx.keep({str(path)!r}): {self.files[item.name]} is kept as {item.name!r} already;"
                    " pass another name="
                )
        self.kept += [item for item in found if item not in self.kept]
        self.files.update({item.name: item.path for item in found})
        return Path(path)

    def download(self, url: str, *, name: str | None = None, blake3: str = "") -> Path:
        """Fetch ``url`` (https, or http to this machine) once ever and keep it; later starts get the restored copy.

        ``name``: see ``keep``; the default is the last part of the address. ``blake3``: the expected hash in hex.
        Raises HandlerError when the file cannot be fetched in full, or its bytes are others.
        """
        label = _label(name or _path_of(url).rsplit("/", 1)[-1])
        restored = self._restored(label)
        if restored is not None:
            return restored
        if self._downloads.setdefault(label, url) != url:
            raise HandlerError(f"ctx.download({url!r}): another download is called {label!r}; pass another name=")
        target = self._scratch / label
        _download(url, target, blake3.lower())
        return self.keep(target, name=label)

    def _restored(self, label: str) -> Path | None:
        found = self._kept_folder / label if self._kept_folder is not None else None
        return found if found is not None and found.exists() else None

    def meta(self) -> AbstractContextManager[None]:
        """While it is entered, parameters of torch modules are made without bytes (buffers are real). For ``build``."""
        from coldstart.frameworks import meta

        return meta()

    def pool(self, name: str, shape: Sequence[int], dtype: Any, *, kind: str = "kv_cache") -> Any:
        """An array of zeros on ``device`` whose bytes no snapshot holds: a KV cache, a workspace.

        The snapshot lists it, so later starts allocate it while weights land, before it is asked for. ``shape`` is in
        items; a dtype of torch makes a tensor, any other (``"float32"``) an array of numpy, on a GPU of cupy. ``kind``
        says what it is for (``activations``, ``other``). For ``load``, ``build``, ``compile`` and ``init``; the same name
        is the same array. Put into the state it stays a pool: ``build`` asks for it again.

        Raises HandlerError for a name that has another form already, DeviceError where there is not so much memory.
        """
        return self._pool(name, shape, dtype, kind)

    def env(self, name: str, default: str | None = None) -> str | None:
        """A declared variable of the environment. Raises UndeclaredNameError for a name not in ``env=``."""
        if name not in self._declared.env:
            raise UndeclaredNameError(
                f"ctx.env({name!r}): not declared; write @coldstart(..., env=[{name!r}]), so that its value belongs to"
                " the snapshot's key"
            )
        value = read_variable(name)
        return default if value is None else value

    def secret(self, name: str) -> str:
        """A declared secret. Raises UndeclaredNameError for a name not in ``secrets=``, HandlerError if it is unset."""
        if name not in self._declared.secrets:
            raise UndeclaredNameError(f"ctx.secret({name!r}): not declared; write @coldstart(..., secrets=[{name!r}])")
        value = read_variable(name)
        if value is None:
            raise HandlerError(f"the secret {name} is not set in this worker's environment: set the variable")
        return value

    def log(self, message: str, **fields: Any) -> None:
        """Publish a line of your own to the subscribers (and so to the log)."""
        self._log(message, fields)

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Time a step of your own: it appears on the timeline under ``name``."""
        return self._span(name)


def _label(name: str) -> str:
    try:
        return check_file_name(name)
    except ManifestError as error:
        raise HandlerError(f"a file cannot be kept as {name!r}: pass name= as a relative path without '..'") from error


def _sources(path: Path, label: str) -> list[FileSource]:
    """The file at ``path``, or every file below the folder there, by absolute path."""
    source = path.absolute()
    if source.is_file():
        return [FileSource(KEPT, label, str(source))]
    files = sorted(item for item in source.rglob("*") if item.is_file())
    if not files:
        raise HandlerError(f"ctx.keep({str(path)!r}): no file is there, nor a folder with files: check the path")
    return [FileSource(KEPT, f"{label}/{item.relative_to(source).as_posix()}", str(item)) for item in files]


def _path_of(url: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url).path


def _check_address(url: str) -> None:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise HandlerError(f"ctx.download({url!r}): {error}") from error
    here = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")
    if not (here or (parts.scheme == "https" and parts.hostname)):
        raise HandlerError(f"ctx.download({url!r}): only https is fetched; give an https:// address")


def _download(url: str, target: Path, expected_blake3: str) -> None:
    from blake3 import blake3

    draft = target.with_name(target.name + ".part")
    try:
        _fetch(url, draft)
        if expected_blake3 and blake3().update_mmap(draft).hexdigest() != expected_blake3:
            raise HandlerError(
                f"ctx.download({url!r}): the bytes are not those of blake3={expected_blake3!r}; find out which is wrong"
            )
        draft.rename(target)
    finally:
        draft.unlink(missing_ok=True)


def _fetch(url: str, draft: Path) -> None:
    import shutil
    import urllib.request
    from http.client import HTTPException

    _check_address(url)
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as answer, draft.open("wb") as file:  # noqa: S310  checked above
            _check_address(answer.url)  # where a redirect has led
            shutil.copyfileobj(answer, file, 1 << 20)
            missing_bytes = answer.length
    except (OSError, HTTPException) as error:  # URLError and TimeoutError are OSErrors
        raise HandlerError(f"ctx.download({url!r}) failed: {error}; is the address right, and reachable?") from error
    if missing_bytes:
        raise HandlerError(f"ctx.download({url!r}): the answer ended {missing_bytes} bytes early; try again")
