"""Capturing: a surveyed state and its files, chunk by chunk, into a store; the manifest last.

One thread, off the request path: ``pace()`` is called before every chunk and may wait while events are served. What is
hashed, encoded and sent is a copy (``coldstart.save`` does that, in a process of its own where it can), so that a blob
is always what its name says. Weights and files are hashed once more when all is copied: if any of them is not what was
copied, the generation is dropped. Of buffers that are declared to change, each chunk is of one moment: it is hashed before
its copy is.

Where GPUs are to have chunks in a form of their own, that is made after (``capture_forms``), and before the second look.

Chunks that the parent generation has are not encoded or sent again, nor is any blob that the store holds and that may
be relied on. Nothing here makes the generation current: that is ``Repository.publish``, after the proof.
"""

from __future__ import annotations

import bisect
import os
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from coldstart import others, plan
from coldstart.capture_forms import Forms, Known, save_forms
from coldstart.capture_sources import files_of, is_replaced, sources_of
from coldstart.codecs import ANS, FOR_DEVICES, check_setting
from coldstart.commit import confirm, has_to_settle
from coldstart.errors import CaptureError, StateChangedError
from coldstart.kernel_caches.merging import as_addition_to, with_kernels_of, with_record
from coldstart.manifest import FORMS, Buffer, Chunk, FileEntry, Manifest
from coldstart.programs.record import to_json
from coldstart.save import IN_THREAD, Task, Terms, open_saver
from coldstart.save.base import STOPPED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from coldstart.caches import FileSource
    from coldstart.capture_sources import Source
    from coldstart.frameworks import Survey
    from coldstart.kernel_caches.packing import Packed
    from coldstart.manifest import Form, KeyRecord, Pool, PoolArray, Segment
    from coldstart.plan import Extent, Layout
    from coldstart.programs.placing import Placed
    from coldstart.repository import Repository
    from coldstart.save import Saved, Saving
    from coldstart.save.device import DeviceChunks, Part
    from coldstart.save.device_forms import DeviceForms


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
    program: Placed | None = None
    """A program to be stored with it, for this platform; those of other platforms are kept as the parent has them."""
    outside: Callable[[str], bool] | None = None
    """Whether the array at a path is needed beside the program: what ``build`` makes around it. None: none is."""
    pools: tuple[Pool, ...] = ()
    """Memory beside the state, which is listed and not stored; and which of it are arrays."""
    pool_arrays: tuple[PoolArray, ...] = ()
    kernels: Packed | None = None
    """Kernel caches that this start has added; those that the parent has are kept."""


class Encoding(NamedTuple):
    """How chunks are stored: a codec's id, ``auto`` or ``codecs.ANS``, and the level of those that have one."""

    codec: str
    level: int

    @property
    def own(self) -> str:
        """How the form is chosen that a chunk has on all machines."""
        return "auto" if self.codec == ANS else self.codec


class Written(NamedTuple):
    """A generation that is complete in the store and not current yet.

    ``unsettled``: blobs that a collector may have decided to delete just before; see ``Writing.confirm``.
    """

    manifest: Manifest
    manifest_key: str
    written_bytes: int
    reused_bytes: int
    unsettled: frozenset[str] = frozenset()


