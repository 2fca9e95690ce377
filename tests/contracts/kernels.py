"""The kernels that coldstart ships, launched by a driver: the fake one, which has them emulated, and a real one, which compiles them."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

import blake3
import numpy as np
import pytest

from coldstart.devices import kernels

if TYPE_CHECKING:
    from tests.fake_gpu.calls import Driver

LENGTHS = (0, 1, 1024, 1025, 100_000, 1_234_567)


def queue(driver: Driver, functions: dict[str, int], launch: kernels.Launch, *values: ctypes._SimpleCData) -> None:
    """Launch on the default stream."""
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    grid = (*launch.grid, 1, launch.threads, 1, 1, 0)
    driver.do("cuLaunchKernel", functions[launch.kernel], *grid, 0, pointers, None)


def load(driver: Driver, module: str, *names: str) -> dict[str, int]:
    """The functions of a module, by name."""
    handle = driver.make("cuModuleLoadData", kernels.module(module))
    return {name: driver.make("cuModuleGetFunction", handle, name.encode()) for name in names}


class KernelsContract:
    """Give a fixture ``driver``: a ``Driver`` that is open."""

    @pytest.mark.parametrize("item_bytes", [1, 2, 4, 8])
    def test_planes_are_merged(self, driver: Driver, item_bytes: int):
        """Planes in blocks here and there become items, also where the last block is short."""
        count, block_bytes = 100_003, 4096
        raw = np.random.default_rng(item_bytes).integers(0, 256, count * item_bytes, np.uint8).tobytes()
        planes = [raw[number::item_bytes] for number in range(item_bytes)]
        blocks = [plane[at : at + block_bytes] for plane in planes for at in range(0, count, block_bytes)]
        base, places, at = driver.memory(b"".join(blocks)), [], 0
        for block in blocks:
            places.append(base + at)
            at += len(block)
        target = driver.make("cuMemAlloc_v2", len(raw))
        table = driver.memory(struct.pack(f"<{len(places)}Q", *places))
        block_count = len(blocks) // item_bytes
        launch = kernels.merge(plane_bytes=count, block_bytes=block_bytes, block_count=block_count)
        values = (ctypes.c_uint64(target), ctypes.c_uint64(table), ctypes.c_uint64(count))
        sizes = (ctypes.c_uint32(block_bytes), ctypes.c_uint32(block_count), ctypes.c_uint32(item_bytes))
        queue(driver, load(driver, "planes", launch.kernel), launch, *values, *sizes)
        assert driver.content(target, len(raw)) == raw

    @pytest.mark.parametrize("length_bytes", LENGTHS)
    def test_hashes_are_blake3(self, driver: Driver, length_bytes: int):
        """The two kernels, one after the other, give the hash that the package gives."""
        raw = np.random.default_rng(length_bytes).integers(0, 256, length_bytes, np.uint8).tobytes()
        data, digest = driver.memory(raw or b"\0"), driver.make("cuMemAlloc_v2", kernels.DIGEST_BYTES)
        chaining = ctypes.c_uint64(driver.make("cuMemAlloc_v2", kernels.chaining_bytes(length_bytes)))
        leaves, tree = kernels.leaves(length_bytes), kernels.tree()
        functions = load(driver, "blake3", leaves.kernel, tree.kernel)
        queue(driver, functions, leaves, ctypes.c_uint64(data), ctypes.c_uint64(length_bytes), chaining)
        count = ctypes.c_uint64(kernels.leaf_count(length_bytes))
        queue(driver, functions, tree, chaining, count, ctypes.c_uint64(digest))
        assert driver.content(digest, kernels.DIGEST_BYTES) == blake3.blake3(raw).digest()
