"""Handlers as a file's syntax tree shows them: what ``@coldstart(...)`` decorates, its name, and its loaders."""

from __future__ import annotations

import _ast
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.keys.source import Sources, statements
from coldstart.keys.syntax import DEFINITIONS, dotted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from coldstart.keys.source import SourceFile
    from coldstart.keys.syntax import Node

_DECORATORS = frozenset({"coldstart.coldstart", "coldstart.decorator.coldstart"})


class PartSource(NamedTuple):
    """Where a part's ``load`` and ``build`` are: expressions of the file, or the class."""

    load: Node
    build: Node


class HandlerSource(NamedTuple):
    """A handler as its file shows it, before the import.

    ``name`` is None when it is computed. ``attribute`` is the variable of the module that holds the handler. ``env``,
    ``secrets``, ``version`` and ``files`` are values, None where they are not given, COMPUTED where they are not
    literal. ``has_program``: it has a ``program=``. ``obstacle`` says why the parts cannot be told ("" if they can).
    """

    name: str | None
    attribute: str
    line: int
    parts: Mapping[str, PartSource]
    env: Any
    secrets: Any
    version: Any
    files: Any
    is_class: bool
    has_program: bool
    obstacle: str
    sources: Sources


def find_handlers(path: str) -> tuple[HandlerSource, ...]:
    """The handlers that a file defines at its top level, in order.

    Found are decorated functions and classes and ``handler = coldstart("name", ...)(function)``, in branches too, under
    whatever name coldstart was imported. Handlers made inside functions are not: they wait for the import. Raises
    HandlerError, with the line, where the file is not Python, and where it cannot be read.
    """
    sources = Sources(path)
    file = sources.handler
    return tuple(
        _handler(sources, call, target, attribute)
        for node in statements(file.body)
        for call, target, attribute in _applications(file, node)
    )


def _applications(file: SourceFile, node: Node) -> Iterator[tuple[Node, Node, str]]:
    """Each ``coldstart(...)`` call that a statement applies to something: the call, the something, the attribute."""
    if isinstance(node, DEFINITIONS):
        for decorator in node.decorator_list:
            if _is_decorator(decorator, file):
                yield decorator, node, node.name
    elif isinstance(node, (_ast.Assign, _ast.AnnAssign)) and type(node.value) is _ast.Call:
        target = node.targets[0] if isinstance(node, _ast.Assign) else node.target
        if _is_decorator(node.value.func, file) and type(target) is _ast.Name and len(node.value.args) == 1:
            yield node.value.func, node.value.args[0], target.id


def _is_decorator(node: Node, file: SourceFile) -> bool:
    return type(node) is _ast.Call and dotted(node.func, file.aliases) in _DECORATORS


def _handler(sources: Sources, call: Node, target: Node, attribute: str) -> HandlerSource:
    file = sources.handler
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    name = options.get("name", call.args[0] if call.args else None)
    owner = _owner(file, target)
    parts, obstacle = _parts(options, owner)
    if None in options or len(call.args) > 1 or any(type(argument) is _ast.Starred for argument in call.args):
        obstacle = "its decorator's arguments are computed"
    text = file.literal(name) if name is not None else None
    values = {
        key: file.literal(options[key]) if key in options else None for key in ("env", "secrets", "version", "files")
    }
    return HandlerSource(
        name=text if type(text) is str else None,
        attribute=attribute,
        line=getattr(target, "lineno", call.lineno),
        parts=parts,
        is_class=owner is not None,
        has_program="program" in options and not _is_none(options["program"]),
        obstacle=obstacle,
        sources=sources,
        **values,
    )


def _owner(file: SourceFile, target: Node) -> Node:
    """The class that is decorated, or None."""
    leaves = [target] if type(target) is not _ast.Name else file.leaves(target.id)
    return leaves[0] if len(leaves) == 1 and type(leaves[0]) is _ast.ClassDef else None


def _parts(options: Mapping[str | None, Node], owner: Node) -> tuple[dict[str, PartSource], str]:
    if owner is not None:
        return {"": PartSource(owner, owner)}, ""
    load, build = options.get("load"), options.get("build")
    if load is None:
        return {}, "its decorator shows no load="
    loads, builds = _named(load), _named(build)
    if loads is None or builds is None:
        return {}, "the names of its parts are computed"
    if set(builds) - set(loads):
        return {}, "load= and build= name different parts"
    return {part: PartSource(loads[part], builds.get(part)) for part in loads}, ""


def _named(node: Node) -> dict[str, Node] | None:
    """The expressions of a dict display by their literal keys; any other expression is the one part ""."""
    if node is None or _is_none(node):
        return {}
    if type(node) is not _ast.Dict:
        return {"": node}
    names = [key.value for key in node.keys if type(key) is _ast.Constant and type(key.value) is str]
    return dict(zip(names, node.values, strict=True)) if len(names) == len(node.keys) else None


def _is_none(node: Node) -> bool:
    return type(node) is _ast.Constant and node.value is None
