"""Probing: what a server enforces is found out by the first conditional write, said once, and never by a reader."""

from __future__ import annotations

from itertools import pairwise

import pytest

from coldstart import events
from coldstart.early import Services, opener_of_start
from coldstart.errors import AccessDeniedError, StateChangedError, StoreSetupError, StoreTransientError
from coldstart.repository import Repository
from coldstart.stores.base import Capabilities, StoreWrapper
from coldstart.stores.memory import MemoryStore
from coldstart.stores.probing import ProbingStore, probe
from coldstart.testing import FakeClock, Fault, FaultyStore
from tests.generations import KEY, manifest_of, publish
from tests.ignoring_store import Ignoring

ALL = Capabilities(create_if_absent=True, compare_and_swap=True, ranges=True)


def test_a_probe_finds_what_is_enforced_and_leaves_nothing():
    """A store that does all is found to; the probe's object is gone."""
    store = MemoryStore()
    assert probe(store).capabilities == ALL
    assert list(store.list("")) == []


@pytest.mark.parametrize("ignored", ["create_if_absent", "compare_and_swap"])
def test_a_condition_that_is_ignored_is_found(ignored):
    """One that a server takes without a word and does not enforce is not claimed, and the other is."""
    assert probe(Ignoring(MemoryStore(), (ignored,))).capabilities == ALL._replace(**{ignored: False})


def test_wrong_ranges_are_found():
    """A server that answers a range with something else gives no ranges."""
    assert probe(Ignoring(MemoryStore(), (), whole_ranges=True)).capabilities == ALL._replace(ranges=False)


class Refusing(StoreWrapper):
    """A server that answers every conditional write with 501."""

    def put(self, key, data, *, if_absent=False, if_match=None):
        if if_absent or if_match is not None:
            raise StoreSetupError("501", key=key)
        return self._store.put(key, data)


class Never(StoreWrapper):
    """A server on which no If-Match ever matches."""

    def put(self, key, data, *, if_absent=False, if_match=None):
        return self._store.put(key, data, if_absent=if_absent, if_match=None if if_match is None else "never")


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        (Refusing, ALL._replace(create_if_absent=False, compare_and_swap=False)),
        (Never, ALL._replace(compare_and_swap=False)),
    ],
)
def test_a_condition_that_cannot_be_used_is_not_claimed(server, expected):
    """Neither one that the server does not know, nor a swap that never takes effect."""
    assert probe(server(MemoryStore())).capabilities == expected


@pytest.mark.parametrize("ahead_seconds", [-400.0, 0.0, 400.0])
def test_the_stores_clock_is_compared(ahead_seconds):
    """The skew is that of the store's time of writing against this machine's."""
    clock = FakeClock()
    store = MemoryStore(clock=lambda: clock.time() + ahead_seconds)
    assert probe(store, clock=clock.time).skew_seconds == pytest.approx(ahead_seconds)


def watched(store):
    """A probing store over a store whose calls are listed, with what it is told."""
    faulty, told = FaultyStore(store), []
    return ProbingStore(faulty, identity="bucket", degraded=told.append), faulty, told


def test_a_reader_does_not_probe():
    """Reads, heads, listings and plain writes cause no request of their own."""
    store, faulty, _ = watched(MemoryStore())
    store.put("k", b"12")
    store.get("k")
    store.head("k")
    store.read_into("k", memoryview(bytearray(2)))
    list(store.list(""))
    assert [call.operation for call in faulty.calls] == ["put", "get", "head", "read_into", "list"]


def test_a_probe_is_made_once_a_process():
    """The second conditional write, and another opening of the same bucket, know already; another bucket does not."""
    inner = MemoryStore()
    for expected in (1, 0):
        store, faulty, _ = watched(inner)
        store.put(f"k{expected}", b"", if_absent=True)
        store.put(f"l{expected}", b"", if_absent=True)
        assert bool(faulty.count("put", "probes/*")) == expected
    other = FaultyStore(inner)
    ProbingStore(other, identity="another").put("other", b"", if_absent=True)
    assert other.count("put", "probes/*")


def test_a_server_that_ignores_conditions_is_used_without_and_says_so_once():
    """Nothing is claimed, no condition is sent any more, and there is one reason with a remedy."""
    ignoring = Ignoring(MemoryStore())
    store, _, told = watched(ignoring)
    assert store.capabilities == ALL
    store.put("k", b"1", if_absent=True)
    sent = ignoring.conditions
    store.put("k", b"2", if_absent=True)
    store.put("k", b"3", if_match="anything")
    assert (ignoring.conditions, store.get("k").data) == (sent, b"3")
    assert store.capabilities == ALL._replace(create_if_absent=False, compare_and_swap=False)
    (reason,) = told
    assert "create-if-absent and compare-and-swap" in reason


