"""The light reader against a second description of the format: strict pydantic models. They accept the same documents."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from coldstart.errors import ManifestError
from coldstart.manifest import (
    Buffer,
    Chunk,
    FileEntry,
    Form,
    KeyRecord,
    Leaf,
    Manifest,
    Pool,
    PoolArray,
    Segment,
    manifest_from_json,
    manifest_to_json,
    ref_from_json,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "manifest-v1.json").read_bytes())
GOLDEN_REF = json.loads((Path(__file__).parent / "golden" / "ref-v1.json").read_bytes())
GOLDEN_HISTORY = {
    **GOLDEN_REF,
    "history": [[5, "manifests/minilm/000005-aa", 5.5], [3, "manifests/minilm/000003-bb", 3]],
}
SIGNED_REF = json.loads((Path(__file__).parent / "golden" / "ref-v1-signed.json").read_bytes())
KINDS = ("weights", "kv_cache", "activations", "gradients", "optimizer_state", "other")
TEBIBYTE = 1 << 40


def shallow(value: Any) -> Any:
    """Refuse values that nest deeper than 200 levels."""
    assert depth(value) <= 200
    return value


def depth(value: Any) -> int:
    """How many levels of lists and objects a value has, itself included."""
    if not isinstance(value, (list, dict)):
        return 1
    return 1 + max((depth(inner) for inner in (value if isinstance(value, list) else value.values())), default=0)


Utf8 = Annotated[str, AfterValidator(lambda text: text.encode().decode())]
Text = Annotated[Utf8, StringConstraints(max_length=4096)]
Name = Annotated[
    Text, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}(=[A-Za-z0-9][A-Za-z0-9._-]{0,63})?$")
]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Seconds = Annotated[float, Field(ge=0, lt=1e11, allow_inf_nan=False)]
Kind = Literal["weights", "kv_cache", "activations", "gradients", "optimizer_state", "other"]
ItemBytes = Annotated[Count, Field(ge=1, le=64)]
Shape = Annotated[list[Count], Field(max_length=64)]
Parameters = Annotated[dict[Text, Annotated[int, Field(ge=0, lt=1 << 53)] | Text], Field(max_length=64)]
Free = Annotated[Any, AfterValidator(shallow)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Table(Strict):
    """Columns of one length."""

    @model_validator(mode="after")
    def one_length(self):
        assert len({len(column) for column in dict(self).values()}) == 1
        return self

    def rows(self):
        """The rows as dictionaries."""
        columns = dict(self)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class Segments(Table):
    item_bytes: list[ItemBytes] = Field(max_length=4096)
    kind: list[Kind]
    consumer: list[Text]
    length_bytes: list[Count]


class Buffers(Table):
    name: list[Text]
    kind: list[Kind]
    segment: list[Count]
    offset_bytes: list[Annotated[Count, Field(multiple_of=256)]]
    length_bytes: list[Count]


class Leaves(Table):
    path: list[Text]
    framework: list[Text]
    role: list[Text]
    dtype: list[Text]
    item_bytes: list[ItemBytes]
    shape: list[Shape]
    strides: list[Shape]
    buffer: list[Annotated[int, Field(ge=-1, lt=1 << 31)]]
    offset_bytes: list[Count]
    requires_grad: list[bool]
    same_as: list[Text]


class Files(Table):
    root: list[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,64}$")]]
    name: list[Text]
    mode: list[Annotated[Count, Field(le=0o777)]]
    segment: list[Count]
    offset_bytes: list[Count]
    length_bytes: list[Count]


class Chunks(Table):
    segment: list[Count]
    offset_bytes: list[Count]
    length_bytes: list[Annotated[Count, Field(ge=1, le=64 << 20)]]
    raw_hash: list[Hash]
    codec: list[Text]
    parameters: list[Parameters]
    blob: list[Hash]
    stored_bytes: list[Annotated[Count, Field(ge=1)]]


class Forms(Table):
    chunk: list[Count]
    codec: list[Text]
    parameters: list[Parameters]
    blob: list[Hash]
    stored_bytes: list[Annotated[Count, Field(ge=1)]]


class Pools(Table):
    name: list[Text]
    kind: list[Kind]
    length_bytes: list[Count]


class PoolArrays(Table):
    name: list[Text]
    framework: list[Text]
    dtype: list[Text]
    shape: list[Shape]
    paths: list[list[Text]]


class Version(BaseModel):
    model_config = ConfigDict(strict=True)
    major: Annotated[int, Field(ge=1, le=1)]
    minor: int


class Key(Strict):
    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    parts: dict[Utf8, Utf8]


class Oracle(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    format: Version
    name: Name
    generation: Count
    parent: Text
    created_seconds: Seconds
    rung: Literal["files", "arrays"]
    device_type: Text
    key: Key
    segments: Segments
    buffers: Buffers
    leaves: Leaves
    files: Files
    chunks: Chunks
    pools: Pools
    tree: Free
    modules: dict[Utf8, bool]
    programs: Annotated[
        list[dict[str, Any]], Field(max_length=4096), AfterValidator(lambda value: [shallow(item) for item in value])
    ]
    platform: dict[Utf8, Utf8]
    provenance: dict[Utf8, Utf8]
    warmup_digests: list[Text] = Field(max_length=4096)
    requires: list[Literal["forms"]] = Field(max_length=4096)
    signature: Text
    pool_arrays: PoolArrays = PoolArrays(name=[], framework=[], dtype=[], shape=[], paths=[])
    forms: Forms = Forms(chunk=[], codec=[], parameters=[], blob=[], stored_bytes=[])

    @model_validator(mode="after")
    def whole(self):
        lengths = self.segments.length_bytes
        assert sum(lengths) <= 4 * TEBIBYTE
        assert depth(self.__pydantic_extra__) <= 200
        assert self.parent == "" or manifest_name(self.parent) == self.name
        check_tiles(self.chunks.rows(), lengths)
        check_forms(self.forms.rows(), self.chunks.rows())
        assert "forms" in self.requires or not self.forms.chunk
        check_held([*self.buffers.rows(), *self.files.rows()], lengths)
        assert len(set(self.buffers.name)) == len(self.buffers.name)
        check_leaves(self.leaves.rows(), self.buffers.length_bytes)
        check_files(self.files.rows())
        assert len(set(self.pools.name)) == len(self.pools.name)
        assert sum(self.pools.length_bytes) <= 4 * TEBIBYTE
        check_pool_arrays(self.pool_arrays.rows(), self.pools.rows(), self.leaves.path)
        return self


class Earlier(Strict):
    generation: Count
    manifest: Text
    published_seconds: Seconds


class RefOracle(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    format: Version
    name: Name
    key: Key
    generation: Count
    manifest: Text
    write_id: Text
    updated_seconds: Seconds
    previous_generation: Count
    previous_manifest: Text
    history: Annotated[list[Annotated[list[Any], Field(min_length=3, max_length=3)]], Field(max_length=64)] = []
    signature: Text = ""

    @model_validator(mode="after")
    def whole(self):
        assert manifest_name(self.manifest, self.generation) == self.name
        assert (
            self.previous_manifest == "" or manifest_name(self.previous_manifest, self.previous_generation) == self.name
        )
        earlier = [Earlier(generation=row[0], manifest=row[1], published_seconds=row[2]) for row in self.history]
        numbers = [self.generation, *(entry.generation for entry in earlier)]
        assert all(newer > older for newer, older in pairwise(numbers))
        assert all(manifest_name(entry.manifest, entry.generation) == self.name for entry in earlier)
        return self


def manifest_name(key: str, generation: int | None = None) -> str:
    """The snapshot that a manifest's key is of, with the key taken apart by hand."""
    folder, name, last = key.split("/")
    number, unique = last.split("-")
    assert folder == "manifests"
    assert unique
    assert len(unique) <= 64
    assert set(unique) <= set("0123456789abcdef")
    assert 6 <= len(number) <= 16
    assert set(number) <= set("0123456789")
    assert generation is None or number == str(generation).zfill(6)
    return name


