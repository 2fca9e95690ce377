"""``coldstart imports FILE[:NAME]``: what importing the handler's file costs, and which of it only ``load`` needs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from coldstart.imports.costs import Cost, ImportCosts
    from coldstart.imports.needs import Need

WORTH_SECONDS = 0.1
"""An import that only ``load`` needs is worth a warning from here on."""

_ON_FILES = "On rung files load runs at every start: there it gains nothing."


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "imports",
        help="what importing a handler's file costs",
        description="What importing a handler's file costs, import by import, and which of them only load needs. The file is"
        " imported in fresh processes; no worker is started.",
    )
    parser.add_argument("target", metavar="FILE[:NAME]", help="the handler's file, and its name if there are several")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    from coldstart.imports.costs import measure_imports
    from coldstart.loading import parse_target

    target = parse_target(options.target)
    costs = measure_imports(target.path, target.name)
    print(json.dumps(_document(costs)) if options.json else report(costs))
    return 0


def _document(costs: ImportCosts) -> dict[str, Any]:
    return {
        "path": costs.path,
        "seconds": costs.seconds,
        "imports": [
            {
                "line": cost.need.line,
                "modules": list(cost.need.modules),
                "seconds": cost.seconds,
                "users": sorted(cost.need.users),
                "only_for_load": cost.need.is_only_for_load,
            }
            for cost in costs.costs
        ],
        "own_seconds": costs.own_seconds,
        "without_seconds": costs.without_seconds,
    }


def report(costs: ImportCosts) -> str:
    """The costs as text: a row for each top-level import, and what it would be without those that only ``load`` needs."""
    rows = [("line", "s", "import", ""), *(_row(cost) for cost in costs.costs)]
    rows.append(("", f"{costs.own_seconds:.3f}", "all else in the file", ""))
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    lines = [
        f"{line:>{widths[0]}}  {seconds:>{widths[1]}}  {modules:{widths[2]}}  {told}".rstrip()
        for line, seconds, modules, told in rows
    ]
    from coldstart.imports.costs import RUNS

    heading = f"importing {costs.path} costs {costs.seconds:.3f} s (fresh process, the least of {RUNS})"
    return "\n".join([heading, *(f"  {line}" for line in lines), *_closing(costs)])


def _row(cost: Cost) -> tuple[str, str, str, str]:
    return str(cost.need.line), f"{cost.seconds:.3f}", ", ".join(cost.need.modules), _told(cost)


def _told(cost: Cost) -> str:
    """Who uses an import, with the remedy where there is one."""
    need = cost.need
    noted = "; for annotations import it under if TYPE_CHECKING:" if need.annotated else ""
    if need.modules and all(module.partition(".")[0] == "coldstart" for module in need.modules):
        return ""
    if need.is_only_for_load:
        return f"used only in load: {_remedy(need)}{noted}"
    if need.is_only_for_loading:
        return (
            f"used only in {_listed(need.users)}: imported in them, a start with a program would not pay for it{noted}"
        )
    if not need.users:
        if need.annotated:
            return "used only in annotations: import it under if TYPE_CHECKING:"
        return "used nowhere in this file: needed only if importing it has an effect"
    return f"used in {_listed(need.users)}"


def _remedy(need: Need) -> str:
    if not need.functions:
        return "make load a function, and move the import into it"
    return f"move the import into {_listed([f'{name}()' for name in need.functions])}"


def _listed(users: Sequence[str] | frozenset[str]) -> str:
    *others, last = sorted(users)
    return f"{', '.join(others)} and {last}" if others else last


def _closing(costs: ImportCosts) -> list[str]:
    lines = ["A row is what no row above it has imported already."]
    if costs.without_seconds is not None:
        lines.append(
            f"Without {_those(costs.for_load)} the import takes {costs.without_seconds:.3f} s (measured). {_ON_FILES}"
        )
    return lines


def _those(costs: Sequence[Cost]) -> str:
    lines = [str(cost.need.line) for cost in costs]
    return f"line {lines[0]}" if len(lines) == 1 else f"lines {', '.join(lines)}"


def warning_of(costs: ImportCosts) -> str | None:
    """What ``bench`` says of a handler whose module drags in what only ``load`` needs, None if that costs little."""
    if costs.without_seconds is None or costs.seconds - costs.without_seconds < WORTH_SECONDS:
        return None
    named = ", ".join(
        f"{', '.join(cost.need.modules)} (line {cost.need.line})" for cost in costs.for_load if cost.seconds > 0
    )
    spared = costs.seconds - costs.without_seconds
    return (
        f"warning: every start imports {named} for {spared:.2f} s of {costs.seconds:.2f} s, and only load uses it: move the"
        f" import into load() (coldstart imports {costs.path})"
    )
