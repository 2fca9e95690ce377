"""What importing a handler's file costs, line by line, measured in fresh processes that do nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from coldstart.config import child_environment
from coldstart.errors import HandlerError
from coldstart.imports.needs import read_needs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.imports.needs import Need

RUNS = 3
TIMEOUT_SECONDS = 600.0
_CHILD = "from coldstart.imports.child import main; main()"


class Cost(NamedTuple):
    """A top-level import with its ``seconds``: what it loads that no line above it has loaded."""

    need: Need
    seconds: float


class ImportCosts(NamedTuple):
    """The least of some runs, in seconds.

    ``costs`` is in the file's order, ``own_seconds`` what is none of them (the file's own statements, imports in its calls).
    ``without_seconds``: the file without the imports that only ``load`` needs, None if there are none.
    """

    path: str
    seconds: float
    costs: tuple[Cost, ...]
    own_seconds: float
    without_seconds: float | None

    @property
    def for_load(self) -> tuple[Cost, ...]:
        """The imports that only ``load`` needs."""
        return tuple(cost for cost in self.costs if cost.need.is_only_for_load)


def measure_imports(path: str, name: str | None = None, *, runs: int = RUNS) -> ImportCosts:
    """Measure the file at an absolute ``path`` as far as its handler ``name`` (None: all of its handlers) goes.

    No worker is started and no store is touched. Raises HandlerError where the file cannot be read, is not Python, has no
    such handler, or raises while it is imported.
    """
    needs = read_needs(path, name)
    source = Path(path).read_bytes()
    seconds, by_line = _least(path, source, runs)
    costs = tuple(
        Cost(need, sum(spent for line, spent in by_line if need.line <= line <= need.end_line)) for need in needs
    )
    own_seconds = max(0.0, seconds - sum(cost.seconds for cost in costs))
    removable = [need for need in needs if need.is_only_for_load]
    without = _least(path, _without(source, removable), runs)[0] if removable else None
    return ImportCosts(path, seconds, costs, own_seconds, without)


def _least(path: str, source: bytes, runs: int) -> tuple[float, list[tuple[int, float]]]:
    return min((_measure(path, source) for _ in range(runs)), key=lambda measured: measured[0])


def _measure(path: str, source: bytes) -> tuple[float, list[tuple[int, float]]]:
    """One run: the seconds of all, and those of each import by the line that asked for it."""
    name = Path(path).stem.replace("-", "_")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, path, name],
            input=source,
            env=child_environment({"COLDSTART_STORE": "off"}),
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise HandlerError(f"importing {path} was not done after {TIMEOUT_SECONDS:.0f} s and was ended") from error
    rows = [line.split("\t") for line in done.stdout.decode(errors="replace").splitlines()]
    failed = next((row for row in rows if row[0] == "E"), None)
    if failed is not None:
        place = f"{path}:{failed[1]}" if failed[1] != "0" else path
        raise HandlerError(f"{place}: the import of the file raises {failed[2]}")
    total = next((float(row[1]) for row in rows if row[0] == "T"), None)
    if total is None:
        words = done.stderr.decode(errors="replace").split("\n")[-2:]
        raise HandlerError(f"importing {path} ended its process (status {done.returncode}): {' '.join(words).strip()}")
    return total, [(int(row[1]), float(row[2])) for row in rows if row[0] == "L"]


def _without(source: bytes, needs: Sequence[Need]) -> bytes:
    """The source with ``pass`` in the place of some import statements; all lines stay where they are."""
    import ast

    lines = source.splitlines(keepends=True)
    places = {need.line for need in needs}
    statements = (node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom)))
    for node in sorted(statements, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        if node.lineno in places and node.end_lineno is not None:
            head = lines[node.lineno - 1][: node.col_offset]
            tail = lines[node.end_lineno - 1][node.end_col_offset :]
            lines[node.lineno - 1 : node.end_lineno] = [
                head + b"pass" + (b"\n" if node.end_lineno > node.lineno else tail),
                *[b"\n"] * (node.end_lineno - node.lineno),
            ]
    return b"".join(lines)
