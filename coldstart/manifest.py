"""Format version 1: the immutable description of one generation of a snapshot, and the ref that names the current one.

::

    <root>/refs/<name>/<key>                    Ref, changed by compare-and-swap: the key's current generation
    <root>/refs/<name>/newest                   Ref of the newest key, for people and for "why was it passed over"
    <root>/manifests/<name>/<generation>-<id>   Manifest, immutable
    <root>/blobs/<2 hex>/<blake3 of stored bytes>   one stored chunk, immutable
    <root>/starts/<name>/<date>/<id>.json       one start record per worker start
    <root>/leases/<name>                        who is capturing (efficiency only)
    <root>/clocks/<2 hex>                       an empty object whose last write says what time it is at the store

Writing order is blobs, manifest, ref; reading order is the reverse. Nothing here does I/O.

The reader is strict and light: it runs before the first answer, so it is the standard library only, and everything
it returns has been checked: types and limits, that chunks tile their segments without hole or overlap, that buffers and
files lie apart and inside their segments and leaves inside their buffers, that file names are safe to create and texts
can be encoded. Not looked into, but for their depth, are ``tree``, ``programs`` and unknown fields: their users check
them. Lists of many are stored as columns (``{"name": [...], "segment": [...]}``), which is smaller and lets whole
columns be checked at C speed. A major version above ours is refused, as is an unknown word in ``requires``; unknown
optional fields of a manifest are kept and written back.

``tests/test_manifest.py`` holds the golden bytes and compares this reader with a pydantic model.
"""

from __future__ import annotations

import json
import math
import re
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from coldstart.errors import FormatVersionError, ManifestError
from coldstart.terms import BUFFER_KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

FORMAT_MAJOR = 1
FORMAT_MINOR = 0
FORMS = "forms"
"""What a manifest with ``forms`` requires: a collector that does not know of their blobs would delete them."""
KNOWN_FEATURES: frozenset[str] = frozenset({FORMS})
"""Words that a manifest may list in ``requires``. A reader that does not know one must not use the snapshot."""

SEGMENT_ALIGNMENT_BYTES = 256
MAX_MANIFEST_BYTES = 32 << 20
MAX_REF_BYTES = 64 << 10
MAX_SEGMENTS = 4096
MAX_BUFFERS = 500_000
MAX_LEAVES = 500_000
MAX_FILES = 50_000
MAX_CHUNKS = 2_000_000
MAX_CHUNK_BYTES = 64 << 20
MAX_TOTAL_BYTES = 1 << 42
MAX_HISTORY = 64
"""Generations before the current one that a ref names; an older one is the collector's."""
MAX_TEXT = 4096
MAX_DIMENSIONS = 64
MAX_DEPTH = 200
"""How deep the free-form fields may nest: far below Python's recursion limit, for those who walk them."""
MAX_ITEM_BYTES = 64
MAX_STORED_OVERHEAD_BYTES = 64 << 10
"""Stored bytes of a chunk may exceed its raw bytes by at most this and an eighth (frame headers)."""

RUNGS = ("files", "arrays")
NO_BUFFER = -1
"""A leaf without elements has no bytes: all empty arrays share an address and none of them is tied to another."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(=[A-Za-z0-9][A-Za-z0-9._-]{0,63})?\Z")
_MANIFEST_KEY = re.compile(r"manifests/([^/]+)/([0-9]{6,16})-[0-9a-f]{1,64}\Z")
_HEX_64 = re.compile(r"[0-9a-f]{64}\Z")
_HEX_32 = re.compile(r"[0-9a-f]{32}\Z")
_FILE_PART = re.compile(r"[^/\\\x00-\x1f\x7f]+\Z")
_FILE_ROOT = re.compile(r"[A-Z_a-z0-9]{1,64}\Z")
_MAX_FILE_PART_BYTES = 255


class Segment(NamedTuple):
    """Buffers of one item size, kind and consumer, one after another, each aligned to 256 bytes."""

    item_bytes: int
    kind: str
    consumer: str
    length_bytes: int


class Chunk(NamedTuple):
    """A slice of one segment: the unit of encoding, hashing, fetching, retrying and reuse. Hashes are BLAKE3, hex."""

    segment: int
    offset_bytes: int
    length_bytes: int
    raw_hash: str
    codec: str
    parameters: Mapping[str, int | str]
    blob: str
    stored_bytes: int


class Form(NamedTuple):
    """A further stored form of a chunk, for devices that decode it; in the chunk's own form every machine can read it.

    ``chunk`` is the chunk's index; the rest says of this form what a ``Chunk`` says of its own.
    """

    chunk: int
    codec: str
    parameters: Mapping[str, int | str]
    blob: str
    stored_bytes: int

    def of(self, chunk: Chunk) -> Chunk:
        """The chunk, stored in this form instead."""
        return chunk._replace(
            codec=self.codec, parameters=self.parameters, blob=self.blob, stored_bytes=self.stored_bytes
        )


class Buffer(NamedTuple):
    """A run of bytes in a segment that one or more leaves are views of."""

    name: str
    kind: str
    segment: int
    offset_bytes: int
    length_bytes: int


class Leaf(NamedTuple):
    """An array of the state: a strided view of a buffer.

    ``path`` is where it sits in the state; ``dtype`` an open name that the framework understands; ``shape`` and
    ``strides`` are in items; ``offset_bytes`` is inside the buffer. ``same_as`` is the path of an earlier leaf that is
    the very same object ("" if there is none): tied parameters are one object at two paths. ``role`` says what it is to
    its holder (``parameter``, ``buffer``, ``tensor``, ``array``).
    """

    path: str
    framework: str
    role: str
    dtype: str
    item_bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    buffer: int
    offset_bytes: int
    requires_grad: bool
    same_as: str


class FileEntry(NamedTuple):
    """A file of the snapshot: ``name`` is a clean relative path below the folder that ``root`` stands for."""

    root: str
    name: str
    mode: int
    segment: int
    offset_bytes: int
    length_bytes: int


class Pool(NamedTuple):
    """Memory that the state needs and no snapshot holds (KV cache, workspace): allocated in phase pool_alloc."""

    name: str
    kind: str
    length_bytes: int


class PoolArray(NamedTuple):
    """The array that a pool is, where it is one: in C order, zeros when it is made. ``name`` is the pool's.

    ``paths``: where it sits in the state, as a whole or as views of parts of it; () for one that only code asks for.
    """

    name: str
    framework: str
    dtype: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]


class KeyRecord(NamedTuple):
    """What a snapshot depends on: the digest of ``parts``, and each part's own digest so that a change can be named."""

    digest: str
    parts: Mapping[str, str]