class Writing:
    """A generation that is being written: what to capture, where it lies, and who saves it."""

    def __init__(
        self,
        capture: Capture,
        repository: Repository,
        *,
        encoding: Encoding,
        saving: Saving = IN_THREAD,
        stopping: threading.Event | None = None,
    ) -> None:
        """Raises CaptureError for a file that went away, ConfigError for a codec that is not for this device.

        The caller calls ``end``, whatever happens.
        """
        check_setting(encoding.codec, capture.device_type)
        self._capture = capture
        self._has_forms = encoding.codec == ANS
        self._sources = sources_of(capture)
        self._layout = plan.layout([source.item for source in self._sources], parent=capture.parent)
        self._chunks = _Chunks(self._layout, self._sources)
        self._stopping = stopping or threading.Event()
        self._terms = _terms(capture, self._layout, encoding, has_replicas=len(repository.store.stores) > 1)
        self.saver = open_saver(saving, self._terms, repository, self._stopping)

    def write(self, pace: Callable[[], None]) -> Written:
        """Write the blobs and the manifest.

        Raises StateChangedError when bytes change while they are copied, CaptureError for a file that went away and once
        ``stopping`` is set, ManifestError for a state or files that the format has no room for, StoreError.
        """
        extents = self._layout.chunks
        try:
            saved = self.saver.save(self._tasks(extents, pace))
            forms = self._save_forms(saved, pace)
            lasting = [is_lasting(self._layout.segments[extent.segment]) for extent in extents]
            hashes = self.saver.hashes(
                self._tasks([extent for extent, lasts in zip(extents, lasting, strict=True) if lasts], pace)
            )
        except StateChangedError as error:
            raise StateChangedError(str(error), snapshot=self._capture.name) from error
        if hashes != [found.raw_hash for found, lasts in zip(saved, lasting, strict=True) if lasts]:
            raise StateChangedError("bytes of the state changed while they were copied", snapshot=self._capture.name)
        chunks = tuple(_chunk(extent, found) for extent, found in zip(extents, saved, strict=True))
        manifest = _manifest(self._capture, self._layout, self._sources, chunks, forms.forms)
        key = self.saver.repository.put_manifest(manifest)
        stored = (*saved, *forms.saved)
        written_bytes = sum(found.stored_bytes for found in stored if found.is_written)
        reused_bytes = sum(found.stored_bytes for found in stored if not found.is_written)
        self._written_seconds = time.monotonic()
        unsettled = frozenset(found.blob for found in stored if not found.is_settled)
        return Written(manifest, key, written_bytes, reused_bytes, unsettled)

    def _save_forms(self, saved: Sequence[Saved], pace: Callable[[], None]) -> Forms:
        """The forms of chunks in device memory, if there are to be any."""
        if not self._has_forms:
            return Forms()
        parent, terms = self._capture.parent, self._terms
        forms = plan.known_forms(parent, FOR_DEVICES[0]) if parent is not None and terms.known else {}
        chunks = {
            index: (extent, self._layout.segments[extent.segment].item_bytes, found)
            for index, (extent, found) in enumerate(zip(self._layout.chunks, saved, strict=True))
            if self._chunks.is_on_device(extent)
        }
        return save_forms(chunks, Known(forms, terms.known_stays), self._chunks.encoded, self.saver, pace)

    def confirm(self, written: Written) -> None:
        """Look at what was written once more, just before the ref moves; see ``coldstart.commit``, and its errors.

        Raises CaptureError once ``stopping`` is set.
        """
        repository = self.saver.repository
        parent, parent_key = self._capture.parent, self._capture.parent_key
        if has_to_settle(repository, written.unsettled, parent=parent, parent_key=parent_key):
            since_seconds = time.monotonic() - self._written_seconds
            if self._stopping.wait(max(0.0, repository.settle_seconds - since_seconds)):
                raise CaptureError(STOPPED)
        replaced = self._capture.parent if is_replaced(self._capture) and not self._capture.mends else None
        confirm(repository, written.manifest, written.manifest_key, replaced=replaced)

    def _tasks(self, extents: Sequence[Extent], pace: Callable[[], None]) -> Iterator[Task]:
        for extent in extents:
            pace()
            yield self._chunks.task(extent)


def write_generation(
    capture: Capture,
    repository: Repository,
    *,
    encoding: Encoding,
    pace: Callable[[], None],
    saving: Saving = IN_THREAD,
) -> Written:
    """Write the blobs and the manifest of a new generation: all of ``Writing`` at once, with its errors."""
    writing = Writing(capture, repository, encoding=encoding, saving=saving)
    try:
        return writing.write(pace)
    finally:
        writing.saver.end()


