"""Who may be answered now: so many events at a time, a bounded number that wait, and an end that finishes what runs."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Busy(Exception):  # noqa: N818  an answer to give, not a failure
    """The event cannot be taken: too many wait, or the end has begun."""


class Admission:
    """Places for events. Closed until ``open`` says how many there are: until then, events wait. Safe from all threads."""

    def __init__(self, *, most_waiting: int) -> None:
        self._changed = threading.Condition()
        self._most_waiting = most_waiting
        self._free = 0
        self._waiting = 0
        self._present = 0
        self._ending = False

    @property
    def waiting(self) -> int:
        """How many events wait for a place."""
        return self._waiting

    @property
    def ending(self) -> bool:
        """Whether the end has begun."""
        return self._ending

    def open(self, places: int) -> None:
        """Answer ``places`` events at a time from now on."""
        with self._changed:
            self._free = places
            self._changed.notify_all()

    @contextmanager
    def present(self) -> Iterator[None]:
        """An event from its arrival until its answer is written: the end waits for it."""
        with self._changed:
            self._present += 1
        try:
            yield
        finally:
            with self._changed:
                self._present -= 1
                self._changed.notify_all()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place to be answered in, waited for if need be. Raises Busy."""
        self._take()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()

    def _take(self) -> None:
        with self._changed:
            if self._ending or (not self._free and self._waiting >= self._most_waiting):
                raise Busy
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._free or self._ending)
            finally:
                self._waiting -= 1
            if self._ending:
                raise Busy
            self._free -= 1

    def end(self) -> None:
        """Take no more events: those that wait get Busy, those that are being answered go on."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until no event is present."""
        with self._changed:
            self._changed.wait_for(lambda: not self._present)
