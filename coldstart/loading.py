"""Importing a handler's file: by path, as a module of its own name, with its folder first on the path."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any, NamedTuple

from coldstart.definition import Definition
from coldstart.errors import HandlerError


class Target(NamedTuple):
    """``FILE[:NAME]`` of a command line. ``name`` is a handler's name or its variable's, None for the only one."""

    path: str
    name: str | None


def parse_target(text: str) -> Target:
    """Split ``FILE[:NAME]``. Raises HandlerError when no such file is there."""
    path, _, name = text.partition(":")
    if not path.endswith(".py"):
        raise HandlerError(f"{path!r} is not a Python file; give the path of the handler's file, such as handlers/minilm.py")
    if not os.path.isfile(path):
        raise HandlerError(f"no file is at {path!r} (looked from {os.getcwd()})")
    return Target(os.path.abspath(path), name or None)


def prepare_path(path: str) -> None:
    """Let the file's neighbours be importable, as they are when Python runs the file itself."""
    folder = os.path.dirname(path)
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
    name = os.path.splitext(os.path.basename(path))[0].replace("-", "_")
    existing = sys.modules.get(name)
    if existing is not None:
        if os.path.realpath(getattr(existing, "__file__", None) or "") == os.path.realpath(path):
            return existing
        name = f"_coldstart_handler_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise HandlerError(f"{path!r} cannot be imported as a Python module")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    except SyntaxError as error:
        raise HandlerError(f"{path}, line {error.lineno}: {error.msg}") from error
    return loaded


def _by_name(module: str, path: str) -> ModuleType | None:
    import importlib

    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    return found if os.path.realpath(getattr(found, "__file__", None) or "") == os.path.realpath(path) else None


def handlers_of(module: ModuleType) -> dict[str, Any]:
    """Variable name -> decorated handler, for those that the module defines itself."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(getattr(value, "__coldstart__", None), Definition) and value.__module__ == module.__name__
    }


def choose_handler(module: ModuleType, target: Target) -> Any:
    """The handler that ``target`` means. Raises HandlerError, naming what there is, when there is none or more than one."""
    found = handlers_of(module)
    if not found:
        raise HandlerError(
            f"{target.path} has no handler: decorate a function (event, model) with @coldstart('name', load=...)"
        )
    if target.name is not None:
        found = {
            name: handler
            for name, handler in found.items()
            if target.name in (name, handler.__coldstart__.name)
        }
    if len(found) != 1:
        names = ", ".join(handler.__coldstart__.name for handler in handlers_of(module).values())
        wanted = f"no handler {target.name!r}" if target.name else f"{len(found)} handlers"
        raise HandlerError(f"{target.path} has {wanted}; choose one with FILE:NAME (there: {names})")
    return next(iter(found.values()))


def check_event(event: Any) -> Any:
    """Return ``event`` if it is one: a mapping with an ``input``. Raises EventError."""
    from coldstart.errors import EventError

    if not isinstance(event, dict):
        raise EventError(f"an event is an object with an 'input', such as {{\"input\": ...}}, not a {type(event).__name__}")
    if "input" not in event:
        raise EventError(f"the event has no 'input' (it has {', '.join(sorted(map(str, event))) or 'nothing'})")
    return event
