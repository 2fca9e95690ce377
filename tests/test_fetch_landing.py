"""The landing: every chunk that comes through a ring is in its place on the GPU, or the restore fails with the reason.

The driver, nvCOMP and the kernels are fakes that work on host memory, each under the contract of the real one; streams are
threads there, and pause now and then, so that what is not ordered shows.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coldstart.errors import BlobCorruptError, CodecError, ObjectMissingError, SnapshotError
from coldstart.fetch.base import Address
from coldstart.fetch.decoding import limits_of
from coldstart.fetch.landing import MOST_BATCH_BYTES, Landing
from coldstart.fetch.ring import Ring, shape_of
from coldstart.manifest import FileEntry, blob_key
from coldstart.stores import StoreOptions, open_store
from coldstart.stores.memory import MemoryStore
from coldstart.testing import Fault, FaultyStore
from tests.fake_gpu.machine import FakeMachine, content
from tests.generations import hash_of, stored_chunks

PATIENCE_SECONDS = 60.0
RANDOM = np.random.default_rng(7)


def weights(items: int) -> bytes:
    """Numbers of bf16 as trained weights have them."""
    return (RANDOM.normal(0, 0.02, items).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def joined(segments) -> list[bytes]:
    """The content that segments of (raw, codec) have."""
    return [b"".join(raw for raw, _ in pieces) for pieces in segments]


@pytest.fixture(scope="module")
def machine(fake_gpu_folder) -> FakeMachine:
    """A machine with one fake GPU."""
    return FakeMachine(fake_gpu_folder)


SEGMENTS = [
    [(weights(300_000), "planes+zstd"), (weights(130_001), "planes+zstd"), (weights(3), "planes+zstd")],
    [(bytes(range(256)) * 40, "raw"), (b"a" * 5000, "zstd"), (weights(70_000) + b"!", "planes+zstd")],
    [],
    [(b"x", "raw")],
]


@pytest.mark.parametrize("verify_raw", [False, True])
@pytest.mark.parametrize("ring_bytes", [1, 256 << 20])
@pytest.mark.parametrize("device_codecs", [("planes+zstd",), ()])
def test_every_chunk_lands(machine, verify_raw, ring_bytes, device_codecs):
    """Whatever its codec and wherever it is decoded, every chunk is in its place bit for bit; nothing is left behind."""
    store = MemoryStore()
    manifest = stored_chunks(store, SEGMENTS, item_bytes=2)
    gc.collect()  # what other tests of this process left to be collected
    before = machine.report()
    arena, landing = machine.restored(
        manifest, store, ring_bytes=ring_bytes, device_codecs=device_codecs, verify_raw=verify_raw
    )
    assert content(manifest, arena) == joined(SEGMENTS)
    assert landing.degraded == []
    after = machine.report()
    assert after["pageable_host_to_device_copies"] == before["pageable_host_to_device_copies"]
    for left in ("live_streams", "live_events", "registered_ranges"):
        assert after[left] == before[left]
    assert after["live_allocations"] - before["live_allocations"] == 1  # the arena itself
    assert after["sticky_error"] == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from([b"abcd", b"\0", bytes(range(251))]),
                st.integers(1, 9000),
                st.sampled_from(["raw", "zstd", "planes+zstd"]),
            ),
            max_size=4,
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 8),
)
def test_any_chunks_land(machine, drawn, item_bytes, threads):
    """Chunks of any content, length and codec land, for items of any size and any number of fetching threads."""
    segments = [[((text * count)[:count], codec) for text, count, codec in pieces] for pieces in drawn]
    store = MemoryStore()
    manifest = stored_chunks(store, segments, item_bytes=item_bytes)
    arena, _ = machine.restored(manifest, store, threads=threads, verify_raw=True)
    assert content(manifest, arena) == joined(segments)


def test_what_belongs_to_the_host_stays_there(machine):
    """Segments of the host are in host memory, as arrays of numpy, and the device has none of their bytes."""
    store = MemoryStore()
    segments = [[(weights(50_000), "planes+zstd")], [(weights(50_000), "planes+zstd"), (b"file", "raw")]]
    manifest = stored_chunks(store, segments, item_bytes=2)._replace(host_segments=(1,))
    arena, _ = machine.restored(manifest, store)
    assert content(manifest, arena) == joined(segments)
    assert isinstance(arena.array(1, 0, 10), np.ndarray)
    assert hasattr(arena.array(0, 0, 10), "__cuda_array_interface__")


def test_files_come_first(machine):
    """Chunks of files are fetched before all others, whatever the way."""
    store = MemoryStore()
    segments = [[(weights(50_000), "raw")], [(b"config", "raw")]]
    manifest = stored_chunks(store, segments)._replace(
        host_segments=(1,), files=(FileEntry("kept", "config.json", 0o644, 1, 0, 6),)
    )
    arena, _ = machine.restored(manifest, store)
    assert bytes(arena.readable(1)) == b"config"


# --- what goes wrong ---------------------------------------------------------------------------------------------------


def test_without_nvcomp_the_processor_decodes(machine):
    """Where nvCOMP turns out to be unusable, chunks are decoded here all the same, and somebody is told."""

    def missing():
        raise CodecError("nvCOMP is not installed")

    store = MemoryStore()
    manifest = stored_chunks(store, SEGMENTS, item_bytes=2)
    arena, landing = machine.restored(manifest, store, open_frames=missing)
    assert content(manifest, arena) == joined(SEGMENTS)
    assert ["nvCOMP is not installed" in reason for reason in landing.degraded] == [True]


class Refusing:
    """A frame decoder that says of every frame what ``status`` and ``given`` say."""

    def __init__(self, machine: FakeMachine, *, status: int, given: int) -> None:
        self._real = machine.frames()
        self._gpu = machine.gpu
        self._status, self._given = status, given

    def zstd_temp_bytes(self, count, **sizes):
        return self._real.zstd_temp_bytes(count, **sizes)

    def zstd_decode(self, batch, *, stream):
        for number in range(batch.item_count):
            for address, value in (
                (batch.decoded_bytes + 8 * number, self._given.to_bytes(8, "little")),
                (batch.statuses + 4 * number, self._status.to_bytes(4, "little")),
            ):
                for index, byte in enumerate(value):
                    self._gpu.call("cuMemsetD8Async", address + index, byte, 1, stream)


@pytest.mark.parametrize(("status", "given"), [(12, 262144), (0, 1)])
def test_a_frame_that_did_not_decode_fails_the_restore(machine, status, given):
    """What nvCOMP says of a frame is looked at: an error, or another length than announced, is an error of the codec."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(weights(600_000), "planes+zstd")]], item_bytes=2)
    with pytest.raises(CodecError, match="zstd frame"):
        machine.restored(manifest, store, open_frames=lambda: Refusing(machine, status=status, given=given))


