"""Capturing again, and while others write: what did not change is not sent, and nothing torn is published."""

from __future__ import annotations

import os

import numpy as np
import pytest

from coldstart.errors import CaptureError, StateChangedError, StoreTransientError
from coldstart.manifest import blob_key
from coldstart.repository import COLLECTION_GRACE_SECONDS, Repository
from coldstart.stores.memory import MemoryStore
from coldstart.testing import FakeClock, Fault, FaultyStore
from tests.generations import (
    KEY,
    OTHER_KEY,
    AtPace,
    assert_same,
    blobs_of,
    capture_of,
    file_bytes,
    hash_of,
    restored,
    sources,
    write,
)

MIB = 1 << 20


@pytest.fixture
def clock():
    """The store's and the repository's time."""
    return FakeClock()


@pytest.fixture
def store(clock):
    """The store, with a list of what was asked of it."""
    return FaultyStore(MemoryStore(clock=clock.time))


@pytest.fixture
def repository(store, clock):
    """The repository that captures write to."""
    return Repository(store, clock=clock.time)


# --- what did not change ---------------------------------------------------------------------------------------------


def model(changed: int | None = None):
    """A state of five arrays over several chunks, of which one may differ."""
    state = {f"layer{number}": np.full(3 * MIB, number, np.uint8) for number in range(5)}
    if changed is not None:
        state[f"layer{changed}"][1000] = 99
    return state


def test_an_unchanged_state_writes_no_blob(repository, store):
    """A generation that equals its parent names the parent's blobs and writes none."""
    first = write(capture_of(model()), repository)
    puts, heads = store.count("put", "blobs/*"), store.count("head")
    second = write(capture_of(model(), follows=first), repository)
    assert (store.count("put", "blobs/*"), store.count("head")) == (puts, heads)
    assert second.written_bytes == 0
    assert second.reused_bytes == sum(chunk.stored_bytes for chunk in first.manifest.chunks)
    assert second.manifest.chunks == first.manifest.chunks
    assert_same(restored(second.manifest, store), model())


@pytest.mark.parametrize("changed", range(5))
def test_one_changed_array_writes_only_its_chunks(repository, store, changed):
    """Of a generation with one changed array only the chunk with that array is written."""
    first = write(capture_of(model()), repository)
    second = write(capture_of(model(changed), follows=first), repository)
    differing = [chunk for chunk in second.manifest.chunks if chunk not in first.manifest.chunks]
    assert len(differing) == 1
    assert second.written_bytes == differing[0].stored_bytes
    assert second.reused_bytes == sum(chunk.stored_bytes for chunk in second.manifest.chunks) - second.written_bytes
    assert_same(restored(second.manifest, store), model(changed))


def test_an_added_and_a_removed_array_leave_the_others(repository, store):
    """Where arrays come and go, the chunks of those that stay are not written again."""
    arrays = {f"w{number}": np.frombuffer(os.urandom(5 * MIB), np.uint8) for number in range(5)}
    first = write(capture_of({name: arrays[name] for name in ("w0", "w1", "w2", "w3")}), repository)
    state = {name: arrays[name] for name in ("w0", "w2", "w3", "w4")}
    second = write(capture_of(state, follows=first), repository)
    assert second.written_bytes == 5 * MIB
    assert_same(restored(second.manifest, store), state)


def test_a_parents_codec_may_be_another(repository, store):
    """A clean chunk keeps the codec that it was stored with, whatever the setting is now."""
    first = write(capture_of(model()), repository, codec="zstd")
    second = write(capture_of(model(2), follows=first), repository, codec="raw")
    assert sorted(chunk.codec for chunk in second.manifest.chunks) == [
        "raw",
        *["zstd"] * (len(second.manifest.chunks) - 1),
    ]
    assert_same(restored(second.manifest, store), model(2))


def test_files_are_reused_like_arrays(repository, store, tmp_path):
    """Unchanged files write nothing, whatever their path on this machine is now."""
    contents = {f"{number}.bin": bytes([number]) * (2 * MIB) for number in range(4)}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name, data in contents.items():
            (tmp_path / folder / name).write_bytes(data)
    first = write(capture_of(files=sources({name: tmp_path / "one" / name for name in contents})), repository)
    second = write(
        capture_of(files=sources({name: tmp_path / "two" / name for name in contents}), follows=first), repository
    )
    assert second.written_bytes == 0
    assert file_bytes(second.manifest, store) == {f"kept/{name}": data for name, data in contents.items()}


