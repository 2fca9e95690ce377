"""The fetcher process: what it fills, how it ends, and who does its work when it does not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart import config
from coldstart import fetch as engines
from coldstart.errors import BlobCorruptError, ConfigError, ObjectMissingError, SnapshotError
from coldstart.fetch import Address, FetchRequest, start_fetch
from coldstart.fetch.crew import BYTES_PER_FETCHER, FETCHER_BYTES, Bounds, next_chunk, queue_of, share_of
from coldstart.fetch.process import can_start
from coldstart.manifest import blob_key
from coldstart.stores import StoreOptions, open_store
from coldstart.stores.memory import MemoryStore
from tests.generations import arena_of, stored_chunks
from tests.starts import Project

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fetcher process is for Linux")

RAW = os.urandom(1 << 16)
PATIENCE_SECONDS = 60.0


@pytest.fixture
def address(tmp_path):
    """A store in a folder."""
    return Address(f"file://{tmp_path / 'store'}", StoreOptions())


def request_of(manifest, address, **options):
    """A request for the whole manifest."""
    return FetchRequest(manifest, open_store(*address), arena_of(manifest), 2, 256 << 20, address=address, **options)


def request_of_silence(server):
    """A request whose fetcher will wait for ``server``, which never answers; threads of this process read from memory."""
    options = StoreOptions(
        endpoint_url=f"http://127.0.0.1:{server.getsockname()[1]}",
        region="us-east-1",
        access_key_id="id",
        secret_access_key="secret",
    )
    inner = MemoryStore()
    manifest = stored_chunks(inner, [[(RAW, "raw")]])
    return FetchRequest(manifest, inner, arena_of(manifest), 1, 1 << 20, address=Address("s3://bucket/prefix", options))


def snapshot(address, *codecs, raw=RAW):
    """A stored snapshot with one chunk of each codec."""
    return stored_chunks(open_store(*address), [[(raw, codec) for codec in codecs]], item_bytes=2)


def children():
    """The processes that this one has started and not taken leave of."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


# --- what it does ----------------------------------------------------------------------------------------------------


def test_it_fills_the_arena_of_this_process(address):
    """Chunks of every codec land bit for bit in memory that this process maps, and no child is left."""
    manifest = snapshot(address, "raw", "zstd", "planes+zstd")
    before = children()
    request = request_of(manifest, address, verify_raw=True)
    report = start_fetch(request, engine="process").wait()
    assert report.engine == "process"
    assert report.fetched_bytes == sum(chunk.stored_bytes for chunk in manifest.chunks)
    assert bytes(request.arena.writable(0)) == RAW * 3
    assert children() == before


def test_views_taken_before_the_fill_see_it(address):
    """Arrays of the arena, made before the fetcher wrote a byte, show what it wrote."""
    manifest = snapshot(address, "raw")
    request = request_of(manifest, address)
    view = request.arena.array(0, 0, len(RAW))
    start_fetch(request, engine="process").wait()
    assert view.tobytes() == RAW


def test_it_reads_s3(s3_bucket, s3_options):
    """The fetcher opens the store by its address, with the credentials that it is sent."""
    address = Address(f"s3://{s3_bucket}/prefix", s3_options)
    manifest = snapshot(address, "raw", "zstd")
    request = request_of(manifest, address)
    report = start_fetch(request, engine="process").wait()
    assert (report.engine, bytes(request.arena.writable(0))) == ("process", RAW * 2)


def test_waiting_again_gives_the_same(address):
    """``wait`` may be called by several: each gets the report, or the error."""
    manifest = snapshot(address, "raw")
    fetch = start_fetch(request_of(manifest, address), engine="process")
    assert fetch.wait() == fetch.wait()
    open_store(*address).delete(blob_key(manifest.chunks[0].blob))
    fetch = start_fetch(request_of(manifest, address), engine="process")
    for _ in range(2):
        with pytest.raises(ObjectMissingError):
            fetch.wait()


