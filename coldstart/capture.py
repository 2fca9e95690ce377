"""Capturing: a surveyed state and its files, chunk by chunk, into a store; the manifest last.

One thread, off the request path: ``pace()`` is called before every chunk and may wait while events are served. A
chunk is hashed before and after it is copied, and only the copy is encoded and sent, so that a blob is always what its
name says. Weights and files are hashed once more when all is copied: if any of them changed meanwhile, the generation
is dropped. Of buffers that are declared to change, each chunk is of one moment.

Chunks that the parent generation has are not encoded or sent again, nor is any blob that the store holds and that may
be relied on. Nothing here makes the generation current: that is ``Repository.publish``, after the proof.
"""

from __future__ import annotations

import bisect
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import plan
from coldstart.codecs import choose, encoder
from coldstart.errors import CaptureError, StateChangedError
from coldstart.manifest import MAX_ITEM_BYTES, NO_BUFFER, Buffer, Chunk, FileEntry, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from coldstart.caches import FileSource
    from coldstart.frameworks import Survey
    from coldstart.manifest import KeyRecord, Leaf
    from coldstart.plan import Item, Layout
    from coldstart.repository import Repository


class Capture(NamedTuple):
    """What to capture. ``survey`` is None on rung *files*; ``parent`` the generation that this one follows.

    ``mends``: what the store holds could not be read, so every blob is written again, whatever is there under its name.
    """

    name: str
    key: KeyRecord
    survey: Survey | None
    files: tuple[FileSource, ...]
    device_type: str
    parent: Manifest | None
    parent_key: str
    generation: int
    kinds: Mapping[str, str]
    warmup_digests: tuple[str, ...]
    provenance: Mapping[str, str]
    mends: bool = False


class Encoding(NamedTuple):
    """How chunks are stored: a codec's id or ``auto``, and the level of those that have one."""

    codec: str
    level: int


class Written(NamedTuple):
    """A generation that is complete in the store and not current yet."""

    manifest: Manifest
    manifest_key: str
    written_bytes: int
    reused_bytes: int


class _Source(NamedTuple):
    """An item of the layout with the way to its bytes: ``read(begin, end)`` gives a view of them."""

    item: Item
    read: Callable[[int, int], memoryview]


def write_generation(
    capture: Capture, repository: Repository, *, encoding: Encoding, pace: Callable[[], None]
) -> Written:
    """Write the blobs and the manifest of a new generation.

    Raises StateChangedError when bytes change while they are copied, CaptureError for a file that went away,
    ManifestError for a state or files that the format has no room for, StoreError.
    """
    sources = _array_sources(capture) + _file_sources(capture)
    layout = plan.layout([source.item for source in sources], parent=capture.parent)
    writer = _ChunkWriter(capture, repository, layout, sources, encoding)
    chunks = []
    for extent in layout.chunks:
        pace()
        chunks.append(writer.write(extent))
    for extent, chunk in zip(layout.chunks, chunks, strict=True):
        pace()
        writer.check_unchanged(extent, chunk)
    manifest = _manifest(capture, layout, sources, tuple(chunks))
    key = repository.put_manifest(manifest)
    return Written(manifest, key, writer.written_bytes, writer.reused_bytes)


def _array_sources(capture: Capture) -> list[_Source]:
    if capture.survey is None:
        return []
    leaves_of: dict[int, Any] = {}
    for found in capture.survey.leaves:
        if found.leaf.buffer != NO_BUFFER:
            leaves_of.setdefault(found.leaf.buffer, found.leaf)
    sources = []
    for index, storage in enumerate(capture.survey.storages):
        leaf = leaves_of[index]
        item = plan.Item(
            leaf.path,
            storage.length_bytes,
            _plane_bytes(leaf),
            kind_of(leaf.path, capture.kinds),
            "eager",
            is_file=False,
        )
        sources.append(_Source(item, partial(_slice, memoryview(storage.data))))
    return sources


def _plane_bytes(leaf: Leaf) -> int:
    """The item size that a segment has: long numpy texts are no items that a codec could split, so they count as bytes."""
    return leaf.item_bytes if leaf.item_bytes <= MAX_ITEM_BYTES else 1


