"""Saving in the thread that captures: for stores of this process, platforms without processes to spare, and small states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.errors import CaptureError, StateChangedError
from coldstart.save.base import STOPPED, THREADS, Saver, reused
from coldstart.save.stage import Rate, Stage, hash_of

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable

    from coldstart.repository import Repository
    from coldstart.save.base import Saved, Task, Terms


def save_here(
    repository: Repository, terms: Terms, bytes_per_second: int, stopping: threading.Event, *, reason: str = ""
) -> Saver:
    """A saver that does one chunk after another. ``reason``: why nobody else does, where that was wanted."""
    stage = Stage(repository, terms, Rate(bytes_per_second, stopping))
    return _Here(repository, terms, stage, stopping, f"{THREADS} ({reason})" if reason else THREADS)


class _Here(Saver):
    def __init__(
        self, repository: Repository, terms: Terms, stage: Stage, stopping: threading.Event, engine: str
    ) -> None:
        self._repository = repository
        self._terms = terms
        self._stage = stage
        self._stopping = stopping
        self._engine = engine

    @property
    def engine(self) -> str:
        return self._engine

    @property
    def repository(self) -> Repository:
        return self._repository

    def save(self, tasks: Iterable[Task]) -> list[Saved]:
        return [self._save(task) for task in tasks]

    def hashes(self, tasks: Iterable[Task]) -> list[str]:
        return [self._hash(task) for task in tasks]

    def _hash(self, task: Task) -> str:
        self._check_stopped()
        return task.raw_hash() if task.raw_hash is not None else hash_of(gathered(task))

    def stop(self) -> None:
        pass  # `stopping` is looked at before every chunk

    def end(self, seconds: float = 0.0) -> None:
        pass

    def _save(self, task: Task) -> Saved:
        """The hash is of live memory, and what is encoded and sent is a copy that must have the same."""
        self._check_stopped()
        if task.stored_as is not None:
            return self._stage.kept(gathered(task), task.stored_as)
        unmoved = reused(task, self._terms)
        if unmoved is not None:
            return unmoved
        live = gathered(task)
        raw_hash = hash_of(live)
        found = self._stage.reused(raw_hash, task.item_bytes, task.length_bytes)
        if found is not None:
            return found
        raw = _copied(live)
        if hash_of(raw) != raw_hash:
            raise StateChangedError("bytes of the state changed while they were copied")
        codec = self._stage.codec_of(task.segment, task.item_bytes, raw)
        return self._stage.stored(raw, raw_hash, task.segment, task.item_bytes, codec)

    def _check_stopped(self) -> None:
        if self._stopping.is_set():
            raise CaptureError(STOPPED)


def gathered(task: Task) -> memoryview:
    """The bytes of a chunk: a view of live memory where one piece is all of it, else a copy."""
    pieces = list(task.pieces())
    return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))


def _copied(live: memoryview) -> memoryview:
    """By numpy, which lets other threads of the interpreter go on meanwhile."""
    import numpy as np

    return np.array(np.frombuffer(live, np.uint8)).data
