"""How many reads are under way: when more are tried, and when that ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coldstart.fetch.width import FIRST_READS, Width
from coldstart.testing import FakeClock

CHUNK_BYTES = 4 << 20


def reads_after(rate_of, *, most=64, first=FIRST_READS, finished=5000):
    """The reads that a fetch ends with if ``rate_of(reads)`` is the store's rate in bytes a second."""
    clock = FakeClock()
    width = Width(most=most, first=first, clock=clock.monotonic)
    seen = [width.reads]
    for _ in range(finished):
        clock.sleep(CHUNK_BYTES / rate_of(width.reads))
        seen.append(width.finished(CHUNK_BYTES))
    assert seen == sorted(seen)
    return seen[-1]


def test_reads_grow_while_each_brings_its_share():
    """Where every connection adds the same, there are soon as many as may be."""
    assert reads_after(lambda reads: reads * 3e6) == 64


def test_a_full_link_gets_no_more_than_one_step():
    """Where more reads bring nothing, one step is tried and the fetch stays there."""
    assert reads_after(lambda _: 50e6) == 24


def test_reads_stop_growing_where_the_link_is_full():
    """Growth ends one step after the rate stops rising."""
    assert reads_after(lambda reads: min(reads, 30) * 3e6) == 54


def test_a_short_fetch_stays_as_it_began():
    """No rate is believed before half a second has passed."""
    assert reads_after(lambda _: 1e9, finished=64) == FIRST_READS


@given(most=st.integers(1, 100), first=st.integers(1, 100), gain=st.floats(0.5, 3.0))
def test_the_limit_holds(most, first, gain):
    """Never more than ``most``, never fewer than at first."""
    reads = reads_after(lambda reads: 1e6 * reads**gain, most=most, first=first, finished=400)
    assert min(first, most) <= reads <= most
