"""Stores that misbehave on purpose: ``FaultyStore`` fails by a script or by a seed, ``LatencyStore`` is slow.

Both wrap another store, keep its contract apart from what they are told to break, and need no network.
"""

from __future__ import annotations

import threading
from fnmatch import fnmatchcase
from random import Random
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from coldstart.errors import AccessDeniedError, BlobCorruptError, ObjectMissingError, StoreTransientError
from coldstart.stores.base import Capabilities, ObjectInfo, Store, StoredObject, StoreWrapper
from coldstart.stores.retrying import Clock, SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Operation = Literal["get", "read_into", "head", "put", "delete", "list"]
Kind = Literal["transient_before", "transient_after", "missing", "denied", "hang", "corrupt", "truncate"]
_Result = TypeVar("_Result")

_READS = ("get", "read_into")


class Fault(NamedTuple):
    """One way to fail: for calls of ``operation`` ("*" is any) whose key matches the pattern ``key``.

    ``kind``: ``transient_before`` fails without effect, ``transient_after`` takes effect and then loses the answer,
    ``missing`` and ``denied`` raise those errors, ``hang`` sleeps ``seconds`` on the store's clock and then fails;
    ``corrupt`` flips a bit and ``truncate`` cuts off the second half, both only of what ``get`` and ``read_into`` read.
    The first ``skip`` matching calls go through, the next ``times`` fail (None is all), each with ``probability``.
    """

    kind: Kind
    operation: Operation | Literal["*"] = "*"
    key: str = "*"
    times: int | None = 1
    skip: int = 0
    probability: float = 1.0
    seconds: float = 60.0

    def concerns(self, operation: Operation, key: str) -> bool:
        """Whether this fault can befall a call; ``key`` is the prefix of a ``list``."""
        return (
            self.operation in ("*", operation)
            and (operation in _READS or self.kind not in ("corrupt", "truncate"))
            and fnmatchcase(key, self.key)
        )


class Call(NamedTuple):
    """One call that a FaultyStore saw. ``fault`` is the kind of the fault that befell it, "" if none."""

    operation: Operation
    key: str
    fault: Kind | Literal[""]


