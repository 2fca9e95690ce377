"""Serving on this machine: events from standard input, one JSON object a line; answers to standard output, one a line.

An answer is ``{"id": ..., "output": ...}``, or ``{"id": ..., "error": {"type": ..., "message": ...}}``; a stream's pieces come as
``{"id": ..., "piece": ...}`` lines before it. The loop ends with the input, or with SIGTERM after the event in progress.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from coldstart.errors import ColdstartError, EventError
from coldstart.loading import check_event

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from typing import TextIO

    from coldstart.definition import Definition
    from coldstart.worker import Worker


class _Serving:
    """The loop that async answers run on, while there is one (one thread serves)."""

    loop: asyncio.AbstractEventLoop | None = None


def on_one_loop(worker: Worker, work: Callable[[], Any]) -> Any:
    """Start the worker, run ``work``, in which ``answer_one`` is called, and close the worker.

    All async answers and hooks of the worker, its ``close`` too, run on one event loop.
    """
    if worker.definition.kind not in ("async", "async_generator"):
        try:
            worker.wait()
            return work()
        finally:
            worker.close()
    import asyncio

    loop = asyncio.new_event_loop()
    try:
        _Serving.loop = loop
        loop.run_until_complete(worker.wait_async())
        return work()
    finally:
        _Serving.loop = None
        loop.run_until_complete(loop.run_in_executor(None, worker.close))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def answer_one(handler: Any, event: Any, piece: Callable[[Any], None] | None = None) -> Any:
    """One event through ``handler`` of any kind. A stream's pieces go to ``piece``; its answer is the list of them."""
    kind = handler.__coldstart__.kind
    if kind == "sync":
        return handler(event)
    if kind == "generator":
        return _gather(iter(handler(event)), piece)
    assert _Serving.loop is not None
    if kind == "async":
        return _Serving.loop.run_until_complete(handler(event))
    return _gather(_drive(handler(event), _Serving.loop), piece)


def _gather(pieces: Any, piece: Callable[[Any], None] | None) -> list[Any]:
    gathered = []
    for item in pieces:
        if piece is not None:
            piece(item)
        gathered.append(item)
    return gathered


def _drive(pieces: Any, loop: asyncio.AbstractEventLoop) -> Any:
    while True:
        try:
            yield loop.run_until_complete(anext(pieces))
        except StopAsyncIteration:
            return


def serve(definition: Definition, handler: Any, *, source: TextIO | None = None, sink: TextIO | None = None) -> None:
    """Serve the lines of ``source`` (default: standard input) until it ends, then end the worker."""
    from coldstart.config import load
    from coldstart.worker import enter_serving, worker_for

    enter_serving()
    worker = worker_for(definition)
    worker.begin()
    lines, out = source or sys.stdin, sink or sys.stdout

    def write(document: dict[str, Any]) -> None:
        out.write(json.dumps(document) + "\n")
        out.flush()

    def serve_all() -> None:
        for line in _lines_until_told(lines):
            _serve_line(handler, line, write)
        worker.capture_outcomes(load().capture_wait_seconds)

    on_one_loop(worker, serve_all)


def _lines_until_told(lines: TextIO) -> Any:
    """The lines, until the source ends or SIGTERM asks for the end: the event in progress is finished first."""
    import signal
    import threading

    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield from lines
        return

    class _Told(BaseException):
        """Raised by the signal while no event is in progress."""

    reading = [False]

    def tell(_number: int, _frame: Any) -> None:
        told.set()
        if reading[0]:
            raise _Told

    before = signal.signal(signal.SIGTERM, tell)
    try:
        while not told.is_set():
            reading[0] = True
            line = lines.readline()
            reading[0] = False
            if not line:
                return
            yield line
    except _Told:
        return
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve_line(handler: Any, line: str, write: Callable[[dict[str, Any]], None]) -> None:
    if not line.strip():
        return
    identity: Any = None
    try:
        event = check_event(_parse(line))
        identity = event.get("id")
        output = answer_one(handler, event, lambda item: write({"id": identity, "piece": item}))
        write({"id": identity, "output": output})
    except Exception as error:  # the loop's edge: one event's error is its answer, the next event is served
        write({"id": identity, "error": {"type": type(error).__name__, "message": _message(error)}})


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise EventError(f"the line is not JSON: {error}") from error


def _message(error: Exception) -> str:
    if isinstance(error, TypeError) and "JSON serializable" in str(error):
        return f"the answer is not JSON ({error}); return plain values, such as array.tolist()"
    return str(error) if isinstance(error, ColdstartError) else f"{error}"
