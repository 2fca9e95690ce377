"""Streams of a GPU and who waits for them, for work that nobody waits for piece by piece."""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coldstart.devices.cuda_driver import Event, Stream


@contextmanager
def drained(stream: Stream) -> Iterator[Stream]:
    """A stream whose end is waited for: after an error something may be queued that nobody waits for, and its memory goes."""
    try:
        yield stream
    finally:
        stream.drain()
        stream.end()


class Waiter:
    """A thread that waits for one event after another, and does what is to be done then."""

    def __init__(self, name: str, fail: Callable[[BaseException], None]) -> None:
        self._queue: queue.SimpleQueue[tuple[Event, Callable[[], None]] | None] = queue.SimpleQueue()
        self._fail = fail
        self._thread = threading.Thread(target=self._run, name=f"coldstart-landing-{name}", daemon=True)
        self._thread.start()

    def add(self, event: Event, action: Callable[[], None]) -> None:
        """Do ``action`` when the event has come; the event is this one's from now on."""
        self._queue.put((event, action))

    def end(self) -> None:
        """Wait until all is done."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            event, action = item
            try:
                event.wait()
                action()
            except BaseException as error:  # noqa: BLE001  raised again by wait(); unheard of, the landing would wait for ever
                self._fail(error)
            finally:
                event.end()
