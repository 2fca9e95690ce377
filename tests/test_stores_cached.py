"""The cache of a host: what it answers, what it never answers, what it removes, and that no trouble of its own is seen."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coldstart import events
from coldstart.cli import doctor
from coldstart.config import load
from coldstart.early import Opener, Services, opener_of_start
from coldstart.errand import QUIET
from coldstart.errors import BlobCorruptError, ObjectMissingError, StoreTransientError
from coldstart.fetch import FetchRequest, start_threads
from coldstart.manifest import blob_key
from coldstart.repository import Repository
from coldstart.stores import StoreOptions, cached, open_store
from coldstart.stores.cache_folder import ABANDONED_AFTER_SECONDS, SLACK, CacheFolder
from coldstart.stores.cached import KEEPING_SECONDS, KEEPING_SHARE, WAIT_SECONDS, CachedStore
from coldstart.stores.local import LocalStore
from coldstart.stores.memory import MemoryStore
from coldstart.stores.retrying import RetryingStore
from coldstart.testing import FakeClock, Fault, FaultyStore
from tests.generations import arena_of, stored_chunks

DATA = bytes(range(256)) * 8
MANIFEST = "manifests/scales/000001-0a1b2c3d"
PATIENCE_SECONDS = 60.0


def name_of(data) -> str:
    """A blob's name."""
    return blake3(data).hexdigest()


KEY = blob_key(name_of(DATA))


class Host:
    """A remote store that counts, and the cache of one host before it; ``worker()`` is another process' view of both."""

    def __init__(self, folder: Path, *, limit_bytes: int = 1 << 20) -> None:
        self.memory = MemoryStore("remote")
        self.remote = FaultyStore(self.memory)
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.clock = FakeClock()
        self.reports: list[str] = []

    def worker(self, **options) -> CachedStore:
        options = {"clock": self.clock, "now": self.clock.time, "degraded": self.reports.append, **options}
        return CachedStore(self.remote, str(self.folder), limit_bytes=self.limit_bytes, **options)

    def stored(self, data: bytes) -> str:
        """Put a blob into the remote store, behind the cache's back; its key."""
        key = blob_key(name_of(data))
        self.memory.put(key, data)
        return key

    def copies(self, kind: str = "blobs") -> dict[str, int]:
        """Name and size of every file of a kind."""
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.folder / "v1" / kind) as entries:
            return {entry.name: entry.stat().st_size for entry in entries}
        return {}

    def fetched(self) -> int:
        """How many reads of blobs and manifests the remote store has seen."""
        return self.remote.count("read_into") + self.remote.count("get", "manifests/*")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host whose cache is empty."""
    return Host(tmp_path / "cache")


def read(store, key: str, length: int = len(DATA)) -> bytes:
    """A whole blob as a restore reads it: hashed, and read once more if it is wrong."""
    target = bytearray(length)
    store.read_into(key, memoryview(target))
    if blob_key(name_of(target)) != key:
        store.read_into(key, memoryview(target))
    return bytes(target)


def copy_of(host: Host, key: str) -> Path:
    """Where a blob's copy lies."""
    return host.folder / "v1" / "blobs" / key.rpartition("/")[2]


def manifest_copy_of(host: Host) -> Path:
    """Where the copy of the only manifest lies."""
    (name,) = host.copies("manifests")
    return host.folder / "v1" / "manifests" / name


# --- what is answered from where -------------------------------------------------------------------------------------


def test_the_next_worker_of_a_host_reads_what_the_first_fetched(host: Host):
    """A blob and a manifest are read from the store once; then the host answers, with bytes and etag as they were."""
    host.stored(DATA)
    etag = host.memory.put(MANIFEST, b"{}")
    for _ in range(3):
        worker = host.worker()
        assert read(worker, KEY) == DATA
        assert (worker.get(MANIFEST).data, worker.get(MANIFEST).etag) == (b"{}", etag)
    assert (host.remote.count("read_into"), host.remote.count("get")) == (1, 1)
    assert host.reports == []


def test_a_copy_lands_in_a_part_of_the_callers_memory(host: Host):
    """A hit fills just the target, and the bytes around it stay."""
    host.stored(DATA)
    read(host.worker(), KEY)
    buffer = bytearray(len(DATA) + 4)
    host.worker().read_into(KEY, memoryview(buffer)[2:-2])
    assert bytes(buffer) == bytes(2) + DATA + bytes(2)
    assert host.fetched() == 1


