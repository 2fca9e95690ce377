"""Classes and their local bases, as far as plain base names tell."""

from __future__ import annotations

import _ast
from typing import TYPE_CHECKING

from coldstart.keys.source import applies_coldstart, items_of

if TYPE_CHECKING:
    from coldstart.keys.source import SourceFile, Sources
    from coldstart.keys.syntax import Node


def class_lineage(sources: Sources, file: SourceFile, owner: Node) -> list[tuple[SourceFile, Node]]:
    """A class and its local bases with the files they are in, depth first."""
    lineage = [(file, owner)]
    for base in owner.bases:
        for where, node in local_bases(sources, file, base):
            lineage += [each for each in class_lineage(sources, where, node) if each not in lineage]
    return lineage


def has_member(sources: Sources, file: SourceFile, owner: Node, name: str) -> bool:
    """Whether a class or a local base of it defines ``name``."""
    lineage = class_lineage(sources, file, owner)
    return any(name in item.binds for where, node in lineage for item in items_of(where, node.body))


def class_header(file: SourceFile, owner: Node) -> list[Node]:
    """Decorators, bases and keywords of a class; of its decorators those below ``@coldstart``, which get the class itself."""
    ours = [index for index, each in enumerate(owner.decorator_list) if applies_coldstart(each, file.aliases)]
    decorators = owner.decorator_list[ours[-1] + 1 :] if ours else owner.decorator_list
    return [*decorators, *owner.bases, *owner.keywords]


def local_bases(sources: Sources, file: SourceFile, base: Node) -> list[tuple[SourceFile, Node]]:
    """The local classes that a base may be, if it is a plain name."""
    return _class_named(sources, file, base.id, set()) if type(base) is _ast.Name else []


def _class_named(
    sources: Sources, file: SourceFile, name: str, seen: set[tuple[SourceFile, str]]
) -> list[tuple[SourceFile, Node]]:
    if (file, name) in seen:
        return []
    seen.add((file, name))
    found: list[tuple[SourceFile, Node]] = []
    for leaf in file.leaves(name):
        if type(leaf) is _ast.ClassDef:
            found.append((file, leaf))
        elif type(leaf) is _ast.ImportFrom:
            for alias in leaf.names:
                where = sources.imported_file(file, leaf.module or "", leaf.level)
                if (alias.asname or alias.name) == name and where is not None and sources.is_local(where.path):
                    found += _class_named(sources, where, alias.name, seen)
    return found
