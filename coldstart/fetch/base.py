"""What every fetch engine takes and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from coldstart.devices.base import Arena
    from coldstart.manifest import Manifest
    from coldstart.stores.base import Store


class FetchRequest(NamedTuple):
    """Fill ``arena`` with all chunks of ``manifest`` from ``store``.

    ``verify_raw`` also hashes what decoding gave, as a proof does; a start relies on the hash of the stored bytes.
    """

    manifest: Manifest
    store: Store
    arena: Arena
    threads: int
    budget_bytes: int
    verify_raw: bool = False


class FetchReport(NamedTuple):
    """What a finished fetch did.

    ``fetched_bytes`` counts every chunk once as it is stored, also where two share a blob. ``retried_chunks`` were
    corrupt on the first read and right on the second.
    """

    engine: str
    fetched_bytes: int
    retried_chunks: int
    began_monotonic_seconds: float
    ended_monotonic_seconds: float


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