def test_a_blob_is_held_once_in_memory(tmp_path: Path):
    """Neither a miss nor a hit takes memory of the blob's size beside the caller's own."""
    data = os.urandom(8 << 20)
    key = blob_key(name_of(data))
    remote = LocalStore(tmp_path / "remote")
    remote.put(key, data)
    store = CachedStore(remote, str(tmp_path / "cache"), limit_bytes=1 << 30)
    target = bytearray(len(data))
    tracemalloc.start()
    try:
        for reader in (store, CachedStore(remote, str(tmp_path / "cache"), limit_bytes=1 << 30)):
            reader.read_into(key, memoryview(target))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert target == data
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize(
    "key", ["refs/scales/ab12", "leases/scales", "starts/scales/d/1.json", "probes/x", "blobs/ab/x"]
)
def test_what_may_change_is_never_kept(host: Host, key: str):
    """Refs and all else that is mutable, or not named by its content, is read from the store each time and leaves no file."""
    worker = host.worker()
    for data in (b"first", b"other"):
        etag = worker.put(key, data)
        target = bytearray(5)
        worker.read_into(key, memoryview(target))
        assert bytes(target) == data
        assert (worker.get(key).data, worker.get(key).etag, worker.head(key).size_bytes) == (data, etag, 5)
    assert host.copies("blobs") == host.copies("manifests") == {}


def test_without_the_store_there_is_no_ref(host: Host):
    """With everything cached and the store away, blobs and manifests are read, and the ref, listings and heads fail."""
    host.stored(DATA)
    host.memory.put(MANIFEST, b"{}")
    host.memory.put("refs/scales/ab12", b"{}")
    worker = host.worker()
    worker.get("refs/scales/ab12"), worker.get(MANIFEST), read(worker, KEY)
    host.remote.inject(Fault("transient_before", times=None))
    assert worker.get(MANIFEST).data == b"{}"
    assert read(worker, KEY) == DATA
    for ask in (
        lambda: worker.get("refs/scales/ab12"),
        lambda: worker.head(KEY),
        lambda: worker.list("refs/"),
        lambda: worker.get(KEY),
        lambda: worker.put("refs/scales/ab12", b"x"),
        lambda: worker.delete(KEY),
    ):
        with pytest.raises(StoreTransientError):
            ask()


def test_a_blob_read_whole_by_get_is_the_stores(host: Host):
    """``get`` of a blob, which verifying uses, sees damage in the store although the host has a good copy."""
    host.stored(DATA)
    worker = host.worker()
    read(worker, KEY)
    host.memory.put(KEY, b"damaged")
    assert worker.get(KEY).data == b"damaged"
    assert read(worker, KEY) == DATA


def test_parts_of_a_blob_come_from_the_store(host: Host):
    """A read from the middle, or of nothing, asks the store, whatever the copy holds."""
    host.stored(DATA)
    worker = host.worker()
    read(worker, KEY)
    copy_of(host, KEY).write_bytes(bytes(len(DATA)))
    part = bytearray(10)
    worker.read_into(KEY, memoryview(part), offset_bytes=5)
    assert bytes(part) == DATA[5:15]
    worker.read_into(KEY, memoryview(bytearray()))
    assert host.copies() == {name_of(DATA): len(DATA)}
    with pytest.raises(ObjectMissingError):
        worker.read_into(blob_key("0" * 64), memoryview(bytearray()))


def test_the_beginning_of_a_blob_is_right_and_so_is_the_whole_after_it(host: Host):
    """A read of less from offset 0 gets the right bytes, and what it leaves in the cache is not taken for the blob."""
    host.stored(DATA)
    worker = host.worker()
    for length in (10, len(DATA), 10, len(DATA)):
        target = bytearray(length)
        worker.read_into(KEY, memoryview(target))
        assert bytes(target) == DATA[:length]
    with pytest.raises(BlobCorruptError):
        worker.read_into(KEY, memoryview(bytearray(len(DATA) + 1)))


def test_what_is_written_is_kept_once_the_store_has_it(host: Host):
    """The next worker reads a capture's blobs and manifest without the store; a write that failed leaves nothing."""
    host.remote.inject(Fault("transient_before", "put", times=2))
    worker = host.worker()
    for key in (KEY, MANIFEST):
        with pytest.raises(StoreTransientError):
            worker.put(key, DATA)
    assert host.copies("blobs") == host.copies("manifests") == {}
    worker.put(KEY, memoryview(DATA))
    etag = worker.put(MANIFEST, memoryview(b"{}"), if_absent=True)
    worker = host.worker()
    assert read(worker, KEY) == DATA
    assert worker.get(MANIFEST) == (b"{}", etag)
    assert host.fetched() == 0


def test_what_is_deleted_is_not_answered(host: Host):
    """A deletion takes the copy too."""
    worker = host.worker()
    worker.put(KEY, DATA)
    worker.put(MANIFEST, b"{}")
    for key in (KEY, MANIFEST):
        worker.delete(key)
        worker.delete(key)
    with pytest.raises(ObjectMissingError):
        worker.read_into(KEY, memoryview(bytearray(len(DATA))))
    with pytest.raises(ObjectMissingError):
        worker.get(MANIFEST)