def test_a_proof_sees_what_is_on_the_device(machine):
    """With the raw hash of other bytes a proof fails, though the stored bytes are right: the device's own are hashed."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(weights(90_000), "planes+zstd")]], item_bytes=2)
    chunk = manifest.chunks[0]._replace(raw_hash=hash_of(b"other"))
    with pytest.raises(BlobCorruptError, match="device memory"):
        machine.restored(manifest._replace(chunks=(chunk,)), store, verify_raw=True)


def test_nothing_wrong_reaches_nvcomp(machine):
    """A blob that is not what its name says is read once more and refused; a table that claims another size is refused."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(weights(90_000), "planes+zstd")]], item_bytes=2)
    (chunk,) = manifest.chunks
    before = machine.report()["library_launches"]
    altered = bytearray(store.get(blob_key(chunk.blob)).data)
    altered[-1] ^= 1
    lying = manifest._replace(chunks=(chunk._replace(length_bytes=chunk.length_bytes - 2),))
    with pytest.raises(CodecError):
        machine.restored(lying, store)
    store.put(blob_key(chunk.blob), bytes(altered))
    with pytest.raises(BlobCorruptError):
        machine.restored(manifest, store)
    assert machine.report()["library_launches"] == before  # nvCOMP was given nothing


def test_a_missing_blob_ends_everything(machine):
    """A fetch that fails ends the landing too: nobody waits for chunks that never come."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(weights(90_000), "raw"), (weights(9), "raw")]], item_bytes=2)
    store.delete(blob_key(manifest.chunks[1].blob))
    with pytest.raises(ObjectMissingError):
        machine.restored(manifest, store)


def test_where_all_blobs_are_missing_nobody_waits_for_a_slot(machine):
    """Fetches that fail give their slots back: those that wait for one, with more threads than slots, hear of the failure."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(weights(9_000 + number), "raw") for number in range(12)]], item_bytes=2)
    for chunk in manifest.chunks:
        store.delete(blob_key(chunk.blob))
    missing = []

    def restore():
        for _ in range(20):
            with pytest.raises(ObjectMissingError):
                machine.restored(manifest, store, ring_bytes=1, threads=8)
            missing.append(True)

    restoring = threading.Thread(target=restore, daemon=True)
    restoring.start()
    restoring.join(PATIENCE_SECONDS / 2)
    assert len(missing) == 20


