"""Answering events once the worker is ready: the user's function in each of its kinds, counted and timed."""

from __future__ import annotations

import threading
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.metrics import WorkerMetrics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from coldstart.definition import Definition


class Stats(NamedTuple):
    """Counts of a worker's events."""

    served: int
    failed: int
    in_flight: int


class Answering:
    """The part of a worker that events go through: 2 us a call over the user's function. ``model`` is its second argument."""

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        self.model: Any = None
        self.metrics = WorkerMetrics()
        self._function = definition.function
        if definition.owner is not None:
            self._function = lambda event, instance: definition.function(instance, event)
        self._lock = threading.Lock()
        self._in_flight = 0
        self._served = 0
        self._failed = 0
        self._idle_since = time.monotonic()
        self._answered = threading.Event()

    def answer(self, event: Any) -> Any:
        """Answer one event with the user's function (kind ``sync``)."""
        began = self._enter()
        try:
            result = self._function(event, self.model)
        except BaseException:
            self._leave(began, failed=True)
            raise
        self._leave(began, failed=False)
        return result

    def stream(self, event: Any) -> Generator[Any, Any, Any]:
        """Answer one event piece by piece (kind ``generator``)."""
        began = self._enter()
        failed = True
        try:
            result = yield from self._function(event, self.model)
            failed = False
            return result  # noqa: TRY300  what a generator returns is part of it
        except GeneratorExit:
            failed = False
            raise
        finally:
            self._leave(began, failed=failed)

    async def answer_async(self, event: Any) -> Any:
        """Answer one event (kind ``async``)."""
        began = self._enter()
        try:
            result = await self._function(event, self.model)
        except BaseException:
            self._leave(began, failed=True)
            raise
        self._leave(began, failed=False)
        return result

    async def stream_async(self, event: Any) -> AsyncGenerator[Any, None]:
        """Answer one event piece by piece (kind ``async_generator``). A stream that is left ends the user's at once."""
        began = self._enter()
        failed = True
        try:
            async with aclosing(self._function(event, self.model)) as pieces:
                async for piece in pieces:
                    yield piece
            failed = False
        except GeneratorExit:
            failed = False
            raise
        finally:
            self._leave(began, failed=failed)

    def _enter(self) -> float:
        with self._lock:
            self._in_flight += 1
        return time.perf_counter()

    def _leave(self, began: float, *, failed: bool) -> None:
        now = time.perf_counter()
        with self._lock:
            self._in_flight -= 1
            self._served += 1
            self._failed += failed
            self._idle_since = time.monotonic()
        self.metrics.warm.add(now - began)
        if not self._answered.is_set():
            self._answered.set()

    @property
    def stats(self) -> Stats:
        """How many events were served, failed, and are being served."""
        return Stats(self._served, self._failed, self._in_flight)