class Manifest(NamedTuple):
    """One generation of a snapshot, complete: with its blobs it restores without asking anything else."""

    name: str
    generation: int
    parent: str
    created_seconds: float
    rung: str
    device_type: str
    key: KeyRecord
    segments: tuple[Segment, ...]
    buffers: tuple[Buffer, ...]
    leaves: tuple[Leaf, ...]
    files: tuple[FileEntry, ...]
    chunks: tuple[Chunk, ...]
    pools: tuple[Pool, ...]
    tree: Any
    """The state's shape where no ``build`` is needed (see frameworks.tree), else None."""
    modules: Mapping[str, bool]
    """Path of every torch module in the state -> its training mode."""
    programs: tuple[Mapping[str, Any], ...]
    """Compiled programs; entry points hang below each. Empty in generations of the lower rungs."""
    platform: Mapping[str, str]
    provenance: Mapping[str, str]
    warmup_digests: tuple[str, ...]
    """Digest of the answer to each warm-up event, as the first worker gave it."""
    requires: tuple[str, ...]
    signature: str
    extra: Mapping[str, Any]
    """Fields of a newer minor version: kept, written back, otherwise not looked at."""
    pool_arrays: tuple[PoolArray, ...] = ()
    """Which pools are arrays. Not written where there are none, and so in no manifest of before there were any."""
    host_segments: tuple[int, ...] = ()
    """Of a device with memory of its own: the segments that belong into the host's (files, arrays that were there), rising."""
    forms: tuple[Form, ...] = ()
    """At most one for each chunk, in the order of the chunks."""

    @property
    def device_segments(self) -> tuple[int, ...]:
        """Segments with bytes that belong into the memory of a device that has its own; none on a CPU."""
        if self.device_type == "cpu":
            return ()
        on_host = set(self.host_segments)
        return tuple(
            index for index, segment in enumerate(self.segments) if segment.length_bytes and index not in on_host
        )

    @property
    def raw_bytes(self) -> int:
        """Bytes of the state and its files, decoded."""
        return sum(segment.length_bytes for segment in self.segments)

    @property
    def stored_bytes(self) -> int:
        """Bytes that a worker fetches; a blob named by several chunks counts once, and forms, fetched instead, do not."""
        return sum({chunk.blob: chunk.stored_bytes for chunk in self.chunks}.values())

    @property
    def blobs(self) -> dict[str, int]:
        """Every blob that the generation names, those of forms too, with its length: what is live as long as it is."""
        named: tuple[Chunk | Form, ...] = (*self.chunks, *self.forms)
        return {each.blob: each.stored_bytes for each in named}


class Published(NamedTuple):
    """A generation that was made current, and when, in Unix seconds by the clock of whoever did; 0.0 if not known."""

    generation: int
    manifest: str
    published_seconds: float


