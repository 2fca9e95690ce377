"""Launches kernels in the emulation, with arrays of numpy for the device's memory."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from coldstart.devices import kernels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MARGIN = 16
_UNTOUCHED = 0xAA


class Emulation:
    """Kernels by name, launched as the driver launches them: with the addresses of the values of their arguments."""

    def __init__(self, library: Path | str) -> None:
        self._emulate = ctypes.CDLL(str(library)).coldstart_emulate

    def launch(self, launch: kernels.Launch, *arguments: Any) -> int:
        """What cuLaunchKernel would answer: 0, or the number of its error."""
        values = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        return self._emulate(launch.kernel.encode(), *launch.grid, 1, launch.threads, 1, 1, 0, values)

    def merged(
        self,
        planes: Sequence[np.ndarray],
        block_bytes: int,
        *,
        target_shift: int = 0,
        block_shift: int = 0,
        launch: kernels.Launch | None = None,
    ) -> bytes:
        """What the kernel makes of planes, each block of which lies in memory of its own, at other addresses each."""
        plane_bytes = len(planes[0])
        begins = range(0, plane_bytes, block_bytes)
        pieces = [plane[begin : begin + block_bytes] for plane in planes for begin in begins]
        rooms = [shifted(piece, (block_shift + 5 * index) % 16, granule=4) for index, piece in enumerate(pieces)]
        addresses = np.array([room.ctypes.data for room in rooms], np.uint64)
        target = shifted(np.full(plane_bytes * len(planes) + 2 * _MARGIN, _UNTOUCHED, np.uint8), target_shift)
        place = target[_MARGIN:-_MARGIN]
        answer = self.launch(
            launch or kernels.merge(plane_bytes=plane_bytes, block_bytes=block_bytes, block_count=len(begins)),
            ctypes.c_uint64(place.ctypes.data),
            ctypes.c_uint64(addresses.ctypes.data),
            ctypes.c_uint64(plane_bytes),
            ctypes.c_uint32(block_bytes),
            ctypes.c_uint32(len(begins)),
            ctypes.c_uint32(len(planes)),
        )
        assert answer == 0
        assert set(target[:_MARGIN].tolist() + target[-_MARGIN:].tolist()) == {_UNTOUCHED}
        return place.tobytes()

    def digest(self, data: np.ndarray, *, tree: kernels.Launch | None = None) -> bytes:
        """The hash of an array of uint8, written to an odd address."""
        count = kernels.leaf_count(len(data))
        chaining = np.empty(kernels.chaining_bytes(len(data)), np.uint8)
        digest = shifted(np.zeros(kernels.DIGEST_BYTES, np.uint8), 1)
        length, room = ctypes.c_uint64(len(data)), ctypes.c_uint64(chaining.ctypes.data)
        assert self.launch(kernels.leaves(len(data)), ctypes.c_uint64(data.ctypes.data), length, room) == 0
        place = ctypes.c_uint64(digest.ctypes.data)
        assert self.launch(tree or kernels.tree(), room, ctypes.c_uint64(count), place) == 0
        return digest.tobytes()


def shifted(values: np.ndarray, shift: int, *, granule: int = 1) -> np.ndarray:
    """A copy that begins ``shift`` bytes after a multiple of 16. Its memory ends there, or with the ``granule`` it ends in."""
    end = shift + len(values)
    memory = np.empty(-(-end // granule) * granule, np.uint8)
    assert memory.ctypes.data % 16 == 0
    memory[shift:end] = values
    return memory[shift:end]


def random_bytes(length: int) -> np.ndarray:
    """Bytes that depend on their number alone."""
    return np.random.default_rng(length).integers(0, 256, length, np.uint8)


def planes_of(item_bytes: int, count: int) -> list[np.ndarray]:
    """As many planes as an item has bytes, of ``count`` bytes each."""
    values = random_bytes(count * item_bytes)
    return [values[plane * count : (plane + 1) * count] for plane in range(item_bytes)]


def interleaved(planes: Sequence[np.ndarray]) -> bytes:
    """What merging planes has to give."""
    return np.stack(planes, axis=1).tobytes()
