"""What the memory store has beyond the contract."""

from __future__ import annotations

from coldstart.stores.base import Capabilities
from coldstart.stores.memory import MemoryStore
from coldstart.testing import FakeClock


def test_ages_come_from_the_clock_it_was_given():
    """Objects are as old as the store's own clock says, so that tests of a collector need not wait."""
    clock = FakeClock(unix_seconds=1000.0)
    store = MemoryStore(clock=clock.time)
    store.put("old", b"")
    clock.advance(500.0)
    store.put("new", b"")
    assert {info.key: info.modified_seconds for info in store.list("")} == {"old": 1000.0, "new": 1500.0}


def test_it_claims_what_it_was_told_to():
    """A test can have a store that enforces only one of the conditions."""
    only_create = Capabilities(create_if_absent=True, compare_and_swap=False, ranges=True)
    store = MemoryStore(capabilities=only_create)
    store.put("k", b"1")
    store.put("k", b"2", if_match="of nothing")
    assert store.capabilities == only_create
    assert store.get("k").data == b"2"


def test_the_same_bytes_written_twice_have_two_etags():
    """An etag is of a write, not of its content: a swap never mistakes one for the other."""
    store = MemoryStore()
    assert store.put("k", b"same") != store.put("k", b"same")