def _slice(view: memoryview, begin: int, end: int) -> memoryview:
    return view[begin:end]


def kind_of(path: str, kinds: Mapping[str, str]) -> str:
    """The kind that ``kinds`` declares for ``path`` or for the nearest place above it, else ``weights``."""
    prefix = max((prefix for prefix in kinds if _is_at_or_below(path, prefix)), key=len, default=None)
    return "weights" if prefix is None else kinds[prefix]


def _is_at_or_below(path: str, prefix: str) -> bool:
    """``layers.1`` is above ``layers.1.bias`` and ``layers.1[0]``, and not above ``layers.10``."""
    return path.startswith(prefix) and (path == prefix or prefix.endswith((".", "[")) or path[len(prefix)] in ".[")


def _file_sources(capture: Capture) -> list[_Source]:
    sources = []
    for file in capture.files:
        try:
            length_bytes = os.stat(file.path).st_size
        except OSError as error:
            raise CaptureError(
                f"cannot read {file.path}, which the snapshot should hold: {error}", snapshot=capture.name
            ) from error
        item = plan.Item(f"{file.root}/{file.name}", length_bytes, 1, "other", "files", is_file=True)
        sources.append(_Source(item, _file_reader(file.path, length_bytes, capture.name)))
    return sources


def _file_reader(path: str, length_bytes: int, snapshot: str) -> Callable[[int, int], memoryview]:
    def read(begin: int, end: int) -> memoryview:
        try:
            with open(path, "rb") as file:
                data = os.pread(file.fileno(), end - begin, begin)
                now_bytes = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise CaptureError(
                f"cannot read {path}, which the snapshot should hold: {error}", snapshot=snapshot
            ) from error
        if now_bytes != length_bytes or len(data) != end - begin:
            raise StateChangedError(
                f"{path} had {length_bytes} bytes and has {now_bytes} while it is captured", snapshot=snapshot
            )
        return memoryview(data)

    return read