class Ref(NamedTuple):
    """The one mutable object of a key. ``write_id`` is unique to the write: a lost answer can be settled by reading.

    What it names is live: its manifests and their blobs are nobody's to delete, and each of them may be made current again.
    """

    name: str
    key: KeyRecord
    generation: int
    manifest: str
    write_id: str
    updated_seconds: float
    previous_generation: int
    previous_manifest: str
    """Key of the manifest before this one, "" for the first generation."""
    history: tuple[Published, ...] = ()
    """The generations before this one that are kept, newest first; empty in refs of before there was one."""
    signature: str = ""
    """See ``signing``. Not written where it is ""."""

    @property
    def named(self) -> tuple[Published, ...]:
        """Every live generation of the key, the current one first."""
        current = Published(self.generation, self.manifest, self.updated_seconds)
        if self.history or not self.previous_manifest:
            return (current, *self.history)
        return (current, Published(self.previous_generation, self.previous_manifest, 0.0))


class Tombstone(NamedTuple):
    """What stands in a ref's place after its snapshot was deleted: no later generation takes a number again.

    ``history``: what the ref had named. None of it is live.
    """

    name: str
    key: KeyRecord
    generation: int
    write_id: str
    updated_seconds: float
    history: tuple[Published, ...] = ()


def check_name(name: object) -> str:
    """Return ``name`` if it can name a snapshot, else raise ManifestError."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise ManifestError(f"{name!r} cannot name a snapshot: use up to 100 letters, digits, '.', '_' and '-'")
    return name


def check_file_name(name: str) -> str:
    """Return ``name`` if it is a clean relative path (no ``..``, no control characters), else raise ManifestError."""
    if len(name) > MAX_TEXT or not _encodable(name) or not all(map(_is_file_part, name.split("/"))):
        raise ManifestError(f"illegal file name {name!r} in a snapshot: it must be a relative path without '..'")
    return name


def _is_file_part(part: str) -> bool:
    return part not in (".", "..") and bool(_FILE_PART.match(part)) and len(part.encode()) <= _MAX_FILE_PART_BYTES


def _encodable(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and no file name, log or terminal can take."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def ref_key(name: str, key_digest: str) -> str:
    """Where the ref of a snapshot's key is stored."""
    return f"refs/{name}/{key_digest}"


def newest_ref_key(name: str) -> str:
    """Where the ref of the newest key of a snapshot is stored."""
    return f"refs/{name}/newest"


def manifest_key(name: str, generation: int, unique: str) -> str:
    """Where a generation's manifest is stored; ``unique`` makes the name fresh even for a repeated number."""
    return f"manifests/{name}/{generation:06d}-{unique}"


def blob_key(blob: str) -> str:
    """Where the blob with this hash is stored."""
    return f"blobs/{blob[:2]}/{blob}"


# --- writing -------------------------------------------------------------------------------------------------------


