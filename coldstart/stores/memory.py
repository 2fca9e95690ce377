"""A store in this process's memory: for tests, and the shortest reading of the contract."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from coldstart.errors import BlobCorruptError, ConditionFailedError, ObjectMissingError
from coldstart.stores.base import Capabilities, ObjectInfo, Store, StoredObject, check_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALL_CAPABILITIES = Capabilities(create_if_absent=True, compare_and_swap=True, ranges=True)


class _Entry(NamedTuple):
    data: bytes
    etag: str
    modified_seconds: float


class MemoryStore(Store):
    """Objects in a dictionary behind a lock.

    ``clock`` gives the store's own time (Unix seconds). With fewer ``capabilities`` the store ignores the conditions it
    does not claim, as some S3-compatible servers do.
    """

    _shared: ClassVar[dict[str, MemoryStore]] = {}
    _shared_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        name: str = "",
        *,
        clock: Callable[[], float] = time.time,
        capabilities: Capabilities = ALL_CAPABILITIES,
    ) -> None:
        self._name = name
        self._clock = clock
        self._capabilities = capabilities
        self._entries: dict[str, _Entry] = {}
        self._writes = 0
        self._lock = threading.Lock()

    @classmethod
    def shared(cls, name: str) -> MemoryStore:
        """The one store of this name in this process."""
        with cls._shared_lock:
            return cls._shared.setdefault(name, cls(name))

    @property
    def url(self) -> str:
        """``memory://`` and the store's name."""
        return f"memory://{self._name}"

    @property
    def capabilities(self) -> Capabilities:
        """What the constructor was given."""
        return self._capabilities

    def get(self, key: str) -> StoredObject:
        """The object's own bytes: they are immutable."""
        entry = self._entry(key)
        return StoredObject(entry.data, entry.etag)

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """Copy a part of the object."""
        data = self._entry(key).data
        if not 0 <= offset_bytes <= len(data) - len(target):
            raise BlobCorruptError(
                f"{key!r} has {len(data)} bytes, {len(target)} from offset {offset_bytes} were asked for", key=key
            )
        target[:] = memoryview(data)[offset_bytes : offset_bytes + len(target)]

    def head(self, key: str) -> ObjectInfo:
        """Size and last write, by the store's clock."""
        entry = self._entry(key)
        return ObjectInfo(key, len(entry.data), entry.modified_seconds)

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Store a copy; every write has an etag of its own."""
        copied = bytes(data)
        with self._lock:
            self._check_conditions(check_key(key), if_absent=if_absent, if_match=if_match)
            self._writes += 1
            entry = _Entry(copied, f"write-{self._writes}", self._clock())
            self._entries[key] = entry
        return entry.etag

    def delete(self, key: str) -> None:
        """Forget the object."""
        with self._lock:
            self._entries.pop(check_key(key), None)

    def delete_older(self, key: str, before_seconds: float) -> bool:
        """Forget the object if it was last written before that moment, in one step; False if it was not, or is not there."""
        with self._lock:
            entry = self._entries.get(check_key(key))
            if entry is None or entry.modified_seconds >= before_seconds:
                return False
            del self._entries[key]
        return True

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects of the moment of the call."""
        if prefix:
            check_key(prefix.removesuffix("/"))
        with self._lock:
            found = [item for item in self._entries.items() if item[0].startswith(prefix)]
        return iter([ObjectInfo(key, len(entry.data), entry.modified_seconds) for key, entry in found])

    def _entry(self, key: str) -> _Entry:
        with self._lock:
            entry = self._entries.get(check_key(key))
        if entry is None:
            raise ObjectMissingError(f"nothing is stored under {key!r} in {self.url}", key=key)
        return entry

    def _check_conditions(self, key: str, *, if_absent: bool, if_match: str | None) -> None:
        entry = self._entries.get(key)
        if if_absent and self._capabilities.create_if_absent and entry is not None:
            raise ConditionFailedError(f"{key!r} is stored already", key=key)
        if if_match is not None and self._capabilities.compare_and_swap and (entry is None or entry.etag != if_match):
            raise ConditionFailedError(f"{key!r} has changed since it was read", key=key)
