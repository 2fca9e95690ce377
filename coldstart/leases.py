"""Leases: which worker of a fleet captures, so that the others need not.

Efficiency only. A lease that is lost, taken twice or never released costs a second capture or a later one; which generation
becomes current is for the ref's compare-and-swap alone.

A lease is one object, changed by compare-and-swap. It names its holder and the moment when it is over, by the store's
clock; the holder renews it at work. One whose holder was a process of this host that is no more is over. It is released
by putting a tombstone in its place, because not every store can delete on a condition. A store that enforces no conditions
has no leases: all of its workers capture.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from random import random
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import (
    AccessDeniedError,
    CaptureError,
    ConditionFailedError,
    ObjectMissingError,
    StoreError,
    StoreTransientError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.repository import Repository

COLLECTOR = "collector"
"""The key of the lease of whoever deletes what is not needed any more: one at a time."""
LEASE_SECONDS = 600.0
"""How long a lease lasts without being renewed: what a fleet waits for a worker that was killed, on another host."""
RETRY_SECONDS = 60.0
_LONGEST_SECONDS = 2 * LEASE_SECONDS
"""A lease that claims to last longer was written by a clock that is wrong, and counts as over."""
_MOST_BYTES = 4096


class Holder(NamedTuple):
    """A process of a host."""

    host: str
    process: int

    def __str__(self) -> str:
        return f"process {self.process} of {self.host}"


class Lease(NamedTuple):
    """A lease that is held. ``until_seconds``: by the store's clock."""

    key: str
    etag: str
    until_seconds: float


class Held(NamedTuple):
    """Somebody else's lease, and the seconds until it is over unless it is renewed."""

    owner: str
    left_seconds: float

    def retry_seconds(self, chance: Callable[[], float] = random) -> float:
        """When to ask again: in a minute or two, spread so that a fleet does not ask at once."""
        return min(self.left_seconds, RETRY_SECONDS) + chance() * RETRY_SECONDS


class Holding:
    """The lease of one capture, or none where there are no leases. ``keep`` and ``end`` never fail."""

    def __init__(self, leases: Leases, lease: Lease | None) -> None:
        self._leases = leases
        self._lease = lease
        self._renewed_seconds = time.monotonic()
        self._lock = threading.Lock()

    def keep(self) -> None:
        """Renew the lease if a third of its time is over. One that was lost is not taken back. From any thread."""
        if time.monotonic() - self._renewed_seconds < LEASE_SECONDS / 3:
            return
        with self._lock:
            lease = self._lease
            if lease is None or time.monotonic() - self._renewed_seconds < LEASE_SECONDS / 3:
                return
            self._renewed_seconds = time.monotonic()
            with suppress(StoreError, CaptureError):  # whoever stores for this worker has been stopped
                self._lease = self._leases.renew(lease)

    def end(self) -> None:
        """Release the lease."""
        with self._lock:
            lease, self._lease = self._lease, None
        if lease is not None:
            self._leases.release(lease)


def hold(repository: Repository, name: str) -> Holding | Held:
    """The lease of a snapshot's captures, or who has it. Raises StoreError.

    Where the store keeps no leases, or this worker may not write one, it captures without.
    """
    leases = Leases(repository)
    if not leases.are_kept:
        return Holding(leases, None)
    try:
        taken = leases.take(f"leases/{name}")
    except AccessDeniedError:
        return Holding(leases, None)
    return taken if isinstance(taken, Held) else Holding(leases, taken)


def was_released(repository: Repository, key: str, *, seconds: float) -> bool:
    """Whether nobody has had the lease at ``key`` for ``seconds``: there is none, or it was let go as long ago.

    One that was not let go counts as held, also when its time is over: whoever had it may still be at work. Where the store
    keeps no leases it is not known, and so not said. Raises StoreError.
    """
    leases = Leases(repository)
    if not leases.are_kept:
        return False
    try:
        age_seconds = repository.time.now() - repository.store.head(key).modified_seconds
    except ObjectMissingError:
        return True
    return leases.is_released(key) and age_seconds >= seconds


class Leases:
    """The leases of a store. ``holder``: who takes them; ``unique`` makes each write unlike any other."""

    def __init__(
        self,
        repository: Repository,
        holder: Holder | None = None,
        *,
        unique: Callable[[], str] = lambda: os.urandom(8).hex(),
    ) -> None:
        self._store = repository.store
        self._time = repository.time
        self._holder = holder or Holder(os.uname().nodename, os.getpid())
        self._unique = unique

    @property
    def are_kept(self) -> bool:
        """Whether the store can keep one."""
        capabilities = self._store.capabilities
        return capabilities.create_if_absent and capabilities.compare_and_swap

    def take(self, key: str) -> Lease | Held:
        """The lease at ``key``, or who has it. Raises StoreError."""
        now = self._time.now()
        found, etag = self._read(key)
        left_seconds = _left_seconds(found, now)
        holder = Holder(found["host"], found["process"]) if found else None
        if holder is not None and left_seconds > 0 and not self._is_gone(holder):
            return Held(str(holder), left_seconds)
        return self._put(key, etag, now) or Held("another worker", LEASE_SECONDS)

    def is_released(self, key: str) -> bool:
        """Whether the lease at ``key`` was let go by who had it. Raises StoreError."""
        found, _ = self._read(key)
        return found.get("until_seconds") == 0.0

    def _is_gone(self, holder: Holder) -> bool:
        """Whether a holder was a process of this host that is no more."""
        if holder.host != self._holder.host:
            return False
        try:
            os.kill(holder.process, 0)
        except ProcessLookupError:
            return True
        except OSError:  # another user's
            return False
        return False

    def renew(self, lease: Lease) -> Lease | None:
        """The lease for another while; None if it is another's meanwhile. Raises StoreError."""
        return self._put(lease.key, lease.etag, self._time.now())

    def release(self, lease: Lease) -> None:
        """Let go of a lease; one that cannot be released, as by a worker that is being stopped, ends by itself."""
        with suppress(StoreError, CaptureError):
            self._store.put(lease.key, _document(self._holder, 0.0, self._unique()), if_match=lease.etag)

    def _put(self, key: str, etag: str, now: float) -> Lease | None:
        until_seconds = now + LEASE_SECONDS
        data = _document(self._holder, until_seconds, self._unique())
        try:
            written = self._store.put(key, data, if_absent=not etag, if_match=etag or None)
        except (ConditionFailedError, StoreTransientError):
            try:
                stored = self._store.get(key)
            except ObjectMissingError:
                return None
            if stored.data != data:
                return None
            written = stored.etag
        return Lease(key, written, until_seconds)

    def _read(self, key: str) -> tuple[dict[str, Any], str]:
        """What is written there, {} for nothing and for what is no lease."""
        try:
            stored = self._store.get(key)
        except ObjectMissingError:
            return {}, ""
        document: Any = None
        if len(stored.data) <= _MOST_BYTES:
            with suppress(ValueError, RecursionError):
                document = json.loads(stored.data)
        return document if _is_lease(document) else {}, stored.etag


def _is_lease(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and isinstance(document.get("host"), str)
        and type(document.get("process")) is int
        and 0 < document["process"] < 1 << 31
        and type(document.get("until_seconds")) in (int, float)
    )


def _left_seconds(document: dict[str, Any], now: float) -> float:
    left = float(document.get("until_seconds", 0.0)) - now
    return left if 0.0 < left <= _LONGEST_SECONDS else 0.0


def _document(holder: Holder, until_seconds: float, unique: str) -> bytes:
    return json.dumps({**holder._asdict(), "until_seconds": until_seconds, "write_id": unique}).encode()
