"""One start in two tables: the stretches between the spawn and the first answer, and what its imports cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coldstart.imports.sums import HANDLER, OWNERS, covered_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Row = tuple[str, ...]

INTERPRETER = "interpreter and the command's first lines"
SHORTEST_SECONDS = 0.0001
SHOWN = 12
_OWN_TRACKS = ("main", "phase")


def tables(document: Mapping[str, Any]) -> str:
    """The tables of a document of ``coldstart run`` with its imports. Milliseconds; what was imported is in both."""
    imports, start = document["imports"], document["start"]
    resolution_ms = 1000 * start["process_start_resolution_seconds"]
    lines = [
        f"from the spawn (known to {resolution_ms:.0f} ms) to the first answer, ms",
        *_laid_out([("", "began", "took", "imports"), *_phase_rows(document)], names=1),
        "",
        f"imports before the first answer, ms: {len(imports['modules'])} modules, timed in this start (looking: 0.05 ms each)",
        *_laid_out(_owner_rows(imports), names=1),
        *_compiled(imports),
        "",
        *_laid_out([("package", "counted to", "own", "with its imports", "modules"), *_package_rows(imports)], names=2),
        "",
        *_laid_out([("longest single modules", "imported by", "own"), *_module_rows(imports)], names=2),
    ]
    return "\n".join(lines)


def stretches(document: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """What the start waited for, one after another without gaps: name, begin and end in seconds since the spawn."""
    start, answered = document["start"], document["first_answer_seconds"]
    spans = [span for span in (*start["phases"], *start["spans"]) if not span.get("skipped")]
    spans = [span for span in spans if span.get("track", "phase") in _OWN_TRACKS]
    until = document["imports"]["began_seconds"]
    found = [(INTERPRETER, 0.0, until)]
    for span in sorted(spans, key=lambda span: (span["began_seconds"], -span["ended_seconds"])):
        began, ended = max(until, span["began_seconds"]), min(answered, span["ended_seconds"])
        if ended <= until:  # a part of the one before
            continue
        if began - until >= SHORTEST_SECONDS:
            found.append((f"before {span['name']}", until, began))
        found.append((span["name"], began, ended))
        until = ended
    return [*found, ("first answer", until, answered)]


def _phase_rows(document: Mapping[str, Any]) -> list[Row]:
    loads = [(module["began_seconds"], module["ended_seconds"]) for module in document["imports"]["modules"]]
    rows = []
    for name, began, ended in stretches(document):
        imported = covered_seconds(loads, began, ended)
        rows.append((name, _ms(began), _ms(ended - began), _ms(imported) if imported else "-"))
    total = covered_seconds(loads, 0.0, document["first_answer_seconds"])
    return [*rows, ("all", "", _ms(document["first_answer_seconds"]), _ms(total))]


def _owner_rows(imports: Mapping[str, Any]) -> list[Row]:
    names = {**OWNERS, HANDLER: f"the handler's module ({imports['handler']}) and what it imports"}
    rows: list[Row] = [(INTERPRETER, _ms(imports["began_seconds"]))]
    return rows + [(names[owner], _ms(seconds)) for owner, seconds in imports["owners"].items()]


def _compiled(imports: Mapping[str, Any]) -> list[str]:
    count = sum(module["compiled"] for module in imports["modules"])
    if not count:
        return []
    remedy = "let it be written (unset PYTHONDONTWRITEBYTECODE), or run python -m compileall when the image is built"
    return [f"  {count} of the modules had no bytecode and were compiled first: {remedy}"]


def _package_rows(imports: Mapping[str, Any]) -> list[Row]:
    shown, rest = imports["packages"][:SHOWN], imports["packages"][SHOWN:]
    rows: list[Row] = [
        (each["name"], each["owner"], _ms(each["own_seconds"]), _ms(each["seconds"]), str(each["modules"]))
        for each in shown
    ]
    if rest:
        own, modules = sum(each["own_seconds"] for each in rest), sum(each["modules"] for each in rest)
        rows.append((f"{len(rest)} more", "", _ms(own), "", str(modules)))
    return rows


def _module_rows(imports: Mapping[str, Any]) -> list[Row]:
    longest = sorted(imports["modules"], key=lambda module: -module["own_seconds"])[:SHOWN]
    return [(module["name"], module["importer"], _ms(module["own_seconds"])) for module in longest]


def _laid_out(rows: Sequence[Row], *, names: int) -> list[str]:
    """Columns: the first ``names`` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if place < names else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
