"""The limits: bare copies between host and device, pinning, and what opening the device costs."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from benchmarks.on_gpu import partial
from benchmarks.on_gpu.timing import Clock, in_turns, rate, wall
from coldstart.config import child_environment
from coldstart.devices.cuda_driver import Stream, open_gpu
from coldstart.devices.cuda_memory import DeviceMemory, PinnedMemory

if TYPE_CHECKING:
    from benchmarks.on_gpu.timing import Sizes
    from coldstart.devices.cuda_driver import Gpu

CHILD_SECONDS = 60.0
FRESH_STARTS = 2

OPENINGS = {
    "python": "pass",
    "import torch": "import torch",
    "import cupy": "import cupy",
    "cuInit": "from coldstart.devices.cuda_driver import Driver; Driver()",
    "cuInit and context": "from coldstart.devices.cuda_driver import open_gpu; open_gpu(0)",
    "torch's first tensor": "import torch; torch.ones(1, device='cuda').item()",
    "cupy's first array": "import cupy; float(cupy.zeros(3).sum().get())",
    "kernel of coldstart": (
        "from coldstart.devices.cuda_driver import open_gpu; from coldstart.devices import kernels;"
        " open_gpu(0).functions(kernels.module('planes'), ['coldstart_merge_planes'])"
    ),
}
"""What a fresh process does -> the code. Each is timed from spawn to end."""


def copies(sizes: Sizes) -> dict[str, Any]:
    """Pinned and pageable copies to the device and from it, one memory, in turns."""
    gpu = open_gpu(0)
    clock, stream, length_bytes = Clock(gpu), Stream(gpu), sizes.copy_bytes
    pinned, target = PinnedMemory(gpu, length_bytes), DeviceMemory(gpu, length_bytes)
    registered, pageable = mmap.mmap(-1, length_bytes), mmap.mmap(-1, length_bytes)
    for memory in (pinned.view, registered, pageable):
        memory[:] = bytes(range(256)) * (length_bytes // 256)
    addresses = {name: _address(memory) for name, memory in {"ring": registered, "pageable": pageable}.items()}
    gpu.pin(addresses["ring"], length_bytes)

    def copy_in(source: int) -> float:
        return clock.seconds(stream, lambda: stream.copy_in(target.address, source, length_bytes))

    def copy_out(place: int) -> float:
        return clock.seconds(stream, lambda: stream.copy_out(place, target.address, length_bytes))

    def copy_in_pageable() -> float:
        def work() -> None:
            stream.copy_in(target.address, addresses["pageable"], length_bytes)
            stream.synchronize()

        return wall(work)

    found = in_turns(
        sizes.repeats,
        {
            "pinned_in": lambda: copy_in(pinned.address),
            "registered_in": lambda: copy_in(addresses["ring"]),
            "pageable_in": copy_in_pageable,
            "pinned_out": lambda: copy_out(pinned.address),
        },
    )
    gpu.unpin(addresses["ring"])
    return {
        "copy_bytes": length_bytes,
        **{name: rate(length_bytes, seconds) for name, seconds in found.items()},
        "pinning": pinning(gpu, sizes),
    }


def pinning(gpu: Gpu, sizes: Sizes) -> dict[str, Any]:
    """What registering touched host memory costs, which a restore does once for its ring."""
    seconds = []
    for _ in range(3):
        memory = mmap.mmap(-1, sizes.copy_bytes)
        memory[:: mmap.PAGESIZE] = b"\1" * len(range(0, sizes.copy_bytes, mmap.PAGESIZE))
        address = _address(memory)
        seconds.append(wall(lambda address=address: gpu.pin(address, sizes.copy_bytes)))  # type: ignore[misc]
        gpu.unpin(address)
    return {
        "bytes": sizes.copy_bytes,
        "seconds": [round(each, 5) for each in seconds],
        "seconds_per_gb": round(sorted(seconds)[1] / sizes.copy_bytes * 1e9, 4),
    }


def openings(sizes: Sizes) -> dict[str, Any]:
    """Seconds of fresh processes, each with what it did; those that fail say why."""
    found: dict[str, Any] = {}
    for name, code in OPENINGS.items():
        if sizes.is_rehearsal and "torch" in name:  # seconds, and no torch knows the fake device
            found[name] = {"skipped": "a rehearsal"}
            continue
        found[name] = _opening(code, 1 if sizes.is_rehearsal else FRESH_STARTS)
        partial.keep(found)
    return found


def _opening(code: str, times: int) -> dict[str, Any]:
    seconds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=child_environment({}),
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            check=False,
        )
        seconds.append(time.perf_counter() - began)
        if done.returncode:
            return {"error": done.stderr.strip()[-500:]}
    warm = sorted(seconds[1:])
    return {"first_seconds": round(seconds[0], 4), "median_seconds": round(warm[len(warm) // 2], 4), "samples": times}


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
