"""What a hostile or broken store may hold, met by a whole restoration: a reason and the next generation, never other bytes.

Each case is one of the table "hostile inputs that a restore survives". Whoever can write the store can give a blob any bytes under
their right name, so the codecs' guards are tried here with hashes that are right.
"""

from __future__ import annotations

import struct
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zstandard

from coldstart import events
from coldstart.errors import BlobCorruptError
from coldstart.manifest import Manifest, blob_key, manifest_to_json, newest_ref_key, ref_key, ref_to_json
from coldstart.restore import Missing, Restored, Unusable
from coldstart.stores import base, open_store
from coldstart.stores.base import MAX_OBJECT_BYTES
from tests.generations import KEY, hash_of
from tests.test_manifest import HOSTILE_MANIFESTS, HOSTILE_REFS
from tests.test_restore import World, state, value_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstart.manifest import Chunk

MEMORY_BYTES = 64 << 20
"""What a restoration of a few kilobytes may take at most, whatever a store claims."""
SOME_REFS = dict(list(HOSTILE_REFS.items())[::4])
SOME_MANIFESTS = dict(list(HOSTILE_MANIFESTS.items())[::6])
"""The reader is held against all of them in ``test_manifest.py``; here it is what comes of a refusal that counts."""


class Hostile(World):
    """A store with two generations, of which the current one is to be spoiled."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        old = self.publish(state(0))
        self.new = self.publish(state(1), follows=old)
        (blob,) = {chunk.blob for chunk in self.new.manifest.chunks} - {chunk.blob for chunk in old.manifest.chunks}
        (self.chunk,) = (chunk for chunk in self.new.manifest.chunks if chunk.blob == blob)
        self.ref_key = ref_key("model", KEY.digest)

    def begin(self, **options: Any) -> Any:
        return super().begin(**{"files_folder": str(self.folder), **options})

    def name_manifest(self, manifest: Manifest | bytes) -> None:
        """Have the ref name other bytes as the current manifest."""
        data = manifest if isinstance(manifest, bytes) else manifest_to_json(manifest)
        key = "manifests/model/000002-bad0"
        self.store.put(key, data)
        ref = self.repository.look_up("model", KEY).ref
        assert ref is not None
        self.store.put(self.ref_key, ref_to_json(ref._replace(manifest=key)))

    def give(self, stored: bytes, **changes: Any) -> None:
        """Have the current generation's own chunk be these bytes, under their right name."""
        blob = hash_of(stored)
        self.store.put(blob_key(blob), stored)
        changed = self.chunk._replace(**{"blob": blob, "stored_bytes": len(stored), **changes})
        chunks = tuple(changed if chunk == self.chunk else chunk for chunk in self.new.manifest.chunks)
        self.name_manifest(self.new.manifest._replace(chunks=chunks))

    def bounded(self) -> Any:
        """The outcome; what it took of memory is checked, and that nothing of it is left over."""
        tracemalloc.start()
        try:
            outcome = self.outcome()
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < MEMORY_BYTES
        return outcome


@pytest.fixture
def hostile(tmp_path: Path) -> Hostile:
    """Two good generations."""
    return Hostile(tmp_path)


# --- ref and manifest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", SOME_REFS.values(), ids=SOME_REFS.keys())
def test_a_hostile_ref_is_a_reason(hostile: Hostile, data: bytes) -> None:
    """Nothing that it names is read, and what to do about it is said."""
    hostile.store.put(hostile.ref_key, data)
    before = len(hostile.store.calls)
    outcome = hostile.bounded()
    assert isinstance(outcome, Unusable)
    assert "Error: " in outcome.reason
    assert {call.key for call in hostile.store.calls[before:]} == {hostile.ref_key}


@pytest.mark.parametrize("data", SOME_REFS.values(), ids=SOME_REFS.keys())
def test_a_hostile_newest_ref_explains_nothing_and_harms_nothing(hostile: Hostile, data: bytes) -> None:
    """The convenience for people is passed over where it is malformed: there is no snapshot for the key."""
    hostile.store.put(newest_ref_key("model"), data)
    hostile.store.delete(hostile.ref_key)
    outcome = hostile.bounded()
    assert isinstance(outcome, Missing)


