"""What every fetch engine takes and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from coldstart.manifest import Manifest
    from coldstart.stores import StoreOptions
    from coldstart.stores.base import Store


class Address(NamedTuple):
    """Where ``open_store`` opens a store: enough for another process to open it too."""

    url: str
    options: StoreOptions


class Fillable(Protocol):
    """What a fetch needs of an arena."""

    def writable(self, segment: int) -> memoryview:
        """The segment's memory, to be filled."""


class FetchRequest(NamedTuple):
    """Fill ``arena`` with all chunks of ``manifest`` from ``store``.

    ``verify_raw`` also hashes what decoding gave, as a proof does; a start relies on the hash of the stored bytes.
    ``address`` is the store's, if it has one: without it only this process can read the store.
    """

    manifest: Manifest
    store: Store
    arena: Fillable
    threads: int
    budget_bytes: int
    verify_raw: bool = False
    address: Address | None = None


class FetchReport(NamedTuple):
    """What a finished fetch did.

    ``fetched_bytes`` counts every chunk once as it is stored, also where two share a blob. ``retried_chunks`` were
    corrupt on the first read and right on the second. ``engine``: which one, and why if another was wanted.
    """

    engine: str
    fetched_bytes: int
    retried_chunks: int
    began_monotonic_seconds: float
    ended_monotonic_seconds: float
    degraded: tuple[str, ...] = ()
    """What a store opened for this fetch had to give up, such as its local cache."""


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
