"""Format version 1: its golden bytes, and that its reader survives whatever a store may hold.

``test_manifest_oracle.py`` compares the reader with a second description of the format.
"""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart import manifest as format_
from coldstart.errors import FormatVersionError, ManifestError
from coldstart.manifest import (
    MAX_REF_BYTES,
    MAX_SEGMENTS,
    MAX_TEXT,
    NO_BUFFER,
    Buffer,
    Chunk,
    FileEntry,
    Form,
    KeyRecord,
    Leaf,
    Manifest,
    Pool,
    PoolArray,
    Published,
    Ref,
    Segment,
    Tombstone,
    blob_key,
    check_file_name,
    check_name,
    leaf_extent_bytes,
    manifest_from_json,
    manifest_key,
    manifest_to_json,
    newest_ref_key,
    ref_from_json,
    ref_key,
    ref_to_json,
    tombstone_from_json,
    tombstone_to_json,
)
from coldstart.signing import Seals
from coldstart.stores.base import check_key

GOLDEN = Path(__file__).parent / "golden"
KEY = KeyRecord("00112233445566778899aabbccddeeff", {"code": "5d41402a", "env:MODEL": "7d793037"})

MANIFEST = Manifest(
    name="minilm",
    generation=7,
    parent="manifests/minilm/000006-00aa11bb22cc33dd",
    created_seconds=1790000000.125,
    rung="arrays",
    device_type="cpu",
    key=KEY,
    segments=(
        Segment(2, "weights", "eager", 1536),
        Segment(4, "weights", "both", 0),
        Segment(4, "kv_cache", "program", 512),
        Segment(1, "other", "files", 768),
    ),
    buffers=(
        Buffer("embed.weight", "weights", 0, 0, 1000),
        Buffer("Schlüssel.weight", "weights", 0, 1024, 512),
        Buffer("nothing", "weights", 1, 0, 0),
        Buffer("cache", "kv_cache", 2, 0, 512),
    ),
    leaves=(
        Leaf("model.embed.weight", "torch", "parameter", "bfloat16", 2, (20, 25), (25, 1), 0, 0, True, ""),
        Leaf(
            "model.head.weight",
            "torch",
            "parameter",
            "bfloat16",
            2,
            (20, 25),
            (25, 1),
            0,
            0,
            True,
            "model.embed.weight",
        ),
        Leaf("model.column", "torch", "tensor", "bfloat16", 2, (20,), (25,), 0, 48, False, ""),
        Leaf("model.Schlüssel", "torch", "buffer", "float32", 4, (1, 3, 4, 4), (48, 1, 12, 3), 1, 0, False, ""),
        Leaf("model.expanded", "torch", "tensor", "float32", 4, (1000, 4), (0, 1), 1, 496, False, ""),
        Leaf("model.empty", "torch", "buffer", "float32", 4, (0, 16), (16, 1), NO_BUFFER, 0, False, ""),
        Leaf("step", "numpy", "array", "int64", 8, (), (), 3, 8, False, ""),
    ),
    files=(
        FileEntry("KEPT", "tokenizer.json", 0o644, 3, 0, 300),
        FileEntry("HF_HOME", "hub/models--é/blobs/0", 0o600, 3, 512, 200),
        FileEntry("HF_HOME", "hub/run.sh", 0o755, 3, 512, 0),
    ),
    chunks=(
        Chunk(0, 0, 1024, "a" * 64, "raw", {}, "b" * 64, 1024),
        Chunk(0, 1024, 512, "c" * 64, "zstd", {}, "d" * 64, 400),
        Chunk(2, 0, 512, "e" * 64, "planes+zstd", {"planes": 2, "raw": "lo"}, "f" * 64, 300),
        Chunk(3, 0, 768, "0" * 64, "zstd", {}, "1" * 64, 128),
    ),
    pools=(Pool("kv", "kv_cache", 1 << 33),),
    tree={"kind": "dict", "items": [["a", {"leaf": "model.embed.weight"}], ["b", 1.5]]},
    modules={"model": False, "model.dropout": True},
    programs=({"kind": "onnx", "entry": "model.forward"},),
    platform={"cpu": "avx512"},
    provenance={"coldstart": "0.1.0", "torch": "2.13.0"},
    warmup_digests=("9f86d081", "60303ae2"),
    requires=(),
    signature="",
    extra={"extra": {"a": [1]}, "note": "of a newer minor version"},
)

