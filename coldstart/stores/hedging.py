"""A second request for a read that lags behind: sent over a new connection, into memory of its own; the first whole wins.

A read is made by the thread that wants it, which looks about while it waits: no thread watches another's, and a read
that is over soon costs two notes in the ledger. One that lags starts its hedge on a thread for that alone.

What makes it safe: only the thread that asked ever writes to its target. A hedge that is whole first ends the first
request, whose own thread comes back from it and copies. So nothing lands in a target after its read has returned.

What keeps it from harm: a hedge costs the store and the link a request, so those that came too late, or failed, are
few (``HedgePolicy``), and a read is late only by comparison with others, of which no large part is late like it. Where
all is slow, nothing is.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import ColdstartError, StoreTransientError
from coldstart.stores.http1 import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Request = Callable[[memoryview, Watch], None]
    """Fills the memory with what is read, as one attempt, under the watch; raises what a store raises."""

_REMEMBERED_READS = 64
_USUAL_PERCENT = 95
"""The part of all reads that is usual; the slowest of a few."""
_LATENCY_BYTES = 1 << 20
"""What else could be received while a request waits for its first byte, about: makes reads of all sizes comparable."""
_ALIKE = 4
"""A read is one of its kind where not more than one in so many of those of its time lag too."""


class HedgePolicy(NamedTuple):
    """When a read gets a second request, and how many.

    A read is silent after ``silence_seconds`` without a byte, and late when it takes ``factor`` times as long as at
    least ``samples`` others since it began, and at least ``late_seconds``. A read that others are like is neither.
    At most ``at_once`` hedges are under way, with ``memory_bytes`` of memory in all. Those that do not win are at most
    ``wasted`` and ``wasted_fraction`` of all reads.
    """

    # 2.5 s: the system has sent a lost packet again by then, after 0.2, 0.6 and 1.4 s. 1 s: what a hedge cannot make
    # good is not worth its connection. 4 at once are a quarter more than 16 reads, for as long as they last; with
    # chunks of 16 MiB they hold 64 MiB. A hedge that wins was no waste, so connections that have all died, as in a
    # machine that was frozen, are replaced four at a time, however many they are.
    silence_seconds: float = 2.5
    factor: float = 3.0
    samples: int = 8
    late_seconds: float = 1.0
    at_once: int = 4
    memory_bytes: int = 64 << 20
    wasted: int = 4
    wasted_fraction: float = 0.05


class HedgeCounts(NamedTuple):
    """Second requests so far: ``won`` of the ``sent`` ones gave what was read."""

    sent: int
    won: int


class Progress:
    """A read under way, as its own thread tells of it. Moments are those of the ledger's clock."""

    def __init__(self, length_bytes: int, now: float) -> None:
        self.length_bytes = length_bytes
        self.received_bytes = 0
        self.began = self.last_came = now
        self.longest_silence_seconds = 0.0

    def note(self, received_bytes: int, now: float) -> None:
        """Take note of a wait that is over."""
        if received_bytes:
            self.received_bytes += received_bytes
            self.longest_silence_seconds = max(self.longest_silence_seconds, now - self.last_came)
            self.last_came = now


class _Read(NamedTuple):
    """A read that one request brought to its end. ``pace``: seconds for a byte, that of the latency among them."""

    ended: float
    pace: float
    longest_silence_seconds: float


