"""What one device wrote the other reads, bit for bit: chunks, and states that were captured on either.

For the fake driver and for a real one alike: give the fixtures ``machine`` and ``cupy``, and have ``open_gpu(0)`` be the GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldstart.capture import Encoding, write_generation
from coldstart.errors import BlobCorruptError
from coldstart.fetch import Address
from coldstart.fetch.decoding import ANS, PLANES
from coldstart.frameworks import arrays, bind, rebuild, survey
from coldstart.manifest import manifest_from_json, manifest_to_json
from coldstart.plan import in_forms
from coldstart.repository import Repository
from coldstart.save import device_forms
from coldstart.stores import StoreOptions
from coldstart.stores.local import LocalStore
from coldstart.stores.memory import MemoryStore
from tests.fake_gpu.machine import content
from tests.generations import KEY, Capture, fetched, stored_chunks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstart.capture import Written
    from coldstart.devices.cuda import CudaArena
    from coldstart.manifest import Manifest
    from tests.fake_gpu.machine import FakeMachine

CODECS = ("raw", "zstd", "planes+zstd")
"""Codecs that any device reads."""
LENGTHS = (0, 1, 7, 4096, 300_001, 1_500_000)
"""Raw bytes of chunks: none, parts of an item, ends in a tail, several blocks of a plane."""


def weights(length_bytes: int, seed: int = 0) -> bytes:
    """Numbers as trained ones are, in bf16; an odd last byte is zero."""
    values = np.random.default_rng(seed + length_bytes).normal(0, 0.02, length_bytes // 2 + 1).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:length_bytes]


def contents_of_host(arena: Any, manifest: Manifest) -> list[bytes]:
    return [bytes(arena.readable(number)) for number in range(len(manifest.segments))]


def on_host(manifest: Manifest, *segments: int) -> Manifest:
    """The manifest with these segments in host memory, read from its JSON as any is."""
    return manifest_from_json(manifest_to_json(manifest._replace(host_segments=segments)))


class ChunksContract:
    """Chunks that were encoded on the host, in the memory of either device."""

    @pytest.mark.parametrize("codec", CODECS)
    @pytest.mark.parametrize("item_bytes", [1, 2, 4, 8])
    def test_both_devices_hold_what_was_stored(self, machine: FakeMachine, codec: str, item_bytes: int):
        """Of every codec, item size and length, one chunk a segment and many in one."""
        store = MemoryStore()
        pieces = [[(weights(length), codec)] for length in LENGTHS if length]
        pieces += [[(weights(40_000, seed), codec) for seed in range(9)]]
        manifest = stored_chunks(store, [*pieces, []], item_bytes=item_bytes)
        expected = [b"".join(raw for raw, _ in each) for each in [*pieces, []]]
        arena, landing = machine.restored(manifest, store)
        assert content(manifest, arena) == expected
        assert contents_of_host(fetched(manifest, store), manifest) == expected
        assert landing.degraded == []

    def test_segments_of_the_host_stay_there(self, machine: FakeMachine):
        """Files and numpy's arrays come through the same ring, and end in host memory; codecs are mixed."""
        store = MemoryStore()
        pieces = [[(weights(50_000, number), codec)] for number, codec in enumerate([*CODECS, *CODECS])]
        manifest = on_host(stored_chunks(store, pieces, item_bytes=2), 0, 2, 4)
        arena, _ = machine.restored(manifest, store)
        assert [arena.is_on_device(number) for number in range(6)] == [False, True, False, True, False, True]
        assert content(manifest, arena) == [raw for ((raw, _),) in pieces]

    @pytest.mark.parametrize("verify_raw", [False, True])
    def test_more_chunks_than_slots(self, machine: FakeMachine, verify_raw: bool):
        """A ring of the fewest slots is used again and again; what is in device memory is hashed where a proof asks for it."""
        store = MemoryStore()
        pieces = [[(weights(60_000, number), CODECS[number % 3]) for number in range(30)]]
        manifest = stored_chunks(store, pieces, item_bytes=2)
        arena, _ = machine.restored(manifest, store, ring_bytes=1, verify_raw=verify_raw)
        assert content(manifest, arena) == [b"".join(raw for raw, _ in pieces[0])]

    def test_a_chunk_that_decodes_to_something_else_is_refused(self, machine: FakeMachine):
        """A proof hashes what is in device memory: a wrong raw hash in the manifest is seen there."""
        store = MemoryStore()
        manifest = stored_chunks(store, [[(weights(60_000), "planes+zstd")]], item_bytes=2)
        wrong = manifest._replace(chunks=(manifest.chunks[0]._replace(raw_hash="0" * 64),))
        with pytest.raises(BlobCorruptError, match="device memory"):
            machine.restored(wrong, store, verify_raw=True)

    @pytest.mark.parametrize("device_codecs", [("planes+zstd",), ()])
    def test_processes_fetch_for_a_gpu(self, machine: FakeMachine, tmp_path: Path, device_codecs: tuple[str, ...]):
        """Fetchers of their own share the ring; what the GPU does not decode they do."""
        store = LocalStore(str(tmp_path / "store"))
        pieces = [[(weights(400_000, number), codec)] for number, codec in enumerate([*CODECS, *CODECS])]
        manifest = stored_chunks(store, pieces, item_bytes=2)
        address = Address(f"file://{tmp_path}/store", StoreOptions())
        arena, _ = machine.restored(manifest, store, device_codecs=device_codecs, engine="process", address=address)
        assert content(manifest, arena) == [raw for ((raw, _),) in pieces]

    def test_several_arenas_at_once(self, machine: FakeMachine):
        """Restores of one process do not touch each other's memory."""
        found = []
        for number in range(3):
            store = MemoryStore()
            raw = weights(200_000, number)
            manifest = stored_chunks(store, [[(raw, CODECS[number])]], item_bytes=2)
            found.append((manifest, machine.restored(manifest, store)[0], raw))
        for manifest, arena, raw in found:
            assert content(manifest, arena) == [raw]


