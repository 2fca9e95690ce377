"""Whether two answers are the same: bit for bit, or how far apart their numbers are. Pure."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


class Agreement(NamedTuple):
    """How two answers compare.

    ``identical``: bit for bit, as JSON carries them (Python writes a float's shortest exact form). ``difference`` names
    the first place where they differ in more than numbers, and "" where they do not. ``largest_difference`` is between
    numbers at the same place; ``lowest_cosine`` between lists of numbers at the same place, None without such lists.
    """

    identical: bool
    difference: str
    largest_difference: float
    lowest_cosine: float | None


def compare(one: Any, other: Any) -> Agreement:
    """Compare two answers that came out of JSON."""
    difference = next(_differences(one, other, "answer"), "")
    pairs = [] if difference else list(_number_pairs(one, other))
    gaps = [abs(left - right) for left, right in pairs]
    cosines = [] if difference else [_cosine(left, right) for left, right in _vector_pairs(one, other)]
    return Agreement(
        identical=canonical(one) == canonical(other),
        difference=difference,
        largest_difference=max(gaps, default=0.0),
        lowest_cosine=min(cosines, default=None),
    )


def canonical(answer: Any) -> str:
    """A text that is equal for equal answers and for no others; the order of keys does not count."""
    return json.dumps(answer, sort_keys=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _children(value: Any) -> Mapping[str, Any] | None:
    if isinstance(value, dict):
        return {f".{key}": child for key, child in value.items()}
    return {f"[{place}]": child for place, child in enumerate(value)} if isinstance(value, list) else None


def _differences(one: Any, other: Any, path: str) -> Iterator[str]:
    if _is_number(one) and _is_number(other):
        return
    ours, theirs = _children(one), _children(other)
    if ours is None or theirs is None or type(one) is not type(other):
        if type(one) is not type(other) or one != other:
            yield path
        return
    if list(ours) != list(theirs) and set(ours) != set(theirs):
        yield path
        return
    for name, child in ours.items():
        yield from _differences(child, theirs[name], path + name)


def _number_pairs(one: Any, other: Any) -> Iterator[tuple[float, float]]:
    ours, theirs = _children(one), _children(other)
    if _is_number(one):
        yield one, other
    elif ours is not None and theirs is not None:
        for name, child in ours.items():
            yield from _number_pairs(child, theirs[name])


def _vector_pairs(one: Any, other: Any) -> Iterator[tuple[Sequence[float], Sequence[float]]]:
    ours, theirs = _children(one), _children(other)
    if isinstance(one, list) and one and all(map(_is_number, one)):
        yield one, other
    elif ours is not None and theirs is not None:
        for name, child in ours.items():
            yield from _vector_pairs(child, theirs[name])


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    lengths = math.hypot(*one) * math.hypot(*other)
    if lengths == 0.0:
        return 1.0 if math.hypot(*one) == math.hypot(*other) else 0.0
    return math.fsum(left * right for left, right in zip(one, other, strict=True)) / lengths
