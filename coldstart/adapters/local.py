"""Serving on this machine: events from standard input, answers to standard output, one JSON object a line.

An answer is ``{"id": ..., "output": ...}``, or ``{"id": ..., "error": {"type": ..., "message": ...}}``; a stream's
pieces come as ``{"id": ..., "piece": ...}`` lines before it. What the handler itself prints goes to standard error. The
loop ends with the input, then waiting for a snapshot that is being made; or with SIGTERM, after the event in progress.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

from coldstart.adapters.answers import described, encoded, identity_of, parsed
from coldstart.loading import check_event

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from typing import BinaryIO, TextIO

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


def serve(definition: Definition, handler: Any, *, source: BinaryIO | None = None, sink: TextIO | None = None) -> None:
    """Serve the lines of ``source`` (default: standard input) until it ends, then end the worker."""
    from coldstart.config import load
    from coldstart.registry import enter_serving, worker_for

    enter_serving()
    worker = worker_for(definition)
    worker.begin()
    lines, out = source or sys.stdin.buffer, sink or sys.stdout

    def write(line: str) -> None:
        out.write(line + "\n")
        out.flush()

    def serve_all() -> None:
        with _until_told() as termination:
            for line in iter(lines.readline, b""):
                with termination.finishing():
                    _serve_line(handler, line, write)
            worker.capture_outcomes(load().capture_wait_seconds)

    with redirect_stdout(sys.stderr):
        on_one_loop(worker, serve_all)


class _Told(BaseException):
    """Raised by SIGTERM where no event is in progress."""


class _Termination:
    """What SIGTERM does: it ends the loop at once, or after the event in progress."""

    def __init__(self) -> None:
        self._busy = False
        self._told = False

    def tell(self) -> None:
        """SIGTERM came."""
        self._told = True
        if not self._busy:
            raise _Told

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """An event: not interrupted."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        if self._told:
            raise _Told


@contextmanager
def _until_told() -> Iterator[_Termination]:
    """Leave the block where SIGTERM asks for it."""
    from coldstart.adapters.signals import on_sigterm

    termination = _Termination()
    with on_sigterm(termination.tell), suppress(_Told):
        yield termination


def _serve_line(handler: Any, line: bytes, write: Callable[[str], None]) -> None:
    """Answer one line. The answer of an event that fails is its error, and the next one is served."""
    if not line.strip():
        return
    identity: Any = None
    try:
        event = parsed(line, "the line")
        identity = identity_of(event)
        output = answer_one(handler, check_event(event), lambda item: write(encoded(id=identity, piece=item)))
        answer = encoded(id=identity, output=output)
    except (KeyboardInterrupt, SystemExit):
        raise  # the end of this process
    except BaseException as error:  # noqa: BLE001  the loop's edge; the panic of a library written in Rust is no Exception
        answer = encoded(id=identity, error=described(error))
    write(answer)
