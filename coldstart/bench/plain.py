"""Answers one event the ordinary way, in a process that never imports coldstart, and says when it had the answer.

    python plain.py FILE FUNCTION INPUT-AS-JSON REPEATS

Where the file has no such function, ``handler`` answers. Prints one JSON document: the answer, whether the repeated
answers were equal, times of the monotonic clock.
"""

from __future__ import annotations

import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Sequence
    from typing import Any

_BEGAN_SECONDS = time.monotonic()


def _import_file(path: str) -> Any:
    """Import a file as its own folder would: not from the folder of this script, whose modules it must not see."""
    folder, _, name = path.rpartition("/")
    sys.path[0] = folder or "."
    return __import__(name.removesuffix(".py"))


def _complete(answer: Any) -> Any:
    """The whole answer of a function of any kind: awaited, or with the pieces of a stream in a list."""
    if hasattr(answer, "__await__"):
        import asyncio

        return asyncio.run(answer)
    if hasattr(answer, "__aiter__"):
        import asyncio

        return asyncio.run(_pieces(answer))
    return list(answer) if hasattr(answer, "__next__") else answer


async def _pieces(answer: AsyncIterable[Any]) -> list[Any]:
    return [piece async for piece in answer]


def _answer(path: str, function_name: str, input_text: str, repeats: int) -> str:
    import json

    event = {"id": "bench", "input": json.loads(input_text)}
    module = _import_file(path)
    function = getattr(module, function_name, None) or module.handler
    imported_seconds = time.monotonic()
    output = _complete(function(event))
    answered_seconds = time.monotonic()
    warm_seconds, equal = [], True
    for _ in range(repeats):
        began_seconds = time.monotonic()
        again = _complete(function(event))
        warm_seconds.append(time.monotonic() - began_seconds)
        equal = equal and repr(again) == repr(output)
    document = {
        "output": output,
        "answers_equal": equal,
        "began_monotonic_seconds": _BEGAN_SECONDS,
        "imported_monotonic_seconds": imported_seconds,
        "first_answer_monotonic_seconds": answered_seconds,
        "warm_seconds": warm_seconds,
    }
    return json.dumps(document, default=_listed)


def _listed(value: Any) -> Any:
    """An array as lists; anything else that JSON has no form for as its text."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def main(arguments: Sequence[str]) -> None:
    """Run with standard output turned to standard error, so that what the file prints is no part of the document."""
    import os

    path, function_name, input_text, repeats = arguments
    document = os.dup(1)
    os.dup2(2, 1)
    text = _answer(path, function_name, input_text, int(repeats))
    with os.fdopen(document, "w") as out:
        out.write(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