def test_a_cancelled_landing_ends(machine):
    """Cancelling ends the landing while chunks are missing, and whoever waits hears of it."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(weights(90_000), "raw")]], item_bytes=2)
    ring = Ring.make(*shape_of(manifest, 1 << 20))
    landing = Landing(manifest, machine.arena(manifest), ring, open_frames=machine.frames)
    landing.cancel()
    ring.close()
    with pytest.raises(SnapshotError):
        raise landing.error


def test_a_store_that_recovers_is_read_again(machine):
    """A blob that is altered at the first read and right at the second lands."""
    segments = [[(weights(40_000), "planes+zstd"), (weights(5_000), "zstd")]]
    inner = MemoryStore()
    manifest = stored_chunks(inner, segments, item_bytes=2)
    store = FaultyStore(inner, [Fault("corrupt", "read_into"), Fault("corrupt", "read_into", skip=2)])
    arena, _ = machine.restored(manifest, store, threads=1)
    assert content(manifest, arena) == joined(segments)


def test_a_fetcher_process_fills_the_ring(machine, tmp_path):
    """Another process reads, verifies and hands over; what it cannot leave to the device it decodes."""
    url = f"file://{tmp_path}"
    store = open_store(url, StoreOptions(), degraded=lambda _: None)
    manifest = stored_chunks(store, SEGMENTS, item_bytes=2)
    arena, _ = machine.restored(manifest, store, engine="process", address=Address(url, StoreOptions()))
    assert content(manifest, arena) == joined(SEGMENTS)


def test_scratch_is_bounded(machine):
    """However large the snapshot, batches are of a size that the constants name."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(bytes(1 << 20), "planes+zstd")] * 40], item_bytes=2)
    batch = max(1, MOST_BATCH_BYTES // shape_of(manifest, 256 << 20)[0])
    assert limits_of(manifest, batch).raw_bytes <= MOST_BATCH_BYTES


IN_PROCESS = """
import json, os, sys
sys.path[:0] = [{root!r}]
from pathlib import Path
from coldstart.errors import ColdstartError
from coldstart.stores.memory import MemoryStore
from tests.fake_gpu.machine import FakeMachine, content
from tests.test_fetch_landing import SEGMENTS, joined
from tests.generations import stored_chunks

store = MemoryStore()
manifest = stored_chunks(store, SEGMENTS, item_bytes=2)
try:
    machine = FakeMachine(Path({folder!r}))
    arena, landing = machine.restored(manifest, store)
    print(json.dumps([content(manifest, arena) == joined(SEGMENTS), landing.degraded]))
except ColdstartError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


LEFT = """
import gc
gc.collect()
counted = machine.report()
print(json.dumps([counted[left] for left in ("live_allocations", "live_streams", "live_events", "registered_ranges")]))
"""


def elsewhere(folder: Path, *, code: str = IN_PROCESS, **environment: str) -> list:
    """What a process of its own says last, in which the fake driver is set by ``environment``."""
    code = code.format(root=str(Path(__file__).parent.parent), folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("seed", ["1", "2"])
def test_streams_that_pause_show_no_disorder(fake_gpu_folder, seed):
    """Copies, decoding and merging are ordered by events, not by luck: with streams that pause at random all is right."""
    assert elsewhere(fake_gpu_folder, FAKE_CUDA_JITTER=seed) == [True, []]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cuMemAlloc_v2:1=2", "asked for"),
        ("cuStreamCreateWithPriority:1=2", "cuStreamCreateWithPriority"),
        ("cuMemcpyHtoDAsync_v2:3=700", "cuMemcpyHtoDAsync_v2"),
        ("cuEventSynchronize:2=700", "cuEventSynchronize"),
        ("cuLaunchKernel:2=700", "cuLaunchKernel"),
        ("cuLaunchKernel:2=700", "start another"),
        ("cuInit:1=100", "hand one in"),
    ],
)
def test_a_driver_that_fails_is_a_device_error(fake_gpu_folder, fault, words):
    """Whatever call fails, the restore ends, with the driver's function and words, and nobody hangs."""
    kind, text = elsewhere(fake_gpu_folder, FAKE_CUDA_FAIL=fault)
    assert kind == "DeviceError"
    assert words in text


@pytest.mark.parametrize(
    "fault",
    [
        "cuStreamCreateWithPriority:2=2",
        "cuEventRecord:1=2",
        "cuStreamWaitEvent:1=2",
        "cuLaunchKernel:1=2",
    ],
)
def test_a_failed_restore_leaves_nothing_on_the_device(fake_gpu_folder, fault):
    """Memory of the device, pinned memory, streams and events are given back where a call failed: load needs them."""
    assert elsewhere(fake_gpu_folder, code=IN_PROCESS + LEFT, FAKE_CUDA_FAIL=fault) == [0, 0, 0, 0]


def test_an_error_that_nobody_foresaw_ends_the_landing(machine, monkeypatch):
    """Whatever is raised by who waits for the GPU, the restore ends with it: it does not wait for scratch that never comes."""
    store = MemoryStore()
    manifest = stored_chunks(store, [[(weights(20_000 + number), "planes+zstd") for number in range(8)]], item_bytes=2)

    def odd(self):
        raise RuntimeError("odd")

    monkeypatch.setattr("coldstart.codecs.planes_gpu.PlanesDecoder.check", odd)
    raised = []

    def restore():
        with pytest.raises((RuntimeError, SnapshotError)) as error:
            machine.restored(manifest, store, ring_bytes=1)
        raised.append(error.value)

    restoring = threading.Thread(target=restore, daemon=True)
    restoring.start()
    restoring.join(PATIENCE_SECONDS / 2)
    assert raised


def test_too_little_memory_says_what_was_asked_and_what_is_free(fake_gpu_folder):
    """An arena that does not fit is refused before anything is copied, with the sizes."""
    kind, text = elsewhere(fake_gpu_folder, FAKE_CUDA_MEMORY_BYTES=str(1 << 20))
    assert kind == "DeviceError"
    assert "needs" in text
    assert str(1 << 20) in text


def test_memory_that_cannot_be_pinned_is_slow_and_right(fake_gpu_folder):
    """Where the system pins no memory all is copied the slow way, and somebody is told."""
    right, degraded = elsewhere(fake_gpu_folder, FAKE_CUDA_FAIL="cuMemHostRegister_v2:*=1")
    assert right is True
    assert "could not be pinned" in degraded[0]


def test_a_gpu_too_full_for_scratch_leaves_decoding_to_the_processor(fake_gpu_folder):
    """Where there is room for the arena and none for scratch, chunks are decoded here."""
    right, degraded = elsewhere(fake_gpu_folder, FAKE_CUDA_FAIL="cuMemAlloc_v2:2=2")
    assert right is True
    assert "decoded by the processor" in degraded[0]
