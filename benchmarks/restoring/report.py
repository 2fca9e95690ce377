"""The document of a run as Markdown."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.restoring import summary
from benchmarks.restoring.contenders import LIMIT, OURS, OURS_PLANES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_OF_CONTENDERS = (
    "`s`: from the reader's imports (of torch, where it makes tensors) being done until all tensors are usable. `s "
    "until touched`: and until a byte of every page has been looked at, for memory maps put work off. `processor s`: "
    "user and system, children included, the server not. coldstart, and tensorizer with `verify_hash`, check every "
    "byte; nobody else does."
)
_OF_START = (
    "`coldstart run` of a handler that imports torch, restores planes+zstd and answers, against the same restore in a"
    " process that has imported everything before."
)
_OF_MEMORY = (
    "Looked at every 5 ms from outside, in readings of their own: proportional shares of private and file-backed "
    "pages (`Pss_Anon`, `Pss_File`) of the reader and its children, and memory files once. Over it: the most, less "
    "what the process held after its imports, less the state. A file that a reader wrote counts as far as it is "
    "mapped and was touched, so where safetensors maps a file the number is below zero: those bytes are in the page "
    "cache."
)


def to_markdown(document: Mapping[str, Any], *, plot: str = "") -> str:
    """All tables that the document has. ``plot``: the file name of the picture, beside the report."""
    parts = [
        ["# Restore of a bf16 model from an object store", "", f"Machine: {document['machine']['text']}.", ""],
        [_how(document), ""],
        ["## Goals", "", *_goals(document), ""],
        *([[f"![wall time and what it is spent on]({plot})", ""]] if plot else []),
        _contenders(document),
        _links(document),
        _start(document),
        _engines(document),
        _memory(document),
        _left_out(document),
    ]
    return "\n".join(line for part in parts for line in part)


def _how(document: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    whole = f"{document['size_bytes'] / summary.MIB:,.0f} MiB, {document['tensors']} tensors of bf16"
    return (
        f"Model: {whole}, normally distributed. "
        "Server: nginx on the same machine, so on the same cores. Every reading is a fresh process, one at a time, the order "
        "turned around every round, round 0 (not over links) not counted; medians, and ratios as medians of the rounds' "
        "own. Every tensor of every reading was compared with the model's by hash: "
        f"{document['wrong']} were wrong. Versions: {versions}."
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(each)} |" for each in (head, ["---"] * len(head), *lines)]


def _rounds(trials: Mapping[str, Sequence[Any]]) -> int:
    return len(next(iter(trials.values())))


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _goals(document: Mapping[str, Any]) -> list[str]:
    lines = [
        [goal.what, goal.goal, _number(goal.value) or goal.why, "yes" if goal.met else "**no**"]
        for goal in summary.goals(document)
    ]
    return _table(("what", "goal", "reached", "met"), lines)


def _contenders(document: Mapping[str, Any]) -> list[str]:
    trials = document.get("contenders")
    if not trials:
        return []
    head = ("reader", "s", "GB/s", "of the limit", "s from spawn", "s until touched", "processor s", "MiB over state")
    lines = [
        [
            row.name,
            _number(row.seconds, 3),
            _number(row.gigabytes_per_second),
            _number(row.of_limit),
            _number(row.spawn_seconds),
            _number(row.touched_seconds, 3),
            _number(row.processor_seconds),
            _number(row.over_mib, 0),
        ]
        for row in summary.rows(trials, document["size_bytes"], summary.memory_of(document))
    ]
    tried = ", ".join(f"{count}: {_number(seconds, 3)}" for count, seconds in document["limit_tried"].items())
    return [
        "## Plain loopback",
        "",
        *_table(head, lines),
        "",
        (
            f"Rounds: {_rounds(trials)}. {_OF_CONTENDERS} The limit has {document['limit_connections']} connections, the"
            f" fastest here (s by number: {tried})."
        ),
        "",
    ]


def _links(document: Mapping[str, Any]) -> list[str]:
    links = document.get("links")
    if not links:
        return []
    part = document["stored"]["planes"] / document["size_bytes"]
    lines = []
    for link in links:
        measured = document["size_bytes"] / 1e6 / median(each["seconds"] for each in link["trials"][LIMIT])
        times = [_number(summary.link_times(link, name)) for name in (OURS, OURS_PLANES)]
        lines.append([f"{link['megabytes_per_second']:g}", _number(measured, 1), *times])
    return [
        "## Links",
        "",
        *_table(("link MB/s", "bare sockets MB/s", "raw: times the link", "planes+zstd: times the link"), lines),
        "",
        (
            f"Rounds: {_rounds(links[0]['trials'])}. Raw bytes restored a second over what bare sockets got from the same"
            " link in the same round. planes+zstd stores"
            f" {part:.3f} of the raw bytes, so {1 / part:.2f} is the most that there is to reach."
        ),
        "",
    ]


def _start(document: Mapping[str, Any]) -> list[str]:
    start = document.get("start")
    if not start:
        return []
    head = ("link MB/s", "start s, spawn to answer", "fetch alone s", "import of the handler s", "start / fetch alone")
    cells = [median(start[field]) for field in ("start_seconds", "fetch_seconds", "import_seconds")]
    line = [f"{start['megabytes_per_second']:g}", *map(_number, cells), _number(summary.start_times(start))]
    return [
        "## A start bound by the fetch",
        "",
        *_table(head, [line]),
        "",
        f"Rounds: {len(start['start_seconds'])}. {_OF_START}",
        "",
    ]


def _engines(document: Mapping[str, Any]) -> list[str]:
    engines = document.get("engines")
    if not engines:
        return []
    head = ("who fetches", "endpoint", "fetch alone s", "fetch beside the import s", "import s", "both, wall s")
    lines = [[row.name, row.endpoint, *map(_number, row[2:])] for row in summary.engine_rows(engines)]
    bare = median(each["details"]["import_seconds"] for each in document["import_alone"])
    return [
        "## Engines, beside a real `import torch`",
        "",
        *_table(head, lines),
        "",
        (
            f"Rounds: {_rounds(engines)}. Raw chunks, verified. `import torch` alone: {_number(bare)} s. obstore: in the"
            " place of coldstart's own client."
        ),
        "",
    ]


def _memory(document: Mapping[str, Any]) -> list[str]:
    if not document.get("memory"):
        return []
    lines = [
        [
            name,
            f"{each['size_bytes'] / summary.MIB:,.0f}",
            _number(summary.over_state_mib(trial, each["size_bytes"]), 0),
            _number(trial["memory_bytes"] / summary.MIB, 0),
            _number(trial["before_bytes"] / summary.MIB, 0),
        ]
        for each in document["memory"]
        for name, trial in each["trials"].items()
    ]
    return [
        "## Memory",
        "",
        *_table(("reader", "state MiB", "over it MiB", "most MiB", "after imports MiB"), lines),
        "",
        _OF_MEMORY,
        "",
    ]


def _left_out(document: Mapping[str, Any]) -> list[str]:
    left_out = document.get("left_out", {})
    return ["## Left out", "", *(f"- {what}: {why}" for what, why in left_out.items()), ""] if left_out else []
