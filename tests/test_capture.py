"""Capturing: what is written restores bit for bit, what did not change is not written, and nothing torn is published."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from coldstart.capture import kind_of
from coldstart.codecs import NAMES
from coldstart.errors import CaptureError, ConfigError, ManifestError, StateChangedError, StoreTransientError
from coldstart.manifest import NO_BUFFER, blob_key, manifest_from_json
from coldstart.repository import COLLECTION_GRACE_SECONDS, Repository
from coldstart.stores.memory import MemoryStore
from coldstart.testing import FakeClock, Fault, FaultyStore
from tests.generations import (
    KEY,
    NOTHING,
    OTHER_KEY,
    capture_of,
    fetched,
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


def blobs_of(store) -> dict[str, bytes]:
    """Every blob in the store: hash -> bytes."""
    return {info.key.rpartition("/")[2]: store.get(info.key).data for info in store.list("blobs/")}


def assert_same(found, expected, path="state") -> None:
    """Two states are equal in structure, types, dtypes, shapes and bytes."""
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{path}[{index}]")
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        assert found.tobytes() == expected.tobytes(), path
    else:
        assert repr(found) == repr(expected), path


class AtPace:
    """A ``pace`` that acts at its n-th call, from 0, and counts."""

    def __init__(self, call: int, action) -> None:
        self.calls = 0
        self._call = call
        self._action = action

    def __call__(self) -> None:
        if self.calls == self._call:
            self._action()
        self.calls += 1


# --- what comes back -------------------------------------------------------------------------------------------------


arrays_of_any_kind = numpy_strategies.arrays(
    dtype=st.sampled_from(["<f4", "<f8", "<f2", "<i8", "<i4", "|u1", "|i1", "|b1", "<c8", "<U3", "|S5", ">f4"]),
    shape=numpy_strategies.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12),
)
states = st.recursive(
    st.one_of(arrays_of_any_kind, st.integers(-9, 9), st.text(max_size=5), st.none(), st.booleans()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=5), inner, max_size=4),
        st.tuples(inner, inner),
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=80)
@given(state=st.dictionaries(st.text(max_size=5), states, max_size=4), codec=st.sampled_from(["raw", "zstd", "auto"]))
def test_any_tree_of_arrays_comes_back_bit_for_bit(state, codec):
    """Written, fetched, verified and rebuilt, a state is what it was, and its manifest passes the strict reader."""
    store = MemoryStore()
    repository = Repository(store)
    written = write(capture_of(state), repository, codec=codec)
    assert repository.manifest(written.manifest_key, name="model") == written.manifest
    assert_same(restored(written.manifest, store), state)


def test_large_and_small_arrays_come_back(repository, store):
    """Arrays over many chunks, arrays that share one, views of one memory and files come back together."""
    big = np.arange(9 * MIB // 4, dtype=np.float32)
    state = {
        "big": big,
        "head": big[:10],
        "every second": big[::2],
        "norms": [np.full(7, n, np.float64) for n in range(50)],
    }
    written = write(capture_of(state), repository, codec="auto")
    assert len(written.manifest.chunks) >= 3
    found = restored(written.manifest, store)
    assert_same(found, state)
    found["big"][0] = -1.0
    assert found["head"][0] == -1.0, "views of one memory are views of one memory again"
    assert found["every second"][0] == -1.0


def test_a_torch_state_comes_back_bit_for_bit(repository, store):
    """A module with tied, half-precision, strided and empty tensors is bound as it was, down to its training mode."""
    torch = pytest.importorskip("torch")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(300, 64)
            self.head = torch.nn.Linear(64, 300, bias=False)
            self.head.weight = self.embed.weight
            self.norm = torch.nn.BatchNorm1d(64)
            self.small = torch.nn.Parameter(torch.randn(33, dtype=torch.bfloat16), requires_grad=False)
            self.image = torch.nn.Parameter(torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last))
            self.register_buffer("nothing", torch.empty(0, 4))
            self.register_buffer("scalar", torch.tensor(7))

    model, skeleton = Model().eval(), Model()
    skeleton.head.weight = skeleton.embed.weight
    written = write(capture_of(model), repository, codec="zstd")
    found = restored(written.manifest, store, skeleton)
    assert found is skeleton
    assert found.head.weight is found.embed.weight
    assert not found.training
    assert not found.small.requires_grad
    assert found.image.is_contiguous(memory_format=torch.channels_last)
    for name, tensor in model.state_dict().items():
        other = found.state_dict()[name]
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (other.dtype, other.shape, other.stride()), name
        as_bytes = [item.detach().contiguous().reshape(-1).view(torch.uint8).numpy() for item in (tensor, other)]
        assert as_bytes[0].tobytes() == as_bytes[1].tobytes(), name


def test_files_come_back_with_their_modes(repository, store, tmp_path):
    """Files of every size, the empty one and a link among them, come back byte for byte, executable if they were."""
    (tmp_path / "empty").touch()
    (tmp_path / "small.json").write_bytes(b'{"a": 1}')
    (tmp_path / "large.bin").write_bytes(os.urandom(5 * MIB + 3))
    (tmp_path / "run.sh").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "run.sh").chmod(0o755)
    (tmp_path / "link").symlink_to("small.json")
    names = ["empty", "small.json", "large.bin", "run.sh", "link"]
    files = sources({f"folder/{name}": tmp_path / name for name in names})
    written = write(capture_of(files=files), repository)
    expected = {f"kept/folder/{name}": (tmp_path / name).read_bytes() for name in names}
    assert file_bytes(written.manifest, store) == expected
    modes = {entry.name: entry.mode for entry in written.manifest.files}
    assert modes["folder/run.sh"] == 0o755
    assert modes["folder/small.json"] == 0o644
    assert written.manifest.rung == "files"


def test_files_and_arrays_lie_together(repository, store, tmp_path):
    """A snapshot of arrays carries files too, and both come back."""
    (tmp_path / "tokenizer.json").write_bytes(b"tokens")
    state = {"w": np.arange(1000)}
    written = write(capture_of(state, files=sources({"tokenizer.json": tmp_path / "tokenizer.json"})), repository)
    assert_same(restored(written.manifest, store), state)
    assert file_bytes(written.manifest, store) == {"kept/tokenizer.json": b"tokens"}
    assert written.manifest.rung == "arrays"


@pytest.mark.parametrize("state", [NOTHING, {}, {"a": np.empty((0, 3)), "b": np.empty(0, np.int8)}])
def test_a_snapshot_without_bytes_is_one_too(repository, store, state):
    """No arrays, only empty ones, or no files at all: the generation is written and comes back."""
    written = write(capture_of(state), repository)
    assert (written.manifest.chunks, written.written_bytes) == ((), 0)
    assert all(leaf.buffer == NO_BUFFER for leaf in written.manifest.leaves)
    if state is not NOTHING:
        assert_same(restored(written.manifest, store), state)


def test_only_empty_files(repository, store, tmp_path):
    """Files without bytes are entries without chunks."""
    for name in "ab":
        (tmp_path / name).touch()
    written = write(capture_of(files=sources({name: tmp_path / name for name in "ab"})), repository)
    assert written.manifest.chunks == ()
    assert file_bytes(written.manifest, store) == {"kept/a": b"", "kept/b": b""}


def test_ten_thousand_small_arrays(repository, store):
    """A state of many small arrays takes few chunks, and comes back."""
    state = {f"layer{number}.bias": np.full(number % 40, number, np.float32) for number in range(10_000)}
    written = write(capture_of(state), repository)
    assert len(written.manifest.leaves) == 10_000
    assert len(written.manifest.chunks) <= 4
    assert_same(restored(written.manifest, store), state)


def test_the_manifest_says_what_was_captured(repository):
    """Name, number, key, parent, digests and provenance are those of the capture, and the reader takes what was stored."""
    first = write(capture_of({"w": np.arange(9)}), repository)
    second = write(capture_of({"w": np.arange(9)}, follows=first), repository)
    manifest = second.manifest
    assert (manifest.name, manifest.generation, manifest.key) == ("model", 2, KEY)
    assert (manifest.parent, manifest.device_type) == (first.manifest_key, "cpu")
    assert manifest.warmup_digests == ("d" * 32,)
    assert manifest.provenance == {"numpy": "2"}
    assert [buffer.name for buffer in manifest.buffers] == [leaf.path for leaf in manifest.leaves] == ['["w"]']
    assert manifest_from_json(repository.store.get(second.manifest_key).data) == manifest
    assert manifest.raw_bytes == 256


def test_nothing_becomes_current_by_being_written(repository, store):
    """Writing a generation moves no ref: the proof comes first."""
    write(capture_of({"w": np.arange(9)}), repository)
    assert list(store.list("refs/")) == []


# --- how it is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "content", "expected"),
    [
        ("raw", "zeros", "raw"),
        ("zstd", "zeros", "zstd"),
        ("auto", "zeros", "zstd"),
        ("auto", "random", "raw"),
        ("zstd", "random", "raw"),
    ],
)
def test_the_codec_is_the_settings_where_it_helps(repository, store, setting, content, expected):
    """A codec is used as it is set, `auto` tries, and a chunk that would not get smaller is stored as it is."""
    data = np.zeros(MIB, np.uint8) if content == "zeros" else np.frombuffer(os.urandom(MIB), np.uint8)
    written = write(capture_of({"w": data}), repository, codec=setting)
    assert [chunk.codec for chunk in written.manifest.chunks] == [expected]
    assert written.written_bytes == sum(chunk.stored_bytes for chunk in written.manifest.chunks)
    assert_same(restored(written.manifest, store), {"w": data})


def test_the_codec_is_chosen_per_segment(repository):
    """Arrays of other item sizes lie in other segments, each stored as suits its own bytes."""
    state = {"zeros": np.zeros(MIB // 8), "noise": np.frombuffer(os.urandom(MIB), np.uint8)}
    written = write(capture_of(state), repository, codec="auto")
    codecs = {written.manifest.segments[chunk.segment].item_bytes: chunk.codec for chunk in written.manifest.chunks}
    assert codecs == {8: "zstd", 1: "raw"}


def test_an_unknown_codec_is_refused(repository, store):
    """A codec that there is not is the user's mistake, told before anything is written."""
    with pytest.raises(ConfigError, match="lz4"):
        write(capture_of({"w": np.arange(9)}), repository, codec="lz4")
    assert store.count("put") == 0