POOL_ARRAY = PoolArray("kv", "torch", "bfloat16", (2, 1 << 31), ("cache", "layers[0].keys"))

REF = Ref(
    name="minilm",
    key=KEY,
    generation=7,
    manifest="manifests/minilm/000007-ffeeddccbbaa9988",
    write_id="0123456789abcdef",
    updated_seconds=1790000001.5,
    previous_generation=6,
    previous_manifest="manifests/minilm/000006-00aa11bb22cc33dd",
)


EMPTY = MANIFEST._replace(
    parent="", segments=(), buffers=(), leaves=(), files=(), chunks=(), pools=(), tree=None, programs=(), extra={}
)
CHUNK = MANIFEST.chunks[0]


def spoil(document: dict, path: str, value) -> bytes:
    """The document with the value at a dotted path replaced, as bytes; the very last part may be a new key."""
    document = copy.deepcopy(document)
    *parents, last = path.split(".")
    holder = document
    for part in parents:
        holder = holder[int(part) if isinstance(holder, list) else part]
    holder[int(last) if isinstance(holder, list) else last] = value
    return json.dumps(document).encode()


def spoil_both(document: dict, first: tuple, second: tuple) -> bytes:
    """The document with two values replaced."""
    return spoil(json.loads(spoil(document, *first)), *second)


def lose(document: dict, *columns: str, row: int) -> bytes:
    """The document without one row of the tables named."""
    document = copy.deepcopy(document)
    for table in columns:
        for column in document[table].values():
            del column[row]
    return json.dumps(document).encode()


def test_manifest_golden_bytes():
    """The bytes of version 1 never change, and read back as what was written."""
    golden = (GOLDEN / "manifest-v1.json").read_bytes()
    assert manifest_to_json(MANIFEST) == golden
    assert manifest_from_json(golden) == MANIFEST


def test_pool_arrays_golden_bytes():
    """A manifest with arrays of pools has these bytes, and one without has those of before there were any."""
    golden = (GOLDEN / "manifest-v1-pools.json").read_bytes()
    pooled = MANIFEST._replace(pool_arrays=(POOL_ARRAY,))
    assert manifest_to_json(pooled) == golden
    assert manifest_from_json(golden) == pooled
    assert set(json.loads(golden)) - set(json.loads(manifest_to_json(MANIFEST))) == {"pool_arrays"}


WITH_FORMS = MANIFEST._replace(
    device_type="cuda",
    requires=("forms",),
    host_segments=(3,),
    forms=(
        Form(0, "nvcomp-ans/6", {"block_bytes": 524288, "nvcomp": "6.0.0"}, "2" * 64, 700),
        Form(2, "nvcomp-ans/6", {"block_bytes": 524288, "nvcomp": "6.0.0"}, "3" * 64, 310),
    ),
)


def test_manifest_with_forms_golden_bytes():
    """A generation for a GPU, with chunks in a further form, is written and read as it was the first time."""
    golden = (GOLDEN / "manifest-v1-forms.json").read_bytes()
    assert manifest_to_json(WITH_FORMS) == golden
    assert manifest_from_json(golden) == WITH_FORMS


def test_blobs_are_those_of_chunks_and_of_forms():
    """What a generation names is told with lengths, both forms of a chunk; what a worker fetches is one of them."""
    assert WITH_FORMS.blobs == {**MANIFEST.blobs, "2" * 64: 700, "3" * 64: 310}
    assert MANIFEST.blobs == {chunk.blob: chunk.stored_bytes for chunk in MANIFEST.chunks}
    assert WITH_FORMS.stored_bytes == MANIFEST.stored_bytes


def test_ref_golden_bytes():
    """The bytes of a version 1 ref never change, and read back as what was written."""
    golden = (GOLDEN / "ref-v1.json").read_bytes()
    assert ref_to_json(REF) == golden
    assert ref_from_json(golden) == REF


def test_signed_ref_golden_bytes():
    """A ref with a signature is one field longer, has bytes that never change, and keeps a good signature.

    RFC 8032, test 1: the key is public, and ed25519 signs the same bytes the same way for ever.
    """
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    seals = Seals(signing_key="csk_" + base64.urlsafe_b64encode(secret).rstrip(b"=").decode())
    golden = (GOLDEN / "ref-v1-signed.json").read_bytes()
    assert ref_to_json(seals.signed_ref(REF)) == golden
    assert ref_from_json(golden)._replace(signature="") == REF
    assert seals.check(ref_from_json(golden), golden, ref_key(REF.name, REF.key.digest)).is_good