class _ChunkWriter:
    """Gathers, hashes, encodes and stores one chunk after another."""

    def __init__(
        self, capture: Capture, repository: Repository, layout: Layout, sources: Sequence[_Source], encoding: Encoding
    ) -> None:
        self.written_bytes = 0
        self.reused_bytes = 0
        self._capture = capture
        self._repository = repository
        self._layout = layout
        self._encoding = encoding
        self._codecs: dict[int, str] = {}
        self._known = plan.known_chunks(capture.parent) if capture.parent is not None and not capture.mends else {}
        self._parent_stays = _is_replaced(capture)
        self._places: list[list[tuple[int, _Source]]] = [[] for _ in layout.segments]
        for source, place in zip(sources, layout.places, strict=True):
            if source.item.length_bytes:
                self._places[place.segment].append((place.offset_bytes, source))
        for places in self._places:
            places.sort(key=lambda entry: entry[0])

    def write(self, extent: plan.Extent) -> Chunk:
        raw_hash = _hash(self._gather(extent))
        item_bytes = self._layout.segments[extent.segment].item_bytes
        known = self._known.get((raw_hash, item_bytes, extent.length_bytes))
        if known is not None and self._may_reuse(known):
            self.reused_bytes += known.stored_bytes
            return known._replace(segment=extent.segment, offset_bytes=extent.offset_bytes)
        raw = memoryview(bytes(self._gather(extent)))  # live memory may change while it is encoded and sent
        if _hash(raw) != raw_hash:
            raise self._changed()
        codec = self._codec(extent.segment, raw, item_bytes)
        stored, parameters = encoder(codec, level=self._encoding.level).encode(raw, item_bytes=item_bytes)
        if len(stored) >= len(raw):
            codec, stored, parameters = "raw", raw, {}
        blob = _hash(stored)
        if self._repository.put_blob(blob, stored, rely_on_stored=not self._capture.mends):
            self.written_bytes += len(stored)
        else:
            self.reused_bytes += len(stored)
        return Chunk(
            extent.segment, extent.offset_bytes, extent.length_bytes, raw_hash, codec, parameters, blob, len(stored)
        )

    def check_unchanged(self, extent: plan.Extent, chunk: Chunk) -> None:
        """Raise StateChangedError if weights or files are not what was copied. Other kinds are declared to change."""
        segment = self._layout.segments[extent.segment]
        is_lasting = segment.kind == "weights" or segment.consumer == plan.FILES
        if is_lasting and _hash(self._gather(extent)) != chunk.raw_hash:
            raise self._changed()

    def _changed(self) -> StateChangedError:
        return StateChangedError("bytes of the state changed while they were copied", snapshot=self._capture.name)

    def _may_reuse(self, known: Chunk) -> bool:
        """The blobs of the generation that is replaced live until then; any other may be the collector's next."""
        return self._parent_stays or self._repository.has_blob(known.blob, known.stored_bytes)

    def _codec(self, segment: int, raw: memoryview, item_bytes: int) -> str:
        """Chosen once per segment, from a sample of its first chunk."""
        if segment not in self._codecs:
            self._codecs[segment] = choose(raw, item_bytes=item_bytes, setting=self._encoding.codec)
        return self._codecs[segment]

    def _gather(self, extent: plan.Extent) -> memoryview:
        """The raw bytes of a chunk: a view of live memory where one item fills it, else a copy with padding of zeros."""
        places = self._places[extent.segment]
        end = extent.offset_bytes + extent.length_bytes
        index = max(0, bisect.bisect_right(places, extent.offset_bytes, key=lambda entry: entry[0]) - 1)
        gathered = memoryview(b"")
        for offset, source in places[index:]:
            if offset >= end:
                break
            begin = max(extent.offset_bytes, offset)
            stop = min(end, offset + source.item.length_bytes)
            if begin >= stop:
                continue
            piece = source.read(begin - offset, stop - offset)
            if len(piece) == extent.length_bytes:
                return piece
            if not gathered:
                gathered = memoryview(bytearray(extent.length_bytes))
            gathered[begin - extent.offset_bytes : stop - extent.offset_bytes] = piece
        return gathered


def _hash(data: bytes | memoryview) -> str:
    from blake3 import blake3

    return str(blake3(data).hexdigest())


def _is_replaced(capture: Capture) -> bool:
    """Whether the parent is the generation that this one replaces, and not one of another key."""
    parent = capture.parent
    return parent is not None and parent.key == capture.key and parent.generation == capture.generation - 1


def _manifest(capture: Capture, layout: Layout, sources: Sequence[_Source], chunks: tuple[Chunk, ...]) -> Manifest:
    placed = list(zip(sources, layout.places, strict=True))
    buffers = tuple(
        Buffer(source.item.name, source.item.kind, place.segment, place.offset_bytes, source.item.length_bytes)
        for source, place in placed
        if not source.item.is_file
    )
    places_of_files = [place for source, place in placed if source.item.is_file]
    lengths = [source.item.length_bytes for source in sources if source.item.is_file]
    files = tuple(
        FileEntry(file.root, file.name, _mode(file.path), place.segment, place.offset_bytes, length_bytes)
        for file, place, length_bytes in zip(capture.files, places_of_files, lengths, strict=True)
    )
    survey = capture.survey
    return Manifest(
        name=capture.name,
        generation=capture.generation,
        parent=capture.parent_key,
        created_seconds=round(time.time(), 3),
        rung="files" if survey is None else "arrays",
        device_type=capture.device_type,
        key=capture.key,
        segments=layout.segments,
        buffers=buffers,
        leaves=() if survey is None else tuple(found.leaf for found in survey.leaves),
        files=files,
        chunks=chunks,
        pools=(),
        tree=None if survey is None else survey.tree,
        modules={} if survey is None else dict(survey.modules),
        programs=(),
        platform={},
        provenance=dict(capture.provenance),
        warmup_digests=capture.warmup_digests,
        requires=(),
        signature="",
        extra={},
    )


def _mode(path: str) -> int:
    return 0o755 if os.access(path, os.X_OK) else 0o644
