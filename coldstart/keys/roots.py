"""Where a loader is defined: from its expression in a handler file, or from the object itself after the import.

Both ways end at the same root, so that a key is the same before and after the import. An expression whose
object the source does not fix (a call, a name bound in several ways) gives None: it waits for the import.
"""

from __future__ import annotations

import _ast
import os
import sys
from functools import partial
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NoReturn

from coldstart.errors import KeyUncomputableError
from coldstart.keys.reach import Root
from coldstart.keys.source import COMPUTED
from coldstart.keys.syntax import DEFINITIONS, FUNCTIONS, dotted, literal_text, parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.keys.source import SourceFile, Sources
    from coldstart.keys.syntax import Node

_VARARGS, _VARKEYWORDS = 0x04, 0x08  # inspect.CO_VARARGS, inspect.CO_VARKEYWORDS
_MOST_ALIASES = 20


# --- from an expression ----------------------------------------------------------------------------------------------


def root_of_expression(sources: Sources, file: SourceFile, node: Node, depth: int = 0) -> Root | None:
    """The root that an expression at module level stands for; None where only the import can tell."""
    kind = type(node)
    if kind is _ast.Lambda:
        return Root(file, nodes=file.lambdas(node.lineno, parameters(node.args)))
    if kind is _ast.Name:
        return _root_of_name(sources, file, node.id, depth + 1)
    if kind is _ast.Attribute:
        return _root_of_module_attribute(sources, file, node, depth + 1)
    if kind is _ast.Call and dotted(node.func, file.aliases) == "functools.partial":
        return _root_of_partial(sources, file, node, depth + 1)
    return None


def _root_of_name(sources: Sources, file: SourceFile, name: str, depth: int) -> Root | None:
    leaves = file.leaves(name)
    if not leaves or depth > _MOST_ALIASES:
        return None
    if all(isinstance(leaf, DEFINITIONS) and leaf.name == name for leaf in leaves):
        return Root(file, name)
    leaf = leaves[0] if len(leaves) == 1 else None
    if isinstance(leaf, (_ast.Assign, _ast.AnnAssign)) and leaf.value is not None:
        targets = leaf.targets if isinstance(leaf, _ast.Assign) else [leaf.target]
        if all(type(target) is _ast.Name for target in targets):
            return root_of_expression(sources, file, leaf.value, depth)
    if isinstance(leaf, _ast.ImportFrom):
        wanted = next((alias.name for alias in leaf.names if (alias.asname or alias.name) == name), "")
        where = sources.imported_file(file, leaf.module or "", leaf.level)
        return _root_of_name(sources, where, wanted, depth + 1) if where is not None else None
    return None


def _root_of_module_attribute(sources: Sources, file: SourceFile, node: Node, depth: int) -> Root | None:
    """``module.name`` where ``import module`` is all that binds ``module``."""
    path = dotted(node.value, file.aliases)
    first = node.value
    while type(first) is _ast.Attribute:
        first = first.value
    leaves = file.leaves(getattr(first, "id", ""))
    if not path or path.startswith(".") or len(leaves) != 1 or type(leaves[0]) is not _ast.Import:
        return None
    where = sources.imported_file(file, path, 0)
    return _root_of_name(sources, where, node.attr, depth) if where is not None else None


def _root_of_partial(sources: Sources, file: SourceFile, node: Node, depth: int) -> Root | None:
    """``functools.partial(f, ...)`` of literals; a partial of a partial is one, as it is at run time."""
    inner = root_of_expression(sources, file, node.args[0], depth) if node.args else None
    values = [_literal(file, argument) for argument in node.args[1:]]
    options = {keyword.arg: _literal(file, keyword.value) for keyword in node.keywords}
    if inner is None or None in values or None in options or None in options.values():
        return None
    return _bound(inner, [text for text in values if text], {name: text for name, text in options.items() if text})


def _literal(file: SourceFile, node: Node) -> str | None:
    value = file.literal(node)
    return None if value is COMPUTED else literal_text(value)


def _bound(root: Root, arguments: Sequence[str], options: Mapping[str, str]) -> Root:
    keywords = {**dict(root.keywords), **options}
    return root._replace(arguments=(*root.arguments, *arguments), keywords=tuple(sorted(keywords.items())))


# --- from an object --------------------------------------------------------------------------------------------------


def root_of_object(sources: Sources, loader: Any, what: str) -> Root:
    """The root of a function, lambda, partial or class, named ``what`` in errors: KeyUncomputableError for all else."""
    if isinstance(loader, partial):
        return _root_of_partial_object(sources, loader, what)
    function = _unwrapped(loader)
    if isinstance(function, type):
        return _root_of_class_object(sources, function, what)
    if not isinstance(function, FunctionType):
        _refuse(what, f"is {function!r}, not a function that is written in a file")
    path = _source_path(function)
    if path is None:
        _refuse(
            what, f"is {function.__qualname__} from {function.__code__.co_filename}, which is no file that can be read"
        )
    root = _root_of_function(sources.read(path), function, what)
    return root._replace(free=_free_values(function, what))