def test_secrets_are_in_no_argument(address, monkeypatch):
    """What the fetcher is told comes over its wire: its command line, which others can read, holds no credential."""
    spawned = []

    def spawn(path, arguments, environment, **options):
        spawned.append(arguments)
        raise OSError(1, "refused")

    monkeypatch.setattr(os, "posix_spawn", spawn)
    secret = Address(address.url, StoreOptions(access_key_id="an-access-key", secret_access_key="a-secret-key"))
    start_fetch(request_of(snapshot(address, "raw"), secret), engine="process").wait()
    assert spawned
    assert "a-secret-key" not in repr(spawned)
    assert "an-access-key" not in repr(spawned)


def test_what_its_store_gave_up_is_told(s3_bucket, s3_options, tmp_path):
    """A cache that the fetcher cannot use is in its report: nobody else could see that."""
    (tmp_path / "file").write_text("no folder can be below this")
    options = s3_options._replace(cache=str(tmp_path / "file" / "cache"))
    address = Address(f"s3://{s3_bucket}/prefix", options)
    request = request_of(snapshot(Address(address.url, s3_options), "raw"), address)
    report = start_fetch(request, engine="process").wait()
    assert report.engine == "process"
    assert len(report.degraded) == 1
    assert bytes(request.arena.writable(0)) == RAW


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_damaged_blob_is_the_same_error_as_elsewhere(address, tmp_path):
    """An altered byte is a BlobCorruptError that names the blob, as the threads engine raises it."""
    manifest = snapshot(address, "raw")
    key = blob_key(manifest.chunks[0].blob)
    path = tmp_path / "store" / key
    path.chmod(0o644)
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    with pytest.raises(BlobCorruptError) as raised:
        start_fetch(request_of(manifest, address), engine="process").wait()
    assert raised.value.key == key


def test_a_fetcher_that_cannot_be_started_is_replaced(address, monkeypatch):
    """Where no process can be started, threads do the work, and the report says why."""

    def refuse(*_arguments, **_options):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "posix_spawn", refuse)
    request = request_of(snapshot(address, "raw"), address)
    report = start_fetch(request, engine="process").wait()
    assert report.engine == "threads (the fetcher process could not be started: Operation not permitted)"
    assert bytes(request.arena.writable(0)) == RAW


@pytest.mark.parametrize(
    "code", ["import os; os._exit(1)", "raise SystemExit", "import os, signal; os.kill(os.getpid(), 9)"]
)
def test_a_fetcher_that_dies_is_replaced(address, monkeypatch, code):
    """A fetcher that ends without a word, however, costs nothing but time: threads fetch it all, and it is said."""
    monkeypatch.setattr("coldstart.children._BOOT", code)
    request = request_of(snapshot(address, "raw", "zstd"), address)
    report = start_fetch(request, engine="process").wait()
    assert report.engine == "threads (the fetcher process ended early)"
    assert bytes(request.arena.writable(0)) == RAW * 2


def test_a_fetcher_killed_at_work_is_replaced(tmp_path):
    """Killed while it waits for a store, it is replaced by threads that wait for the same store."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        request = request_of_silence(server)
        before = set(children())
        fetch = start_fetch(request, engine="process")
        connection, _ = server.accept()  # the fetcher's: it is at work
        (pid,) = set(children()) - before
        os.kill(int(pid), signal.SIGKILL)
        report = fetch.wait()
        connection.close()
    assert report.engine == "threads (the fetcher process ended early)"
    assert bytes(request.arena.writable(0)) == RAW


def test_cancelling_ends_it():
    """``cancel`` ends a fetcher that waits for its store, ``wait`` says so, and no child is left."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        request = request_of_silence(server)
        before = children()
        fetch = start_fetch(request, engine="process")
        connection, _ = server.accept()
        threading.Timer(0.1, fetch.cancel).start()
        with pytest.raises(SnapshotError, match="cancelled"):
            fetch.wait()
        connection.close()
    assert children() == before