@pytest.mark.parametrize("codec", NAMES)
def test_every_blob_is_named_by_its_bytes(repository, store, codec):
    """Whatever the codec, a blob's name is the hash of what is stored, and every blob is named by a chunk."""
    write_of = write(capture_of({"w": np.arange(3 * MIB // 8), "v": np.zeros(9)}), repository, codec=codec)
    blobs = blobs_of(store)
    assert set(blobs) == {chunk.blob for chunk in write_of.manifest.chunks}
    assert all(hash_of(data) == name for name, data in blobs.items())


def test_kinds_are_those_declared(repository):
    """Declared kinds lie in segments of their own, by the nearest declared place above an array."""
    state = {"cache": [np.zeros(4), np.zeros(4)], "weights": np.zeros(4), "cached": np.zeros(4)}
    kinds = {'["cache"]': "kv_cache", '["cache"][1]': "activations"}
    written = write(capture_of(state, kinds=kinds), repository)
    found = {buffer.name: buffer.kind for buffer in written.manifest.buffers}
    expected = {'["cache"][0]': "kv_cache", '["cache"][1]': "activations"}
    assert found == {**expected, '["weights"]': "weights", '["cached"]': "weights"}
    for buffer in written.manifest.buffers:
        assert written.manifest.segments[buffer.segment].kind == buffer.kind


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("layers.1.bias", "other"),
        ("layers.1[0]", "other"),
        ("layers.1", "other"),
        ("layers.10.bias", "weights"),
        ("layers.2.cache", "kv_cache"),
        ("layers.2.cache_norm", "weights"),
        ('["dotted.name"].x', "gradients"),
        ("blocks.7", "activations"),
        ("layers", "weights"),
        ("", "weights"),
    ],
)
def test_a_kind_holds_for_a_place_and_all_below(path, expected):
    """A declared prefix means a place of the state and what is in it, never a neighbour whose name begins alike."""
    kinds = {
        "layers.1": "other",
        "layers.2.cache": "kv_cache",
        '["dotted.name"]': "gradients",
        "blocks.": "activations",
    }
    assert kind_of(path, kinds) == expected


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


@pytest.mark.parametrize(("age_seconds", "is_sent_again"), [(3600, False), (COLLECTION_GRACE_SECONDS / 2, True)])
def test_blobs_of_another_keys_generation_are_relied_on_while_young(
    repository, store, clock, age_seconds, is_sent_again
):
    """A parent that is not replaced may be collected before this generation is published, so its old blobs are sent again."""
    first = write(capture_of(model()), repository)
    clock.advance(age_seconds)
    second = write(capture_of(model(), follows=first, key=OTHER_KEY, generation=1), repository)
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


@pytest.mark.parametrize("codec", ["raw", "zstd"])
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


@pytest.mark.parametrize("codec", ["raw", "zstd"])
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
    from coldstart import capture

    state = {"w": np.zeros(MIB, np.uint8)}
    hash_as_ever = capture._hash
    monkeypatch.setattr(capture, "_hash", lambda data: (hash_as_ever(data), state["w"].__iadd__(1))[0])
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


# --- what the format has no room for ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../up", "/absolute", "a//b", "line\nbreak", "back\\slash", "", "x" * 300])
def test_a_file_name_that_no_reader_takes_is_refused(repository, store, tmp_path, name):
    """A name that could not be created safely elsewhere never gets into a manifest."""
    (tmp_path / "file").write_bytes(b"data")
    with pytest.raises(ManifestError):
        write(capture_of(files=sources({name: tmp_path / "file"})), repository)
    assert list(store.list("manifests/")) == []


def test_two_files_of_one_name_are_refused(repository, tmp_path):
    """Two files that would be placed at one path cannot both be restored."""
    (tmp_path / "file").write_bytes(b"data")
    files = sources({"same": tmp_path / "file"}) * 2
    with pytest.raises(ManifestError, match="same name"):
        write(capture_of(files=files), repository)


def test_padding_is_zeros_and_belongs_to_no_array(repository, store):
    """Between arrays a segment holds zeros, so that the same arrays give the same chunks wherever they come from."""
    state = {"a": np.full(3, 255, np.uint8), "b": np.full(300, 255, np.uint8)}
    written = write(capture_of(state), repository)
    segment = bytes(fetched(written.manifest, store).writable(0))
    assert segment == b"\xff" * 3 + bytes(253) + b"\xff" * 300 + bytes(212)
