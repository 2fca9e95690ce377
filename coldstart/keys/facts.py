"""What a piece of code reads from outside itself: names, imports, environment variables.

In doubt too many names, never too few: a name is left out only where it is certainly a parameter or a local of an
enclosing function or comprehension.
"""

from __future__ import annotations

import _ast
from typing import TYPE_CHECKING, NamedTuple

from coldstart.keys.syntax import FUNCTIONS, ImportUse, bound_names, children, import_uses, parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from coldstart.keys.syntax import Node

COMPREHENSIONS = (_ast.ListComp, _ast.SetComp, _ast.DictComp, _ast.GeneratorExp)

_READING_METHODS = frozenset({"get", "setdefault", "pop"})
_WRITING_METHODS = frozenset({"update", "clear", "__setitem__", "__delitem__"})
_ENVIRONMENT_MAPPINGS = frozenset({"os.environ", "os.environb"})
_ENVIRONMENT_FUNCTIONS = frozenset({"os.getenv", "os.getenvb"})
_ENVIRONMENT_ATTRIBUTES = frozenset({"environ", "environb", "getenv", "getenvb"})
_ENVIRONMENT = _ENVIRONMENT_MAPPINGS | _ENVIRONMENT_FUNCTIONS


class EnvironmentRead(NamedTuple):
    """A read of a variable: by a literal ``name``, by a global ``constant``, or (both None) by something computed."""

    name: str | None
    constant: str | None
    line: int


class Facts:
    """What a piece of code needs from outside itself."""

    __slots__ = ("calls", "changes", "environment", "imports", "members", "reads", "receiver_escapes")

    def __init__(self) -> None:
        self.reads: set[str] = set()
        self.imports: list[ImportUse] = []
        self.environment: list[EnvironmentRead] = []
        self.members: set[str] = set()
        """Attributes taken from the receivers (``self`` and its class)."""
        self.receiver_escapes = False
        """A receiver is used other than for an attribute, so any member may be reached."""
        self.calls = False
        """Something is called while the module is imported, not only inside function bodies."""
        self.changes: set[str] = set()
        """Names whose attribute or item is stored or deleted while the module is imported."""


def read_facts(nodes: Iterable[Node], aliases: Mapping[str, str], receivers: frozenset[str] = frozenset()) -> Facts:
    """What these nodes of one module read from outside.

    ``aliases`` maps the module's imported names to their dotted paths. Attributes of the names in ``receivers`` are
    reported as ``members`` and not as reads of the name.
    """
    reader = _Reader(aliases, receivers)
    for node in nodes:
        reader.visit(node)
    return reader.facts


