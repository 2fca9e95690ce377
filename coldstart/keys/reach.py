"""What a loader's code reaches, as one digest: its definition and, transitively, every module-level name that it reads.

A name stands for all statements of its module that bind it. Names imported from local modules are followed into them
(``import m`` takes the whole of m); installed ones enter as the text of their import. Beside what binds a reached name,
what changes it while the module is imported counts:

- a statement that stores into it (``CONFIG["model"] = ...``, ``torch.backends.cudnn.benchmark = True``);
- a statement made for its effect that mentions it (``CONFIG.update(...)``, ``torch.set_default_dtype(...)``);
- a call, decorator or base class whose own reach includes it, if it holds a mutable value (registries).

Not counted: what is under ``if __name__ == "__main__":``, calls of coldstart, and ``logging`` and ``warnings`` set-up.
Out of sight, so that ``version=`` must name their changes: ``globals()[...]``, modules imported by computed names, data
files, and what other modules do to an object behind its back.
"""

from __future__ import annotations

import _ast
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import KeyUncomputableError
from coldstart.keys.facts import read_facts
from coldstart.keys.lineage import class_header, class_lineage, local_bases
from coldstart.keys.source import applies_coldstart, is_fixed, is_main_guard, items_of, package_name, statements
from coldstart.keys.syntax import DEFINITIONS, FUNCTIONS, IMPORTS, digest_of, dump, parameters, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from coldstart.keys.facts import EnvironmentRead, Facts
    from coldstart.keys.source import Item, SourceFile, Sources
    from coldstart.keys.syntax import ImportUse, Node

_QUIET_MODULES = frozenset({"logging", "warnings", "coldstart"})
"""Calling these at module level changes nothing that a state depends on."""


class Root(NamedTuple):
    """Where reaching starts: a module-level ``name``, or ``nodes`` (lambdas, nested functions), or a class's method.

    Of a class, ``owner`` is the definition and ``name`` the method. ``arguments`` and ``keywords`` are texts of what a
    partial binds, ``free`` those of a closure's values.
    """

    file: SourceFile
    name: str = ""
    nodes: tuple[Node, ...] = ()
    owner: Node = None
    arguments: tuple[str, ...] = ()
    keywords: tuple[tuple[str, str], ...] = ()
    free: tuple[tuple[str, str], ...] = ()


def code_of(sources: Sources, root: Root) -> tuple[str, set[str]]:
    """Digest of all that a root reaches. Raises KeyUncomputableError where it reads a variable by a computed name."""
    start = ["coldstart code 1", *root.arguments]
    start += [f"{name}={text}" for name, text in sorted((*root.keywords, *root.free))]
    if root.name and not root.owner and not sources.is_local(root.file.path):
        # Installed code: which function of which module it is, not what it does.
        return _digest_all([*start, f"installed {package_name(root.file.path)} {root.name}"]), set()
    reach = _Reach(sources, root.file)
    if root.owner is not None:
        start.append(reach.class_text(root.file, root.owner, root.name))
    elif root.nodes:
        start += [digest_of(dump(node)) for node in root.nodes]
        reach.use(root.file, read_facts(root.nodes, root.file.aliases))
    else:
        start.append(root.name)
        reach.pending.append((root.file, root.name))
    reach.finish()
    return _digest_all([*start, *reach.texts()]), reach.environment


def _digest_all(texts: Iterable[str]) -> str:
    return digest_of("".join(f"{len(text)}:{text}" for text in texts))