def class_definition(sources: Sources, owner: type, what: str) -> tuple[SourceFile, Node]:
    """The file and definition of a class. Raises KeyUncomputableError where its source cannot be found."""
    path = class_path(owner)
    if path is None:
        _refuse(what, f"belongs to {owner.__qualname__}, whose file cannot be found")
    file = sources.read(path)
    for function in _methods(owner):
        found = file.locate(function.__name__, function.__code__.co_firstlineno)
        if found is not None and found[1] and getattr(found[1][-1], "name", "") == owner.__name__:
            return file, found[1][-1]
    definitions = [leaf for leaf in file.leaves(owner.__qualname__) if type(leaf) is _ast.ClassDef]
    if len(definitions) != 1:
        _refuse(what, f"belongs to {owner.__qualname__}, which is not one class at the top of {path}")
    return file, definitions[0]


def class_path(owner: type) -> str | None:
    """The file that a class is written in, if there is one."""
    paths = [_source_path(function) for function in _methods(owner)]
    module_path = getattr(sys.modules.get(owner.__module__), "__file__", None)
    return next((path for path in (*paths, module_path) if path and os.path.isfile(path)), None)


def class_free_values(owner: type, what: str) -> tuple[tuple[str, str], ...]:
    """Texts of what a class's methods close over. Raises KeyUncomputableError for values that are not plain."""
    return tuple(sorted({pair for function in _methods(owner) for pair in _free_values(function, what)}))


def _root_of_partial_object(sources: Sources, bound: partial[Any], what: str) -> Root:
    texts = [literal_text(value) for value in bound.args]
    options = {name: literal_text(value) for name, value in bound.keywords.items()}
    if None in texts or None in options.values():
        _refuse(what, "is a partial that binds something other than plain values")
    root = root_of_object(sources, bound.func, what)
    return _bound(root, [text for text in texts if text], {name: text for name, text in options.items() if text})


def _root_of_class_object(sources: Sources, owner: type, what: str) -> Root:
    path = class_path(owner)
    name = owner.__qualname__.partition(".")[0]
    if path is None or name not in sources.read(path).bindings:
        _refuse(what, f"is the class {owner.__qualname__}, whose definition cannot be found in a file")
    return Root(sources.read(path), name)


def _root_of_function(file: SourceFile, function: FunctionType, what: str) -> Root:
    code = function.__code__
    if code.co_name == "<lambda>":
        nodes = file.lambdas(code.co_firstlineno, _parameters(code))
        if not nodes:
            _refuse(what, f"is a lambda that is no longer at {file.path}:{code.co_firstlineno}: the file has changed")
        return Root(file, nodes=nodes)
    found = file.locate(code.co_name, code.co_firstlineno)
    if found is None:
        _refuse(
            what, f"is {function.__qualname__}, which is not at {file.path}:{code.co_firstlineno}: the file has changed"
        )
    node, around = found
    if any(isinstance(each, (*FUNCTIONS, _ast.Lambda)) for each in around):
        return Root(file, nodes=(node,))
    return Root(file, (around[0] if around else node).name)


def _parameters(code: CodeType) -> list[str]:
    flags = bool(code.co_flags & _VARARGS) + bool(code.co_flags & _VARKEYWORDS)
    return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + flags])


def _unwrapped(function: Any) -> Any:
    """The function below decorators that say what they wrap; the decorators are in its source."""
    while not isinstance(function, type) and "__wrapped__" in getattr(function, "__dict__", ()):
        function = function.__wrapped__
    return function


def _source_path(function: FunctionType) -> str | None:
    path = function.__code__.co_filename
    return path if os.path.isfile(path) else None


def _methods(owner: type) -> list[FunctionType]:
    members = (getattr(member, "__func__", getattr(member, "fget", member)) for member in vars(owner).values())
    return [each for each in map(_unwrapped, members) if isinstance(each, FunctionType)]


def _free_values(function: FunctionType, what: str) -> tuple[tuple[str, str], ...]:
    """Names and texts of what a function closes over. A closure's values are part of what it does."""
    found = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name == "__class__":
            continue
        try:
            text = literal_text(cell.cell_contents)
        except ValueError:  # not assigned yet
            text = None
        if text is None:
            _refuse(what, f"closes over {name!r}, which is not a plain value: move it to the top of its module")
        found.append((name, text))
    return tuple(found)


def _refuse(what: str, why: str) -> NoReturn:
    raise KeyUncomputableError(
        f'the key of the snapshot cannot be computed: {what} {why}; or give the decorator version="1" and change it'
        " whenever the loading code changes"
    )