def check_tiles(chunks: list[dict], lengths: list[int]) -> None:
    """The chunks of each segment, one behind the other, are the segment; segments come in order."""
    assert [chunk["segment"] for chunk in chunks] == sorted(chunk["segment"] for chunk in chunks)
    assert all(chunk["segment"] < len(lengths) for chunk in chunks)
    for number, length in enumerate(lengths):
        own = [chunk for chunk in chunks if chunk["segment"] == number]
        assert sum(chunk["length_bytes"] for chunk in own) == length
        for index, chunk in enumerate(own):
            assert chunk["offset_bytes"] == sum(before["length_bytes"] for before in own[:index])
    for chunk in chunks:
        assert chunk["stored_bytes"] <= chunk["length_bytes"] + chunk["length_bytes"] // 8 + (64 << 10)
        assert all(other["stored_bytes"] == chunk["stored_bytes"] for other in chunks if other["blob"] == chunk["blob"])


def check_forms(forms: list[dict], chunks: list[dict]) -> None:
    """Each form is of a chunk that there is and that has no other, in their order, and its blob has one length."""
    numbers = [form["chunk"] for form in forms]
    assert numbers == sorted(set(numbers))
    for form in forms:
        length = chunks[form["chunk"]]["length_bytes"] if form["chunk"] < len(chunks) else 0
        assert length > 0
        assert form["stored_bytes"] <= length + length // 8 + (64 << 10)
        for other in (*forms, *chunks):
            assert other["blob"] != form["blob"] or other["stored_bytes"] == form["stored_bytes"]


