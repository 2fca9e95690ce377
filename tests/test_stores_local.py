"""The local store: what is on the disk when, who may see it, and what is left by those who died."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstart.errors import (
    AccessDeniedError,
    BlobCorruptError,
    ObjectMissingError,
    StoreError,
    StoreSetupError,
    StoreTransientError,
)
from coldstart.stores.local import ABANDONED_AFTER_SECONDS, LocalStore

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the store will be."""
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> LocalStore:
    """A store that has not been written to."""
    return LocalStore(folder)


def run_child(script: str, *arguments: object) -> int:
    """Run Python code in a fresh process and return its exit status; -9 is killed."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=False, timeout=120).returncode


def files_of(folder: Path) -> set[str]:
    """The names of all files below a folder, hidden ones too."""
    return {path.name for path in folder.rglob("*") if path.is_file()}


# --- files and folders ---------------------------------------------------------------------------------------------


def test_reading_makes_no_folder(store: LocalStore, folder: Path):
    """Before the first write there is no folder, and reading, listing and deleting do not make one."""
    with pytest.raises(ObjectMissingError):
        store.get("k")
    assert list(store.list("")) == []
    store.delete("k")
    assert not folder.exists()


def test_folders_and_objects_are_for_their_owner(store: LocalStore, folder: Path):
    """What the first write makes has mode 0700 for folders and 0600 for files, whatever the umask allows."""
    before = os.umask(0o000)
    try:
        store.put("refs/name/key", b"x")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "refs", folder / "refs/name")}
    assert set(modes.values()) == {0o700}
    assert stat.S_IMODE((folder / "refs/name/key").stat().st_mode) == 0o600


def test_an_object_is_a_file_named_by_its_key(store: LocalStore, folder: Path):
    """People can find an object, and one who copies the folder has copied the store."""
    store.put("manifests/minilm/000001-ab", b"{}")
    assert (folder / "manifests/minilm/000001-ab").read_bytes() == b"{}"


def test_bytes_are_on_the_disk_before_their_name(store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Every kind of write syncs the file, then gives it its name, then syncs the folder."""
    etag = store.put("k", b"1")
    events: list[str] = []
    for name in ("fsync", "rename", "link"):
        real = getattr(os, name)

        def recorded(*arguments: object, name: str = name, real: object = real) -> object:
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
            events.append("fsync folder" if is_folder else name)
            return real(*arguments)

        monkeypatch.setattr(os, name, recorded)
    store.put("k", b"2", if_match=etag)
    store.put("k", b"3")
    store.put("new", b"1", if_absent=True)
    assert events == ["fsync", "rename", "fsync folder"] * 2 + ["fsync", "link", "fsync folder"]


def test_a_file_system_that_cannot_sync_folders_is_used_as_it_is(store: LocalStore, monkeypatch: pytest.MonkeyPatch):
    """Where syncing a folder is an invalid request, as on some network mounts, writing works."""
    real = os.fsync

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    store.put("a/b", b"x")
    assert store.get("a/b").data == b"x"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/etc/passwd", path)])
def test_what_is_no_file_is_named_and_refused(store: LocalStore, folder: Path, make: object):
    """A folder, a pipe or a symbolic link in an object's place is StoreSetupError at once, and is never followed."""
    store.put("other", b"x")
    make(str(folder / "k"))
    calls = [
        lambda: store.get("k"),
        lambda: store.head("k"),
        lambda: store.read_into("k", memoryview(bytearray(1))),
        lambda: store.put("k", b"x", if_absent=True),
        lambda: store.put("k", b"x", if_match="etag"),
    ]
    for call in calls:
        with pytest.raises(StoreSetupError, match="remove it"):
            call()
    assert [info.key for info in store.list("")] == ["other"]


def test_a_write_replaces_a_link_and_leaves_its_target(store: LocalStore, folder: Path, tmp_path: Path):
    """A plain write never writes through a symbolic link."""
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    folder.mkdir()
    (folder / "k").symlink_to(target)
    store.put("k", b"new")
    assert (store.get("k").data, target.read_bytes()) == (b"new", b"precious")


def test_an_object_and_a_folder_cannot_share_a_name(store: LocalStore):
    """Where a/b is stored, a cannot be, and the other way round: an error that says so."""
    store.put("a/b", b"x")
    store.put("c", b"x")
    for key in ("a", "c/d"):
        with pytest.raises(StoreSetupError):
            store.put(key, b"x")


def test_foreign_files_are_not_objects(store: LocalStore, folder: Path):
    """Files whose names no key can have are not listed; what lies there as a legal name is."""
    store.put("a/x", b"1")
    for name in (".DS_Store", "a/.hidden", "a/has space", "ü"):
        (folder / name).write_bytes(b"")
    assert [info.key for info in store.list("")] == ["a/x"]