@pytest.mark.parametrize("data", SOME_MANIFESTS.values(), ids=SOME_MANIFESTS.keys())
def test_a_hostile_manifest_is_passed_over(hostile: Hostile, data: bytes) -> None:
    """The generation before it is restored, and the reason has the kind of error."""
    hostile.name_manifest(data)
    outcome = hostile.bounded()
    assert isinstance(outcome, Restored)
    assert (value_of(outcome), outcome.recovered_by) == (0, "previous_generation")
    assert "ManifestError: " in outcome.reason


def _large(manifest: Manifest) -> Manifest:
    """2^39 bytes of state, which the format allows and no worker has."""
    segment = manifest.segments[0]._replace(length_bytes=1 << 39)
    chunk: Chunk = manifest.chunks[0]
    count = (1 << 39) // (64 << 20)
    chunks = tuple(
        chunk._replace(segment=0, offset_bytes=index * (64 << 20), length_bytes=64 << 20, stored_bytes=64 << 20)
        for index in range(count)
    )
    return manifest._replace(segments=(segment,), chunks=chunks, buffers=(), leaves=(), tree=None)


MANIFESTS: dict[str, Callable[[Manifest], Manifest]] = {
    "of another snapshot": lambda manifest: manifest._replace(name="other"),
    "for another device": lambda manifest: manifest._replace(device_type="cuda"),
    "larger than any memory": _large,
    "of a codec that there is not": lambda manifest: manifest._replace(
        chunks=tuple(chunk._replace(codec="rar") for chunk in manifest.chunks)
    ),
    "of blobs that there are not": lambda manifest: manifest._replace(
        chunks=tuple(chunk._replace(blob=f"{index:064x}") for index, chunk in enumerate(manifest.chunks))
    ),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_that_cannot_be_restored_is_passed_over(
    hostile: Hostile, change: Callable[[Manifest], Manifest]
) -> None:
    """A well-formed manifest of something that this worker cannot use leads to the generation before, in bounded memory."""
    hostile.name_manifest(change(hostile.new.manifest))
    outcome = hostile.bounded()
    assert isinstance(outcome, Restored)
    assert (value_of(outcome), outcome.recovered_by) == (0, "previous_generation")


# --- blobs -------------------------------------------------------------------------------------------------------------------


def _frame(raw: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(raw)


def _lying_size(size_bytes: int) -> bytes:
    """A frame that says that it holds so many bytes, and holds none."""
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", size_bytes) + b"\x01\x00\x00"


ZEROS = bytes(1 << 20)
ZSTD: dict[str, Callable[[int], bytes]] = {
    "a bomb": lambda length: b"".join(_frame(ZEROS) for _ in range(64)),
    "one frame that is a bomb": lambda length: _frame(bytes(64 << 20)),
    "a size of 2^40": lambda length: _lying_size(1 << 40),
    "a size of 2^63": lambda length: _lying_size((1 << 63) - 1),
    "a huge window": lambda length: b"\x28\xb5\x2f\xfd\x00\xf8" + b"\x01\x00\x00",
    "something behind the frame": lambda length: _frame(bytes(length)) + b"garbage",
    "two frames": lambda length: _frame(bytes(length // 2)) + _frame(bytes(length - length // 2)),
    "fewer bytes": lambda length: _frame(bytes(length - 1)),
    "more bytes": lambda length: _frame(bytes(length + 1)),
    "no frame": lambda length: b"no frame at all" * 3,
    "a skippable frame": lambda length: b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"skip",
    "an unknown dictionary": lambda length: b"\x28\xb5\x2f\xfd\x03" + struct.pack("<I", 77) + b"\x00" + b"\x01\x00\x00",
}


@pytest.mark.parametrize("codec", ["zstd", "planes+zstd"])
@pytest.mark.parametrize("make", ZSTD.values(), ids=ZSTD.keys())
def test_a_hostile_frame_under_its_right_name_is_passed_over(hostile: Hostile, make: Any, codec: str) -> None:
    """Whatever the frame claims, memory is that of the chunk, and the generation before is restored."""
    hostile.give(make(hostile.chunk.length_bytes), codec=codec, parameters={})
    outcome = hostile.bounded()
    assert isinstance(outcome, Restored)
    assert (value_of(outcome), outcome.recovered_by) == (0, "previous_generation")
    assert "Error: " in outcome.reason


PARAMETERS = ({"block": -1}, {"block": 1 << 52}, {"block": "x"}, {"planes": 10**6}, {"level": "a" * 100})


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_hostile_parameters_of_a_codec_are_harmless(hostile: Hostile, parameters: dict[str, Any]) -> None:
    """Parameters that no codec knows change nothing, or are refused: the right bytes, or the generation before."""
    data = np.full(100, 1, np.float32).tobytes()
    padded = data + bytes(hostile.chunk.length_bytes - len(data))
    hostile.give(_frame(padded), codec="zstd", parameters=parameters)
    outcome = hostile.bounded()
    assert isinstance(outcome, Restored)
    assert value_of(outcome) in (0, 1)


BLOBS: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "shorter": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "one bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "an error page": lambda data: b"<Error><Code>NoSuchKey</Code></Error>",
    "as long, of zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("spoil", BLOBS.values(), ids=BLOBS.keys())
def test_a_blob_that_is_not_what_its_name_says_is_passed_over(
    hostile: Hostile, spoil: Callable[[bytes], bytes | None]
) -> None:
    """Any other bytes under a blob's name lead to the generation before; only a longer blob's right beginning will do."""
    key = blob_key(hostile.chunk.blob)
    data = spoil(hostile.store.get(key).data)
    if data is None:
        hostile.store.delete(key)
    else:
        hostile.store.put(key, data)
    outcome = hostile.bounded()
    assert isinstance(outcome, Restored)
    whole = data is not None and hash_of(data[: hostile.chunk.stored_bytes]) == hostile.chunk.blob
    assert value_of(outcome) == (1 if whole else 0)
    assert outcome.recovered_by == ("none" if whole else "previous_generation")


def test_two_blobs_that_changed_places_are_noticed(hostile: Hostile) -> None:
    """Each has the bytes of the other: right hashes in the store, in the wrong places."""
    first, second = hostile.new.manifest.chunks[:2]
    data = [hostile.store.get(blob_key(chunk.blob)).data for chunk in (first, second)]
    hostile.store.put(blob_key(first.blob), data[1])
    hostile.store.put(blob_key(second.blob), data[0])
    outcome = hostile.bounded()
    assert isinstance(outcome, Unusable), "the blob that both generations share is wrong too"
    assert outcome.reason.count("BlobCorruptError") == 2


def test_a_fetch_that_fails_leaves_no_state(hostile: Hostile) -> None:
    """What was fetched of a generation that turned out bad is let go of: nothing is bound, nothing is announced as fetched."""
    hostile.give(b"no frame at all" * 3, codec="zstd", parameters={})
    hostile.store.delete(blob_key(hostile.new.manifest.chunks[0].blob))
    outcome = hostile.bounded()
    ended = hostile.seen.of(events.FetchEnded)
    assert len(ended) == int(isinstance(outcome, Restored))


# --- objects that are too large ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "bucket", "boto3"])
def test_an_object_larger_than_any_is_not_taken_into_memory(
    tmp_path: Path, s3_bucket: str, s3_options: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A ref of a gigabyte is a typed error after its length is known; the connection, and the next object, are as before."""
    monkeypatch.setattr(base, "MAX_OBJECT_BYTES", 1000)
    if kind == "boto3":
        monkeypatch.setattr("coldstart.stores.s3_reader.reads_directly", lambda *_: False)
    store = open_store(f"file://{tmp_path}/store" if kind == "folder" else f"s3://{s3_bucket}", s3_options)
    store.put("refs/model/small", b"x" * 1000)
    store.put("refs/model/large", b"x" * 1001)
    with pytest.raises(BlobCorruptError, match="has 1001 bytes, more than the 1000"):
        store.get("refs/model/large")
    assert len(store.get("refs/model/small").data) == 1000
    store.close()


def test_the_largest_chunk_is_no_larger_than_the_largest_object() -> None:
    """A chunk that did not shrink at all can be read back by whoever verifies it."""
    from coldstart.manifest import MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES, MAX_STORED_OVERHEAD_BYTES

    assert MAX_CHUNK_BYTES * 9 // 8 + MAX_STORED_OVERHEAD_BYTES <= MAX_OBJECT_BYTES
    assert MAX_MANIFEST_BYTES <= MAX_OBJECT_BYTES
