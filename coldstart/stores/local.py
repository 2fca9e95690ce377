"""A store in a folder: one file per object, named by its key.

How the contract is kept, on any file system with rename and flock, by threads and processes alike:

- *atomic*: bytes go to a temporary file beside the object, are synced, and appear under the object's name by one
  ``rename`` or ``link``; then the folder is synced. A writer that dies leaves at most a temporary file, whose name
  no key can have.
- *create if absent*: ``link`` fails where the name exists.
- *compare and swap*: under the ``flock`` of a lock file, read again, compare, rename. Plain writes and deletions take
  the same lock for their last step, so none slips in between.
- *etag*: the BLAKE3 of the content. Two writes of the same bytes have the same etag, so whoever swaps an object puts
  something unique into it.

A key and a folder cannot share a name: where ``a/b`` is stored, ``a`` cannot be.

Beside the objects lies, under a name that no key can have and no listing shows, a folder for decoded copies of segments
that the workers of this host map (``flat_files``). It may be removed at any time, and a store that is read-only has none.
"""

# os.path and not pathlib, which costs 15 ms that a start would pay for nothing.

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import contextmanager, suppress
from io import FileIO
from typing import TYPE_CHECKING

from coldstart.errors import (
    AccessDeniedError,
    BlobCorruptError,
    ConditionFailedError,
    ObjectMissingError,
    StoreError,
    StoreSetupError,
    StoreTransientError,
)
from coldstart.stores.base import Capabilities, ObjectInfo, Store, StoredObject, check_key, check_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstart.stores.cache_folder import CacheFolder

FLAT_FILES = ".flat"
"""The folder for segments, below the store's own."""
FLAT_FILES_LIMIT_BYTES = 50 << 30

_TEMPORARY = ".tmp-"
_LOCK = ".lock"
ABANDONED_AFTER_SECONDS = 24 * 3600.0
"""A temporary file this old has no writer any more; a listing that meets it removes it."""

# O_NONBLOCK: opening a named pipe that somebody put there must not wait for a writer. Regular files ignore it.
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW

