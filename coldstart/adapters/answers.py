"""What adapters share of answering: events from JSON, answers as JSON, errors as documents."""

from __future__ import annotations

import json
from typing import Any

from coldstart.errors import EventError, HandlerError


def parsed(text: bytes, what: str) -> Any:
    """The value that JSON ``text`` holds; ``what`` names it. Raises EventError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EventError(f"{what} is not JSON: {error}") from error


def encoded(**document: Any) -> str:
    """``document`` as one line of JSON. Raises HandlerError for values that JSON cannot say."""
    try:
        return json.dumps(document, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise unsayable(error) from error


def unsayable(error: Exception) -> HandlerError:
    """The error of an answer that JSON cannot say; ``error`` is the encoder's."""
    return HandlerError(f"the answer is not JSON ({error}): return plain values, such as array.tolist(), and no NaN")


def identity_of(event: Any) -> Any:
    """The id of an event, None where it has none that an answer could repeat (``parsed`` takes NaN)."""
    identity = event.get("id") if isinstance(event, dict) else None
    try:
        encoded(id=identity)
    except HandlerError:
        return None
    return identity


def described(error: BaseException) -> dict[str, str]:
    """An error as an answer tells it: its type and text."""
    return {"type": type(error).__name__, "message": str(error)}
