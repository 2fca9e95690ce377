"""One start as text: what it was, its phases and spans as bars to scale, and what became of its snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

WIDTH = 40


def report(document: Mapping[str, Any]) -> str:
    """Describe what ``coldstart run`` did, from its own JSON document."""
    start = document["start"]
    lines = [_headline(start, document["first_answer_seconds"]), *_bars(start, document["first_answer_seconds"])]
    lines += [f"  skipped {phase['name']}: {phase['skipped']}" for phase in start["phases"] if phase["skipped"]]
    if start["bytes"]["raw"]:
        lines.append(f"  restored {_size(start['bytes']['raw'])} from {_size(start['bytes']['stored'])} stored")
    if document["warm_seconds"]:
        warm = sorted(document["warm_seconds"])
        lines.append(f"  warm: median {1000 * warm[len(warm) // 2]:.3f} ms of {len(warm)}")
    if kernels := _kernels(start.get("kernel_caches") or {}):
        lines.append(f"  {kernels}")
    if start.get("program_obstacle"):
        lines.append(f"  without a program: {start['program_obstacle']}")
    lines += map(_capture, document.get("captures") or [document["capture"]])
    return "\n".join(line for line in lines if line)


def _headline(start: Mapping[str, Any], answered_seconds: float) -> str:
    program = f", program {start['program']}" if start.get("program") else ""
    kind = start["kind"] + (f" (generation {start['generation']}{program})" if start["generation"] else "")
    reason = f": {start['reason']}" if start["reason"] else ""
    recovered = f", recovered by {start['recovered_by']}" if start["recovered_by"] not in ("none", "") else ""
    return f"{start['name']} {kind}{recovered}{reason}; first answer {answered_seconds:.3f} s after the process began"


def _bars(start: Mapping[str, Any], answered_seconds: float) -> list[str]:
    rows = [
        (item.get("track", "phase"), item["name"], item["began_seconds"], item["ended_seconds"])
        for item in (*start["phases"], *start["spans"])
        if not item.get("skipped")
    ]
    rows.sort(key=lambda row: (row[2], -row[3]))
    end = max([answered_seconds, *(row[3] for row in rows)])
    label_width = max((len(f"{track}: {name}") for track, name, _, _ in rows), default=0)
    return [
        f"  {f'{track}: {name}':{label_width}}  |{_bar(began, ended, end)}| {ended - began:8.3f} s"
        for track, name, began, ended in rows
    ]


def _bar(began: float, ended: float, end: float) -> str:
    first = min(WIDTH - 1, max(0, round(WIDTH * began / end)))
    last = min(WIDTH, max(first + 1, round(WIDTH * ended / end)))
    return " " * first + "#" * (last - first) + " " * (WIDTH - last)


def _capture(capture: Mapping[str, Any]) -> str:
    what = f"program ({capture['program']})" if capture.get("program") else "snapshot"
    if capture["published"]:
        return (
            f"  {what}: generation {capture['generation']} published in {capture['seconds']:.2f} s,"
            f" {_size(capture['stored_bytes'])} stored of {_size(capture['raw_bytes'])},"
            f" {_size(capture['written_bytes'])} written; the next start restores it"
            + (f"\n  note: {capture['reason']}" if capture.get("reason") else "")
        )
    return (
        f"  no {'program' if capture.get('program') else 'snapshot'} was made: {capture['reason']}"
        if capture["reason"]
        else ""
    )


def _kernels(use: Mapping[str, Any]) -> str:
    """Whether compiled kernels came with the snapshot; nothing of a start that compiled none and was to have none."""
    told = []
    if use.get("restored_files"):
        told.append(f"{use['restored_files']} files, {_size(use['restored_bytes'])}, restored")
    if use.get("new_files"):
        told.append(f"{use['new_files']} files compiled anew")
    if told and use.get("obstacle"):
        told.append(use["obstacle"])
    return f"kernel caches: {', '.join(told)}" if told else ""


def _size(size_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} bytes"
