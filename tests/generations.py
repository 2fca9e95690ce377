"""Real generations of small snapshots, and who writes them, for the tests of the layers between a state and a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from coldstart.caches import FileSource
from coldstart.capture import Capture, Encoding, Written, write_generation
from coldstart.codecs import encoder
from coldstart.devices.cpu import CpuDevice
from coldstart.fetch import FetchRequest, start_threads
from coldstart.frameworks import arrays, bind, rebuild, survey
from coldstart.manifest import (
    Chunk,
    KeyRecord,
    Manifest,
    Segment,
    blob_key,
    manifest_from_json,
    manifest_to_json,
    ref_key,
)
from coldstart.testing import FaultyStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from coldstart.devices.cpu import CpuArena
    from coldstart.repository import Repository
    from coldstart.stores.base import Store

KEY = KeyRecord("a" * 32, {"load": "1" * 32})
OTHER_KEY = KeyRecord("b" * 32, {"load": "2" * 32})
NOTHING = object()


def manifest_of(
    name: str = "model",
    generation: int = 1,
    key: KeyRecord = KEY,
    *,
    segments: tuple[Segment, ...] = (),
    chunks: tuple[Chunk, ...] = (),
) -> Manifest:
    """A manifest without buffers and files, as the strict reader returns it."""
    manifest = Manifest(
        name=name,
        generation=generation,
        parent="",
        created_seconds=1_700_000_000.0,
        rung="arrays",
        device_type="cpu",
        key=key,
        segments=segments,
        buffers=(),
        leaves=(),
        files=(),
        chunks=chunks,
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


def stored_chunks(
    store: Store, segments: Sequence[Sequence[tuple[bytes, str]]], *, item_bytes: int = 1, consumer: str = "eager"
) -> Manifest:
    """Put raw chunks, each encoded with its codec, into ``store``, and return the manifest of them."""
    chunks = []
    for number, pieces in enumerate(segments):
        offset_bytes = 0
        for raw, codec in pieces:
            stored, parameters = encoder(codec, level=3).encode(memoryview(raw), item_bytes=item_bytes)
            blob = hash_of(stored)
            store.put(blob_key(blob), stored)
            chunks.append(
                Chunk(number, offset_bytes, len(raw), hash_of(raw), codec, parameters, blob, memoryview(stored).nbytes)
            )
            offset_bytes += len(raw)
    lengths = [sum(len(raw) for raw, _ in pieces) for pieces in segments]
    return manifest_of(
        segments=tuple(Segment(item_bytes, "weights", consumer, length) for length in lengths), chunks=tuple(chunks)
    )


def hash_of(data: bytes | memoryview) -> str:
    """What names a blob."""
    return str(blake3(data).hexdigest())


def arena_of(manifest: Manifest) -> CpuArena:
    """Memory for all segments of a manifest."""
    return CpuDevice().allocate([segment.length_bytes for segment in manifest.segments])


def fetched(manifest: Manifest, store: Store) -> CpuArena:
    """All of a generation in memory, every chunk verified before and after decoding."""
    arena = arena_of(manifest)
    start_threads(FetchRequest(manifest, store, arena, 2, 64 << 20, verify_raw=True)).wait()
    return arena


def sources(files: Mapping[str, Path | str], *, root: str = "kept") -> tuple[FileSource, ...]:
    """Files as a capture takes them: name below ``root`` -> path."""
    return tuple(FileSource(root, name, str(path)) for name, path in files.items())


def capture_of(
    state: Any = NOTHING,
    *,
    files: tuple[FileSource, ...] = (),
    follows: Written | None = None,
    key: KeyRecord = KEY,
    generation: int | None = None,
    kinds: Mapping[str, str] | None = None,
    mends: bool = False,
) -> Capture:
    """What a worker would capture of ``state``; ``follows`` is the generation that it replaces."""
    following = follows.manifest.generation + 1 if follows else 1
    return Capture(
        name="model",
        key=key,
        survey=None if state is NOTHING else survey(state),
        files=files,
        device_type="cpu",
        parent=follows.manifest if follows else None,
        parent_key=follows.manifest_key if follows else "",
        generation=following if generation is None else generation,
        kinds=kinds or {},
        warmup_digests=("d" * 32,),
        provenance={"numpy": "2"},
        mends=mends,
    )


def write(
    capture: Capture, repository: Repository, *, codec: str = "raw", pace: Callable[[], None] = lambda: None
) -> Written:
    """Write a generation with the fewest options."""
    return write_generation(capture, repository, encoding=Encoding(codec, 3), pace=pace)


def restored(manifest: Manifest, store: Store, skeleton: Any = NOTHING) -> Any:
    """The state of a stored generation: bound to ``skeleton``, or made from the tree alone."""
    arena = fetched(manifest, store)
    arena.seal()

    def buffer_array(index: int) -> Any:
        buffer = manifest.buffers[index]
        return arena.array(buffer.segment, buffer.offset_bytes, buffer.length_bytes)

    if skeleton is NOTHING:
        return rebuild(manifest.tree, arrays(manifest.leaves, buffer_array))
    return bind(skeleton, manifest.leaves, manifest.modules, buffer_array)


def file_bytes(manifest: Manifest, store: Store) -> dict[str, bytes]:
    """The files of a stored generation: ``root/name`` -> bytes."""
    arena = fetched(manifest, store)
    return {
        f"{entry.root}/{entry.name}": bytes(
            arena.writable(entry.segment)[entry.offset_bytes : entry.offset_bytes + entry.length_bytes]
        )
        for entry in manifest.files
    }


def blobs_of(store) -> dict[str, bytes]:
    """Every blob in the store: hash -> bytes."""
    return {info.key.rpartition("/")[2]: store.get(info.key).data for info in store.list("blobs/")}


def assert_same(found, expected, path="state") -> None:
    """Two states are equal in structure, types, dtypes, shapes and bytes."""
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{path}[{index}]")
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        assert found.tobytes() == expected.tobytes(), path
    else:
        assert repr(found) == repr(expected), path


class AtPace:
    """A ``pace`` that acts at its n-th call, from 0, and counts."""

    def __init__(self, call: int, action) -> None:
        self.calls = 0
        self._call = call
        self._action = action

    def __call__(self) -> None:
        if self.calls == self._call:
            self._action()
        self.calls += 1


def publish(repository, *, key=KEY, name="model", replaces=None, generation=None):
    """Write the next generation after what ``replaces`` saw (default: what is there now), and make it current."""
    replaces = replaces or repository.look_up(name, key)
    generation = generation or repository.next_generation(name, key, replaces.ref)
    manifest = manifest_of(name, generation, key)
    return repository.publish(manifest, repository.put_manifest(manifest), replaces=replaces)


class Meanwhile(FaultyStore):
    """A faulty store during whose next reads of a ref somebody else does something: one action a read."""

    def __init__(self, store, faults=()):
        super().__init__(store, faults)
        self.actions = []

    def get(self, key):
        if self.actions and key == ref_key("model", KEY.digest):
            self.actions.pop(0)()
        return super().get(key)
