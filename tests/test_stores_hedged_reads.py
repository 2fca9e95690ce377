"""Second requests over real connections: servers that stall, trickle, reset, refuse or lie, on TCP and TLS."""

from __future__ import annotations

import select
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3

from coldstart.errors import StoreTransientError
from coldstart.stores import StoreOptions
from coldstart.stores.hedging import HedgeCounts, HedgePolicy
from coldstart.stores.http1 import Watch
from coldstart.stores.http1_answer import Limits
from coldstart.stores.location import locate
from coldstart.stores.retrying import RetryingStore
from coldstart.stores.s3_reader import ReadingS3Store, S3Reader
from tests.raw_server import RawServer, Said, said, said_range
from tests.test_stores_s3_reader import SECRETS, lasting_server, server, tls_server, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["lasting_server", "server", "tls_server", "wire"]  # fixtures

PATIENCE_MS = 30_000
BODY = bytes(range(256)) * 1200
TOTAL = len(BODY)
LIMITS = Limits(answer_seconds=20.0, silence_seconds=20.0, look_seconds=0.02)
POLICY = HedgePolicy(silence_seconds=0.1, late_seconds=0.05)


def store_of(server: RawServer, *, limits: Limits = LIMITS, policy: HedgePolicy = POLICY) -> ReadingS3Store:
    """A store on the server that has its second requests early."""
    options = StoreOptions(server.url, "eu-west-1", *SECRETS)
    return ReadingS3Store(locate("s3://bucket/prefix", options), options, limits=limits, hedging=policy)


@pytest.fixture
def store(wire: RawServer) -> Iterator[ReadingS3Store]:
    """A store on each kind of connection."""
    made = store_of(wire)
    yield made
    made.close()


def read(store: ReadingS3Store | RetryingStore, length_bytes: int = TOTAL) -> bytes:
    """What a read puts in its target."""
    target = bytearray(length_bytes)
    store.read_into("k", memoryview(target))
    return bytes(target)


def whole(body: bytes = BODY) -> Said:
    """The answer in order."""
    return said_range(0, body, len(body))


def cut(length_bytes: int, ending: str) -> Said:
    """The answer as far as so many bytes of its body, and this end."""
    return Said((whole().pieces[0][: length_bytes - TOTAL],), ending)


STALLS = {
    "before the head": Said((), "hold"),
    "in the head": Said((b"HTTP/1.1 206 Par",), "hold"),
    "after the head": Said((whole().pieces[0][:-TOTAL],), "hold"),
    "in the middle": cut(TOTAL // 2, "hold"),
    "before the last byte": cut(TOTAL - 1, "hold"),
}


@pytest.mark.parametrize("where", STALLS)
def test_a_stalled_read_is_answered_by_its_hedge(wire: RawServer, store: ReadingS3Store, where: str):
    """Wherever the first answer stops, the second, on a connection of its own, is what was read."""
    wire.answers = [STALLS[where], whole()]
    assert read(store) == BODY
    assert store.hedges == HedgeCounts(sent=1, won=1)
    assert len({asked.connection for asked in wire.asked}) == 2
    assert len({(asked.line, asked.headers["range"]) for asked in wire.asked}) == 1


def test_a_stalled_connection_is_shut_down_when_its_hedge_won(server: RawServer):
    """The server sees the end of it at once; the hedge's connection is used for what follows, as are idle ones."""
    store = store_of(server)
    first = len(server._sockets)
    server.answers = [cut(1000, "hold"), whole(), whole()]
    assert read(store) == BODY
    poll = select.poll()
    poll.register(server._sockets[first], select.POLLRDHUP)
    assert poll.poll(PATIENCE_MS)
    assert read(store) == BODY
    assert [asked.connection for asked in server.asked[1:]] == [server.connections - 1] * 2
    store.close()


def test_a_straggler_among_fast_reads_has_a_hedge(wire: RawServer):
    """A read that trickles steadily, while others begin and end beside it, is late and answered by its hedge."""
    store = store_of(wire, policy=POLICY._replace(silence_seconds=20.0))
    head, body = whole().pieces[0][:-TOTAL], BODY[:1000]
    wire.answers = [Said((head, *(body[at : at + 1] for at in range(1000))), "hold", 0.02)]
    with ThreadPoolExecutor(1) as pool:
        straggler = pool.submit(read, store)
        while not wire.asked:
            threading.Event().wait(0.001)
        wire.answers = [whole()] * 9
        assert all(read(store) == BODY for _ in range(8))
        assert straggler.result(timeout=30) == BODY
    assert store.hedges == HedgeCounts(sent=1, won=1)
    store.close()


def test_where_all_reads_are_slow_there_is_no_hedge(wire: RawServer):
    """Twelve reads, four at once, all paced alike by their server, are each asked for once."""
    store = store_of(wire, policy=POLICY._replace(silence_seconds=20.0, factor=6.0))
    piece = TOTAL // 8
    wire.answers = [
        Said((whole().pieces[0][:-TOTAL], *(BODY[at : at + piece] for at in range(0, TOTAL, piece))), "keep", 0.02)
    ] * 12
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: read(store) == BODY, range(12))) == [True] * 12
    assert store.hedges == HedgeCounts(sent=0, won=0)
    assert len(wire.asked) == 12
    store.close()


