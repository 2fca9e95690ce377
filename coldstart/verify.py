"""Verifying a stored generation, in every store that is to hold it; and mending one store from another.

Three levels, each with all of the one before:

- ``structure``: ref and manifest are there, and every blob is, with the length that the manifest says. One HEAD a blob.
- ``sample``: of ``SAMPLE_PART`` of the chunks, and at least of one of each segment and codec, every byte is read, hashed,
  decoded and hashed again; of a form that only devices decode, what it claims is checked instead. Which ones is drawn anew
  each time, so a store that is sampled daily is read in the end.
- ``full``: of all chunks.

Mending copies: a blob whose bytes are what its name says, a manifest that is the one that was read, a ref of a replica as the
primary has it. What is wrong everywhere stays a finding, and nothing is ever deleted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from coldstart.codecs import FOR_DEVICES, codec
from coldstart.errors import BlobCorruptError, CodecError, ManifestError, ObjectMissingError, UsageError
from coldstart.manifest import blob_key, manifest_from_json, ref_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coldstart.manifest import Chunk, Manifest
    from coldstart.stores.base import Store

STRUCTURE, SAMPLE, FULL = LEVELS = ("structure", "sample", "full")
SAMPLE_PART = 0.05
NO_CHUNK = -1
"""Stands for the index of a chunk in findings about the ref or the manifest."""
_AT_ONCE = 4


class Finding(NamedTuple):
    """Something wrong with a chunk: its index in the manifest, its blob, and what it is."""

    chunk: int
    blob: str
    problem: str


class Place(NamedTuple):
    """What is wrong in which of several stores, by its number; 0 is the primary. ``key``: the object that is wrong."""

    store: int
    key: str
    finding: Finding


def verify(
    manifest: Manifest, store: Store, *, level: str = FULL, choose: Callable[[int], float] | None = None
) -> Iterator[Finding]:
    """Look at the chunks of a generation; yields what is wrong, in the manifest's order, so nothing means all is well.

    ``choose`` gives a number in [0, 1) for the index of a chunk, of which those below ``SAMPLE_PART`` are in the sample.
    Raises StoreError when the store itself fails, UsageError for a level that there is not.
    """
    if level not in LEVELS:
        raise UsageError(f"level {level!r} is none of {', '.join(LEVELS)}")
    stored = _stored(manifest)
    read = set(range(len(stored))) if level == FULL else set()
    if level == SAMPLE:
        read = _sample(stored, choose)

    def look(number: int) -> Finding | None:
        index, chunk = stored[number]
        try:
            (_verify_chunk if number in read else _verify_length)(manifest, chunk, store)
        except (BlobCorruptError, CodecError, ObjectMissingError) as error:
            return Finding(index, chunk.blob, str(error))
        return None

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from filter(None, pool.map(look, range(len(stored))))


def _stored(manifest: Manifest) -> list[tuple[int, Chunk]]:
    """All that is stored of a generation: its chunks, then those that have it in another form too, in that form."""
    return [
        *enumerate(manifest.chunks),
        *((form.chunk, form.of(manifest.chunks[form.chunk])) for form in manifest.forms),
    ]


def verify_stores(manifest: Manifest, manifest_key: str, store: Store, *, level: str = FULL) -> Iterator[Place]:
    """Look at a current generation in ``store`` and, if that has replicas, in each of them by itself. Raises StoreError."""
    target = ref_key(manifest.name, manifest.key.digest)
    for number, each in enumerate(store.stores):
        if problem := _manifest_problem(manifest, manifest_key, each):
            yield Place(number, manifest_key, Finding(NO_CHUNK, "", problem))
        if number and _data(each, target) != _data(store.stores[0], target):
            yield Place(
                number, target, Finding(NO_CHUNK, "", "its ref is not the primary's: it names another generation")
            )
        for finding in verify(manifest, each, level=level):
            yield Place(number, blob_key(finding.blob), finding)


def repair(manifest: Manifest, store: Store, places: Sequence[Place]) -> Iterator[Place]:
    """Mend what was found from the other stores, and yield what could not be. Raises StoreError.

    A replica's ref comes last, and only once all that it names is there.
    """
    lacking: set[int] = set()
    for place in sorted(places, key=lambda place: place.key.startswith("refs/")):
        data = None
        if not (place.key.startswith("refs/") and place.store in lacking):
            data = _good_copy(manifest, store.stores, place)
        if data is None:
            lacking.add(place.store)
            yield place
        else:
            store.stores[place.store].put(place.key, data)


def _good_copy(manifest: Manifest, stores: Sequence[Store], place: Place) -> bytes | None:
    if place.key.startswith("refs/"):
        return _data(stores[0], place.key)
    for number, store in enumerate(stores):
        data = None if number == place.store else _data(store, place.key)
        if data is not None and _is_good(manifest, place, data):
            return data
    return None


def _is_good(manifest: Manifest, place: Place, data: bytes) -> bool:
    from blake3 import blake3

    if place.finding.chunk != NO_CHUNK:
        return bool(blake3(data).hexdigest() == place.finding.blob)
    try:
        return manifest_from_json(data) == manifest
    except ManifestError:
        return False


def _manifest_problem(manifest: Manifest, manifest_key: str, store: Store) -> str:
    data = _data(store, manifest_key)
    if data is None:
        return "its manifest is missing"
    try:
        return "" if manifest_from_json(data) == manifest else "its manifest is another one"
    except ManifestError as error:
        return f"its manifest cannot be read: {error}"


def _data(store: Store, key: str) -> bytes | None:
    try:
        return store.get(key).data
    except ObjectMissingError:
        return None


def _sample(stored: Sequence[tuple[int, Chunk]], choose: Callable[[int], float] | None) -> set[int]:
    if choose is None:
        from random import random

        def choose(_: int) -> float:
            return random()  # noqa: S311  a sample

    drawn = {index: choose(index) for index in range(len(stored))}
    least: dict[tuple[int, str], int] = {}
    for index, (_, chunk) in enumerate(stored):
        kind = (chunk.segment, chunk.codec)
        least[kind] = min(least.get(kind, index), index, key=drawn.__getitem__)
    return {index for index, number in drawn.items() if number < SAMPLE_PART} | set(least.values())


def _verify_length(_: Manifest, chunk: Chunk, store: Store) -> None:
    _check_length(chunk, store.head(blob_key(chunk.blob)).size_bytes)


def _verify_chunk(manifest: Manifest, chunk: Chunk, store: Store) -> None:
    from blake3 import blake3

    stored = memoryview(store.get(blob_key(chunk.blob)).data)
    _check_length(chunk, len(stored))
    if blake3(stored).hexdigest() != chunk.blob:
        raise BlobCorruptError("the blob's bytes are not those that its name says", key=chunk.blob)
    item_bytes = manifest.segments[chunk.segment].item_bytes
    if chunk.codec in FOR_DEVICES:
        codec(chunk.codec).check(stored, chunk.length_bytes, item_bytes=item_bytes, parameters=chunk.parameters)
        return
    raw = memoryview(bytearray(chunk.length_bytes))
    codec(chunk.codec).decode(stored, raw, item_bytes=item_bytes, parameters=chunk.parameters)
    if blake3(raw).hexdigest() != chunk.raw_hash:
        raise BlobCorruptError("the blob decodes to other bytes than were captured", key=chunk.blob)


def _check_length(chunk: Chunk, length_bytes: int) -> None:
    if length_bytes != chunk.stored_bytes:
        raise BlobCorruptError(
            f"the blob has {length_bytes} bytes, the manifest says {chunk.stored_bytes}", key=chunk.blob
        )