def manifest_to_json(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest: sorted keys, no spaces, ASCII. The same manifest gives the same bytes."""
    document: dict[str, Any] = manifest._asdict()
    del document["extra"]
    if not document["host_segments"]:
        del document["host_segments"]
    del document["forms"]
    if manifest.forms:
        document["forms"] = _FORMS.columns(manifest.forms)
    document = {**manifest.extra, **document}
    document["format"] = {"major": FORMAT_MAJOR, "minor": FORMAT_MINOR}
    document["key"] = {"digest": manifest.key.digest, "parts": dict(manifest.key.parts)}
    for field, table in _TABLES.items():
        document[field] = table.columns(getattr(manifest, field))
    if not document.pop("pool_arrays"):
        return _canonical(document)
    return _canonical({**document, "pool_arrays": _POOL_ARRAYS.columns(manifest.pool_arrays)})


def ref_to_json(ref: Ref) -> bytes:
    """The canonical bytes of a ref."""
    return _canonical(_ref_document(ref))


def tombstone_to_json(tombstone: Tombstone) -> bytes:
    """The canonical bytes of a tombstone, which no reader takes for a ref."""
    return _canonical({**_ref_document(tombstone), "deleted": True})


def _ref_document(ref: Ref | Tombstone) -> dict[str, Any]:
    document: dict[str, Any] = ref._asdict()
    if not document.get("signature", "-"):
        del document["signature"]
    document["format"] = {"major": FORMAT_MAJOR, "minor": FORMAT_MINOR}
    document["key"] = {"digest": ref.key.digest, "parts": dict(ref.key.parts)}
    if not document.pop("history"):
        return document
    return {**document, "history": [list(entry) for entry in ref.history]}


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


# --- reading -------------------------------------------------------------------------------------------------------


def manifest_from_json(data: bytes) -> Manifest:
    """Read and check a manifest. Raises ManifestError (FormatVersionError for a newer format), nothing else."""
    document = _parse(data, MAX_MANIFEST_BYTES, "manifest")
    fields = _Fields(document, "manifest")
    _check_version(fields)
    requires = fields.texts("requires")
    unknown = sorted(set(requires) - KNOWN_FEATURES)
    if unknown:
        raise FormatVersionError(f"the manifest needs {unknown[0]!r}, which this coldstart does not know: upgrade it")
    name = fields.name("name")
    tables: dict[str, Any] = {field: table.rows(fields.take(field, dict), field) for field, table in _TABLES.items()}
    manifest = Manifest(
        name=name,
        generation=fields.count("generation"),
        parent=fields.manifest_key("parent", name=name, empty=True),
        created_seconds=fields.seconds("created_seconds"),
        rung=fields.one_of("rung", RUNGS),
        device_type=fields.text("device_type"),
        key=_key_record(fields),
        tree=fields.pop("tree"),
        modules=fields.mapping("modules", bool),
        programs=tuple(fields.objects("programs")),
        platform=fields.mapping("platform", str),
        provenance=fields.mapping("provenance", str),
        warmup_digests=tuple(fields.texts("warmup_digests")),
        requires=tuple(requires),
        signature=fields.text("signature"),
        pool_arrays=_pool_arrays(fields),
        host_segments=_host_segments(fields, len(tables["segments"])),
        forms=_FORMS.rows(fields.take("forms", dict), "forms") if "forms" in fields.document else (),
        extra=fields.rest(),
        **tables,
    )
    _check_depth([manifest.tree, *manifest.programs, manifest.extra])
    _check_segments(manifest)
    _check_chunks(manifest)
    _check_forms(manifest)
    _check_buffers(manifest)
    _check_leaves(manifest)
    _check_files(manifest)
    _check_apart(manifest)
    _check_pools(manifest)
    return manifest


def ref_from_json(data: bytes) -> Ref:
    """Read and check a ref. Raises ManifestError (FormatVersionError for a newer format), nothing else."""
    fields = _Fields(_parse(data, MAX_REF_BYTES, "ref"), "ref")
    _check_version(fields)
    name = fields.name("name")
    generation = fields.count("generation")
    previous = fields.count("previous_generation")
    return Ref(
        name=name,
        key=_key_record(fields),
        generation=generation,
        manifest=fields.manifest_key("manifest", name=name, generation=generation),
        write_id=fields.text("write_id"),
        updated_seconds=fields.seconds("updated_seconds"),
        previous_generation=previous,
        previous_manifest=fields.manifest_key("previous_manifest", name=name, generation=previous, empty=True),
        history=_history(fields, name, below=generation),
        signature=fields.text("signature") if "signature" in fields.document else "",
    )


def tombstone_from_json(data: bytes) -> Tombstone | None:
    """Read and check what stands in a ref's place after a deletion; None for anything else. Raises ManifestError."""
    fields = _Fields(_parse(data, MAX_REF_BYTES, "tombstone"), "tombstone")
    if fields.document.get("deleted") is not True:
        return None
    _check_version(fields)
    name, generation = fields.name("name"), fields.count("generation")
    return Tombstone(
        name=name,
        key=_key_record(fields),
        generation=generation,
        write_id=fields.text("write_id"),
        updated_seconds=fields.seconds("updated_seconds"),
        history=_history(fields, name, below=generation + 1),
    )


def _history(fields: _Fields, name: str, *, below: int) -> tuple[Published, ...]:
    """Generations with falling numbers, each below the one before it and the first below ``below``."""
    if "history" not in fields.document:
        return ()
    rows: list[Any] = fields.take("history", list)
    if len(rows) > MAX_HISTORY:
        raise ManifestError(f"{fields.what}.history names {len(rows)} generations, more than the {MAX_HISTORY} allowed")
    found: list[Published] = []
    for row in rows:
        if type(row) is not list or len(row) != len(Published._fields):
            raise ManifestError(f"{fields.what}.history must be a list of generation, manifest and time")
        entry = _Fields(dict(zip(Published._fields, row, strict=True)), f"{fields.what}.history")
        generation = entry.count("generation")
        if generation >= below:
            raise ManifestError(f"{fields.what}.history names generation {generation} out of order")
        key = entry.manifest_key("manifest", name=name, generation=generation)
        found.append(Published(generation, key, entry.seconds("published_seconds")))
        below = generation
    return tuple(found)


def _host_segments(fields: _Fields, count: int) -> tuple[int, ...]:
    if "host_segments" not in fields.document:
        return ()
    found: list[Any] = fields.take("host_segments", list)
    if not _counts(found) or found != sorted(set(found)) or (found and found[-1] >= count):
        raise ManifestError(f"{fields.what}.host_segments must be rising indices of its segments")
    return tuple(found)


def _parse(data: bytes, limit_bytes: int, what: str) -> dict[str, Any]:
    if len(data) > limit_bytes:
        raise ManifestError(f"the {what} has {len(data)} bytes, more than the {limit_bytes} that the format allows")
    try:
        document = json.loads(
            data.decode(), object_pairs_hook=_unique_pairs, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"the {what} is not the JSON that coldstart writes: {error}") from error
    if not isinstance(document, dict):
        raise ManifestError(f"the {what} is not a JSON object")
    return document


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("an object has the same key twice")
    return document


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number is out of range")
    return value


def _check_depth(values: list[Any]) -> None:
    for _ in range(MAX_DEPTH):
        containers = [
            value.values() if type(value) is dict else value for value in values if type(value) in (dict, list)
        ]
        values = list(chain.from_iterable(containers))
        if not values:
            return
    raise ManifestError(f"the manifest nests deeper than {MAX_DEPTH} levels")


def _pool_arrays(fields: _Fields) -> tuple[PoolArray, ...]:
    if "pool_arrays" not in fields.document:
        return ()
    rows = _POOL_ARRAYS.rows(fields.take("pool_arrays", dict), "pool_arrays")
    return tuple(row._replace(paths=tuple(row.paths)) for row in rows)


def _check_version(fields: _Fields) -> None:
    version = fields.take("format", dict)
    major = version.get("major")
    if type(major) is not int or type(version.get("minor")) is not int:
        raise ManifestError(f"the {fields.what} does not say its format version")
    if major != FORMAT_MAJOR:
        raise FormatVersionError(
            f"the {fields.what} has format {major}, this coldstart reads {FORMAT_MAJOR}: upgrade the older one"
        )


def _key_record(fields: _Fields) -> KeyRecord:
    inner = _Fields(fields.take("key", dict), f"{fields.what}.key")
    record = KeyRecord(digest=inner.hex_digest("digest"), parts=inner.mapping("parts", str))
    if inner.rest():
        raise ManifestError(f"the {inner.what} holds more than digest and parts")
    return record


class _Fields:
    """A JSON object that is taken apart field by field; what is left at the end are fields we do not know."""

    def __init__(self, document: dict[str, Any], what: str) -> None:
        self.document = dict(document)
        self.what = what

    def pop(self, field: str) -> Any:
        if field not in self.document:
            raise ManifestError(f"the {self.what} lacks {field!r}")
        return self.document.pop(field)

    def take(self, field: str, kind: type) -> Any:
        value = self.pop(field)
        if type(value) is not kind:
            raise ManifestError(f"{self.what}.{field} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def text(self, field: str) -> str:
        value: str = self.take(field, str)
        if not _texts([value]):
            raise ManifestError(f"{self.what}.{field} is longer than {MAX_TEXT} characters or cannot be encoded")
        return value

    def name(self, field: str) -> str:
        return check_name(self.text(field))

    def hex_digest(self, field: str) -> str:
        value = self.text(field)
        if not _HEX_32.match(value):
            raise ManifestError(f"{self.what}.{field} is not a digest of 32 hex digits")
        return value

    def manifest_key(self, field: str, *, name: str, generation: int | None = None, empty: bool = False) -> str:
        """The key of a manifest of snapshot ``name``, of that generation if one is given; "" where that is allowed."""
        value = self.text(field)
        if value == "" and empty:
            return value
        found = _MANIFEST_KEY.match(value)
        if found is None or found[1] != name or (generation is not None and found[2] != f"{generation:06d}"):
            raise ManifestError(f"{self.what}.{field} is not the key of such a manifest of {name!r}: {value!r}")
        return value

    def count(self, field: str) -> int:
        value: int = self.take(field, int)
        if not 0 <= value < 1 << 53:
            raise ManifestError(f"{self.what}.{field} is out of range: {value}")
        return value

    def seconds(self, field: str) -> float:
        value = self.pop(field)
        if type(value) not in (int, float) or not 0 <= value < 1e11:  # noqa: PLR2004  Unix seconds of this millennium
            raise ManifestError(f"{self.what}.{field} is not a time in Unix seconds")
        return float(value)

    def one_of(self, field: str, allowed: Sequence[str]) -> str:
        value = self.text(field)
        if value not in allowed:
            raise ManifestError(f"{self.what}.{field} is {value!r}, not one of {', '.join(allowed)}")
        return value

    def mapping(self, field: str, kind: type) -> dict[str, Any]:
        value: dict[str, Any] = self.take(field, dict)
        texts = chain(value, value.values() if kind is str else ())
        if len(value) > MAX_LEAVES or not set(map(type, value.values())) <= {kind} or not _encodable("".join(texts)):
            raise ManifestError(f"{self.what}.{field} must map names to {kind.__name__} values")
        return value

    def texts(self, field: str) -> list[str]:
        value: list[Any] = self.take(field, list)
        if len(value) > MAX_TEXT or not _texts(value):
            raise ManifestError(f"{self.what}.{field} must be a list of short texts")
        return value

    def objects(self, field: str) -> list[dict[str, Any]]:
        value: list[Any] = self.take(field, list)
        if len(value) > MAX_TEXT or any(type(item) is not dict for item in value):
            raise ManifestError(f"{self.what}.{field} must be a list of objects")
        return value

    def rest(self) -> dict[str, Any]:
        return self.document


def _counts(column: list[Any]) -> bool:
    return not column or (set(map(type, column)) == {int} and min(column) >= 0 and max(column) < 1 << 53)


def _indices(column: list[Any]) -> bool:
    return not column or (set(map(type, column)) == {int} and min(column) >= NO_BUFFER and max(column) < 1 << 31)


def _texts(column: list[Any]) -> bool:
    if not column:
        return True
    return set(map(type, column)) == {str} and max(map(len, column)) <= MAX_TEXT and _encodable("".join(column))


def _hashes(column: list[Any]) -> bool:
    return not column or (set(map(type, column)) == {str} and all(map(_HEX_64.match, column)))


def _flags(column: list[Any]) -> bool:
    return not column or set(map(type, column)) == {bool}


def _mappings(column: list[Any]) -> bool:
    return set(map(type, column)) <= {dict} and all(map(_is_parameters, filter(None, column)))


def _is_parameters(parameters: dict[str, Any]) -> bool:
    numbers = [value for value in parameters.values() if type(value) is int]
    texts = [value for value in parameters.values() if type(value) is not int]
    return len(parameters) <= MAX_DIMENSIONS and _counts(numbers) and _texts([*parameters, *texts])


def _text_lists(column: list[Any]) -> bool:
    return set(map(type, column)) <= {list} and _texts(list(chain.from_iterable(column)))


def _shapes(column: list[Any]) -> bool:
    return (
        set(map(type, column)) <= {list}
        and max(map(len, column), default=0) <= MAX_DIMENSIONS
        and _counts(list(chain.from_iterable(column)))
    )


class _Table:
    """How rows of one NamedTuple are stored as columns, with a check per column and a limit on their number."""

    def __init__(self, row: type[Any], limit: int, checks: Mapping[str, Callable[[list[Any]], bool]]) -> None:
        self.row = row
        self.limit = limit
        self.checks = checks

    def columns(self, rows: Sequence[Any]) -> dict[str, list[Any]]:
        columns = list(zip(*rows, strict=True)) or [()] * len(self.checks)
        return {name: list(column) for name, column in zip(self.checks, columns, strict=True)}

    def rows(self, document: dict[str, Any], what: str) -> tuple[Any, ...]:
        if set(document) != set(self.checks):
            raise ManifestError(f"manifest.{what} must have exactly the columns {', '.join(self.checks)}")
        columns = [document[name] for name in self.checks]
        if any(type(column) is not list for column in columns) or len(set(map(len, columns))) != 1:
            raise ManifestError(f"manifest.{what} must have columns of one length")
        if len(columns[0]) > self.limit:
            raise ManifestError(f"manifest.{what} has {len(columns[0])} rows, more than the {self.limit} allowed")
        for name, check in self.checks.items():
            if not check(document[name]):
                raise ManifestError(f"manifest.{what}.{name} holds a value of the wrong type or out of range")
            if check is _shapes:
                columns[list(self.checks).index(name)] = list(map(tuple, document[name]))
        return tuple(map(self.row._make, zip(*columns, strict=True)))


_TABLES: Mapping[str, _Table] = {
    "segments": _Table(
        Segment, MAX_SEGMENTS, {"item_bytes": _counts, "kind": _texts, "consumer": _texts, "length_bytes": _counts}
    ),
    "buffers": _Table(
        Buffer,
        MAX_BUFFERS,
        {"name": _texts, "kind": _texts, "segment": _counts, "offset_bytes": _counts, "length_bytes": _counts},
    ),
    "leaves": _Table(
        Leaf,
        MAX_LEAVES,
        {
            "path": _texts,
            "framework": _texts,
            "role": _texts,
            "dtype": _texts,
            "item_bytes": _counts,
            "shape": _shapes,
            "strides": _shapes,
            "buffer": _indices,
            "offset_bytes": _counts,
            "requires_grad": _flags,
            "same_as": _texts,
        },
    ),
    "files": _Table(
        FileEntry,
        MAX_FILES,
        {
            "root": _texts,
            "name": _texts,
            "mode": _counts,
            "segment": _counts,
            "offset_bytes": _counts,
            "length_bytes": _counts,
        },
    ),
    "chunks": _Table(
        Chunk,
        MAX_CHUNKS,
        {
            "segment": _counts,
            "offset_bytes": _counts,
            "length_bytes": _counts,
            "raw_hash": _hashes,
            "codec": _texts,
            "parameters": _mappings,
            "blob": _hashes,
            "stored_bytes": _counts,
        },
    ),
    "pools": _Table(Pool, MAX_BUFFERS, {"name": _texts, "kind": _texts, "length_bytes": _counts}),
}
_POOL_ARRAYS = _Table(
    PoolArray,
    MAX_BUFFERS,
    {"name": _texts, "framework": _texts, "dtype": _texts, "shape": _shapes, "paths": _text_lists},
)

_FORMS = _Table(
    Form,
    MAX_CHUNKS,
    {"chunk": _counts, "codec": _texts, "parameters": _mappings, "blob": _hashes, "stored_bytes": _counts},
)


def _check_segments(manifest: Manifest) -> None:
    if manifest.raw_bytes > MAX_TOTAL_BYTES:
        raise ManifestError(f"the manifest claims {manifest.raw_bytes} bytes, more than the {MAX_TOTAL_BYTES} allowed")
    for index, segment in enumerate(manifest.segments):
        if not 1 <= segment.item_bytes <= MAX_ITEM_BYTES:
            raise ManifestError(f"segment {index} has items of {segment.item_bytes} bytes")
        if segment.kind not in BUFFER_KINDS:
            raise ManifestError(f"segment {index} is of the unknown kind {segment.kind!r}")


def _check_chunks(manifest: Manifest) -> None:
    """Chunks tile the segments: in order, without hole, overlap or rest."""
    segment, position = 0, 0
    for index, chunk in enumerate(manifest.chunks):
        segment, position = _skip_full(manifest, segment, position)
        if chunk.segment != segment or chunk.offset_bytes != position or segment >= len(manifest.segments):
            raise ManifestError(f"chunk {index} leaves a hole or an overlap in segment {chunk.segment}")
        _check_chunk_size(index, chunk)
        position += chunk.length_bytes
        if position > manifest.segments[segment].length_bytes:
            raise ManifestError(f"chunk {index} reaches past the end of segment {segment}")
    segment, _ = _skip_full(manifest, segment, position)
    if segment != len(manifest.segments):
        raise ManifestError(f"the chunks do not cover segment {segment}")


def _check_forms(manifest: Manifest) -> None:
    """Forms are of chunks that there are, one each and in order; and no blob, theirs or a chunk's, has two lengths."""
    if manifest.forms and FORMS not in manifest.requires:
        raise ManifestError(f"the manifest has forms and does not require {FORMS!r}")
    before = -1
    for form in manifest.forms:
        if not before < form.chunk < len(manifest.chunks):
            raise ManifestError(f"a form is of chunk {form.chunk}, which is not there or has one before")
        before = form.chunk
        _check_chunk_size(form.chunk, form.of(manifest.chunks[form.chunk]))
    named: tuple[Chunk | Form, ...] = (*manifest.chunks, *manifest.forms)
    if len({(each.blob, each.stored_bytes) for each in named}) != len({each.blob for each in named}):
        raise ManifestError("a blob is said to have two lengths")


def _skip_full(manifest: Manifest, segment: int, position: int) -> tuple[int, int]:
    while segment < len(manifest.segments) and position == manifest.segments[segment].length_bytes:
        segment, position = segment + 1, 0
    return segment, position


def _check_chunk_size(index: int, chunk: Chunk) -> None:
    if not 0 < chunk.length_bytes <= MAX_CHUNK_BYTES:
        raise ManifestError(f"chunk {index} has {chunk.length_bytes} bytes: 1 to {MAX_CHUNK_BYTES} are allowed")
    most_bytes = chunk.length_bytes + chunk.length_bytes // 8 + MAX_STORED_OVERHEAD_BYTES
    if not 0 < chunk.stored_bytes <= most_bytes:
        raise ManifestError(f"chunk {index} stores {chunk.stored_bytes} bytes for {chunk.length_bytes}")


def _check_extent(manifest: Manifest, what: str, segment: int, offset_bytes: int, length_bytes: int) -> None:
    if segment >= len(manifest.segments) or offset_bytes + length_bytes > manifest.segments[segment].length_bytes:
        raise ManifestError(f"{what} lies outside segment {segment}")


def _check_buffers(manifest: Manifest) -> None:
    if len({buffer.name for buffer in manifest.buffers}) != len(manifest.buffers):
        raise ManifestError("two buffers have the same name")
    for buffer in manifest.buffers:
        if buffer.kind not in BUFFER_KINDS:
            raise ManifestError(f"buffer {buffer.name!r} is of the unknown kind {buffer.kind!r}")
        if buffer.offset_bytes % SEGMENT_ALIGNMENT_BYTES:
            raise ManifestError(f"buffer {buffer.name!r} is not aligned to {SEGMENT_ALIGNMENT_BYTES} bytes")
        _check_extent(manifest, f"buffer {buffer.name!r}", buffer.segment, buffer.offset_bytes, buffer.length_bytes)


def _check_leaves(manifest: Manifest) -> None:
    originals: dict[str, Leaf] = {}
    if len({leaf.path for leaf in manifest.leaves}) != len(manifest.leaves):
        raise ManifestError("two leaves have the same path")
    for leaf in manifest.leaves:
        _check_view(leaf, manifest.buffers)
        if not leaf.same_as:
            originals[leaf.path] = leaf
        elif leaf.same_as not in originals:
            raise ManifestError(f"leaf {leaf.path!r} is the same as {leaf.same_as!r}, which is no leaf before it")
        elif originals[leaf.same_as]._replace(path=leaf.path, role=leaf.role, same_as=leaf.same_as) != leaf:
            raise ManifestError(f"leaf {leaf.path!r} is the same as {leaf.same_as!r} and is described otherwise")


def _check_view(leaf: Leaf, buffers: Sequence[Buffer]) -> None:
    if len(leaf.shape) != len(leaf.strides):
        raise ManifestError(f"leaf {leaf.path!r} has {len(leaf.shape)} sizes and {len(leaf.strides)} strides")
    if not 1 <= leaf.item_bytes <= MAX_ITEM_BYTES:
        raise ManifestError(f"leaf {leaf.path!r} has items of {leaf.item_bytes} bytes")
    if math.prod(filter(None, leaf.shape)) * leaf.item_bytes > MAX_TOTAL_BYTES:
        raise ManifestError(f"leaf {leaf.path!r} has the impossible shape {leaf.shape}")
    needed = leaf_extent_bytes(leaf)
    if leaf.buffer == NO_BUFFER:
        if needed:
            raise ManifestError(f"leaf {leaf.path!r} has elements and no buffer")
    elif leaf.buffer >= len(buffers):
        raise ManifestError(f"leaf {leaf.path!r} names buffer {leaf.buffer}, which is not there")
    elif leaf.offset_bytes + needed > buffers[leaf.buffer].length_bytes:
        raise ManifestError(f"leaf {leaf.path!r} reaches past the end of its buffer")


def leaf_extent_bytes(leaf: Leaf) -> int:
    """Bytes from a leaf's first element to the end of its last one; 0 for a leaf without elements."""
    if 0 in leaf.shape:
        return 0
    last_item = sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.strides, strict=True))
    return (last_item + 1) * leaf.item_bytes


