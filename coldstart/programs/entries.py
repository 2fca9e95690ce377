"""Entry points of a state: how a path finds what is called, and how something else is put in its place.

A path is written as in ``frameworks.paths``: ``encoder``, ``unet.down_blocks``, ``["decoder"]``, ``parts[0].embed``; "" is
the state's own call. It ends at a torch module, whose ``forward`` is meant, or at a method or any other callable.
"""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.definition import code_of
from coldstart.errors import HandlerError
from coldstart.programs.signature import POSITION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_STEP = re.compile(r'(?:\A|(?!\A)\.)([A-Za-z_]\w*)|\[(-?\d+|"(?:[^"\\]|\\.)*")\]')
_VARIABLE = 0x04  # inspect.CO_VARARGS
_MOST_POSITIONS = 16
"""Parameters of a function that does not say how many it has."""


class EntryPoint(NamedTuple):
    """What a path leads to. ``function`` is what is called; ``parameters`` the names of its positional ones.

    ``owner`` is the path of the object whose arrays it computes with, as far as can be told: the module itself, or what
    the method is a method of.
    """

    path: str
    holder: Any
    step: str | int
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    owner: str
    is_module: bool


def entry_point(state: Any, path: str, *, alone: bool) -> EntryPoint:
    """Find the entry point ``path`` of ``state``. Raises HandlerError where it leads nowhere, or to nothing callable.

    ``alone``: the program will stand for the whole state, so a module is called with its hooks, not its bare ``forward``.
    """
    holder: Any = None
    found, above = state, ""
    step: str | int = ""
    for last_step, so_far in _steps(path):
        holder, above = found, so_far
        found, step = _next(found, last_step, path), last_step
    if not callable(found):
        raise HandlerError(f"export(entry={path!r}) leads to a {type(found).__name__}, which cannot be called")
    is_module = _is_module(found)
    function = found.forward if is_module and not alone else found
    return EntryPoint(
        path, holder, step, function, _parameters(found, is_module=is_module), path if is_module else above, is_module
    )


def put_in(point: EntryPoint, call: Callable[..., Any]) -> None:
    """Let ``call`` be called instead of the entry point, where it is. Raises HandlerError where nothing can be put."""

    def called(*arguments: Any, **options: Any) -> Any:
        return call(*arguments, **options)

    try:
        if point.is_module:  # hooks of the module go on; torch lets no function take a module's place
            vars(_next(point.holder, point.step, point.path))["forward"] = called
        elif isinstance(point.holder, (dict, list)):
            point.holder[point.step] = called  # type: ignore[index]
        else:
            setattr(point.holder, str(point.step), called)
    except (AttributeError, TypeError) as error:
        raise HandlerError(f"export(entry={point.path!r}): the program cannot take its place: {error}") from error


def standing_alone(calls: Mapping[str, Any]) -> Any:
    """What a handler gets where only the program is there: the call itself, or an object with the entry points."""
    if list(calls) == [""]:
        return calls[""]
    root = Entries("")
    for path, call in calls.items():
        root.put(path, call)
    return root


class Entries:
    """Entry points without the state around them: each is found at its path, and nothing else is."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._held: dict[Any, Any] = {}

    def put(self, path: str, call: Any) -> None:
        """Let ``call`` be found at ``path``."""
        *above, (last, _) = _steps(path)
        held = self._held
        for step, path_above in above:
            held = vars(held.setdefault(step, Entries(path_above)))["_held"]
        held[last] = call

    def names(self) -> list[Any]:
        """What is directly below."""
        return list(self._held)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._get(name, AttributeError)

    def __getitem__(self, key: str | int) -> Any:
        return self._get(key, KeyError)

    def _get(self, step: Any, error: type[Exception]) -> Any:
        if step not in self._held:
            raise error(
                f"{step!r}: a start with a program has of the state only what export(entry=...) names"
                f" ({', '.join(map(str, self._held))}); give build= for an object with all of it, or keep what init needs"
                " with ctx.keep"
            )
        return self._held[step]


def _steps(path: str) -> list[tuple[str | int, str]]:
    """The steps of a path, each with the path above it. Raises HandlerError for a text that is no path."""
    steps: list[tuple[str | int, str]] = []
    position = 0
    while position < len(path):
        match = _STEP.match(path, position)
        if match is None:
            raise HandlerError(
                f"export(entry={path!r}) is no path such as 'encoder', 'unet.mid_block' or '[\"decoder\"]'"
            )
        steps.append((match[1] or json.loads(match[2]), path[:position]))
        position = match.end()
    return steps


def _next(holder: Any, step: str | int, path: str) -> Any:
    try:
        if isinstance(step, int) or isinstance(holder, dict):
            return holder[step]
        return getattr(holder, step)
    except (AttributeError, LookupError, TypeError) as error:
        raise HandlerError(f"export(entry={path!r}): a {type(holder).__name__} has no {step!r}") from error


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _parameters(found: Any, *, is_module: bool) -> tuple[str, ...]:
    """Names of the positional parameters; where they cannot be seen, or there may be any number, names by position."""
    function = found.forward if is_module else found
    if code_of(function) is None:
        function = function.__call__  # an object with a call of its own
    code = code_of(function)
    if code is None:
        return _positions(0)
    names: tuple[str, ...] = code.co_varnames[: code.co_argcount]
    names = names[1:] if hasattr(function, "__self__") else names
    if code.co_flags & _VARIABLE:
        names += _positions(len(names))
    return names


def _positions(first: int) -> tuple[str, ...]:
    return tuple(f"{POSITION}{place}" for place in range(first, _MOST_POSITIONS))
