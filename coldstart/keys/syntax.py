"""Python source as a key sees it: canonical text, and the names that statements bind.

Works on the interpreter's own syntax trees, without ``ast`` or ``inspect`` (17 and 20 ms at a worker's start). Nothing
here runs or imports the user's code. ``dump`` gives the same text for the same code on every supported Python, whatever
its comments, layout and docstrings.
"""

from __future__ import annotations

import _ast
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import HandlerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    Node = Any
    """A syntax tree node. Its fields differ by kind, so the checker is told nothing about them."""

FUNCTIONS = (_ast.FunctionDef, _ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, _ast.ClassDef)
IMPORTS = (_ast.Import, _ast.ImportFrom)
COMPREHENSIONS = (_ast.ListComp, _ast.SetComp, _ast.DictComp, _ast.GeneratorExp)

_SKIPPED_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
_PLAIN_FIELDS = _SKIPPED_FIELDS | {"id", "attr", "arg", "op", "ops", "level", "module", "asname", "conversion"}
"""Fields that never hold a node with names in it."""


class ImportUse(NamedTuple):
    """One imported thing: ``import module`` (``name`` is None) or ``from <level dots>module import name``."""

    module: str
    level: int
    name: str | None


def read_bytes(path: str) -> bytes:
    """The bytes of a file. Raises HandlerError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise HandlerError(f"cannot read {path} ({error.strerror}): check the path of the handler file") from error


def parse(source: bytes, path: str) -> Node:
    """The syntax tree of a file's bytes. Raises HandlerError with the line where it is not Python."""
    try:
        return compile(source, path, "exec", _ast.PyCF_ONLY_AST, dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise HandlerError(f"{path}:{line}: not valid Python: {getattr(error, 'msg', error)}") from error


# --- canonical text ------------------------------------------------------------------------------------------------


def digest_of(text: str | bytes) -> str:
    """BLAKE3 of 16 bytes, as 32 hex digits."""
    from blake3 import blake3

    digest: str = blake3(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")).hexdigest(
        length=16
    )
    return digest


def literal_text(value: object) -> str | None:
    """A canonical text of a plain value, else None.

    Plain are None, ``...``, bool, numbers, str, bytes, and tuples, lists and dicts of these.
    """
    kind = type(value)
    if kind in (tuple, list):
        return _joined(f"{kind.__name__}[", [literal_text(item) for item in value])  # type: ignore[attr-defined]
    if kind is dict:
        return _joined("dict[", [literal_text(item) for pair in value.items() for item in pair])  # type: ignore[attr-defined]
    if kind is str:
        return f"s{len(value)}:{value}"  # type: ignore[arg-type]
    if kind is bytes:
        return f"b{value.hex()}"  # type: ignore[attr-defined]
    if kind is int:
        return f"i{value:x}"
    if value is None or value is ... or kind in (bool, float, complex):
        return f"{kind.__name__} {value!r}"
    return None


def _joined(start: str, texts: list[str | None]) -> str | None:
    parts = [text for text in texts if text is not None]
    return start + ",".join(parts) + "]" if len(parts) == len(texts) else None


def dump(node: Node) -> str:
    """Canonical text of a tree: kinds and fields, without positions, docstrings, lone constants and empty fields."""
    texts: list[str] = []
    _dump(node, texts.append)
    return "".join(texts)


def _dump(node: Node, write: Callable[[str], None]) -> None:
    kind: Any = type(node)
    if kind is _ast.Name:  # a third of all nodes
        write(f"(Name id=s{len(node.id)}:{node.id})")
        return
    if kind is _ast.Constant:
        write(f"<{literal_text(node.value)}>")
        return
    write("(" + kind.__name__)
    for field in _written_fields(kind):
        value = getattr(node, field, None)
        if value is None:
            continue
        if isinstance(value, _ast.AST):
            write(f" {field}=")
            _dump(value, write)
        elif type(value) is list:
            _dump_list(field, _joined_constants(value) if kind is _ast.JoinedStr else value, write)
        else:
            write(f" {field}={literal_text(value)}")
    write(")")


@cache
def _written_fields(kind: Any) -> tuple[str, ...]:
    return tuple(field for field in kind._fields if field not in _SKIPPED_FIELDS)


def _dump_list(field: str, values: list[Node], write: Callable[[str], None]) -> None:
    if not values:
        return
    write(f" {field}=[")
    for value in values:
        if isinstance(value, _ast.AST):
            if not is_lone_constant(value):
                _dump(value, write)
        else:
            write(f"<{literal_text(value)}>")
    write("]")


def is_lone_constant(node: Node) -> bool:
    """A statement that is nothing but a constant: a docstring, a text used as a comment, ``...``."""
    return type(node) is _ast.Expr and type(node.value) is _ast.Constant


def _joined_constants(values: list[Node]) -> list[Node]:
    """The parts of an f-string, neighbours joined and empty ones dropped: Python 3.12 splits texts differently."""
    joined: list[Node] = []
    for value in values:
        last = joined[-1] if joined else None
        if type(value) is type(last) is _ast.Constant:
            text: Any = last.value
            joined[-1] = _ast.Constant(value=text + value.value)
        elif type(value) is not _ast.Constant or value.value:
            joined.append(value)
    return joined


# --- names ---------------------------------------------------------------------------------------------------------


def children(node: Node) -> list[Node]:
    """The nodes directly below a node, operators left out."""
    found: list[Node] = []
    kind: Any = type(node)
    for field in _node_fields(kind):
        value = getattr(node, field, None)
        if type(value) is list:
            found += [item for item in value if isinstance(item, _ast.AST)]
        elif isinstance(value, _ast.AST):
            found.append(value)
    return found


@cache
def _node_fields(kind: Any) -> tuple[str, ...]:
    return tuple(field for field in kind._fields if field not in _PLAIN_FIELDS)


def import_uses(node: Node) -> Iterator[tuple[str, ImportUse, str]]:
    """Each name that an import binds ("*" for a star), what it imports, and the dotted path that it stands for."""
    for alias in node.names:
        if type(node) is _ast.Import:
            bound = alias.asname or alias.name.partition(".")[0]
            yield bound, ImportUse(alias.name, 0, None), alias.name if alias.asname else bound
        else:
            module = node.module or ""
            target = f"{'.' * node.level}{module}.{alias.name}"
            yield alias.asname or alias.name, ImportUse(module, node.level, alias.name), target


def bound_names(nodes: Iterable[Node]) -> dict[str, str]:
    """Names that the nodes bind in their own scope -> the dotted path of an imported name, "" for any other.

    Scopes inside (functions, classes, comprehensions) keep their names to themselves. Names declared ``global`` or
    ``nonlocal`` are not bound here.
    """
    bound: dict[str, str] = {}
    elsewhere: set[str] = set()
    for node in nodes:
        _bind(node, bound, elsewhere)
    return {name: target for name, target in bound.items() if name not in elsewhere}


def _bind(node: Node, bound: dict[str, str], elsewhere: set[str]) -> None:  # one case for each way to bind a name
    kind = type(node)
    if kind is _ast.Constant or kind is _ast.Lambda:
        return
    if kind is _ast.Name:
        if type(node.ctx) is not _ast.Load:
            bound.setdefault(node.id, "")
        return
    if kind in DEFINITIONS:
        bound.setdefault(node.name, "")
        return
    if kind in IMPORTS:
        bound.update({name: target for name, _, target in import_uses(node) if name != "*"})
        return
    if kind in (_ast.Global, _ast.Nonlocal):
        elsewhere.update(node.names)
        return
    if kind is _ast.comprehension:  # its target lives in the comprehension; a walrus in it binds here
        for child in (node.iter, *node.ifs):
            _bind(child, bound, elsewhere)
        return
    if kind in (_ast.ExceptHandler, _ast.MatchAs, _ast.MatchStar) and node.name:
        bound.setdefault(node.name, "")
    if kind is _ast.MatchMapping and node.rest:
        bound.setdefault(node.rest, "")
    for child in children(node):
        _bind(child, bound, elsewhere)


def global_names(node: Node) -> set[str]:
    """Names that a ``global`` statement anywhere below declares: the code may bind them in its module."""
    names = set(node.names) if type(node) is _ast.Global else set()
    for child in children(node):
        names |= global_names(child)
    return names


def parameters(arguments: Node) -> list[str]:
    """Names of the parameters of a function, in order."""
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in (*listed, arguments.vararg, arguments.kwarg) if argument is not None]


def dotted(node: Node, aliases: Mapping[str, str]) -> str | None:
    """The dotted path of a name or attribute chain that starts at an imported name, e.g. ``os.environ``."""
    if type(node) is _ast.Attribute:
        base = dotted(node.value, aliases)
        return f"{base}.{node.attr}" if base else None
    return aliases.get(node.id) if type(node) is _ast.Name else None
