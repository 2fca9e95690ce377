"""How the text of a setting becomes its value: a form, a conversion, a range. Standard library only."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from coldstart.terms import SKIPPABLE_PHASES

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = r"/[^\x00-\x1f\x7f]*"
"""The form of an absolute path."""

_TRUE = ("1", "on", "t", "true", "y", "yes")
_FALSE = ("0", "off", "f", "false", "n", "no")
_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}


class Kind:
    """How text becomes a value: its form (a regular expression that both Python and Rust understand), then a range."""

    def __init__(
        self,
        name: str,
        allowed: str,
        pattern: str,
        convert: Callable[[str], Any] = str,
        *,
        words: tuple[str, ...] = (),
        limits: tuple[float, float] | None = None,
        blank: Any = None,
    ) -> None:
        self.name = name
        self.allowed = allowed
        self.pattern = pattern
        self.convert = convert
        self.words = words
        self.limits = limits
        self.blank = blank
        """What an empty override means; None: it may not be empty."""

    def read(self, text: str) -> Any:
        """The value of ``text``. Raises ValueError, whose message is for nobody: ``allowed`` is."""
        if not text and self.blank is not None:
            return self.blank
        form = text if self.name == "text" else text.lower()
        if not re.fullmatch(self.pattern, form):
            raise ValueError(self.allowed)
        value = self.convert(form)
        if self.limits is not None and not self.limits[0] <= value <= self.limits[1]:
            raise ValueError(self.allowed)
        return value


def choice(*words: str) -> Kind:
    """One of ``words``, in any case."""
    return Kind("choice", f"one of {', '.join(words)}", "|".join(map(re.escape, words)), words=words)


def flag() -> Kind:
    """On or off."""
    return Kind(
        "flag", "one of true, false, 1, 0, yes, no, on, off", "|".join(_TRUE + _FALSE), lambda text: text in _TRUE
    )


def whole(low: int, high: int) -> Kind:
    """A whole number between the two, both included."""
    return Kind("whole", f"a whole number from {low} to {high}", "[0-9]{1,15}", int, limits=(low, high))


def size(low: int, high: int) -> Kind:
    """Bytes between the two, with or without a unit."""
    allowed = f"a number of bytes from {low} to {high}, such as 268435456, 256MiB or 1GiB"
    return Kind("size", allowed, "[0-9]{1,15} *([kmgt]i?b|b)?", _bytes, limits=(low, high))


def seconds(high: int) -> Kind:
    """Seconds, with at most nine decimals."""
    allowed = f"seconds from 0 to {high}, such as 60 or 0.25"
    return Kind("seconds", allowed, r"[0-9]{1,9}(\.[0-9]{1,9})?", float, limits=(0, high))


def phases() -> Kind:
    """Names of phases; the value has them once each, in the order of a start."""
    word = f"({'|'.join(SKIPPABLE_PHASES)})"
    return Kind(
        "phases",
        f"a comma-separated list of {', '.join(SKIPPABLE_PHASES)}",
        f"{word}( *, *{word})*",
        _in_order,
        words=SKIPPABLE_PHASES,
        blank=(),
    )


def text(pattern: str, allowed: str, *, optional: bool = True) -> Kind:
    """A text of the form ``pattern``; an optional one may be given as "" in code."""
    return Kind("text", allowed, pattern, blank="" if optional else None)


def _bytes(text: str) -> int:
    number = text.rstrip(" kmgtib")
    return int(number) * _UNITS[text[len(number) :].strip()]


def _in_order(text: str) -> tuple[str, ...]:
    named = {word.strip(" ") for word in text.split(",")}
    return tuple(phase for phase in SKIPPABLE_PHASES if phase in named)
