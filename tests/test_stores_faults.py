"""The stores and the clock that tests break things with: they break what they are told to, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

import coldstart.testing
from coldstart.errors import AccessDeniedError, BlobCorruptError, ObjectMissingError, StoreTransientError
from coldstart.stores.memory import MemoryStore
from coldstart.testing import Call, FakeClock, Fault, FaultyStore, LatencyStore

DATA = bytes(range(100))


def faulty(*faults: Fault, **options: object) -> tuple[FaultyStore, MemoryStore]:
    """A faulty store over a memory store that holds DATA under k, and the memory store."""
    memory = MemoryStore()
    memory.put("k", DATA)
    return FaultyStore(memory, faults, **options), memory


def test_a_fault_before_has_no_effect_and_one_after_has():
    """Both kinds of a transient failure look alike from outside; only the second has written."""
    store, memory = faulty(Fault("transient_before", "put"), Fault("transient_after", "put"))
    for key in ("before", "after"):
        with pytest.raises(StoreTransientError):
            store.put(key, b"x")
    assert [info.key for info in memory.list("")] == ["k", "after"]


def test_a_fault_strikes_the_calls_that_it_names():
    """Operation, key pattern, skip and times choose the calls; all others go through."""
    store, _ = faulty(Fault("transient_before", "get", "k*", times=2, skip=1))
    store.head("k")
    with pytest.raises(ObjectMissingError, match="nothing is stored"):
        store.get("other")
    outcomes = []
    for _ in range(4):
        try:
            outcomes.append(store.get("k").data == DATA)
        except StoreTransientError:
            outcomes.append("failed")
    assert outcomes == [True, "failed", "failed", True]
    assert store.calls == [
        Call("head", "k", ""),
        Call("get", "other", ""),
        Call("get", "k", ""),
        Call("get", "k", "transient_before"),
        Call("get", "k", "transient_before"),
        Call("get", "k", ""),
    ]
    assert (store.count("get"), store.count("get", "o*"), store.count("list")) == (5, 1, 0)


@pytest.mark.parametrize(("kind", "error"), [("missing", ObjectMissingError), ("denied", AccessDeniedError)])
@pytest.mark.parametrize("operation", ["get", "read_into", "head", "put", "delete", "list"])
def test_missing_and_denied_befall_every_operation(operation: str, kind: str, error: type[Exception]):
    """An object that is gone, and credentials that are refused, can be had for any call; the object underneath stays."""
    store, memory = faulty(Fault(kind, times=None))
    calls = {
        "get": lambda: store.get("k"),
        "read_into": lambda: store.read_into("k", memoryview(bytearray(1))),
        "head": lambda: store.head("k"),
        "put": lambda: store.put("k", b"x"),
        "delete": lambda: store.delete("k"),
        "list": lambda: list(store.list("")),
    }
    with pytest.raises(error):
        calls[operation]()
    assert memory.get("k").data == DATA


def test_corruption_is_one_bit_of_what_was_read():
    """What get and read_into give differs from the truth in a single bit, the stored object not at all."""
    store, memory = faulty(Fault("corrupt", times=2))
    target = bytearray(100)
    store.read_into("k", memoryview(target))
    for read in (store.get("k").data, target):
        assert sum((a ^ b).bit_count() for a, b in zip(read, DATA, strict=True)) == 1
    assert memory.get("k").data == store.get("k").data == DATA


def test_truncation_cuts_a_get_and_fails_a_range():
    """A truncated get is half the object; a truncated range is what the contract says of an object that is too short."""
    store, _ = faulty(Fault("truncate", times=2))
    assert store.get("k").data == DATA[:50]
    with pytest.raises(BlobCorruptError):
        store.read_into("k", memoryview(bytearray(100)))


def test_corruption_waits_for_a_read():
    """A fault of what is read is not used up by calls that read nothing."""
    store, _ = faulty(Fault("corrupt"))
    store.put("k", DATA)
    store.head("k")
    assert store.get("k").data != DATA


def test_a_hang_takes_its_time_and_fails():
    """The call sleeps on the store's clock, then fails as a timeout would."""
    clock = FakeClock()
    store, _ = faulty(Fault("hang", "get", seconds=12.0), clock=clock)
    with pytest.raises(StoreTransientError):
        store.get("k")
    assert clock.slept == [12.0]


