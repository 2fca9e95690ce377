"""How a place in a state is written.

``encoder.layers.0.weight`` is an attribute (or submodule, parameter, buffer) of the state, ``["vocab"][3]`` an item
of an item of it, ``$`` the state itself. For a torch module these are the names of its ``state_dict``. The same
structure gives the same paths in every process, and no two places of a state share one: names that are not words are
quoted, and a key that has no text of its own (an object) is written by its type and position.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

ROOT = "$"
_WORD = re.compile(r"[\w-]+\Z")
_DEEPEST_KEY = 4
_LARGEST_KEY = 1 << 63


def attribute(path: str, name: str) -> str:
    """Path of the attribute ``name`` of the object at ``path``."""
    word = _word(name)
    return word if path == ROOT else f"{path}.{word}"


def item(path: str, key: object, position: int) -> str:
    """Path of the item ``key``, the ``position``-th (from 0) of its container, of the object at ``path``."""
    text = _key(key, 0)
    if text is None:
        text = f"{type(key).__name__}#{position}"
    return f"[{text}]" if path == ROOT else f"{path}[{text}]"


def shown(path: str) -> str:
    """The path as a person reads it: ``state.encoder.weight``."""
    if path == ROOT:
        return "state"
    return f"state{path}" if path.startswith("[") else f"state.{path}"


@lru_cache(maxsize=4096)
def _word(name: str) -> str:
    return name if _WORD.match(name) else _quoted(name)


def _key(key: object, depth: int) -> str | None:
    # Exact types only: what a subclass prints (an enum's member, numpy.str_) is its own affair.
    kind: Any = type(key)
    value: Any = key
    if kind is str:
        return _quoted(value)
    if kind is int and not -_LARGEST_KEY < value < _LARGEST_KEY:
        return None
    if kind in (int, bool, bytes, type(None)):
        return repr(value)
    if kind is float:
        return repr(value) if value == value else None  # noqa: PLR0124  NaN may be a key more than once
    if kind is tuple and depth < _DEEPEST_KEY:
        parts = [_key(part, depth + 1) for part in value]
        return None if None in parts else f"({', '.join(map(str, parts))},)"
    return None


def _quoted(text: str) -> str:
    # A lone surrogate cannot travel in UTF-8; its escape cannot be mistaken, because a real backslash is doubled.
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
