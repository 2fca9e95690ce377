"""Importing a handler's file: by path, as a module of its own name, with its folder first on the path."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.definition import Definition
from coldstart.errors import EventError, HandlerError

if TYPE_CHECKING:
    from types import ModuleType


class Target(NamedTuple):
    """``FILE[:NAME]`` of a command line. ``name`` is a handler's name or its variable's, None for the only one."""

    path: str
    name: str | None


def parse_target(text: str) -> Target:
    """Split ``FILE[:NAME]``. Raises HandlerError when no such file is there."""
    path, _, name = text.partition(":")
    if not path.endswith(".py"):
        raise HandlerError(f"{path!r} is not a Python file; give the path of a handler's file: handlers/minilm.py")
    if not Path(path).is_file():
        raise HandlerError(f"no file is at {path!r} (looked from {Path.cwd()}): check the path")
    return Target(os.path.abspath(path), name or None)  # not resolve(), which follows links


def prepare_path(path: str) -> None:
    """Let the file's neighbours be importable, as they are when Python runs the file itself."""
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)


def import_file(path: str, *, module: str = "") -> ModuleType:
    """Import the file at ``path`` and return its module.

    ``module``: the dotted name it had elsewhere, used where it leads to the same file (relative imports then work).
    Raises HandlerError for a syntax error; errors of the file's own code pass as they are.
    """
    import importlib.util

    if module and module != "__main__":
        found = _by_name(module, path)
        if found is not None:
            return found
    name = Path(path).stem.replace("-", "_")
    existing = sys.modules.get(name)
    if existing is not None:
        if _is_of(existing, path):
            return existing
        name = f"_coldstart_handler_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise HandlerError(f"{path!r} cannot be imported as a Python module")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    except BaseException as error:
        sys.modules.pop(name, None)  # as the import statement does: half a module is none
        if isinstance(error, SyntaxError):
            place = f"{error.filename or path}:{error.lineno or 1}"
            raise HandlerError(f"{place}: not valid Python: {error.msg}") from error
        raise
    return loaded


def _by_name(module: str, path: str) -> ModuleType | None:
    import importlib

    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    return found if _is_of(found, path) else None


def _is_of(module: ModuleType, path: str) -> bool:
    return os.path.realpath(getattr(module, "__file__", None) or "") == os.path.realpath(path)


def handlers_of(module: ModuleType) -> dict[str, Any]:
    """Variable name -> decorated handler, for those that the module defines itself."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(getattr(value, "__coldstart__", None), Definition) and value.__module__ == module.__name__
    }


def choose_handler(module: ModuleType, target: Target) -> Any:
    """The handler that ``target`` means. Raises HandlerError, naming what there is, for none or more than one."""
    handlers = handlers_of(module)
    if not handlers:
        raise HandlerError(
            f"{target.path} has no handler: decorate a function (event, model) with @coldstart('name', load=...)"
        )
    wanted = {
        id(handler): handler  # by identity: one handler may have two names
        for name, handler in handlers.items()
        if target.name in (None, name, handler.__coldstart__.name)
    }
    if len(wanted) != 1:
        names = ", ".join(dict.fromkeys(handler.__coldstart__.name for handler in handlers.values()))
        found = f"{len(wanted)} handlers" if wanted else f"no handler {target.name!r}"
        raise HandlerError(f"{target.path} has {found}; choose one with FILE:NAME (there: {names})")
    return next(iter(wanted.values()))


def check_event(event: Any) -> Any:
    """Return ``event`` if it is one: a mapping with an ``input``. Raises EventError."""
    if not isinstance(event, dict):
        raise EventError(f'an event is an object with an input, such as {{"input": ...}}, not a {type(event).__name__}')
    if "input" not in event:
        there = ", ".join(sorted(map(str, event))) or "nothing"
        raise EventError(f'the event has no input (it has {there}): send {{"input": ...}}')
    return event
