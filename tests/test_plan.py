"""The layout of segments and chunks: that it is exact, and that what did not change keeps its chunks."""

from __future__ import annotations

import bisect
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.manifest import (
    MAX_CHUNK_BYTES,
    NO_BUFFER,
    SEGMENT_ALIGNMENT_BYTES,
    Buffer,
    Chunk,
    FileEntry,
    KeyRecord,
    Leaf,
    Manifest,
    manifest_from_json,
    manifest_to_json,
)
from coldstart.plan import (
    BOTH,
    EAGER,
    FILES,
    LOAD,
    TINY_BYTES,
    Item,
    fetch_order,
    file_item_name,
    known_chunks,
    layout,
    needed,
    target_chunk_bytes,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def transformer(layers: int = 24, width: int = 1536, vocabulary: int = 32_000) -> list[Item]:
    """A decoder of about a GiB in bf16, in first-use order, with a few files: what a snapshot usually holds."""
    shapes = [("embed.weight", vocabulary * width)]
    for layer in range(layers):
        name = f"layers.{layer}"
        shapes += [(f"{name}.norm1.weight", width), (f"{name}.norm1.bias", width)]
        shapes += [(f"{name}.attention.{part}.weight", width * width) for part in "qkvo"]
        shapes += [(f"{name}.attention.{part}.bias", width) for part in "qkvo"]
        shapes += [(f"{name}.norm2.weight", width), (f"{name}.norm2.bias", width)]
        shapes += [(f"{name}.up.weight", 4 * width * width), (f"{name}.down.weight", 4 * width * width)]
    shapes += [("norm.weight", width), ("head.weight", vocabulary * width)]
    items = [Item(name, 2 * count, 2, "weights") for name, count in shapes]
    files = [("tokenizer.json", 2 * MIB), ("config.json", 700), ("vocab.txt", 230_000)]
    return items + [Item(file_item_name("FILES", name), size, 1, "other", FILES, is_file=True) for name, size in files]


def contents(items, plan, version=None) -> list[tuple]:
    """What each chunk's bytes depend on: its pieces of items, each with where it starts and the item's version."""
    version = version or {}
    starts = [(chunk.segment, chunk.offset_bytes) for chunk in plan.chunks]
    pieces = [[] for _ in plan.chunks]
    for place, item in sorted(zip(plan.places, items, strict=True)):
        index, end = bisect.bisect_right(starts, place) - 1, (place.segment, place.offset_bytes + item.length_bytes)
        while item.length_bytes and index < len(starts) and starts[index] < end:
            begin = max(0, starts[index][1] - place.offset_bytes)
            pieces[index].append((item.name, begin, version.get(item.name)))
            index += 1
    return [
        (chunk.length_bytes, plan.segments[chunk.segment].item_bytes, tuple(held))
        for chunk, held in zip(plan.chunks, pieces, strict=True)
    ]


def dirty_part(items, plan, before: list[tuple], version=None) -> float:
    """Part of the bytes in chunks that the generation before did not have."""
    new = [content for content in contents(items, plan, version) if content not in set(before)]
    return sum(length for length, _, _ in new) / sum(chunk.length_bytes for chunk in plan.chunks)


def manifest_of(items, plan, hashes=None, codec="raw") -> Manifest:
    """A manifest with this layout, checked by the reader as a stored one would be."""
    hashes = hashes or [f"{hash(content) & (1 << 256) - 1:064x}" for content in contents(items, plan)]
    placed = list(zip(items, plan.places, strict=True))
    manifest = Manifest(
        name="plan",
        generation=1,
        parent="",
        created_seconds=0.0,
        rung="arrays",
        device_type="cpu",
        key=KeyRecord("0" * 32, {}),
        segments=plan.segments,
        buffers=tuple(
            Buffer(item.name, plan.segments[place.segment].kind, *place, item.length_bytes)
            for item, place in placed
            if not item.is_file
        ),
        leaves=(),
        files=tuple(
            FileEntry(*item.name.split("/", 1), 0o644, *place, item.length_bytes)
            for item, place in placed
            if item.is_file
        ),
        chunks=tuple(
            Chunk(*chunk, raw_hash, codec, {}, f"{index:064x}", chunk.length_bytes)
            for index, (chunk, raw_hash) in enumerate(zip(plan.chunks, hashes, strict=True))
        ),
        pools=(),
        tree=None,
        modules={},
        programs=(),
        platform={},
        provenance={},
        warmup_digests=(),
        requires=(),
        signature="",
        extra={},
    )
    return manifest_from_json(manifest_to_json(manifest))


sizes = st.one_of(
    st.integers(0, 2000),
    st.integers(1, 2 * TINY_BYTES),
    st.integers(1, 12 * MIB),
    st.sampled_from(
        [0, 1, 255, 256, 257, TINY_BYTES, TINY_BYTES + 1, 2 * MIB, 4 * MIB, 4 * MIB + 1, 8 * MIB, 8 * MIB + 1]
    ),
)


@st.composite
def item_lists(draw, prefix: str = "") -> list[Item]:
    """Buffers and files of every group and size, those at the edges of the rules above all."""
    items = []
    for index in range(draw(st.integers(0, 60))):
        is_file = draw(st.integers(0, 5)) == 0
        name = f"{prefix}{index}"
        items.append(
            Item(
                file_item_name("FILES", name) if is_file else name,
                draw(sizes),
                draw(st.sampled_from([1, 2, 4, 16])),
                draw(st.sampled_from(["weights", "other"])),
                draw(st.sampled_from(["eager", "both"])),
                is_file=is_file,
            )
        )
    return items


def assert_sound(items, plan):
    """What every layout must be, whatever the items."""
    assert len(plan.places) == len(items)
    ends = [0] * len(plan.segments)
    for chunk in plan.chunks:
        assert chunk.offset_bytes == ends[chunk.segment]
        assert 0 < chunk.length_bytes <= MAX_CHUNK_BYTES
        assert chunk.offset_bytes % SEGMENT_ALIGNMENT_BYTES == 0
        ends[chunk.segment] += chunk.length_bytes
    assert ends == [segment.length_bytes for segment in plan.segments]
    assert [chunk.segment for chunk in plan.chunks] == sorted(chunk.segment for chunk in plan.chunks)
    extents = []
    for item, place in zip(items, plan.places, strict=True):
        segment = plan.segments[place.segment]
        own = (1, "other", item.consumer) if item.is_file else (item.item_bytes, item.kind, item.consumer)
        assert segment[:3] == own
        assert place.offset_bytes % SEGMENT_ALIGNMENT_BYTES == 0
        assert place.offset_bytes + item.length_bytes <= segment.length_bytes
        if item.length_bytes:
            extents.append((place.segment, place.offset_bytes, place.offset_bytes + item.length_bytes))
    extents.sort()
    assert all(one[0] != two[0] or one[2] <= two[1] for one, two in itertools.pairwise(extents))
    assert len({segment[:3] for segment in plan.segments}) == len(plan.segments)


@given(item_lists())
def test_chunks_tile_segments_and_items_are_aligned(items):
    """Every byte of a segment is in one chunk, every item at an aligned offset of its own in the segment of its group."""
    plan = layout(items)
    assert_sound(items, plan)
    assert plan == layout(items)
    assert manifest_of(items, plan).segments == plan.segments


@given(item_lists(), item_lists("new"), st.randoms(use_true_random=False))
def test_a_later_generation_is_as_sound(items, new, random):
    """With a parent, items that stayed, went and came are laid out as exactly as without one."""
    parent = manifest_of(items, layout(items))
    later = [item for item in items if random.random() < 0.8]
    random.shuffle(later)
    later += new
    assert_sound(later, layout(later, parent=parent))


@given(item_lists())
def test_no_chunk_mixes_what_changes_apart(items):
    """A chunk is a slice of one large item or whole small ones, and tiny items are in chunks of their own."""
    plan = layout(items)
    by_name = {item.name: item for item in items}
    for length, _, pieces in contents(items, plan):
        members = [by_name[name] for name, _, _ in pieces]
        assert len(members) == 1 or all(
            item.length_bytes <= length and start == 0 for item, (_, start, _) in zip(members, pieces, strict=True)
        )
        assert len({item.length_bytes <= TINY_BYTES for item in members}) == 1


@given(item_lists(), st.randoms(use_true_random=False))
def test_the_order_of_the_parent_is_kept(items, random):
    """The same items in any order give the parent's layout again, chunk for chunk."""
    plan = layout(items)
    parent = manifest_of(items, plan)
    shuffled = list(items)
    random.shuffle(shuffled)
    again = layout(shuffled, parent=parent)
    assert set(contents(shuffled, again)) == set(contents(items, plan))


def test_new_items_lie_behind_those_of_the_parent():
    """What a later generation adds comes last in its segment, wherever the model has it."""
    items = [Item(name, MIB, 4, "weights") for name in "abc"]
    parent = manifest_of(items, layout(items))
    later = [Item("new", MIB, 4, "weights"), items[2], Item("newer", MIB, 4, "weights"), items[1]]
    places = dict(zip(("new", "c", "newer", "b"), layout(later, parent=parent).places, strict=True))
    assert sorted(places, key=places.__getitem__) == ["b", "c", "new", "newer"]


def test_empty_items_do_not_move_the_ends_of_runs():
    """Items without bytes share their place with the next one and still leave the parent's chunks as they are."""
    items = [Item(f"{index * 7919 % 1000}", 0 if index % 2 else 60 * KIB, 4, "weights") for index in range(900)]
    plan = layout(items)
    assert len(plan.chunks) > 5
    again = layout(items[::-1], parent=manifest_of(items, plan))
    assert contents(items[::-1], again) == contents(items, plan)


def test_items_lie_in_first_use_order():
    """Within a segment items keep the order given, tiny ones behind the others."""
    items = [
        Item("a", 100, 4, "weights"),
        Item("b", MIB, 4, "weights"),
        Item("c", 8, 4, "weights"),
        Item("d", 5 * MIB, 4, "weights"),
    ]
    plan = layout(items)
    assert sorted("abcd", key=lambda name: plan.places["abcd".index(name)]) == ["b", "d", "a", "c"]


@pytest.mark.parametrize(
    ("expected", "total"),
    [(4 * MIB, 0), (4 * MIB, GIB), (8 * MIB, GIB + 1), (8 * MIB, 2 * GIB), (16 * MIB, 3 * GIB), (16 * MIB, 1 << 42)],
)
def test_chunk_size_follows_the_total(expected, total):
    """A power of two near 1/256 of the total, from 4 to 16 MiB."""
    assert target_chunk_bytes(total) == expected


@pytest.mark.parametrize("size", [4 * MIB + 1, 6 * MIB, 8 * MIB, 8 * MIB + 1, 13 * MIB, 200 * MIB + 3])
def test_large_items_are_cut_without_scraps(size):
    """Slices are the target or, the last two, at least about half of it; growing the item keeps the first ones."""
    lengths = [chunk.length_bytes for chunk in layout([Item("a", size, 2, "weights")]).chunks]
    assert all(2 * MIB <= length <= 4 * MIB for length in lengths)
    assert set(lengths[:-2]) <= {4 * MIB}
    assert abs(lengths[-2] - lengths[-1]) <= SEGMENT_ALIGNMENT_BYTES


def test_small_items_make_chunks_of_a_useful_size():
    """Ten thousand small buffers become few chunks, each between half of the target and all of it but the last."""
    items = [Item(f"layer.{index}.weight", 3000 + index, 4, "weights") for index in range(10_000)]
    lengths = [chunk.length_bytes for chunk in layout(items).chunks]
    assert all(2 * MIB <= length <= 4 * MIB for length in lengths[:-1])


def test_a_small_change_dirties_few_bytes():
    """1 % of the bytes changed in one place dirties at most 5 % of them, wherever the place is."""
    items = transformer()
    plan = layout(items)
    total = sum(segment.length_bytes for segment in plan.segments)
    assert 0.8 * GIB < total < 1.6 * GIB
    segment = max(range(len(plan.segments)), key=lambda index: plan.segments[index].length_bytes)
    span, length = total // 100, plan.segments[segment].length_bytes
    for begin in range(0, length - span, 3 * MIB + 7):
        touched = [
            chunk.length_bytes
            for chunk in plan.chunks
            if chunk.segment == segment
            and chunk.offset_bytes < begin + span
            and chunk.offset_bytes + chunk.length_bytes > begin
        ]
        assert sum(touched) <= 0.05 * total


def test_changed_norms_dirty_few_bytes():
    """All norms and biases changed dirties at most 1 % of the bytes."""
    items = transformer()
    plan = layout(items)
    changed = {item.name: 2 for item in items if "norm" in item.name or item.name.endswith(".bias")}
    assert len(changed) == 193
    assert 0 < dirty_part(items, plan, contents(items, plan), changed) <= 0.01


@pytest.mark.parametrize("size", [4, 4 * KIB, 100 * KIB])
@pytest.mark.parametrize("place", [0, 1, 100, -1])
def test_an_inserted_tensor_dirties_few_bytes(place, size):
    """A small tensor that a later generation has, wherever in the model, dirties at most 1 % of the bytes."""
    items = transformer()
    before = layout(items)
    later = list(items)
    later.insert(place, Item("adapter.weight", size, 2, "weights"))
    plan = layout(later, parent=manifest_of(items, before))
    assert 0 < dirty_part(later, plan, contents(items, before)) <= 0.01


@pytest.mark.parametrize(
    "name", ["layers.0.norm1.bias", "layers.7.attention.q.weight", "layers.12.up.weight", "embed.weight"]
)
def test_a_removed_tensor_dirties_few_bytes(name):
    """A tensor that a later generation lacks dirties its neighbours at most."""
    items = transformer()
    before = layout(items)
    later = [item for item in items if item.name != name]
    plan = layout(later, parent=manifest_of(items, before))
    assert dirty_part(later, plan, contents(items, before)) <= 0.01


def test_removals_move_few_runs():
    """Among thousands of small items, a removed one changes a few chunks and not all behind it, parent or no parent."""
    items = [
        Item(f"encoder.layer.{index // 16}.part{index % 16}.weight", 100 * KIB, 4, "weights") for index in range(4000)
    ]
    before = layout(items)
    worst = []
    for removed in range(0, 4000, 97):
        later = items[:removed] + items[removed + 1 :]
        worst.append(dirty_part(later, layout(later), contents(items, before)))
    assert max(worst) <= 0.1
    assert sum(worst) / len(worst) <= 0.03


def test_a_grown_table_keeps_its_first_slices():
    """Rows appended to an embedding dirty its end only."""
    items = [Item("embed", 100 * MIB, 2, "weights"), Item("rest", 900 * MIB, 2, "weights")]
    before = layout(items)
    later = [items[0]._replace(length_bytes=100 * MIB + 6000), items[1]]
    plan = layout(later, parent=manifest_of(items, before))
    assert dirty_part(later, plan, contents(items, before)) <= 0.02


def test_the_chunk_size_does_not_flip_with_the_total():
    """Crossing a power of two by one small tensor keeps the parent's chunks; a snapshot that doubled gets its own."""
    items = [Item("a", GIB - 256, 2, "weights"), Item("b", 256, 2, "weights")]
    before = layout(items)
    later = [*items, Item("c", 256, 2, "weights")]
    plan = layout(later, parent=manifest_of(items, before))
    assert dirty_part(later, plan, contents(items, before)) <= 0.01
    doubled = [*later, Item("d", 2 * GIB, 2, "weights")]
    lengths = {chunk.length_bytes for chunk in layout(doubled, parent=manifest_of(items, before)).chunks}
    assert 16 * MIB in lengths


def test_chunks_of_an_unchanged_generation_are_known():
    """Every chunk of the parent is found again by hash, item size and length, with the parent's blob."""
    items = transformer(layers=2)
    plan = layout(items)
    parent = manifest_of(items, plan)
    known = known_chunks(parent)
    for chunk in parent.chunks:
        item_bytes = parent.segments[chunk.segment].item_bytes
        assert known[chunk.raw_hash, item_bytes, chunk.length_bytes].blob == chunk.blob
        assert (chunk.raw_hash, item_bytes * 2, chunk.length_bytes) not in known


def test_chunks_of_an_unknown_codec_are_written_again():
    """What this coldstart could not read back is not carried into a generation of its own."""
    items = transformer(layers=2)
    parent = manifest_of(items, layout(items), codec="of-the-future/9")
    assert known_chunks(parent) == {}


def test_files_are_fetched_first():
    """Chunks of files come before all others, each group in the order of the manifest."""
    items = transformer(layers=2)
    manifest = manifest_of(items, layout(items))
    order = fetch_order(manifest)
    assert sorted(order) == list(range(len(manifest.chunks)))
    files = [index for index in order if manifest.segments[manifest.chunks[index].segment].consumer == "files"]
    assert files
    assert order == files + [index for index in range(len(manifest.chunks)) if index not in files]


def test_a_file_and_a_buffer_may_share_a_name():
    """A buffer named like a file keeps its own place in the parent's order."""
    items = [
        Item("FILES/a", 100, 1, "weights"),
        Item("z", 100, 1, "weights"),
        Item("FILES/z", 10, 1, "other", is_file=True),
        Item("FILES/a", 10, 1, "other", is_file=True),
    ]
    before = layout(items)
    later = layout(items[::-1], parent=manifest_of(items, before))
    assert later.places[::-1] == before.places


# --- what one start needs ---------------------------------------------------------------------------------------------

PROGRAMS = ("program_0", "program_1")


@st.composite
def generations_with_programs(draw) -> Manifest:
    """A stored generation with arrays and files for every kind of start; some arrays have no leaf, or two, or no bytes."""
    items = []
    for index in range(draw(st.integers(0, 30))):
        is_file = draw(st.booleans())
        consumers = (FILES, LOAD, *PROGRAMS) if is_file else (EAGER, BOTH, *PROGRAMS)
        name = file_item_name("FILES", str(index)) if is_file else str(index)
        consumer = draw(st.sampled_from(consumers))
        items.append(Item(name, draw(sizes) // 8, 1, "other" if is_file else "weights", consumer, is_file))
    manifest = manifest_of(items, layout(items))
    leaves = [Leaf("empty", "numpy", "array", "uint8", 1, (0,), (1,), NO_BUFFER, 0, requires_grad=False, same_as="")]
    for index, buffer in enumerate(manifest.buffers):
        if buffer.length_bytes and manifest.segments[buffer.segment].consumer in (EAGER, BOTH):
            shape = (buffer.length_bytes,)
            first = Leaf(
                buffer.name, "numpy", "array", "uint8", 1, shape, (1,), index, 0, requires_grad=False, same_as=""
            )
            leaves += [first, first._replace(path=f"tied {buffer.name}", same_as=first.path)][: draw(st.integers(0, 2))]
    return manifest_from_json(manifest_to_json(manifest._replace(leaves=tuple(leaves))))


@given(generations_with_programs(), st.sampled_from(["", *PROGRAMS, "program_of nobody"]))
def test_needed(manifest, program):
    """What one start needs of a generation is a generation for the strict reader: all of what it reads, nothing else."""
    narrowed = needed(manifest, program)
    assert manifest_from_json(manifest_to_json(narrowed)) == narrowed
    wanted = {BOTH, FILES, program} if program else {EAGER, BOTH, FILES, LOAD}

    def wants(segment: int) -> bool:
        return manifest.segments[segment].consumer in wanted

    assert len(narrowed.segments) == len(manifest.segments)
    for index, (whole, kept) in enumerate(zip(manifest.segments, narrowed.segments, strict=True)):
        assert kept == (whole if wants(index) else whole._replace(length_bytes=0))
    assert narrowed.buffers == tuple(buffer for buffer in manifest.buffers if wants(buffer.segment))
    assert narrowed.files == tuple(entry for entry in manifest.files if wants(entry.segment))
    assert narrowed.chunks == tuple(chunk for chunk in manifest.chunks if wants(chunk.segment))
    assert narrowed.raw_bytes == sum(
        segment.length_bytes for index, segment in enumerate(manifest.segments) if wants(index)
    )
    kept = [
        leaf for leaf in manifest.leaves if leaf.buffer == NO_BUFFER or wants(manifest.buffers[leaf.buffer].segment)
    ]
    assert [leaf._replace(buffer=0) for leaf in narrowed.leaves] == [leaf._replace(buffer=0) for leaf in kept]
    for before, after in zip(kept, narrowed.leaves, strict=True):
        if before.buffer != NO_BUFFER:
            assert narrowed.buffers[after.buffer] == manifest.buffers[before.buffer]
    assert narrowed.programs == manifest.programs


@given(generations_with_programs())
def test_needed_by_whoever_needs_all(manifest):
    """A generation of which a start needs everything is that generation itself."""
    if {segment.consumer for segment in manifest.segments} <= {EAGER, BOTH, FILES, LOAD}:
        assert needed(manifest) is manifest
    twice = needed(needed(manifest))
    assert twice == needed(manifest)
