"""The fetcher that looks a snapshot up by itself: what this process learns from it, and who does what it cannot."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from coldstart import events
from coldstart import fetch as engines
from coldstart.devices.cpu import CpuDevice
from coldstart.errors import ColdstartError, ObjectMissingError, SnapshotError
from coldstart.fetch import Address, FetchRequest, look_ahead
from coldstart.fetch.ahead import begin
from coldstart.fetch.base import RingWay
from coldstart.fetch.crew import Bounds
from coldstart.manifest import blob_key, ref_key
from coldstart.repository import Repository
from coldstart.restore import Missing, Request, Restoration, Restored, Unusable
from coldstart.stores import StoreOptions, open_store
from tests.generations import KEY, OTHER_KEY, capture_of, write

PATIENCE_SECONDS = 60.0
BOUNDS = Bounds(4, 1 << 24, 1, verify_raw=False)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fetcher process is for Linux")


@pytest.fixture
def address(s3_bucket, s3_options):
    """A bucket."""
    return Address(f"s3://{s3_bucket}/prefix", s3_options)


@pytest.fixture
def repository(address):
    """All snapshots of the bucket."""
    return Repository(open_store(*address))


@pytest.fixture
def silent_server():
    """The URL of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def publish_for_gpu(repository, state):
    """Make a generation current whose arrays belong into the memory of a GPU, and return its manifest."""
    manifest = write(capture_of(state), repository).manifest._replace(device_type="cuda")
    key = repository.put_manifest(manifest)
    repository.publish(manifest, key, replaces=repository.look_up("model", KEY))
    return manifest


def publish(repository, *, key=KEY, follows=None, value=0.0):
    """Make a generation of one array current, and return what was written."""
    state = {"weights": np.full(50_000, value, dtype=np.float32)}
    written = write(capture_of(state, follows=follows, key=key), repository)
    repository.publish(written.manifest, written.manifest_key, replaces=repository.look_up("model", key))
    return written


class CountingRepository(Repository):
    """A repository that notes what was read through it."""

    def __init__(self, address):
        super().__init__(open_store(*address))
        self.read = []
        inner = self.store.get
        self.store.get = lambda key: self.read.append(key) or inner(key)


def outcome(address, repository, **options):
    """What a restoration ends with."""
    bus = events.EventBus()
    request = Request("model", KEY, lambda: repository, CpuDevice(), 4, 1 << 24, "/dev/null/nowhere", address)
    return Restoration(request._replace(**options), bus).outcome()


