"""The shape of a state that is only containers, plain values and arrays, as JSON: such a state needs no ``build``.

::

    None, True, "text", 1, 1.5      ["none"], true, "text", 1, 1.5
    float nan, inf, -inf            ["float", "nan"]
    an int beyond 53 bits           ["int", "-0x1f..."]
    text with lone surrogates       ["str", "<hex of UTF-8>"]
    bytes, complex                  ["bytes", "<hex>"], ["complex", re, im]
    list, tuple                     ["list", [...]], ["tuple", [...]]
    dict, in its order              ["dict", [[key, value], ...]]
    an array                        ["array", "<path of its leaf>"]

Exactly these types: a subclass (an enum, numpy.float64, a namedtuple) would come back as something else. None has a
tag, so that no node is null: a manifest's ``tree`` is null when there is none.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NoReturn

from coldstart.errors import ManifestError, UncapturableError
from coldstart.frameworks.paths import ROOT, item, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_DEPTH = 100
MAX_NODES = 1_000_000
MAX_PLAIN_BYTES = 16 << 20
"""Text and bytes of a tree together. Larger plain data belongs into arrays or files: every start reads the tree."""

_EXACT_INT = 1 << 53
_HEX_INT = re.compile(r"-?0x[0-9a-f]+\Z")


def encode(state: Any, paths: Mapping[int, str]) -> Any:
    """The tree of ``state``; ``paths`` maps the id of every array in it to its leaf's path.

    Raises UncapturableError ("state.tokenizer is a PreTrainedTokenizer") for what no tree can hold: other types, a list
    or dict that is in two places, more than the limits above allow.
    """
    return _Encoder(paths).node(state, ROOT, 0)


def rebuild(node: Any, arrays: Mapping[str, Any]) -> Any:
    """The state that ``node`` is a tree of, around ``arrays`` by path. Raises ManifestError: nodes are not trusted."""
    return _Rebuilder(arrays).value(node, 0)


class _Encoder:
    def __init__(self, paths: Mapping[int, str]) -> None:
        self.paths = paths
        self.held: dict[int, str] = {}
        self.nodes = 0
        self.plain_bytes = 0

    def node(self, value: Any, path: str, depth: int) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH:
            _obstacle(path[:200], f"nests deeper than {MAX_DEPTH} levels")
        if self.nodes > MAX_NODES or self.plain_bytes > MAX_PLAIN_BYTES:
            _obstacle(
                path, "is beyond the size of plain values that a snapshot holds: keep large data in arrays or files"
            )
        if id(value) in self.paths:
            return self.array(value, path)
        cls = type(value)
        plain = _PLAIN.get(cls)
        if plain is not None:
            self.plain_bytes += len(value) if cls in (str, bytes) else 8
            return plain(value)
        if cls is tuple:
            return ["tuple", self.items(value, path, depth)]
        if cls not in (list, dict):
            _obstacle(path, f"is a {cls.__name__}")
        first = self.held.setdefault(id(value), path)
        if first != path:
            _obstacle(path, f"is the same {cls.__name__} as {shown(first)}")
        if cls is list:
            return ["list", self.items(value, path, depth)]
        pairs = enumerate(value.items())
        return ["dict", [self.pair(key, held, item(path, key, place), depth) for place, (key, held) in pairs]]

    def items(self, values: Any, path: str, depth: int) -> list[Any]:
        return [self.node(value, item(path, index, index), depth + 1) for index, value in enumerate(values)]

    def pair(self, key: Any, value: Any, path: str, depth: int) -> list[Any]:
        return [self.node(key, f"{path} (its key)", depth + 1), self.node(value, path, depth + 1)]

    def array(self, value: Any, path: str) -> list[Any]:
        if getattr(value, "__dict__", None):
            _obstacle(path, "is a tensor with attributes of its own")
        return ["array", self.paths[id(value)]]


def _obstacle(path: str, what: str) -> NoReturn:
    raise UncapturableError(f"{shown(path)} {what}", path=path)


def _int_node(value: int) -> Any:
    return value if -_EXACT_INT < value < _EXACT_INT else ["int", hex(value)]


def _float_node(value: float) -> Any:
    return value if math.isfinite(value) else ["float", repr(value)]


def _str_node(value: str) -> Any:
    if value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value):
        return value
    return ["str", value.encode("utf-8", "surrogatepass").hex()]


_PLAIN: Mapping[type, Callable[[Any], Any]] = {
    type(None): lambda _: ["none"],
    bool: lambda value: value,
    int: _int_node,
    float: _float_node,
    complex: lambda value: ["complex", _float_node(value.real), _float_node(value.imag)],
    str: _str_node,
    bytes: lambda value: ["bytes", value.hex()],
}


class _Rebuilder:
    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.arrays = arrays
        self.readers: Mapping[str, Callable[[list[Any], int], Any]] = {
            "none": _none_value,
            "int": _int_value,
            "float": _float_value,
            "str": _str_value,
            "bytes": _bytes_value,
            "complex": self.complex_value,
            "array": self.array_value,
            "list": self.items,
            "tuple": lambda arguments, depth: tuple(self.items(arguments, depth)),
            "dict": self.dict_value,
        }

    def value(self, node: Any, depth: int) -> Any:
        if type(node) in (bool, int, float, str):
            return node
        if depth > MAX_DEPTH:
            _odd(f"nests deeper than {MAX_DEPTH} levels")
        tag = node[0] if type(node) is list and node else None
        reader = self.readers.get(tag) if type(tag) is str else None
        if reader is None:
            _odd(f"has a node of no known kind: {tag[:100] if type(tag) is str else type(node).__name__}")
        return reader(node[1:], depth)

    def items(self, arguments: list[Any], depth: int) -> list[Any]:
        return [self.value(node, depth + 1) for node in _only(arguments, list)]

    def dict_value(self, arguments: list[Any], depth: int) -> dict[Any, Any]:
        pairs = _only(arguments, list)
        if any(type(pair) is not list or len(pair) != 2 for pair in pairs):  # noqa: PLR2004  key and value
            _odd("has a dict that is not made of pairs")
        try:
            made = {self.value(key, depth + 1): self.value(node, depth + 1) for key, node in pairs}
        except TypeError as error:
            raise ManifestError(f"the manifest's tree has a dict with an impossible key: {error}") from error
        if len(made) != len(pairs):
            _odd("has a dict with the same key twice")
        return made

    def complex_value(self, arguments: list[Any], depth: int) -> complex:
        parts = [self.value(node, depth + 1) for node in arguments]
        if len(parts) != 2 or any(type(part) is not float for part in parts):  # noqa: PLR2004  real and imaginary
            _odd("has a complex number that is not two floats")
        return complex(*parts)

    def array_value(self, arguments: list[Any], depth: int) -> Any:  # noqa: ARG002  a reader like the others
        path = _only(arguments, str)
        if path not in self.arrays:
            _odd(f"names the array {path[:200]!r}, which is not among the leaves")
        return self.arrays[path]


def _odd(what: str) -> NoReturn:
    raise ManifestError(f"the manifest's tree {what}")


def _only(arguments: list[Any], kind: type) -> Any:
    if len(arguments) != 1 or type(arguments[0]) is not kind:
        _odd(f"has a node whose content is not one {kind.__name__}")
    return arguments[0]


def _none_value(arguments: list[Any], _depth: int) -> None:
    if arguments:
        _odd("has a None with content")


def _int_value(arguments: list[Any], _depth: int) -> int:
    text = _only(arguments, str)
    if not _HEX_INT.match(text):
        _odd(f"has an int that is not written in base 16: {text[:100]!r}")
    return int(text, 16)


def _float_value(arguments: list[Any], _depth: int) -> float:
    text = _only(arguments, str)
    if text not in ("nan", "inf", "-inf"):
        _odd(f"has a float that is no float: {text[:100]!r}")
    return float(text)


def _str_value(arguments: list[Any], depth: int) -> str:
    try:
        return _bytes_value(arguments, depth).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise ManifestError(f"the manifest's tree has a text that is not UTF-8: {error}") from error


def _bytes_value(arguments: list[Any], _depth: int) -> bytes:
    try:
        return bytes.fromhex(_only(arguments, str))
    except ValueError as error:
        raise ManifestError(f"the manifest's tree has bytes that are not written in base 16: {error}") from error
