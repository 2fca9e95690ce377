"""What the retrying wrapper repeats, how long it waits, and how it settles conditional writes whose answer was lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from coldstart.errors import (
    AccessDeniedError,
    BlobCorruptError,
    ConditionFailedError,
    ObjectMissingError,
    StoreTransientError,
)
from coldstart.stores.memory import MemoryStore
from coldstart.stores.retrying import RetryCounts, RetryingStore, RetryPolicy, SystemClock
from coldstart.testing import FakeClock, Fault, FaultyStore

if TYPE_CHECKING:
    from collections.abc import Callable


class Meanwhile(FakeClock):
    """A clock during whose first sleeps somebody else does something: one action a sleep."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        super().__init__()
        self._actions = list(actions)

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        if self._actions:
            self._actions.pop(0)()


def faulty(*faults: Fault, clock: FakeClock | None = None, **options: object) -> tuple[RetryingStore, FaultyStore]:
    """A retrying store over a faulty one over memory, and the faulty one."""
    clock = clock or FakeClock()
    inner = FaultyStore(MemoryStore(), faults, clock=clock)
    return RetryingStore(inner, clock=clock, **options), inner


def test_a_passing_failure_is_not_seen():
    """Every operation succeeds after failures that pass, and the counts tell attempts from retries."""
    store, _ = faulty(
        *[Fault("transient_before", op, times=2) for op in ("put", "get", "read_into", "head", "delete", "list")]
    )
    target = bytearray(4)
    store.put("k", b"data")
    store.read_into("k", memoryview(target))
    assert (store.get("k").data, bytes(target), store.head("k").size_bytes) == (b"data", b"data", 4)
    assert [info.key for info in store.list("")] == ["k"]
    store.delete("k")
    assert store.counts == RetryCounts(attempts=20, retries=12)  # the listing: begun (3), one batch, its end


def test_waits_double_up_to_the_longest():
    """With the largest jitter the waits are the bounds themselves."""
    clock = FakeClock()
    policy = RetryPolicy(attempts=6, first_wait_seconds=0.5, longest_wait_seconds=3.0, deadline_seconds=100.0)
    store, _ = faulty(Fault("transient_before", times=5), clock=clock, policy=policy, jitter=lambda: 1.0)
    store.put("k", b"")
    assert clock.slept == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_jitter_is_over_the_whole_wait():
    """A wait may be any part of its bound, down to nothing, and by default differs from one time to the next."""
    clock = FakeClock()
    draws = iter([0.0, 0.25, 0.5])
    store, _ = faulty(Fault("transient_before", times=3), clock=clock, jitter=lambda: next(draws))
    store.put("k", b"")
    assert clock.slept == pytest.approx([0.0, 0.05, 0.2])

    clock = FakeClock()
    store, _ = faulty(*[Fault("transient_before", key=f"k{number}") for number in range(50)], clock=clock)
    for number in range(50):
        store.put(f"k{number}", b"")
    assert all(0.0 <= wait < 0.1 for wait in clock.slept)
    assert len(set(clock.slept)) > 40


def test_attempts_end():
    """After the last attempt the store's own error is raised, and no wait follows it."""
    clock = FakeClock()
    store, inner = faulty(Fault("transient_before", times=None), clock=clock, policy=RetryPolicy(attempts=3))
    with pytest.raises(StoreTransientError, match="injected"):
        store.get("k")
    assert inner.count("get") == 3
    assert len(clock.slept) == 2


def test_the_deadline_is_for_all_retries_together():
    """No retry begins past the deadline, whether the time went by waiting or inside an attempt after the first."""
    policy = RetryPolicy(attempts=100, first_wait_seconds=1.0, longest_wait_seconds=4.0, deadline_seconds=10.0)
    clock = FakeClock()
    store, inner = faulty(Fault("transient_before", times=None), clock=clock, policy=policy, jitter=lambda: 1.0)
    with pytest.raises(StoreTransientError):
        store.get("k")
    assert clock.slept == [1.0, 2.0, 4.0]  # another 4 would end at 11

    store, inner = faulty(Fault("hang", times=None, seconds=6.0), policy=policy, jitter=lambda: 1.0)
    with pytest.raises(StoreTransientError):
        store.get("k")
    assert inner.count("get") == 3  # failed at 6, 13 and 21: the deadline was at 16