def test_columns_are_the_fields_of_their_rows():
    """Tables are stored in the order of the fields that they are read into."""
    for table in format_._TABLES.values():
        assert tuple(table.checks) == table.row._fields


def test_an_empty_manifest():
    """A snapshot of nothing is a legal one."""
    assert manifest_from_json(manifest_to_json(EMPTY)) == EMPTY


def test_unknown_fields_are_kept():
    """A field of a newer minor version is written back as it was, and never replaces one that we know."""
    again = manifest_from_json(manifest_to_json(MANIFEST))
    assert again.extra == MANIFEST.extra
    assert manifest_to_json(again) == manifest_to_json(MANIFEST)
    assert json.loads(manifest_to_json(MANIFEST._replace(extra={"name": "other"})))["name"] == "minilm"


def test_sums_count_a_blob_once():
    """Raw bytes are all segments; a blob that two chunks name is fetched, and counted, once."""
    assert MANIFEST.raw_bytes == 1536 + 512 + 768
    twice = MANIFEST._replace(chunks=(*MANIFEST.chunks, MANIFEST.chunks[-1]))
    assert twice.stored_bytes == MANIFEST.stored_bytes == 1024 + 400 + 300 + 128


@pytest.mark.parametrize(
    ("expected", "shape", "strides"),
    [(4, (), ()), (0, (0, 5), (5, 1)), (24, (2, 3), (3, 1)), (4, (9,), (0,)), (4 * 19, (4,), (6,))],
)
def test_leaf_extents(expected, shape, strides):
    """A leaf reaches from its first item to the end of its last one, whatever its strides."""
    leaf = MANIFEST.leaves[0]._replace(shape=shape, strides=strides, item_bytes=4)
    assert leaf_extent_bytes(leaf) == expected


def test_keys_of_objects_are_legal():
    """Every key that the format makes is one that a store takes."""
    name = "a" * 100 + "=" + "b" * 64
    keys = [ref_key(name, KEY.digest), newest_ref_key(name), manifest_key(name, 7, "ab12"), blob_key("c" * 64)]
    assert keys[2:] == [f"manifests/{name}/000007-ab12", "blobs/cc/" + "c" * 64]
    assert list(map(check_key, keys)) == keys


@pytest.mark.parametrize("name", ["minilm", "a", "Llama-3.1_8B", "x" * 100, "base=part", "0"])
def test_names_that_are_legal(name):
    """Letters, digits and three signs, with an optional part behind a '='."""
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".x", "..", "a/b", "a b", "x" * 101, "a=", "a=b=c", "é", "a\n", "-a", "a\0", None, 7, b"a"]
)
def test_names_that_are_not(name):
    """Whatever could leave its folder, or is no text at all, cannot name a snapshot."""
    with pytest.raises(ManifestError, match="cannot name a snapshot"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "a/b.c", "models--x/…", ".hidden", "...", "a b", "x" * 255, "é" * 127])
def test_file_names_that_are_legal(name):
    """Clean relative paths, in any script."""
    assert check_file_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "/", "/etc/passwd", "..", "a/..", "../a", "a/../../b", "a//b", "a/", "./a", "a/."),
        *("a\\b", "a\0b", "a\nb", "\x7f", "x" * 256, "é" * 128, "\ud800", "a/" * 2500 + "a"),
    ],
    ids=repr,
)
def test_file_names_that_are_not(name):
    """Nothing that leaves its folder, hides a character, or cannot be created."""
    with pytest.raises(ManifestError, match="illegal file name"):
        check_file_name(name)


DOCUMENT = json.loads(manifest_to_json(MANIFEST))
FORMS_DOCUMENT = json.loads(manifest_to_json(WITH_FORMS))
REFERENCE = json.loads(ref_to_json(REF))

