"""Our own path from host memory to the device, against the bare copy of the same bytes in the same run.

Three sides, each with a part more of a restore: ``landing`` (slots that are full already are handed over: ring, copies,
events), ``memory`` (fetched from a store in memory, hashed on the way), ``folder`` (from files in the page cache, by the
processes that a start would use).
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from benchmarks.on_gpu.snapshots import Made, folder_for, made_snapshot, restore
from benchmarks.on_gpu.timing import in_turns, rate, wall
from coldstart.config import PINNED_BYTES
from coldstart.devices.cuda import CudaArena
from coldstart.devices.cuda_driver import Stream, open_gpu
from coldstart.devices.cuda_memory import DeviceMemory, PinnedMemory
from coldstart.fetch.landing import Landing
from coldstart.fetch.ring import Ring, shape_of
from coldstart.stores.memory import MemoryStore

if TYPE_CHECKING:
    from benchmarks.on_gpu.timing import Sizes
    from coldstart.devices.cuda_driver import Gpu
    from coldstart.manifest import Manifest

ROUNDS = 5
FETCHERS = 4
PIN_SECONDS_PER_BYTE = 2e-9
"""Time for a landing to pin its ring before it is given anything: that takes as long whatever the rate of copies."""


def path(sizes: Sizes) -> dict[str, Any]:
    """Rates of all sides, and their ratios to the copy."""
    gpu = open_gpu(0)
    made = made_snapshot("raw", sizes.raw_bytes, sizes, folder_for(sizes.raw_bytes))
    raw_bytes = made.manifest.raw_bytes
    rounds = 1 if sizes.is_rehearsal else ROUNDS
    found = in_turns(
        rounds,
        {
            "copy": _bare_copy(gpu, made.manifest),
            "landing": lambda: _landing_alone(gpu, made.manifest),
            "memory": lambda: restore(in_memory(made), gpu, engine="threads")["seconds"],
            "folder": lambda: restore(made, gpu, engine="process")["seconds"],
            "folder, threads": lambda: restore(made, gpu, engine="threads")["seconds"],
        },
    )
    made.forget()
    rates = {name: rate(raw_bytes, seconds) for name, seconds in found.items()}
    limit = rates["copy"]["gb_per_second"]
    ratios = {name: round(each["gb_per_second"] / limit, 3) for name, each in rates.items() if name != "copy"}
    return {"raw_bytes": raw_bytes, "ring_bytes": PINNED_BYTES, "sides": rates, "of_the_copy": ratios, "goal": 0.9}


_stores: dict[str, MemoryStore] = {}


def in_memory(made: Made) -> Made:
    """The same snapshot in a store of this process."""
    store = _stores.get(made.url)
    if store is None:
        store = _stores[made.url] = MemoryStore()
        for info in made.store.list("blobs/"):
            store.put(info.key, made.store.get(info.key).data)
    return made._replace(store=store, address=None)


def _bare_copy(gpu: Gpu, manifest: Manifest) -> Any:
    """Chunk after chunk from pinned memory of the ring's size, nothing else: wall time, like the others."""
    slot_bytes, slots = shape_of(manifest, PINNED_BYTES)
    pinned, target = PinnedMemory(gpu, slot_bytes * slots), DeviceMemory(gpu, manifest.raw_bytes)
    stream = Stream(gpu)
    pinned.view[:] = bytes(len(pinned.view))

    def work() -> None:
        position = 0
        for number, chunk in enumerate(manifest.chunks):
            source = pinned.address + number % slots * slot_bytes
            stream.copy_in(target.address + position, source, chunk.length_bytes)
            position += chunk.length_bytes
        stream.synchronize()

    return lambda: wall(work)


def _landing_alone(gpu: Gpu, manifest: Manifest) -> float:
    """All chunks through a ring whose slots hold something already: what a fetch would have to keep up with."""
    arena = CudaArena(gpu, [each.length_bytes for each in manifest.segments], ())
    ring = Ring.make(*shape_of(manifest, PINNED_BYTES))
    ring.view[:] = bytes(len(ring.view))
    work = iter(range(len(manifest.chunks)))
    lock = threading.Lock()

    def hand_over() -> None:
        while True:
            with lock:
                number = next(work, None)
            if number is None:
                return
            slot, epoch = ring.take()
            ring.hand_over(slot, epoch, number, is_raw=True)

    landing = Landing(manifest, arena, ring, open_frames=None)
    time.sleep(PIN_SECONDS_PER_BYTE * len(ring.view))
    threads = [threading.Thread(target=hand_over) for _ in range(FETCHERS)]

    def all_of_it() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        landing.wait()

    try:
        return wall(all_of_it)
    finally:
        landing.cancel()
        ring.close()
