"""coldstart: a verified restore of a snapshot to torch tensors, by the engine that COLDSTART_FETCH_ENGINE names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.restoring.reading import Reading, Task, run

if TYPE_CHECKING:
    from collections.abc import Callable


def prepare(task: Task) -> Callable[[], Reading]:
    """Import torch and coldstart, and work out the key."""
    import torch  # noqa: F401  what the tensors are made of

    from benchmarks.restoring import ours

    snapshot = ours.snapshot_of(f"{task.folder}/handler.py")

    def read() -> Reading:
        tensors, report = ours.restore(snapshot)
        fetch_seconds = report.ended_monotonic_seconds - report.began_monotonic_seconds
        details = {"engine": report.engine, "fetched_bytes": report.fetched_bytes, "fetch_seconds": fetch_seconds}
        return Reading(tensors, details)

    return read


if __name__ == "__main__":
    run(prepare)
