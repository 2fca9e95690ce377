"""What happens in a worker's life, as typed values, and the bus that carries them to whoever subscribes.

Events are rare (a few dozen a start): requests are counted in ``metrics``, not published. They carry texts and numbers
and no secrets. Errors travel as ``error_text``.

Promised by a bus: every subscriber sees events one at a time and in the order of publishing; a subscriber may
publish, subscribe and unsubscribe; ``publish`` never raises, whatever a subscriber does, and never waits for a lock.
Not promised: that an event was delivered when ``publish`` returns (another thread may be delivering, and takes over).
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeAlias

WORKER_STATES = ("new", "starting", "ready", "closing", "closed", "failed")

KEPT_EVENTS = 1000
"""A bus keeps this many, the newest, for subscribers that ask for what was before them."""


class StartBegan(NamedTuple):
    """A worker began to start; ``process_seconds`` is the age of its process by then."""

    name: str
    key: str
    process_seconds: float


class SnapshotFound(NamedTuple):
    """A usable generation is there and will be restored."""

    name: str
    generation: int
    rung: str
    raw_bytes: int
    stored_bytes: int


class SnapshotPassedOver(NamedTuple):
    """No snapshot is used; ``reason`` says why (none yet, ``code changed: load`` ...)."""

    name: str
    reason: str


class FetchProgress(NamedTuple):
    """``fetched_bytes`` of ``total_bytes`` are here after ``seconds``. Comes every half second or less often; not kept."""

    name: str
    fetched_bytes: int
    total_bytes: int
    seconds: float


class FetchEnded(NamedTuple):
    """All bytes of the snapshot are here and verified."""

    name: str
    fetched_bytes: int
    seconds: float
    engine: str


class PhaseBegan(NamedTuple):
    """A phase of the start (one of ``PHASES``) began."""

    name: str
    phase: str


class PhaseEnded(NamedTuple):
    """A phase ended; ``skipped`` is the reason where it was left out, else ""."""

    name: str
    phase: str
    seconds: float
    skipped: str


class PhaseSlow(NamedTuple):
    """A phase took longer than its target."""

    name: str
    phase: str
    seconds: float
    target_seconds: float


class FellBack(NamedTuple):
    """A snapshot was there and could not be used, so a slower way was taken; ``stage`` is where it failed."""

    name: str
    stage: str
    reason: str


class Recovered(NamedTuple):
    """A start got over a failure: ``step`` is one of ``recovery.STEPS``, and ``reason`` what had gone wrong."""

    name: str
    step: str
    reason: str


class WorkerReady(NamedTuple):
    """The worker answers events from now on. ``kind`` is the start kind, ``seconds`` count from the process' start."""

    name: str
    kind: str
    reason: str
    seconds: float


class WorkerThawed(NamedTuple):
    """The platform froze this process and it goes on now; ``kind`` is ``thawed`` or ``platform`` (its own snapshot)."""

    name: str
    kind: str
    reason: str
    seconds: float


class WorkerFailed(NamedTuple):
    """The worker could not start."""

    name: str
    error: str


class StateChanged(NamedTuple):
    """The worker went from one of ``WORKER_STATES`` to another."""

    name: str
    old: str
    new: str


class CaptureBegan(NamedTuple):
    """A new generation is being made; ``reason`` says why now."""

    name: str
    generation: int
    reason: str


class PoolPassedOver(NamedTuple):
    """A pool that the snapshot lists is not what the handler asks for, or could not be allocated ahead."""

    name: str
    reason: str


class ProgramPassedOver(NamedTuple):
    """The generation has a program that this start does not use; its state is restored instead."""

    name: str
    reason: str


class KernelCachesPassedOver(NamedTuple):
    """The generation has kernel caches that this start does not use, or not all of them: it compiles what it lacks."""

    name: str
    reason: str


class KernelCachesUsed(NamedTuple):
    """Compiled kernels at the end of the warm-up: ``restored_files`` came with the snapshot, ``new_files`` were compiled."""

    name: str
    restored_files: int
    restored_bytes: int
    new_files: int


class ProgramBegan(NamedTuple):
    """A program is being made in the background."""

    name: str
    backend: str


class CaptureSkipped(NamedTuple):
    """No generation is made."""

    name: str
    reason: str


class CaptureEnded(NamedTuple):
    """A generation is published. Of its stored bytes, ``reused_bytes`` were there before, ``written_bytes`` not."""

    name: str
    generation: int
    raw_bytes: int
    written_bytes: int
    reused_bytes: int
    seconds: float


class CaptureFailed(NamedTuple):
    """A generation could not be made; requests do not notice."""

    name: str
    error: str


class WeightsChanged(NamedTuple):
    """Events changed arrays that were not declared to change."""

    name: str
    paths: tuple[str, ...]


class FilesKept(NamedTuple):
    """Files that ``load`` read or kept go into the snapshot."""

    name: str
    files: int
    total_bytes: int


class HookOverran(NamedTuple):
    """A hook of the user's had not returned after ``seconds``; the worker went on without it."""

    name: str
    hook: str
    seconds: float


class StoreDegraded(NamedTuple):
    """The store works, but not as well as it should."""

    name: str
    reason: str


