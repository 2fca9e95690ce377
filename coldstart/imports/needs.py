"""Which top-level imports of a handler's file a restored start needs, read from the source. Nothing is run.

Every piece of the file belongs to whoever runs it: ``load``, ``build``, another option of the decorator (``init``, ``warmup``
...), ``handler``, or ``the module`` itself, whose statements run at every import. A piece uses the names that it reads, and
what the functions of the file that it reads use in turn. In doubt a name is used: the methods of a class live on in the
state and count to ``class NAME``, whoever makes it; functions that no handler reaches count as code of the module, and so
does what only ``python FILE`` runs.
Annotations count only where Python evaluates them (without ``from __future__ import annotations``).
"""

from __future__ import annotations

import _ast
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import HandlerError
from coldstart.keys.facts import read_facts
from coldstart.keys.source import Sources, applies_coldstart, is_main_guard, statements
from coldstart.keys.syntax import (
    DEFINITIONS,
    FUNCTIONS,
    IMPORTS,
    bound_names,
    children,
    dotted,
    import_uses,
    parameters,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from coldstart.keys.source import SourceFile
    from coldstart.keys.syntax import Node

LOAD, BUILD, HANDLER, MODULE = "load", "build", "handler", "the module"


class Need(NamedTuple):
    """A top-level import: the modules it names, and who uses what it binds (nobody: perhaps it is there for its effects).

    ``functions``: those that name it. ``annotated``: annotations name it too, which Python does not evaluate in this file.
    """

    line: int
    end_line: int
    modules: tuple[str, ...]
    users: frozenset[str]
    functions: tuple[str, ...]
    annotated: bool

    @property
    def is_only_for_load(self) -> bool:
        """Only ``load`` uses it, which a start restored from arrays or a program does not run."""
        return self.users == {LOAD}

    @property
    def is_only_for_loading(self) -> bool:
        """Only ``load`` and ``build`` use it: a start that is restored from a program runs neither."""
        return bool(self.users) and self.users <= {LOAD, BUILD}


def read_needs(path: str, name: str | None = None) -> list[Need]:
    """The top-level imports of the file, in order, for the handler ``name`` (None: for all of its handlers).

    With a name, what belongs to another handler of the file counts as used by ``handler NAME``. Raises HandlerError where
    the file cannot be read or is not Python, where it has no handler of that name, and where importing it would serve.
    """
    file = Sources(path).handler
    evaluated = not any(
        type(node) is _ast.ImportFrom and node.module == "__future__" and _names(node, "annotations")
        for node in file.body
    )
    annotations = set() if evaluated else _take_annotations(file.body)
    use = _Use(file, name)
    users = use.users()
    return [
        _need(node, use, users, annotations)
        for node in _run_at_import(use.body)
        if isinstance(node, IMPORTS) and getattr(node, "module", "") != "__future__"
    ]


def _need(node: Node, use: _Use, users: Mapping[str, frozenset[str]], annotations: set[str]) -> Need:
    uses = list(import_uses(node))
    bound = {name for name, _, _ in uses}
    modules = dict.fromkeys("." * each.level + each.module for _, each, _ in uses)
    functions = [piece for piece, reads in use.pieces.items() if piece in use.functions and bound & reads]
    found = frozenset[str]().union(*(users.get(name, frozenset()) for name in bound))
    if "*" in bound:
        found |= {MODULE}
    return Need(node.lineno, node.end_lineno, tuple(modules), found, tuple(functions), bool(annotations & bound))


def _names(node: Node, name: str) -> bool:
    return any(alias.name == name for alias in node.names)


def _take_annotations(body: Sequence[Node]) -> set[str]:
    """Take all annotations out of the trees, and return the names in them."""
    found: set[str] = set()
    pending = list(body)
    while pending:
        node = pending.pop()
        for field in ("annotation", "returns"):
            annotation = getattr(node, field, None)
            if annotation is not None:
                found |= read_facts((annotation,), {}).reads
                setattr(node, field, _ast.Constant(value=None) if type(node) is _ast.AnnAssign else None)
        pending += children(node)
    return found


# --- who runs what ---------------------------------------------------------------------------------------------------


class _Use:
    """The file as pieces, each with the names that it reads, and the names that each user starts from."""

    def __init__(self, file: SourceFile, name: str | None) -> None:
        self.file = file
        self.imported = set(file.aliases)
        self.body = [node for node in file.body if not _is_for_checkers(node)]
        self.pieces: dict[str, set[str]] = {}
        self.starts: dict[str, set[str]] = {MODULE: set()}
        self.functions: set[str] = set()
        """The pieces that are functions."""
        self.direct: set[str] = set()
        """Names that the module reads without running what is behind them."""
        for node in file.body:
            if _is_for_checkers(node):
                self.direct.update(_eager(node.test))
        self.handlers: list[tuple[str, str]] = []
        self._wanted = name
        for node in _run_at_import(self.body):
            self._take(node)
        if name is not None and not any(name in names for names in self.handlers):
            there = ", ".join(attribute for _, attribute in self.handlers) or "none"
            raise HandlerError(f"{file.path} has no handler {name!r}; choose one with FILE:NAME (there: {there})")

    def users(self) -> dict[str, frozenset[str]]:
        """Name -> who uses it."""
        reached = {user: self._closure(names) for user, names in self.starts.items()}
        known = set[str]().union(*reached.values())
        reached[MODULE] |= self._closure(set(self.pieces) - known) | self.direct
        names = set[str]().union(*reached.values())
        return {name: frozenset(user for user, its in reached.items() if name in its) for name in names}

    def _closure(self, names: Iterable[str]) -> set[str]:
        seen: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending += self.pieces.get(name, ())
        return seen

    def _start(self, user: str, names: Iterable[str]) -> None:
        self.starts.setdefault(user, set()).update(names)

    def _take(self, node: Node) -> None:
        """Put one statement of the module where it belongs."""
        if is_main_guard(node):
            self.direct.update(_eager(node))
        elif isinstance(node, DEFINITIONS):
            self._take_definition(node)
        elif applies_coldstart(getattr(node, "value", None), self.file.aliases):
            self._take_application(node)
        elif not isinstance(node, IMPORTS):
            self._take_plain(node)

    def _take_plain(self, node: Node) -> None:
        parts = (node,) if not hasattr(node, "body") else _own_parts(node)
        self._start(MODULE, (name for part in parts for name in _eager(part)))
        for name in bound_names(parts):
            self.pieces.setdefault(name, set()).update(read_facts(parts, {}).reads)

    def _take_definition(self, node: Node) -> None:
        calls = [each for each in node.decorator_list if applies_coldstart(each, self.file.aliases)]
        node.decorator_list = [each for each in node.decorator_list if each not in calls]
        self._start(MODULE, (name for name in _eager(node) if name != node.name))
        applied = [each for each in calls if type(each) is _ast.Call]
        if applied and type(node) is _ast.ClassDef:
            self._take_class(node, self._label(applied[0], node.name))
            return
        node.decorator_list = []
        reads = read_facts((node,), {}).reads
        self.pieces.setdefault(node.name, set()).update(reads)
        if type(node) is _ast.ClassDef:
            self._start(f"class {node.name}", reads)
        else:
            self.functions.add(node.name)
        if applied:
            prefix = self._take_options(applied[0], node.name)
            self._start(prefix or HANDLER, {node.name})

    def _take_application(self, node: Node) -> None:
        """``handler = coldstart(...)(function)``, or another call of coldstart at module level."""
        call = node.value
        self.direct.update(_eager(node))
        path = dotted(call.func, self.file.aliases) or ""
        if path.startswith("coldstart.") and path.endswith(".serve"):
            raise HandlerError(
                f"{self.file.path}:{node.lineno}: importing this file serves: put the call of serve under"
                ' if __name__ == "__main__":'
            )
        if type(call.func) is _ast.Call:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            prefix = self._take_options(call.func, getattr(targets[0], "id", ""))
            self._start(prefix or HANDLER, (name for each in call.args for name in read_facts((each,), {}).reads))

    def _take_options(self, call: Node, attribute: str) -> str:
        """What the decorator's options start from; returns who uses a handler that was not asked for, else ""."""
        prefix = self._label(call, attribute)
        for keyword in call.keywords:
            self.direct.update(self.imported.intersection(_eager(keyword.value)))
            self._start(prefix or keyword.arg or HANDLER, read_facts((keyword.value,), {}).reads)
        self.direct.update(name for argument in call.args for name in _eager(argument))
        return prefix

    def _label(self, call: Node, attribute: str) -> str:
        first = call.args[0] if call.args else None
        literal = self.file.literal(first) if first is not None else ""
        own = literal if isinstance(literal, str) else ""
        self.handlers.append((own, attribute))
        return "" if self._wanted in (None, own, attribute) else f"handler {attribute}"

    def _take_class(self, owner: Node, prefix: str) -> None:
        """A decorated class: each method is a piece, and what it takes from ``self`` leads to others."""
        methods = [node for node in owner.body if isinstance(node, FUNCTIONS)]
        names = {node.name for node in methods}
        for node in methods:
            receivers = frozenset((*parameters(node.args)[:1], owner.name))
            facts = read_facts((*node.body, node.args), {}, receivers)
            members = names if facts.receiver_escapes else facts.members & names
            local = set(parameters(node.args)) | set(bound_names(node.body))
            reads = (facts.reads - local) | {f"{owner.name}.{member}" for member in members}
            self.pieces.setdefault(f"{owner.name}.{node.name}", set()).update(reads)
            self.functions.add(f"{owner.name}.{node.name}")
            if not node.name.startswith("_"):
                self._start(prefix or _user_of(node.name), {f"{owner.name}.{node.name}"})


def _user_of(method: str) -> str:
    return HANDLER if method == "handle" else method


def _run_at_import(body: Iterable[Node]) -> Iterator[Node]:
    """The statements that an import may run; what is for ``python FILE`` alone stays one statement."""
    for node in body:
        yield from (node,) if is_main_guard(node) else statements([node])


def _own_parts(node: Node) -> tuple[Node, ...]:
    """What a compound statement itself evaluates; the statements in it are looked at one by one."""
    fields = ("test", "iter", "target", "subject", "items")
    values = [getattr(node, field, None) for field in fields]
    listed = [each for value in values if value is not None for each in (value if isinstance(value, list) else [value])]
    handled = [each.type for each in getattr(node, "handlers", ()) if each.type is not None]
    guards = [each.guard for each in getattr(node, "cases", ()) if each.guard is not None]
    return (*listed, *handled, *guards)


def _is_for_checkers(node: Node) -> bool:
    """``if TYPE_CHECKING:``, which no start enters."""
    test = getattr(node, "test", None) if type(node) is _ast.If else None
    return "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", ""))


def _eager(node: Node) -> Iterator[str]:
    """Names that are read when the module is imported: not those in bodies of functions."""
    if isinstance(node, FUNCTIONS):
        arguments = node.args
        listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        notes = [node.returns, *(each.annotation for each in listed if each is not None)]
        parts = [*node.decorator_list, *arguments.defaults, *arguments.kw_defaults, *notes]
        for part in parts:
            if part is not None:
                yield from _eager(part)
    elif type(node) is _ast.Lambda:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                yield from _eager(default)
    elif type(node) is _ast.Name:
        if type(node.ctx) is _ast.Load:
            yield node.id
    else:
        for child in children(node):
            yield from _eager(child)
