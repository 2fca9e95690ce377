"""Verifying a stored generation: each kind of damage is a finding that names its chunk."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstart.errors import AccessDeniedError, StoreTransientError
from coldstart.manifest import blob_key
from coldstart.repository import Repository
from coldstart.stores.memory import MemoryStore
from coldstart.testing import Fault, FaultyStore
from coldstart.verify import Finding, verify
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
