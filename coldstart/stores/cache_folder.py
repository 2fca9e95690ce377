"""A bounded folder of copies that the processes of one host share; what the copies mean is ``stores.cached``'s business.

::

    <folder>/v1/blobs/<64 hex>       a copy
    <folder>/v1/manifests/<64 hex>   a copy
    <folder>/v1/segments/<64 hex>    a copy that is mapped and not read: mode 0400, of the length that its user knows
    <folder>/v1/locks/<64 hex>       flock: somebody is fetching the blob of this name. Empty
    <folder>/v1/*/.tmp-<random>      a copy that is being written, or whose writer died

- A copy appears by one ``rename``, whole. Nothing is synced: after a power cut a copy may hold anything, which its
  reader finds out like any other damage.
- A copy's last use is its file's modification time. What makes the folder exceed its limit first removes the copies
  used longest ago. A reader has its file open, so removing the name takes nothing from it.
- Locks save double work and are never needed for what is read to be right. A lock file that is removed while
  somebody waits for it costs at most a second fetch.
- Only files named as above are ever removed. The folder must belong to this user, and nobody else may write to it:
  a manifest that somebody else could put there would be believed, and a mapped file that somebody cuts off kills its
  user with SIGBUS. For the same reason files are mapped from file systems of this host alone (``is_on_this_host``):
  on a shared one another host may remove what is mapped here.

Every method raises OSError as it comes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from coldstart.stores.retrying import Clock

    Kind = Literal["blobs", "manifests", "segments"]

KINDS: tuple[Kind, ...] = ("blobs", "manifests", "segments")
ABANDONED_AFTER_SECONDS = 3600.0
"""A temporary file or a lock this old has nobody any more: copies are written in one go, from memory."""
SLACK = 16
"""Room is made down to this fraction below the limit, so that not every copy near it costs a look at all others; and a
process looks again after writing as much, because it does not see what others write."""

SPARE_BYTES = 1 << 30
"""What a file for mapping leaves free on the disk: it is written for speed alone, and nobody asked for it."""
HOST_FILE_SYSTEMS = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"})

_VERSION = "v1"
_LOCKS = "locks"
_TEMPORARY = ".tmp-"
_NAME = re.compile(r"[0-9a-f]{64}\Z")
# O_NONBLOCK: opening a named pipe that somebody put there must not wait for a writer. Regular files ignore it.
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.005, 0.1


class Usage(NamedTuple):
    """What a cache's folder holds; ``total_bytes`` is the sum of the files' lengths."""

    copies: int
    total_bytes: int


class _File(NamedTuple):
    used_seconds: float
    size_bytes: int
    path: str


class CacheFolder:
    """The copies of ``kinds`` under ``folder``. ``now`` gives Unix seconds. Safe between threads and processes."""

    def __init__(
        self,
        folder: str,
        *,
        limit_bytes: int,
        now: Callable[[], float] = time.time,
        kinds: tuple[Kind, ...] = KINDS,
    ) -> None:
        self._kinds = kinds
        self._folder = folder
        self._root = f"{folder}/{_VERSION}"
        self._limit_bytes = limit_bytes
        self._now = now
        self._lock = threading.Lock()
        self._total_bytes = 0
        self._unseen_bytes: int | None = None
        """What was written here since the last look at all files; None: never looked."""

    def prepare(self) -> None:
        """Make what is missing, and refuse (EPERM) a folder that others could write to."""
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        _make(self._root)
        self.check()
        for name in (*self._kinds, _LOCKS):
            _make(f"{self._root}/{name}")

    def check(self) -> None:
        """Refuse as ``prepare`` does, and make nothing: FileNotFoundError where there is no such folder yet."""
        _check_private(self._folder, os.stat(self._folder), allowed=stat.S_ISVTX)
        _check_private(self._root, os.stat(self._root, follow_symlinks=False), allowed=0)

    def is_on_this_host(self) -> bool:
        """Whether the folder is on a file system that no other host writes to, as far as the kernel's table tells."""
        return _file_system(os.path.realpath(self._folder)) in HOST_FILE_SYSTEMS

    def fits(self, total_bytes: int) -> bool:
        """Whether copies of so many bytes together can be kept without one of them driving out another."""
        return total_bytes <= self._limit_bytes - self._limit_bytes // SLACK

    def read_into(self, kind: Kind, name: str, target: memoryview) -> bool:
        """Fill ``target`` from a copy of just its length; False if there is none. One of another length is dropped."""
        with self._opened(kind, name) as (file, size_bytes):
            if file < 0:
                return False
            if size_bytes == len(target) and _fill(file, target):
                self._touch(file)
                return True
        self.drop(kind, name)
        return False

    def read(self, kind: Kind, name: str) -> bytearray | None:
        """All bytes of a copy; None if there is none. One that is cut off while it is read is dropped."""
        with self._opened(kind, name) as (file, size_bytes):
            if file < 0:
                return None
            data = bytearray(size_bytes)
            if _fill(file, memoryview(data)):
                self._touch(file)
                return data
        self.drop(kind, name)
        return None

    def open_to_map(self, kind: Kind, name: str, size_bytes: int) -> int | None:
        """A descriptor of a copy that nobody but this user and root can change; None if there is none.

        One of another length, or that others could change, is dropped. The caller closes the descriptor.
        """
        with self._opened(kind, name) as (file, found_bytes):
            if file < 0:
                return None
            status = os.fstat(file)
            is_ours = status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if is_ours and found_bytes == size_bytes:
                self._touch(file)
                return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 0)
        self.drop(kind, name)
        return None

    def keep(self, kind: Kind, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write a copy, in place of any of that name, after making room; one larger than the limit is not kept."""
        size_bytes = sum(len(part) for part in parts)
        if size_bytes <= self._limit_bytes:
            self._write(kind, name, parts, size_bytes, mode=0o600)

    def keep_to_map(self, kind: Kind, name: str, parts: Iterable[memoryview], size_bytes: int) -> None:
        """Write a copy that ``open_to_map`` opens, part by part as they come; what ``parts`` raises leaves no copy.

        ENOSPC where the disk would be left with less than SPARE_BYTES.
        """
        disk = os.statvfs(self._root)
        if disk.f_bavail * disk.f_frsize < size_bytes + SPARE_BYTES:
            raise OSError(errno.ENOSPC, f"{size_bytes} bytes would leave less than {SPARE_BYTES} free", self._root)
        self._write(kind, name, parts, size_bytes, mode=0o400)

    def _write(self, kind: Kind, name: str, parts: Iterable[bytes | memoryview], size_bytes: int, *, mode: int) -> None:
        self._make_room(size_bytes)
        temporary = f"{self._root}/{kind}/{_TEMPORARY}{os.urandom(8).hex()}"
        file = os.open(temporary, _CREATE_FLAGS, mode)
        try:
            try:
                for part in parts:
                    _write_all(file, memoryview(part))
                self._touch(file)
            finally:
                os.close(file)
            os.rename(temporary, self._path(kind, name))
        except BaseException:
            with suppress(OSError):  # what remains is removed when it is old
                os.unlink(temporary)
            raise

    def drop(self, kind: Kind, name: str) -> None:
        """Remove a copy; that there is none is no error."""
        with suppress(FileNotFoundError):
            os.unlink(self._path(kind, name))

    @contextmanager
    def turn(self, name: str, clock: Clock, wait_seconds: float) -> Iterator[bool]:
        """Be the one that fetches ``name``; False: another still is, after waiting for it.

        The kernel takes the lock back from a process that dies.
        """
        path = f"{self._root}/{_LOCKS}/{name}"
        file = os.open(path, _LOCK_FLAGS, 0o600)
        try:
            held = _lock(file, clock, wait_seconds)
            try:
                yield held
                if held:  # and it went well: else the next one in line needs this very file
                    with suppress(OSError):
                        os.unlink(path)
            finally:
                if held:
                    fcntl.flock(file, fcntl.LOCK_UN)  # not by closing alone: a forked child may hold it open too
        finally:
            os.close(file)

    def names(self, kind: Kind) -> Iterator[tuple[str, float]]:
        """Every copy of a kind, with its last use in Unix seconds. A folder that is not there is an empty one."""
        for file in self._files():
            folder, name = file.path.split("/")[-2:]
            if folder == kind and _is_copy(file.path):
                yield name, file.used_seconds

    def usage(self) -> Usage:
        """Count the copies and their bytes. A folder that is not there is an empty one."""
        copies = [file for file in self._files() if _is_copy(file.path)]
        return Usage(len(copies), sum(file.size_bytes for file in copies))

    # --- room ---------------------------------------------------------------------------------------------------------

    def _make_room(self, size_bytes: int) -> None:
        with self._lock:
            unseen = self._unseen_bytes
            full = self._total_bytes + size_bytes > self._limit_bytes
            if unseen is None or full or unseen > self._limit_bytes // SLACK:
                self._total_bytes = self._evict(size_bytes)
                unseen = 0
            self._total_bytes += size_bytes  # also where it replaces a copy: too much until the next look
            self._unseen_bytes = unseen + size_bytes

    def _evict(self, size_bytes: int) -> int:
        """Remove what is abandoned and, if ``size_bytes`` more are too many, the copies used longest ago."""
        files = [file for file in self._files() if not self._remove_abandoned(file)]
        total_bytes = sum(file.size_bytes for file in files)
        if total_bytes + size_bytes <= self._limit_bytes:
            return total_bytes
        goal_bytes = self._limit_bytes - self._limit_bytes // SLACK
        for file in sorted(filter(lambda file: _is_copy(file.path), files)):
            if total_bytes + size_bytes <= goal_bytes:
                break
            with suppress(FileNotFoundError):  # another process makes room too
                os.unlink(file.path)
            total_bytes -= file.size_bytes
        return total_bytes

    def _remove_abandoned(self, file: _File) -> bool:
        if _is_copy(file.path) or self._now() - file.used_seconds <= ABANDONED_AFTER_SECONDS:
            return False
        with suppress(FileNotFoundError):
            os.unlink(file.path)
        return True

    def _files(self) -> Iterator[_File]:
        """All files that are ours to remove."""
        for kind in (*self._kinds, _LOCKS):
            with suppress(FileNotFoundError), os.scandir(f"{self._root}/{kind}") as entries:
                for entry in entries:
                    if not entry.name.startswith(_TEMPORARY) and not _NAME.match(entry.name):
                        continue
                    with suppress(FileNotFoundError):  # gone since the folder was read
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            yield _File(status.st_mtime, status.st_size, entry.path)

    # --- files --------------------------------------------------------------------------------------------------------

    def _path(self, kind: Kind, name: str) -> str:
        return f"{self._root}/{kind}/{name}"

    @contextmanager
    def _opened(self, kind: Kind, name: str) -> Iterator[tuple[int, int]]:
        """A copy's descriptor and length; -1 if there is none."""
        try:
            file = os.open(self._path(kind, name), _READ_FLAGS)
        except FileNotFoundError:
            yield -1, 0
            return
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EISDIR, "there is something else than a file where a copy should be")
            yield file, status.st_size
        finally:
            os.close(file)

    def _touch(self, file: int) -> None:
        nanoseconds = int(self._now() * 1e9)
        with suppress(OSError):  # a read-only file system: nothing is evicted there either
            os.utime(file, ns=(nanoseconds, nanoseconds))