def test_fast_reads_start_no_thread(server: RawServer, monkeypatch: pytest.MonkeyPatch):
    """Reads that do not lag are made by the threads that want them, and by no other."""
    store = store_of(server, policy=HedgePolicy())
    server.answers = [whole()] * 20
    read(store)

    def start(thread: threading.Thread) -> None:
        pytest.fail("a thread was started")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert [read(store) == BODY for _ in range(19)] == [True] * 19
    store.close()


def test_a_reset_read_is_not_hedged_but_retried(wire: RawServer):
    """A connection that breaks ends the attempt at once, and the retry asks for the chunk again."""
    store = store_of(wire)
    wire.answers = [cut(TOTAL // 2, "reset"), whole()]
    assert read(RetryingStore(store, jitter=lambda: 0.0)) == BODY
    assert store.hedges == HedgeCounts(sent=0, won=0)
    store.close()


@pytest.mark.parametrize(
    "refusal",
    [
        said(b"<Error><Code>NoSuchKey</Code></Error>", status="404 Not Found"),
        said(b"<Error><Code>SlowDown</Code></Error>", status="503 Slow Down"),
        cut(TOTAL // 2, "reset"),
    ],
)
def test_a_refused_hedge_leaves_the_first_to_its_end(wire: RawServer, refusal: Said):
    """The first answer comes late, but whole: what a hedge was told does not matter."""
    store = store_of(wire)
    answer = whole().pieces[0]
    wire.answers = [Said((answer[:1000], answer[1000:]), "keep", 0.25), refusal]
    assert read(store) == BODY
    assert store.hedges == HedgeCounts(sent=1, won=0)
    store.close()


def test_two_failures_are_the_error_of_the_first(wire: RawServer):
    """A stalled first request whose hedge was refused ends by its own limit, in its own words, and can be retried."""
    store = store_of(wire, limits=LIMITS._replace(silence_seconds=0.3))
    missing = said(b"<Error><Code>NoSuchKey</Code></Error>", status="404 Not Found")
    wire.answers = [cut(1000, "hold"), missing]
    with pytest.raises(StoreTransientError, match="too slowly: nothing for"):
        read(store)
    assert store.hedges == HedgeCounts(sent=1, won=0)
    wire.answers = [cut(1000, "hold"), missing, whole()]
    assert read(RetryingStore(store, jitter=lambda: 0.0)) == BODY
    store.close()


def test_the_bytes_of_a_hedge_are_for_the_caller_to_verify(wire: RawServer, store: ReadingS3Store):
    """A server that answers the second request with other bytes of the same length has them in the target: no more."""
    other = bytes(TOTAL)
    wire.answers = [cut(TOTAL // 2, "hold"), whole(other)]
    found = read(store)
    assert found == other
    assert blake3(found).digest() != blake3(BODY).digest()


def test_nothing_lands_in_a_target_after_its_read(wire: RawServer):
    """Answers that race, each of one value: a target has one answer's bytes alone, at the return and ever after."""
    store = store_of(
        wire,
        limits=LIMITS._replace(look_seconds=0.002),
        policy=POLICY._replace(silence_seconds=0.004, wasted=1000, factor=0.1),
    )
    answers = []
    for number in range(120):
        answer = whole(bytes([number]) * TOTAL).pieces[0]
        half = TOTAL // (1 + number % 3)
        answers.append(Said((answer[:half], answer[half:]), "keep", (number % 5) * 0.002))
    wire.answers = answers

    def one(_: int) -> tuple[bytearray, bytes]:
        target = bytearray(TOTAL)
        store.read_into("k", memoryview(target))
        return target, bytes(target)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(one, range(40)))
    assert all(len(set(returned)) == 1 for _, returned in found)
    assert store.hedges.sent > 0
    store.close()
    for thread in [each for each in threading.enumerate() if each.name == "coldstart-hedge"]:
        thread.join(PATIENCE_MS / 1000)
    assert all(target == returned for target, returned in found)


def test_closing_ends_a_hedge_under_way(server: RawServer):
    """The hedge's connection is shut down and its thread ends; the first request goes on to its end."""
    store = store_of(server)
    first = len(server._sockets)
    server.answers = [Said((whole().pieces[0],), "keep", 0.6), Said((), "hold")]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, store)
        while len(server.asked) < 2:
            threading.Event().wait(0.001)
        (hedge,) = [each for each in threading.enumerate() if each.name == "coldstart-hedge"]
        store.close()
        hedge.join(PATIENCE_MS / 1000)
        assert not hedge.is_alive()
        poll = select.poll()
        poll.register(server._sockets[first + 1], select.POLLRDHUP)
        assert poll.poll(PATIENCE_MS)
        assert reading.result(timeout=30) == BODY
    assert store.hedges == HedgeCounts(sent=1, won=0)


def test_closing_leaves_a_failed_read_its_own_error(server: RawServer):
    """A read whose first request failed, and that waits for its hedge, ends when the store is closed."""
    store = store_of(server, limits=LIMITS._replace(silence_seconds=0.3))
    server.answers = [cut(1000, "hold"), Said((), "hold")]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, store)
        while store._reader._hedger._ledger._hedges == 0 or len(server.asked) < 2:
            threading.Event().wait(0.001)
        while not _waits_for_hedge():
            threading.Event().wait(0.001)
        store.close()
        with pytest.raises(StoreTransientError, match="too slowly"):
            reading.result(timeout=30)


def _waits_for_hedge() -> bool:
    """Whether a thread stands in the wait for a hedge's end."""
    import sys
    import traceback

    return any(
        frame.name == "_is_rescued"
        for each in sys._current_frames().values()
        for frame in traceback.extract_stack(each)
    )


# --- limits --------------------------------------------------------------------------------------------------------


def test_a_body_that_stops_is_given_up_by_its_silence(wire: RawServer):
    """Long before a window of the floor is over, and though the window has had enough bytes."""
    limits = LIMITS._replace(silence_seconds=0.2, floor_bytes_per_second=1.0, floor_window_seconds=20.0)
    store = store_of(wire, limits=limits, policy=HedgePolicy())
    wire.answers = [cut(TOTAL // 2, "hold")]
    with pytest.raises(StoreTransientError, match="nothing for"):
        read(store)
    store.close()


def test_where_others_are_as_silent_a_read_is_waited_for(wire: RawServer):
    """Where eight reads came back from a silence, the ninth may be silent for longer than its limit, in head and body."""
    store = store_of(wire, limits=LIMITS._replace(silence_seconds=0.05, answer_seconds=0.05))
    ledger = store._reader._hedger._ledger
    for _ in range(8):
        progress = ledger.begin(1)
        progress.longest_silence_seconds = 1.0
        ledger.end(progress, alone=True)
    answer = whole().pieces[0]
    wire.answers = [Said((answer[:1000], answer[1000:]), "keep", 0.2)]
    assert read(store) == BODY
    assert len(wire.asked) == 1
    store.close()


def test_a_long_body_has_a_later_deadline(wire: RawServer):
    """A steady body is read past the time that an empty one would have had, for as long as its length allows."""
    head, body = said_range(0, BODY[:1000], 1000).pieces[0][:-1000], BODY[:1000]
    answer = Said((head, *(body[at : at + 100] for at in range(0, 1000, 100))), "keep", 0.03)
    limits = LIMITS._replace(floor_bytes_per_second=1.0, deadline_seconds=0.1)
    patient = store_of(wire, limits=limits._replace(deadline_bytes_per_second=50.0), policy=HedgePolicy())
    wire.answers = [answer]
    assert read(patient, 1000) == body
    patient.close()
    hasty = store_of(wire, limits=limits, policy=HedgePolicy())
    wire.answers = [answer]
    with pytest.raises(StoreTransientError, match="took longer"):
        read(hasty, 1000)
    hasty.close()


def test_an_interrupt_wakes_a_thread_that_waits(wire: RawServer):
    """A request that looks about once a minute ends at once when another thread ends it."""
    limits = LIMITS._replace(answer_seconds=100.0, look_seconds=60.0)
    store = store_of(wire, limits=limits)
    watch, failed = Watch(), threading.Event()
    wire.answers = [Said((b"HTTP/1.1 206",), "hold")]

    def ask() -> None:
        with pytest.raises(StoreTransientError), store._reader._asked("GET", "k", watch=watch):
            pytest.fail("there was an answer")
        failed.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    while not wire.asked:
        threading.Event().wait(0.001)
    watch.interrupt()
    assert failed.wait(15.0)  # the server would end it after 30 s, the next look after 60 s
    thread.join()
    store.close()


def test_an_interrupted_connection_is_not_used_again(server: RawServer):
    """Neither by the request that was ended nor by a later one, and others that lie idle are kept."""
    store = store_of(server)
    reader: S3Reader = store._reader
    server.answers = [cut(1000, "hold"), whole()]
    read(store)
    (idle,) = reader._http._idle
    server.answers = [whole()]
    assert read(store) == BODY
    assert reader._http._idle == [idle]
    store.close()
