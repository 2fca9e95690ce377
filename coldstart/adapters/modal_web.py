"""Answering HTTP requests on Modal, through its fastapi endpoints. fastapi is in the image where this is asked for."""

from __future__ import annotations

from asyncio import CancelledError
from typing import TYPE_CHECKING, Any

import modal

from coldstart.adapters.answers import described, encoded, parsed
from coldstart.errors import EventError
from coldstart.loading import check_event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

_LEAVING = (CancelledError, KeyboardInterrupt, GeneratorExit)
"""What ends a request from outside, and is no answer of the handler's."""


def web_function(get_handler: Callable[[], Any], kind: str, verb: str) -> Callable[..., Any]:
    """The function behind a web endpoint: an event in, ``{"output": ...}`` out; a stream's pieces are lines of JSON."""

    async def post(self: Any, event: dict) -> Any:  # type: ignore[type-arg]  # noqa: ARG001  fastapi reads the annotation
        return await _answer_web(get_handler(), kind, event)

    async def get(self: Any, input: str) -> Any:  # noqa: A002, ARG001
        return await _answer_web(get_handler(), kind, input)

    chosen: Callable[..., Any] = post if verb == "POST" else get
    chosen.__annotations__ = {"event": dict} if verb == "POST" else {"input": str}
    return chosen


def _web_event(given: Any) -> dict[str, Any]:
    """The event of a request: its document, or the JSON text of its input. What is neither is answered with status 400."""
    from fastapi import HTTPException

    try:
        event = {"input": parsed(given.encode(), "the input")} if isinstance(given, str) else given
        return {"id": modal.current_input_id() or "", **check_event(event)}
    except EventError as error:
        raise HTTPException(400, str(error)) from error


async def _answer_web(handler: Any, kind: str, given: Any) -> Any:
    import asyncio

    event = _web_event(given)
    if kind in ("generator", "async_generator"):
        from fastapi.responses import StreamingResponse

        lines = _lines_async(handler(event)) if kind == "async_generator" else _lines(handler(event))
        return StreamingResponse(lines, media_type="application/x-ndjson")
    try:
        output = await (handler(event) if kind == "async" else asyncio.to_thread(handler, event))
        encoded(output=output)
    except _LEAVING:
        raise
    except BaseException as error:  # noqa: BLE001  the request's edge: its answer is the error, sys.exit and panics too
        from fastapi.responses import JSONResponse

        return JSONResponse({"error": described(error)}, status_code=500)
    return {"output": output}


def _lines(pieces: Any) -> Iterator[str]:
    """A stream's pieces as lines of JSON; an error is its last line."""
    try:
        for piece in pieces:
            yield encoded(piece=piece) + "\n"
    except _LEAVING:
        raise
    except BaseException as error:  # noqa: BLE001  the request's edge: the status has been sent
        yield encoded(error=described(error)) + "\n"


async def _lines_async(pieces: Any) -> AsyncIterator[str]:
    """The same of an async stream."""
    try:
        async for piece in pieces:
            yield encoded(piece=piece) + "\n"
    except _LEAVING:
        raise
    except BaseException as error:  # noqa: BLE001  the request's edge, as above
        yield encoded(error=described(error)) + "\n"
