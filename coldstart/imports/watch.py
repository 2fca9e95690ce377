"""Times the imports of this process, from the moment it is told to: nothing is done, and nothing costs, before that.

A finder at the head of ``sys.meta_path`` asks those behind it and takes the time of what they find. A time runs from the
search of a module to the end of its code, imports inside included, by the monotonic clock; looking costs some 50 us a
module, so a start that is looked at takes a little longer. Modules that are built in or frozen take microseconds and are not
listed, nor are those of loaders that are not Python's own: both count to whoever imports them. This file imports next to
nothing itself, so that it can be first.
"""

from __future__ import annotations

import os
import sys
import time
from importlib.machinery import ExtensionFileLoader, SourceFileLoader, SourcelessFileLoader
from threading import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FILE_LOADERS = (SourceFileLoader, SourcelessFileLoader, ExtensionFileLoader)
_NO_IMPORTERS = ("importlib", "importlib._bootstrap", "importlib._bootstrap_external", __name__, "coldstart.caches")


class Load:
    """One import: a module, the module and line that asked for it, the thread, and when (monotonic seconds).

    ``compiled``: there was no bytecode of it, so its source was compiled first.
    """

    __slots__ = ("began_seconds", "compiled", "ended_seconds", "importer", "line", "name", "thread")

    def __init__(
        self,
        name: str,
        importer: str,
        line: int,
        thread: int,
        began_seconds: float,
        ended_seconds: float,
        *,
        compiled: bool = False,
    ) -> None:
        self.name = name
        self.importer = importer
        self.line = line
        self.thread = thread
        self.began_seconds = began_seconds
        self.ended_seconds = ended_seconds
        self.compiled = compiled

    @property
    def seconds(self) -> float:
        """How long it took, what it imports included."""
        return self.ended_seconds - self.began_seconds

    @property
    def package(self) -> str:
        """The top-level package."""
        return self.name.partition(".")[0]


class ImportWatch:
    """Looks at imports from ``begin`` to ``end``. ``loads``: those that are over, in the order of their ends."""

    def __init__(self) -> None:
        self.began_seconds = 0.0
        self.handler = ""
        """The name of the handler's module, once it is added."""
        self.loads: list[Load] = []
        self._found: dict[int, tuple[Any, float]] = {}

    def begin(self) -> ImportWatch:
        """Look from now on."""
        self.began_seconds = time.monotonic()
        sys.meta_path.insert(0, self)
        return self

    def end(self) -> None:
        """Look no longer. Imports under way are still taken down."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def add(self, handler: str, began_seconds: float, ended_seconds: float) -> None:
        """Add the import of the handler's file, which does not come through a finder. Its thread is this one."""
        self.handler = handler
        self.loads.append(Load(handler, "coldstart.loading", 0, get_ident(), began_seconds, ended_seconds))

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """What the finders behind this one find; its loader will tell when it is done."""
        began = time.monotonic()
        importer, line = _importer()
        spec = self._first(name, path, target)
        loader = getattr(spec, "loader", None)
        if type(loader) in _FILE_LOADERS:
            self._found[get_ident()] = (spec, began)
            self._follow(spec, importer, line)
        return spec

    def _first(self, name: str, path: Any, target: Any) -> Any:
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        specs = (finder.find_spec(name, path, target) for finder in behind if hasattr(finder, "find_spec"))
        return next((spec for spec in specs if spec is not None), None)

    def _follow(self, spec: Any, importer: str, line: int) -> None:
        """Let the loader, which is this module's alone, tell when it creates and has executed the module."""
        loader = spec.loader
        create, execute, own = loader.create_module, loader.exec_module, vars(loader)
        began: list[float] = []

        def create_module(spec: Any) -> Any:
            found, at = self._found.pop(get_ident(), (None, 0.0))
            is_now = found is spec  # one may look for a module and import it much later
            began.append(at if is_now else time.monotonic())
            return create(spec)

        def exec_module(module: Any) -> None:
            own.pop("create_module", None)
            own.pop("exec_module", None)
            at = began[0] if began else time.monotonic()
            compiled = type(loader) is SourceFileLoader and not (spec.cached and os.path.exists(spec.cached))
            try:
                execute(module)
            finally:
                ended = time.monotonic()
                self.loads.append(Load(spec.name, importer, line, get_ident(), at, ended, compiled=compiled))

        own["create_module"], own["exec_module"] = create_module, exec_module


def _importer() -> tuple[str, int]:
    """The module and line whose import statement, or call, this is."""
    frame = sys._getframe(2)  # noqa: SLF001  the only way to see who asks
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in _NO_IMPORTERS:
            return str(name), frame.f_lineno
        above = frame.f_back
        if above is None:
            break
        frame = above
    return "", 0
