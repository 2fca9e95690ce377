"""What is measured: a handler file, the input of its event, and the companion that serves the same the ordinary way."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import HandlerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Target(NamedTuple):
    """A handler to measure. ``name`` is "" where none was given; ``ordinary`` is None where there is no companion."""

    file: Path
    name: str
    input: Any
    ordinary: Path | None
    has_program: bool = False

    @property
    def label(self) -> str:
        """A short name for files and headings: the stem of the file, with the name where one was given."""
        return f"{self.file.stem}-{self.name}" if self.name else self.file.stem

    @property
    def reference(self) -> str:
        """``FILE[:NAME]`` as ``coldstart run`` takes it."""
        return f"{self.file}:{self.name}" if self.name else str(self.file)


def read_target(reference: str, *, input_text: str | None, ordinary: str | None) -> Target:
    """The target of ``FILE[:NAME]``.

    ``input_text`` is the event's input as JSON; None takes the first warm-up input that the source spells out.
    ``ordinary`` is the companion's path; None takes ``<stem>_ordinary.py`` beside the file where it is there.
    Raises HandlerError for a file that is not there or not Python, UsageError for an input that cannot be used.
    """
    file, name = _split(reference)
    event_input = _parsed(input_text) if input_text is not None else first_warmup_input(file, name)
    return Target(file, name, event_input, _companion(file, ordinary), _has_program(file, name))


def first_warmup_input(file: Path, wanted: str = "") -> Any:
    """The first entry of ``warmup=`` in the source of the handler ``wanted``, by its own name or its function's.

    Raises HandlerError where no such handler is in the file, UsageError where its source writes out no input.
    """
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        raise HandlerError(f"{file}:{error.lineno}: not valid Python: {error.msg}") from error
    found = [(name, call) for name, call in _decorations(tree) if wanted in ("", name, _snapshot_name(call))]
    if not found:
        named = f" named {wanted}" if wanted else ""
        raise HandlerError(f"{file} has no handler{named} decorated with @coldstart(...)")
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise UsageError(f"{file} has several handlers ({names}): choose one with {file}:NAME")
    entry = _first_entry(found[0][1])
    if entry is None:
        raise UsageError(f"{file} spells out no warm-up input to take as the event: pass --input '<JSON>'")
    return entry


def _has_program(file: Path, wanted: str) -> bool:
    """Whether the handler asks for a program."""
    from coldstart.keys import find_handlers

    return any(each.has_program for each in find_handlers(str(file)) if wanted in ("", each.name, each.attribute))


def _split(reference: str) -> tuple[Path, str]:
    path, _, name = reference.partition(":")
    if not Path(path).is_file():
        raise HandlerError(f"no handler file is at {path}: check the path")
    return Path(path), name


def _companion(file: Path, ordinary: str | None) -> Path | None:
    companion = file.with_name(f"{file.stem}_ordinary.py") if ordinary is None else Path(ordinary)
    if companion.is_file():
        return companion
    if ordinary is not None:
        raise HandlerError(f"no file is at --ordinary {ordinary}: check the path")
    return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"--input {text[:80]!r} is not JSON: {error}") from error


def _decorations(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and _last_name(decorator.func) == "coldstart":
                    yield node.name, decorator


def _snapshot_name(decoration: ast.Call) -> str:
    """The literal name that the decorator gives the handler, "" where it is computed."""
    first = decoration.args[0] if decoration.args else _keyword(decoration, "name")
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _first_entry(decoration: ast.Call) -> Any:
    """The first literal of ``warmup=[...]`` or ``warmup=Warmup([...])`` that JSON can carry, else None."""
    node: ast.expr | None = _keyword(decoration, "warmup")
    if isinstance(node, ast.Call) and _last_name(node.func) == "Warmup":
        node = node.args[0] if node.args else _keyword(node, "inputs")
    if not isinstance(node, (ast.List, ast.Tuple)) or not node.elts:
        return None
    try:
        return json.loads(json.dumps(ast.literal_eval(node.elts[0])))
    except (ValueError, TypeError):  # a name or a call in it, or a value that JSON has no form for
        return None


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