def test_stores_share_blobs_and_not_manifests(host: Host):
    """Of two stores behind one folder, a blob of either serves both; a manifest's key may mean another one in each."""
    other = MemoryStore("other")
    other.put(MANIFEST, b"other")
    second = CachedStore(other, str(host.folder), limit_bytes=1 << 20)
    host.worker().put(MANIFEST, b"{}")
    host.worker().put(KEY, DATA)
    assert second.get(MANIFEST).data == b"other"
    assert host.worker().get(MANIFEST).data == b"{}"
    assert read(second, KEY) == DATA


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(bytes(len(DATA))),
        lambda path: path.write_bytes(DATA[:-1]),
        lambda path: path.write_bytes(DATA + b"x"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["altered", "cut off", "longer", "empty", "gone"],
)
def test_a_damaged_copy_is_replaced(host: Host, damage):
    """A reader that hashes and reads again gets the right bytes, with one fetch; the worker after it needs none."""
    host.stored(DATA)
    read(host.worker(), KEY)
    damage(copy_of(host, KEY))
    assert read(host.worker(), KEY) == DATA
    assert copy_of(host, KEY).read_bytes() == DATA
    assert read(host.worker(), KEY) == DATA
    assert (host.fetched(), host.reports) == (2, [])


def test_a_copy_that_is_no_file_is_no_copy(host: Host):
    """A folder, a link or a pipe under a copy's name is not followed, waited for or removed, and the store answers."""
    host.stored(DATA)
    read(host.worker(), KEY)
    elsewhere = host.folder.parent / "elsewhere"
    elsewhere.write_bytes(DATA)
    path = copy_of(host, KEY)
    for put in (path.mkdir, lambda: path.symlink_to(elsewhere), lambda: os.mkfifo(path)):
        path.unlink() if not path.is_dir() else path.rmdir()
        put()
        before, host.reports[:] = host.fetched(), []
        assert read(host.worker(), KEY) == DATA
        assert (host.fetched(), len(host.reports)) == (before + 1, 1)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_restore_heals_altered_copies(host: Host, threads: int):
    """The fetch engine, over a cache of which every copy is altered, lands every byte, and the next start is clean."""
    manifest = stored_chunks(host.memory, [[(os.urandom(3000), codec) for codec in ("raw", "zstd") * 4]])
    _, right = _fetch(host, manifest, threads)
    for name in host.copies():
        path = host.folder / "v1" / "blobs" / name
        path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    report, copies = _fetch(host, manifest, threads)
    assert report.retried_chunks == len(manifest.chunks)
    assert copies == right
    assert _fetch(host, manifest, threads)[0].retried_chunks == 0


def _fetch(host: Host, manifest, threads: int):
    arena = arena_of(manifest)
    report = start_threads(FetchRequest(manifest, host.worker(), arena, threads, 1 << 20)).wait()
    return report, {path.name: path.read_bytes() for path in (host.folder / "v1" / "blobs").iterdir()}


def test_damage_in_the_store_does_not_stay_on_the_host(host: Host):
    """A blob that is wrong in the store is wrong for the reader, and once mended there right, whatever was kept."""
    host.memory.put(KEY, bytes(len(DATA)))
    worker = host.worker()
    assert read(worker, KEY) != DATA
    assert host.copies() == {}
    host.stored(DATA)
    assert read(worker, KEY) == DATA
    assert read(host.worker(), KEY) == DATA


@settings(max_examples=60)
@given(place=st.integers(0, 10_000), flip=st.integers(1, 255), cut=st.booleans())
def test_no_altered_manifest_is_believed(tmp_path_factory, place: int, flip: int, cut: bool):
    """A manifest's copy with any byte altered, or cut off anywhere, is dropped, and the store answers."""
    host = Host(tmp_path_factory.mktemp("host") / "cache")
    host.worker().put(MANIFEST, b'{"format": 1}')
    path = manifest_copy_of(host)
    data = bytearray(path.read_bytes())
    place %= len(data)
    if cut:
        del data[place:]
    else:
        data[place] ^= flip
    path.write_bytes(data)
    assert host.worker().get(MANIFEST).data == b'{"format": 1}'
    assert host.remote.count("get") == 1
    assert host.worker().get(MANIFEST).data == b'{"format": 1}'
    assert host.remote.count("get") == 1


def test_a_manifests_copy_under_another_name_is_not_believed(host: Host):
    """A copy that is put in another's place, or in that of another store's, is dropped."""
    other = MANIFEST.replace("000001", "000002")
    host.worker().put(MANIFEST, b"first")
    first = manifest_copy_of(host).read_bytes()
    host.worker().put(other, b"second")
    for name in host.copies("manifests"):
        (host.folder / "v1" / "manifests" / name).write_bytes(first)
    assert host.worker().get(other).data == b"second"
    assert host.worker().get(MANIFEST).data == b"first"


# --- room ------------------------------------------------------------------------------------------------------------


