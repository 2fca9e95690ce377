"""Where the user's async hooks run: on the loop that serves, or on a private one where nothing else is async."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from coldstart.errors import StartError

if TYPE_CHECKING:
    import asyncio

LOOP_CHECK_SECONDS = 1.0
"""How often it is looked whether the loop that an async hook runs on is still there."""

LOOP_SECONDS = 600.0
"""How long an async hook of an async handler waits for a serving loop to appear."""


class Loops:
    """Finishes what a user's function returned: awaits a coroutine, collects a generator.

    An async handler's hooks run on the loop that serves its events (clients made there belong to it), which
    ``attach`` names; a sync handler's async hooks run on a loop of their own, in a thread made on first use.
    """

    def __init__(self, *, needs_serving_loop: bool) -> None:
        self._needs_serving_loop = needs_serving_loop
        self._attached = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._private = False
        self._thread: threading.Thread | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop that serves. The first one stays as long as it runs."""
        if self._loop is None or not self._loop.is_running():
            self._loop = loop
            self._attached.set()

    def finish(self, result: Any, *, collect: bool = False) -> Any:
        """The value behind ``result``: a coroutine's, or with ``collect`` the list of a generator's pieces."""
        kind = type(result)  # not the object: what it answers to any attribute is its own affair
        if hasattr(kind, "__await__"):
            return self._run(result)
        if collect and hasattr(kind, "__anext__"):
            return self._run(_collect(result))
        if collect and hasattr(kind, "__next__") and hasattr(kind, "send"):
            return list(result)
        return result

    def _run(self, awaitable: Any) -> Any:
        import asyncio
        from concurrent.futures import CancelledError

        loop = self._serving_loop()

        async def settle() -> Any:
            return await awaitable

        ended = (
            "the event loop that began this start has ended before the start did; start the worker on the loop that serves,"
            " or wait for it there"
        )
        try:
            future = asyncio.run_coroutine_threadsafe(settle(), loop)
        except RuntimeError as error:
            awaitable.close()
            raise StartError(ended) from error
        while True:
            try:
                return future.result(LOOP_CHECK_SECONDS)
            except CancelledError as error:
                raise StartError(ended) from error
            except TimeoutError:
                if future.done():
                    raise
                if loop.is_closed():
                    raise StartError(ended) from None

    def _serving_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None and not self._needs_serving_loop:
            self._make_private()
        if not self._attached.wait(LOOP_SECONDS) or self._loop is None:
            raise StartError(f"no event loop began to serve within {LOOP_SECONDS:.0f} s, and an async hook needs one")
        return self._loop

    def _make_private(self) -> None:
        import asyncio

        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run_private, args=(loop,), name="coldstart-loop", daemon=True)
        self._thread.start()
        self._private = True
        self.attach(loop)

    def close(self, wait_seconds: float = 0.0) -> None:
        """Stop the private loop, if there is one, and wait for its thread so long. The next async hook makes another."""
        if self._private and self._loop is not None and self._thread is not None:
            self._private = False
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(wait_seconds)
            self._loop = None
            self._attached.clear()


def _run_private(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


async def _collect(pieces: Any) -> list[Any]:
    return [piece async for piece in pieces]
