"""Fetching: every chunk lands bit for bit, and no wrong byte is taken for a right one."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstart.errors import (
    AccessDeniedError,
    BlobCorruptError,
    CodecError,
    ObjectMissingError,
    SnapshotError,
    StoreTransientError,
)
from coldstart.fetch import FetchRequest, start_threads
from coldstart.fetch.threads import processors
from coldstart.manifest import FileEntry, blob_key
from coldstart.stores.memory import MemoryStore
from coldstart.stores.retrying import RetryingStore
from coldstart.testing import FakeClock, Fault, FaultyStore
from tests.generations import arena_of, hash_of, manifest_of, stored_chunks

PATIENCE_SECONDS = 60.0
CODECS = ("raw", "zstd", "planes+zstd")
PLAIN = bytes(range(256)) * 40


def fetch(manifest, store, *, threads=2, budget_bytes=1 << 20, verify_raw=False, arena=None):
    """The report of a whole fetch, and the arena as it left it."""
    arena = arena or arena_of(manifest)
    fetch = start_threads(FetchRequest(manifest, store, arena, threads, budget_bytes, verify_raw=verify_raw))
    return fetch.wait(), arena


def content(manifest, arena) -> list[bytes]:
    """The bytes of every segment."""
    return [bytes(arena.writable(number)) for number in range(len(manifest.segments))]


def altered(manifest, index, **changes):
    """The manifest with one chunk that says something else; not what the strict reader would take, on purpose."""
    chunks = list(manifest.chunks)
    chunks[index] = chunks[index]._replace(**changes)
    return manifest._replace(chunks=tuple(chunks))


class Gate(FaultyStore):
    """A store whose reads of blobs wait until ``go`` is set; ``reached`` says that one waits."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.reached, self.go = threading.Event(), threading.Event()

    def read_into(self, key, target, *, offset_bytes=0):
        self.reached.set()
        assert self.go.wait(PATIENCE_SECONDS)
        super().read_into(key, target, offset_bytes=offset_bytes)


# --- what lands ------------------------------------------------------------------------------------------------------


raw_bytes = st.one_of(
    st.binary(min_size=1, max_size=300),
    st.integers(1, 70_000).map(bytes),
    st.integers(1, 20_000).map(lambda size: os.urandom(size)),
)


@settings(deadline=None, max_examples=60)
@given(
    segments=st.lists(st.lists(st.tuples(raw_bytes, st.sampled_from(CODECS)), max_size=6), max_size=4),
    item_bytes=st.sampled_from([1, 2, 4, 8, 16]),
    threads=st.integers(1, 6),
    budget_bytes=st.integers(0, 100_000),
    verify_raw=st.booleans(),
)
def test_every_chunk_lands_bit_for_bit(segments, item_bytes, threads, budget_bytes, verify_raw):
    """Whatever the chunks' sizes, codecs and order, the arena holds their raw bytes, and the report counts them."""
    store = FaultyStore(MemoryStore())
    manifest = stored_chunks(store, segments, item_bytes=item_bytes)
    report, arena = fetch(manifest, store, threads=threads, budget_bytes=budget_bytes, verify_raw=verify_raw)
    assert content(manifest, arena) == [b"".join(raw for raw, _ in pieces) for pieces in segments]
    assert report.fetched_bytes == sum(chunk.stored_bytes for chunk in manifest.chunks)
    assert (report.engine, report.retried_chunks) == ("threads", 0)
    assert report.began_monotonic_seconds <= report.ended_monotonic_seconds
    assert store.count("read_into") == len(manifest.chunks)


@pytest.mark.parametrize("codec", CODECS)
def test_large_chunks_land(codec):
    """Chunks of the sizes that captures make land too."""
    store = MemoryStore()
    raw = os.urandom(1 << 20) * 5
    manifest = stored_chunks(store, [[(raw[: 4 << 20], codec), (raw[4 << 20 :], codec)]])
    _, arena = fetch(manifest, store)
    assert content(manifest, arena) == [raw]


def test_a_snapshot_without_bytes_is_fetched():
    """A manifest without chunks is in place at once."""
    report, _ = fetch(manifest_of(), MemoryStore())
    assert (report.fetched_bytes, report.retried_chunks) == (0, 0)