class CacheMachine(RuleBasedStateMachine):
    """Reads, writes, damage and new processes, against the promises: right bytes, a limit, the oldest use goes first."""

    limit_bytes = 4096

    @initialize(sizes=st.lists(st.integers(1, 1500), min_size=3, max_size=12), huge=st.booleans())
    def begin(self, sizes: list[int], huge: bool) -> None:
        self.home = ExitStack()
        self.host = Host(Path(self.home.enter_context(_folder())) / "cache", limit_bytes=self.limit_bytes)
        self.worker = self.host.worker()
        self.sizes = dict(enumerate([*sizes, 5000] if huge else sizes))
        self.used: dict[str, float] = {}
        self.damaged: set[str] = set()

    def teardown(self) -> None:
        if hasattr(self, "home"):
            self.home.close()

    def blob(self, number: int) -> tuple[bytes, str]:
        number %= len(self.sizes)
        data = (b"%d|" % number).ljust(self.sizes[number], b".")[: self.sizes[number]]
        return data, self.host.stored(data)

    @rule(number=st.integers(0, 12))
    def read_blob(self, number: int) -> None:
        data, key = self.blob(number)
        name = name_of(data)
        before, fetched = self.host.copies(), self.host.fetched()
        self.host.clock.advance(1)
        assert read(self.worker, key, len(data)) == data
        if name in before and name not in self.damaged:
            assert self.host.fetched() == fetched
        self.damaged.discard(name)
        self.after(name, len(data), before)

    @rule(number=st.integers(0, 12))
    def write_blob(self, number: int) -> None:
        data, key = self.blob(number)
        before = self.host.copies()
        self.host.clock.advance(1)
        self.worker.put(key, data)
        self.damaged.discard(name_of(data))
        self.after(name_of(data), len(data), before)

    def after(self, name: str, size_bytes: int, before: dict[str, int]) -> None:
        """Only the copies used longest ago went, only for want of room, and no more of them than were in the way."""
        now = self.host.copies()
        assert (name in now) == (size_bytes <= self.limit_bytes)
        gone = sorted(self.used[other] for other in set(before) - set(now))
        kept = [self.used[other] for other in set(before) & set(now) - {name}]
        if gone:
            assert all(gone[-1] <= used for used in kept)
            assert sum(before.values()) + size_bytes > self.limit_bytes
            last = max(set(before) - set(now), key=lambda other: self.used[other])
            goal_bytes = self.limit_bytes - self.limit_bytes // SLACK
            assert sum({**before, **now}[other] for other in {*now, last}) > goal_bytes - before.get(name, 0)
        self.used[name] = self.host.clock.time()

    @precondition(lambda self: self.host.copies())
    @rule(number=st.integers(0, 12), how=st.sampled_from(["alter", "cut", "remove"]))
    def damage(self, number: int, how: str) -> None:
        names = sorted(self.host.copies())
        path = self.host.folder / "v1" / "blobs" / names[number % len(names)]
        self.damaged.add(path.name)
        if how == "remove":
            path.unlink()
        else:
            data = path.read_bytes()
            path.write_bytes(data[:-1] if how == "cut" else bytes(byte ^ 255 for byte in data))
            os.utime(path, (self.used[path.name], self.used[path.name]))

    @rule()
    def another_process(self) -> None:
        self.worker = self.host.worker()

    @invariant()
    def the_limit_holds(self) -> None:
        if hasattr(self, "host"):
            assert sum(self.host.copies().values()) <= self.limit_bytes
            assert self.host.reports == []


def _folder():
    import tempfile

    return tempfile.TemporaryDirectory()


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCacheAgainstItsPromises = CacheMachine.TestCase


def test_workers_see_each_others_copies_in_time(host: Host):
    """Two workers that write by turns exceed the limit by no more than what each writes between two looks."""
    host.limit_bytes = 16_000
    workers = [host.worker(), host.worker()]
    for number in range(60):
        data = b"%d|" % number + bytes(497)
        workers[number % 2].put(blob_key(name_of(data)), data)
        assert sum(host.copies().values()) <= host.limit_bytes + 2 * (host.limit_bytes // SLACK + len(data))


def test_an_evicted_copy_is_read_to_its_end(host: Host):
    """Eviction takes the name; who has the file open reads on."""
    host.limit_bytes = 3000
    host.worker().put(KEY, DATA)
    with copy_of(host, KEY).open("rb", buffering=0) as reader:
        assert reader.read(100) == DATA[:100]
        host.worker().put(blob_key(name_of(DATA[1:])), DATA[1:])
        assert not copy_of(host, KEY).exists()
        assert reader.read() == DATA[100:]


def test_what_a_crash_left_goes_when_it_is_old(host: Host):
    """Old temporary files and locks are removed by the next worker that writes; young ones and strangers' files stay."""
    host.worker().put(KEY, DATA)
    root = host.folder / "v1"
    left = [root / "blobs" / ".tmp-1", root / "manifests" / ".tmp-2", root / "locks" / ("0" * 64)]
    strange = [root / "blobs" / "notes.txt", root / "mine", host.folder / "mine"]
    young = root / "blobs" / ".tmp-3"
    long_ago = host.clock.time() - 2 * ABANDONED_AFTER_SECONDS
    for path in (*left, *strange, young):
        path.write_bytes(b"x" * 5000)
        os.utime(path, (long_ago, long_ago))
    os.utime(young, (host.clock.time(), host.clock.time()))
    host.limit_bytes = 8000
    host.worker().put(blob_key(name_of(DATA[1:])), DATA[1:])
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in (*strange, young))


