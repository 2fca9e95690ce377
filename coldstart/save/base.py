"""What every way of saving takes and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from coldstart.fetch.base import Address
    from coldstart.manifest import Chunk
    from coldstart.repository import Repository

AUTO, PROCESS, THREADS = ENGINES = ("auto", "process", "threads")
"""The words of a fetch (``fetch.ENGINES``) too; of all threads of this process it is the one that captures that saves."""

STOPPED = "the worker ended while its state was captured; the previous generation stays"


class Saving(NamedTuple):
    """How chunks are saved. ``budget_bytes``: memory beyond the state; ``bytes_per_second`` of upload, 0 for any.

    ``address`` is the store's, if another process can open it too.
    """

    engine: str
    address: Address | None
    budget_bytes: int
    bytes_per_second: int


IN_THREAD = Saving(THREADS, None, 256 << 20, 0)
"""Chunk by chunk in the thread that captures, as fast as the store takes them."""


class Terms(NamedTuple):
    """What holds for all chunks of a generation.

    ``known``: the parent's chunks, see ``plan.known_chunks``, and ``known_stays`` whether their blobs live as long as this
    capture does; ``relies_on_stored``: a blob that is stored already need not be written. ``raw_bytes`` are those of all
    chunks, ``largest_bytes`` of the largest. Chunks of ``device_segments`` are encoded for a GPU to decode.
    """

    codec: str
    level: int
    known: Mapping[tuple[str, int, int], Chunk]
    known_stays: bool
    relies_on_stored: bool
    raw_bytes: int
    largest_bytes: int
    device_segments: tuple[int, ...] = ()


class StoredAs(NamedTuple):
    """A codec's id, and the parameters that decoding needs."""

    codec: str
    parameters: Mapping[str, int | str]


class Task(NamedTuple):
    """A chunk to be saved.

    ``pieces`` gives its bytes as they are at that moment: views of live memory and padding, end to end. ``settled``: they
    are looked at again when all is saved, so a torn copy will be noticed then; else it has to be noticed now. A view may be
    good only until ``pieces`` is called again, for this task or another. ``raw_hash`` gives the hash of the bytes as they are
    now where somebody can tell it without a copy: the device that they are on. ``stored_as``: the bytes are encoded already,
    and are stored as they are.
    """

    segment: int
    item_bytes: int
    length_bytes: int
    settled: bool
    pieces: Callable[[], Iterator[memoryview]]
    raw_hash: Callable[[], str] | None = None
    stored_as: StoredAs | None = None


class Saved(NamedTuple):
    """How a chunk is stored. ``is_written``: it was not there before, or could not be relied on.

    ``raw_hash`` is "" where it came encoded. ``is_settled``: no collector had decided to delete it before it was written, or
    found; see ``Repository.is_settled``.
    """

    raw_hash: str
    codec: str
    parameters: Mapping[str, int | str]
    blob: str
    stored_bytes: int
    is_written: bool
    is_settled: bool = True


def reused(task: Task, terms: Terms) -> Saved | None:
    """What there is to say of a chunk that the parent has and that is known to be one of its without a copy: no byte is moved.

    Only where the parent's blobs are sure to stay; else they have to be asked for (``Stage.reused``).
    """
    if task.raw_hash is None or not terms.known_stays:
        return None
    raw_hash = task.raw_hash()
    known = terms.known.get((raw_hash, task.item_bytes, task.length_bytes))
    if known is None:
        return None
    return Saved(raw_hash, known.codec, known.parameters, known.blob, known.stored_bytes, is_written=False)


class Saver(ABC):
    """Saves the chunks of one generation. Used by one thread; ``stop`` and ``end`` may be called by another."""

    @property
    @abstractmethod
    def engine(self) -> str:
        """Who did the work, and why if another was wanted."""

    @property
    @abstractmethod
    def repository(self) -> Repository:
        """The snapshots of the store, to be written through whoever saves."""

    @property
    def group(self) -> int:
        """The process group that does the work, 0 if it is this one."""
        return 0

    @abstractmethod
    def save(self, tasks: Iterable[Task]) -> list[Saved]:
        """Save all chunks, in order of the tasks, which are taken one after another as there is room for them.

        Raises StateChangedError for a torn copy, CaptureError once stopped, StoreError, CodecError, and what ``tasks`` does.
        """

    @abstractmethod
    def hashes(self, tasks: Iterable[Task]) -> list[str]:
        """The raw hashes of all chunks as they are now, in order of the tasks. Raises CaptureError once stopped."""

    @abstractmethod
    def stop(self) -> None:
        """Begin nothing further; chunks under way go on. Whoever waits for them is told."""

    @abstractmethod
    def end(self, seconds: float = 0.0) -> None:
        """Give what is under way ``seconds``, then leave nothing behind. Safe to call twice."""