@pytest.mark.parametrize(("key", "generation"), [(OTHER_KEY, 1), (OTHER_KEY, 2), (KEY, 1), (KEY, 5)])
@pytest.mark.parametrize(("age_seconds", "is_sent_again"), [(3600, False), (COLLECTION_GRACE_SECONDS / 2, True)])
def test_blobs_of_a_parent_that_is_not_replaced_are_relied_on_while_young(
    repository, store, clock, age_seconds, is_sent_again, key, generation
):
    """A parent that lives on its own may be collected before this generation is published: its old blobs are sent again."""
    first = write(capture_of(model()), repository)
    clock.advance(age_seconds)
    second = write(capture_of(model(), follows=first, key=key, generation=generation), repository)
    sent = sum(len(data) for data in blobs_of(store).values())
    assert second.written_bytes == (sent if is_sent_again else 0)
    assert all(
        store.head(blob_key(chunk.blob)).modified_seconds >= clock.time() - 3600 for chunk in second.manifest.chunks
    )


def test_the_replaced_generations_blobs_are_relied_on_at_any_age(repository, store, clock):
    """The generation that is replaced lives until then, so its blobs are as good as new."""
    first = write(capture_of(model()), repository)
    clock.advance(100 * COLLECTION_GRACE_SECONDS)
    assert write(capture_of(model(), follows=first), repository).written_bytes == 0


def test_a_missing_blob_of_another_keys_generation_is_written(repository, store):
    """What a parent of another key names and the store no longer has is not relied on."""
    first = write(capture_of(model()), repository)
    gone = first.manifest.chunks[1]
    store.delete(blob_key(gone.blob))
    second = write(capture_of(model(), follows=first, key=OTHER_KEY, generation=1), repository)
    assert second.written_bytes == gone.stored_bytes
    assert_same(restored(second.manifest, store), model())


def test_a_capture_that_mends_replaces_damaged_blobs(repository, store):
    """Where the store's bytes were found damaged, every blob is sent again and the new generation is whole."""
    first = write(capture_of(model()), repository)
    key = blob_key(first.manifest.chunks[0].blob)
    data = bytearray(store.get(key).data)
    data[7] ^= 1
    store.put(key, data)
    second = write(capture_of(model(), follows=first, mends=True), repository)
    assert second.reused_bytes == 0
    assert_same(restored(second.manifest, store), model())


# --- a capture that breaks off ---------------------------------------------------------------------------------------


class Stop(Exception):
    """What ends a capture in a test."""


def stop():
    """End the capture."""
    raise Stop


