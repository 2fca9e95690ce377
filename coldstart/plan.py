"""Where everything lies in a snapshot: segments, offsets, chunks, and which chunks a parent generation has already.

Arithmetic only. The aim is that what did not change keeps its bytes in chunks that did not change:

- Every item is padded to a multiple of 256 bytes and chunks begin and end where items do, or inside one large
  item, so the bytes of a chunk depend on its own items alone, wherever the segment puts it. Padding is zeros.
- A generation keeps its parent's order and chunk size and appends what is new.
- Tiny items (norms, biases) lie together behind the others: training them all again touches few chunks.
- Where a run of small items ends is decided by the items' names, so that a removed item moves the ends of few runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar
from zlib import crc32

from coldstart.codecs import NAMES
from coldstart.manifest import FORMS, NO_BUFFER, SEGMENT_ALIGNMENT_BYTES, Buffer, Chunk, FileEntry, Form, Segment

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from coldstart.manifest import Leaf, Manifest

_Holder = TypeVar("_Holder", Chunk, Buffer, FileEntry)

MIN_CHUNK_BYTES = 4 << 20
MAX_CHUNK_BYTES = 16 << 20
CHUNKS_PER_SNAPSHOT = 256
TINY_BYTES = 64 << 10
FILES = "files"
"""The consumer of segments with files that every start may read."""
LOAD = "load"
"""The consumer of segments with files that only ``load`` reads: a start with a program goes without."""
EAGER, BOTH = "eager", "both"
"""Consumers of arrays: what only the state's own code needs, and what a program needs too."""


class Item(NamedTuple):
    """A buffer or a file that wants a place. ``name`` is the buffer's name in the manifest, or ``file_item_name``."""

    name: str
    length_bytes: int
    item_bytes: int
    kind: str
    consumer: str = EAGER
    is_file: bool = False
    on_device: bool = False
    """Whether it belongs into the memory of a device that has its own."""


class Place(NamedTuple):
    """Where an item begins."""

    segment: int
    offset_bytes: int


class Extent(NamedTuple):
    """A slice of a segment that becomes a chunk."""

    segment: int
    offset_bytes: int
    length_bytes: int


class Layout(NamedTuple):
    """``places`` are in the order of the items; ``chunks`` in the order of the segments, which they tile exactly."""

    segments: tuple[Segment, ...]
    places: tuple[Place, ...]
    chunks: tuple[Extent, ...]
    device_segments: frozenset[int] = frozenset()
    """Segments of items that belong onto a device; the others are the host's."""


def file_item_name(root: str, name: str) -> str:
    """The name of a file's item."""
    return f"{root}/{name}"