class UserLine(NamedTuple):
    """A line of the user's own, from ``ctx.log``."""

    name: str
    message: str
    fields: Mapping[str, Any]


class SubscriberFailed(NamedTuple):
    """A subscriber raised. Published once for each subscriber, however often it fails; it stays subscribed."""

    subscriber: str
    error: str


if TYPE_CHECKING:
    Event: TypeAlias = (
        StartBegan
        | SnapshotFound
        | SnapshotPassedOver
        | FetchProgress
        | FetchEnded
        | PhaseBegan
        | PhaseEnded
        | PhaseSlow
        | HookOverran
        | FellBack
        | Recovered
        | WorkerReady
        | WorkerThawed
        | WorkerFailed
        | StateChanged
        | CaptureBegan
        | PoolPassedOver
        | ProgramPassedOver
        | KernelCachesPassedOver
        | KernelCachesUsed
        | ProgramBegan
        | CaptureSkipped
        | CaptureEnded
        | CaptureFailed
        | WeightsChanged
        | FilesKept
        | StoreDegraded
        | UserLine
        | SubscriberFailed
    )


def error_text(error: BaseException) -> str:
    """An error as events carry it: class and message, without its traceback, and without what looks like a credential."""
    from coldstart.redaction import without_shapes

    return without_shapes(f"{type(error).__name__}: {error}")


class _Subscription:
    __slots__ = ("active", "failed", "replay", "stamped", "subscriber")

    def __init__(self, subscriber: Callable[..., object], *, replay: bool, stamped: bool) -> None:
        self.subscriber = subscriber
        self.replay = replay
        self.stamped = stamped
        self.active = True
        self.failed = False


class EventBus:
    """Carries events from the parts of a worker to subscribers. All methods may be called from any thread.

    Publishing and subscribing put an item into one queue; whoever finds nobody at work on the queue works it off. So
    no lock is held while a subscriber runs, and a subscriber may call whatever it likes.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._queue: deque[tuple[Event, float] | _Subscription] = deque()
        self._kept: deque[tuple[Event, float]] = deque(maxlen=KEPT_EVENTS)
        self._subscriptions: list[_Subscription] = []
        self._working = threading.Lock()

    def publish(self, event: Event) -> None:
        """Have ``event`` delivered to every subscriber."""
        self._queue.append((event, self._clock()))
        self._work()

    @overload
    def subscribe(
        self, subscriber: Callable[[Event], object], *, replay: bool = False, stamped: Literal[False] = False
    ) -> Callable[[], None]: ...
    @overload
    def subscribe(
        self, subscriber: Callable[[Event, float], object], *, replay: bool = False, stamped: Literal[True]
    ) -> Callable[[], None]: ...
    def subscribe(
        self, subscriber: Callable[..., object], *, replay: bool = False, stamped: bool = False
    ) -> Callable[[], None]:
        """Have ``subscriber(event)`` called from now on; returns the function that ends it.

        ``replay``: with the newest ``KEPT_EVENTS`` past events first. ``stamped``: as ``subscriber(event, seconds)``,
        with the Unix time of publishing, which for past events is not now.
        """
        subscription = _Subscription(subscriber, replay=replay, stamped=stamped)
        self._queue.append(subscription)
        self._work()

        def unsubscribe() -> None:
            subscription.active = False

        return unsubscribe

    def _work(self) -> None:
        """Work off the queue, unless somebody does (another thread, or this one further up its stack)."""
        while self._queue and self._working.acquire(blocking=False):
            try:
                while self._queue:
                    self._handle(self._queue.popleft())
            finally:
                self._working.release()

    def _handle(self, item: tuple[Event, float] | _Subscription) -> None:
        self._subscriptions = [subscription for subscription in self._subscriptions if subscription.active]
        if isinstance(item, _Subscription):
            self._subscriptions.append(item)
            for event, seconds in tuple(self._kept) if item.replay else ():
                self._deliver(item, event, seconds)
            return
        if type(item[0]) is not FetchProgress:
            self._kept.append(item)
        for subscription in self._subscriptions:
            self._deliver(subscription, *item)

    def _deliver(self, subscription: _Subscription, event: Event, seconds: float) -> None:
        if not subscription.active:
            return
        try:
            if subscription.stamped:
                subscription.subscriber(event, seconds)
            else:
                subscription.subscriber(event)
        except Exception as error:  # noqa: BLE001  a foreign function: whatever it raises must not reach the worker
            self._report(subscription, error)

    def _report(self, subscription: _Subscription, error: Exception) -> None:
        if subscription.failed:
            return
        subscription.failed = True
        name = getattr(subscription.subscriber, "__qualname__", type(subscription.subscriber).__qualname__)
        failed = SubscriberFailed(name, error_text(error))
        self._queue.append((failed, self._clock()))
        _write_to_stderr(f"coldstart: the subscriber {name} failed, and is reported only this once: {failed.error}\n")


def _write_to_stderr(line: str) -> None:
    try:
        sys.stderr.write(line)
    except (AttributeError, OSError, ValueError):  # absent (pythonw), full or closed: the kept event still tells
        return


bus = EventBus()
"""The bus of this process' workers."""
