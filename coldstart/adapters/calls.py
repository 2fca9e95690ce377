"""Calling a handler from many threads at once: in the thread that asks, or, for async kinds, on one loop."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstart.worker import Worker


class Direct:
    """Answers events of a sync handler in the thread that asks."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self.is_stream = handler.__coldstart__.kind in ("generator", "async_generator")

    def begin(self, worker: Worker) -> None:
        """Begin the start."""
        worker.begin()

    def output(self, event: Any) -> Any:
        """The answer to one event."""
        return self._handler(event)

    def pieces(self, event: Any) -> Iterator[Any]:
        """The pieces of one event's answer."""
        with closing(self._handler(event)) as pieces:
            yield from pieces

    def close(self) -> None:
        """Nothing is held."""


class OnLoop(Direct):
    """Answers events of an async handler, all on one loop in a thread of its own; whoever asks waits."""

    def __init__(self, handler: Any) -> None:
        import asyncio

        super().__init__(handler)
        self._loop = asyncio.new_event_loop()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="coldstart-http-loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended:
            try:
                self._loop.run_forever()
            except (
                SystemExit,
                KeyboardInterrupt,
            ):  # a handler's: it is its event's answer, and no reason to leave the others
                continue

    def _submit(self, awaitable: Any) -> Any:
        import asyncio

        async def settle() -> Any:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(settle(), self._loop)

    def begin(self, worker: Worker) -> None:
        """Begin the start, whose async hooks run on the loop."""
        self._submit(worker.wait_async())

    def output(self, event: Any) -> Any:
        """The answer to one event."""
        return self._submit(self._handler(event)).result()

    def pieces(self, event: Any) -> Iterator[Any]:
        """The pieces of one event's answer. Left early, the user's generator is ended at once."""
        pieces = self._handler(event)
        try:
            while True:
                try:
                    piece = self._submit(anext(pieces)).result()
                except StopAsyncIteration:
                    return
                yield piece
        finally:
            self._submit(pieces.aclose()).result()

    def close(self) -> None:
        """End the loop and its thread."""
        self._submit(self._loop.shutdown_asyncgens()).result()
        self._ended = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
