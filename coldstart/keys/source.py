"""Source files as namespaces: what each module-level statement binds, and where the modules that it imports lie.

A file is a list of items (module-level statements; an import of several names is one item a name), each with the names
that it binds. Compound statements are one item, so both branches of an ``if`` count. Nothing is executed.

Local code, which a key depends on by content, is everything that is not installed: not under ``site-packages`` or
``dist-packages``, not the standard library, not below the interpreter's ``lib``, and not coldstart. It is searched as
an import would: in the handler's folder, then along ``sys.path``. Packages that only an import hook can find (some
editable installs) are taken for installed ones.
"""

from __future__ import annotations

import _ast
import os
import sys
from functools import cache
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

from coldstart.keys.facts import Facts, read_facts
from coldstart.keys.syntax import (
    DEFINITIONS,
    FUNCTIONS,
    IMPORTS,
    bound_names,
    children,
    digest_of,
    dotted,
    dump,
    global_names,
    import_uses,
    is_lone_constant,
    parameters,
    parse,
    read_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from coldstart.keys.syntax import Node

_FIXED_NODES = (_ast.Constant, _ast.Tuple, _ast.UnaryOp, _ast.BinOp, _ast.JoinedStr)
_OUR_FOLDER = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


class Computed:
    """The type of COMPUTED."""

    def __repr__(self) -> str:
        return "COMPUTED"


COMPUTED = Computed()
"""Stands for a value that the source does not spell out: only the imported module knows it."""


class Item:
    """One statement of a module or class body."""

    __slots__ = ("_digest", "_facts", "binds", "file", "is_definition", "node")

    def __init__(self, file: SourceFile, node: Node, binds: Iterable[str]) -> None:
        self.file = file
        self.node = node
        self.binds = frozenset(binds)
        self.is_definition = isinstance(node, (*DEFINITIONS, *IMPORTS))
        self._facts: Facts | None = None
        self._digest = ""

    @property
    def facts(self) -> Facts:
        """What the statement reads from outside itself."""
        if self._facts is None:
            self._facts = read_facts((self.node,), self.file.aliases)
        return self._facts

    @property
    def digest(self) -> str:
        """The digest of the statement's canonical text."""
        if not self._digest:
            self._digest = digest_of(dump(self.node))
        return self._digest


class SourceFile:
    """A parsed file. Raises HandlerError when it cannot be read or is not Python."""

    def __init__(self, path: str) -> None:
        self.path = path
        source = read_bytes(path)
        self.body: list[Node] = parse(source, path).body
        self.may_declare_globals = b"global" in source
        self.effects: list[tuple[Item, set[str], set[str]]] | None = None
        """What each item may change during the import; filled by ``reach``."""
        self.aliases: dict[str, str] = {}
        for node in statements(self.body):
            if isinstance(node, IMPORTS):
                self.aliases.update(_aliases(node))
        self.items = items_of(self, self.body)
        self.bindings: dict[str, list[Item]] = {}
        for item in self.items:
            for name in item.binds:
                self.bindings.setdefault(name, []).append(item)

    def leaves(self, name: str) -> list[Node]:
        """The statements that bind a name, those inside compound statements included. A loop variable's is the loop."""
        found: list[Node] = []
        for item in self.bindings.get(name, ()):
            inner = [leaf for leaf in statements([item.node]) if _is_simple(leaf) and name in bound_names([leaf])]
            found.extend(inner or [item.node])
        return found

    def literal(self, node: Node) -> Any:
        """The value of an expression that the source spells out, constants of the module included, else COMPUTED."""
        kind = type(node)
        if kind is _ast.Constant:
            return node.value
        if kind is _ast.Name:
            return self.constant(node.id)
        if kind is _ast.UnaryOp and type(node.op) is _ast.USub:
            value = self.literal(node.operand)
            return -value if type(value) in (int, float) else COMPUTED
        if kind in (_ast.Tuple, _ast.List, _ast.Set):
            values = [self.literal(item) for item in node.elts]
            return (
                COMPUTED if COMPUTED in values else {_ast.Tuple: tuple, _ast.List: list, _ast.Set: list}[kind](values)
            )
        if kind is _ast.Dict and None not in node.keys:
            pairs = [
                (self.literal(key), self.literal(value)) for key, value in zip(node.keys, node.values, strict=True)
            ]
            if all(type(key) is str and value is not COMPUTED for key, value in pairs):
                return dict(pairs)
        return COMPUTED

    def constant(self, name: str) -> Any:
        """The value of a name that one top-level statement binds to a literal, else COMPUTED."""
        items = self.bindings.get(name, [])
        node = items[0].node if len(items) == 1 else None
        if isinstance(node, (_ast.Assign, _ast.AnnAssign)) and isinstance(node.value, (_ast.Constant, _ast.Tuple)):
            targets = node.targets if isinstance(node, _ast.Assign) else [node.target]
            if all(type(target) is _ast.Name for target in targets):
                return self.literal(node.value)
        return COMPUTED

    def locate(self, name: str, line: int) -> tuple[Node, tuple[Node, ...]] | None:
        """The function whose code starts at ``line`` (its first decorator's), and what is around it, outer first."""
        for node, around in _definitions_at(self.body, line, ()):
            if isinstance(node, FUNCTIONS) and node.name == name and first_line(node) == line:
                return node, around
        return None

    def lambdas(self, line: int, names: list[str]) -> tuple[Node, ...]:
        """All lambdas that start on a line and have these parameters: a code object does not say which one it is."""
        found = (node for node, _ in _definitions_at(self.body, line, ()) if type(node) is _ast.Lambda)
        return tuple(node for node in found if node.lineno == line and parameters(node.args) == names)


def _aliases(node: Node) -> dict[str, str]:
    found = {name: target for name, _, target in import_uses(node)}
    if found.pop("*", None) == "coldstart.*":
        found["coldstart"] = "coldstart.coldstart"
    return found


def first_line(node: Node) -> int:
    """The line that the code object of a definition gives as its first."""
    decorators = getattr(node, "decorator_list", None)
    line: int = (decorators[0] if decorators else node).lineno
    return line


def statements(body: Iterable[Node]) -> Iterator[Node]:
    """The statements of a body and of the compound statements in it, but not of functions and classes."""
    for node in body:
        yield node
        if not _is_simple(node):
            for field in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, field, ()))
            for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
                yield from statements(part.body)


