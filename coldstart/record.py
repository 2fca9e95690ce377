"""The start record: what one start of a worker was like, as plain JSON. Written once a start, read by people and ``bench``."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.config import worker_id
from coldstart.metrics import ProcessStart, process_start_seconds
from coldstart.planning import versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.definition import Definition
    from coldstart.metrics import Span, Timeline
    from coldstart.part import Part
    from coldstart.parts import Parts
    from coldstart.warmup import PhaseRecord, WarmupReport

RECORD_FORMAT = 1


class Thaw(NamedTuple):
    """A freeze of the process by its platform: the start kind that it makes, and what was there before it.

    ``before``: the record of the start that was ready then, {} if it was not; ``spans``: what was on the timeline.
    """

    kind: str
    reason: str
    before: Mapping[str, Any]
    spans: tuple[Span, ...]


def start_record(
    definition: Definition,
    parts: Parts,
    phases: Sequence[PhaseRecord],
    timeline: Timeline,
    report: WarmupReport,
    thaw: Thaw | None = None,
) -> dict[str, Any]:
    """Describe a start that has just become ready. Times are seconds since the process began, sizes bytes.

    Where the platform let a frozen process go on, they are seconds since then; ``amortised`` has what lay before, which the
    platform's snapshot pays for once, and ``own_kind`` what the start was without the platform.
    """
    start = ProcessStart(timeline.clock(), 0.0, "platform") if thaw else process_start_seconds()
    info = parts.device.known()
    return {
        "format": RECORD_FORMAT,
        "name": definition.name,
        "kind": thaw.kind if thaw else parts.kind,
        "own_kind": parts.kind,
        "reason": parts.reason or (thaw.reason if thaw else ""),
        "recovered_by": _first(part.restored.recovered_by for part in parts.parts if part.restored),
        "recovery": _recovery(parts),
        "rung": _first(
            part.restored.manifest.rung for part in parts.parts if part.restored and part.kind == "restored"
        ),
        "program": next((part.program.backend for part in parts.parts if part.program), ""),
        "program_obstacle": "; ".join(part.program_obstacle for part in parts.parts if part.program_obstacle),
        "generation": max((_generation(part) for part in parts.parts), default=0),
        "key": parts.key_digest,
        "process_start_source": start.source,
        "process_start_resolution_seconds": start.resolution_seconds,
        "process_start_unix_seconds": round(time.time() - start.age_seconds, 3),
        "ready_seconds": _rounded(timeline.clock()),
        "phases": _stretches(phases),
        "spans": _stretches(timeline.spans()),
        "amortised": _amortised(thaw),
        "bytes": _bytes(parts.parts),
        "engines": sorted({part.restored.report.engine for part in parts.parts if part.restored}),
        "kernel_caches": parts.kernels._asdict(),
        "warmup": {"iterations": report.iterations, "memory_bytes": report.memory_bytes},
        "device": info._asdict(),
        "versions": versions(),
        "pid": os.getpid(),
        "worker": worker_id(),
    }


def thawed_record(record: Mapping[str, Any], thaw: Thaw, timeline: Timeline) -> dict[str, Any]:
    """The record of a ready worker that its platform froze and let go on: nothing was fetched and no phase ran again."""
    return {
        **record,
        "kind": thaw.kind,
        "reason": thaw.reason,
        "process_start_source": "platform",
        "process_start_resolution_seconds": 0.0,
        "process_start_unix_seconds": round(time.time() - timeline.clock(), 3),
        "ready_seconds": _rounded(timeline.clock()),
        "phases": [],
        "spans": _stretches(timeline.spans()),
        "amortised": _amortised(thaw),
        "bytes": dict.fromkeys(record["bytes"], 0),
    }


def _amortised(thaw: Thaw | None) -> dict[str, Any] | None:
    """What lay before a freeze: phases that had run, spans, why it was no plain restore, the seconds until it was ready."""
    if thaw is None:
        return None
    return {
        "phases": thaw.before.get("phases", []),
        "spans": thaw.before.get("spans") or _stretches(thaw.spans),
        "ready_seconds": thaw.before.get("ready_seconds"),
        "reason": thaw.before.get("reason", ""),
    }


def _stretches(timed: Sequence[Span | PhaseRecord]) -> list[dict[str, Any]]:
    return [
        {
            **each._asdict(),
            "began_seconds": _rounded(each.began_seconds),
            "ended_seconds": _rounded(each.ended_seconds),
        }
        for each in timed
    ]


def _bytes(parts: Sequence[Part]) -> dict[str, int]:
    restored = [part.restored for part in parts if part.restored]
    return {
        "raw": sum(item.manifest.raw_bytes for item in restored),
        "stored": sum(item.manifest.stored_bytes for item in restored),
        "fetched": sum(item.report.fetched_bytes for item in restored),
    }


def _recovery(parts: Parts) -> dict[str, Any]:
    """What this start got over, and what is left to be mended.

    ``failed_generations`` were tried in vain; ``pending`` lists their manifests, which ``coldstart snapshot verify`` looks
    into, and counts the writes that replicas lack.
    """
    restored = [part.restored for part in parts.parts if part.restored]
    failed = [key for part in parts.parts if part.restoration for key in part.restoration.failed]
    tally = sum((item.report.tally for item in restored), parts.open_repository.tally)
    return {
        "mode": parts.recovery,
        "failed_generations": len(failed),
        "retried_requests": tally.retried_requests,
        "retried_chunks": sum(item.report.retried_chunks for item in restored),
        "replica_reads": tally.replica_reads,
        "pending": {"generations": failed, "replica_writes": tally.behind},
    }


def _generation(part: Part) -> int:
    return part.restored.manifest.generation if part.restored and part.kind == "restored" else 0


def _first(values: Any) -> str:
    """The first value that is not "none", or that, or ""."""
    found = list(values)
    return next((value for value in found if value != "none"), found[0] if found else "none")


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
