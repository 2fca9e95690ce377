"""The files of the user's own that a handler needs at run time: what goes into its image."""

from __future__ import annotations

import glob
import os
import sys
from typing import TYPE_CHECKING, Any

from coldstart.errors import HandlerError
from coldstart.keys.handlers import find_handlers
from coldstart.keys.syntax import IMPORTS, children, import_uses

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from coldstart.keys.source import SourceFile, Sources
    from coldstart.keys.syntax import ImportUse
    from coldstart.script import Script

MOST_BYTES = 200 << 20
"""The most that an image's sources may be: weights come from the snapshot or a hub, not from the image."""

_NEVER = frozenset({"__pycache__", "node_modules"})
_NEVER_ENDINGS = (".pyc", ".pyo")
_NAMED = 3
"""How many of the largest files a message names."""


def source_files(path: str, script: Script) -> tuple[tuple[str, str], ...]:
    """The absolute path, and the name relative to the handler's folder, of each file that the image needs, by name.

    These are the file at ``path``, the local modules that it imports (by syntax tree, functions included; of a package
    the whole folder), the files that ``files=`` spells out, and what ``script.include`` matches. Hidden files, caches
    and virtual environments are never among them.

    Raises HandlerError for what lies, or leads by a link, outside the handler's folder, for a pattern that matches
    nothing, and for more than ``MOST_BYTES``.
    """
    collection = _Collection(path)
    collection.add_modules()
    collection.add_declared_files()
    for pattern in script.include:
        collection.add_pattern(pattern)
    _check_size(collection.found)
    return tuple((absolute, name) for name, absolute in sorted(collection.found.items()))


class _Collection:
    """Files below the handler's folder, each once, by relative name."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.folder = os.path.dirname(self.path)
        self.found: dict[str, str] = {}
        self._handlers = find_handlers(path)
        self._pending: list[SourceFile] = []
        self._add_file(self.path, "the handler's file")

    # --- what is added -----------------------------------------------------------------------------------------------

    def add_modules(self) -> None:
        """The local modules that the handler's file imports, and those that these import."""
        if not self._handlers:
            return
        sources = self._handlers[0].sources
        self._pending = [sources.handler]
        while self._pending:
            importer = self._pending.pop()
            for use in _imports(importer):
                self._follow(sources, importer, use)

    def add_declared_files(self) -> None:
        """The paths that the decorators' ``files=`` spell out. A file that is not there is not carried: no error."""
        for handler in self._handlers:
            declared: Mapping[str, Any] = handler.files if isinstance(handler.files, dict) else {}
            for place in declared.values():
                absolute = os.path.join(self.folder, str(place))
                if os.path.lexists(absolute):
                    self._add_tree(absolute, f"files= {str(place)!r}")

    def add_pattern(self, pattern: str) -> None:
        """What a pattern of ``include`` matches; a folder stands for all in it."""
        what = f"include {pattern!r}"
        if os.path.isabs(pattern) or ".." in pattern.split("/"):
            raise HandlerError(f"{self.path}: {what} leads out of {self.folder}: patterns are relative to the file")
        plain = os.path.normpath(pattern)  # "./assets" is "assets", and no hidden file
        matches = sorted(glob.glob(plain, root_dir=self.folder, recursive=True))
        kept = [match for match in matches if not any(map(_is_never, match.split(os.sep)))]
        if not kept:
            hidden = " (hidden files and caches are never taken)" if matches else ""
            raise HandlerError(f"{self.path}: {what} matches nothing in {self.folder}{hidden}")
        for match in kept:
            self._add_tree(os.path.join(self.folder, match), what)

    # --- how ---------------------------------------------------------------------------------------------------------

    def _follow(self, sources: Sources, importer: SourceFile, use: ImportUse) -> None:
        top = use.module.partition(".")[0]
        if not use.level and (top == "coldstart" or top in sys.stdlib_module_names):
            return
        modules = [use.module] if use.name is None else [use.module, f"{use.module}.{use.name}".lstrip(".")]
        for module in modules:
            for place in sources.modules(importer, module, use.level):
                if place is not None and sources.is_local(place):
                    self._add_module(sources, place, f"the module {module!r}, imported by {importer.path},")

    def _add_module(self, sources: Sources, place: str, what: str) -> None:
        package = os.path.dirname(place)
        in_package = os.path.basename(place) == "__init__.py" and package != self.folder
        new = self._add_tree(package, what) if in_package else self._add_file(place, what)
        self._pending += [sources.read(path) for path in new if path.endswith(".py")]

    def _add_tree(self, place: str, what: str) -> list[str]:
        """Add a file, or all files of a folder. Returns those that were not there yet."""
        if not os.path.isdir(place):
            return self._add_file(place, what)
        self._check_inside(place, what)
        new: list[str] = []
        for folder, folders, names in os.walk(place):
            inside = [os.path.join(folder, name) for name in folders if not _is_never(name)]
            folders[:] = sorted(os.path.basename(each) for each in inside if not _is_environment(each))
            for name in folders:
                self._check_no_link(os.path.join(folder, name), what)
            for name in sorted(name for name in names if not _is_never(name)):
                new += self._add_file(os.path.join(folder, name), what)
        return new

    def _add_file(self, place: str, what: str) -> list[str]:
        self._check_inside(place, what)
        if not os.path.isfile(place):
            raise HandlerError(f"{self.path}: {what} has {place}, which is no file: leave it out, or mend the link")
        name = self._relative(place)
        if name in self.found:
            return []
        self.found[name] = os.path.join(self.folder, *name.split("/"))
        return [self.found[name]]

    def _relative(self, place: str) -> str:
        """The name below the handler's folder, which may itself be reached through a link."""
        real_folder = os.path.realpath(self.folder)
        base = real_folder if place.startswith(real_folder + os.sep) else self.folder
        return os.path.relpath(place, base).replace(os.sep, "/")

    def _check_inside(self, place: str, what: str) -> None:
        root = os.path.realpath(self.folder) + os.sep
        if self._relative(place).startswith("../") or not (os.path.realpath(place) + os.sep).startswith(root):
            leads = f" leads to {os.path.realpath(place)}, which" if os.path.islink(place) else ""
            raise HandlerError(
                f"{self.path}: {what} is at {place}, which{leads} is outside {self.folder}: an image holds that folder"
                " alone; move it there, or install it as a package and name that in the block's dependencies"
            )

    def _check_no_link(self, folder: str, what: str) -> None:
        if os.path.islink(folder):
            raise HandlerError(
                f"{self.path}: {what} has {folder}, a link to a folder, which is not copied: put the folder itself there"
            )


def _imports(file: SourceFile) -> Iterator[ImportUse]:
    """Each imported thing of a file, those in functions included."""
    pending = list(file.body)
    while pending:
        node = pending.pop()
        if isinstance(node, IMPORTS):
            yield from (use for _, use, _ in import_uses(node))
        pending += children(node)


def _is_never(name: str) -> bool:
    return name.startswith(".") or name in _NEVER or name.endswith(_NEVER_ENDINGS)


def _is_environment(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "pyvenv.cfg"))


def _check_size(found: Mapping[str, str]) -> None:
    sizes = {name: os.path.getsize(path) for name, path in found.items()}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:_NAMED]
        shown = ", ".join(f"{name} ({sizes[name] >> 20} MiB)" for name in largest)
        raise HandlerError(
            f"the handler's files are {total >> 20} MiB, more than {MOST_BYTES >> 20} MiB; the largest: {shown};"
            " leave weights out of the image: load fetches them once, the snapshot carries them"
        )