HOSTILE_REFS = {
    "empty": b"",
    "not JSON": b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
    "not UTF-8": b"\xff\xfe{\0}\0",
    "UTF-16": json.dumps(REFERENCE).encode("utf-16"),
    "a list": b"[1]",
    "a number": b"7",
    "too large": b" " * MAX_REF_BYTES + json.dumps(REFERENCE).encode(),
    "cut off": ref_to_json(REF)[:-1],
    "something behind": ref_to_json(REF) + b"{}",
    "no version": json.dumps({key: value for key, value in REFERENCE.items() if key != "format"}).encode(),
    "version is text": spoil(REFERENCE, "format.major", "1"),
    "version is true": spoil(REFERENCE, "format.major", True),
    "minor version is missing": spoil(REFERENCE, "format", {"major": 1}),
    "older version": spoil(REFERENCE, "format.major", 0),
    "manifest of another snapshot": spoil(REFERENCE, "manifest", "manifests/other/000007-ffeeddccbbaa9988"),
    "manifest of another generation": spoil(REFERENCE, "manifest", "manifests/minilm/000008-ffeeddccbbaa9988"),
    "manifest elsewhere": spoil(REFERENCE, "manifest", "../bucket/manifests/minilm/000007-ff"),
    "manifest in another bucket": spoil(REFERENCE, "manifest", "s3://other/manifests/minilm/000007-ff"),
    "manifest is empty": spoil(REFERENCE, "manifest", ""),
    "name that climbs": spoil({**REFERENCE, "name": ".."}, "manifest", "manifests/../000007-ff"),
    "previous of another snapshot": spoil(REFERENCE, "previous_manifest", "manifests/other/000006-ff"),
    "same key twice": ref_to_json(REF).replace(b'{"format"', b'{"generation":9,"format"'),
    "same key twice, deeper": ref_to_json(REF).replace(b'"minor":0', b'"minor":0,"minor":0'),
    "NaN": ref_to_json(REF).replace(b":7,", b":NaN,"),
    "infinity": spoil(REFERENCE, "updated_seconds", 1e400).replace(b"Infinity", b"1e400"),
    "negative": spoil(REFERENCE, "generation", -1),
    "huge": spoil(REFERENCE, "generation", 1 << 63),
    "5,000 digits": ref_to_json(REF).replace(b":7,", b":" + b"7" * 5000 + b","),
    "a number for a text": spoil(REFERENCE, "write_id", 7),
    "long text": spoil(REFERENCE, "write_id", "x" * (MAX_TEXT + 1)),
    "half a surrogate pair": spoil(REFERENCE, "write_id", "\ud800"),
    "null": spoil(REFERENCE, "key", None),
    "digest is no digest": spoil(REFERENCE, "key.digest", "../../" + "0" * 26),
    "more than a key": spoil(REFERENCE, "key.more", 1),
    "history is no list": spoil(REFERENCE, "history", {"6": 1}),
    "history of texts": spoil(REFERENCE, "history", ["manifests/minilm/000006-aa"]),
    "history of short rows": spoil(REFERENCE, "history", [[6, "manifests/minilm/000006-aa"]]),
    "history of another snapshot": spoil(REFERENCE, "history", [[6, "manifests/other/000006-aa", 1.0]]),
    "history of another number": spoil(REFERENCE, "history", [[5, "manifests/minilm/000006-aa", 1.0]]),
    "history without a manifest": spoil(REFERENCE, "history", [[6, "", 1.0]]),
    "history that names the current one": spoil(REFERENCE, "history", [[7, "manifests/minilm/000007-aa", 1.0]]),
    "history out of order": spoil(
        REFERENCE, "history", [[5, "manifests/minilm/000005-aa", 1.0], [6, "manifests/minilm/000006-aa", 1.0]]
    ),
    "history with a time that is none": spoil(REFERENCE, "history", [[6, "manifests/minilm/000006-aa", -1.0]]),
    "long history": spoil(
        {**REFERENCE, "generation": 100, "manifest": "manifests/minilm/000100-aa"},
        "history",
        [[99 - index, f"manifests/minilm/{99 - index:06d}-aa", 1.0] for index in range(65)],
    ),
    "deep": b'{"a":' * 100_000,
    "deep list": b"[" * 60_000 + b"]" * 60_000,
}


@pytest.mark.parametrize("data", HOSTILE_REFS.values(), ids=HOSTILE_REFS.keys())
def test_hostile_refs_are_refused(data):
    """Each is a ManifestError: a worker that finds it starts cold."""
    with pytest.raises(ManifestError):
        ref_from_json(data)


def test_history_reads_back():
    """A ref says which generations before it are kept; one of before there was a history names the one before."""
    earlier = tuple(Published(number, f"manifests/minilm/{number:06d}-aa", 10.0 * number) for number in (6, 4, 3))
    ref = REF._replace(history=earlier)
    assert ref_from_json(ref_to_json(ref)) == ref
    assert ref.named == (Published(7, REF.manifest, REF.updated_seconds), *earlier)
    assert REF.named == (ref.named[0], Published(6, REF.previous_manifest, 0.0))