class _Chunks:
    """Where the bytes of every chunk are."""

    def __init__(self, layout: Layout, sources: Sequence[Source]) -> None:
        self._segments = layout.segments
        self._largest_bytes = max((extent.length_bytes for extent in layout.chunks), default=0)
        self._on_device: DeviceChunks | None = None
        self._encoder: DeviceForms | None = None
        self._places: list[list[tuple[int, Source]]] = [[] for _ in layout.segments]
        for source, place in zip(sources, layout.places, strict=True):
            if source.item.length_bytes:
                self._places[place.segment].append((place.offset_bytes, source))
        for places in self._places:
            places.sort(key=lambda entry: entry[0])

    def task(self, extent: Extent) -> Task:
        """The chunk, to be saved or looked at again."""
        segment, length_bytes = self._segments[extent.segment], extent.length_bytes
        pieces: Callable[[], Iterator[memoryview]] = partial(self._pieces, extent)
        raw_hash = None
        parts = self._parts(extent)
        if parts:
            chunks = self._device_chunks(extent)
            pieces, raw_hash = partial(chunks.read, parts, length_bytes), partial(chunks.raw_hash, parts, length_bytes)
        return Task(extent.segment, segment.item_bytes, length_bytes, is_lasting(segment), pieces, raw_hash)

    def is_on_device(self, extent: Extent) -> bool:
        """Whether all of a chunk's bytes are in a GPU's memory."""
        return bool(self._parts(extent))

    def encoded(self, extent: Extent, saved: Saved) -> Task | None:
        """A chunk in device memory, to be saved in a further form; None where that is not worth it."""
        if self._encoder is None:
            from coldstart.save.device_forms import DeviceForms

            self._encoder = DeviceForms(self._device_chunks(extent), self._largest_bytes)
        return self._encoder.task(self._parts(extent), self.task(extent), raw_hash=saved.raw_hash)

    def _parts(self, extent: Extent) -> list[Part]:
        """Where the bytes of a chunk are in device memory; nothing where they are not, or not all."""
        slices = list(self._slices(extent))
        if any(each.source.on_device is None for each in slices):
            return []
        return [_device_part(extent, each) for each in slices]

    def _device_chunks(self, extent: Extent) -> DeviceChunks:
        """What reads chunks off the GPU, made with the first of them."""
        if self._on_device is None:
            from coldstart.devices.cuda_driver import open_gpu
            from coldstart.save.device import DeviceChunks

            source = next(self._slices(extent)).source
            assert source.on_device is not None
            self._on_device = DeviceChunks(open_gpu(source.on_device.ordinal), self._largest_bytes)
        return self._on_device

    def _pieces(self, extent: Extent) -> Iterator[memoryview]:
        """The raw bytes of a chunk as they are now: views of live memory, and zeros between them."""
        position, end = extent.offset_bytes, extent.offset_bytes + extent.length_bytes
        for each in self._slices(extent):
            yield from _padding(each.place_bytes - position)
            yield each.source.read(each.begin, each.end)
            position = each.place_bytes + each.end - each.begin
        yield from _padding(end - position)

    def _slices(self, extent: Extent) -> Iterator[_Slice]:
        """The parts of sources that a chunk is made of, in order."""
        places = self._places[extent.segment]
        position, end = extent.offset_bytes, extent.offset_bytes + extent.length_bytes
        index = max(0, bisect.bisect_right(places, position, key=lambda entry: entry[0]) - 1)
        for offset, source in places[index:]:
            if offset >= end:
                break
            begin, stop = max(position, offset), min(end, offset + source.item.length_bytes)
            if begin < stop:
                yield _Slice(source, begin, begin - offset, stop - offset)
                position = stop


class _Slice(NamedTuple):
    """Bytes ``begin`` to ``end`` of a source, which lie from ``place_bytes`` on in their segment."""

    source: Source
    place_bytes: int
    begin: int
    end: int


def _device_part(extent: Extent, each: _Slice) -> Part:
    from coldstart.save.device import Part

    assert each.source.on_device is not None
    address = each.source.on_device.address + each.begin
    return Part(each.place_bytes - extent.offset_bytes, address, each.end - each.begin)