def test_a_listing_outlives_deletions(store: LocalStore):
    """An object deleted while the listing is under way is left out, and is no error."""
    for number in range(5):
        store.put(f"k{number}", b"")
    listing = store.list("")
    first = next(listing).key
    for number in range(5):
        store.delete(f"k{number}")
    assert first.startswith("k")
    assert list(listing) == []


def test_the_repr_is_the_path(store: LocalStore, folder: Path):
    """What is shown of a store is its folder."""
    assert repr(store) == f"LocalStore({str(folder)!r})"
    assert store.root == str(folder)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30) | st.from_regex(r"[a.~/\\]{0,8}", fullmatch=True))
def test_no_key_leads_out_of_the_folder(key: str):
    """Any text is either refused, or names a file inside the store's folder."""
    with tempfile.TemporaryDirectory() as outer:
        store = LocalStore(f"{outer}/store")
        try:
            store.put(key, b"x")
        except StoreSetupError:
            assert os.listdir(outer) == []
        else:
            assert os.listdir(outer) == ["store"]
            assert store.get(key).data == b"x"


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=64), offset_bytes=st.integers(0, 70), length_bytes=st.integers(0, 70))
def test_a_range_is_a_slice_or_corruption(data: bytes, offset_bytes: int, length_bytes: int):
    """Any range inside the object is the same slice of its bytes; any range that leaves it is BlobCorruptError."""
    with tempfile.TemporaryDirectory() as outer:
        store = LocalStore(outer)
        store.put("k", data)
        target = bytearray(length_bytes)
        try:
            store.read_into("k", memoryview(target), offset_bytes=offset_bytes)
        except BlobCorruptError:
            assert offset_bytes + length_bytes > len(data)
        else:
            assert bytes(target) == data[offset_bytes : offset_bytes + length_bytes]


# --- failing system calls ------------------------------------------------------------------------------------------


def test_short_writes_and_short_reads_are_continued(store: LocalStore, monkeypatch: pytest.MonkeyPatch):
    """A kernel that takes and gives a few bytes at a time changes nothing."""
    write, preadv = os.write, os.preadv
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: preadv(file, [views[0][:5]], offset))
    data = bytes(range(200))
    target = bytearray(150)
    store.put("k", data)
    store.read_into("k", memoryview(target), offset_bytes=50)
    assert store.get("k").data == data
    assert bytes(target) == data[50:]


