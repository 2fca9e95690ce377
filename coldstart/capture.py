"""Capturing: a surveyed state and its files, chunk by chunk, into a store; the manifest last.

One thread, off the request path: ``pace()`` is called before every chunk and may wait while events are served. A
chunk is hashed before and after its bytes were encoded, so bytes that change meanwhile drop the generation instead of
ending up in it. Chunks that the parent generation has are not encoded or sent again, nor is any blob that the store holds.
Nothing here makes the generation current: that is ``Repository.publish``, after the proof.
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
from coldstart.manifest import NO_BUFFER, Buffer, Chunk, FileEntry, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from coldstart.caches import FileSource
    from coldstart.frameworks import Survey
    from coldstart.manifest import KeyRecord
    from coldstart.plan import Item, Layout
    from coldstart.repository import Repository


class Capture(NamedTuple):
    """What to capture. ``survey`` is None on rung *files*; ``parent`` the generation that this one follows."""

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

    Raises StateChangedError when bytes change while they are copied, StoreError, CaptureError for a file that went away.
    """
    sources = _array_sources(capture) + _file_sources(capture)
    layout = plan.layout([source.item for source in sources], parent=capture.parent)
    writer = _ChunkWriter(capture, repository, layout, sources, encoding)
    chunks = []
    for extent in layout.chunks:
        pace()
        chunks.append(writer.write(extent))
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
            leaf.path, storage.length_bytes, leaf.item_bytes, kind_of(leaf.path, capture.kinds), "eager", is_file=False
        )
        sources.append(_Source(item, partial(_slice, memoryview(storage.data))))
    return sources


def _slice(view: memoryview, begin: int, end: int) -> memoryview:
    return view[begin:end]


def kind_of(path: str, kinds: Mapping[str, str]) -> str:
    """The declared kind of the longest prefix of ``path`` in ``kinds``, else ``weights``."""
    prefix = max((prefix for prefix in kinds if path.startswith(prefix)), key=len, default=None)
    return "weights" if prefix is None else kinds[prefix]


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
        sources.append(_Source(item, _file_reader(file.path, capture.name)))
    return sources


def _file_reader(path: str, snapshot: str) -> Callable[[int, int], memoryview]:
    def read(begin: int, end: int) -> memoryview:
        try:
            with open(path, "rb") as file:
                data = os.pread(file.fileno(), end - begin, begin)
        except OSError as error:
            raise CaptureError(
                f"cannot read {path}, which the snapshot should hold: {error}", snapshot=snapshot
            ) from error
        if len(data) != end - begin:
            raise StateChangedError(f"{path} became shorter while it was captured", snapshot=snapshot)
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
        self._known = plan.known_chunks(capture.parent) if capture.parent is not None else {}
        self._places: list[list[tuple[int, _Source]]] = [[] for _ in layout.segments]
        for source, place in zip(sources, layout.places, strict=True):
            if source.item.length_bytes:
                self._places[place.segment].append((place.offset_bytes, source))
        for places in self._places:
            places.sort(key=lambda entry: entry[0])

    def write(self, extent: plan.Extent) -> Chunk:
        from blake3 import blake3

        raw = self._gather(extent)
        raw_hash = str(blake3(raw).hexdigest())
        item_bytes = self._layout.segments[extent.segment].item_bytes
        known = self._known.get((raw_hash, item_bytes, extent.length_bytes))
        if known is not None:
            self.reused_bytes += known.stored_bytes
            return known._replace(segment=extent.segment, offset_bytes=extent.offset_bytes)
        codec = self._codec(extent.segment, raw, item_bytes)
        stored, parameters = encoder(codec, level=self._encoding.level).encode(raw, item_bytes=item_bytes)
        if len(stored) >= len(raw):
            codec, stored, parameters = "raw", raw, {}
        blob = str(blake3(stored).hexdigest())
        written = self._repository.put_blob(blob, stored)
        if str(blake3(self._gather(extent)).hexdigest()) != raw_hash:
            raise StateChangedError("bytes of the state changed while they were copied", snapshot=self._capture.name)
        self.written_bytes += len(stored) if written else 0
        self.reused_bytes += 0 if written else len(stored)
        return Chunk(
            extent.segment, extent.offset_bytes, extent.length_bytes, raw_hash, codec, parameters, blob, len(stored)
        )

    def _codec(self, segment: int, raw: memoryview, item_bytes: int) -> str:
        """Chosen once per segment, from a sample of its first chunk."""
        if segment not in self._codecs:
            self._codecs[segment] = choose(raw, item_bytes=item_bytes, setting=self._encoding.codec)
        return self._codecs[segment]

    def _gather(self, extent: plan.Extent) -> memoryview:
        """The raw bytes of a chunk: a view of live memory where one item fills it, else a copy with zeroed padding."""
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
            if not len(gathered):
                gathered = memoryview(bytearray(extent.length_bytes))
            gathered[begin - extent.offset_bytes : stop - extent.offset_bytes] = piece
        return gathered


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