PARENT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from coldstart.fetch import Address, FetchRequest, start_fetch
from coldstart.stores import StoreOptions
from coldstart.stores.memory import MemoryStore
from tests.generations import arena_of, stored_chunks
options = StoreOptions(endpoint_url=sys.argv[2], region="us-east-1", access_key_id="id", secret_access_key="secret")
manifest = stored_chunks(MemoryStore(), [[(b"abc", "raw")]])
request = FetchRequest(manifest, None, arena_of(manifest), 1, 1 << 20, address=Address("s3://bucket/prefix", options))
fetch = start_fetch(request, engine="process")
print(open(f"/proc/self/task/{os.getpid()}/children").read(), flush=True)
time.sleep(600)
"""


def test_it_dies_with_its_parent():
    """A worker that is killed leaves no fetcher behind."""
    root = str(Path(__file__).parent.parent)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        with subprocess.Popen(
            [sys.executable, "-c", PARENT, root, endpoint], stdout=subprocess.PIPE, text=True
        ) as parent:
            fetcher = int(parent.stdout.readline())
            connection, _ = server.accept()
            parent.kill()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while Path(f"/proc/{fetcher}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        connection.close()
    assert not Path(f"/proc/{fetcher}").exists()


# --- which engine ----------------------------------------------------------------------------------------------------


def test_small_snapshots_and_stores_of_this_process_take_threads(address, monkeypatch):
    """``auto`` starts a process only for bytes that are worth it; a store in memory cannot be read by another process."""
    manifest = snapshot(address, "raw")
    assert start_fetch(request_of(manifest, address), engine="auto").wait().engine == "threads"
    monkeypatch.setattr(engines, "PROCESS_MINIMUM_BYTES", 1)
    assert start_fetch(request_of(manifest, address), engine="auto").wait().engine == "process"
    assert start_fetch(request_of(manifest, address), engine="threads").wait().engine == "threads"
    assert not can_start(request_of(manifest, address)._replace(address=None))
    assert not can_start(request_of(manifest, address)._replace(address=Address("memory://x", StoreOptions())))


def test_every_engine_can_be_set():
    """The setting's words are the engines', and nothing else."""
    for engine in engines.ENGINES:
        assert config.load({"HOME": "/home/user", "COLDSTART_FETCH_ENGINE": engine}).fetch_engine == engine
    with pytest.raises(ConfigError, match=", ".join(engines.ENGINES)):
        config.load({"HOME": "/home/user", "COLDSTART_FETCH_ENGINE": "thread"})


def test_a_start_says_which_engine_fetched(tmp_path):
    """The start record names the engine, and a start by the fetcher process answers like any other."""
    project = Project(tmp_path)
    project.write("""
        import numpy as np
        from coldstart import coldstart

        @coldstart("large", load=lambda: {"a": np.arange(1 << 16, dtype=np.float32)}, warmup=[1])
        def handler(event, model):
            return float(model["a"].sum()) * event["input"]
        """)
    first = project.run()
    assert first.capture["published"], first.capture
    for engine in ("process", "threads"):
        start = project.run(COLDSTART_FETCH_ENGINE=engine)
        assert (start.kind, start.output, start.record["engines"]) == ("restored", first.output, [engine])
    assert json.dumps(start.record)


# --- several fetchers --------------------------------------------------------------------------------------------------


@pytest.fixture
def crew_of_three(monkeypatch):
    """Any snapshot is large enough for three fetchers."""
    monkeypatch.setattr("coldstart.fetch.crew.BYTES_PER_FETCHER", 1)


def test_several_fetchers_share_one_snapshot(address, crew_of_three):
    """Each chunk is fetched by one of three processes, all of them land bit for bit, and no child is left."""
    codecs = ("raw", "zstd", "planes+zstd") * 20
    manifest = snapshot(address, *codecs)
    before, placed = children(), []
    request = request_of(manifest, address, processes=3, verify_raw=True, progress=placed.append)
    report = start_fetch(request, engine="process").wait()
    assert report.engine == "3 processes"
    assert report.fetched_bytes == sum(chunk.stored_bytes for chunk in manifest.chunks)
    assert bytes(request.arena.writable(0)) == RAW * len(codecs)
    assert children() == before


def test_fetchers_that_cannot_be_had_are_done_without(address, crew_of_three, monkeypatch):
    """Where the system gives one process and no more, that one fetches everything."""
    manifest, spawn, spawned = snapshot(address, *["raw"] * 9), os.posix_spawn, []

    def once(*args, **options):
        if spawned:
            raise OSError(11, "no more processes")
        spawned.append(1)
        return spawn(*args, **options)

    monkeypatch.setattr(os, "posix_spawn", once)
    request = request_of(manifest, address, processes=3)
    assert start_fetch(request, engine="process").wait().engine == "process"
    assert bytes(request.arena.writable(0)) == RAW * 9


def test_one_dead_fetcher_of_several_is_replaced_by_threads(address, crew_of_three, monkeypatch):
    """What the dead one had taken from the queue nobody else would fetch: threads of this process fetch all of it."""
    manifest, spawn, spawned = snapshot(address, *["raw"] * 9), os.posix_spawn, []

    def second_dies(path, arguments, environment, **options):
        spawned.append(1)
        if len(spawned) == 2:
            arguments = [*arguments[:-1], "import os; os.read(3, 1); os._exit(3)"]
        return spawn(path, arguments, environment, **options)

    monkeypatch.setattr(os, "posix_spawn", second_dies)
    request = request_of(manifest, address, processes=3)
    assert start_fetch(request, engine="process").wait().engine == "threads (the fetcher process ended early)"
    assert bytes(request.arena.writable(0)) == RAW * 9


def test_an_error_of_one_ends_all(address, crew_of_three):
    """A blob that is gone fails the fetch with the error of whoever wanted it, and every fetcher ends."""
    manifest = stored_chunks(open_store(*address), [[(os.urandom(1 << 10), "raw") for _ in range(30)]])
    open_store(*address).delete(blob_key(manifest.chunks[-1].blob))
    before = children()
    with pytest.raises(ObjectMissingError):
        start_fetch(request_of(manifest, address, processes=3), engine="process").wait()
    assert children() == before


@given(order=st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_a_queue_gives_its_indices_in_order(order):
    """One reader gets them all, and then the end as often as it asks."""
    queue_fd = queue_of(order)
    assert [next_chunk(queue_fd) for _ in range(len(order) + 2)] == [*order, None, None]
    os.close(queue_fd)


READER = """
import sys
sys.path.insert(0, sys.argv[1])
from coldstart.fetch.crew import next_chunk
sys.stdin.readline()
while (index := next_chunk(int(sys.argv[2]))) is not None:
    print(index)