# --- several workers -------------------------------------------------------------------------------------------------


class Slow(FaultyStore):
    """A store whose reads wait for ``go``; ``reached`` says that one has begun."""

    def __init__(self, store) -> None:
        super().__init__(store)
        self.reached, self.go = threading.Event(), threading.Event()

    def read_into(self, key, target, *, offset_bytes=0):
        self.reached.set()
        assert self.go.wait(PATIENCE_SECONDS)
        super().read_into(key, target, offset_bytes=offset_bytes)


def test_workers_that_want_one_blob_fetch_it_once(host: Host):
    """While one fetches, the others wait, and read its copy."""
    host.stored(DATA)
    host.remote = slow = Slow(host.memory)
    waiting = threading.Semaphore(0)

    class Clock(FakeClock):
        def sleep(self, seconds: float) -> None:
            waiting.release()
            threading.Event().wait(0.001)

    workers = [host.worker(clock=Clock()) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(read, workers[0], KEY)
        assert slow.reached.wait(PATIENCE_SECONDS)
        others = [pool.submit(read, worker, KEY) for worker in workers[1:]]
        for _ in range(20):
            assert waiting.acquire(timeout=PATIENCE_SECONDS)
        slow.go.set()
        assert [future.result(PATIENCE_SECONDS) for future in (first, *others)] == [DATA] * 6
    assert slow.count("read_into") == 1
    assert host.copies("locks") == {}


def test_a_worker_does_not_wait_for_ever(host: Host):
    """Behind one that stands still, a worker fetches by itself after the limit, and at no further blob waits again."""
    keys = [host.stored(DATA + bytes([number])) for number in range(3)]
    folder = CacheFolder(str(host.folder), limit_bytes=1 << 20)
    folder.prepare()
    worker = host.worker()
    with ExitStack() as still:
        for key in keys:
            assert still.enter_context(folder.turn(key.rpartition("/")[2], FakeClock(), 0))
        assert read(worker, keys[0], len(DATA) + 1) == DATA + b"\0"
        waited = sum(host.clock.slept)
        assert WAIT_SECONDS <= waited <= WAIT_SECONDS + 1
        for number, key in enumerate(keys):
            assert read(worker, key, len(DATA) + 1) == DATA + bytes([number])
    assert sum(host.clock.slept) == waited
    assert len(host.copies()) == 3


def test_a_fetch_that_fails_lets_the_next_one_try(host: Host):
    """The error of a worker's fetch is its own; the lock is free afterwards, also for a worker that already waits."""
    host.stored(DATA)
    host.remote.inject(Fault("transient_before", "read_into"))
    with pytest.raises(StoreTransientError):
        read(host.worker(), KEY)
    assert read(host.worker(), KEY) == DATA
    assert host.clock.slept == []


_HOLDER = """
import sys, time
from coldstart.stores.cache_folder import CacheFolder
from coldstart.stores.retrying import SystemClock
folder = CacheFolder(sys.argv[1], limit_bytes=1 << 20)
folder.prepare()
with folder.turn(sys.argv[2], SystemClock(), 0) as held:
    print(held, flush=True)
    time.sleep(600)
"""


def test_when_the_fetching_process_is_killed_the_next_one_fetches(host: Host):
    """The kernel gives a dead process' lock to the one that waits, which does not wait until the limit."""
    host.stored(DATA)
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(host.folder), KEY.rpartition("/")[2]],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert holder.stdout.readline() == b"True\n"

        class Clock(FakeClock):
            def sleep(self, seconds: float) -> None:
                holder.kill()
                holder.wait(PATIENCE_SECONDS)

        assert read(host.worker(clock=Clock()), KEY) == DATA
    finally:
        with suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.wait(PATIENCE_SECONDS)
        holder.stdout.close()
    assert host.copies() == {name_of(DATA): len(DATA)}


_KILLED = """
import os, signal, sys
from coldstart.stores.cached import CachedStore
from coldstart.stores.local import LocalStore
write = os.write
def write_half(file, data):
    write(file, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = write_half
store = CachedStore(LocalStore(sys.argv[1]), sys.argv[2], limit_bytes=1 << 20)
store.read_into(sys.argv[3], memoryview(bytearray(int(sys.argv[4]))))
"""


def test_a_process_that_dies_while_it_keeps_a_copy_leaves_no_copy(host: Host, tmp_path: Path):
    """Half a copy lies under a name that nobody reads; the next worker fetches, at once."""
    remote = LocalStore(tmp_path / "remote")
    remote.put(KEY, DATA)
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "remote"), str(host.folder), KEY, str(len(DATA))]
    assert subprocess.run(command, check=False, timeout=PATIENCE_SECONDS).returncode == -signal.SIGKILL
    assert [name[:5] for name in host.copies()] == [".tmp-"]
    host.stored(DATA)
    assert read(host.worker(), KEY) == DATA
    assert (host.fetched(), host.clock.slept) == (1, [])
    assert host.copies()[name_of(DATA)] == len(DATA)


