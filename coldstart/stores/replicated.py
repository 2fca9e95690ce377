"""A store and its replicas: one is written first and decides, all are written, and the first that can answers a read.

**Who decides.** The first store is the primary. Every condition (create-if-absent, compare-and-swap) is the primary's
alone, and so are listings and what is current: a ref is read from a replica only where the primary does not answer. No
replica becomes the primary by itself, because two workers could disagree about it; a person changes ``COLDSTART_STORE``.

**Writes** go to the primary, then to every replica. A blob or a manifest that fewer than ``copies`` stores have taken is
an error, so no ref ever names a generation that is not whole in as many. A ref, which is written last, is moved once the
primary has moved it: a replica that missed it stays a generation behind, which is whole there, and ``degraded`` is told.
Where two writers follow each other closely, each looks at the primary again after it has written a replica, until the two
agree, so that the later ref is what stays. Start records, leases and probes are the primary's alone.

**A failed replica** is not asked again for ``REST_SECONDS``, except by reads that nobody else can answer. Writes that it
missed are counted (``tally.behind``) and are not repeated by themselves: ``coldstart snapshot verify --repair`` copies
what it lacks.

**Reads** are answered by the first store that is not resting. What it lacks, or cannot give, the next is asked for: blobs
and manifests, that is, whose bytes are the same everywhere. An object that can change and that the primary calls missing
is missing. A blob's reader hashes it anyway and reads again what was wrong (``Store.read_into``): from the second read of
a blob on, each store's answer is hashed here too, and the next store is asked if it is wrong.

**Heads** of blobs are for writers who would leave out what is stored already and young: a blob is as old as its oldest copy,
and as old as time where fewer stores have it than a generation needs, so it is written again.

**Deletions** go to all, and fail if one failed: whoever deletes is told what is still stored, and may do it again. Each store
is whole by itself, so each can be collected by itself.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from coldstart.errors import BlobCorruptError, ObjectMissingError, StoreError, StoreTransientError
from coldstart.stores.base import ObjectInfo, Store, StoredObject, StoreWrapper, Tally, check_key
from coldstart.stores.retrying import Clock, SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coldstart.stores.base import Capabilities
    from coldstart.stores.cache_folder import CacheFolder

_Result = TypeVar("_Result")

REST_SECONDS = 30.0
"""How long a store that failed is asked last, and is not written to."""

_BLOB = re.compile(r"blobs/([0-9a-f]{2})/(\1[0-9a-f]{62})\Z")
_IMMUTABLE = ("blobs/", "manifests/")
_PRIMARY_ALONE = ("starts/", "leases/", "probes/")
_ROUNDS = 5
"""How often a replica's copy of a changing object is compared with the primary's, at most."""
_FOREIGN = "replica:"
"""Begins the etag of what a replica answered for an object that can change: the primary would not know it."""


class Member(NamedTuple):
    """One of the stores, as it is read and as it is written: a reader may be less patient."""

    reading: Store
    writing: Store


class ReplicatedStore(StoreWrapper):
    """``members``, the primary first. ``copies``: how many must hold a blob or a manifest before it counts as written.

    ``reads_replicas`` False: they are written alone. ``degraded`` is told, in any thread, once for each store, why it is
    passed over. Closing it closes all.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        copies: int = 2,
        reads_replicas: bool = True,
        degraded: Callable[[str], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(members[0].writing)
        self._members = tuple(members)
        self._copies = min(copies, len(members))
        self._reads_replicas = reads_replicas
        self._degraded = degraded
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._rests_until: dict[int, float] = {}
        self._told: set[tuple[int, type[Exception]]] = set()
        self._asked: set[str] = set()
        self._replica_reads = self._behind = 0
        # Where the primary is a folder, its decoded segments are this host's to map.
        self.flat_files: Callable[[], CacheFolder | None] | None = getattr(self._store, "flat_files", None)

    @property
    def stores(self) -> tuple[Store, ...]:
        """All stores as they are written, the primary first: to look at each by itself."""
        return tuple(member.writing for member in self._members)

    @property
    def capabilities(self) -> Capabilities:
        """The primary's."""
        return self._store.capabilities

    @property
    def tally(self) -> Tally:
        """Of all stores, with what replicas answered and missed."""
        each = {id(store): store for member in self._members for store in member}
        total = Tally(replica_reads=self._replica_reads, behind=self._behind)
        for store in each.values():
            total += store.tally
        return total

    # --- reading -----------------------------------------------------------------------------------------------------

    def get(self, key: str) -> StoredObject:
        """As the first store that can answer."""
        number, stored = self._first(key, lambda store: store.get(key))
        if number and not key.startswith(_IMMUTABLE):
            return stored._replace(etag=f"{_FOREIGN}{stored.etag}")
        return stored

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """As the first store that can answer; a blob that is read again is hashed, and the next store asked if it is wrong."""
        match = _BLOB.match(key)
        wanted = match[2] if match and not offset_bytes and len(target) and self._asked_before(key) else ""

        def read(store: Store) -> None:
            store.read_into(key, target, offset_bytes=offset_bytes)
            if wanted and _hash(target) != wanted:
                raise BlobCorruptError(f"blob {wanted} in {store.url} is not what its name says", key=key)

        self._first(key, read)

    def head(self, key: str) -> ObjectInfo:
        """A blob as its oldest copy, or as old as time where fewer stores have it than a generation needs."""
        if not key.startswith("blobs/"):
            return self._first(key, lambda store: store.head(key))[1]
        found: list[ObjectInfo] = []
        failure: StoreError | None = None
        for number, member in self._in_order():
            if self._rests(number) and len(found) >= self._copies:
                continue
            try:
                found.append(member.reading.head(key))
            except ObjectMissingError as error:
                failure = failure or error
            except StoreError as error:
                self._rest(number, error)
                failure = error if number == 0 else failure or error
        if not found:
            assert failure is not None
            raise failure
        alike = [info.modified_seconds for info in found if info.size_bytes == found[0].size_bytes]
        return found[0]._replace(modified_seconds=min(alike) if len(alike) >= self._copies else 0.0)

    def replica_copies(self, key: str) -> Iterator[bytes]:
        """The copies that replicas have."""
        for _, member in self._in_order() if self._reads_replicas else ():
            if member is self._members[0]:
                continue
            try:
                copy = member.reading.get(key).data
            except StoreError:  # one copy less to look at
                continue
            with self._lock:
                self._replica_reads += 1
            yield copy

    def _first(self, key: str, read: Callable[[Store], _Result]) -> tuple[int, _Result]:
        """What ``read`` gives with the first store that can answer, and that store's number. Raises what the first raised."""
        check_key(key)
        failure: Exception | None = None
        for number, member in self._in_order():
            if number and not self._reads_replicas:
                continue
            try:
                result = read(member.reading)
            except (ObjectMissingError, BlobCorruptError) as error:
                if number == 0 and not key.startswith(_IMMUTABLE):
                    raise
                failure = error if failure is None or number == 0 else failure
                self._tell(number, error)
            except StoreError as error:
                failure = error if failure is None or number == 0 else failure
                self._rest(number, error)
            else:
                with self._lock:
                    self._replica_reads += number > 0
                return number, result
        assert failure is not None
        raise failure

    def _in_order(self) -> list[tuple[int, Member]]:
        """The stores as they are to be asked: those that failed lately last."""
        return sorted(enumerate(self._members), key=lambda each: (self._rests(each[0]), each[0]))

    def _rests(self, number: int) -> bool:
        with self._lock:
            return self._clock.monotonic() < self._rests_until.get(number, 0.0)

    def _asked_before(self, key: str) -> bool:
        with self._lock:
            before = key in self._asked
            self._asked.add(key)
        return before

    # --- writing -----------------------------------------------------------------------------------------------------

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write to the primary under its conditions, then to the replicas. Raises StoreTransientError for too few copies."""
        if if_match is not None and if_match.startswith(_FOREIGN):
            raise StoreTransientError(
                f"{key!r} was read from a replica, because {self.url} did not answer: it is not replaced before it does",
                key=key,
            )
        etag = self._store.put(key, data, if_absent=if_absent, if_match=if_match)
        if not key.startswith(_PRIMARY_ALONE):
            self._put_copies(key, data)
        return etag

    def delete(self, key: str) -> None:
        """Remove from all. Raises what the first store raised that could not, after the others."""
        failures = []
        for number, store in enumerate(self.stores):
            if number and key.startswith(_PRIMARY_ALONE):
                continue
            try:
                store.delete(key)
            except StoreError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Close all."""
        for store in self.stores:
            store.close()

    def _put_copies(self, key: str, data: bytes | memoryview) -> None:
        held, failure = 1, None
        for number, store in enumerate(self.stores[1:], 1):
            try:
                self._put_copy(number, store, key, data)
            except StoreError as error:
                failure = error
                with self._lock:
                    self._behind += 1
            else:
                held += 1
        if held < self._copies and key.startswith(_IMMUTABLE):
            raise StoreTransientError(
                f"{held} of the {self._copies} stores that have to hold {key!r} took it: {failure}; mend the replica, or"
                " lower COLDSTART_STORE_COPIES",
                key=key,
            ) from failure

    def _put_copy(self, number: int, store: Store, key: str, data: bytes | memoryview) -> None:
        if self._rests(number):
            raise StoreTransientError(f"{store.url} failed a moment ago", key=key)
        try:
            if key.startswith(_IMMUTABLE):
                store.put(key, data)
            else:
                self._follow(store, key, bytes(data))
        except StoreError as error:
            self._rest(number, error)
            raise

    def _follow(self, store: Store, key: str, data: bytes) -> None:
        """Make a replica's copy of a changing object what the primary's is now, whoever has written that."""
        for _ in range(_ROUNDS):
            store.put(key, data)
            try:
                current = self._store.get(key).data
            except ObjectMissingError:
                store.delete(key)
                return
            if current == data:
                return
            data = current

    # --- trouble -----------------------------------------------------------------------------------------------------

    def _rest(self, number: int, error: StoreError) -> None:
        with self._lock:
            self._rests_until[number] = self._clock.monotonic() + REST_SECONDS
        self._tell(number, error)

    def _tell(self, number: int, error: Exception) -> None:
        """Say once of each store and kind of trouble."""
        trouble = (number, type(error))
        with self._lock:
            told = trouble in self._told
            self._told.add(trouble)
        if not told and self._degraded is not None:
            which = f"replica {number}" if number else "the store"
            self._degraded(f"{which} was passed over: {error}")


def _hash(data: memoryview) -> str:
    from blake3 import blake3  # 3 ms that opening a store does not need

    return str(blake3(data).hexdigest())
