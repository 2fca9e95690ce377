"""Times and counts of a worker: percentiles, durations, spans of a start. Pure, the clock is injected.

All times are seconds. ``process_clock`` counts from the start of the process as the kernel recorded it, not from our
first line: the interpreter's own start belongs to a cold start.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

KEPT_SAMPLES = 10_000
_IMPORTED_SECONDS = time.monotonic()


def percentile(samples: Iterable[float], fraction: float) -> float:
    """The value below which ``fraction`` (0 to 1) of ``samples`` lie, interpolated linearly between neighbours.

    The method is numpy's default ("linear", number 7 in Hyndman and Fan, "Sample Quantiles in Statistical Packages",
    1996): position ``(n - 1) * fraction`` in the sorted samples. Raises ValueError without samples, and for a fraction
    out of range.
    """
    return _of_sorted(sorted(samples), fraction)


def _of_sorted(ordered: list[float], fraction: float) -> float:
    if not ordered or not 0 <= fraction <= 1:
        raise ValueError(f"a percentile needs samples and a fraction from 0 to 1, not {len(ordered)} and {fraction}")
    position = (len(ordered) - 1) * fraction
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


class Summary(NamedTuple):
    """Durations in a few numbers. ``count``, mean and maximum are of all, percentiles of the last ``KEPT_SAMPLES``."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks a summary for
    mean_seconds: float
    p50_seconds: float
    p95_seconds: float
    p99_seconds: float
    max_seconds: float


