"""Second requests: which reads get one, how many there are, who wins, and that nobody else writes to the target."""

from __future__ import annotations

import gc
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.errors import BlobCorruptError, ColdstartError, ObjectMissingError, StoreTransientError
from coldstart.stores.hedging import HedgeCounts, HedgePolicy, Hedger, Ledger
from coldstart.stores.http1_answer import Limits
from coldstart.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.stores.hedging import Progress
    from coldstart.stores.http1 import Watch

MIB = 1 << 20
PATIENCE_SECONDS = 30.0


class Book:
    """A ledger with a clock of its own."""

    def __init__(self, **policy: float) -> None:
        self.clock = FakeClock()
        self.ledger = Ledger(HedgePolicy()._replace(**policy), self.clock.monotonic)

    def lags_after(self, progress: Progress, seconds: float, received_bytes: int = 0) -> bool:
        """Whether a read lags that has just waited so long for so many bytes."""
        self.clock.advance(seconds)
        return self.ledger.lags(progress, received_bytes)

    def reads(self, count: int, seconds: float, *, silent_seconds: float = 0.0) -> None:
        """So many reads of 4 MiB, each over after so long, with one such silence."""
        for _ in range(count):
            progress = self.ledger.begin(4 * MIB)
            self.clock.advance(silent_seconds)
            self.ledger.lags(progress, 1)
            self.clock.advance(seconds - silent_seconds)
            self.ledger.end(progress, alone=True)


# --- which reads lag -----------------------------------------------------------------------------------------------


def test_a_read_without_a_byte_lags():
    """After 2.5 s without a byte, from its beginning or from the last one, and not before."""
    book = Book()
    progress = book.ledger.begin(4 * MIB)
    assert not book.lags_after(progress, 2.4)
    assert book.lags_after(progress, 0.2)
    assert not book.lags_after(progress, 0.1, received_bytes=1)
    assert not book.lags_after(progress, 2.4)
    assert book.lags_after(progress, 0.2)


def test_a_silence_that_is_usual_is_none():
    """Where bytes usually come after 2 s, a read is silent only after three times that."""
    book = Book()
    book.reads(8, 5.0, silent_seconds=2.0)
    progress = book.ledger.begin(4 * MIB)
    assert not book.lags_after(progress, 5.9)
    assert book.lags_after(progress, 0.2)


def test_a_silence_that_others_come_back_from_is_none():
    """Reads under way tell of silences too: on a slow link a read is left in peace before any other is over."""
    book = Book()
    others = [book.ledger.begin(4 * MIB) for _ in range(8)]
    progress = book.ledger.begin(4 * MIB)
    assert book.ledger.unusual_silence_seconds(progress) == 0.0
    book.clock.advance(2.0)
    for other in others:
        assert not book.ledger.lags(other, 1)
    assert not book.lags_after(progress, 3.9)
    assert book.ledger.unusual_silence_seconds(progress) == 6.0
    assert book.lags_after(progress, 0.2)


def test_a_read_that_others_overtake_lags():
    """Three times as long as eight others since it began, with bytes coming all the time; not with seven."""
    for others, expected in ((7, False), (8, True)):
        book = Book()
        progress = book.ledger.begin(4 * MIB)
        book.reads(others, 0.4)
        assert book.lags_after(progress, 0.05, received_bytes=1) is expected


def test_others_before_it_do_not_count():
    """What reads took before this one began says nothing about the link as it is now."""
    book = Book()
    book.reads(20, 0.1)
    progress = book.ledger.begin(4 * MIB)
    for _ in range(20):
        assert not book.lags_after(progress, 1.0, received_bytes=1)


def test_what_lasts_a_moment_never_lags():
    """A hedge costs a connection: a read of a tenth of the usual second is left alone, however fast others are."""
    book = Book()
    progress = book.ledger.begin(4 * MIB)
    book.reads(50, 0.01)
    assert not book.lags_after(progress, 0.4, received_bytes=1)
    assert book.lags_after(progress, 0.2, received_bytes=1)


def test_a_larger_read_may_take_longer():
    """Times are compared by length: four times the bytes are not late in four times the time."""
    book = Book()
    progress = book.ledger.begin(16 * MIB)
    book.reads(8, 1.0)
    assert not book.lags_after(progress, 2.0, received_bytes=1)
    assert book.lags_after(progress, 0.3, received_bytes=1)


