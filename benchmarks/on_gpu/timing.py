"""Time on a GPU, by events of the driver, and sides that take turns."""

from __future__ import annotations

import ctypes
import time
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from coldstart.devices.cuda_driver import LIBRARY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from coldstart.devices.cuda_driver import Gpu, Stream


class Sizes(NamedTuple):
    """How much a run does: everything, or a rehearsal of it on fakes. Sizes are in bytes."""

    is_rehearsal: bool
    copy_bytes: int
    repeats: int
    raw_bytes: int
    """Raw bytes that codecs, kernels and the ring are measured with."""
    restores: tuple[int, ...]
    unique_bytes: int
    """A larger snapshot names its chunks again."""
    chunk_bytes: int


WHOLE = Sizes(
    is_rehearsal=False,
    copy_bytes=256 << 20,
    repeats=21,
    raw_bytes=1 << 30,
    restores=(1 << 30, 4 << 30, 16 << 30),
    unique_bytes=2 << 30,
    chunk_bytes=16 << 20,
)
REHEARSAL = Sizes(
    is_rehearsal=True,
    copy_bytes=1 << 20,
    repeats=3,
    raw_bytes=1 << 20,
    restores=(1 << 20,),
    unique_bytes=512 << 10,
    chunk_bytes=256 << 10,
)


class Clock:
    """Seconds that a stream takes for what is queued between two events: those of coldstart's own binding keep no time."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._library = ctypes.CDLL(LIBRARY)
        self._library.cuEventCreate.argtypes = (ctypes.c_void_p, ctypes.c_uint)
        self._library.cuEventRecord.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._library.cuEventSynchronize.argtypes = (ctypes.c_void_p,)
        self._library.cuEventElapsedTime.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self._began, self._ended = self._event(), self._event()

    def seconds(self, stream: Stream, work: Callable[[], object]) -> float:
        """How long the device takes for what ``work`` queues on ``stream``. Raises DeviceError."""
        self._call("cuEventRecord", self._began, stream.handle)
        work()
        self._call("cuEventRecord", self._ended, stream.handle)
        self._call("cuEventSynchronize", self._ended)
        found = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.addressof(found), self._began, self._ended)
        return max(found.value / 1000, 1e-9)

    def _event(self) -> int:
        made = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.addressof(made), 0)
        assert made.value is not None
        return made.value

    def _call(self, name: str, *arguments: object) -> None:
        with self._gpu.current():
            self._gpu.driver.check(name, getattr(self._library, name)(*arguments))


def wall(work: Callable[[], object]) -> float:
    """Seconds by the clock on the wall."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(rounds: int, sides: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each side gave in every round. Round 0 warms up and is not counted; the order turns around every round."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            seconds = sides[name]()
            if number:
                found[name].append(seconds)
    return found


def rate(length_bytes: int, seconds: Sequence[float]) -> dict[str, float]:
    """The median rate in GB/s (10^9), with the slowest and the fastest of so many."""
    rates = sorted(length_bytes / each / 1e9 for each in seconds)
    return {
        "gb_per_second": round(median(rates), 3),
        "slowest": round(rates[0], 3),
        "fastest": round(rates[-1], 3),
        "samples": len(rates),
    }
