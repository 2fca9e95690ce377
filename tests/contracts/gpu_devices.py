"""A GPU as a place for state: its arena under the contract of all arenas, its memory, and hashes of what is in it.

For the fake driver and for a real one alike: give a fixture ``machine``, and have ``open_gpu(0)`` be its GPU.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
from blake3 import blake3

from coldstart.devices.cuda import CudaArena, CudaDevice
from coldstart.devices.cuda_driver import Gpu, Stream, open_gpu
from coldstart.devices.cuda_hashes import Hashes, hash_of_device
from coldstart.devices.cuda_memory import DeviceMemory, PinnedMemory, copy_out
from coldstart.errors import DeviceError
from coldstart.frameworks import cupy as for_cupy
from coldstart.testing.devices import PATTERNS, SEGMENTS, ArenaContract
from tests.contracts.cupy import leaf_of
from tests.fake_gpu.emulated import random_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.devices.base import Arena
    from tests.fake_gpu.machine import FakeMachine

FAR_TOO_MUCH_BYTES = 1 << 50


class CupyArena:
    """An arena of a GPU whose arrays are cupy's, views of what the arena gives: they can be looked at and written to."""

    def __init__(self, arena: CudaArena) -> None:
        self._arena = arena

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arena, name)

    def array(self, segment: int, offset_bytes: int, length_bytes: int) -> Any:
        found = self._arena.array(segment, offset_bytes, length_bytes)
        if not self._arena.is_on_device(segment):
            return found
        return for_cupy.view(leaf_of("|u1", (length_bytes,), (1,)), found)


class CudaArenaContract(ArenaContract):
    """What the arena of a GPU promises, as every arena does. It needs ``cupy`` too, whose arrays are looked at."""

    @pytest.fixture(autouse=True)
    def on(self, machine: FakeMachine, cupy: Any) -> None:
        self.gpu = machine.gpu

    def filled(self, contents: Sequence[bytes]) -> Arena:
        arena = CudaArena(self.gpu, [len(content) for content in contents], ())
        for segment, content in enumerate(contents):
            arena.place(segment, 0, memoryview(content))
        return CupyArena(arena)  # type: ignore[return-value]

    def to_bytes(self, array: Any) -> bytes:
        return bytes(array.get().tobytes())

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def test_nothing_is_placed_outside_its_segment(self):
        """The next one's bytes lie there."""
        arena = CudaArena(self.gpu, SEGMENTS, ())
        for segment, offset_bytes in ((0, 4), (1, 0), (2, 4095), (3, 1 << 40), (0, -1)):
            with pytest.raises(ValueError, match="not inside segment"):
                arena.place(segment, offset_bytes, memoryview(b"xx"))

    def test_segments_of_the_host_are_in_its_memory(self):
        """They can be written to at once, and their arrays are numpy's; the others stay on the device."""
        arena = CudaArena(self.gpu, SEGMENTS, {0, 2})
        arena.writable(2)[:] = PATTERNS[2]
        arena.place(3, 0, memoryview(PATTERNS[3]))
        with pytest.raises(RuntimeError, match="device memory"):
            arena.writable(3)
        arena.seal()
        assert arena.array(2, 0, SEGMENTS[2]).tobytes() == PATTERNS[2]
        assert [arena.is_on_device(number) for number in range(5)] == [False, True, False, True, True]
        found = arena.array(3, 0, SEGMENTS[3])
        assert copy_out(self.gpu, found.address, len(found)) == PATTERNS[3]

    def test_parts_are_read_from_the_device(self):
        """Without the rest of the segment."""
        arena = self.filled(PATTERNS)
        found = arena._arena.array(3, 512, 10_000)
        assert bytes(found.read(7, 5_007)) == PATTERNS[3][519:5_519]