class Durations:
    """Durations as they are measured: count, sum, minimum and maximum of all, and the last ``KEPT_SAMPLES`` themselves.

    Safe from several threads. ``add`` is on the path of every request.
    """

    __slots__ = ("_lock", "_samples", "count", "max_seconds", "min_seconds", "total_seconds")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: deque[float] = deque(maxlen=KEPT_SAMPLES)
        self.count = 0
        self.total_seconds = 0.0
        self.min_seconds = math.inf
        """Infinite while there is none."""
        self.max_seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration (not negative)."""
        with self._lock:
            self.count += 1
            self.total_seconds += seconds
            if seconds < self.min_seconds:  # noqa: PLR1730  half the cost of min()
                self.min_seconds = seconds
            if seconds > self.max_seconds:  # noqa: PLR1730
                self.max_seconds = seconds
            self._samples.append(seconds)

    @property
    def mean_seconds(self) -> float:
        """The mean of all durations, 0 without any."""
        with self._lock:
            return self.total_seconds / self.count if self.count else 0.0

    def samples(self) -> list[float]:
        """The last ``KEPT_SAMPLES`` durations, oldest first."""
        with self._lock:
            return list(self._samples)

    def summary(self) -> Summary | None:
        """The durations so far, None without any: a p95 of nothing is not 0."""
        with self._lock:
            count, total_seconds, max_seconds, samples = (
                self.count,
                self.total_seconds,
                self.max_seconds,
                list(self._samples),
            )
        if not count:
            return None
        samples.sort()
        p50, p95, p99 = (_of_sorted(samples, fraction) for fraction in (0.50, 0.95, 0.99))
        return Summary(count, total_seconds / count, p50, p95, p99, max_seconds)


# --- since when ------------------------------------------------------------------------------------------------------


class ProcessStart(NamedTuple):
    """How long ago the process started. The true age lies within ``resolution_seconds`` below ``age_seconds``.

    ``source``: ``kernel`` (its own record, in steps of one clock tick) or ``import`` (when this module was imported, so
    the interpreter's own start is missing).
    """

    age_seconds: float
    resolution_seconds: float
    source: str


def process_start_seconds() -> ProcessStart:
    """How long ago this process started, by the best record that the system has."""
    imported_ago_seconds = time.monotonic() - _IMPORTED_SECONDS
    try:
        with open("/proc/self/stat", "rb") as file:
            record = file.read()
        tick_seconds = 1 / os.sysconf("SC_CLK_TCK")
        age_seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks(record) * tick_seconds
    except (OSError, ValueError, AttributeError):  # no /proc, a record of another form, no such clock
        return ProcessStart(imported_ago_seconds, 0.0, "import")
    if age_seconds < imported_ago_seconds:  # a sandbox that made its record up
        return ProcessStart(imported_ago_seconds, 0.0, "import")
    return ProcessStart(age_seconds, tick_seconds, "kernel")


def start_ticks(record: bytes) -> int:
    """Field 22 of a ``/proc/<pid>/stat`` record: clock ticks from the boot to the process' start. Raises ValueError.

    Fields are counted behind the last parenthesis, since the second one, the program's name, may hold anything.
    """
    fields = record[record.rindex(b")") + 1 :].split()
    if len(fields) < 20:  # noqa: PLR2004  fields 3 to 22
        raise ValueError("the record is too short")
    return int(fields[19])


def process_clock() -> Callable[[], float]:
    """A monotonic clock whose zero is the start of this process."""
    zero_seconds = time.monotonic() - process_start_seconds().age_seconds
    return lambda: time.monotonic() - zero_seconds


# --- what took how long ----------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """A named stretch of time on a track (a thread or process that things happen on), by the timeline's clock."""

    name: str
    track: str
    began_seconds: float
    ended_seconds: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended_seconds - self.began_seconds


class Timeline:
    """Records spans, of any thread, nested or overlapping. ``clock`` gives the seconds since the process started."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._spans: list[Span] = []

    def span(self, name: str, track: str = "main") -> OpenSpan:
        """A context that is recorded when it is left, also by an error. Its ``seconds`` can be read afterwards."""
        return OpenSpan(self, name, track)

    def record(self, span: Span) -> None:
        """Add a span that was measured elsewhere, by the same clock."""
        self._spans.append(span)

    def restart(self) -> tuple[Span, ...]:
        """Begin anew: the clock's zero is now, and the spans so far are taken away and returned.

        For a process that its platform froze: clocks jump over the time in between.
        """
        spans, self._spans = self.spans(), []
        zero_seconds = time.monotonic()
        self.clock = lambda: time.monotonic() - zero_seconds
        return spans

    def spans(self) -> tuple[Span, ...]:
        """What is recorded so far, by beginning; of two that began together the longer one first."""
        return tuple(sorted(self._spans, key=lambda span: (span.began_seconds, -span.ended_seconds)))


class OpenSpan:
    """The context that ``Timeline.span`` returns. To be entered once."""

    __slots__ = ("_name", "_timeline", "_track", "began_seconds", "ended_seconds")

    def __init__(self, timeline: Timeline, name: str, track: str) -> None:
        self._timeline = timeline
        self._name = name
        self._track = track
        self.began_seconds = 0.0
        self.ended_seconds = 0.0

    @property
    def seconds(self) -> float:
        """How long it took, once it is over."""
        return self.ended_seconds - self.began_seconds

    def __enter__(self) -> Self:
        self.began_seconds = self.ended_seconds = self._timeline.clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.ended_seconds = self._timeline.clock()
        self._timeline.record(Span(self._name, self._track, self.began_seconds, self.ended_seconds))


# --- a worker --------------------------------------------------------------------------------------------------------


class Transfers:
    """Snapshots saved, or restored: how many, their bytes, the seconds they took. Safe from several threads."""

    __slots__ = ("_lock", "bytes", "count", "seconds")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0
        self.bytes = 0
        self.seconds = 0.0

    def add(self, *, transferred_bytes: int, seconds: float) -> None:
        """Count one transfer."""
        with self._lock:
            self.count += 1
            self.bytes += transferred_bytes
            self.seconds += seconds

    def to_dict(self) -> dict[str, Any]:
        """Sums and averages; an average of nothing is None."""
        with self._lock:
            count, total_bytes, seconds = self.count, self.bytes, self.seconds
        return {
            "count": count,
            "bytes": total_bytes,
            "seconds": seconds,
            "mean_bytes": total_bytes / count if count else None,
            "mean_seconds": seconds / count if count else None,
            "bytes_per_second": total_bytes / seconds if seconds else None,
        }


class WorkerMetrics:
    """What one worker counts. ``cold``: requests that waited for the start; ``warm``: all others."""

    def __init__(self) -> None:
        self.cold = Durations()
        self.warm = Durations()
        self.saves = Transfers()
        self.restores = Transfers()
        self.failures = 0
        """Starts that failed."""

    @property
    def cold_over_warm(self) -> float | None:
        """Mean of the cold requests over mean of the warm ones, None unless there are both."""
        cold, warm = self.cold.mean_seconds, self.warm.mean_seconds
        return cold / warm if cold and warm else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it. Durations of which there are none are None."""
        cold, warm = self.cold.summary(), self.warm.summary()
        return {
            "cold": cold._asdict() if cold else None,
            "warm": warm._asdict() if warm else None,
            "cold_over_warm": self.cold_over_warm,
            "saves": self.saves.to_dict(),
            "restores": self.restores.to_dict(),
            "failures": self.failures,
        }
