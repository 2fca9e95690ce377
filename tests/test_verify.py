"""Verifying a stored generation: each kind of damage is a finding that names its chunk."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstart.errors import AccessDeniedError, StoreTransientError, UsageError
from coldstart.manifest import blob_key, ref_key
from coldstart.repository import Repository
from coldstart.stores.memory import MemoryStore
from coldstart.stores.replicated import Member, ReplicatedStore
from coldstart.testing import Fault, FaultyStore
from coldstart.verify import LEVELS, Finding, repair, verify, verify_stores
from tests.generations import capture_of, hash_of, manifest_of, stored_chunks, write

PIECES = [[(os.urandom(5000), "raw"), (bytes(9000), "zstd")], [(b"third" * 700, "zstd"), (b"fourth", "raw")]]


@pytest.fixture
def store():
    """The store under inspection."""
    return MemoryStore()


@pytest.fixture
def manifest(store):
    """A generation of four chunks, raw and encoded, in two segments."""
    return stored_chunks(store, PIECES)


def altered(manifest, index, **changes):
    """The manifest with one chunk that says something else."""
    chunks = list(manifest.chunks)
    chunks[index] = chunks[index]._replace(**changes)
    return manifest._replace(chunks=tuple(chunks))


def only_finding(manifest, store, index) -> Finding:
    """The one finding there is, which must be of chunk ``index``."""
    (finding,) = verify(manifest, store)
    assert (finding.chunk, finding.blob) == (index, manifest.chunks[index].blob)
    assert finding.problem
    return finding


def test_a_whole_generation_has_no_findings(manifest, store):
    """Nothing is found where nothing is wrong, and the store is only read."""
    watched = FaultyStore(store)
    assert list(verify(manifest, watched)) == []
    assert {call.operation for call in watched.calls} == {"get"}


@pytest.mark.parametrize("codec", ["raw", "zstd", "planes+zstd", "auto"])
def test_a_captured_generation_has_no_findings(codec):
    """What a capture writes passes, whatever its codec."""
    store = MemoryStore()
    state = {"w": np.arange(700_000), "b": np.zeros(3)}
    assert list(verify(write(capture_of(state), Repository(store), codec=codec).manifest, store)) == []


def test_a_generation_without_chunks_has_no_findings(store):
    """No bytes are no damage."""
    assert list(verify(manifest_of(), store)) == []


@pytest.mark.parametrize("index", range(4))
def test_a_missing_blob_is_found(manifest, store, index):
    """A blob that is not there is said to be missing, and the other chunks are still looked at."""
    store.delete(blob_key(manifest.chunks[index].blob))
    assert "nothing is stored" in only_finding(manifest, store, index).problem


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("length", ["shorter", "longer", "empty"])
def test_a_blob_of_another_length_is_found(manifest, store, index, length):
    """A cut off or extended blob is found, with both lengths."""
    key = blob_key(manifest.chunks[index].blob)
    data = store.get(key).data
    store.put(key, {"shorter": data[:-1], "longer": data + b"x", "empty": b""}[length])
    assert str(manifest.chunks[index].stored_bytes) in only_finding(manifest, store, index).problem


@settings(deadline=None, max_examples=60)
@given(data=st.data(), index=st.integers(0, 3))
def test_any_flipped_byte_is_found(data, index):
    """Whichever byte of a blob is another, its chunk is found and no other."""
    store = MemoryStore()
    manifest = stored_chunks(store, PIECES)
    key = blob_key(manifest.chunks[index].blob)
    stored = bytearray(store.get(key).data)
    stored[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
    store.put(key, stored)
    assert "not those that its name says" in only_finding(manifest, store, index).problem


@pytest.mark.parametrize("index", range(4))
def test_a_chunk_that_decodes_to_other_bytes_is_found(manifest, store, index):
    """A right blob that is not the captured bytes is found: only this looks behind the decoder."""
    finding = only_finding(altered(manifest, index, raw_hash="0" * 64), store, index)
    assert "other bytes than were captured" in finding.problem


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("change", [-1, 1])
def test_a_place_of_another_length_is_found(manifest, store, index, change):
    """A blob that decodes to more or less than its place is found."""
    length = manifest.chunks[index].length_bytes + change
    only_finding(altered(manifest, index, length_bytes=length), store, index)


def test_a_broken_frame_is_found(manifest, store):
    """A blob that is what its name says and no frame at all is found."""
    rubbish = b"no frame" * 9
    blob = hash_of(rubbish)
    store.put(blob_key(blob), rubbish)
    lying = altered(manifest, 1, blob=blob, stored_bytes=len(rubbish))
    assert "frame" in only_finding(lying, store, 1).problem


def test_an_unknown_codec_is_found(manifest, store):
    """A chunk that this coldstart cannot read is a finding and not the end."""
    assert "planes" in only_finding(altered(manifest, 2, codec="planes"), store, 2).problem


def test_swapped_blobs_are_both_found(manifest, store):
    """Two chunks that name each other's blobs are two findings."""
    first, second = manifest.chunks[0], manifest.chunks[3]
    one = altered(manifest, 0, blob=second.blob, stored_bytes=second.stored_bytes)
    both = altered(one, 3, blob=first.blob, stored_bytes=first.stored_bytes)
    assert [finding.chunk for finding in verify(both, store)] == [0, 3]