HOST_STATE: dict[str, Any] = {
    "halves": np.frombuffer(weights(600_002), np.uint16),
    "floats": np.random.default_rng(1).normal(size=(300, 77)).astype(np.float32),
    "bytes": np.frombuffer(weights(10_001), np.uint8),
    "doubles": np.linspace(0, 1, 501),
    "none": np.empty((0, 3), np.float32),
    "scalar": np.array(3.5, np.float32),
}
"""Arrays that lie in device memory as they are here."""


def state_of(cupy: Any) -> dict[str, Any]:
    """HOST_STATE on the device, with views, twins and arrays of the host beside it, and plain values."""
    own: dict[str, Any] = {name: cupy.asarray(array) for name, array in HOST_STATE.items()}
    own["stepped"] = own["floats"][10:200:3, ::2]
    own["same"] = own["halves"]
    own["part"] = own["halves"][1000:2000]
    own["host"] = np.arange(100_000, dtype=np.int64)
    own["settings"] = {"unit": "m", "layers": [1, 2.5, None]}
    for each in own.values():
        if hasattr(each, "get") and not isinstance(each, dict):
            each.get()  # whoever captures a state comes when its kernels are done
    return own


def expected_arrays() -> dict[str, Any]:
    """What every array of ``state_of`` holds, in host memory."""
    floats, halves = HOST_STATE["floats"], HOST_STATE["halves"]
    return {
        **HOST_STATE,
        "stepped": floats[10:200:3, ::2],
        "same": halves,
        "part": halves[1000:2000],
        "host": np.arange(100_000, dtype=np.int64),
    }


def capture_of_device(state: Any, *, follows: Written | None = None) -> Capture:
    """What a worker on a GPU would capture."""
    return Capture(
        name="model",
        key=KEY,
        survey=survey(state, gpu=0),
        files=(),
        device_type="cuda",
        parent=follows.manifest if follows else None,
        parent_key=follows.manifest_key if follows else "",
        generation=follows.manifest.generation + 1 if follows else 1,
        kinds={},
        warmup_digests=("d" * 32,),
        provenance={},
    )


def written(capture: Capture, repository: Repository, codec: str) -> Written:
    return write_generation(capture, repository, encoding=Encoding(codec, 3), pace=lambda: None)


def buffers_of(manifest: Manifest, arena: Any) -> Callable[[int], Any]:
    """Buffer -> its array in an arena."""

    def buffer_array(index: int) -> Any:
        buffer = manifest.buffers[index]
        return arena.array(buffer.segment, buffer.offset_bytes, buffer.length_bytes)

    return buffer_array


def state_in(manifest: Manifest, arena: CudaArena) -> Any:
    """The state that an arena holds, made from the tree alone."""
    arena.seal()
    return rebuild(manifest.tree, arrays(manifest.leaves, buffers_of(manifest, arena)))