def test_chunks_of_one_blob_each_land_and_count():
    """Two places with the same bytes share a blob in the store, and each is filled."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(PLAIN, "zstd"), (PLAIN, "zstd")]])
    report, arena = fetch(manifest, store)
    assert content(manifest, arena) == [PLAIN + PLAIN]
    assert report.fetched_bytes == 2 * manifest.stored_bytes


def test_files_come_first():
    """Chunks of files are read before those of arrays, because `init` needs them whole."""
    store = FaultyStore(MemoryStore())
    manifest = stored_chunks(store, [[(b"array", "raw")], [(b"file", "raw")]])
    segments = (manifest.segments[0], manifest.segments[1]._replace(consumer="files", kind="other"))
    files = (FileEntry("kept", "file", 0o644, 1, 0, 4),)
    fetch(manifest._replace(segments=segments, files=files), store, threads=1)
    read = [call.key for call in store.calls if call.operation == "read_into"]
    assert read == [blob_key(hash_of(b"file")), blob_key(hash_of(b"array"))]


def test_nothing_is_listed_or_written():
    """A fetch reads blobs by their names and does nothing else to the store."""
    inner = MemoryStore()
    manifest = stored_chunks(inner, [[(PLAIN, "zstd"), (b"plain", "raw")]])
    store = FaultyStore(inner)
    fetch(manifest, store)
    assert {call.operation for call in store.calls} == {"read_into"}


def test_chunks_are_read_side_by_side():
    """As many reads are under way at once as there are threads."""
    together = threading.Barrier(3, timeout=PATIENCE_SECONDS)

    class Meeting(FaultyStore):
        def read_into(self, key, target, *, offset_bytes=0):
            together.wait()
            super().read_into(key, target, offset_bytes=offset_bytes)

    inner = MemoryStore()
    manifest = stored_chunks(inner, [[(bytes([number]) * 9, "raw") for number in range(6)]])
    _, arena = fetch(manifest, Meeting(inner), threads=3)
    assert content(manifest, arena) == [b"".join(bytes([number]) * 9 for number in range(6))]


def test_views_taken_before_the_fill_show_it():
    """Arrays may be bound while the bytes are on their way: what lands shows in them."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(PLAIN, "zstd")]])
    arena = arena_of(manifest)
    view = arena.array(0, 0, len(PLAIN))
    fetch(manifest, store, arena=arena)
    assert view.tobytes() == PLAIN


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["corrupt", "truncate"])
def test_a_chunk_that_is_damaged_once_is_read_again(codec, kind):
    """Wrong bytes on the first read are replaced by those of the second, and the report counts the chunk."""
    inner = MemoryStore()
    manifest = stored_chunks(inner, [[(PLAIN, codec), (b"other", "raw")]])
    store = FaultyStore(inner, [Fault(kind, "read_into", key=blob_key(manifest.chunks[0].blob))])
    report, arena = fetch(manifest, store)
    assert content(manifest, arena) == [PLAIN + b"other"]
    assert report.retried_chunks == 1
    assert store.count("read_into", blob_key(manifest.chunks[0].blob)) == 2


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["corrupt", "truncate"])
def test_a_chunk_that_is_damaged_twice_ends_the_fetch(codec, kind):
    """Bytes that are wrong on both reads are an error that names the blob, and are never decoded."""
    inner = MemoryStore()
    manifest = stored_chunks(inner, [[(PLAIN, codec)]])
    blob = manifest.chunks[0].blob
    store = FaultyStore(inner, [Fault(kind, "read_into", times=2)])
    with pytest.raises(BlobCorruptError) as raised:
        fetch(manifest, store)
    assert raised.value.key == blob_key(blob)
    assert blob in str(raised.value)
    assert store.count("read_into") == 2


@settings(deadline=None, max_examples=80)
@given(data=st.data(), raw=raw_bytes, codec=st.sampled_from(CODECS))
def test_no_altered_blob_is_taken(data, raw, codec):
    """Whichever byte of a stored blob is changed, cut off or added, the fetch fails instead of giving other bytes."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(raw, codec)]])
    key = blob_key(manifest.chunks[0].blob)
    stored = bytearray(store.get(key).data)
    damage = data.draw(st.sampled_from(["flip", "cut", "replace"]))
    if damage == "flip":
        stored[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
    elif damage == "cut":
        del stored[data.draw(st.integers(0, len(stored) - 1)) :]
    else:
        stored = bytearray(byte ^ 0x5A for byte in stored)
    store.put(key, stored)
    with pytest.raises(BlobCorruptError):
        fetch(manifest, store)


def test_a_missing_blob_is_named():
    """A blob that is not there ends the fetch with the store's own error, and is not asked for twice."""
    inner = MemoryStore()
    manifest = stored_chunks(inner, [[(PLAIN, "raw")]])
    key = blob_key(manifest.chunks[0].blob)
    inner.delete(key)
    store = FaultyStore(inner)
    with pytest.raises(ObjectMissingError) as raised:
        fetch(manifest, store)
    assert raised.value.key == key
    assert store.count("read_into") == 1