def test_every_opening_says_it():
    """Another opening of a bucket of which it is known says it too, to whoever listens there."""
    inner = Ignoring(MemoryStore())
    for _ in range(2):
        store, _, told = watched(inner)
        store.put("k", b"", if_absent=True)
        store.put("k", b"", if_absent=True)
        assert len(told) == 1


def test_what_another_process_found_is_taken_over():
    """A writer in a process of its own tells what it found, and it is said here, once, without a request."""
    store, faulty, told = watched(MemoryStore())
    store.learn(ALL._replace(compare_and_swap=False))
    store.learn(ALL._replace(compare_and_swap=False))
    assert not store.capabilities.compare_and_swap
    assert (len(told), faulty.calls) == (1, [])


def test_a_credential_that_may_not_probe_writes_all_the_same():
    """Where the probe's own object is refused, the store's claims have to do."""
    store, faulty, told = watched(MemoryStore())
    faulty.inject(Fault("denied", "put", "probes/*", times=None))
    store.put("k", b"1", if_absent=True)
    assert (store.get("k").data, store.capabilities, told) == (b"1", ALL, [])


def test_a_credential_that_may_not_delete_probes_all_the_same():
    """The probe's object stays, and nothing else is different."""
    faulty = FaultyStore(MemoryStore(), [Fault("denied", "delete")])
    assert probe(faulty).capabilities == ALL


def test_a_probe_that_fails_is_made_again():
    """A server in trouble is not taken for one that enforces nothing: the write fails, and the next one probes anew."""
    store, faulty, told = watched(MemoryStore())
    faulty.inject(Fault("transient_before", "put", "probes/*"))
    with pytest.raises(StoreTransientError):
        store.put("k", b"1", if_absent=True)
    store.put("k", b"1", if_absent=True)
    assert (store.capabilities, told) == (ALL, [])


def test_publishing_without_swaps_looks_again():
    """On a store without compare-and-swap a writer that can see that it lost does not overwrite the winner."""
    store, _, _ = watched(Ignoring(MemoryStore()))
    repository = Repository(store)
    before = repository.look_up("model", KEY)
    ours = manifest_of("model", 1, KEY)
    key = repository.put_manifest(ours)
    theirs = publish(repository)
    with pytest.raises(StateChangedError):
        repository.publish(ours, key, replaces=before)
    assert repository.look_up("model", KEY).ref == theirs


def test_an_object_is_written_once_a_second_where_no_more_is_taken():
    """Between two writes of one object, refused ones among them, there is a pause: R2 answers 429 to more than one a second."""
    clock = FakeClock()
    faulty = FaultyStore(MemoryStore())
    written: dict[str, list[float]] = {}
    put = faulty.put

    def timed(key, data, **options):
        written.setdefault(key, []).append(clock.monotonic())
        return put(key, data, **options)

    faulty.put = timed
    assert probe(faulty, pause=lambda: clock.sleep(1.1)).capabilities == ALL
    times = list(written.values())
    assert all(later - earlier > 1 for each in times for earlier, later in pairwise(each))
    assert sum(map(len, times)) == 5


def test_moto_enforces_all(s3_bucket, s3_options):
    """Against an S3 server: all is enforced, its clock is ours, and nothing is left."""
    from coldstart.stores import open_store

    store = open_store(f"s3://{s3_bucket}/some/prefix", s3_options)
    found = probe(store)
    assert found.capabilities == ALL
    assert abs(found.skew_seconds) < 60
    assert list(store.list("")) == []
    store.close()


def test_a_start_says_it_as_one_event(s3_bucket, s3_options, monkeypatch):
    """The event of a start names the handler and what its store ignores; a bucket's conditions are taken away under it."""
    from coldstart.config import load
    from coldstart.stores.s3 import S3Store

    put = S3Store.put
    monkeypatch.setattr(S3Store, "put", lambda self, key, data, **_: put(self, key, data))
    keys = ("endpoint_url", "region", "access_key_id", "secret_access_key")
    settings = load(store=f"s3://{s3_bucket}", **{key: getattr(s3_options, key) for key in keys})
    bus, seen = events.EventBus(), []
    bus.subscribe(seen.append)
    repository = opener_of_start("scales", Services(settings, serving=True, pinned={}, bus=bus))()
    publish(repository)
    publish(repository)
    (event,) = seen
    assert (type(event), event.name) == (events.StoreDegraded, "scales")
    assert "compare-and-swap" in event.reason
    repository.store.close()


def test_denied_is_no_capability():
    """A credential without the right to write fails its write, whatever could be probed."""
    store, faulty, _ = watched(MemoryStore())
    faulty.inject(Fault("denied", "put", times=None))
    with pytest.raises(AccessDeniedError):
        store.put("k", b"1", if_absent=True)