def target_chunk_bytes(total_bytes: int) -> int:
    """The chunk size for a snapshot of ``total_bytes``: the power of two above 1/256 of it, from 4 to 16 MiB."""
    return _clamped(-(-total_bytes // CHUNKS_PER_SNAPSHOT))


def layout(items: Sequence[Item], *, parent: Manifest | None = None) -> Layout:
    """Lay out ``items``, which come in first-use order and have unique names; files and buffers may share one.

    Items that ``parent`` has lie in the parent's order, new ones behind them in the order given.
    """
    target_bytes = _chunk_bytes(items, parent)
    groups: dict[tuple[int, str, str, bool], list[int]] = {}
    for index in _parents_order(items, parent):
        groups.setdefault(_group(items[index]), []).append(index)
    places = [Place(0, 0)] * len(items)
    segments: list[Segment] = []
    chunks: list[Extent] = []
    for number, (group, members) in enumerate(groups.items()):
        tiny_last = sorted(members, key=lambda index: _is_tiny(items[index]))
        length_bytes = 0
        for index in tiny_last:
            places[index] = Place(number, length_bytes)
            length_bytes += _padded(items[index].length_bytes)
        segments.append(Segment(*group[:3], length_bytes=length_bytes))
        chunks += _extents(number, [items[index] for index in tiny_last], target_bytes)
    on_device = frozenset(number for number, group in enumerate(groups) if group[3])
    return Layout(tuple(segments), tuple(places), tuple(chunks), on_device)


def known_chunks(parent: Manifest) -> Mapping[tuple[str, int, int], Chunk]:
    """The parent's chunks by (raw hash, item bytes of their segment, length): a chunk found here need not be written.

    A codec may split items into planes, so equal bytes of other items are another chunk. Chunks of a codec that this
    coldstart does not have are left out: it could not read what it would publish.
    """
    return {
        (chunk.raw_hash, parent.segments[chunk.segment].item_bytes, chunk.length_bytes): chunk
        for chunk in parent.chunks
        if chunk.codec in NAMES
    }


def known_forms(parent: Manifest, codec: str) -> dict[tuple[str, int, int], Form]:
    """The parent's forms of one codec, by the keys of ``known_chunks``."""
    held = ((form, parent.chunks[form.chunk]) for form in parent.forms if form.codec == codec)
    return {
        (chunk.raw_hash, parent.segments[chunk.segment].item_bytes, chunk.length_bytes): form for form, chunk in held
    }


def in_forms(manifest: Manifest, codecs: Collection[str]) -> Manifest:
    """A generation as a device that decodes ``codecs`` fetches it: chunks in such a form, where they have one.

    ``forms`` of the result are what those chunks are stored as otherwise: a fetch goes back to that where it has to. Chunks
    that belong to the host stay as they are.
    """
    chosen = {
        form.chunk: form
        for form in manifest.forms
        if form.codec in codecs and manifest.chunks[form.chunk].segment not in manifest.host_segments
    }
    chunks, forms = list(manifest.chunks), []
    for index, form in chosen.items():
        chunk = chunks[index]
        chunks[index] = form.of(chunk)
        forms.append(Form(index, chunk.codec, chunk.parameters, chunk.blob, chunk.stored_bytes))
    return manifest._replace(chunks=tuple(chunks), forms=tuple(forms))


def fetch_order(manifest: Manifest) -> list[int]:
    """Indices of the chunks in the order to fetch them: files first (``init`` needs them whole), then by segment."""
    holding_files = {entry.segment for entry in manifest.files}
    chunks = manifest.chunks
    return sorted(range(len(chunks)), key=lambda index: chunks[index].segment not in holding_files)


def needed(manifest: Manifest, program_consumer: str = "", kernels_consumer: str = "") -> Manifest:
    """The part of a generation that one start needs, as a manifest of its own: with a program, or without any.

    ``program_consumer`` is the consumer of the program's own segments, ``kernels_consumer`` that of kernel caches. Segments that
    are not needed stay in their places without bytes, so indices of segments are the same; their buffers, leaves and files
    are left out.
    """
    wanted = {BOTH, FILES, program_consumer} if program_consumer else {EAGER, BOTH, FILES, LOAD}
    if kernels_consumer:
        wanted.add(kernels_consumer)
    return without(manifest, [segment.consumer not in wanted for segment in manifest.segments])


def without(manifest: Manifest, drops: Sequence[bool]) -> Manifest:
    """The manifest without what is in some segments, which stay in their places without bytes. ``drops``: one for each."""
    if not any(drops):
        return manifest
    segments = tuple(
        segment._replace(length_bytes=0) if drop else segment
        for segment, drop in zip(manifest.segments, drops, strict=True)
    )
    kept = [index for index, buffer in enumerate(manifest.buffers) if not drops[buffer.segment]]
    places = {NO_BUFFER: NO_BUFFER, **{old: new for new, old in enumerate(kept)}}
    kept_chunks = [index for index, chunk in enumerate(manifest.chunks) if not drops[chunk.segment]]
    numbers = {old: new for new, old in enumerate(kept_chunks)}
    return manifest._replace(
        segments=segments,
        buffers=tuple(manifest.buffers[index] for index in kept),
        leaves=_leaves_in(manifest.leaves, places),
        files=tuple(entry for entry in manifest.files if not drops[entry.segment]),
        chunks=tuple(manifest.chunks[index] for index in kept_chunks),
        forms=tuple(form._replace(chunk=numbers[form.chunk]) for form in manifest.forms if form.chunk in numbers),
    )


def with_segments_of(manifest: Manifest, parent: Manifest, taken: Collection[int]) -> Manifest:
    """The manifest with some of the parent's segments behind its own.

    All that lies in them comes along: chunks in every form, buffers and files. No byte is read.
    """
    segments = sorted(taken)
    places = {old: len(manifest.segments) + new for new, old in enumerate(segments)}
    chunks = [index for index, chunk in enumerate(parent.chunks) if chunk.segment in places]
    numbers = {old: len(manifest.chunks) + new for new, old in enumerate(chunks)}
    forms = tuple(form._replace(chunk=numbers[form.chunk]) for form in parent.forms if form.chunk in numbers)
    return manifest._replace(
        segments=manifest.segments + tuple(parent.segments[index] for index in segments),
        chunks=manifest.chunks + tuple(_moved(parent.chunks[index], places) for index in chunks),
        buffers=manifest.buffers + tuple(_moved(each, places) for each in parent.buffers if each.segment in places),
        files=manifest.files + tuple(_moved(each, places) for each in parent.files if each.segment in places),
        host_segments=manifest.host_segments
        + tuple(places[index] for index in parent.host_segments if index in places),
        forms=manifest.forms + forms,
        requires=manifest.requires if not forms or FORMS in manifest.requires else (*manifest.requires, FORMS),
    )


def _moved(holder: _Holder, places: Mapping[int, int]) -> _Holder:
    return holder._replace(segment=places[holder.segment])


def _leaves_in(leaves: Sequence[Leaf], places: Mapping[int, int]) -> tuple[Leaf, ...]:
    """The leaves whose buffers are still there. One that was the same as a leaf that is gone is gone with it: same buffer."""
    return tuple(leaf._replace(buffer=places[leaf.buffer]) for leaf in leaves if leaf.buffer in places)


def _clamped(bytes_: int) -> int:
    power_of_two = 1 << max(0, bytes_ - 1).bit_length()
    return min(max(power_of_two, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)


def _padded(length_bytes: int) -> int:
    return -(-length_bytes // SEGMENT_ALIGNMENT_BYTES) * SEGMENT_ALIGNMENT_BYTES


def _is_tiny(item: Item) -> bool:
    return item.length_bytes <= TINY_BYTES


def _group(item: Item) -> tuple[int, str, str, bool]:
    if item.is_file:
        return (1, "other", item.consumer, False)
    return (item.item_bytes, item.kind, item.consumer, item.on_device)


def _chunk_bytes(items: Sequence[Item], parent: Manifest | None) -> int:
    """The parent's chunk size, so that a total that crosses a power of two does not move every chunk.

    The size is read off the parent's largest chunk, which is more than half of it. A snapshot that doubled or halved is
    mostly new bytes anyway and gets the size of its own.
    """
    total_bytes = sum(_padded(item.length_bytes) for item in items)
    if parent is not None and parent.chunks and parent.raw_bytes <= 2 * total_bytes <= 4 * parent.raw_bytes:
        return _clamped(max(chunk.length_bytes for chunk in parent.chunks))
    return target_chunk_bytes(total_bytes)


def _parents_order(items: Sequence[Item], parent: Manifest | None) -> list[int]:
    """Indices of ``items``: those of the parent in its order, then the new ones in the order given."""
    if parent is None:
        return list(range(len(items)))
    held = [(buffer.segment, buffer.offset_bytes, buffer.length_bytes, False, buffer.name) for buffer in parent.buffers]
    for entry in parent.files:
        name = file_item_name(entry.root, entry.name)
        held.append((entry.segment, entry.offset_bytes, entry.length_bytes, True, name))
    rank = {(is_file, name): number for number, (*_, is_file, name) in enumerate(sorted(held))}
    return sorted(range(len(items)), key=lambda index: rank.get((items[index].is_file, items[index].name), len(rank)))


def _extents(segment: int, members: Sequence[Item], target_bytes: int) -> Iterator[Extent]:
    """Cut a segment's items into chunks; no chunk holds both tiny items and others."""
    offset_bytes = 0
    for zone in (False, True):
        zone_members = [item for item in members if _is_tiny(item) is zone]
        for length_bytes in _cut(zone_members, target_bytes):
            yield Extent(segment, offset_bytes, length_bytes)
            offset_bytes += length_bytes


def _cut(members: Sequence[Item], target_bytes: int) -> Iterator[int]:
    run: list[Item] = []
    for item in members:
        if item.length_bytes <= target_bytes:
            run.append(item)
        else:
            yield from _runs(run, target_bytes)
            yield from _slices(_padded(item.length_bytes), target_bytes)
            run = []
    yield from _runs(run, target_bytes)


def _slices(length_bytes: int, target_bytes: int) -> Iterator[int]:
    """Slices of one large item. The last two share what is left evenly, so that none is a scrap."""
    while length_bytes > 2 * target_bytes:
        yield target_bytes
        length_bytes -= target_bytes
    first_bytes = _padded(-(-length_bytes // 2))
    yield first_bytes
    yield length_bytes - first_bytes


def _runs(members: Sequence[Item], target_bytes: int) -> Iterator[int]:
    """Runs of whole small items. Items without bytes make no chunk."""
    begin = 0
    while begin < len(members):
        end = _run_end(members, begin, target_bytes)
        length_bytes = sum(_padded(item.length_bytes) for item in members[begin:end])
        if length_bytes:
            yield length_bytes
        begin = end


def _run_end(members: Sequence[Item], begin: int, target_bytes: int) -> int:
    """Where the run from ``begin`` ends: what is left if that fits, else between half of the target and all of it.

    Of the items that it may end with, the one whose name has the smallest hash ends it. When an item is removed, most
    of the same names are candidates in the neighbouring runs, so their ends soon fall together again.
    """
    length_bytes = 0
    candidates: list[tuple[int, int]] = []
    for index in range(begin, len(members)):
        length_bytes += _padded(members[index].length_bytes)
        if length_bytes > target_bytes:
            return min(candidates)[1] if candidates else index
        if 2 * length_bytes >= target_bytes:
            candidates.append((crc32(members[index].name.encode("utf-8", "surrogatepass")), index + 1))
    return len(members)
