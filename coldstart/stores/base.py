"""The contract of a snapshot store: a flat namespace of small and medium objects, some written once, a few swapped.

Promised by every store:

- ``put`` is atomic: a reader sees the whole old object or the whole new one, never a mix and never a part, whatever
  dies in between. ``get`` after a successful ``put`` sees it (read after write).
- ``put(if_absent=True)`` and ``put(if_match=etag)`` either take effect or raise ConditionFailedError, *where
  ``capabilities`` claims so*. A store that cannot enforce a condition says so there and ignores the option.
- Errors are those of ``coldstart.errors`` and no other library's: ObjectMissingError, ConditionFailedError,
  AccessDeniedError, StoreSetupError, and StoreTransientError for what may pass. A store never retries by itself
  (``stores.retrying`` does), so one call is one attempt.
- Calls are safe from several threads at once.
- Whoever reads a blob verifies it against its name, and reads it again if it is wrong. So a store that answers from
  copies of its own need not hash the first read of a blob, and hashes a copy before it answers a repeated one with it.

Not promised: that listing is fast or fresh (a restore never lists), ordering between objects, anything about a
``put`` whose answer was lost: it may have taken effect, and raises StoreTransientError.

Keys are relative, ``/``-separated, made of ``[A-Za-z0-9._=-]`` parts, never with a ``..``: see ``check_key``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import BlobCorruptError, StoreSetupError

if TYPE_CHECKING:
    from collections.abc import Iterator

_KEY = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]{0,200}(/[A-Za-z0-9_=-][A-Za-z0-9._=-]{0,200}){0,15}\Z")


MAX_OBJECT_BYTES = 80 << 20
"""More than any object of ours has: a chunk of 64 MiB that did not shrink. A store's ``get`` takes no larger one into memory."""


class Capabilities(NamedTuple):
    """What a store enforces, as data. False means: the option is accepted and has no effect."""

    create_if_absent: bool
    compare_and_swap: bool
    ranges: bool
    atomic_put: bool = True


class Tally(NamedTuple):
    """What a store has got over since it was opened: requests that were sent again, and reads that a replica answered.

    ``behind``: writes that a replica lacks since then, which ``coldstart snapshot verify --repair`` brings it.
    """

    retried_requests: int = 0
    replica_reads: int = 0
    behind: int = 0

    def __add__(self, other: Tally) -> Tally:  # type: ignore[override]  # sums of tallies, not longer tuples
        return Tally(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def __sub__(self, other: Tally) -> Tally:
        return Tally(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


class ObjectInfo(NamedTuple):
    """One stored object as a listing or a HEAD shows it. ``modified_seconds``: the store's clock, Unix time."""

    key: str
    size_bytes: int
    modified_seconds: float


class StoredObject(NamedTuple):
    """An object's bytes with the tag that ``put(if_match=...)`` takes to swap just this version of it."""

    data: bytes
    etag: str


class Store(ABC):
    """A snapshot store. See the module's docstring for what every implementation promises."""

    @property
    @abstractmethod
    def url(self) -> str:
        """The store's address for people, free of secrets: ``file:///...``, ``s3://bucket/prefix``, ``memory://``."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this store enforces."""

    @property
    def stores(self) -> tuple[Store, ...]:
        """The stores that hold the same objects, the deciding one first: itself alone, unless it has replicas."""
        return (self,)

    @property
    def tally(self) -> Tally:
        """What it has got over so far."""
        return Tally()

    def learn(self, capabilities: Capabilities) -> None:  # noqa: B027  an optional hook: most stores know themselves
        """Take over what another opening of this store has found out about it."""

    def replica_copies(self, key: str) -> Iterator[bytes]:
        """What replicas hold of an object, for whoever found the store's own to be wrong. Leaves out what cannot be read."""
        check_key(key)
        return iter(())

    @abstractmethod
    def get(self, key: str) -> StoredObject:
        """Read a whole object. Raises ObjectMissingError, and BlobCorruptError for one of more than MAX_OBJECT_BYTES."""

    @abstractmethod
    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """Fill ``target`` (writable, contiguous bytes) with ``len(target)`` bytes of the object from ``offset_bytes``.

        Raises ObjectMissingError, and BlobCorruptError when the object is shorter than asked for.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Size and age of an object. Raises ObjectMissingError."""

    @abstractmethod
    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write an object and return its etag.

        ``if_absent``: only if nothing is stored there. ``if_match``: only if the stored object has that etag (a missing
        object does not match). At most one of the two. Raises ConditionFailedError.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; removing one that is not there is no error."""

    @abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key starts with ``prefix`` (a whole folder when it ends in ``/``), in any order."""

    def close(self) -> None:  # noqa: B027  an optional hook: most stores hold nothing open
        """Let go of connections. The store is not used afterwards."""


class StoreWrapper(Store):
    """A store that does all as ``store`` does; a subclass says where it does otherwise."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def url(self) -> str:
        """The wrapped store's."""
        return self._store.url

    @property
    def capabilities(self) -> Capabilities:
        """The wrapped store's."""
        return self._store.capabilities

    @property
    def stores(self) -> tuple[Store, ...]:
        """Those that the wrapped store joins, or itself alone."""
        joined = self._store.stores
        return joined if len(joined) > 1 else (self,)

    @property
    def tally(self) -> Tally:
        """The wrapped store's."""
        return self._store.tally

    def learn(self, capabilities: Capabilities) -> None:
        """Tell the wrapped store."""
        self._store.learn(capabilities)

    def replica_copies(self, key: str) -> Iterator[bytes]:
        """Of the wrapped store."""
        return self._store.replica_copies(key)

    def get(self, key: str) -> StoredObject:
        """As the wrapped store."""
        return self._store.get(key)

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """As the wrapped store."""
        self._store.read_into(key, target, offset_bytes=offset_bytes)

    def head(self, key: str) -> ObjectInfo:
        """As the wrapped store."""
        return self._store.head(key)

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """As the wrapped store."""
        return self._store.put(key, data, if_absent=if_absent, if_match=if_match)

    def delete(self, key: str) -> None:
        """As the wrapped store."""
        self._store.delete(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As the wrapped store."""
        return self._store.list(prefix)

    def close(self) -> None:
        """Close the wrapped store."""
        self._store.close()


def innermost(store: Store) -> Store:
    """The store that all wrappers around it stand on: what it is asked is asked once, and answered by no copy."""
    while isinstance(store, StoreWrapper):
        store = store._store  # noqa: SLF001  a wrapper's own
    return store


def check_size(key: str, size_bytes: int) -> None:
    """Raise BlobCorruptError for an object that is larger than any of ours, before it is taken into memory."""
    if size_bytes > MAX_OBJECT_BYTES:
        raise BlobCorruptError(
            f"{key!r} has {size_bytes} bytes, more than the {MAX_OBJECT_BYTES} that any object of a snapshot has",
            key=key,
        )


def check_key(key: str) -> str:
    """Return ``key`` if it is a legal object key, else raise StoreSetupError (a bug or a hostile manifest)."""
    if not _KEY.match(key):
        raise StoreSetupError(f"illegal object key {key!r}: keys are relative paths of [A-Za-z0-9._=-] parts", key=key)
    return key
