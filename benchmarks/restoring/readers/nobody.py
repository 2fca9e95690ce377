"""Nobody fetches: the import of torch alone, to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.restoring.reading import Reading, Task, run

if TYPE_CHECKING:
    from collections.abc import Callable


def prepare(task: Task) -> Callable[[], Reading]:
    """Import what the others have imported by then."""
    from benchmarks.restoring import ours
    from benchmarks.restoring.readers.engines import import_seconds

    ours.snapshot_of(f"{task.folder}/handler.py")
    return lambda: Reading({}, {"import_seconds": import_seconds()}, reads=False)


if __name__ == "__main__":
    run(prepare)