def test_tombstones_are_no_refs():
    """A tombstone reads back as what it is, no reader takes it for a ref, and a ref is none."""
    history = (Published(7, REF.manifest, 1.0), Published(6, REF.previous_manifest, 0.0))
    tombstone = Tombstone("minilm", KEY, 7, "0123", 5.0, history)
    data = tombstone_to_json(tombstone)
    assert tombstone_from_json(data) == tombstone
    assert tombstone_from_json(ref_to_json(REF)) is None
    with pytest.raises(ManifestError):
        ref_from_json(data)
    for path, value in (("generation", -1), ("name", ".."), ("key.digest", "x"), ("history", [[8, REF.manifest, 1.0]])):
        with pytest.raises(ManifestError):
            tombstone_from_json(spoil(json.loads(data), path, value))


def test_first_ref_has_no_previous_manifest():
    """The first generation's ref names nothing before it."""
    first = REF._replace(previous_generation=0, previous_manifest="")
    assert ref_from_json(ref_to_json(first)) == first


@pytest.mark.parametrize("read", [manifest_from_json, ref_from_json])
def test_newer_versions_are_named_as_such(read):
    """A newer major version is told apart from damage, before anything else is looked at."""
    with pytest.raises(FormatVersionError, match="upgrade"):
        read(b'{"format": {"major": 2, "minor": 0}, "whatever": []}')


def test_unknown_requirements_are_refused():
    """A manifest that needs what this reader does not know must not be used, though its version is known."""
    with pytest.raises(FormatVersionError, match="'sparse'"):
        manifest_from_json(spoil(DOCUMENT, "requires", ["sparse"]))


POOLED = json.loads(manifest_to_json(MANIFEST._replace(pool_arrays=(POOL_ARRAY,))))