def test_all_damage_is_found(manifest, store):
    """Every damaged chunk is a finding of its own, in the manifest's order."""
    store.delete(blob_key(manifest.chunks[3].blob))
    store.put(blob_key(manifest.chunks[0].blob), b"short")
    damaged = altered(manifest, 2, raw_hash="f" * 64)
    assert [finding.chunk for finding in verify(damaged, store)] == [0, 2, 3]


@pytest.mark.parametrize(("kind", "error"), [("denied", AccessDeniedError), ("transient_before", StoreTransientError)])
def test_a_store_that_fails_is_no_finding(manifest, store, kind, error):
    """Who may not read, or cannot just now, does not know whether the snapshot is damaged."""
    with pytest.raises(error):
        list(verify(manifest, FaultyStore(store, [Fault(kind, "get", skip=1)])))


# --- levels ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_misses_no_blob(manifest, store, level):
    """A blob that is missing or has another length is found by each, with one look at most at every chunk."""
    store.delete(blob_key(manifest.chunks[2].blob))
    store.put(blob_key(manifest.chunks[0].blob), b"short")
    watched = FaultyStore(store)
    assert [finding.chunk for finding in verify(manifest, watched, level=level)] == [0, 2]
    assert len(watched.calls) == len(manifest.chunks)


def test_structure_reads_no_bytes(manifest, store):
    """It asks for lengths alone, so altered bytes are not its business."""
    key = blob_key(manifest.chunks[0].blob)
    store.put(key, bytes(len(store.get(key).data)))
    watched = FaultyStore(store)
    assert list(verify(manifest, watched, level="structure")) == []
    assert {call.operation for call in watched.calls} == {"head"}