def _check_files(manifest: Manifest) -> None:
    names = {(entry.root, entry.name) for entry in manifest.files}
    if len(names) != len(manifest.files):
        raise ManifestError("two files have the same name")
    for entry in manifest.files:
        check_file_name(entry.name)
        if not _FILE_ROOT.match(entry.root) or entry.mode & ~0o777:
            raise ManifestError(f"file {entry.name!r} has an illegal root or mode")
        parts = entry.name.split("/")
        if any((entry.root, "/".join(parts[:count])) in names for count in range(1, len(parts))):
            raise ManifestError(f"file {entry.name!r} lies below another file")
        _check_extent(manifest, f"file {entry.name!r}", entry.segment, entry.offset_bytes, entry.length_bytes)


def _check_apart(manifest: Manifest) -> None:
    """No two buffers or files share bytes: what shares bytes is leaves of one buffer."""
    holders: tuple[Buffer | FileEntry, ...] = (*manifest.buffers, *manifest.files)
    taken = sorted(
        (holder.segment, holder.offset_bytes, holder.offset_bytes + holder.length_bytes)
        for holder in holders
        if holder.length_bytes
    )
    for (segment, _, end), (next_segment, begin, _) in pairwise(taken):
        if segment == next_segment and begin < end:
            raise ManifestError(f"two buffers or files overlap at byte {begin} of segment {segment}")