_WORKER = """
import os, sys
from random import Random
from blake3 import blake3
from coldstart.stores.cached import CachedStore
from coldstart.stores.local import LocalStore
remote_folder, folder, log, seed, limit_bytes, rounds = sys.argv[1:]
class Remote(LocalStore):
    def read_into(self, key, target, *, offset_bytes=0):
        with open(log, "ab", buffering=0) as file:
            file.write(key.encode() + b"\\n")
        super().read_into(key, target, offset_bytes=offset_bytes)
random = Random(int(seed))
reports = []
print("ready", flush=True)
sys.stdin.readline()
remote = Remote(remote_folder)
blobs = sorted((info.key, info.size_bytes) for info in remote.list("blobs/"))
for turn in range(int(rounds)):
    store = CachedStore(remote, folder, limit_bytes=int(limit_bytes), degraded=reports.append)
    if turn:
        random.shuffle(blobs)
    for key, size in blobs:
        target = bytearray(size)
        for attempt in range(2):
            store.read_into(key, memoryview(target))
            if blake3(target).hexdigest() == key[-64:]:
                break
        else:
            raise SystemExit("wrong bytes of " + key)
        if int(rounds) > 1 and random.random() < 0.1:
            path = folder + "/v1/blobs/" + key[-64:]
            if random.random() < 0.5:
                try: os.truncate(path, size // 2)
                except FileNotFoundError: pass
            else:
                store.put(key, bytes(target))
if reports:
    raise SystemExit(repr(reports))
"""