class FaultyStore(Store):
    """``store`` with ``faults``; a call meets the first of them that is due. The same seed gives the same faults.

    ``calls`` lists what was asked, in order, so that a test can say what must not happen, a listing say.
    """

    def __init__(
        self, store: Store, faults: Sequence[Fault] = (), *, seed: int = 0, clock: Clock | None = None
    ) -> None:
        self.calls: list[Call] = []
        self._store = store
        self._faults: list[Fault] = list(faults)
        self._random = Random(seed)  # noqa: S311  faults, not secrets
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The wrapped store's."""
        return self._store.url

    @property
    def capabilities(self) -> Capabilities:
        """The wrapped store's."""
        return self._store.capabilities

    def inject(self, *faults: Fault) -> None:
        """Add faults to come."""
        with self._lock:
            self._faults.extend(faults)

    def heal(self) -> None:
        """Take all faults away."""
        with self._lock:
            self._faults.clear()

    def count(self, operation: Operation, key: str = "*") -> int:
        """How many calls of ``operation`` there were whose key matches the pattern."""
        with self._lock:
            return sum(call.operation == operation and fnmatchcase(call.key, key) for call in self.calls)

    def get(self, key: str) -> StoredObject:
        """As the wrapped store, unless a fault is due."""

        def spoil(stored: StoredObject, kind: Kind) -> StoredObject:
            data = bytearray(stored.data)
            if kind == "truncate":
                return stored._replace(data=bytes(data[: len(data) // 2]))
            self._flip(memoryview(data))
            return stored._replace(data=bytes(data))

        return self._call("get", key, lambda: self._store.get(key), spoil)

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """As the wrapped store, unless a fault is due; a truncated object is too short, as the contract has it."""

        def spoil(_: None, kind: Kind) -> None:
            if kind == "truncate":
                raise BlobCorruptError(f"injected: {key!r} was cut off", key=key)
            self._flip(target)

        self._call("read_into", key, lambda: self._store.read_into(key, target, offset_bytes=offset_bytes), spoil)

    def head(self, key: str) -> ObjectInfo:
        """As the wrapped store, unless a fault is due."""
        return self._call("head", key, lambda: self._store.head(key))

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """As the wrapped store, unless a fault is due."""
        return self._call("put", key, lambda: self._store.put(key, data, if_absent=if_absent, if_match=if_match))

    def delete(self, key: str) -> None:
        """As the wrapped store, unless a fault is due."""
        self._call("delete", key, lambda: self._store.delete(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As the wrapped store, unless a fault is due; ``transient_after`` strikes in the middle of the listing."""

        def broken(infos: tuple[ObjectInfo, ...]) -> Iterator[ObjectInfo]:
            yield from infos[: len(infos) // 2]
            raise StoreTransientError(f"injected: the listing of {prefix!r} broke off", key=prefix)

        fault = self._due("list", prefix)
        if fault is not None and fault.kind == "transient_after":
            return broken(tuple(self._store.list(prefix)))
        self._strike_before(fault, prefix)
        return self._store.list(prefix)

    def close(self) -> None:
        """Close the wrapped store."""
        self._store.close()

    def _call(
        self,
        operation: Operation,
        key: str,
        action: Callable[[], _Result],
        spoil: Callable[[_Result, Kind], _Result] | None = None,
    ) -> _Result:
        fault = self._due(operation, key)
        self._strike_before(fault, key)
        result = action()
        if fault is not None and fault.kind == "transient_after":
            raise StoreTransientError(f"injected: the answer about {key!r} was lost", key=key)
        return spoil(result, fault.kind) if fault is not None and spoil is not None else result

    def _due(self, operation: Operation, key: str) -> Fault | None:
        with self._lock:
            fault = next(
                (due for place in range(len(self._faults)) if (due := self._draw(place, operation, key))), None
            )
            self.calls.append(Call(operation, key, fault.kind if fault else ""))
            return fault

    def _draw(self, place: int, operation: Operation, key: str) -> Fault | None:
        """The fault at ``place`` if it strikes this call; counts the call against its ``skip`` and ``times``."""
        fault = self._faults[place]
        if not fault.concerns(operation, key) or fault.times == 0:
            return None
        if fault.skip:
            self._faults[place] = fault._replace(skip=fault.skip - 1)
            return None
        if self._random.random() >= fault.probability:
            return None
        if fault.times is not None:
            self._faults[place] = fault._replace(times=fault.times - 1)
        return fault

    def _strike_before(self, fault: Fault | None, key: str) -> None:
        if fault is None:
            return
        if fault.kind == "hang":
            self._clock.sleep(fault.seconds)
        if fault.kind in ("hang", "transient_before"):
            raise StoreTransientError(f"injected: {fault.kind} at {key!r}", key=key)
        if fault.kind == "missing":
            raise ObjectMissingError(f"injected: {key!r} is missing", key=key)
        if fault.kind == "denied":
            raise AccessDeniedError(f"injected: {key!r} may not be touched", key=key)

    def _flip(self, data: memoryview) -> None:
        if len(data):
            with self._lock:
                place, bit = self._random.randrange(len(data)), self._random.randrange(8)
            data[place] ^= 1 << bit


class LatencyStore(StoreWrapper):
    """``store`` behind a slow link: every call waits ``latency_seconds``, and bytes share one ``bytes_per_second``.

    The link is shared by all threads, as a worker's network is: calls wait for each other's bytes, not for each other's
    latency. ``bytes_per_second`` None is unlimited.
    """

    def __init__(
        self,
        store: Store,
        *,
        latency_seconds: float = 0.0,
        bytes_per_second: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(store)
        self._latency_seconds = latency_seconds
        self._bytes_per_second = bytes_per_second
        self._clock = clock or SystemClock()
        self._link_free_at = 0.0
        self._lock = threading.Lock()

    def get(self, key: str) -> StoredObject:
        """As the wrapped store, later."""
        self._clock.sleep(self._latency_seconds)
        stored = self._store.get(key)
        self._transfer(len(stored.data))
        return stored

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """As the wrapped store, later."""
        self._clock.sleep(self._latency_seconds)
        self._store.read_into(key, target, offset_bytes=offset_bytes)
        self._transfer(len(target))

    def head(self, key: str) -> ObjectInfo:
        """As the wrapped store, later."""
        self._clock.sleep(self._latency_seconds)
        return self._store.head(key)

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """As the wrapped store, later."""
        self._clock.sleep(self._latency_seconds)
        self._transfer(memoryview(data).nbytes)
        return self._store.put(key, data, if_absent=if_absent, if_match=if_match)

    def delete(self, key: str) -> None:
        """As the wrapped store, later."""
        self._clock.sleep(self._latency_seconds)
        self._store.delete(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As the wrapped store, later."""
        self._clock.sleep(self._latency_seconds)
        return self._store.list(prefix)

    def _transfer(self, size_bytes: int) -> None:
        if self._bytes_per_second is None:
            return
        with self._lock:
            now = self._clock.monotonic()
            self._link_free_at = max(now, self._link_free_at) + size_bytes / self._bytes_per_second
            wait = self._link_free_at - now
        self._clock.sleep(wait)