class GpuContract:
    """What a GPU is asked for beside its arena."""

    @pytest.fixture
    def gpu(self, machine: FakeMachine) -> Gpu:
        return machine.gpu

    def test_the_device_says_what_it_is(self, gpu: Gpu):
        """Type, name, and memory of which no more is free than there is."""
        device = CudaDevice(0)
        info = device.info()
        assert (info.type, info.name) == ("cuda", gpu.name)
        assert 0 < info.free_bytes <= info.memory_bytes
        assert gpu.capability >= (5, 0)
        assert device.gpu is gpu

    def test_more_than_there_is_is_refused(self, gpu: Gpu):
        """The error says what was asked, of which GPU, what is free, and what to do."""
        with pytest.raises(DeviceError) as refused:
            CudaDevice(0).allocate([FAR_TOO_MUCH_BYTES])
        text = str(refused.value)
        for part in (str(FAR_TOO_MUCH_BYTES), gpu.name, "are free", "take a larger one"):
            assert part in text
        with pytest.raises(DeviceError, match=f"asked for {FAR_TOO_MUCH_BYTES} bytes and has .* free"):
            DeviceMemory(gpu, FAR_TOO_MUCH_BYTES)

    def test_a_gpu_that_is_not_there(self, gpu: Gpu):
        """The error says how many there are, and what decides that."""
        with pytest.raises(
            DeviceError, match=r"no GPU 99 .* may use \d+: see COLDSTART_DEVICE and CUDA_VISIBLE_DEVICES"
        ):
            Gpu(gpu.driver, 99)

    def test_memory_is_given_back(self, gpu: Gpu):
        """An arena takes its bytes once, and gives them back with its last array; what is left works on."""
        size_bytes = 96 << 20
        gc.collect()
        first = CudaArena(gpu, [size_bytes], ())
        second = CudaArena(gpu, [1 << 20, 5], ())
        free_bytes = gpu.memory().free_bytes
        array = first.array(0, 0, size_bytes)
        del first
        gc.collect()
        assert gpu.memory().free_bytes == free_bytes
        del array
        gc.collect()
        assert gpu.memory().free_bytes >= free_bytes + size_bytes
        second.place(1, 0, memoryview(b"after"))
        assert bytes(second.readable(1)) == b"after"

    @pytest.mark.parametrize("length_bytes", [0, 1, 1024, 1025, 8193, 3_000_001])
    def test_memory_is_hashed_where_it_is(self, gpu: Gpu, length_bytes: int):
        """The hash is the one that the package gives for the same bytes, at an odd address too."""
        raw = random_bytes(length_bytes).tobytes()
        memory, stream = DeviceMemory(gpu, length_bytes + 16), Stream(gpu)
        hashes = Hashes(gpu, 2, max(length_bytes, 1))
        pinned = PinnedMemory(gpu, max(length_bytes, 1))
        pinned.view[:length_bytes] = raw
        stream.copy_in(memory.address + 3, pinned.address, length_bytes)
        hashes.queue([(memory.address + 3, length_bytes), (memory.address + 3, length_bytes // 2)], stream)
        stream.synchronize()
        assert hashes.found() == [blake3(raw).hexdigest(), blake3(raw[: length_bytes // 2]).hexdigest()]
        stream.end()
        hashes.end()

    def test_a_changed_byte_changes_the_hash_of_an_array(self, gpu: Gpu):
        """Whether a state has changed is seen on the device."""
        arena = CudaArena(gpu, [100_000], ())
        arena.place(0, 0, memoryview(random_bytes(100_000).tobytes()))
        before = hash_of_device(arena.array(0, 0, 100_000))
        assert hash_of_device(arena.array(0, 0, 100_000)) == before
        arena.place(0, 99_999, memoryview(b"\0" if arena.readable(0)[99_999] else b"\1"))
        assert hash_of_device(arena.array(0, 0, 100_000)) != before

    def test_the_gpu_is_opened_once(self, gpu: Gpu):
        """Whoever asks gets the same, and the context that was current stays current."""
        assert open_gpu(0) is gpu
        with gpu.current(), gpu.current():
            assert gpu.memory().total_bytes > 0


__all__ = ["CudaArenaContract", "GpuContract"]