class _View:
    """What is reached of one file."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.names: set[str] = set()
        self.items: set[Item] = set()
        self.import_names: set[str] = set()
        self.is_ordered = False
        if file.effects is None:
            file.effects = [(item, *_effect(item)) for item in file.items]
        self.effects = [each for each in file.effects if each[1] or each[2]]

    def text(self) -> str:
        """Names with the digests of what binds them, in order; with effects, also the order of straight-line code."""
        ordered = [item for item in self.file.items if item in self.items]
        by_name: dict[str, list[str]] = {}
        for item in ordered:
            for name in item.binds:
                by_name.setdefault(name, []).append(item.digest)
        lines = [f"{name} {' '.join(by_name[name])}" for name in sorted(by_name)]
        if self.is_ordered:
            lines += [item.digest for item in ordered if not item.is_definition]
        return "\n".join(lines)

    def may_change_data(self, names: Iterable[str], harmless: set[str]) -> bool:
        """Whether what the names reach in this file includes mutable data that is reached.

        ``harmless``: names known not to; it grows by all that were looked at in vain, so that each is followed once.
        """
        seen: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            if name in seen or name in harmless:
                continue
            if name in self.names and self.is_mutable(name):
                return True
            seen.add(name)
            pending.extend(read for item in self.file.bindings.get(name, ()) for read in item.facts.reads)
        harmless |= seen
        return False

    def is_mutable(self, name: str) -> bool:
        """Whether the name is bound to data that code can change, or is bound anew by a function."""
        for item in self.file.bindings.get(name, ()):
            is_function = item.is_definition and getattr(item.node, "name", name) == name
            if not is_function and not is_fixed(item):
                return True
        return False


def _effect(item: Item) -> tuple[set[str], set[str]]:
    """What a statement may change while its module is imported.

    Returns the names that it stores into or mentions for its effect, and those whose reach it may change.
    """
    node, aliases = item.node, item.file.aliases
    if isinstance(node, IMPORTS) or is_fixed(item) or is_main_guard(node):
        return set(), set()
    if isinstance(node, DEFINITIONS):
        applied, body = _header(node, item.file)
        facts = read_facts(body, aliases)
        return facts.changes, read_facts(applied, aliases).reads | (facts.reads if facts.calls else set())
    if applies_coldstart(getattr(node, "value", None), aliases):
        return set(), set()
    facts = item.facts
    leaves = [leaf for leaf in statements([node]) if type(leaf) is _ast.Expr]
    return facts.changes | read_facts(leaves, aliases).reads, facts.changes | (facts.reads if facts.calls else set())


def _header(node: Node, file: SourceFile) -> tuple[list[Node], list[Node]]:
    """What of a definition runs during the import: what is applied to it, and defaults or a class body's statements."""
    applied = [each for each in node.decorator_list if not applies_coldstart(each, file.aliases)]
    if isinstance(node, FUNCTIONS):
        return applied, [each for each in (*node.args.defaults, *node.args.kw_defaults) if each is not None]
    body = [each for each in node.body if not isinstance(each, DEFINITIONS)]
    values = [each.value if type(each) is _ast.AnnAssign else each for each in body]
    return [*applied, *node.bases, *node.keywords], [each for each in values if each is not None]