HOSTILE_MANIFESTS = {
    "cut off": manifest_to_json(MANIFEST)[:-100],
    "a ref": ref_to_json(REF),
    "negative length": spoil(DOCUMENT, "segments.length_bytes.0", -1536),
    "length of 2^63": spoil(DOCUMENT, "segments.length_bytes.0", 1 << 63),
    "lengths that sum up": spoil(DOCUMENT, "segments.length_bytes", [1 << 41, 1 << 41, 1 << 41, 1]),
    "length as a float": spoil(DOCUMENT, "segments.length_bytes.0", 1536.0),
    "true for a number": spoil(DOCUMENT, "segments.item_bytes.3", True),
    "items of no bytes": spoil(DOCUMENT, "segments.item_bytes.0", 0),
    "segment of an unknown kind": spoil(DOCUMENT, "segments.kind.0", "executable"),
    "too many segments": manifest_to_json(EMPTY._replace(segments=(Segment(1, "other", "", 0),) * (MAX_SEGMENTS + 1))),
    "columns of unequal length": spoil(DOCUMENT, "buffers.name", ["a"]),
    "a column missing": json.dumps({**DOCUMENT, "pools": {"name": [], "kind": []}}).encode(),
    "a column too many": spoil(DOCUMENT, "pools.colour", ["red"]),
    "a column that is no list": spoil(DOCUMENT, "pools.name", {"0": "kv"}),
    "rows for columns": spoil(DOCUMENT, "pools", [{"name": "kv", "kind": "kv_cache", "length_bytes": 1}]),
    "array of no pool": spoil(POOLED, "pool_arrays.name.0", "absent"),
    "array of a pool twice": manifest_to_json(MANIFEST._replace(pool_arrays=(POOL_ARRAY, POOL_ARRAY))),
    "pool array larger than its pool": spoil(POOLED, "pool_arrays.shape.0", [1 << 34]),
    "pool array of few items": spoil(POOLED, "pool_arrays.shape.0", [8]),
    "pool array of no items": spoil(POOLED, "pool_arrays.shape.0", [0]),
    "pool array where a leaf is": spoil(POOLED, "pool_arrays.paths.0", ["model.embed.weight"]),
    "pool array with one path twice": spoil(POOLED, "pool_arrays.paths.0", ["a", "a"]),
    "paths that are no list": spoil(POOLED, "pool_arrays.paths.0", "cache"),
    "pool arrays that are a list": spoil(POOLED, "pool_arrays", []),
    "chunks with a hole": lose(DOCUMENT, "chunks", row=0),
    "chunks that stop early": lose(DOCUMENT, "chunks", row=3),
    "chunks that overlap": spoil(DOCUMENT, "chunks.offset_bytes.1", 1023),
    "chunk past the end": spoil(DOCUMENT, "chunks.length_bytes.1", 513),
    "chunk of another segment": spoil(DOCUMENT, "chunks.segment.1", 2),
    "chunk of no segment": spoil(DOCUMENT, "chunks.segment.3", 9),
    "chunk listed twice": spoil(
        DOCUMENT, "chunks", {key: column + column[-1:] for key, column in DOCUMENT["chunks"].items()}
    ),
    "chunk behind the last segment": manifest_to_json(EMPTY._replace(chunks=(CHUNK,))),
    "chunk without bytes": manifest_to_json(
        MANIFEST._replace(chunks=(CHUNK._replace(length_bytes=0), *MANIFEST.chunks))
    ),
    "chunk of more than 64 MiB": manifest_to_json(
        EMPTY._replace(
            segments=(Segment(1, "other", "", 65 << 20),),
            chunks=(CHUNK._replace(length_bytes=65 << 20),),
        )
    ),
    "chunk stored in nothing": spoil(DOCUMENT, "chunks.stored_bytes.1", 0),
    "chunk stored in a tebibyte": spoil(DOCUMENT, "chunks.stored_bytes.1", 1 << 40),
    "blob of two lengths": spoil(DOCUMENT, "chunks.blob.1", "b" * 64),
    "forms that are not required": spoil(FORMS_DOCUMENT, "requires", []),
    "forms that are a list": spoil(FORMS_DOCUMENT, "forms", []),
    "form of no chunk": spoil(FORMS_DOCUMENT, "forms.chunk.1", 4),
    "two forms of a chunk": spoil(FORMS_DOCUMENT, "forms.chunk.1", 0),
    "forms out of order": spoil(FORMS_DOCUMENT, "forms.chunk", [2, 0]),
    "form stored in nothing": spoil(FORMS_DOCUMENT, "forms.stored_bytes.0", 0),
    "form stored in a tebibyte": spoil(FORMS_DOCUMENT, "forms.stored_bytes.0", 1 << 40),
    "form's blob that is a chunk's of another length": spoil(FORMS_DOCUMENT, "forms.blob.0", "b" * 64),
    "form's blob that climbs": spoil(FORMS_DOCUMENT, "forms.blob.0", "../../" + "d" * 58),
    "form with a column too many": spoil(FORMS_DOCUMENT, "forms.colour", ["red", "red"]),
    "blob that climbs": spoil(DOCUMENT, "chunks.blob.1", "../../" + "d" * 58),
    "blob in capitals": spoil(DOCUMENT, "chunks.blob.1", "D" * 64),
    "hash with a line end": spoil(DOCUMENT, "chunks.raw_hash.1", "c" * 64 + "\n"),
    "parameters that are a list": spoil(DOCUMENT, "chunks.parameters.0", []),
    "too many parameters": spoil(DOCUMENT, "chunks.parameters.0", {str(number): number for number in range(65)}),
    "parameters with a float": spoil(DOCUMENT, "chunks.parameters.0", {"level": 1.5}),
    "parameters with a huge number": spoil(DOCUMENT, "chunks.parameters.0", {"level": 1 << 53}),
    "buffers of one name": spoil(DOCUMENT, "buffers.name.1", "embed.weight"),
    "buffer of an unknown kind": spoil(DOCUMENT, "buffers.kind.0", "code"),
    "buffer past its segment": spoil(DOCUMENT, "buffers.length_bytes.1", 513),
    "buffer of no segment": spoil(DOCUMENT, "buffers.segment.1", 4),
    "buffer on an odd byte": spoil(DOCUMENT, "buffers.offset_bytes.1", 1000),
    "buffers that overlap": spoil(DOCUMENT, "buffers.length_bytes.0", 1025),
    "buffer over a file": spoil(DOCUMENT, "buffers.segment.3", 3),
    "buffer name of half a surrogate pair": spoil(DOCUMENT, "buffers.name.1", "\udfff"),
    "leaves of one path": spoil(DOCUMENT, "leaves.path.2", "model.embed.weight"),
    "leaf larger than its buffer": spoil(DOCUMENT, "leaves.shape.0", [20, 26]),
    "leaf behind its buffer": spoil(DOCUMENT, "leaves.offset_bytes.2", 56),
    "leaf of no buffer": spoil(DOCUMENT, "leaves.buffer.0", 4),
    "leaf of buffer -2": spoil(DOCUMENT, "leaves.buffer.5", -2),
    "leaf with elements and no buffer": spoil(DOCUMENT, "leaves.buffer.6", NO_BUFFER),
    "leaf with items of no bytes": spoil(DOCUMENT, "leaves.item_bytes.3", 0),
    "leaf with items of no bytes and no buffer": spoil_both(
        DOCUMENT, ("leaves.item_bytes.6", 0), ("leaves.buffer.6", NO_BUFFER)
    ),
    "leaf with too few strides": spoil(DOCUMENT, "leaves.strides.0", [1]),
    "leaf with a negative stride": spoil(DOCUMENT, "leaves.strides.0", [-25, 1]),
    "leaf that overflows": spoil(DOCUMENT, "leaves.shape.0", [1 << 52, 1 << 52]),
    "leaf repeated beyond measure": spoil(DOCUMENT, "leaves.shape.4", [1 << 52, 4]),
    "empty leaf of a huge shape": spoil(DOCUMENT, "leaves.shape.5", [0, 1 << 52]),
    "leaf with too many dimensions": spoil_both(DOCUMENT, ("leaves.shape.6", [1] * 65), ("leaves.strides.6", [1] * 65)),
    "leaf with a number for a shape": spoil(DOCUMENT, "leaves.shape.6", 1),
    "leaf with an object for a shape": spoil(DOCUMENT, "leaves.shape.6", {}),
    "leaf with a shape of texts": spoil(DOCUMENT, "leaves.shape.0", ["20", "25"]),
    "leaf tied to nothing": spoil(DOCUMENT, "leaves.same_as.1", "model.none"),
    "leaf tied to itself": spoil(DOCUMENT, "leaves.same_as.1", "model.head.weight"),
    "leaf tied to a later one": spoil(DOCUMENT, "leaves.same_as.0", "model.head.weight"),
    "leaf tied to one that differs": spoil(DOCUMENT, "leaves.dtype.1", "float16"),
    "leaf that asks for gradients by a number": spoil(DOCUMENT, "leaves.requires_grad.0", 1),
    "file that climbs": spoil(DOCUMENT, "files.name.0", "../tokenizer.json"),
    "file of an absolute path": spoil(DOCUMENT, "files.name.0", "/etc/passwd"),
    "file with a NUL": spoil(DOCUMENT, "files.name.0", "a\0"),
    "files of one name": spoil_both(DOCUMENT, ("files.root.0", "HF_HOME"), ("files.name.0", "hub/run.sh")),
    "file below a file": spoil_both(DOCUMENT, ("files.root.0", "HF_HOME"), ("files.name.0", "hub")),
    "file that may become root": spoil(DOCUMENT, "files.mode.0", 0o4755),
    "file under a root that climbs": spoil(DOCUMENT, "files.root.0", ".."),
    "file past its segment": spoil(DOCUMENT, "files.length_bytes.0", 769),
    "files that overlap": spoil(DOCUMENT, "files.length_bytes.0", 513),
    "pools larger than anything": spoil(DOCUMENT, "pools.length_bytes.0", 1 << 43),
    "pools of one name": manifest_to_json(MANIFEST._replace(pools=(Pool("kv", "other", 1), Pool("kv", "other", 2)))),
    "pool of an unknown kind": spoil(DOCUMENT, "pools.kind.0", "code"),
    "rung of another ladder": spoil(DOCUMENT, "rung", "pickle"),
    "name of another kind": spoil(DOCUMENT, "name", "../minilm"),
    "parent of another snapshot": spoil(DOCUMENT, "parent", "manifests/other/000006-00aa"),
    "negative generation": spoil(DOCUMENT, "generation", -1),
    "generation of 2^63": spoil(DOCUMENT, "generation", 1 << 63),
    "time as a text": spoil(DOCUMENT, "created_seconds", "now"),
    "time that is true": spoil(DOCUMENT, "created_seconds", True),
    "half a surrogate pair for a key": spoil(DOCUMENT, "platform", {"\ud800": ""}),
    "half a surrogate pair for a value": spoil(DOCUMENT, "provenance", {"host": "\udcff"}),
    "time of no clock": spoil(DOCUMENT, "created_seconds", 1e12),
    "modules by number": spoil(DOCUMENT, "modules", {"model": 1}),
    "deep tree": spoil(DOCUMENT, "tree", json.loads("[" * 500 + "]" * 500)),
    "deep unknown field": spoil(DOCUMENT, "unknown", json.loads('{"a":' * 300 + "1" + "}" * 300)),
    "infinity in the tree": manifest_to_json(MANIFEST).replace(b"1.5", b"1e999"),
    "no tree at all": json.dumps({key: value for key, value in DOCUMENT.items() if key != "tree"}).encode(),
    "programs that are texts": spoil(DOCUMENT, "programs", ["rm"]),
    "too many programs": spoil(DOCUMENT, "programs", [{}] * (MAX_TEXT + 1)),
    "digests that are numbers": spoil(DOCUMENT, "warmup_digests", [7]),
    "too many digests": spoil(DOCUMENT, "warmup_digests", ["x"] * (MAX_TEXT + 1)),
}