def test_a_first_attempt_may_last():
    """What was healthy for longer than the deadline, and then broke off, is tried again."""
    clock = FakeClock()
    policy = RetryPolicy(first_wait_seconds=1.0, deadline_seconds=10.0)
    store, _ = faulty(Fault("hang", "get", seconds=300.0), clock=clock, policy=policy, jitter=lambda: 1.0)
    store.put("k", b"data")
    assert store.get("k").data == b"data"
    assert clock.slept == [300.0, 1.0]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("missing", times=None), ObjectMissingError),
        (Fault("denied", times=None), AccessDeniedError),
        (Fault("truncate", times=None), BlobCorruptError),
    ],
)
def test_what_will_not_pass_is_not_repeated(fault: Fault, error: type[Exception]):
    """Errors that asking again cannot change come through after one attempt."""
    store, inner = faulty(fault)
    inner.heal()
    store.put("k", b"data")
    inner.inject(fault)
    with pytest.raises(error):
        store.read_into("k", memoryview(bytearray(4)))
    assert inner.count("read_into") == 1


def test_a_lost_condition_is_final_where_nothing_was_ambiguous():
    """A condition that fails at the first attempt is reported without a further request."""
    store, inner = faulty()
    store.put("k", b"theirs")
    with pytest.raises(ConditionFailedError):
        store.put("k", b"ours", if_absent=True)
    with pytest.raises(ConditionFailedError):
        store.put("k", b"ours", if_match="stale")
    assert [call.operation for call in inner.calls] == ["put", "put", "put"]


def test_a_create_whose_answer_was_lost_is_a_success():
    """The create took effect, its repetition failed against itself, and the etag that comes back is the object's."""
    store, inner = faulty(Fault("transient_after", "put"))
    etag = store.put("k", memoryview(b"ours"), if_absent=True)
    assert store.get("k") == (b"ours", etag)
    assert inner.count("put") == 2


def test_a_swap_whose_answer_was_lost_is_a_success():
    """The swap took effect, and the etag that comes back swaps again."""
    store, inner = faulty()
    first = store.put("k", b"1")
    inner.inject(Fault("transient_after", "put", times=2), Fault("transient_before", "get", times=2))
    second = store.put("k", b"2", if_match=first)
    store.put("k", b"3", if_match=second)
    assert store.get("k").data == b"3"


@pytest.mark.parametrize("kind", ["transient_before", "transient_after"])
def test_a_swap_that_somebody_else_overtook_has_failed(kind: str):
    """Other bytes in the object are ConditionFailedError, whether ours never arrived or were replaced."""
    memory = MemoryStore()
    first = memory.put("k", b"1")
    clock = Meanwhile(lambda: memory.put("k", b"theirs"))
    store = RetryingStore(FaultyStore(memory, [Fault(kind, "put")]), clock=clock)
    with pytest.raises(ConditionFailedError):
        store.put("k", b"ours", if_match=first)
    assert memory.get("k").data == b"theirs"


def test_a_create_that_somebody_else_overtook_has_failed():
    """Between a failure and its repetition another writer created the object: it is theirs."""
    memory = MemoryStore()
    clock = Meanwhile(lambda: memory.put("k", b"theirs"))
    store = RetryingStore(FaultyStore(memory, [Fault("transient_before", "put")]), clock=clock)
    with pytest.raises(ConditionFailedError):
        store.put("k", b"ours", if_absent=True)


@pytest.mark.parametrize("fault", [Fault("transient_before", "get", times=None), Fault("denied", "get", times=None)])
@pytest.mark.parametrize("condition", [{"if_absent": True}, {"if_match": "stale"}])
def test_a_read_back_that_fails_is_no_conflict(fault: Fault, condition: dict[str, object]):
    """Where nobody can say what became of a write, the error is StoreTransientError, never ConditionFailedError."""
    store, inner = faulty()
    store.put("k", b"theirs")
    inner.inject(Fault("transient_before", "put"), fault)
    with pytest.raises(StoreTransientError):
        store.put("k", b"ours", **condition)


