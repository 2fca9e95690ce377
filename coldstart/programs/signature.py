"""What a call of an entry point looks like: which arguments it has, which arrays are in them, and what comes back.

A call is taken apart into its *structure*, which is JSON, and its arrays in the order in which they are met::

    an array                     ["array", 3]              the fourth of the call
    None, True, 1, 1.5, "text"   ["plain", value]
    list, tuple                  ["list", [...]], ["tuple", [...]]
    dict, in its order           ["dict", [[key, node], ...]]
    an ordered mapping of a      ["outputs", [[key, node], ...]]    (transformers' ModelOutput and its like)
    class of its own

Everything but the arrays is part of the program: a call whose structure differs in anything is refused, by the name of
the argument. Arrays must have the dtype and the sizes that the program was made for. A program of a runtime checks
nothing: it would answer, and the answer would be garbage.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from coldstart.errors import ProgramCallError, ProgramError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from coldstart.programs.base import Array

MAX_DEPTH = 16
UNBOUNDED = 1 << 40
"""The largest size of a dimension that has no other limit."""

POSITION = "argument_"
"""How made-up names begin: those of parameters whose own cannot be seen, and of what ``*args`` takes."""

_PLAIN = (type(None), bool, int, float, str)


class Signature(NamedTuple):
    """The calls that an entry point takes, and what they give.

    ``parameters``: names of the positional parameters, in order. ``arguments`` and ``results`` are structures, the first of
    a dict of arguments by name. ``ranges``: symbol -> least and largest size, both allowed.
    """

    parameters: tuple[str, ...]
    arguments: Any
    inputs: tuple[Array, ...]
    results: Any
    outputs: tuple[Array, ...]
    ranges: Mapping[str, tuple[int, int]]


class Outputs(dict[str, Any]):
    """A result that was an ordered mapping of a class of its own: by key, by attribute, by position."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the result has no {name!r}; it has {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            return list(self.values())[key]
        return super().__getitem__(key)


def framework_of(value: Any) -> str:
    """``numpy`` or ``torch`` for an array of theirs, "" for anything else. Imports neither."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        return "torch"
    return "numpy" if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)) else ""


def dtype_of(array: Any) -> str:
    """The dtype's name, which numpy and torch share."""
    return str(array.dtype).removeprefix("torch.")


def named_arguments(
    parameters: Sequence[str], arguments: Sequence[Any], options: Mapping[str, Any], *, entry: str
) -> dict[str, Any]:
    """The arguments of a call by name, in the order of the parameters. Raises ProgramCallError."""
    if len(arguments) > len(parameters):
        _refuse(entry, f"takes at most {len(parameters)} positional arguments, {len(arguments)} were given")
    named = dict(zip(parameters, arguments, strict=False))
    twice = sorted(set(named) & set(options))
    if twice:
        _refuse(entry, f"got the argument {twice[0]!r} twice")
    given = {**named, **options}
    order = {name: place for place, name in enumerate(parameters)}
    return dict(sorted(given.items(), key=lambda pair: (order.get(pair[0], len(order)), pair[0])))


def called_with(function: Callable[..., Any], named: Mapping[str, Any]) -> Any:
    """Call ``function`` with the arguments that ``named_arguments`` gave: by position if any has only a made-up name."""
    if any(name.startswith(POSITION) for name in named):
        return function(*named.values())
    return function(**named)


def taken_apart(value: Any, name: str, *, entry: str) -> tuple[Any, list[tuple[str, Any]]]:
    """The structure of ``value``, and its arrays, each with a name that says where it is. Raises ProgramCallError."""
    arrays: list[tuple[str, Any]] = []
    return _node(value, name, arrays, 0, entry), arrays


def _node(value: Any, name: str, arrays: list[tuple[str, Any]], depth: int, entry: str) -> Any:
    if framework_of(value):
        arrays.append((name, value))
        return ["array", len(arrays) - 1]
    kind = type(value)
    if kind in _PLAIN:
        return ["plain", value]
    if depth > MAX_DEPTH:
        _refuse(entry, f"{name} nests deeper than {MAX_DEPTH} levels")
    if kind in (list, tuple):
        items = [_node(item, f"{name}[{place}]", arrays, depth + 1, entry) for place, item in enumerate(value)]
        return [kind.__name__, items]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        pairs = [
            [key, _node(item, f"{name}.{key}" if name else key, arrays, depth + 1, entry)]
            for key, item in value.items()
        ]
        return ["dict" if kind is dict else "outputs", pairs]
    raise _refusal(
        entry,
        f"{name or 'the result'} is a {kind.__qualname__}: arrays, None, numbers, texts, lists, tuples and dicts can be passed",
    )


def put_together(node: Any, arrays: Sequence[Any]) -> Any:
    """The value with this structure around ``arrays``. The structure was checked by ``check_structure``."""
    tag, content = node
    if tag == "array":
        return arrays[content]
    if tag == "plain":
        return content
    if tag in ("list", "tuple"):
        items = [put_together(item, arrays) for item in content]
        return tuple(items) if tag == "tuple" else items
    made = {key: put_together(item, arrays) for key, item in content}
    return Outputs(made) if tag == "outputs" else made