class _Reach:
    """One computation: what has been reached so far, file by file."""

    def __init__(self, sources: Sources, root: SourceFile) -> None:
        self.sources = sources
        self.root = root
        self.views: dict[SourceFile, _View] = {}
        self.pending: list[tuple[SourceFile, str]] = []
        self.environment: set[str] = set()
        self.packages: set[str] = set()
        self.binaries: set[str] = set()

    def texts(self) -> list[str]:
        """One text a file, under its name as the code imports it (the root's own file has none)."""
        named = []
        for file, view in self.views.items():
            name = "" if file is self.root else max(view.import_names, default=package_name(file.path))
            named.append(f"module {name}\n{view.text()}")
        return [*sorted(named), *sorted(self.binaries)]

    def finish(self) -> None:
        """Follow names, and then the effects on what they reached, until nothing new is found."""
        while self.pending or self._take_effects():
            while self.pending:
                self._reach(*self.pending.pop())

    def use(self, file: SourceFile, facts: Facts) -> None:
        """Reach all that these facts of code in ``file`` name."""
        self.view(file)
        self.pending.extend((file, name) for name in facts.reads)
        for use in facts.imports:
            self._follow(file, use)
        for read in facts.environment:
            self.environment.add(_variable(file, read))

    def view(self, file: SourceFile) -> _View:
        """What is reached of a file. Star imports may bind any of its names, so they always count."""
        view = self.views.get(file)
        if view is None:
            view = self.views[file] = _View(file)
            for item in file.items:
                if type(item.node) is _ast.ImportFrom and item.node.names[0].name == "*":
                    self._include(view, item)
        return view

    def _reach(self, file: SourceFile, name: str) -> None:
        view = self.view(file)
        if name not in view.names:
            view.names.add(name)
            for item in file.bindings.get(name, ()):
                self._include(view, item)

    def _include(self, view: _View, item: Item) -> None:
        if item not in view.items:
            view.items.add(item)
            view.is_ordered = view.is_ordered or not item.binds
            self.pending.extend((view.file, name) for name in item.binds)
            self.use(view.file, item.facts)

    def _take_effects(self) -> bool:
        """Include every statement that may change something reached; True if there was one."""
        found = [(view, item) for view in self.views.values() for item in self._effects_on(view)]
        for view, item in found:
            view.is_ordered = True
            self._include(view, item)
        return bool(found)

    def _effects_on(self, view: _View) -> Iterator[Item]:
        harmless: set[str] = set()
        for item, direct, called in view.effects:
            if item not in view.items and (self._touches(view, direct) or view.may_change_data(called, harmless)):
                yield item

    def _touches(self, view: _View, names: set[str]) -> bool:
        """Whether a statement that stores into or mentions these names may change something reached."""
        for name in names:
            package = _package(view.file.aliases.get(name, ""))
            if package in _QUIET_MODULES:
                continue
            if package in self.packages or (name in view.names and not _all_fixed(view.file, name)):
                return True
        return False

    # --- imports -----------------------------------------------------------------------------------------------------

    def _follow(self, importer: SourceFile, use: ImportUse) -> None:
        package = "." if use.level else _package(use.module)
        self.packages.add(package)
        if package in ("coldstart", "__future__"):
            return
        if not use.level and not self._may_be_local(importer, package):
            return
        found = self.sources.modules(importer, use.module, use.level)
        if use.name is None or use.name == "*":
            for depth, path in enumerate(found):
                self._whole(path, _import_name(use, depth))
        elif len(found) == use.module.count(".") + 1:
            for depth, path in enumerate(found[:-1]):  # packages on the way run too: their effects count
                self._enter(path, _import_name(use, depth))
            self._follow_name(importer, use, found[-1])

    def _may_be_local(self, importer: SourceFile, package: str) -> bool:
        """Whether a top-level package is found and not an installed one: the files in it need no look then."""
        found = self.sources.modules(importer, package, 0)
        return bool(found) and (found[0] is None or self.sources.is_local(found[0]))

    def _follow_name(self, importer: SourceFile, use: ImportUse, path: str | None) -> None:
        """``from module import name``: the name in the module's file, else the module of that name in the package."""
        view = self._enter(path, "" if use.level else use.module)
        if view is not None and use.name in view.file.bindings:
            self.pending.append((view.file, use.name))
            return
        whole = f"{use.module}.{use.name}".lstrip(".")
        found = self.sources.modules(importer, whole, use.level)
        if len(found) == whole.count(".") + 1:
            self._whole(found[-1], "" if use.level else whole)
        self._whole(path, "" if use.level else use.module)

    def _whole(self, path: str | None, import_name: str) -> None:
        """Reach all of a module's code, if it is local."""
        view = self._enter(path, import_name)
        if view is None:
            return
        for item in view.file.items:
            if not is_main_guard(item.node):
                self._include(view, item)

    def _enter(self, path: str | None, import_name: str) -> _View | None:
        """The view of a local module with source; one without counts by its bytes."""
        if path is None or not self.sources.is_local(path):
            return None
        if not path.endswith(".py"):
            self.binaries.add(f"binary {import_name} {digest_of(read_bytes(path))}")
            return None
        view = self.view(self.sources.read(path))
        if import_name:
            view.import_names.add(import_name)
        return view

    # --- classes -----------------------------------------------------------------------------------------------------

    def class_text(self, file: SourceFile, owner: Node, method: str) -> str:
        """Reach a method of a class: it, the members it reaches through ``self``, and those of local bases."""
        lineage = class_lineage(self.sources, file, owner)
        names = frozenset(node.name for _, node in lineage)
        members = [item for where, node in lineage for item in items_of(where, node.body)]
        known = {name for item in members for name in item.binds}
        wanted = [method, *(name for name in known if name.startswith("__"))]
        reached: set[str] = set()
        while wanted:
            name = wanted.pop()
            if name in reached or name not in known:
                continue
            reached.add(name)
            for item in members:
                if name in item.binds:
                    wanted += self._member(item, names, known)
        for where, node in lineage:
            local = [base for base in node.bases if local_bases(self.sources, where, base)]
            header = [each for each in class_header(where, node) if each not in local]
            self.use(where, read_facts(header, where.aliases))
        headers = ["".join(map(dump, class_header(where, node))) for where, node in lineage]
        digests = [f"{name} {item.digest}" for name in sorted(reached) for item in members if name in item.binds]
        return "\n".join([method, *map(digest_of, headers), *digests])

    def _member(self, item: Item, classes: frozenset[str], known: set[str]) -> Iterable[str]:
        """Reach one statement of a class body; returns the members that it may reach."""
        first = parameters(item.node.args)[:1] if isinstance(item.node, FUNCTIONS) else []
        facts = read_facts((item.node,), item.file.aliases, classes | frozenset(first))
        self.use(item.file, facts)
        return known if facts.receiver_escapes else (facts.members | facts.reads) & known


def _import_name(use: ImportUse, depth: int) -> str:
    return "" if use.level else ".".join(use.module.split(".")[: depth + 1])


def _package(path: str) -> str:
    return "." if path.startswith(".") else path.partition(".")[0]


def _all_fixed(file: SourceFile, name: str) -> bool:
    return all(is_fixed(item) for item in file.bindings.get(name, ()))


def _variable(file: SourceFile, read: EnvironmentRead) -> str:
    name = read.name or (file.constant(read.constant) if read.constant else None)
    if type(name) is str:
        return name
    raise KeyUncomputableError(
        f"{file.path}:{read.line}: code that load or build reaches reads the environment by a name that is computed;"
        ' read os.environ["NAME"] by a written name, or declare env=["NAME", ...] together with version="1"'
    )