"""


def test_a_queue_gives_each_index_once():
    """However many processes read from it at a time, every index comes once, in order for each of them."""
    order = range(60_000)
    queue_fd = queue_of(order)
    arguments = [sys.executable, "-c", READER, str(Path(__file__).parent.parent), str(queue_fd)]
    with ExitStack() as running:
        readers = [
            running.enter_context(
                subprocess.Popen(
                    arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[queue_fd]
                )
            )
            for _ in range(3)
        ]
        for reader in readers:
            reader.stdin.write("go\n")
            reader.stdin.flush()
        with ThreadPoolExecutor() as pool:
            got = [list(map(int, output.split())) for output in pool.map(lambda reader: reader.stdout.read(), readers)]
    os.close(queue_fd)
    assert all(mine == sorted(mine) for mine in got)
    assert sorted(index for mine in got for index in mine) == list(order)


@given(
    threads=st.integers(1, 256),
    budget_bytes=st.integers(1, 1 << 40),
    processes=st.integers(1, 16),
    stored_bytes=st.integers(0, 1 << 40),
)
def test_shares_stay_within_the_bounds(threads, budget_bytes, processes, stored_bytes):
    """Fetchers never number more than may be or than there are bytes for, nor use more together than one may."""
    chunk = SimpleNamespace(stored_bytes=stored_bytes)
    share = share_of(Bounds(threads, budget_bytes, processes, verify_raw=False), SimpleNamespace(chunks=[chunk]))
    assert 1 <= share.processes <= processes
    assert share.processes == 1 or share.processes * BYTES_PER_FETCHER <= stored_bytes
    assert share.threads * share.processes <= max(threads, share.processes)
    assert share.budget_bytes * share.processes + (share.processes - 1) * FETCHER_BYTES <= budget_bytes
    assert share.processes == 1 or share.budget_bytes >= FETCHER_BYTES, "none is left without room for chunks"
