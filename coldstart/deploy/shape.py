"""A handler as its file's syntax tree shows it. Whoever deploys need not have what the file imports: it is never run."""

from __future__ import annotations

import _ast
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.definition import CLASS_METHODS, check_name
from coldstart.errors import HandlerError
from coldstart.keys.handlers import find_handlers
from coldstart.keys.source import COMPUTED, applies_coldstart
from coldstart.keys.syntax import DEFINITIONS, FUNCTIONS, children, dotted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from coldstart.keys.handlers import HandlerSource
    from coldstart.keys.source import SourceFile
    from coldstart.keys.syntax import Node


class HandlerShape(NamedTuple):
    """What deploying needs to know of a handler.

    ``attribute`` is the module's variable that holds it; ``kind`` is sync, async, generator or async_generator.
    ``methods`` are the further public methods of the class form, by name, each with its kind. ``warmup_inputs`` are
    those that the file spells out. ``env``, ``files`` and ``concurrency`` are empty (1) where they are computed.
    """

    name: str
    attribute: str
    kind: str
    methods: Mapping[str, str]
    concurrency: int
    env: tuple[str, ...]
    secrets: tuple[str, ...]
    files: Mapping[str, str]
    warmup_inputs: tuple[Any, ...]


def read_shape(path: str, name: str | None = None) -> HandlerShape:
    """The handler of the file at ``path`` that ``name`` means: its name or its variable's; None for the only one.

    Raises HandlerError where there is none or more than one, and for a name, secrets or a function that the file does
    not spell out.
    """
    found = _choose(path, find_handlers(path), name)
    where = f"{path}:{found.line}"
    if found.name is None:
        raise HandlerError(f"{where}: the name of handler {found.attribute!r} is computed: deploying needs it literal")
    if found.secrets is COMPUTED:
        raise HandlerError(f"{where}: secrets= of {found.name!r} is computed: deploying needs a literal list of names")
    file = found.sources.handler
    call, target = _application(file, found)
    definition = _definition(file, target, where)
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    concurrency = file.literal(options["concurrency"]) if "concurrency" in options else 1
    is_class = isinstance(definition, _ast.ClassDef)
    return HandlerShape(
        name=check_name(found.name),
        attribute=found.attribute,
        kind=_kind(_method(file, definition, "handle", where)) if is_class else _kind(definition),
        methods=dict(_public_methods(file, definition)) if is_class else {},
        concurrency=concurrency if type(concurrency) is int else 1,
        env=_texts(found.env),
        secrets=_texts(found.secrets),
        files=found.files if isinstance(found.files, dict) else {},
        warmup_inputs=_warmup_inputs(file, options.get("warmup")),
    )


def _choose(path: str, found: tuple[HandlerSource, ...], name: str | None) -> HandlerSource:
    if not found:
        raise HandlerError(
            f"{path} shows no handler at its top level: decorate a function (event, model) with"
            " @coldstart('name', load=...)"
        )
    wanted = [each for each in found if name in (None, each.name, each.attribute)]
    if len(wanted) == 1:
        return wanted[0]
    names = ", ".join(each.name or each.attribute for each in found)
    count = f"{len(wanted)} handlers" if wanted else f"no handler {name!r}"
    raise HandlerError(f"{path} has {count}; choose one with FILE:NAME (there: {names})")


def _application(file: SourceFile, found: HandlerSource) -> tuple[Node, Node]:
    """The ``coldstart(...)`` call of a handler, and what it is applied to."""
    for leaf in file.leaves(found.attribute):
        for call in getattr(leaf, "decorator_list", ()):
            if leaf.lineno == found.line and type(call) is _ast.Call and applies_coldstart(call, file.aliases):
                return call, leaf
        value = getattr(leaf, "value", None)
        if type(value) is _ast.Call and type(value.func) is _ast.Call and value.args[0].lineno == found.line:
            return value.func, value.args[0]
    raise HandlerError(
        f"{file.path}:{found.line}: {found.attribute!r} is bound more than once: give it a name of its own"
    )


def _definition(file: SourceFile, target: Node, where: str) -> Node:
    """The function, lambda or class that a decorated expression is."""
    leaves = file.leaves(target.id) if type(target) is _ast.Name else [target]
    if len(leaves) == 1 and isinstance(leaves[0], (*DEFINITIONS, _ast.Lambda)):
        return leaves[0]
    raise HandlerError(f"{where}: what @coldstart decorates is not defined in this file: deploying has to see it")


def _kind(node: Node) -> str:
    makes_pieces = any(isinstance(inner, (_ast.Yield, _ast.YieldFrom)) for inner in _own_nodes(node))
    if type(node) is _ast.AsyncFunctionDef:
        return "async_generator" if makes_pieces else "async"
    return "generator" if makes_pieces else "sync"


def _own_nodes(node: Node) -> Iterator[Node]:
    """The nodes of a function's body, without those of the functions and classes in it."""
    for child in node.body if isinstance(node.body, list) else [node.body]:
        yield from _below(child)


def _below(node: Node) -> Iterator[Node]:
    yield node
    if not isinstance(node, (*DEFINITIONS, _ast.Lambda)):
        for child in children(node):
            yield from _below(child)


def _method(file: SourceFile, owner: Node, name: str, where: str) -> Node:
    for method in _methods(file, owner):
        if method.name == name:
            return method
    raise HandlerError(f"{where}: class {owner.name} shows no method {name}(self, event) in this file")


def _methods(file: SourceFile, owner: Node) -> Iterator[Node]:
    """The methods of a class and of its bases that the file defines, nearest first."""
    yield from (node for node in owner.body if isinstance(node, FUNCTIONS))
    for base in owner.bases:
        leaves = file.leaves(base.id) if type(base) is _ast.Name else []
        if len(leaves) == 1 and type(leaves[0]) is _ast.ClassDef:
            yield from _methods(file, leaves[0])


def _public_methods(file: SourceFile, owner: Node) -> Iterator[tuple[str, str]]:
    seen = set(CLASS_METHODS)
    for method in _methods(file, owner):
        if method.name not in seen and not method.name.startswith("_") and not _is_property(method):
            yield method.name, _kind(method)
        seen.add(method.name)


def _is_property(method: Node) -> bool:
    names = {getattr(each, "id", None) or getattr(each, "attr", None) for each in method.decorator_list}
    return bool(names & {"property", "cached_property", "setter", "deleter"})


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value) else ()


def _warmup_inputs(file: SourceFile, node: Node | None) -> tuple[Any, ...]:
    if type(node) is _ast.Call and (dotted(node.func, file.aliases) or "").endswith(".Warmup"):
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        node = node.args[0] if node.args else given.get("inputs")
    inputs = file.literal(node) if node is not None else ()
    return tuple(inputs) if isinstance(inputs, (list, tuple)) else ()