@pytest.mark.parametrize(
    ("number", "expected", "text"),
    [
        (errno.ENOSPC, StoreError, "disk is full"),
        (errno.EDQUOT, StoreError, "quota"),
        (errno.EACCES, AccessDeniedError, "no permission"),
        (errno.EPERM, AccessDeniedError, "no permission"),
        (errno.EROFS, StoreSetupError, "read-only"),
        (errno.ENAMETOOLONG, StoreSetupError, "too long"),
        (errno.EIO, StoreTransientError, "asked again"),
        (errno.ESTALE, StoreTransientError, "asked again"),
        (errno.EMFILE, StoreTransientError, "asked again"),
        (errno.ENOENT, StoreTransientError, "asked again"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_failed_write_leaves_the_old_object_and_nothing_else(
    store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type, text: str, call: str
):
    """Whichever call fails with whichever error: the class and the text fit, no temporary file stays, the old bytes do."""

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    store.put("k", b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(StoreError, match=text) as caught:
            store.put("k", b"new")
    assert type(caught.value) is expected
    assert caught.value.key == "k"
    assert files_of(folder) == {"k", ".lock"}
    assert store.get("k").data == b"old"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_a_swap_is_refused(store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int):
    """A file system without flock never swaps on luck: the error says to use another place."""
    etag = store.put("k", b"1")

    def flock(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(StoreSetupError, match="flock"):
        store.put("k", b"2", if_match=etag)
    assert store.get("k").data == b"1"


def test_a_failing_link_is_not_taken_for_a_missing_one(store: LocalStore, monkeypatch: pytest.MonkeyPatch):
    """Only a file system that has no links falls back to the lock; a full one is full."""

    def link(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StoreError, match="disk is full"):
        store.put("k", b"x", if_absent=True)
    assert list(store.list("")) == []


def test_an_unreadable_folder_is_no_empty_listing(store: LocalStore, monkeypatch: pytest.MonkeyPatch):
    """A listing that cannot see everything fails, so that nobody collects what it missed."""
    store.put("a/b", b"x")

    def scandir(path: str) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(AccessDeniedError):
        list(store.list("a/"))


_LIMITED = """
import resource, signal, sys
from coldstart.errors import StoreError, StoreTransientError
from coldstart.stores.local import LocalStore
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    LocalStore(sys.argv[1]).put("big", bytes(3 << 20))
except StoreTransientError:
    sys.exit(4)
except StoreError:
    sys.exit(3)
"""


def test_a_real_limit_on_file_size_is_a_store_error(store: LocalStore, folder: Path):
    """The kernel first writes less than asked for and then fails: not transient, and nothing is left."""
    assert run_child(_LIMITED, folder) == 3
    assert files_of(folder) == set()


# --- several processes ---------------------------------------------------------------------------------------------

_KILLED_AT = """
import os, signal, sys
from coldstart.stores.local import LocalStore

calls_left = int(sys.argv[2])

def deadly(real):
    def call(*arguments, **options):
        global calls_left
        calls_left -= 1
        if not calls_left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

for name in ("open", "write", "fsync", "link", "rename", "unlink", "close", "mkdir"):
    setattr(os, name, deadly(getattr(os, name)))
write = os.write
os.write = lambda file, data: write(file, data[:40_000])
store = LocalStore(sys.argv[1])
if sys.argv[3] == "create":
    store.put("a/new", b"N" * 100_000, if_absent=True)
elif sys.argv[3] == "swap":
    store.put("a/k", b"N" * 100_000, if_match=store.get("a/k").etag)
else:
    store.put("a/k", b"N" * 100_000)
"""


@pytest.mark.parametrize("how", ["put", "swap", "create"])
def test_killed_at_any_step_leaves_the_old_object_or_the_new(folder: Path, how: str):
    """A writer killed before each of its system calls in turn never leaves a part, a stray object or a held lock."""
    store = LocalStore(folder)
    seen = set()
    for step in range(1, 100):
        store.put("a/k", b"old")
        store.delete("a/new")
        status = run_child(_KILLED_AT, folder, step, how)
        stored = {info.key: store.get(info.key).data for info in store.list("")}
        new = stored.pop("a/new", None)
        assert new in (None, b"N" * 100_000)
        assert stored.keys() == {"a/k"}
        assert stored["a/k"] in (b"old", b"N" * 100_000)
        seen.add((stored["a/k"] == b"old") if how != "create" else (new is None))
        if status == 0:
            break
        assert status == -9
    assert step > 8
    assert seen == {True, False}


def test_what_a_dead_writer_left_is_removed_a_day_later(store: LocalStore, folder: Path):
    """A listing removes temporary files older than a day, shows none, and leaves those that may still be written."""
    store.put("a/k", b"x")
    for name, age_seconds in ((".tmp-old", ABANDONED_AFTER_SECONDS + 60), (".tmp-young", ABANDONED_AFTER_SECONDS - 60)):
        (folder / "a" / name).write_bytes(b"part")
        os.utime(folder / "a" / name, (time.time() - age_seconds,) * 2)
    assert [info.key for info in store.list("")] == ["a/k"]
    assert files_of(folder) == {"k", ".lock", ".tmp-young"}


_COUNTING = """
import sys
from coldstart.errors import ConditionFailedError
from coldstart.stores.local import LocalStore
store = LocalStore(sys.argv[1])
done = 0
while done < 30:
    stored = store.get("counter")
    try:
        store.put("counter", b"%d %s" % (int(stored.data.split()[0]) + 1, sys.argv[2].encode()), if_match=stored.etag)
        done += 1
    except ConditionFailedError:
        pass
"""


def test_processes_lose_no_acknowledged_swap(store: LocalStore, folder: Path):
    """Four processes that count up together end at the number of their acknowledged swaps."""
    store.put("counter", b"0")
    command = [sys.executable, "-c", _COUNTING, str(folder)]
    children = [subprocess.Popen([*command, str(number)]) for number in range(4)]
    assert [child.wait(timeout=120) for child in children] == [0, 0, 0, 0]
    assert store.get("counter").data.split()[0] == b"120"


def test_no_write_slips_into_a_swap(store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Between a swap's last look and its rename, plain writes and deletions by others wait for the folder's lock."""
    etag = store.put("k", b"1")
    taken = []

    def under_lock(real: object) -> object:
        def call(*arguments: str) -> None:
            with open(folder / ".lock", "rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    taken.append(os.path.basename(arguments[-1]))
            real(*arguments)

        return call

    monkeypatch.setattr(os, "rename", under_lock(os.rename))
    monkeypatch.setattr(os, "unlink", under_lock(os.unlink))
    store.put("k", b"2", if_match=etag)
    store.put("k", b"3")
    store.delete("k")
    assert taken == ["k", "k", "k"]