def many(store, count=400):
    """A generation of many chunks in one segment, all raw but the last."""
    pieces = [(bytes([index % 251, index // 251]) * 50, "raw") for index in range(count - 1)]
    return stored_chunks(store, [[*pieces, (bytes(5000), "zstd")]])


def test_a_sample_is_a_part_with_each_codec_in_it(store):
    """About a twentieth is read, drawn anew each time, and of a codec that one chunk alone has that chunk."""
    manifest = many(store)
    reads = []
    for _ in range(3):
        watched = FaultyStore(store)
        assert list(verify(manifest, watched, level="sample")) == []
        reads.append({call.key for call in watched.calls if call.operation == "get"})
    assert all(2 <= len(read) <= 80 for read in reads)
    assert all(blob_key(manifest.chunks[-1].blob) in read for read in reads)
    assert len(set(map(frozenset, reads))) == 3


def test_what_is_in_the_sample_is_looked_at_wholly(manifest, store):
    """Altered bytes of a chunk in the sample are found, those of another are not; the choice is the caller's."""
    for chunk in manifest.chunks[:2]:
        key = blob_key(chunk.blob)
        store.put(key, bytes(len(store.get(key).data)))
    kinds = [(chunk.segment, chunk.codec) for chunk in manifest.chunks]
    assert len(set(kinds)) == 4, "one of each is always read"
    doubled = manifest._replace(chunks=manifest.chunks + manifest.chunks)
    found = verify(doubled, store, level="sample", choose=lambda index: 0.9 if index < 4 else 0.5)
    assert [finding.chunk for finding in found] == [4, 5]
    found = verify(doubled, store, level="sample", choose=lambda index: 0.0 if index == 1 else 0.5)
    assert [finding.chunk for finding in found] == [0, 1]


def test_a_level_that_there_is_not(manifest, store):
    """A misspelt level verifies nothing and says so."""
    with pytest.raises(UsageError, match="none of structure, sample, full"):
        list(verify(manifest, store, level="some"))


# --- several stores ---------------------------------------------------------------------------------------------------------------


class Pair:
    """A primary and a replica that hold one published generation."""

    def __init__(self):
        self.stores = [MemoryStore(), MemoryStore()]
        self.joined = ReplicatedStore([Member(store, store) for store in self.stores])
        repository = Repository(self.joined)
        written = write(capture_of({"w": np.arange(50_000), "b": np.zeros(3)}), repository)
        lookup = repository.look_up("model", written.manifest.key)
        self.ref = repository.publish(written.manifest, written.manifest_key, replaces=lookup)
        self.manifest = written.manifest
        self.blob = blob_key(self.manifest.chunks[0].blob)

    def places(self, level="full"):
        return list(verify_stores(self.manifest, self.ref.manifest, self.joined, level=level))

    def contents(self):
        return [{info.key: store.get(info.key).data for info in store.list("")} for store in self.stores]


DAMAGES = {
    "blob missing": lambda pair, store: store.delete(pair.blob),
    "blob altered": lambda pair, store: store.put(pair.blob, bytes(len(store.get(pair.blob).data))),
    "blob shorter": lambda pair, store: store.put(pair.blob, b"short"),
    "manifest missing": lambda pair, store: store.delete(pair.ref.manifest),
    "manifest altered": lambda pair, store: store.put(pair.ref.manifest, b"{}"),
}


@pytest.mark.parametrize("number", [0, 1], ids=["primary", "replica"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_found_where_it_is_and_mended_from_the_other(damage, number):
    """Whichever store it befell; afterwards both hold what they held before, and nothing is found."""
    pair = Pair()
    assert pair.places() == []
    before = pair.contents()
    damage(pair, pair.stores[number])
    places = pair.places()
    assert [place.store for place in places] == [number]
    assert list(repair(pair.manifest, pair.joined, places)) == []
    assert pair.contents() == before
    assert pair.places() == []


@pytest.mark.parametrize("stale", [b"{}", None], ids=["another", "missing"])
def test_a_replicas_ref_follows_the_primarys(stale):
    """A replica that is behind is found at every level, and gets the primary's ref; the primary's is never touched."""
    pair = Pair()
    key = ref_key("model", pair.manifest.key.digest)
    before = pair.stores[0].get(key).data
    pair.stores[1].delete(key) if stale is None else pair.stores[1].put(key, stale)
    for level in LEVELS:
        (place,) = pair.places(level)
        assert (place.store, place.key) == (1, key)
    assert list(repair(pair.manifest, pair.joined, [place])) == []
    assert [store.get(key).data for store in pair.stores] == [before] * 2


def test_a_replica_that_cannot_be_mended_keeps_its_ref():
    """Its ref is not moved to a generation that it does not hold wholly."""
    pair = Pair()
    key = ref_key("model", pair.manifest.key.digest)
    pair.stores[1].put(key, b"older")
    for store in pair.stores:
        store.put(pair.blob, b"wrong")
    left = list(repair(pair.manifest, pair.joined, pair.places()))
    assert {(place.store, place.key) for place in left} == {(0, pair.blob), (1, pair.blob), (1, key)}
    assert pair.stores[1].get(key).data == b"older"


def test_what_is_wrong_everywhere_stays_a_finding():
    """A copy is made of nothing but right bytes: then the store is left as it is."""
    pair = Pair()
    for store in pair.stores:
        store.put(pair.blob, b"wrong")
    before = pair.contents()
    places = pair.places()
    assert list(repair(pair.manifest, pair.joined, places)) == places
    assert len(places) == 2
    assert pair.contents() == before


def test_a_lone_store_has_nothing_to_be_mended_from():
    """Without replicas findings stay findings."""
    store = MemoryStore()
    manifest = stored_chunks(store, PIECES)
    store.delete(blob_key(manifest.chunks[0].blob))
    places = [place for place in verify_stores(manifest, "manifests/m/000001-a", store) if place.finding.chunk == 0]
    assert list(repair(manifest, store, places)) == places