def _check_pools(manifest: Manifest) -> None:
    if len({pool.name for pool in manifest.pools}) != len(manifest.pools):
        raise ManifestError("two pools have the same name")
    if any(pool.kind not in BUFFER_KINDS for pool in manifest.pools):
        raise ManifestError("a pool is of an unknown kind")
    if sum(pool.length_bytes for pool in manifest.pools) > MAX_TOTAL_BYTES:
        raise ManifestError(f"the manifest's pools have more than the {MAX_TOTAL_BYTES} bytes allowed")
    _check_pool_arrays(manifest)


def _check_pool_arrays(manifest: Manifest) -> None:
    lengths = {pool.name: pool.length_bytes for pool in manifest.pools}
    names = [array.name for array in manifest.pool_arrays]
    if len(set(names)) != len(names) or not set(names) <= set(lengths):
        raise ManifestError("an array of a pool is there twice, or without its pool")
    for array in manifest.pool_arrays:
        items = math.prod(array.shape)
        if not 0 < items <= lengths[array.name] or lengths[array.name] > items * MAX_ITEM_BYTES:
            raise ManifestError(f"pool {array.name!r} of {lengths[array.name]} bytes has the shape {array.shape}")
    paths = [path for array in manifest.pool_arrays for path in array.paths]
    if len(set(paths)) != len(paths) or not set(paths).isdisjoint(leaf.path for leaf in manifest.leaves):
        raise ManifestError("two arrays of the state have the same path, and one of them is a pool's")