class _Reader:
    """Walks code with the scopes that enclose it; each scope maps its names as ``bound_names`` does."""

    def __init__(self, aliases: Mapping[str, str], receivers: frozenset[str]) -> None:
        self.facts = Facts()
        self.aliases = aliases
        self.receivers = receivers
        self.scopes: list[dict[str, str]] = []
        self.function_depth = 0

    def visit(self, node: Node) -> None:
        visitor = _VISITORS.get(type(node))
        if visitor is not None:
            visitor(self, node)
        else:
            for child in children(node):
                self.visit(child)

    def visit_all(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def target(self, name: str) -> str | None:
        """The dotted path that a name stands for here; None where it is no imported name."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name] or None
        return self.aliases.get(name) or ("os" if name == "os" else None)

    def is_local(self, name: str) -> bool:
        """Whether a scope around this point binds the name."""
        for scope in self.scopes:  # noqa: SIM110  a generator here costs a tenth of the whole walk
            if name in scope:
                return True
        return False

    def environment_path(self, node: Node) -> str | None:
        """``os.environ``, ``os.getenv`` ... if the expression is one of them, under whatever name it was imported."""
        if type(node) is _ast.Attribute:
            if node.attr not in _ENVIRONMENT_ATTRIBUTES or type(node.value) is not _ast.Name:
                return None
            path = f"{self.target(node.value.id)}.{node.attr}"
        elif type(node) is _ast.Name:
            path = self.target(node.id) or ""
        else:
            return None
        return path if path in _ENVIRONMENT else None

    def name(self, node: Node) -> None:
        name = node.id
        if name in self.receivers:
            self.facts.receiver_escapes = True
        elif type(node.ctx) is _ast.Load:
            if not self.is_local(name):
                self.facts.reads.add(name)
            if self.target(name) in _ENVIRONMENT:
                self.facts.environment.append(EnvironmentRead(None, None, node.lineno))

    def attribute(self, node: Node) -> None:
        if type(node.ctx) is not _ast.Load:
            self.changed(node)
        if type(node.value) is _ast.Name and node.value.id in self.receivers:
            self.facts.members.add(node.attr)
            return
        if type(node.value) is _ast.Call and getattr(node.value.func, "id", None) == "super":
            self.facts.members.add(node.attr)
        if self.environment_path(node):
            self.facts.environment.append(EnvironmentRead(None, None, node.lineno))
        self.visit(node.value)

    def changed(self, node: Node) -> None:
        while type(node) in (_ast.Attribute, _ast.Subscript, _ast.Call):
            node = node.func if type(node) is _ast.Call else node.value
        if type(node) is _ast.Name and not self.function_depth:
            self.facts.changes.add(node.id)

    def subscript(self, node: Node) -> None:
        if type(node.ctx) is not _ast.Load:
            self.changed(node)
        if self.environment_path(node.value) in _ENVIRONMENT_MAPPINGS:
            self.mention(node.value)
            if type(node.ctx) is _ast.Load:
                self.environment_read(node.slice, node.lineno)
        else:
            self.visit(node.value)
        self.visit(node.slice)

    def compare(self, node: Node) -> None:
        left, values = node.left, []
        for operator, right in zip(node.ops, node.comparators, strict=True):
            is_membership = type(operator) in (_ast.In, _ast.NotIn)
            if is_membership and self.environment_path(right) in _ENVIRONMENT_MAPPINGS:
                self.environment_read(left, node.lineno)
                self.mention(right)
            else:
                values.append(right)
            left = right
        self.visit_all((node.left, *values))

    def call(self, node: Node) -> None:
        self.facts.calls = self.facts.calls or not self.function_depth
        function = node.func
        is_method = type(function) is _ast.Attribute and self.environment_path(function.value) in _ENVIRONMENT_MAPPINGS
        method = function.attr if is_method else ""
        if method in _READING_METHODS or self.environment_path(function) in _ENVIRONMENT_FUNCTIONS:
            names = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "key")]
            self.environment_read(names[0] if names else None, node.lineno)
            self.mention(function)
        elif method in _WRITING_METHODS:
            self.mention(function)
        else:
            self.visit(function)
        self.visit_all((*node.args, *node.keywords))

    def mention(self, node: Node) -> None:
        """Count a chain that starts at a name as a read of that name, without a look at what the chain is."""
        while type(node) is _ast.Attribute:
            node = node.value
        if not self.is_local(node.id):
            self.facts.reads.add(node.id)

    def environment_read(self, key: Node, line: int) -> None:
        name = key.value if type(key) is _ast.Constant and type(key.value) is str else None
        is_global = type(key) is _ast.Name and not self.is_local(key.id)
        self.facts.environment.append(EnvironmentRead(name, key.id if is_global else None, line))

    def constant(self, node: Node) -> None:
        """Nothing: spares the walk the look for children."""

    def imported(self, node: Node) -> None:
        self.facts.imports.extend(use for _, use, _ in import_uses(node))

    def declared(self, node: Node) -> None:
        self.facts.reads.update(node.names)

    def function(self, node: Node) -> None:
        arguments = node.args
        self.visit_all(getattr(node, "decorator_list", ()))
        self.visit_all((*arguments.defaults, *arguments.kw_defaults))
        listed = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
        self.visit_all(argument.annotation for argument in listed if argument is not None)
        self.visit_all((getattr(node, "returns", None), *getattr(node, "type_params", ())))
        body = node.body if type(node.body) is list else [node.body]
        self.function_depth += 1
        self.scopes.append({**bound_names(body), **dict.fromkeys(parameters(arguments), "")})
        self.visit_all(body)
        self.scopes.pop()
        self.function_depth -= 1

    def comprehension(self, node: Node) -> None:
        first = node.generators[0]
        self.visit(first.iter)  # evaluated outside: [x for x in x] reads the outer x
        self.scopes.append(bound_names(generator.target for generator in node.generators))
        for generator in node.generators:
            self.visit_all((*(() if generator is first else (generator.iter,)), *generator.ifs, generator.target))
        self.visit_all((node.key, node.value) if type(node) is _ast.DictComp else (node.elt,))
        self.scopes.pop()


_VISITORS: Mapping[type, Callable[[_Reader, Node], None]] = {
    _ast.Name: _Reader.name,
    _ast.Constant: _Reader.constant,
    _ast.Attribute: _Reader.attribute,
    _ast.Subscript: _Reader.subscript,
    _ast.Compare: _Reader.compare,
    _ast.Call: _Reader.call,
    _ast.Import: _Reader.imported,
    _ast.ImportFrom: _Reader.imported,
    _ast.Global: _Reader.declared,
    _ast.Lambda: _Reader.function,
    **dict.fromkeys(FUNCTIONS, _Reader.function),
    **dict.fromkeys(COMPREHENSIONS, _Reader.comprehension),
}