def check_held(holders: list[dict], lengths: list[int]) -> None:
    """Buffers and files lie inside their segments, and no two of them share a byte."""
    for index, one in enumerate(holders):
        assert one["segment"] < len(lengths)
        end = one["offset_bytes"] + one["length_bytes"]
        assert end <= lengths[one["segment"]]
        for other in holders[:index]:
            if one["segment"] == other["segment"] and one["length_bytes"] and other["length_bytes"]:
                assert (
                    end <= other["offset_bytes"] or other["offset_bytes"] + other["length_bytes"] <= one["offset_bytes"]
                )


def check_leaves(leaves: list[dict], buffer_lengths: list[int]) -> None:
    """Leaves are views inside their buffers; those that are the same as an earlier one are described alike."""
    assert len({leaf["path"] for leaf in leaves}) == len(leaves)
    for index, leaf in enumerate(leaves):
        assert len(leaf["shape"]) == len(leaf["strides"])
        assert math.prod(size or 1 for size in leaf["shape"]) * leaf["item_bytes"] <= 4 * TEBIBYTE
        last = sum((size - 1) * stride for size, stride in zip(leaf["shape"], leaf["strides"], strict=True))
        extent = 0 if 0 in leaf["shape"] else (last + 1) * leaf["item_bytes"]
        if leaf["buffer"] == -1:
            assert extent == 0
        else:
            assert leaf["buffer"] < len(buffer_lengths)
            assert leaf["offset_bytes"] + extent <= buffer_lengths[leaf["buffer"]]
        if leaf["same_as"]:
            (original,) = [other for other in leaves[:index] if other["path"] == leaf["same_as"]]
            assert original["same_as"] == ""
            assert all(original[field] == leaf[field] for field in leaf if field not in ("path", "role", "same_as"))


def check_pool_arrays(arrays: list[dict], pools: list[dict], leaf_paths: list[str]) -> None:
    """Each is one pool's, of items that the pool has room for, at places of the state where nothing else is."""
    assert len({array["name"] for array in arrays}) == len(arrays)
    for array in arrays:
        (pool,) = [pool for pool in pools if pool["name"] == array["name"]]
        items = math.prod(array["shape"])
        assert 1 <= items <= pool["length_bytes"] <= 64 * items
    paths = [path for array in arrays for path in array["paths"]]
    assert len({*paths, *leaf_paths}) == len(paths) + len(leaf_paths)


def check_files(files: list[dict]) -> None:
    """File names are clean, and none is the folder of another."""
    names = [(entry["root"], entry["name"]) for entry in files]
    assert len(set(names)) == len(names)
    for root, name in names:
        for part in name.split("/"):
            assert part not in ("", ".", "..")
            assert len(part.encode()) <= 255
            assert not any(sign in "\\\x7f" or sign < " " for sign in part)
        assert not any(root == other_root and name.startswith(other + "/") for other_root, other in names)