def _is_simple(node: Node) -> bool:
    return isinstance(node, DEFINITIONS) or not (hasattr(node, "body") or hasattr(node, "cases"))


def items_of(file: SourceFile, body: list[Node]) -> list[Item]:
    """The items of a module or class body, in order."""
    return [Item(file, node, _binds(file, node)) for statement in body for node in _split(statement)]


def _split(node: Node) -> Iterator[Node]:
    """One import statement a name, so that another name in the same statement does not matter; others as they are."""
    if type(node) is _ast.Import and len(node.names) > 1:
        yield from (_ast.Import(names=[alias]) for alias in node.names)
    elif type(node) is _ast.ImportFrom and len(node.names) > 1:
        yield from (_ast.ImportFrom(module=node.module, names=[alias], level=node.level) for alias in node.names)
    elif not is_lone_constant(node):
        yield node


def _binds(file: SourceFile, node: Node) -> set[str]:
    names = set(bound_names([node]))
    return names | global_names(node) if file.may_declare_globals else names


def is_fixed(item: Item) -> bool:
    """The item binds its names to a value that nothing can change: a number, a text, a tuple of these."""
    node = item.node
    if not isinstance(node, (_ast.Assign, _ast.AnnAssign)) or node.value is None:
        return False
    targets = node.targets if isinstance(node, _ast.Assign) else [node.target]
    names = [name for target in targets for name in (target.elts if isinstance(target, _ast.Tuple) else [target])]
    return all(type(name) is _ast.Name for name in names) and _is_fixed(node.value)


def _is_fixed(node: Node) -> bool:
    if type(node) is _ast.JoinedStr:
        return True
    return isinstance(node, _FIXED_NODES) and all(
        _is_fixed(child) for child in children(node) if hasattr(child, "lineno")
    )


def is_main_guard(node: Node) -> bool:
    """``if __name__ == "__main__":`` without an else, which a worker's import does not enter."""
    if type(node) is not _ast.If or node.orelse or type(node.test) is not _ast.Compare:
        return False
    sides = (node.test.left, *node.test.comparators)
    names = {getattr(side, "id", getattr(side, "value", None)) for side in sides}
    return names == {"__name__", "__main__"} and type(node.test.ops[0]) is _ast.Eq


