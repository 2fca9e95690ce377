"""Snapshots of seeded bf16 weights in a folder, and restores of them, part by part, into the memory of a GPU."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.codecs import DEVICE_BLOCK_BYTES, encoder
from coldstart.config import PINNED_BYTES
from coldstart.devices.cuda import CudaArena
from coldstart.errors import CodecError
from coldstart.fetch import Address, FetchRequest, default_processes, start_fetch
from coldstart.fetch.decoding import ANS
from coldstart.fetch.landing import device_codecs, land
from coldstart.fetch.ring import Ring, shape_of
from coldstart.fetch.threads import processors
from coldstart.manifest import Chunk, KeyRecord, Manifest, Segment, blob_key
from coldstart.stores import StoreOptions
from coldstart.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.on_gpu.timing import Sizes
    from coldstart.devices.cuda_driver import Gpu
    from coldstart.stores.base import Store

    Encode = Callable[[memoryview], tuple[bytes | memoryview, Mapping[str, int | str]]]

NAME = "gpu-benchmark"
SPREAD = 0.02
"""Standard deviation of the weights: what trained ones have, and what decides how far their exponents shrink."""
MEMORY_FOLDER = "/dev/shm"
ROOM = 1.2
BUDGET_BYTES = 256 << 20
FETCH_THREADS = 16


class Made(NamedTuple):
    """A snapshot in a store: ``address`` None where only this process can read it. ``folder`` is removed by ``forget``."""

    manifest: Manifest
    store: Store
    address: Address | None
    url: str
    folder: str

    def forget(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def folder_for(length_bytes: int) -> str:
    """A fresh folder: in memory where there is room for so much, so that no disk is measured, else for temporary files."""
    try:
        in_memory = shutil.disk_usage(MEMORY_FOLDER).free > ROOM * length_bytes
    except OSError:
        in_memory = False
    return tempfile.mkdtemp(prefix="coldstart-gpu-", dir=MEMORY_FOLDER if in_memory else None)


def weights(length_bytes: int, seed: int) -> bytes:
    """Normally distributed numbers in bf16, the same for the same seed."""
    import numpy as np

    values = np.random.default_rng(seed).standard_normal(length_bytes // 2, np.float32)
    values *= SPREAD
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def made_snapshot(codec: str, length_bytes: int, sizes: Sizes, folder: str) -> Made:
    """A snapshot of so many bytes in one segment. What is beyond ``unique_bytes`` names the chunks before it again."""
    store = LocalStore(folder)
    encode = ans_on_gpu(sizes.chunk_bytes) if codec == ANS else on_host(codec)
    unique = min(length_bytes, sizes.unique_bytes) // sizes.chunk_bytes

    def chunk(number: int) -> Chunk:
        from blake3 import blake3

        raw = weights(sizes.chunk_bytes, number)
        stored, parameters = encode(memoryview(raw))
        blob = str(blake3(stored).hexdigest())
        store.put(blob_key(blob), stored)
        raw_hash, stored_bytes = str(blake3(raw).hexdigest()), memoryview(stored).nbytes
        return Chunk(0, 0, len(raw), raw_hash, codec, parameters, blob, stored_bytes)

    with ThreadPoolExecutor(min(16, processors())) as pool:
        made = list(pool.map(chunk, range(unique)))
    count = length_bytes // sizes.chunk_bytes
    chunks = tuple(made[number % unique]._replace(offset_bytes=number * sizes.chunk_bytes) for number in range(count))
    manifest = _manifest(chunks, count * sizes.chunk_bytes)
    return Made(manifest, store, Address(f"file://{folder}", StoreOptions()), f"file://{folder}", folder)


def on_host(codec: str) -> Encode:
    """Encodes chunks as a capture from a GPU does."""
    chosen = encoder(codec, level=3, block_bytes=DEVICE_BLOCK_BYTES)
    return lambda raw: chosen.encode(raw, item_bytes=2)


def ans_on_gpu(chunk_bytes: int) -> Encode:
    """Encodes chunks of this size with nvCOMP's ANS, one at a time."""
    from coldstart.codecs.ans_gpu import AnsEncoder
    from coldstart.codecs.nvcomp import Nvcomp
    from coldstart.devices.cuda_driver import Stream, open_gpu
    from coldstart.devices.cuda_memory import DeviceMemory, PinnedMemory

    gpu, one_at_a_time = open_gpu(0), threading.Lock()
    own, stream = AnsEncoder(gpu, Nvcomp.load(), chunk_bytes), Stream(gpu)
    place, pinned = DeviceMemory(gpu, chunk_bytes), PinnedMemory(gpu, chunk_bytes)

    def encode(raw: memoryview) -> tuple[bytes, Mapping[str, int | str]]:
        with one_at_a_time:
            pinned.view[:] = raw
            stream.copy_in(place.address, pinned.address, chunk_bytes)
            stored = own.encode(place.address, chunk_bytes, item_bytes=2, most_bytes=chunk_bytes, stream=stream)
            if stored is None:
                raise CodecError("weights did not become smaller by ANS")
            return bytes(stored.data), stored.parameters

    return encode


def _manifest(chunks: tuple[Chunk, ...], length_bytes: int) -> Manifest:
    return Manifest(
        name=NAME,
        generation=1,
        parent="",
        created_seconds=1.0,
        rung="arrays",
        device_type="cuda",
        key=KeyRecord("a" * 32, {"load": "1" * 32}),
        segments=(Segment(2, "weights", "eager", length_bytes),),
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


def restore(made: Made, gpu: Gpu, *, engine: str, on_gpu: bool = True, threads: int = FETCH_THREADS) -> dict[str, Any]:
    """Bring the snapshot into a fresh arena as a start does, and give it back. Seconds of the parts, and peak device memory.

    ``on_gpu`` False: the processor decodes what the GPU could.
    """
    manifest = made.manifest
    free_before = gpu.memory().free_bytes
    began = time.perf_counter()
    arena = CudaArena(gpu, [segment.length_bytes for segment in manifest.segments], manifest.host_segments)
    allocated = time.perf_counter()
    ring = Ring.make(*shape_of(manifest, PINNED_BYTES))
    request = FetchRequest(
        manifest,
        made.store,
        arena,
        threads,
        BUDGET_BYTES,
        address=made.address,
        processes=default_processes(),
        device_codecs=device_codecs() if on_gpu else (),
    )
    landing = land(request, ring)
    lowest = free_before
    try:
        fetch = start_fetch(request._replace(arena=None, ring=ring), engine=engine)
        report = fetch.wait()
        fetched = time.perf_counter()
        lowest = gpu.memory().free_bytes  # scratch is still there: it goes when the landing ends
        landing.wait()
    finally:
        landing.cancel()
        ring.close()
    ended = time.perf_counter()
    return {
        "seconds": ended - began,
        "allocate_seconds": allocated - began,
        "fetch_seconds": fetched - allocated,
        "landing_after_fetch_seconds": ended - fetched,
        "engine": report.engine,
        "degraded": [*report.degraded, *landing.degraded],
        "device_bytes_beyond_state": max(0, free_before - lowest - manifest.raw_bytes),
    }
