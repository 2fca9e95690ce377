"""Capturing: what is written restores bit for bit, and says how it is stored."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from coldstart.capture_sources import kind_of
from coldstart.codecs import NAMES
from coldstart.errors import ConfigError, ManifestError
from coldstart.manifest import NO_BUFFER, manifest_from_json
from coldstart.repository import Repository
from coldstart.stores.memory import MemoryStore
from coldstart.testing import FakeClock, FaultyStore
from tests.generations import (
    KEY,
    NOTHING,
    assert_same,
    blobs_of,
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
@given(
    state=st.dictionaries(st.text(max_size=5), states, max_size=4),
    codec=st.sampled_from(["raw", "zstd", "planes+zstd", "auto"]),
)
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