@pytest.mark.parametrize("data", HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS.keys())
def test_hostile_manifests_are_refused(data):
    """Each is a ManifestError, raised before anything is allocated, fetched or created."""
    with pytest.raises(ManifestError):
        manifest_from_json(data)


@pytest.mark.parametrize(
    ("reason", "path", "value"),
    [
        ("claims 4398046513920 bytes", "segments.length_bytes.1", 1 << 42),
        ("chunk 1 reaches past the end of segment 0", "chunks.length_bytes.1", 513),
        ("manifest.chunks.blob holds a value of the wrong type", "chunks.blob.1", 7),
        ("leaf 'model.head.weight' is the same as 'x'", "leaves.same_as.1", "x"),
    ],
)
def test_errors_say_what_is_wrong(reason, path, value):
    """The message names the part and what is wrong with it, not what follows from it."""
    with pytest.raises(ManifestError, match=reason):
        manifest_from_json(spoil(DOCUMENT, path, value))


@pytest.mark.parametrize(
    "data",
    [
        spoil(DOCUMENT, "buffers.name.0", "../../embed"),
        spoil(DOCUMENT, "buffers.name.0", "embed\0"),
        spoil(DOCUMENT, "buffers.name.0", "Schlu\u0308ssel.weight"),
        spoil(DOCUMENT, "leaves.dtype.3", "float99"),
        spoil(DOCUMENT, "chunks.codec.0", "of-the-future/9"),
        spoil(DOCUMENT, "format.minor", 9),
    ],
    ids=["path-like", "NUL", "unicode twin", "dtype", "codec", "newer minor"],
)
def test_what_is_open_is_read(data):
    """Names of buffers are never paths, and dtypes and codecs are open words that their users refuse."""
    assert manifest_from_json(data).name == "minilm"