def children():
    """The processes that this one has started and not taken leave of."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_the_fetcher_reads_ref_and_manifest(address, repository):
    """A restore in which this process asks the store for nothing."""
    publish(repository)
    before, counting = children(), CountingRepository(address)
    restored = outcome(address, counting)
    assert isinstance(restored, Restored)
    assert (restored.report.engine, counting.read) == ("process", [])
    assert restored.lookup == repository.look_up("model", KEY)
    assert restored.manifest == repository.manifest(restored.manifest_key, name="model")
    assert children() == before


def test_the_fetch_waits_for_nobody(address, repository):
    """All chunks are fetched before this process has taken notice of the manifest; then it has only to adopt them."""
    written = publish(repository, value=2.0)
    ahead = begin(address, ref_key("model", KEY.digest), BOUNDS)
    (child,) = children()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":  # it has done its work and left
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lookup = repository.look_up("model", KEY, ahead=ahead.read)
    manifest = repository.manifest(lookup.ref.manifest, name="model", ahead=ahead.read)
    assert manifest == written.manifest
    lengths = [segment.length_bytes for segment in manifest.segments]
    arena = CpuDevice().adopt(ahead.arena_fd(lookup.ref.manifest), lengths)
    request = FetchRequest(manifest, repository.store, arena, 4, 1 << 24, address=address)
    report = ahead.fetch(request, lookup.ref.manifest).wait()
    ahead.end()
    assert report.engine == "process"
    assert arena.array(0, 0, 200_000).view(np.float32).tolist() == [2.0] * 50_000
    assert children() == []


def test_a_ring_that_is_stopped_stops_who_looked_ahead(address, repository):
    """With more chunks than slots the fetcher waits for one; where nobody copies any more it hears of that, and says so."""
    state = {name: np.full(5_000_000, ord(name), dtype=np.float32) for name in "abcd"}
    publish_for_gpu(repository, state)
    ahead = begin(address, ref_key("model", KEY.digest), BOUNDS, way=RingWay(1, ()))
    lookup = repository.look_up("model", KEY, ahead=ahead.read)
    manifest = repository.manifest(lookup.ref.manifest, name="model", ahead=ahead.read)
    ring = ahead.ring(lookup.ref.manifest)
    assert ring.slots < len(manifest.chunks)
    request = FetchRequest(manifest, repository.store, None, 4, 1 << 24, address=address, ring=ring)
    fetch = ahead.fetch(request, lookup.ref.manifest)
    ring.stop()
    ended = []
    waiting = threading.Thread(target=lambda: ended.append(error_of(fetch.wait)), daemon=True)
    waiting.start()
    waiting.join(PATIENCE_SECONDS / 2)
    ahead.end()
    ring.close()
    (error,) = ended
    assert (type(error), str(error)) == (SnapshotError, "the fetch was stopped")


def test_what_fails_on_the_way_to_a_ring_is_told(address, repository, monkeypatch):
    """A chunk that is not in the store is missed by the fetcher, in so many words: this process reads nothing once more."""
    (chunk,) = publish_for_gpu(repository, {"weights": np.zeros(50_000, np.float32)}).chunks
    repository.store.delete(blob_key(chunk.blob))
    ahead = begin(address, ref_key("model", KEY.digest), BOUNDS, way=RingWay(1, ()))
    lookup = repository.look_up("model", KEY, ahead=ahead.read)
    manifest = repository.manifest(lookup.ref.manifest, name="model", ahead=ahead.read)
    ring, read = ahead.ring(lookup.ref.manifest), []
    monkeypatch.setattr(repository.store, "read_into", lambda key, _: read.append(key))
    request = FetchRequest(manifest, repository.store, None, 4, 1 << 24, address=address, ring=ring)
    error = error_of(ahead.fetch(request, lookup.ref.manifest).wait)
    ahead.end()
    ring.close()
    assert isinstance(error, ObjectMissingError)
    assert read == []


def error_of(action):
    """What an action raises."""
    with pytest.raises(ColdstartError) as raised:
        action()
    return raised.value


def ends_and_queues():
    """How many ends of wires and how many queues this process has open; the S3 server of the tests is in it too."""
    folder, kinds = "/proc/self/fd", []
    for name in os.listdir(folder):
        with suppress(OSError):  # the listing's own; a connection that the server closes just now
            target = os.readlink(f"{folder}/{name}")
            if target.startswith("/memfd:coldstart-queue"):
                kinds.append("queue")
            elif target.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    kinds.append(one.family.name)
    return Counter(kind for kind in kinds if kind in ("queue", "AF_UNIX"))


def test_nothing_but_the_arena_stays_open(address, repository):
    """A restore leaves no end of a wire and no queue behind."""
    publish(repository)
    repository.look_up("model", KEY)
    before = ends_and_queues()
    kept = outcome(address, repository)
    assert ends_and_queues() - before == Counter()
    assert isinstance(kept, Restored)


def test_a_host_that_may_have_flat_files_is_asked_first(address, repository, tmp_path):
    """With a cache the fetcher begins when it is told to, since the segments may only have to be mapped."""
    publish(repository)
    cached = Address(address.url, address.options._replace(cache=str(tmp_path / "cache")))
    ahead = begin(cached, ref_key("model", KEY.digest), BOUNDS)
    key = repository.look_up("model", KEY).ref.manifest
    assert ahead.read(key) is not None
    assert ahead.arena_fd(key) is None
    ahead.end()
    restored = outcome(cached, Repository(open_store(*cached)))
    assert restored.report.engine == "process"


def test_without_a_snapshot_this_process_looks_for_another_key(address, repository):
    """What the fetcher does not find is asked for here, so that the reason is the usual one."""
    publish(repository, key=OTHER_KEY)
    before = children()
    missing = outcome(address, repository)
    assert missing == Missing("code changed: load", repository.look_up("model", KEY))
    assert children() == before


def test_a_store_that_refuses_is_unusable_in_its_own_words(address, repository):
    """The error of an unreachable store is the one that this process gets."""
    options = address.options._replace(endpoint_url="http://127.0.0.1:9")
    there = Address(address.url, options)
    store = open_store(*there)
    store._policy = store._policy._replace(attempts=1)
    unusable = outcome(there, Repository(store))
    assert isinstance(unusable, Unusable)
    assert "StoreTransientError" in unusable.reason


def test_the_generation_before_is_fetched_by_another_engine(address, repository):
    """Where a blob of the current generation is gone, the previous one is read, which the fetcher had not looked up."""
    first = publish(repository)
    second = publish(repository, follows=first, value=1.0)
    gone = {chunk.blob for chunk in second.manifest.chunks} - {chunk.blob for chunk in first.manifest.chunks}
    for blob in gone:
        repository.store.delete(blob_key(blob))
    restored = outcome(address, repository)
    assert restored.recovered_by == "previous_generation"
    assert restored.manifest == first.manifest


def test_a_fetcher_that_dies_costs_no_answer(address, repository, monkeypatch):
    """Dead before its first word, it is as if there had been none: a small snapshot is fetched by threads."""
    publish(repository)
    monkeypatch.setattr("coldstart.children._BOOT", "import os; os._exit(3)")
    restored = outcome(address, repository)
    assert isinstance(restored, Restored)
    assert restored.report.engine == "threads"


def test_a_cancelled_look_up_ends_soon(silent_server):
    """A restoration that is not wanted any more does not wait for a store that says nothing."""
    options = StoreOptions(
        endpoint_url=silent_server, region="us-east-1", access_key_id="id", secret_access_key="secret"
    )
    ahead = begin(Address("s3://bucket/prefix", options), ref_key("model", KEY.digest), BOUNDS)
    before = children()
    ahead.cancel()
    assert ahead.read(ref_key("model", KEY.digest)) is None
    ahead.end()
    assert len(children()) < len(before)


@pytest.mark.parametrize("engine", ["auto", "process", "threads"])
def test_who_looks_ahead(address, tmp_path, engine, monkeypatch):
    """Remote stores are worth a fetcher from the start; folders, and whoever asks for threads, are not."""
    spawned = []

    def spawn():
        spawned.append(1)
        raise OSError(1, "refused")

    monkeypatch.setattr("coldstart.fetch.ahead.Fetcher", spawn)
    for other in (None, Address(f"file://{tmp_path}", StoreOptions()), Address("memory://x", StoreOptions())):
        assert look_ahead(other, "refs/a/b", BOUNDS, engine=engine) is None
    assert spawned == []
    assert look_ahead(address, "refs/a/b", BOUNDS, engine=engine) is None, "nobody could be spawned"
    assert spawned == ([] if engine == "threads" else [1])


def test_no_fetcher_no_look_ahead(address, monkeypatch):
    """Where no process can be started, threads of this one do all."""

    def refuse(*args, **options):
        raise OSError(1, "refused")

    monkeypatch.setattr(os, "posix_spawn", refuse)
    assert engines.look_ahead(address, "refs/a/b", BOUNDS, engine="auto") is None


def test_a_fresh_start_spawns_nothing(address, repository, monkeypatch):
    """With ``--fresh`` nothing will be fetched, so nobody is started to do it."""
    publish(repository)
    monkeypatch.setattr("coldstart.restore.look_ahead", lambda *_, **__: pytest.fail("looked ahead"))
    missing = outcome(address, repository, fresh=True)
    assert isinstance(missing, Missing)


def test_a_manifest_that_nobody_reads_holds_up_no_fetch(address, repository):
    """The wire takes less than a large manifest unread, and the fetch is over all the same before this process listens."""
    state = {f"tensor.{number}": np.full(9, number, dtype=np.float32) for number in range(3000)}
    written = write(capture_of(state), repository)
    repository.publish(written.manifest, written.manifest_key, replaces=repository.look_up("model", KEY))
    assert len(repository.store.get(written.manifest_key).data) > 1 << 18
    ahead = begin(address, ref_key("model", KEY.digest), BOUNDS)
    assert ahead.read(ref_key("model", KEY.digest)) is not None
    deadline = time.monotonic() + PATIENCE_SECONDS
    while written_bytes_of(children()[-1]) < written.manifest.raw_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    heard_seconds = time.monotonic()
    manifest = repository.manifest(written.manifest_key, name="model", ahead=ahead.read)
    arena = CpuDevice().adopt(ahead.arena_fd(written.manifest_key), [each.length_bytes for each in manifest.segments])
    request = FetchRequest(manifest, repository.store, arena, 4, 1 << 24, address=address)
    report = ahead.fetch(request, written.manifest_key).wait()
    ahead.end()
    assert (report.engine, manifest) == ("process", written.manifest)
    assert report.began_monotonic_seconds < heard_seconds


def written_bytes_of(pid):
    """What a process has written, to files and wires."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


