"""How many reads are under way at once: more for as long as more bring more bytes a second. Pure.

One connection to an object store gives a fraction of what the link can carry, and how many fill it is known only by
trying: a store in the same building wants few, one across a country dozens. So a fetch begins with FIRST_READS and
takes half as many again whenever the last step has paid. It never takes fewer: a link that is full stays full.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST_READS = 16
STEP = 1.5
WORTHWHILE_GAIN = 1.1
"""What a step has to bring: a tenth more, which noise seldom is over a window."""
WINDOW_SECONDS = 0.5
"""The shortest time over which a rate is believed."""


class Width:
    """The width of one fetch: ``reads`` at first, at most ``most``. Safe to tell from several threads."""

    def __init__(self, *, most: int, first: int = FIRST_READS, clock: Callable[[], float] = time.monotonic) -> None:
        self.reads = min(first, most)
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._settled = self.reads == most
        self._rate = 0.0
        self._window_begins = 0.0
        self._window_bytes = 0
        self._warming = self.reads
        """Reads to let pass before a window: they began when there were fewer, or had to connect."""
        self._finished = 0

    def finished(self, read_bytes: int) -> int:
        """Tell of one more read, and return how many should be under way from now on."""
        with self._lock:
            if not self._settled:
                self._count(read_bytes)
            return self.reads

    def _count(self, read_bytes: int) -> None:
        now = self._clock()
        if self._warming:
            self._warming -= 1
            self._window_begins, self._window_bytes, self._finished = now, 0, 0
            return
        self._window_bytes += read_bytes
        self._finished += 1
        seconds = now - self._window_begins
        if seconds >= WINDOW_SECONDS and self._finished >= self.reads:
            self._judge(self._window_bytes / seconds)

    def _judge(self, rate: float) -> None:
        """A window is over: step, unless the last step brought too little."""
        if rate < self._rate * WORTHWHILE_GAIN or self.reads == self._most:
            self._settled = True
            return
        self._rate = rate
        self.reads = min(self._most, max(self.reads + 1, int(self.reads * STEP)))
        self._warming = self.reads