def test_a_listing_breaks_off_in_the_middle():
    """A fault after a listing has begun gives some of it first."""
    store, memory = faulty(Fault("transient_after", "list"))
    memory.put("l", b"")
    listing = store.list("")
    assert next(listing).key == "k"
    with pytest.raises(StoreTransientError):
        next(listing)


def test_a_seed_repeats_its_faults():
    """Faults by probability are the same for the same seed, and others for another."""

    def faults_of(seed: int) -> list[str]:
        store, _ = faulty(Fault("corrupt", times=None, probability=0.3), seed=seed)
        return [store.get("k").data.hex() for _ in range(50)]

    struck = [data != DATA.hex() for data in faults_of(1)]
    assert 5 < sum(struck) < 30
    assert faults_of(1) == faults_of(1) != faults_of(2)


def test_faults_come_and_go_while_it_runs():
    """Faults can be added to a store in use, and all be taken away."""
    store, _ = faulty()
    store.inject(Fault("denied", times=None))
    with pytest.raises(AccessDeniedError):
        store.get("k")
    store.heal()
    assert store.get("k").data == DATA


def test_latency_is_paid_by_every_call():
    """Six operations of a quarter of a second take one and a half."""
    clock = FakeClock()
    store = LatencyStore(MemoryStore(), latency_seconds=0.25, clock=clock)
    store.put("k", DATA)
    store.get("k")
    store.read_into("k", memoryview(bytearray(1)))
    store.head("k")
    list(store.list(""))
    store.delete("k")
    assert clock.monotonic() == 1.5


def test_bytes_wait_for_the_bytes_before_them():
    """The link carries its rate: what several threads move at once takes as long as one after the other."""
    clock = FakeClock()
    store = LatencyStore(MemoryStore(), bytes_per_second=100.0, clock=clock)
    store.put("k", bytes(200))
    assert clock.monotonic() == pytest.approx(2.0)
    store.read_into("k", memoryview(bytearray(50)))
    assert clock.monotonic() == pytest.approx(2.5)
    store.get("k")
    assert clock.monotonic() == pytest.approx(4.5)

    together = threading.Barrier(4)

    class Waiting(FakeClock):
        def sleep(self, seconds: float) -> None:
            if seconds:
                together.wait(timeout=60)  # all have taken their place on the link before any time passes
                self.slept.append(seconds)

    clock = Waiting()
    store = LatencyStore(MemoryStore(), bytes_per_second=100.0, clock=clock)
    threads = [threading.Thread(target=store.put, args=(f"k{number}", bytes(100))) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(clock.slept) == pytest.approx([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("wrapper", [FaultyStore, LatencyStore])
def test_wrappers_speak_for_what_they_wrap(wrapper: type):
    """Address and capabilities are the wrapped store's, and closing reaches it."""
    closed = []

    class Closing(MemoryStore):
        def close(self) -> None:
            closed.append(self)

    inner = Closing("name")
    store = wrapper(inner)
    store.close()
    assert (store.url, store.capabilities, closed) == (inner.url, inner.capabilities, [inner])


def test_the_clock_moves_only_when_told():
    """Sleeping and advancing move both of its times together; only sleeps are noted."""
    clock = FakeClock(unix_seconds=1000.0)
    assert (clock.monotonic(), clock.time()) == (0.0, 1000.0)
    clock.sleep(2.0)
    clock.advance(3.0)
    assert (clock.monotonic(), clock.time(), clock.slept) == (5.0, 1005.0, [2.0])


def test_the_names_are_there_and_are_all():
    """Every public name can be imported, the list is sorted, and another name is an AttributeError."""
    assert coldstart.testing.__all__ == sorted(coldstart.testing.__all__)
    assert all(getattr(coldstart.testing, name).__name__ == name for name in coldstart.testing.__all__)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        coldstart.testing.nothing_of_this_name


def test_fakes_need_no_pytest():
    """In a process where pytest cannot be imported, the faulty store works."""
    script = (
        "import sys; sys.modules['pytest'] = None; from coldstart.testing import FaultyStore, FakeClock, LatencyStore"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