def verdicts(document: Any, model: type[BaseModel], read: Any) -> tuple[bool, bool]:
    """Whether the oracle and the reader accept a document. Any error but theirs is a failure of the test."""
    try:
        model.model_validate(copy.deepcopy(document))
        expected = True
    except (ValidationError, ValueError):
        expected = False
    try:
        read(json.dumps(document).encode())
    except ManifestError:
        return expected, False
    return expected, True


texts = st.text(st.characters(codec="utf-8"), max_size=8)
hashes = st.integers(0, (1 << 256) - 1).map("{:064x}".format)


@st.composite
def manifests(draw) -> Manifest:
    """A small manifest that the format allows, every kind of leaf, chunk and file in it."""
    segments, buffers, files, chunks = [], [], [], []
    for number in range(draw(st.integers(0, 3))):
        position = 0
        for _ in range(draw(st.integers(0, 3))):
            length = draw(st.integers(0, 600))
            if draw(st.booleans()):
                buffers.append(Buffer(f"b{len(buffers)}", draw(st.sampled_from(KINDS)), number, position, length))
            else:
                files.append(
                    FileEntry("KEPT", f"d/{len(files)}", draw(st.integers(0, 0o777)), number, position, length)
                )
            position += -(-length // 256) * 256
        segments.append(Segment(draw(st.integers(1, 64)), draw(st.sampled_from(KINDS)), draw(texts), position))
        begin = 0
        while begin < position:
            length = draw(st.integers(1, position - begin))
            stored = draw(st.integers(1, length * 9 // 8))
            parameters = draw(st.dictionaries(texts, st.integers(0, 9) | texts, max_size=2))
            chunks.append(
                Chunk(number, begin, length, draw(hashes), draw(texts), parameters, f"{len(chunks):064x}", stored)
            )
            begin += length
    forms = [
        Form(number, draw(texts), {}, f"{1000 + number:064x}", draw(st.integers(1, 1 + chunk.length_bytes // 2)))
        for number, chunk in enumerate(chunks)
        if draw(st.booleans())
    ]
    leaves = [draw(leaf_of(buffers, f"leaf{number}")) for number in range(draw(st.integers(0, 4)))]
    leaves += [
        leaf._replace(path=f"{leaf.path}.tied", role=draw(texts), same_as=leaf.path)
        for leaf in leaves
        if draw(st.booleans())
    ]
    return Manifest(
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True)),
        generation=draw(st.integers(0, 9)),
        parent="",
        created_seconds=draw(st.floats(0, 9e10)),
        rung=draw(st.sampled_from(["files", "arrays"])),
        device_type=draw(texts),
        key=KeyRecord("0" * 32, draw(st.dictionaries(texts, texts, max_size=2))),
        segments=tuple(segments),
        buffers=tuple(buffers),
        leaves=tuple(leaves),
        files=tuple(files),
        chunks=tuple(chunks),
        pools=tuple(Pool(f"p{number}", "other", number) for number in range(draw(st.integers(2, 3)))),
        tree=draw(st.none() | st.dictionaries(texts, st.lists(st.integers() | texts, max_size=2), max_size=2)),
        modules=draw(st.dictionaries(texts, st.booleans(), max_size=2)),
        programs=tuple(draw(st.lists(st.dictionaries(texts, texts, max_size=2), max_size=2))),
        platform=draw(st.dictionaries(texts, texts, max_size=2)),
        provenance=draw(st.dictionaries(texts, texts, max_size=2)),
        warmup_digests=tuple(draw(st.lists(texts, max_size=2))),
        requires=("forms",) if forms else (),
        signature=draw(texts),
        extra=draw(st.dictionaries(texts.map("x-{}".format), texts, max_size=2)),
        pool_arrays=draw(st.sampled_from([(), (PoolArray("p1", "torch", "int8", (1,), ("cache",)),)])),
        forms=tuple(forms),
    )


@st.composite
def leaf_of(draw, buffers: list[Buffer], path: str) -> Leaf:
    """A leaf that is a view of one of the buffers, or of none."""
    number = draw(st.integers(-1, len(buffers) - 1))
    room = buffers[number].length_bytes if number >= 0 else 0
    item_bytes = draw(st.integers(1, 16))
    offset = draw(st.integers(0, room))
    items = (room - offset) // item_bytes
    shape, strides = [], []
    while items and draw(st.booleans()):
        strides.append(draw(st.integers(0, items)))
        shape.append(draw(st.integers(1, 1 + (items - 1) // strides[-1] if strides[-1] else 5)))
        items = max(1, items - (shape[-1] - 1) * strides[-1])
    if not items:
        shape, strides = [0, *shape], [1, *strides]
    return Leaf(
        path,
        draw(texts),
        draw(texts),
        draw(texts),
        item_bytes,
        tuple(shape),
        tuple(strides),
        number,
        offset,
        draw(st.booleans()),
        "",
    )


@given(manifests())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_valid_manifests_survive(manifest):
    """What the format allows is written, accepted by both descriptions, read back equal and written alike again."""
    data = manifest_to_json(manifest)
    assert verdicts(json.loads(data), Oracle, manifest_from_json) == (True, True)
    assert manifest_from_json(data) == manifest
    assert manifest_to_json(manifest_from_json(data)) == data


JUNK = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 255, 256, 512, 768, 4096, 1 << 31, 1 << 53, 1 << 63]),
    st.sampled_from([1.0, 0.5, -0.5, 1e300]),
    st.sampled_from(["", "weights", "x", "a\0b", "../x", "a/b", "/x", "\ud800", "é" * 200, "x" * 4097, "0" * 64]),
    st.sampled_from(["embed.weight", "model.embed.weight", "leaf0", "b0", "manifests/minilm/000006-0a"]),
    st.sampled_from([[], {}, [0], [0, 0], [-1], [1, 2, 3], ["x"], {"a": 1}, {"a": "b"}, {"a": None}, [[1]]]),
    st.just(json.loads("[" * 210 + "]" * 210)),
)


def spoil(draw, document: Any) -> Any:
    """The document with one value, somewhere in it, replaced, shifted, removed, repeated or added."""
    document = copy.deepcopy(document)
    holder = document
    while True:
        places = sorted(holder) if isinstance(holder, dict) else range(len(holder))
        if not places:
            return document
        place = draw(st.sampled_from(places))
        if isinstance(holder[place], (dict, list)) and holder[place] and draw(st.integers(0, 9)):
            holder = holder[place]
            continue
        break
    value = holder[place]
    action = draw(st.integers(0, 9))
    if action == 0:
        del holder[place]
    elif action == 1 and isinstance(holder, list):
        holder.insert(place, copy.deepcopy(value))
    elif action == 2:
        holder.update({"unknown": 1}) if isinstance(holder, dict) else holder.append(copy.deepcopy(draw(JUNK)))
    elif action <= 5 and type(value) is int:
        holder[place] = value + draw(st.sampled_from([-512, -256, -1, 1, 256, 512]))
    elif action <= 7 and isinstance(holder, list):
        holder[place] = copy.deepcopy(draw(st.sampled_from(holder)))
    else:
        holder[place] = copy.deepcopy(draw(JUNK))
    return document


@given(st.data(), manifests().map(manifest_to_json).map(json.loads) | st.just(GOLDEN), st.integers(1, 3))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_spoiled_manifests_get_the_same_verdict(data, document, times):
    """The reader accepts exactly the documents that the oracle accepts, and raises nothing but ManifestError."""
    for _ in range(times):
        document = spoil(data.draw, document)
    expected, got = verdicts(document, Oracle, manifest_from_json)
    assert got == expected


@given(st.data(), st.integers(1, 2))
@settings(max_examples=200)
def test_spoiled_refs_get_the_same_verdict(data, times):
    """The same for refs."""
    document = data.draw(st.sampled_from([GOLDEN_REF, GOLDEN_HISTORY, SIGNED_REF]))
    for _ in range(times):
        document = spoil(data.draw, document)
    expected, got = verdicts(document, RefOracle, ref_from_json)
    assert got == expected


@pytest.mark.parametrize(
    ("document", "model", "read"),
    [
        (GOLDEN, Oracle, manifest_from_json),
        (GOLDEN_REF, RefOracle, ref_from_json),
        (GOLDEN_HISTORY, RefOracle, ref_from_json),
        (SIGNED_REF, RefOracle, ref_from_json),
    ],
)
def test_golden_documents_are_accepted_by_both(document, model, read):
    """The golden documents are what both descriptions mean by version 1."""
    assert verdicts(document, model, read) == (True, True)