class Ledger:
    """What is known of reads, and who may have a hedge. Does nothing itself; its calls are safe from several threads."""

    def __init__(self, policy: HedgePolicy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._lock = threading.Lock()
        self._reads: deque[_Read] = deque(maxlen=_REMEMBERED_READS)
        self._under_way: set[Progress] = set()
        self._begun = self._sent = self._won = 0
        self._hedges = self._hedge_bytes = 0

    @property
    def counts(self) -> HedgeCounts:
        """Hedges so far."""
        with self._lock:
            return HedgeCounts(self._sent, self._won)

    def begin(self, length_bytes: int) -> Progress:
        """A read begins."""
        progress = Progress(length_bytes, self._clock())
        with self._lock:
            self._begun += 1
            self._under_way.add(progress)
        return progress

    def end(self, progress: Progress, *, alone: bool) -> None:
        """A read ends; ``alone``: its own request was enough, so that it tells how long reads take."""
        now = self._clock()
        with self._lock:
            self._under_way.discard(progress)
            if alone:
                pace = (now - progress.began) / _weight(progress)
                self._reads.append(_Read(now, pace, progress.longest_silence_seconds))

    def lags(self, progress: Progress, received_bytes: int) -> bool:
        """Take note of what a wait brought, and say whether a hedge would help the read."""
        now = self._clock()
        progress.note(received_bytes, now)
        if now - progress.began < min(self._policy.silence_seconds, self._policy.late_seconds):
            return False
        with self._lock:
            return self._is_silent(progress, now) or self._is_late(progress, now)

    def unusual_silence_seconds(self, progress: Progress) -> float:
        """From how long on a silence of the read is longer than what others come back from; 0.0: nobody knows."""
        with self._lock:
            return self._unusual_silence_seconds(progress)

    def claim(self, length_bytes: int) -> bool:
        """Whether one more hedge of this length may be sent; if so, it counts as sent."""
        policy = self._policy
        with self._lock:
            is_full = self._hedges >= policy.at_once or self._hedge_bytes + length_bytes > policy.memory_bytes
            if is_full or self._sent - self._won >= policy.wasted + policy.wasted_fraction * self._begun:
                return False
            self._sent += 1
            self._hedges += 1
            self._hedge_bytes += length_bytes
            return True

    def release(self, length_bytes: int, *, unsent: bool = False) -> None:
        """A hedge is over, or could not be sent."""
        with self._lock:
            self._sent -= unsent
            self._hedges -= 1
            self._hedge_bytes -= length_bytes

    def win(self) -> None:
        """A hedge gave what was read."""
        with self._lock:
            self._won += 1

    def _is_silent(self, progress: Progress, now: float) -> bool:
        silence_seconds = now - progress.last_came
        limit_seconds = self._policy.silence_seconds
        return silence_seconds >= limit_seconds and silence_seconds >= self._unusual_silence_seconds(progress)

    def _unusual_silence_seconds(self, progress: Progress) -> float:
        known = [read.longest_silence_seconds for read in self._reads]
        known += [other.longest_silence_seconds for other in self._under_way if other is not progress]
        return self._policy.factor * _usual(known) if len(known) >= self._policy.samples else 0.0

    def _is_late(self, progress: Progress, now: float) -> bool:
        seconds = now - progress.began
        paces = [read.pace for read in self._reads if read.ended >= progress.began]
        if seconds < self._policy.late_seconds or len(paces) < self._policy.samples:
            return False
        usual = _usual(paces)

        def takes(other: Progress, factor: float) -> bool:
            return now - other.began >= factor * usual * _weight(other)

        if not takes(progress, self._policy.factor):
            return False
        # Half as late is like it: where everything becomes slow at once, the read that began first is late first.
        alike = sum(takes(other, self._policy.factor / 2) for other in self._under_way)
        if alike * _ALIKE > len(self._under_way) + len(paces):
            return False
        left = (progress.length_bytes - progress.received_bytes) / max(1, progress.received_bytes)
        return seconds * left > usual * _weight(progress)  # else it is over before a hedge is


class Hedger:
    """Reads with hedges, for any number of threads. ``clock`` gives seconds that never go back."""

    def __init__(
        self,
        policy: HedgePolicy = HedgePolicy(),  # noqa: B008  a frozen value
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = Ledger(policy, clock)
        self._lock = threading.Lock()
        self._hedges: set[_Hedge] = set()
        self._closed = False

    @property
    def counts(self) -> HedgeCounts:
        """Second requests so far."""
        return self._ledger.counts

    def read(self, request: Request, target: memoryview) -> None:
        """Fill ``target`` by ``request``, or by a second one of it. Raises what the first raised, if neither could."""
        _Race(self, self._ledger, request, len(target)).run(target)

    def start(self, request: Request, length_bytes: int, rival: Watch) -> _Hedge | None:
        """A hedge under way, which ends ``rival`` when it is whole; None where there cannot be one now."""
        if not self._ledger.claim(length_bytes):
            return None
        try:
            hedge = _Hedge(request, length_bytes, rival, self._end)
            with self._lock:
                if self._closed:
                    raise RuntimeError  # noqa: TRY301  as where no thread can be started
                hedge.start()
                self._hedges.add(hedge)
        except (MemoryError, RuntimeError):  # no memory, or no thread, to be had: the first request goes on alone
            self._ledger.release(length_bytes, unsent=True)
            return None
        return hedge

    def close(self) -> None:
        """End the hedges that are under way, and begin no more."""
        with self._lock:
            self._closed = True
            hedges = tuple(self._hedges)
        for hedge in hedges:
            hedge.watch.interrupt()

    def _end(self, hedge: _Hedge) -> None:
        with self._lock:
            self._hedges.discard(hedge)
        self._ledger.release(len(hedge.memory))


class _Hedge:
    """A second request, on a thread of its own. ``is_whole``: ``memory`` has been filled."""

    def __init__(self, request: Request, length_bytes: int, rival: Watch, ended: Callable[[_Hedge], None]) -> None:
        self.memory = memoryview(bytearray(length_bytes))
        self.watch = Watch(wants_new_connection=True)
        self._request = request
        self._rival = rival
        self._ended = ended
        self.is_whole = False
        self._thread = threading.Thread(target=self._run, name="coldstart-hedge", daemon=True)

    def start(self) -> None:
        """Send it."""
        self._thread.start()

    def wait(self) -> bool:
        """Wait for its end, which its limits bring; whether it is whole then."""
        self._thread.join()
        return self.is_whole

    def _run(self) -> None:
        try:
            self._request(self.memory, self.watch)
        except ColdstartError:
            return  # the first request goes on, or has an error of its own to tell
        else:
            self.is_whole = True
            self._rival.interrupt()
        finally:
            self._ended(self)


class _Race(Watch):
    """One read, with at most one hedge: the watch of its first request, all in the thread that reads.

    It does not keep the target, which the thread of a hedge that ends late would otherwise hold on to.
    """

    def __init__(self, hedger: Hedger, ledger: Ledger, request: Request, length_bytes: int) -> None:
        super().__init__()
        self._hedger = hedger
        self._ledger = ledger
        self._request = request
        self._length_bytes = length_bytes
        self._hedge: _Hedge | None = None
        self._progress = ledger.begin(length_bytes)

    def run(self, target: memoryview) -> None:
        """Fill ``target``. Raises what the first request raised."""
        alone = False
        try:
            self._request(target, self)
            alone = True
        except ColdstartError as error:
            if not self._is_rescued(error, target):
                raise
        finally:
            hedge, self._hedge = self._hedge, None
            if hedge is not None:
                hedge.watch.interrupt()
            self._ledger.end(self._progress, alone=alone)

    def hear(self, received_bytes: int) -> None:
        """As a watch does; a read that lags gets its hedge here."""
        super().hear(received_bytes)
        if self._ledger.lags(self._progress, received_bytes) and self._hedge is None:
            self._hedge = self._hedger.start(self._request, self._length_bytes, self)

    def patience_seconds(self, limit_seconds: float) -> float:
        """More than the limit where other reads are as silent, and come back: the link is slow, no connection dead."""
        return max(limit_seconds, self._ledger.unusual_silence_seconds(self._progress))

    def _is_rescued(self, error: ColdstartError, target: memoryview) -> bool:
        """Whether the hedge has, or after an error that may pass will have, what was read."""
        hedge = self._hedge
        if hedge is None or not (hedge.is_whole or (isinstance(error, StoreTransientError) and hedge.wait())):
            return False
        target[:] = hedge.memory
        self._ledger.win()
        return True


def _weight(progress: Progress) -> int:
    return progress.length_bytes + _LATENCY_BYTES


def _usual(values: Sequence[float]) -> float:
    return sorted(values)[-(-len(values) * _USUAL_PERCENT // 100) - 1]