def applies_coldstart(node: Node, aliases: dict[str, str]) -> bool:
    """An expression that calls coldstart, or what such a call returned."""
    while type(node) is _ast.Call:
        node = node.func
    return (dotted(node, aliases) or "").partition(".")[0] == "coldstart"


def _definitions_at(
    nodes: Iterable[Node], line: int, around: tuple[Node, ...]
) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    for node in nodes:
        if hasattr(node, "lineno") and not first_line(node) <= line <= node.end_lineno:
            continue
        inside = around
        if isinstance(node, (*DEFINITIONS, _ast.Lambda)):
            yield node, around
            inside = (*around, node)
        yield from _definitions_at(children(node), line, inside)


# --- where modules lie ---------------------------------------------------------------------------------------------


class Sources:
    """The files that one computation has looked at, parsed once each, as seen from one handler file."""

    def __init__(self, handler_path: str) -> None:
        self.handler_path = os.path.realpath(handler_path)
        self.search = [os.path.dirname(self.handler_path), *sys.path]
        self.files: dict[str, SourceFile] = {}
        self._found: dict[tuple[str, str], list[str | None]] = {}

    @property
    def handler(self) -> SourceFile:
        """The handler's own file."""
        return self.read(self.handler_path)

    def read(self, path: str) -> SourceFile:
        """The file at a path. Raises HandlerError."""
        real = os.path.realpath(path)
        if real not in self.files:
            self.files[real] = SourceFile(real)
        return self.files[real]

    def is_local(self, path: str) -> bool:
        """Whether a file is the user's own, rather than an installed one."""
        if _is_installed(path) and path != self.handler_path:
            return False
        real = os.path.realpath(path)
        return real == self.handler_path or not _is_installed(real)

    def modules(self, importer: SourceFile, module: str, level: int) -> list[str | None]:
        """Files of the packages on the way to ``module`` and its own, as far as they are found; None for a folder.

        One entry for each part of the dotted name, or fewer: built-in modules and those of import hooks are not found.
        """
        folders = self.search if not level else [_folder_above(importer.path, level)]
        if not module:
            init = os.path.join(folders[0], "__init__.py")
            return [init if os.path.isfile(init) else None]
        key = (module, folders[0] if level else "")
        if key not in self._found:
            self._found[key] = _find(module, folders)
        return self._found[key]

    def imported_file(self, importer: SourceFile, module: str, level: int) -> SourceFile | None:
        """The source of a module that ``importer`` names, local or not; None where there is none to read."""
        found = self.modules(importer, module, level)
        path = found[-1] if len(found) == module.count(".") + 1 else None
        return self.read(path) if path is not None and path.endswith(".py") else None


def _find(module: str, folders: list[str]) -> list[str | None]:
    found: list[str | None] = []
    for part in module.split("."):
        # The last part alone: asked for a dotted name, the finder wants the parent imported.
        spec = PathFinder.find_spec(part, folders)
        if spec is None:
            break
        found.append(spec.origin if spec.has_location else None)
        folders = list(spec.submodule_search_locations or ())
    return found


def _folder_above(path: str, level: int) -> str:
    for _ in range(level):
        path = os.path.dirname(path)
    return path


def _is_installed(path: str) -> bool:
    return "/site-packages/" in path or "/dist-packages/" in path or path.startswith(_foreign_folders())


@cache
def _foreign_folders() -> tuple[str, ...]:
    standard_library = os.path.dirname(os.path.realpath(os.__file__))
    prefixes = {os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    libraries = (os.path.join(prefix, "lib") for prefix in prefixes)
    return tuple(folder + os.sep for folder in (standard_library, *libraries, _OUR_FOLDER))


def package_name(path: str) -> str:
    """The dotted name of the module in a file, as far as ``__init__`` files tell."""
    folder, name = os.path.split(path)
    names = [] if name == "__init__.py" else [name.removesuffix(".py")]
    while name and os.path.isfile(os.path.join(folder, "__init__.py")):
        folder, name = os.path.split(folder)
        names.insert(0, name)
    return ".".join(names)
