"""What people see of a long fetch: a bar on a terminal, elsewhere a log line now and then.

Nothing of it costs a short one: the first FetchProgress comes after half a second, and structlog, which takes time
to import, is there for log lines only once a fetch has lasted LOG_AFTER_SECONDS.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from coldstart.events import FellBack, FetchEnded, FetchProgress, SnapshotPassedOver, WorkerFailed, WorkerReady

if TYPE_CHECKING:
    from coldstart.config import Settings
    from coldstart.events import Event, EventBus

LOG_AFTER_SECONDS = 5.0
BAR_WIDTH = 24
LINE_WIDTH = 80
_CLEARED = "\r\x1b[K"
_ENDS = (FetchEnded, SnapshotPassedOver, FellBack, WorkerReady, WorkerFailed)
"""What no fetch goes on after, or whose lines are to stand alone."""


def show_progress(bus: EventBus, settings: Settings) -> None:
    """Show the fetches of ``bus`` as the settings and standard error allow."""
    if settings.progress and _is_terminal(sys.stderr):
        bus.subscribe(Bar(sys.stderr))
    elif settings.log != "off":
        bus.subscribe(_LogInTime(settings))


def _is_terminal(file: Any) -> bool:
    """What programs put in place of a standard stream need not have more than ``write``, and may be closed, or None."""
    try:
        return bool(file.isatty())
    except (AttributeError, OSError, ValueError):
        return False


def line_of(event: FetchProgress) -> str:
    """How far a fetch is, how fast, and how long it will take at that rate: under 80 characters for most names."""
    part = min(1.0, event.fetched_bytes / event.total_bytes) if event.total_bytes else 1.0
    done = round(BAR_WIDTH * part)
    rate = event.fetched_bytes / event.seconds if event.seconds else 0.0
    left = f"{_clock((event.total_bytes - event.fetched_bytes) / rate)} left" if rate else "stalled"
    return (
        f"{event.name} [{'#' * done}{'.' * (BAR_WIDTH - done)}] {event.fetched_bytes / 1e9:.1f} of"
        f" {event.total_bytes / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s, {left}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes}:{rest:02d}"


class Bar:
    """A subscriber that keeps one line of a terminal up to date, and clears it at the end of the fetch."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._drawn = False

    def __call__(self, event: Event) -> None:
        """Draw, clear, or leave the line as it is."""
        if isinstance(event, FetchProgress):
            self._write(_CLEARED + line_of(event)[: self._columns() - 1])
            self._drawn = True
        elif self._drawn and isinstance(event, _ENDS):
            self._write(_CLEARED)
            self._drawn = False

    def _columns(self) -> int:
        """The terminal's width: a line that is longer goes on below, where nothing would clear it."""
        with suppress(AttributeError, OSError, ValueError):
            return os.get_terminal_size(self._terminal.fileno()).columns or LINE_WIDTH
        return LINE_WIDTH

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # the terminal has gone
            self._terminal.write(text)
            self._terminal.flush()


class _LogInTime:
    """A subscriber that has log lines written as soon as a fetch is a long one, instead of after the first answer."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __call__(self, event: Event) -> None:
        if isinstance(event, FetchProgress) and event.seconds >= LOG_AFTER_SECONDS:
            from coldstart.sinks import attach_once

            attach_once(self._settings)
