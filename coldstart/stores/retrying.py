"""The only place where a store's operation is repeated.

What is repeated is what raised StoreTransientError: with full jitter (a random wait below a bound that doubles) and one
deadline for all retries of an operation. Everything else passes through.

A conditional write whose answer was lost may have taken effect, and its repetition then fails against itself. So a
ConditionFailedError that follows a transient failure is settled by reading the object back:

- it holds our bytes: the write took effect, and that is reported;
- it holds other bytes, or was to be swapped and is gone: ConditionFailedError. The write lost, or won and has been
  replaced since; a writer who must tell the two apart keeps a history in the object;
- it was to be created and is gone: the creation is tried again;
- it cannot be read: StoreTransientError, because nobody knows.

This needs the bytes of a conditional write to be unlike those of any other: a ref holds a write id, a blob is named by
its content.
"""

from __future__ import annotations

import threading
import time
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from coldstart.errors import ConditionFailedError, ObjectMissingError, StoreError, StoreTransientError
from coldstart.stores.base import ObjectInfo, Store, StoredObject, StoreWrapper, Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_Result = TypeVar("_Result")
_LISTED_AT_ONCE = 1000
"""Objects that one attempt of a listing gives: about one answer of an S3 server."""


class Clock(Protocol):
    """Time as a store's wrapper sees it. Tests pass ``coldstart.testing.FakeClock``."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment; never goes back."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class SystemClock:
    """The time of this machine."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


class RetryPolicy(NamedTuple):
    """How often and how long one operation is tried.

    The wait before the n-th retry, n from 0, is random below ``min(longest_wait_seconds, first_wait_seconds * 2**n)``.
    No retry begins later than ``deadline_seconds`` after the first attempt failed; an attempt is not cut short.
    """

    # From the first failure on, so that a read which was healthy for minutes, and then broke off, is tried again like
    # one that failed at once. A server that stalls every time, each until a reader's limit of 8 s, is asked five times.
    attempts: int = 6
    first_wait_seconds: float = 0.1
    longest_wait_seconds: float = 5.0
    deadline_seconds: float = 30.0


BRIEF_POLICY = RetryPolicy(attempts=2, deadline_seconds=2.0)
"""For a read that another store can answer too."""


class RetryCounts(NamedTuple):
    """What a store's wrapper has done so far: ``retries`` of the ``attempts`` repeated an earlier one."""

    attempts: int
    retries: int


class RetryingStore(StoreWrapper):
    """A store whose transient failures are repeated under ``policy``. ``jitter`` gives numbers in [0, 1)."""

    def __init__(
        self,
        store: Store,
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008  a frozen value
        *,
        clock: Clock | None = None,
        jitter: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(store)
        self._policy = policy
        self._clock = clock or SystemClock()
        self._jitter = jitter
        self._attempts = 0
        self._retries = 0
        self._lock = threading.Lock()

    @property
    def counts(self) -> RetryCounts:
        """Attempts and retries of all operations so far."""
        with self._lock:
            return RetryCounts(self._attempts, self._retries)

    @property
    def tally(self) -> Tally:
        """The wrapped store's, with the retries."""
        return self._store.tally + Tally(retried_requests=self.counts.retries)

    def get(self, key: str) -> StoredObject:
        """As the wrapped store, repeated."""
        return self._repeat(lambda _: self._store.get(key))

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """As the wrapped store, repeated from the beginning of ``target``."""
        self._repeat(lambda _: self._store.read_into(key, target, offset_bytes=offset_bytes))

    def head(self, key: str) -> ObjectInfo:
        """As the wrapped store, repeated."""
        return self._repeat(lambda _: self._store.head(key))

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """As the wrapped store, repeated; see the module for conditions."""

        def attempt(earlier_failure: StoreTransientError | None) -> str:
            try:
                return self._store.put(key, data, if_absent=if_absent, if_match=if_match)
            except ConditionFailedError as lost:
                if earlier_failure is None:
                    raise
                return self._settle(key, data, lost, creates=if_absent)

        return self._repeat(attempt)

    def delete(self, key: str) -> None:
        """As the wrapped store, repeated."""
        self._repeat(lambda _: self._store.delete(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As the contract says; after a failure the listing starts anew and leaves out what it has given already."""
        return self._batches(prefix, self._repeat(lambda _: self._store.list(prefix)))

    def _batches(self, prefix: str, listing: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
        given: set[str] = set()

        def attempt(earlier_failure: StoreTransientError | None) -> tuple[ObjectInfo, ...]:
            nonlocal listing
            if earlier_failure is not None:
                listing = self._store.list(prefix)
            return tuple(islice((info for info in listing if info.key not in given), _LISTED_AT_ONCE))

        while batch := self._repeat(attempt):
            given.update(info.key for info in batch)
            yield from batch

    def _settle(self, key: str, data: bytes | memoryview, lost: ConditionFailedError, *, creates: bool) -> str:
        """Say what became of a conditional write that failed its condition after an earlier answer was lost."""
        try:
            stored = self._store.get(key)
        except ObjectMissingError as error:
            if creates:
                raise StoreTransientError(
                    f"{key!r} was there, and has been deleted: create it again", key=key
                ) from error
            raise lost from error
        except StoreError as error:
            raise StoreTransientError(
                f"the write of {key!r} may or may not have taken effect, and reading it back failed: {error}", key=key
            ) from error
        if stored.data != bytes(data):
            raise lost
        return stored.etag

    def _repeat(self, attempt: Callable[[StoreTransientError | None], _Result]) -> _Result:
        """Call ``attempt`` with the failure before it, until it returns, fails for good, or the policy ends."""
        failed_seconds: float | None = None
        failure: StoreTransientError | None = None
        retry = 0
        while True:
            self._count(is_retry=retry > 0)
            try:
                return attempt(failure)
            except StoreTransientError as error:
                failure = error
                wait = self._wait_seconds(retry)
                now = self._clock.monotonic()
                failed_seconds = now if failed_seconds is None else failed_seconds
                late = now + wait - failed_seconds > self._policy.deadline_seconds
                if late or retry + 1 >= self._policy.attempts:
                    raise
            self._clock.sleep(wait)
            retry += 1

    def _count(self, *, is_retry: bool) -> None:
        with self._lock:
            self._attempts += 1
            self._retries += is_retry

    def _wait_seconds(self, retry: int) -> float:
        if self._jitter is None:
            from random import random  # on the first failure, not at import: a start without one never needs it

            self._jitter = random
        bound = min(self._policy.longest_wait_seconds, self._policy.first_wait_seconds * 2.0**retry)
        return bound * self._jitter()
