"""A clock that stands still until it is told otherwise."""

from __future__ import annotations

import threading


class FakeClock:
    """Time that passes only by ``sleep`` and ``advance``; satisfies ``coldstart.stores.retrying.Clock``.

    ``monotonic`` and ``time`` (Unix seconds) run together. ``slept`` lists what was slept, in seconds. Safe from
    several threads at once: their sleeps add up.
    """

    def __init__(self, unix_seconds: float = 1_700_000_000.0) -> None:
        self.slept: list[float] = []
        self._unix_at_zero = unix_seconds
        self._elapsed = 0.0
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        with self._lock:
            return self._elapsed

    def time(self) -> float:
        """Unix time in seconds."""
        return self._unix_at_zero + self.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass at once, and note them."""
        with self._lock:
            self._elapsed += seconds
            self.slept.append(seconds)

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass at once, as if others had slept."""
        with self._lock:
            self._elapsed += seconds