def test_a_read_that_is_nearly_over_does_not_lag():
    """A late read that will end before a hedge could is left alone."""
    book = Book()
    late, later = (book.ledger.begin(4 * MIB) for _ in range(2))
    book.reads(8, 1.0)
    assert not book.lags_after(late, 0.0, received_bytes=4 * MIB - MIB // 4)
    assert book.lags_after(later, 0.0, received_bytes=MIB)


def test_stragglers_at_the_very_end_lag():
    """The last two reads of many, with nothing else under way, are late like each other and unlike all others."""
    book = Book()
    last = [book.ledger.begin(4 * MIB) for _ in range(2)]
    book.reads(14, 0.5)
    assert [book.lags_after(progress, 0.0, received_bytes=1) for progress in last] == [True, True]


@given(
    threads=st.integers(1, 24),
    mebibytes=st.integers(1, 16),
    latency=st.floats(0.0, 2.0),
    slowdown=st.floats(1.0, 100.0),
    after=st.floats(0.0, 20.0),
)
def test_where_all_is_slow_nothing_lags(threads: int, mebibytes: int, latency: float, slowdown: float, after: float):
    """A link shared evenly that becomes slower at any moment by any factor: no read of it ever lags."""
    book, look = Book(), 0.5
    under_way: list[tuple[Progress, float]] = []
    begun, left = 0, {}
    while begun < 60:
        while len(under_way) < threads:
            progress = book.ledger.begin(mebibytes * MIB)
            under_way.append((progress, book.clock.monotonic() + latency))
            left[progress] = float(progress.length_bytes)
            begun += 1
        rate = 32 * MIB / (slowdown if book.clock.monotonic() > after else 1.0)
        book.clock.advance(look)
        for progress, first_byte in tuple(under_way):
            came = rate * look / threads if book.clock.monotonic() > first_byte else 0.0
            left[progress] -= came
            assert not book.ledger.lags(progress, int(came))
            if left[progress] <= 0.0:
                book.ledger.end(progress, alone=True)
                under_way.remove((progress, first_byte))


# --- how many ------------------------------------------------------------------------------------------------------


def test_few_hedges_are_under_way_at_once():
    """No more than four, nor than their memory allows; the end of one makes room."""
    ledger = Book(wasted=100).ledger
    assert [ledger.claim(MIB) for _ in range(5)] == [True] * 4 + [False]
    ledger.release(MIB)
    assert not ledger.claim(62 * MIB)
    assert ledger.claim(61 * MIB)


def test_hedges_in_vain_are_few():
    """Four, and one more for twenty reads; those that won, or could not be sent, are not counted against it."""
    ledger = Book(wasted=4, wasted_fraction=0.05).ledger

    def sent() -> int:
        count = 0
        while count < 100 and ledger.claim(MIB):
            ledger.release(MIB)
            count += 1
        return count

    assert sent() == 4
    for _ in range(39):
        ledger.begin(MIB)
    assert sent() == 2
    ledger.win()
    assert sent() == 1
    for _ in range(2):
        ledger.begin(MIB)
    assert ledger.claim(MIB)
    ledger.release(MIB, unsent=True)
    assert ledger.counts == HedgeCounts(sent=7, won=1)


def test_limits_fit_chunks_and_slow_links():
    """64 connections that share 1 MB/s pass floor and deadline with room to spare; a dead one is given up before 12 s."""
    limits, share = Limits(), 1e6 / 64
    assert limits.floor_bytes_per_second * 3 < share
    for length_bytes in (4 * MIB, 16 * MIB):
        allowed = limits.deadline_seconds + length_bytes / limits.deadline_bytes_per_second
        assert allowed > 1.5 * length_bytes / share
    assert HedgePolicy().silence_seconds + limits.look_seconds <= 3.0
    assert max(limits.answer_seconds, limits.silence_seconds, 2 * limits.connect_seconds) + limits.look_seconds < 10.0


# --- who wins ------------------------------------------------------------------------------------------------------


class Scene:
    """A read of four bytes of which both requests are played: ``first`` and ``second`` get its memory and watch."""

    def __init__(self, first: Callable[[memoryview, Watch], None], second: Callable[[memoryview, Watch], None]) -> None:
        self._play = {False: first, True: second}
        self.clock = FakeClock()
        self.hedger = Hedger(clock=self.clock.monotonic)
        self.target = bytearray(4)
        self.writers: list[tuple[bool, int]] = []
        self.hedge_ended = threading.Event()

    def read(self) -> bytes:
        """What a read puts in the target."""
        self.hedger.read(self._request, memoryview(self.target))
        return bytes(self.target)

    def _request(self, memory: memoryview, watch: Watch) -> None:
        self.writers.append((memory.obj is self.target, threading.get_ident()))
        try:
            if not watch.wants_new_connection:
                self.clock.advance(2.5)
                watch.hear(0)
            self._play[watch.wants_new_connection](memory, watch)
        finally:
            if watch.wants_new_connection:
                self.hedge_ended.set()


def fills(data: bytes) -> Callable[[memoryview, Watch], None]:
    """A request that succeeds."""

    def play(memory: memoryview, watch: Watch) -> None:
        memory[:] = data

    return play


def raises(error: ColdstartError) -> Callable[[memoryview, Watch], None]:
    """A request that fails."""

    def play(memory: memoryview, watch: Watch) -> None:
        memory[:2] = b"##"
        raise error

    return play


def waits(memory: memoryview, watch: Watch) -> None:
    """A request that brings half, and ends when it is ended."""
    ends = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < ends:
        memory[:2] = b"##"
        watch.hear(0)
        time.sleep(0.001)
    pytest.fail("nobody ended the request")


LOST = StoreTransientError("lost", key="k")


def test_the_first_that_is_whole_ends_the_hedge():
    """The target has the first request's bytes, and the hedge is told to end at once."""
    scene = Scene(fills(b"good"), waits)
    assert scene.read() == b"good"
    assert scene.hedge_ended.wait(PATIENCE_SECONDS)
    assert scene.hedger.counts == HedgeCounts(sent=1, won=0)


def test_a_hedge_that_is_whole_ends_the_first():
    """The target has the hedge's bytes and nothing of the first's, whose end is no error of the read."""
    scene = Scene(waits, fills(b"good"))
    assert scene.read() == b"good"
    assert scene.hedger.counts == HedgeCounts(sent=1, won=1)


def test_only_the_reading_thread_has_the_target():
    """A hedge never sees the target: it fills memory of its own, on a thread of its own."""
    scene = Scene(waits, fills(b"good"))
    scene.read()
    (first, second) = scene.writers
    assert first == (True, threading.get_ident())
    assert second[0] is False
    assert second[1] != threading.get_ident()


def test_a_late_hedge_does_not_keep_the_target():
    """While a hedge that lost is still under way, nobody but the caller holds on to the target: it may be unmapped."""
    go = threading.Event()

    def second(memory: memoryview, watch: Watch) -> None:
        assert go.wait(PATIENCE_SECONDS)

    scene = Scene(fills(b"good"), second)
    assert scene.read() == b"good"
    scene.target += b"and more"  # BufferError, if somebody had a view of it
    go.set()
    assert scene.hedge_ended.wait(PATIENCE_SECONDS)


def test_a_read_leaves_nothing_for_the_garbage_collector():
    """A hedge's memory, as large as a chunk, goes when both requests are over, and not when cycles are next looked for."""
    gc.collect()
    gc.disable()
    try:
        Scene(waits, fills(b"good")).read()
        for thread in [each for each in threading.enumerate() if each.name == "coldstart-hedge"]:
            thread.join(PATIENCE_SECONDS)
        assert [each for each in gc.get_objects() if type(each).__name__ in ("_Race", "_Hedge")] == []
    finally:
        gc.enable()


def test_a_failed_first_leaves_the_hedge_to_win():
    """An error that may pass is not raised while a hedge is under way that will be whole."""
    go = threading.Event()

    def second(memory: memoryview, watch: Watch) -> None:
        assert go.wait(PATIENCE_SECONDS)
        memory[:] = b"good"

    def first(memory: memoryview, watch: Watch) -> None:
        go.set()
        raise LOST

    scene = Scene(first, second)
    assert scene.read() == b"good"


@pytest.mark.parametrize("second", [raises(ObjectMissingError("gone")), raises(BlobCorruptError("short"))])
def test_where_both_fail_the_first_error_is_raised(second: Callable[[memoryview, Watch], None]):
    """Whatever the hedge's error, the read has the error of the first request."""
    scene = Scene(raises(LOST), second)
    with pytest.raises(StoreTransientError) as caught:
        scene.read()
    assert caught.value is LOST
    assert scene.hedger.counts == HedgeCounts(sent=1, won=0)


def test_a_failed_hedge_leaves_the_first_alone():
    """Its error goes nowhere, and the first request ends as it would have."""
    failed = threading.Event()

    def second(memory: memoryview, watch: Watch) -> None:
        failed.set()
        raise LOST

    def first(memory: memoryview, watch: Watch) -> None:
        assert failed.wait(PATIENCE_SECONDS)
        watch.hear(0)
        memory[:] = b"good"

    assert Scene(first, second).read() == b"good"


def test_an_error_that_will_not_pass_waits_for_no_hedge():
    """A missing object is missing at once: the hedge is ended."""
    scene = Scene(raises(ObjectMissingError("gone", key="k")), waits)
    with pytest.raises(ObjectMissingError):
        scene.read()
    assert scene.hedge_ended.wait(PATIENCE_SECONDS)


def test_an_interrupt_of_the_reading_thread_ends_the_hedge():
    """What is no error of ours, as Ctrl-C, passes through, and leaves no hedge behind."""

    def first(memory: memoryview, watch: Watch) -> None:
        raise KeyboardInterrupt

    scene = Scene(first, waits)
    with pytest.raises(KeyboardInterrupt):
        scene.read()
    assert scene.hedge_ended.wait(PATIENCE_SECONDS)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_without_threads_or_memory_a_read_goes_on_alone(monkeypatch: pytest.MonkeyPatch, error: Exception):
    """A machine at its limits gives no hedge, and no error either; none counts as sent."""

    def start(thread: threading.Thread) -> None:
        raise error

    scene = Scene(fills(b"good"), waits)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert scene.read() == b"good"
    assert scene.hedger.counts == HedgeCounts(sent=0, won=0)


def test_a_closed_hedger_sends_none():
    """After the end, a lagging read goes on alone."""
    scene = Scene(fills(b"good"), waits)
    scene.hedger.close()
    assert scene.read() == b"good"
    assert scene.hedger.counts == HedgeCounts(sent=0, won=0)
