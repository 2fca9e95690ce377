"""Writes down what a benchmark found: a table for the screen, JSON with every trial, and Markdown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.bench.timeline import draw
from coldstart.bench.trial import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coldstart.bench.agreement import Agreement
    from coldstart.bench.machine import Machine
    from coldstart.bench.summary import Answers, Results, ScenarioSummary
    from coldstart.bench.trial import Trial

_HEADINGS = ("scenario", "n", "median s", "p95 s", "max s", "warm p50 ms", "warm p95 ms")
_METHOD = (
    "Every trial is a fresh interpreter; its time runs from just before the spawn to the first answer. Scenarios "
    "alternate in rounds, one process at a time. Round 0 warms the disk caches and is not counted: bytes come from "
    "memory, not from a disk."
)


class Report(NamedTuple):
    """All of a benchmark. ``name`` is the handler's."""

    name: str
    input: Any
    machine: Machine
    trials: Sequence[Trial]
    results: Results


def to_json(report: Report) -> str:
    """One JSON document with the results, the machine and every trial, round 0 included."""
    document = {
        "handler": report.name,
        "input": report.input,
        "machine": _plain(report.machine),
        "scenarios": dict(SCENARIOS),
        "results": _plain(report.results),
        "trials": _plain(report.trials),
    }
    return json.dumps(document, indent=1)


def to_text(report: Report) -> str:
    """What the screen shows: the table, the ratios, the answers, the bytes, a timeline of every scenario."""
    rows = [_HEADINGS, *(_row(summary) for summary in report.results.scenarios)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(_aligned(cell, width, place) for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    timelines = [f"\n{draw(summary)}" for summary in report.results.scenarios]
    return "\n".join([f"{report.name} on {report.machine}", "", *table, "", *_findings(report.results), *timelines])


def to_markdown(report: Report) -> str:
    """The same for a page, with the medians of all phases and spans."""
    lines = [f"# Cold start of `{report.name}`", "", f"Machine: {report.machine}.", "", _METHOD, ""]
    lines += _table(_HEADINGS, [_row(summary) for summary in report.results.scenarios])
    lines += ["", *(f"- {SCENARIO_LINE.format(name, SCENARIOS[name])}" for name in _names(report.results)), ""]
    lines += [*(f"- {finding}" for finding in _findings(report.results)), ""]
    for summary in report.results.scenarios:
        lines += [f"## {summary.scenario}", "", "```", draw(summary), "```", ""]
        parts = [_part_row(summary, place) for place in range(len(summary.parts))]
        lines += [*_table(("track", "what", "median s", "n"), parts), ""] if parts else []
    return "\n".join(lines)


def write(report: Report, stem: Path) -> tuple[Path, Path]:
    """Write ``<stem>.json`` and ``<stem>.md``, making the folder where it is missing; returns both paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.md")
    for path, text in zip(paths, (to_json(report), to_markdown(report)), strict=True):
        path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return paths


SCENARIO_LINE = "`{}`: {}"


def _names(results: Results) -> list[str]:
    return [summary.scenario for summary in results.scenarios]


def _plain(value: Any) -> Any:
    """Frozen values as dictionaries, all the way down."""
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _row(summary: ScenarioSummary) -> tuple[str, ...]:
    first, warm = summary.first_response, summary.warm
    seconds = [f"{value:.3f}" for value in (first.median, first.p95, first.maximum)]
    milliseconds = [f"{1000 * value:.2f}" for value in (warm.median, warm.p95)] if warm else ["-", "-"]
    return summary.scenario, str(first.samples), *seconds, *milliseconds


def _aligned(cell: str, width: int, place: int) -> str:
    return f"{cell:{width}}" if place == 0 else f"{cell:>{width}}"


def _part_row(summary: ScenarioSummary, place: int) -> tuple[str, ...]:
    part = summary.parts[place]
    return (
        part.track,
        part.name,
        f"skipped: {part.skipped}" if part.skipped else f"{part.median_seconds:.4f}",
        str(part.samples),
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


def _findings(results: Results) -> list[str]:
    ratios = [
        f"{each.over} / {each.under}: {each.median:.2f} (median of pairs, {each.lowest:.2f} to {each.highest:.2f})"
        for each in results.ratios
    ]
    return [
        *ratios,
        *_answer_lines(results.answers),
        *(line for summary in results.scenarios for line in _byte_lines(summary)),
    ]


def _answer_lines(answers: Answers) -> list[str]:
    counted = (
        f"restored answers equal naive ones bit for bit in {answers.restored_identical} of {answers.rounds} rounds"
    )
    lines = [counted if answers.restored.identical else f"{counted}; {_distance(answers.restored)}"]
    if answers.ordinary is not None:
        same = "bit for bit the same" if answers.ordinary.identical else _distance(answers.ordinary)
        lines.append(f"ordinary answers against naive ones: {same}")
    if answers.program is not None:
        same = "bit for bit the same" if answers.program.identical else _distance(answers.program)
        lines.append(f"the program's answers against naive ones: {same}")
    return lines if answers.repeats_equal else [*lines, "repeated answers of one process were not all equal"]


def _distance(agreement: Agreement) -> str:
    if agreement.difference:
        return f"different at {agreement.difference}"
    cosine = "" if agreement.lowest_cosine is None else f", lowest cosine {agreement.lowest_cosine:.9f}"
    return f"largest difference {agreement.largest_difference:.2e}{cosine}"


def _byte_lines(summary: ScenarioSummary) -> list[str]:
    lines = []
    raw, stored = summary.bytes.get("raw", 0), summary.bytes.get("stored", 0)
    if raw:
        fetched = summary.bytes.get("fetched", 0)
        lines.append(
            f"{summary.scenario}: {raw:,} bytes of state, {stored:,} stored ({stored / raw:.2f}), {fetched:,} fetched"
        )
    for capture in summary.captures:
        what = f"program ({capture['program']})" if capture.get("program") else "snapshot"
        written, seconds = capture.get("written_bytes", 0), capture.get("seconds", 0.0)
        lines.append(f"{summary.scenario}: {what} made in {seconds:.2f} s after the answer, {written:,} bytes written")
    return lines
