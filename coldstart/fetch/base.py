"""What every fetch engine takes and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple, Protocol

from coldstart.stores.base import Tally

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.fetch.ring import Ring
    from coldstart.manifest import Manifest
    from coldstart.stores import StoreOptions
    from coldstart.stores.base import Store


PROGRESS_SECONDS = 0.5
"""How often a fetch says how far it is."""


class Address(NamedTuple):
    """Where ``open_store`` opens a store: enough for another process to open it too."""

    url: str
    options: StoreOptions


class RingWay(NamedTuple):
    """How chunks reach a device with memory of its own: a ring of so many bytes, and codecs that the device decodes."""

    ring_bytes: int
    device_codecs: tuple[str, ...]


class Fillable(Protocol):
    """What a fetch needs of an arena."""

    def place(self, segment: int, offset_bytes: int, data: memoryview) -> None:
        """Put ``data`` into the segment."""


class FetchRequest(NamedTuple):
    """Fill ``arena`` with all chunks of ``manifest`` from ``store``; None where the chunks go to a ``ring``.

    ``threads``: reads at a time at most. ``verify_raw`` also hashes what decoding gave, as a proof does; a start relies
    on the hash of the stored bytes. ``address`` is the store's, if it has one: without it only this process can read the
    store. ``progress`` is called, in any thread, with the stored bytes that are in place so far, at most every
    PROGRESS_SECONDS; it must not raise. ``processes``: how many fetcher processes may share the work, with the bounds of
    ``threads`` and ``budget_bytes`` for all of them together. ``next_chunk`` gives the index of a chunk that nobody else
    fetches, None at the end; without it all chunks are this fetch's, in ``plan.fetch_order``.

    With a ``ring`` chunks are handed over there, to who puts them into the arena (``landing``): as they are stored where
    their codec is ``raw`` or one of ``device_codecs``, which the device decodes, else decoded. What is handed over as it is
    stored is not hashed once more with ``verify_raw``: that is for who decodes it. ``manifest.forms`` are what its chunks are
    stored as besides (``plan.in_forms``): read where a chunk cannot be had as it is, and by a proof.
    """

    manifest: Manifest
    store: Store
    arena: Fillable | None
    threads: int
    budget_bytes: int
    verify_raw: bool = False
    address: Address | None = None
    progress: Callable[[int], None] | None = None
    processes: int = 1
    next_chunk: Callable[[], int | None] | None = None
    ring: Ring | None = None
    device_codecs: tuple[str, ...] = ()


class FetchReport(NamedTuple):
    """What a finished fetch did.

    ``fetched_bytes`` counts every chunk once as it is stored, also where two share a blob. ``retried_chunks`` were
    corrupt on the first read and right on the second. ``engine``: which one, and why if another was wanted. ``reads``:
    how many were under way at once in the end.
    """

    engine: str
    fetched_bytes: int
    retried_chunks: int
    began_monotonic_seconds: float
    ended_monotonic_seconds: float
    reads: int = 0
    degraded: tuple[str, ...] = ()
    """What had to be given up: by a store opened for this fetch, such as its local cache, and forms of chunks."""
    tally: Tally = Tally()
    """What stores that other processes opened for this fetch have got over."""


class Fetch(ABC):
    """A fetch under way."""

    @abstractmethod
    def wait(self) -> FetchReport:
        """Wait until every chunk is in place, verified. Raises BlobCorruptError, CodecError, StoreError.

        After ``cancel`` it raises SnapshotError, whatever had been fetched by then.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Begin no further chunk; the arena is not used."""