class CaptureContract:
    """States in device memory: captured there, and read by either device."""

    @pytest.fixture
    def repository(self) -> Repository:
        return Repository(MemoryStore())

    @pytest.mark.parametrize("codec", CODECS)
    def test_what_a_gpu_wrote_it_reads(self, machine: FakeMachine, cupy: Any, repository: Repository, codec: str):
        """Every array is where it was, with its steps and its twins, and holds the same bits; plain values are the same."""
        manifest = written(capture_of_device(state_of(cupy)), repository, codec).manifest
        arena, _ = machine.restored(manifest, repository.store, verify_raw=True)
        found = state_in(manifest, arena)
        for name, expected in expected_arrays().items():
            host = found[name] if isinstance(found[name], np.ndarray) else found[name].get()
            assert (host.dtype, host.shape, host.tobytes()) == (expected.dtype, expected.shape, expected.tobytes()), (
                name
            )
        assert found["settings"] == {"unit": "m", "layers": [1, 2.5, None]}
        assert found["same"] is found["halves"]
        assert isinstance(found["host"], np.ndarray)
        assert found["stepped"].data.mem.ptr == found["floats"].data.mem.ptr
        found["halves"][1000:2000] = 0
        assert not found["part"].get().any()

    @pytest.mark.parametrize("codec", CODECS)
    def test_what_a_gpu_wrote_a_cpu_reads(self, machine: FakeMachine, cupy: Any, repository: Repository, codec: str):
        """The bytes of every buffer are in a CPU's arena what they were on the device."""
        manifest = written(capture_of_device(state_of(cupy)), repository, codec).manifest
        on_cpu = fetched(manifest, repository.store)
        on_gpu, _ = machine.restored(manifest, repository.store)
        assert content(manifest, on_gpu) == contents_of_host(on_cpu, manifest)
        found, expected = buffers_of(manifest, on_cpu), expected_arrays()
        for leaf in manifest.leaves:
            (array,) = (array for name, array in expected.items() if name in leaf.path)
            if array.size and array.flags.c_contiguous:
                begin = leaf.offset_bytes
                assert bytes(found(leaf.buffer))[begin : begin + array.nbytes] == array.tobytes(), leaf.path

    @pytest.mark.parametrize("codec", CODECS)
    def test_both_devices_store_the_same_chunks(self, machine: FakeMachine, cupy: Any, codec: str):
        """The same arrays, captured from host memory and from the device's: equal chunks, and but for the size of blocks equal blobs."""
        repositories = Repository(MemoryStore()), Repository(MemoryStore())
        on_gpu = written(
            capture_of_device({name: cupy.asarray(array) for name, array in HOST_STATE.items()}), repositories[0], codec
        )
        on_cpu = written(capture_of_device(HOST_STATE), repositories[1], codec)
        chunks = [[each._replace(segment=0) for each in one.manifest.chunks] for one in (on_gpu, on_cpu)]
        if codec == PLANES:
            sizes = [{each.parameters["block_bytes"] for each in of if each.codec == PLANES} for of in chunks]
            assert sizes == [{64 << 10}, {256 << 10}]
            chunks = [
                [each._replace(parameters={}, blob="", stored_bytes=0) if each.codec == PLANES else each for each in of]
                for of in chunks
            ]
        assert chunks[0] == chunks[1]
        assert {leaf.framework for leaf in on_gpu.manifest.leaves} == {"cupy"}
        assert {leaf.framework for leaf in on_cpu.manifest.leaves} == {"numpy"}

    def test_what_a_gpu_stored_as_ans_both_read(
        self, machine: FakeMachine, cupy: Any, repository: Repository, monkeypatch: pytest.MonkeyPatch
    ):
        """Weights in both forms: the GPU decodes nvCOMP's, which nobody else reads, a CPU the other, to the same bytes."""
        monkeypatch.setattr(device_forms, "_nvcomp", machine.frames)
        state = {"large": cupy.asarray(np.frombuffer(weights(9 << 20), np.uint16)), "floats": cupy.asarray(np.ones(5))}
        manifest = written(capture_of_device(state), repository, "nvcomp-ans").manifest
        assert len(manifest.forms) >= 2
        fast = in_forms(manifest, (PLANES, ANS))
        assert {chunk.codec for chunk in fast.chunks} >= {ANS}
        arena, landing = machine.restored(fast, repository.store, device_codecs=(PLANES, ANS), verify_raw=True)
        assert landing.degraded == []
        assert content(manifest, arena) == contents_of_host(fetched(manifest, repository.store), manifest)

    def test_only_what_changed_is_written_again(self, machine: FakeMachine, cupy: Any, repository: Repository):
        """The device's hashes tell which chunks the generation before has; nothing changed: nothing is written."""
        state = {"large": cupy.asarray(np.frombuffer(weights(9 << 20), np.uint16)), "small": cupy.asarray(np.ones(5))}
        state["large"].get()
        first = written(capture_of_device(state), repository, "raw")
        again = written(capture_of_device(state, follows=first), repository, "raw")
        state["large"][5] = 77
        state["large"].get()
        changed = written(capture_of_device(state, follows=again), repository, "raw")
        assert (first.written_bytes > 9 << 20, again.written_bytes) == (True, 0)
        assert 0 < changed.written_bytes <= 8 << 20
        arena, _ = machine.restored(changed.manifest, repository.store)
        assert state_in(changed.manifest, arena)["large"].get().tobytes() == state["large"].get().tobytes()

    def test_arrays_are_put_into_a_skeleton(self, machine: FakeMachine, cupy: Any, repository: Repository):
        """What ``build`` made is bound: its own arrays, of other bytes, are replaced."""
        manifest = written(capture_of_device(state_of(cupy)), repository, "planes+zstd").manifest
        arena, _ = machine.restored(manifest, repository.store)
        arena.seal()
        skeleton = {**state_of(cupy), "settings": {"unit": "other"}}
        skeleton["halves"][...] = 0
        bound = bind(skeleton, manifest.leaves, manifest.modules, buffers_of(manifest, arena))
        assert bound is skeleton
        assert bound["settings"] == {"unit": "other"}
        assert bound["halves"].get().tobytes() == HOST_STATE["halves"].tobytes()


__all__ = ["CaptureContract", "ChunksContract"]