ABANDONING = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from coldstart.fetch.ahead import begin
from coldstart.fetch.base import RingWay
from coldstart.fetch.base import Address
from coldstart.fetch.crew import Bounds
from coldstart.stores import StoreOptions
options = StoreOptions(sys.argv[3], "us-east-1", "id", "secret", cache=sys.argv[4])
ahead = begin(Address(sys.argv[2], options), sys.argv[5], Bounds(4, 1 << 24, 1, False))
print(open(f"/proc/self/task/{os.getpid()}/children").read(), flush=True)
sys.stdin.read()
"""


def test_a_fetcher_that_waits_ends_with_its_parent(address, repository, tmp_path):
    """One whose words nobody has read, and that waits to be told to begin, leaves when its parent is killed."""
    publish(repository)
    root, cache, key = str(Path(__file__).parent.parent), str(tmp_path / "cache"), ref_key("model", KEY.digest)
    arguments = [root, address.url, address.options.endpoint_url, cache, key]
    with subprocess.Popen(
        [sys.executable, "-c", ABANDONING, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        fetcher = Path(f"/proc/{int(parent.stdout.readline())}")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not os.listdir(tmp_path) and time.monotonic() < deadline:  # the cache, which the fetcher makes on the way
            time.sleep(0.01)
        parent.kill()
    while fetcher.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not fetcher.exists()