def test_a_manifest_beyond_the_limit_is_not_parsed(monkeypatch):
    """The size is checked before the parser sees the bytes."""
    monkeypatch.setattr(format_, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(ManifestError, match="more than the 100"):
        manifest_from_json(manifest_to_json(MANIFEST))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_bytes_are_refused(data):
    """Whatever bytes a store gives: ManifestError and nothing else."""
    for read in (manifest_from_json, ref_from_json):
        with pytest.raises(ManifestError):
            read(data)


@given(st.data())
def test_altered_bytes_are_read_or_refused(data):
    """Bytes of a real object with a part replaced are read or refused as ManifestError, never anything else."""
    golden = manifest_to_json(MANIFEST)
    begin = data.draw(st.integers(0, len(golden)))
    end = data.draw(st.integers(begin, min(len(golden), begin + 20)))
    altered = golden[:begin] + data.draw(st.binary(max_size=20)) + golden[end:]
    try:
        assert isinstance(manifest_from_json(altered), Manifest)
    except ManifestError:
        return


def test_ten_thousand_leaves():
    """A manifest of ten thousand buffers reads back whole."""
    count = 10_000
    segment = Segment(4, "weights", "eager", 256 * count)
    many = MANIFEST._replace(
        segments=(segment,),
        buffers=tuple(Buffer(f"layers.{n}.weight", "weights", 0, 256 * n, 256) for n in range(count)),
        leaves=tuple(
            Leaf(f"layers.{n}.weight", "torch", "parameter", "float32", 4, (8, 8), (8, 1), n, 0, True, "")
            for n in range(count)
        ),
        files=(),
        chunks=(Chunk(0, 0, 256 * count, "a" * 64, "raw", {}, "b" * 64, 256 * count),),
    )
    assert manifest_from_json(manifest_to_json(many)) == many