def _padding(length_bytes: int) -> Iterator[memoryview]:
    if length_bytes:
        yield memoryview(bytes(length_bytes))


def is_lasting(segment: Segment) -> bool:
    """Whether the segment's bytes must be the same when all is copied: weights and files. Other kinds are declared to change."""
    return segment.kind == "weights" or segment.consumer not in (plan.EAGER, plan.BOTH)


def _terms(capture: Capture, layout: Layout, encoding: Encoding, *, has_replicas: bool) -> Terms:
    """The terms; with replicas, which may lack what the parent names, every chunk of the parent is looked for."""
    lengths = [extent.length_bytes for extent in layout.chunks]
    return Terms(
        codec=encoding.own,
        level=encoding.level,
        known=plan.known_chunks(capture.parent) if capture.parent is not None and not capture.mends else {},
        known_stays=is_replaced(capture) and not has_replicas,
        relies_on_stored=not capture.mends,
        raw_bytes=sum(lengths),
        largest_bytes=max(lengths, default=0),
        device_segments=tuple(sorted(layout.device_segments)),
    )


def _chunk(extent: Extent, saved: Saved) -> Chunk:
    return Chunk(
        extent.segment,
        extent.offset_bytes,
        extent.length_bytes,
        saved.raw_hash,
        saved.codec,
        saved.parameters,
        saved.blob,
        saved.stored_bytes,
    )


def _manifest(
    capture: Capture,
    layout: Layout,
    sources: Sequence[Source],
    chunks: tuple[Chunk, ...],
    forms: tuple[Form, ...],
) -> Manifest:
    sources_in_places = list(zip(sources, layout.places, strict=True))
    buffers = tuple(
        Buffer(source.item.name, source.item.kind, place.segment, place.offset_bytes, source.item.length_bytes)
        for source, place in sources_in_places
        if not source.item.is_file
    )
    places_of_files = [place for source, place in sources_in_places if source.item.is_file]
    lengths = [source.item.length_bytes for source in sources if source.item.is_file]
    files = tuple(
        FileEntry(file.root, file.name, _mode(file.path), place.segment, place.offset_bytes, length_bytes)
        for file, place, length_bytes in zip(files_of(capture), places_of_files, lengths, strict=True)
    )
    survey, placed = capture.survey, capture.program
    manifest = Manifest(
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
        pools=capture.pools + (placed.pools if placed is not None else ()),
        pool_arrays=capture.pool_arrays,
        tree=None if survey is None else survey.tree,
        modules={} if survey is None else dict(survey.modules),
        programs=(to_json(placed.program),) if placed is not None else (),
        platform={},
        provenance=dict(capture.provenance),
        warmup_digests=capture.warmup_digests,
        requires=(FORMS,) if forms else (),
        signature="",
        extra={},
        host_segments=_host_segments(capture, layout),
        forms=forms,
    )
    if capture.parent is None or not is_replaced(capture):
        return with_record(manifest, capture.kernels)
    if placed is not None:
        manifest = others.with_programs_of(manifest, capture.parent, placed.program.id)
    return _with_kernels(manifest, capture, capture.parent)


def _with_kernels(manifest: Manifest, capture: Capture, parent: Manifest) -> Manifest:
    """The manifest with the parent's kernel caches too, unless the parent could not be read."""
    manifest = with_record(manifest, capture.kernels)
    if capture.kernels is not None and capture.kernels.alone:
        return as_addition_to(parent, manifest)
    return manifest if capture.mends else with_kernels_of(manifest, parent)


def _host_segments(capture: Capture, layout: Layout) -> tuple[int, ...]:
    """Named only where the device has memory of its own: on a CPU all segments are the host's."""
    if capture.device_type == "cpu":
        return ()
    return tuple(index for index in range(len(layout.segments)) if index not in layout.device_segments)


def _mode(path: str) -> int:
    return 0o755 if os.access(path, os.X_OK) else 0o644