def check_structure(node: Any, arrays: int, *, depth: int = 0) -> None:
    """Raise ProgramError unless ``node`` is a structure around at most ``arrays`` arrays."""
    if type(node) is not list or len(node) != 2 or depth > MAX_DEPTH:  # noqa: PLR2004  tag and content
        raise ProgramError("a program's record has a malformed structure")
    tag, content = node
    if tag == "array" and type(content) is int and 0 <= content < arrays:
        return
    if tag == "plain" and type(content) in _PLAIN:
        return
    if tag in ("list", "tuple") and type(content) is list:
        for item in content:
            check_structure(item, arrays, depth=depth + 1)
        return
    if tag in ("dict", "outputs") and type(content) is list:
        for pair in content:
            if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str:  # noqa: PLR2004  key and node
                raise ProgramError("a program's record has a malformed structure")
            check_structure(pair[1], arrays, depth=depth + 1)
        return
    raise ProgramError("a program's record has a malformed structure")


def same_structure(one: Any, other: Any) -> bool:
    """Whether two structures are the same: 1 is neither True nor 1.0, which compute otherwise, and NaN is NaN."""
    return repr(one) == repr(other)


def check_call(signature: Signature, structure: Any, arrays: Sequence[tuple[str, Any]], *, entry: str) -> None:
    """Raise ProgramCallError unless the call is one that the program was made for."""
    if not same_structure(structure, signature.arguments):
        _refuse(entry, next(_differences(signature.arguments, structure, ""), "is called in another way"))
    sizes: dict[str, int] = {}
    for wanted, (name, array) in zip(signature.inputs, arrays, strict=True):
        if dtype_of(array) != wanted.dtype or not _fits(tuple(array.shape), wanted, signature.ranges, sizes):
            held = [f"{symbol} is {size}" for symbol, size in sizes.items() if symbol in wanted.shape]
            so_far = f"; by the arguments before it {', '.join(held)}" if held else ""
            given = f"{dtype_of(array)} {_shape(array.shape)}"
            _refuse(entry, f"{name} is {given}, the program takes {described(wanted, signature.ranges)}{so_far}")


def _fits(shape: tuple[int, ...], wanted: Array, ranges: Mapping[str, tuple[int, int]], sizes: dict[str, int]) -> bool:
    """Whether an array may have this shape, ``sizes`` being what its symbols are so far; its own are added."""
    if len(shape) != len(wanted.shape):
        return False
    found: dict[str, int] = {}
    for size, allowed in zip(shape, wanted.shape, strict=True):
        if isinstance(allowed, int):
            if size != allowed:
                return False
            continue
        least, most = ranges[allowed]
        if not least <= size <= most or sizes.get(allowed, size) != size or found.setdefault(allowed, size) != size:
            return False
    sizes |= found
    return True


def described(array: Array, ranges: Mapping[str, tuple[int, int]]) -> str:
    """An array as a person reads it: ``int64 (s0, 8) with s0 1 to 64``."""
    symbols = dict.fromkeys(size for size in array.shape if isinstance(size, str))
    limits = [f"{name} {ranges[name][0]}{_most(ranges[name][1])}" for name in symbols]
    return f"{array.dtype} {_shape(array.shape)}{' with ' if limits else ''}{', '.join(limits)}"


def _shape(sizes: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


def _most(size: int) -> str:
    return " or more" if size >= UNBOUNDED else f" to {size}"


def _differences(recorded: Any, given: Any, name: str) -> Iterator[str]:
    """What is different in the structure of a call, argument by argument."""
    if same_structure(recorded, given) or recorded[0] == given[0] == "array":
        return
    kind = recorded[0]
    if kind == given[0] and kind in ("dict", "outputs"):
        before, now = dict(recorded[1]), dict(given[1])
        for key in sorted(now.keys() - before.keys()):
            yield f"got the argument {_joined(name, key)!r}, which no recorded call had"
        for key in sorted(before.keys() - now.keys()):
            yield f"misses the argument {_joined(name, key)!r}, which every recorded call had"
        for key, node in before.items():
            if key in now:
                yield from _differences(node, now[key], _joined(name, key))
        yield f"{name or 'the call'} has its keys in another order"
    elif kind == given[0] and kind in ("list", "tuple") and len(recorded[1]) == len(given[1]):
        for place, (one, other) in enumerate(zip(recorded[1], given[1], strict=True)):
            yield from _differences(one, other, f"{name}[{place}]")
    else:
        was = _shown(recorded)
        yield f"{name} is {_shown(given)}, it was {was} when the program was made: what varies has to be an array"


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _shown(node: Any) -> str:
    return (
        repr(node[1])[:80]
        if node[0] == "plain"
        else f"a {node[0]} of {len(node[1])}"
        if node[0] != "array"
        else "an array"
    )


def _refusal(entry: str, what: str) -> ProgramCallError:
    place = f"entry point {entry!r} of the program" if entry else "the program's call"
    return ProgramCallError(f"{place}: {what}; the calls of warmup= and export(dynamic=...) say what a program takes")


def _refuse(entry: str, what: str) -> NoReturn:
    raise _refusal(entry, what)