def _file_system(path: str) -> str:
    """The type of the file system at ``path``, by the mount that is nearest above it; "" where there is no table."""
    found, longest = "", -1
    with suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
        for line in table:
            mount, _, file_system = line.partition(" - ")
            place = mount.split(" ")[4].replace("\\040", " ").rstrip("/")
            if (path == place or path.startswith(f"{place}/")) and len(place) >= longest:  # a later mount hides others
                found, longest = file_system.split(" ")[0], len(place)
    return found


def _check_private(folder: str, status: os.stat_result, *, allowed: int) -> None:
    """Refuse a folder in which somebody but this user and root may replace names. ``allowed``: mode bits that suffice."""
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & allowed
    if not stat.S_ISDIR(status.st_mode) or others_write or status.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, "it has to be a folder of this user that nobody else may write to", folder)


def _make(folder: str) -> None:
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)


def _is_copy(path: str) -> bool:
    kind, name = path.split("/")[-2:]
    return kind in KINDS and not name.startswith(_TEMPORARY)


def _fill(file: int, target: memoryview) -> bool:
    """Fill ``target`` from the file's beginning; False if the file ends before."""
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], done)
        if not count:
            return False
        done += count
    return True


def _write_all(file: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += os.write(file, view[done:])


def _lock(file: int, clock: Clock, wait_seconds: float) -> bool:
    """Lock ``file`` within ``wait_seconds``: flock itself knows no time limit, so it is asked again and again."""
    deadline = clock.monotonic() + wait_seconds
    pause = _FIRST_POLL_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if clock.monotonic() >= deadline:
                return False
            clock.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)
        else:
            return True