@pytest.mark.parametrize("codec", ["raw", "zstd", "planes+zstd"])
def test_an_interrupted_capture_goes_on_where_it_ended(repository, store, codec):
    """What an interrupted capture wrote is not sent again, and nothing but blobs is left of it."""
    state = {"w": np.arange(12 * MIB // 8)}
    with pytest.raises(Stop):
        write(capture_of(state), repository, codec=codec, pace=AtPace(2, stop))
    assert len(blobs_of(store)) == 2
    assert list(store.list("manifests/")) == []
    again = write(capture_of(state), repository, codec=codec)
    assert store.count("put", "blobs/*") == len(again.manifest.chunks)
    assert again.written_bytes + again.reused_bytes == sum(chunk.stored_bytes for chunk in again.manifest.chunks)
    assert_same(restored(again.manifest, store), state)


@pytest.mark.parametrize("put", range(4))
def test_a_store_that_fails_leaves_no_manifest(repository, store, put):
    """Whichever write fails, no manifest names a blob that is not there."""
    state = {"w": np.arange(12 * MIB // 8)}
    store.inject(Fault("transient_before", "put", skip=put))
    with pytest.raises(StoreTransientError):
        write(capture_of(state), repository)
    assert list(store.list("manifests/")) == []
    assert_same(restored(write(capture_of(state), repository).manifest, store), state)


def test_pace_is_called_before_every_chunk(repository):
    """A capture gives way before each chunk it copies, and before each that it looks at again."""
    pace = AtPace(-1, stop)
    written = write(capture_of({"w": np.arange(12 * MIB // 8)}), repository, pace=pace)
    assert pace.calls == 2 * len(written.manifest.chunks)


# --- bytes that change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", range(6))
def test_weights_written_at_any_moment_are_never_torn(repository, store, call):
    """A write to two chunks at once drops the generation, or the generation has it in both, or in neither."""
    state = {"w": np.zeros(12 * MIB, np.uint8)}
    pace = AtPace(call, lambda: state["w"].__setitem__([0, -1], 1))
    try:
        written = write(capture_of(state), repository, pace=pace)
    except StateChangedError:
        assert call > 0, "before anything is copied a write is no tear"
        assert list(store.list("manifests/")) == []
    else:
        found = restored(written.manifest, store)["w"]
        assert found[0] == found[-1] == (call == 0)


def test_weights_written_after_their_copy_drop_the_generation(repository, store):
    """A write to a chunk that has been copied is noticed before the manifest is written."""
    state = {"w": np.zeros(12 * MIB, np.uint8)}
    with pytest.raises(StateChangedError, match="changed while they were copied"):
        write(capture_of(state), repository, pace=AtPace(1, lambda: state["w"].__setitem__(0, 1)))
    assert list(store.list("manifests/")) == []


@pytest.mark.parametrize("codec", ["raw", "zstd", "planes+zstd"])
def test_weights_written_while_a_blob_is_sent_do_not_reach_it(clock, codec):
    """Bytes that change under a put under way cannot make a blob that is not what its name says."""
    state = {"w": np.zeros(MIB, np.uint8)}

    class Writing(FaultyStore):
        def put(self, key, data, **conditions):
            if key.startswith("blobs/"):
                state["w"][:] = 7
            return super().put(key, data, **conditions)

    store = Writing(MemoryStore(clock=clock.time))
    with pytest.raises(StateChangedError):
        write(capture_of(state), Repository(store, clock=clock.time), codec=codec)
    assert all(hash_of(data) == name for name, data in blobs_of(store).items())


def test_a_torn_copy_is_noticed(repository, monkeypatch):
    """Bytes that change between the hash of a chunk and its copy drop the generation at once."""
    from coldstart.save import here

    state = {"w": np.zeros(MIB, np.uint8)}
    hash_as_ever = here.hash_of
    monkeypatch.setattr(here, "hash_of", lambda data: (hash_as_ever(data), state["w"].__iadd__(1))[0])
    with pytest.raises(StateChangedError):
        write(capture_of(state, kinds={'["w"]': "other"}), repository)


def test_buffers_that_are_declared_to_change_may(repository, store):
    """A counter that events write to does not hold up the capture: the generation has it as it was at one moment."""
    state = {"counter": np.zeros(4, np.int64), "w": np.zeros(9 * MIB, np.uint8)}
    written = write(
        capture_of(state, kinds={'["counter"]': "other"}), repository, pace=lambda: state["counter"].__iadd__(1)
    )
    found = restored(written.manifest, store)
    assert len(set(found["counter"].tolist())) == 1
    assert found["counter"][0] > 0
    assert found["w"].tobytes() == state["w"].tobytes()


# --- files that change -----------------------------------------------------------------------------------------------


def test_a_file_that_is_gone_before_the_capture(repository, store, tmp_path):
    """A file that should be stored and is not there is named, and nothing is written."""
    with pytest.raises(CaptureError, match=r"gone\.bin"):
        write(capture_of(files=sources({"gone.bin": tmp_path / "gone.bin"})), repository)
    assert store.count("put") == 0


@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("change", ["vanish", "shrink", "grow", "rewrite"])
def test_a_file_that_changes_during_the_capture(repository, store, tmp_path, change, call):
    """A file that goes, gets shorter, longer or other while it is copied ends the capture; before, it is as it is then."""
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(9 * MIB))

    def act() -> None:
        if change == "vanish":
            path.unlink()
        elif change == "shrink":
            os.truncate(path, 5 * MIB)
        elif change == "grow":
            os.truncate(path, 10 * MIB)
        else:
            path.write_bytes(b"x" * 9 * MIB)

    pace = AtPace(call, act)
    if change == "rewrite" and call == 0:
        written = write(capture_of(files=sources({"data.bin": path})), repository, pace=pace)
        assert file_bytes(written.manifest, store) == {"kept/data.bin": b"x" * 9 * MIB}
        return
    with pytest.raises(CaptureError) as raised:
        write(capture_of(files=sources({"data.bin": path})), repository, pace=pace)
    assert pace.calls <= 6
    assert isinstance(raised.value, StateChangedError) == (change != "vanish")
    assert list(store.list("manifests/")) == []