def test_a_swap_of_what_is_gone_has_failed():
    """Read back and missing: there is nothing that the swap could have matched."""
    store, _ = faulty(Fault("transient_before", "put"))
    with pytest.raises(ConditionFailedError):
        store.put("never/there", b"ours", if_match="stale")


def test_a_create_of_what_is_gone_again_is_repeated():
    """Read back and missing: whoever was first has deleted the object, so the name is free and is taken."""
    memory = MemoryStore()
    memory.put("k", b"theirs")
    clock = Meanwhile(lambda: None, lambda: memory.delete("k"))
    shaky = FaultyStore(memory, [Fault("transient_before", "put"), Fault("missing", "get")], clock=clock)
    RetryingStore(shaky, clock=clock).put("k", b"ours", if_absent=True)
    assert memory.get("k").data == b"ours"


def test_a_target_is_filled_again_from_its_beginning():
    """What a failed attempt left in the target is overwritten by the one that succeeds."""
    memory = MemoryStore()
    memory.put("k", b"0123456789")

    class Partial(FaultyStore):
        def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
            target[:3] = b"???"
            super().read_into(key, target, offset_bytes=offset_bytes)

    store = RetryingStore(Partial(memory, [Fault("transient_before", "read_into")]), clock=FakeClock())
    target = bytearray(10)
    store.read_into("k", memoryview(target))
    assert bytes(target) == b"0123456789"


def test_a_listing_that_breaks_off_gives_everything_once():
    """A listing of several batches that fails in the middle, twice, has every object and none twice."""
    memory = MemoryStore()
    for number in range(2500):
        memory.put(f"blobs/{number}", b"")
    store = RetryingStore(FaultyStore(memory, [Fault("transient_after", "list", times=2)]), clock=FakeClock())
    keys = [info.key for info in store.list("blobs/")]
    assert len(keys) == 2500
    assert set(keys) == {f"blobs/{number}" for number in range(2500)}


@pytest.mark.parametrize("seed", range(20))
def test_a_sole_writer_never_sees_a_conflict(seed: int):
    """However answers and requests are lost, whoever is alone with an object never loses a swap to himself."""
    clock = FakeClock()
    faults = [Fault(kind, times=None, probability=0.25) for kind in ("transient_before", "transient_after")]
    inner = FaultyStore(MemoryStore(), faults, seed=seed, clock=clock)
    store = RetryingStore(inner, RetryPolicy(attempts=50, deadline_seconds=1e6), clock=clock)
    etag = store.put("ref", b"0", if_absent=True)
    for number in range(1, 40):
        etag = store.put("ref", b"%d" % number, if_match=etag)
    assert store.get("ref") == (b"39", etag)
    assert store.counts.retries > 0


def test_counts_add_up_over_threads():
    """Attempts of several threads are all counted."""
    store, _ = faulty(Fault("transient_before", times=10), policy=RetryPolicy(attempts=11), jitter=lambda: 0.0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put(f"k{number}", b""), range(100)))
    assert store.counts == RetryCounts(attempts=110, retries=10)


def test_it_speaks_for_the_store_that_it_wraps():
    """Address and capabilities are the wrapped store's, and closing reaches it."""
    closed = []

    class Closing(MemoryStore):
        def close(self) -> None:
            closed.append(self)

    inner = Closing("name")
    store = RetryingStore(inner)
    store.close()
    assert (store.url, store.capabilities) == (inner.url, inner.capabilities)
    assert closed == [inner]


def test_the_real_clock_runs():
    """Without a clock of its own the wrapper uses one that goes forward and takes any wait, also none."""
    clock = SystemClock()
    before = clock.monotonic()
    clock.sleep(0.0)
    assert clock.monotonic() >= before