_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""How ``link`` fails on file systems that have none (network and FUSE mounts)."""

_FULL = (StoreError, "the disk is full, or a quota is reached: free space, or put the store elsewhere")
_DENIED = (AccessDeniedError, "no permission: give this user the folder, or choose another one for the store")
_NOT_A_FILE = (
    StoreSetupError,
    "there is a folder, a symbolic link or a special file where an object should be: remove it",
)
_UNFIT = (
    StoreSetupError,
    "this file system lacks rename or flock: put the store in a folder that has them, or in a bucket",
)
_ERRORS: dict[int, tuple[type[StoreError], str]] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: (StoreError, "the object is larger than this file system or the process's limit allows"),
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: (StoreSetupError, "the file system is read-only: choose another folder for the store"),
    errno.EISDIR: _NOT_A_FILE,
    errno.ENOTDIR: _NOT_A_FILE,
    errno.EEXIST: _NOT_A_FILE,
    errno.ELOOP: _NOT_A_FILE,
    errno.ENXIO: _NOT_A_FILE,
    errno.ENAMETOOLONG: (
        StoreSetupError,
        "the path is too long for this file system: choose a shorter folder for the store",
    ),
    errno.ENOLCK: _UNFIT,
    errno.EOPNOTSUPP: _UNFIT,
    errno.ENOSYS: _UNFIT,
}
_MAY_PASS = (StoreTransientError, "the file system failed; it may work when asked again")


class LocalStore(Store):
    """Objects as files under ``root``, which is made (mode 0700) by the first write. ``~`` is the user's home.

    ``flat_files_bytes``: how large the copies of segments beside them may grow.
    """

    def __init__(self, root: str | os.PathLike[str], *, flat_files_bytes: int = FLAT_FILES_LIMIT_BYTES) -> None:
        path = os.fspath(root)
        if not path or "\0" in path:
            raise StoreSetupError(f"{path!r} is not the path of a folder")
        self._root = os.path.abspath(os.path.expanduser(path))
        self._flat_files_bytes = flat_files_bytes

    @property
    def root(self) -> str:
        """The absolute path of the store's folder."""
        return self._root

    @property
    def url(self) -> str:
        """``file://`` and the absolute path; ``open_store`` opens the same folder from it."""
        return "file://" + self._root.replace("%", "%25")

    @property
    def capabilities(self) -> Capabilities:
        """All of them; a file system that cannot keep one raises StoreSetupError when it is used."""
        return Capabilities(create_if_absent=True, compare_and_swap=True, ranges=True)

    def __repr__(self) -> str:
        return f"LocalStore({self._root!r})"

    def get(self, key: str) -> StoredObject:
        """Read a whole file; the etag is the BLAKE3 of what was read."""
        path = self._path(key)
        with _reading(key, path):
            data = _read(path)
        return StoredObject(data, _etag(data))

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """Read straight into ``target``, without a copy."""
        path = self._path(key)
        with _reading(key, path), _opened(path) as file:
            done = 0
            while done < len(target):
                count = os.preadv(file, [target[done:]], offset_bytes + done)
                if not count:
                    raise BlobCorruptError(
                        f"{path} ends at byte {offset_bytes + done}, {len(target)} from {offset_bytes} were asked for",
                        key=key,
                    )
                done += count

    def head(self, key: str) -> ObjectInfo:
        """Size and last write, by this machine's clock."""
        path = self._path(key)
        with _reading(key, path):
            status = os.stat(path, follow_symlinks=False)
            _check_regular(status.st_mode)
        return ObjectInfo(key, status.st_size, status.st_mtime)

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write, sync, and let the object appear. A full disk is a StoreError and leaves nothing behind."""
        path = self._path(key)
        view = memoryview(data).cast("B")
        with _writing(key, path):
            if if_absent and os.path.lexists(path):
                raise _occupied(path, key)  # before the bytes are written for nothing; link() decides
            folder = os.path.dirname(path)
            _make_folder(folder)
            with _temporary(folder, view) as temporary:
                if if_absent:
                    _create(temporary, path, key)
                else:
                    _replace(temporary, path, key, if_match)
            _sync_folder(folder)
        return _etag(view)

    def delete(self, key: str) -> None:
        """Remove the file; its folder stays."""
        path = self._path(key)
        folder = os.path.dirname(path)
        # Suppressed: the object, or a folder on the way to it, is not there. That is what was asked for.
        with _writing(key, path), suppress(FileNotFoundError, NotADirectoryError), _locked(folder):
            os.unlink(path)
            _sync_folder(folder)

    def delete_older(self, key: str, before_seconds: float) -> bool:
        """Remove the file if it was last written before that moment; False if it was not, or is not there.

        No writer comes in between: writers take the same lock for their last step.
        """
        path = self._path(key)
        folder = os.path.dirname(path)
        with _writing(key, path), suppress(FileNotFoundError, NotADirectoryError), _locked(folder):
            if os.stat(path, follow_symlinks=False).st_mtime >= before_seconds:
                return False
            os.unlink(path)
            _sync_folder(folder)
            return True
        return False

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As the contract says. Temporary files whose writer died more than a day ago are removed on the way."""
        if prefix:
            check_key(prefix.removesuffix("/"))
        return self._walk(prefix)

    def flat_files(self) -> CacheFolder:
        """The folder for segments that this host's workers map. Nothing is made before something is kept in it."""
        from coldstart.stores.cache_folder import CacheFolder  # 1 ms that a store without snapshots worth it saves

        return CacheFolder(f"{self._root}/{FLAT_FILES}", limit_bytes=self._flat_files_bytes, kinds=("segments",))

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        pending = [prefix.rpartition("/")[0]]
        while pending:
            folder = pending.pop()
            for entry in _entries(f"{self._root}/{folder}"):
                key = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith(_TEMPORARY):
                    _remove_abandoned(entry)
                elif not _is_key(key):
                    continue
                elif entry.is_dir(follow_symlinks=False):
                    if f"{key}/".startswith(prefix):
                        pending.append(key)
                elif key.startswith(prefix) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # deleted since the folder was read
                        status = entry.stat(follow_symlinks=False)
                        yield ObjectInfo(key, status.st_size, status.st_mtime)

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"