@pytest.mark.parametrize("codec", CODECS)
def test_blobs_that_changed_places_are_noticed(codec):
    """Two right blobs under each other's names are two wrong blobs."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(b"a" * 500, codec), (b"b" * 500, codec)]])
    first, second = (blob_key(chunk.blob) for chunk in manifest.chunks)
    one, other = store.get(first).data, store.get(second).data
    store.put(first, other)
    store.put(second, one)
    with pytest.raises(BlobCorruptError):
        fetch(manifest, store)


@pytest.mark.parametrize("stored_bytes", [1, len(PLAIN) - 1, len(PLAIN) + 1])
def test_a_raw_chunk_of_another_length_than_its_place_is_refused(stored_bytes):
    """A manifest that lies about a raw chunk's stored length cannot make a fetch fill less or more than the place."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(PLAIN, "raw"), (b"behind", "raw")]])
    lying = altered(manifest, 0, stored_bytes=stored_bytes)
    with pytest.raises(BlobCorruptError) as raised:
        fetch(lying, store)
    assert lying.chunks[0].blob in str(raised.value)


@pytest.mark.parametrize("length_bytes", [1, 4999, 5001, 60_000])
def test_a_frame_of_another_length_than_its_place_is_refused(length_bytes):
    """A stored frame that decodes to more or less than the manifest says fails, and nothing beside its place changes."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(bytes(5000), "zstd"), (b"behind" * 9, "raw")]])
    other = stored_chunks(store, [[(b"x" * length_bytes, "zstd")]]).chunks[0]
    lying = altered(manifest, 0, blob=other.blob, stored_bytes=other.stored_bytes)
    arena = arena_of(manifest)
    arena.writable(0)[5000:] = b"behind" * 9
    with pytest.raises(CodecError):
        fetch(lying, store, arena=arena, threads=1)
    assert bytes(arena.writable(0)[5000:]) == b"behind" * 9


def test_an_unknown_codec_is_an_error_of_its_own():
    """A codec that this coldstart does not have is no damage of the blob: it is not read again, and named."""
    inner = MemoryStore()
    manifest = altered(stored_chunks(inner, [[(PLAIN, "zstd")]]), 0, codec="planes")
    store = FaultyStore(inner)
    with pytest.raises(CodecError, match="planes"):
        fetch(manifest, store)
    assert store.count("read_into") == 1


@pytest.mark.parametrize("codec", CODECS)
def test_only_verify_raw_looks_at_what_decoding_gave(codec):
    """A start believes the manifest that the blob decodes to the captured bytes; a proof hashes them."""
    store = MemoryStore()
    manifest = altered(stored_chunks(store, [[(PLAIN, codec)]]), 0, raw_hash="0" * 64)
    _, arena = fetch(manifest, store)
    assert content(manifest, arena) == [PLAIN]
    with pytest.raises(BlobCorruptError) as raised:
        fetch(manifest, store, verify_raw=True)
    assert manifest.chunks[0].blob in str(raised.value)


# --- the store fails -------------------------------------------------------------------------------------------------


def test_failures_that_pass_are_the_retrying_wrappers_business():
    """Behind the retrying wrapper transient failures are not seen, and no chunk counts as damaged."""
    inner, clock = MemoryStore(), FakeClock()
    manifest = stored_chunks(inner, [[(bytes([number]) * 100, "raw") for number in range(8)]])
    keys = [blob_key(chunk.blob) for chunk in manifest.chunks]
    faults = [Fault("transient_before", key=keys[0], times=3), Fault("hang", key=keys[5], seconds=5.0)]
    faulty = FaultyStore(inner, faults, clock=clock)
    report, arena = fetch(manifest, RetryingStore(faulty, clock=clock))
    assert content(manifest, arena) == [b"".join(bytes([number]) * 100 for number in range(8))]
    assert report.retried_chunks == 0
    assert faulty.count("read_into") == 8 + 4


@pytest.mark.parametrize(
    ("kind", "error"),
    [("transient_before", StoreTransientError), ("denied", AccessDeniedError), ("missing", ObjectMissingError)],
)
def test_a_failing_store_ends_the_fetch(kind, error):
    """An error of the store is raised as it is, after one attempt."""
    inner = MemoryStore()
    manifest = stored_chunks(inner, [[(PLAIN, "raw")]])
    store = FaultyStore(inner, [Fault(kind, "read_into")])
    with pytest.raises(error):
        fetch(manifest, store)
    assert store.count("read_into") == 1


def test_the_arena_is_left_open_after_a_failure():
    """A failed fetch seals nothing: the same arena can be filled by another one."""
    inner = MemoryStore()
    manifest = stored_chunks(inner, [[(PLAIN, "zstd"), (b"other", "raw")]])
    store = FaultyStore(inner, [Fault("corrupt", "read_into", times=2)])
    arena = arena_of(manifest)
    with pytest.raises(BlobCorruptError):
        fetch(manifest, store, arena=arena, threads=1)
    fetch(manifest, store, arena=arena)
    assert content(manifest, arena) == [PLAIN + b"other"]


def test_an_error_ends_the_fetch_early():
    """After a failing chunk no further one is read."""
    inner = MemoryStore()
    manifest = stored_chunks(inner, [[(bytes([number]) * 9, "raw") for number in range(50)]])
    store = FaultyStore(inner, [Fault("denied", "read_into", skip=4)])
    with pytest.raises(AccessDeniedError):
        fetch(manifest, store, threads=1)
    assert store.count("read_into") == 5


# --- the end ---------------------------------------------------------------------------------------------------------


def test_a_cancelled_fetch_begins_no_further_chunk():
    """After ``cancel`` the chunk under way is the last, and ``wait`` says that there is no snapshot."""
    inner = MemoryStore()
    manifest = stored_chunks(inner, [[(bytes([number]) * 9, "raw") for number in range(50)]])
    store = Gate(inner)
    fetch = start_threads(FetchRequest(manifest, store, arena_of(manifest), 1, 1 << 20))
    assert store.reached.wait(PATIENCE_SECONDS)
    fetch.cancel()
    store.go.set()
    with pytest.raises(SnapshotError, match="cancelled"):
        fetch.wait()
    assert store.count("read_into") == 1


def test_waiting_again_gives_the_same():
    """``wait`` may be called by several: each gets the report, or the error."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(PLAIN, "raw")]])
    fetch = start_threads(FetchRequest(manifest, store, arena_of(manifest), 2, 1 << 20))
    assert fetch.wait() == fetch.wait()
    store.delete(blob_key(manifest.chunks[0].blob))
    fetch = start_threads(FetchRequest(manifest, store, arena_of(manifest), 2, 1 << 20))
    for _ in range(2):
        with pytest.raises(ObjectMissingError):
            fetch.wait()


def test_a_fetch_is_under_way_while_its_caller_goes_on():
    """Starting a fetch does not wait for it, and its threads say what they are."""
    inner = MemoryStore()
    manifest = stored_chunks(inner, [[(PLAIN, "raw"), (b"other", "raw")]])
    store = Gate(inner)
    fetch = start_threads(FetchRequest(manifest, store, arena_of(manifest), 2, 1 << 20))
    assert store.reached.wait(PATIENCE_SECONDS)
    names = {thread.name for thread in threading.enumerate() if thread.daemon}
    assert {"coldstart-fetch-model", "coldstart-fetch-0"} <= names
    store.go.set()
    assert fetch.wait().fetched_bytes == len(PLAIN) + 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("9000000 100000", 8), ("", 8), ("nonsense", 8)],
)
def test_a_containers_share_of_the_processors_counts(tmp_path, monkeypatch, text, expected):
    """A container on a large machine may keep busy what its quota says, and at least one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    (tmp_path / "cpu.max").write_text(text)
    assert processors(str(tmp_path / "cpu.max")) == expected


def test_without_a_quota_all_processors_count(tmp_path, monkeypatch):
    """Where there is no control group, what the scheduler says counts."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    assert processors(str(tmp_path / "none")) == 3
