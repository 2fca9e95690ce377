"""The start record: what one start of a worker was like, as plain JSON. Written once a start, read by people and ``bench``."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from coldstart.metrics import process_start_seconds
from coldstart.planning import versions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.definition import Definition
    from coldstart.metrics import Timeline
    from coldstart.parts import Part, Parts
    from coldstart.warmup import PhaseRecord, WarmupReport

RECORD_FORMAT = 1


def start_record(
    definition: Definition, parts: Parts, phases: Sequence[PhaseRecord], timeline: Timeline, report: WarmupReport
) -> dict[str, Any]:
    """Describe a start that has just become ready. Times are seconds since the process began, sizes bytes."""
    start = process_start_seconds()
    info = parts.device.info()
    return {
        "format": RECORD_FORMAT,
        "name": definition.name,
        "kind": parts.kind,
        "reason": parts.reason,
        "recovered_by": _first(part.restored.recovered_by for part in parts.parts if part.restored),
        "rung": _first(
            part.restored.manifest.rung for part in parts.parts if part.restored and part.kind == "restored"
        ),
        "generation": max((_generation(part) for part in parts.parts), default=0),
        "key": parts.key_digest,
        "process_start_source": start.source,
        "process_start_resolution_seconds": start.resolution_seconds,
        "process_start_unix_seconds": round(time.time() - start.age_seconds, 3),
        "ready_seconds": _rounded(timeline.clock()),
        "phases": [
            {
                **phase._asdict(),
                "began_seconds": _rounded(phase.began_seconds),
                "ended_seconds": _rounded(phase.ended_seconds),
            }
            for phase in phases
        ],
        "spans": [
            {
                **span._asdict(),
                "began_seconds": _rounded(span.began_seconds),
                "ended_seconds": _rounded(span.ended_seconds),
            }
            for span in timeline.spans()
        ],
        "bytes": _bytes(parts.parts),
        "warmup": {"iterations": report.iterations, "memory_bytes": report.memory_bytes},
        "device": info._asdict(),
        "versions": versions(),
        "pid": os.getpid(),
    }


def _bytes(parts: Sequence[Part]) -> dict[str, int]:
    restored = [part.restored for part in parts if part.restored]
    return {
        "raw": sum(item.manifest.raw_bytes for item in restored),
        "stored": sum(item.manifest.stored_bytes for item in restored),
        "fetched": sum(item.report.fetched_bytes for item in restored),
    }


def _generation(part: Part) -> int:
    return part.restored.manifest.generation if part.restored and part.kind == "restored" else 0


def _first(values: Any) -> str:
    """The first value that is not "none", or that, or ""."""
    found = list(values)
    return next((value for value in found if value != "none"), found[0] if found else "none")


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