# --- reading -------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: str) -> Iterator[int]:
    file = os.open(path, _READ_FLAGS)
    try:
        _check_regular(os.fstat(file).st_mode)
        yield file
    finally:
        os.close(file)


def _read(path: str) -> bytes:
    with _opened(path) as file:
        check_size(os.path.basename(path), os.fstat(file).st_size)
        return FileIO(file, closefd=False).readall()


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))


def _etag(data: bytes | memoryview) -> str:
    from blake3 import blake3  # 3 ms that opening a store does not need

    return blake3(data).hexdigest()


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _store_error(error, "", folder) from error


def _remove_abandoned(entry: os.DirEntry[str]) -> None:
    with suppress(OSError):  # it may be renamed just now, or belong to somebody else: neither is the listing's concern
        if time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_AFTER_SECONDS:
            os.unlink(entry.path)


def _is_key(name: str) -> bool:
    try:
        check_key(name)
    except StoreSetupError:
        return False
    return True


# --- writing -------------------------------------------------------------------------------------------------------


def _make_folder(folder: str) -> None:
    """Make ``folder`` and what is missing above it, readable by this user alone, and make their names durable."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    with suppress(FileExistsError):  # another writer was faster; if it is a file, the next step says so
        os.mkdir(folder, 0o700)
    _sync_folder(parent)


@contextmanager
def _temporary(folder: str, view: memoryview) -> Iterator[str]:
    """A synced file with the bytes of ``view`` under a name that no key can have; gone afterwards."""
    path = f"{folder}/{_TEMPORARY}{os.urandom(8).hex()}"
    file = os.open(path, _CREATE_FLAGS, 0o600)
    try:
        try:
            _write_all(file, view)
            os.fsync(file)
        finally:
            os.close(file)
        yield path
    finally:
        with suppress(FileNotFoundError):  # renamed into its place
            os.unlink(path)


def _write_all(file: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += os.write(file, view[done:])  # may write less than asked for: a limit, a signal, a nearly full disk


def _create(temporary: str, path: str, key: str) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise _occupied(path, key) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with _locked(os.path.dirname(path)):  # without link nobody creates but under this lock
            if os.path.lexists(path):
                raise _occupied(path, key) from error
            os.rename(temporary, path)


def _replace(temporary: str, path: str, key: str, if_match: str | None) -> None:
    with _locked(os.path.dirname(path)):
        if if_match is not None and _current_etag(path) != if_match:
            raise ConditionFailedError(f"{key!r} has changed since it was read", key=key)
        os.rename(temporary, path)


def _current_etag(path: str) -> str | None:
    try:
        return _etag(_read(path))
    except FileNotFoundError:
        return None


def _occupied(path: str, key: str) -> ConditionFailedError:
    with suppress(FileNotFoundError):
        _check_regular(os.stat(path, follow_symlinks=False).st_mode)
    return ConditionFailedError(f"{key!r} is stored already", key=key)


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Hold the folder's lock; the kernel takes it back from a process that dies. Removing its file would be a race."""
    lock = os.open(f"{folder}/{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _sync_folder(folder: str) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # network mounts that cannot sync a folder say so; their rename is all there is
            raise
    finally:
        os.close(file)


# --- errors --------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(key: str, path: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ObjectMissingError(f"nothing is stored under {key!r}: there is no {path}", key=key) from error
    except OSError as error:
        raise _store_error(error, key, path) from error


@contextmanager
def _writing(key: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _store_error(error, key, path) from error


def _store_error(error: OSError, key: str, path: str) -> StoreError:
    kind, advice = _ERRORS.get(error.errno or 0, _MAY_PASS)
    return kind(f"{path}: {advice} ({error.strerror or error})", key=key)