def run_workers(tmp_path: Path, number: int, blobs: int, *, limit_bytes: int, rounds: int) -> list[bytes]:
    """Run real processes on one folder and one remote store; the keys that they fetched."""
    remote = LocalStore(tmp_path / "remote")
    for seed in range(blobs):
        data = bytes([seed]) * 20_000
        remote.put(blob_key(name_of(data)), data)
    log = tmp_path / "log"
    log.touch()
    parts = [str(tmp_path / "remote"), str(tmp_path / "cache"), str(log)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, *parts, str(seed), str(limit_bytes), str(rounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for seed in range(number)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == b"ready\n"
        for process in processes:
            process.stdin.write(b"go\n")
            process.stdin.flush()
        for process in processes:
            _, errors = process.communicate(timeout=PATIENCE_SECONDS)
            assert (process.returncode, errors) == (0, b"")
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE_SECONDS)
    return log.read_bytes().splitlines()


def test_processes_that_start_together_fetch_every_blob_once(tmp_path: Path):
    """Four processes that begin at once ask the store for each blob one time, all four together."""
    fetched = run_workers(tmp_path, 4, 25, limit_bytes=1 << 20, rounds=1)
    assert len(fetched) == len(set(fetched)) == 25


def test_processes_that_evict_and_damage_read_right_bytes(tmp_path: Path):
    """Three processes that evict each other's copies, cut them off and write them anew never get a wrong blob."""
    run_workers(tmp_path, 3, 12, limit_bytes=100_000, rounds=8)
    usage = CacheFolder(str(tmp_path / "cache"), limit_bytes=0).usage()
    assert usage.total_bytes <= 100_000 + 3 * (100_000 // SLACK + 20_000)


# --- a folder that does not work -------------------------------------------------------------------------------------


def failing(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, code: int, when=lambda *arguments: True
) -> None:
    """Have a system call fail for the calls that ``when`` picks."""
    real = getattr(module, name)

    def call(*arguments, **options):
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, call)


def creates(path, flags, *_) -> bool:
    """Whether a call of ``os.open`` makes files."""
    return bool(flags & os.O_CREAT)


KEPT, OTHER = DATA, DATA[::-1]

TROUBLES = {
    "full disk": lambda patch, _: failing(patch, os, "write", errno.ENOSPC),
    "quota": lambda patch, _: failing(patch, os, "write", errno.EDQUOT),
    "read-only": lambda patch, _: failing(patch, os, "open", errno.EROFS, creates),
    "no rename": lambda patch, _: failing(patch, os, "rename", errno.EPERM),
    "no flock": lambda patch, _: failing(patch, fcntl, "flock", errno.ENOLCK),
    "broken disk": lambda patch, _: failing(patch, os, "preadv", errno.EIO),
    "not listed": lambda patch, _: failing(patch, os, "scandir", errno.EACCES),
    "folder deleted": lambda _, folder: shutil.rmtree(folder),
    "all in it deleted": lambda _, folder: shutil.rmtree(folder / "v1"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_folder_in_trouble_is_not_seen_by_the_reader(host: Host, monkeypatch: pytest.MonkeyPatch, trouble: str):
    """Whatever the folder does, reads and writes are right, and the trouble is told once."""
    host.stored(OTHER)
    host.worker().put(KEY, KEPT)
    worker = host.worker()
    assert read(worker, KEY) == KEPT
    TROUBLES[trouble](monkeypatch, host.folder)
    for _ in range(3):
        assert read(worker, KEY) == KEPT
        assert read(worker, blob_key(name_of(OTHER))) == OTHER
        worker.put(MANIFEST, b"{}")
        assert worker.get(MANIFEST).data == b"{}"
    monkeypatch.undo()
    assert len(host.reports) == 1
    assert all(report.startswith(f"the cache {host.folder} ") for report in host.reports)
    assert not [name for name in host.copies() if name.startswith(".tmp-")]


def test_a_full_cache_still_serves_what_it_has(host: Host, monkeypatch: pytest.MonkeyPatch):
    """Where nothing more can be kept, the copies that are there are used."""
    host.worker().put(KEY, KEPT)
    failing(monkeypatch, os, "write", errno.ENOSPC)
    worker = host.worker()
    worker.put(blob_key(name_of(OTHER)), OTHER)
    assert read(worker, KEY) == KEPT
    assert host.fetched() == 0
    assert host.reports == [
        f"the cache {host.folder} takes no more copies, those that it has are used (No space left on device)"
    ]


def slow_disk(monkeypatch: pytest.MonkeyPatch, host: Host, seconds: float) -> None:
    """Every copy that is written takes so long, by the host's clock."""
    rename = os.rename

    def wait(*arguments):
        host.clock.advance(seconds)
        rename(*arguments)

    monkeypatch.setattr(os, "rename", wait)


def test_a_disk_slower_than_the_store_does_not_hold_up_a_start(host: Host, monkeypatch: pytest.MonkeyPatch):
    """Once copies have taken their time no more are kept, which is told once; every read is right, and so is the next worker's."""
    keys = [host.stored(DATA + bytes([number])) for number in range(10)]
    slow_disk(monkeypatch, host, 1.0)
    worker, began = host.worker(), host.clock.monotonic()
    for number, key in enumerate(keys):
        assert read(worker, key, len(DATA) + 1) == DATA + bytes([number])
    assert KEEPING_SECONDS <= host.clock.monotonic() - began <= KEEPING_SECONDS + 1
    assert host.reports == [f"the cache {host.folder} takes longer than the store, so some copies are left out"]
    assert 0 < len(host.copies()) < len(keys)
    for number, key in enumerate(keys):
        assert read(host.worker(), key, len(DATA) + 1) == DATA + bytes([number])
    assert len(host.copies()) == len(keys)


def test_copies_may_take_a_share_of_a_long_fetch(host: Host, monkeypatch: pytest.MonkeyPatch):
    """Before a store that is slower still, the same disk keeps everything."""
    keys = [host.stored(DATA + bytes([number])) for number in range(10)]
    slow_disk(monkeypatch, host, 1.0)

    class Far(FaultyStore):
        def read_into(self, key, target, *, offset_bytes=0):
            host.clock.advance(1 / KEEPING_SHARE)
            super().read_into(key, target, offset_bytes=offset_bytes)

    host.remote = Far(host.memory)
    worker = host.worker()
    for key in keys:
        read(worker, key, len(DATA) + 1)
    assert (len(host.copies()), host.reports) == (len(keys), [])


def test_without_flock_copies_are_kept(host: Host, monkeypatch: pytest.MonkeyPatch):
    """A file system without locks costs a second fetch at worst: the next worker reads the copy."""
    failing(monkeypatch, fcntl, "flock", errno.EOPNOTSUPP)
    host.stored(DATA)
    assert read(host.worker(), KEY) == read(host.worker(), KEY) == DATA
    assert host.fetched() == 1
    assert len(host.reports) == 1


def unusable(tmp_path: Path, kind: str) -> Path:
    """A path that cannot be a cache's folder."""
    folder = tmp_path / "unusable"
    if kind == "file":
        folder.touch()
    elif kind == "below a file":
        folder.touch()
        return folder / "cache"
    elif kind == "others write":
        folder.mkdir()
        folder.chmod(0o777)
    elif kind == "others write inside":
        (folder / "v1").mkdir(parents=True)
        (folder / "v1").chmod(0o1777)
    else:
        (tmp_path / "target").mkdir()
        folder.mkdir()
        (folder / "v1").symlink_to(tmp_path / "target")
    return folder


UNUSABLE = ("file", "below a file", "others write", "others write inside", "link inside")


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_folder_that_cannot_be_a_cache_is_left_alone(host: Host, tmp_path: Path, kind: str):
    """A file, or a folder that others could write to, is told once and not used: everything comes from the store."""
    host.folder = unusable(tmp_path, kind)
    worker = host.worker()
    for _ in range(2):
        worker.put(KEY, DATA)
        worker.put(MANIFEST, b"{}")
        assert read(worker, KEY) == DATA
        assert worker.get(MANIFEST).data == b"{}"
    assert host.fetched() == 4
    assert len(host.reports) == 1
    assert "is not used" in host.reports[0]
    assert host.copies() == {}


def test_a_foreign_folder_is_left_alone(host: Host, monkeypatch: pytest.MonkeyPatch):
    """What another user owns is not believed."""
    host.worker().put(MANIFEST, b"{}")
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    if os.getuid() == 0:
        os.chown(host.folder / "v1", 4712, -1)
    host.worker().get(MANIFEST)
    assert (host.fetched(), len(host.reports)) == (1, 1)


def test_nobody_needs_to_be_told(host: Host, monkeypatch: pytest.MonkeyPatch):
    """Without a callback a trouble is passed over in silence."""
    failing(monkeypatch, os, "write", errno.ENOSPC)
    worker = host.worker(degraded=None)
    worker.put(KEY, DATA)
    assert read(worker, KEY) == DATA


# --- wiring ----------------------------------------------------------------------------------------------------------

REMOTE = {"access_key_id": "id", "secret_access_key": "secret", "region": "eu-west-1"}


def test_a_remote_store_opens_behind_its_cache(tmp_path: Path):
    """With a cache folder an s3:// store is the cache before the retrying wrapper; without, or for a folder, it is not."""
    with_cache = StoreOptions(**REMOTE, cache=str(tmp_path / "cache"), cache_bytes=1 << 20)
    store = open_store("s3://bucket/prefix", with_cache)
    assert isinstance(store, CachedStore)
    assert isinstance(store._store, RetryingStore)
    assert store.url == "s3://bucket/prefix"
    assert store.capabilities == store._store.capabilities
    assert not (tmp_path / "cache").exists()
    store.close()
    assert isinstance(open_store("s3://bucket/prefix", StoreOptions(**REMOTE)), RetryingStore)
    assert isinstance(open_store(str(tmp_path / "store"), with_cache), LocalStore)


def test_the_settings_reach_the_cache_of_a_start_and_of_nothing_else(tmp_path: Path):
    """A start reads through the cache and publishes its trouble; a command and a proof read the store itself."""
    (tmp_path / "file").touch()
    variables = {"HOME": str(tmp_path), "COLDSTART_CACHE": f"{tmp_path}/file", "COLDSTART_CACHE_BYTES": "7MiB"}
    chosen = load(variables, store="s3://bucket", **REMOTE)
    bus = events.EventBus()
    seen: list[object] = []
    bus.subscribe(seen.append)
    repository = opener_of_start("scales", Services(chosen, serving=True, pinned={}, bus=bus))()
    assert isinstance(repository.store, CachedStore)
    assert repository.store._copies._limit_bytes == 7 << 20
    repository.store._is_ready()
    assert [(type(event), event.name) for event in seen] == [(events.StoreDegraded, "scales")]
    command = Opener(chosen)()
    assert isinstance(command, Repository)
    assert isinstance(command.store, RetryingStore)
    assert load({**variables, **QUIET}).cache == ""


def test_the_cache_is_off_and_50_gib_unless_set(tmp_path: Path):
    """The defaults: no folder, and room for 50 GiB."""
    chosen = load({"HOME": str(tmp_path)})
    assert (chosen.cache, chosen.cache_bytes) == ("", 50 << 30)
    assert (StoreOptions().cache, StoreOptions().cache_bytes) == (chosen.cache, chosen.cache_bytes)


def cache_findings() -> list[tuple[str, str]]:
    """State and text of what doctor says about the cache."""
    return [(finding.state, finding.text) for finding in doctor.examine() if finding.topic == "cache"]


def test_doctor_shows_the_cache(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Folder, size and limit where there is one; that it is off, not used, or cannot be used where that is so."""
    monkeypatch.setenv("COLDSTART_STORE", str(tmp_path / "store"))
    assert [state for state, _ in cache_findings()] == ["ok"]
    host.limit_bytes = 1 << 30
    host.worker().put(KEY, DATA)
    host.worker().put(MANIFEST, b"{}")
    monkeypatch.setenv("COLDSTART_CACHE", str(host.folder))
    monkeypatch.setenv("COLDSTART_CACHE_BYTES", "2GB")
    assert cache_findings() == [
        ("ok", f"{host.folder}: 2 copies, 0.0 of at most 2.0 GB"),
        ("note", f"not used: {tmp_path}/store is no remote store"),
    ]
    (tmp_path / "file").touch()
    monkeypatch.setenv("COLDSTART_CACHE", str(tmp_path / "file"))
    ((state, text),) = cache_findings()
    assert state == "problem"
    assert text.startswith(f"{tmp_path}/file cannot be used, so every start asks the store: ")


_LIGHT = """
import sys
bare = set(sys.modules)
from coldstart.stores.cached import CachedStore
print(*sorted(set(sys.modules) - bare))
"""


def test_the_cache_is_light_to_import():
    """It runs before a worker's first answer: standard library, and none of what is slow there."""
    output = subprocess.run(
        [sys.executable, "-c", _LIGHT], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    heavy = {
        "boto3",
        "numpy",
        "pydantic",
        "structlog",
        "blake3",
        "dataclasses",
        "inspect",
        "logging",
        "pathlib",
        "random",
    }
    assert not heavy & set(output.split())
    assert cached.__name__ in output.split()
