"""The ring: chunks pass from fetchers to who copies, whoever they are, and no slot is lost."""

from __future__ import annotations

import os
import threading

import pytest

from coldstart.config import PINNED_BYTES
from coldstart.errors import DeviceError, SnapshotError
from coldstart.fetch.ring import MINIMUM_SLOTS, MOST_SLOTS, Filled, Ring, RingFiles, shape_of
from coldstart.manifest import Chunk, Segment
from tests.generations import manifest_of

PATIENCE_SECONDS = 30.0


@pytest.fixture
def ring():
    """A ring of three slots of a page."""
    made = Ring.make(4096, 3)
    yield made
    made.stop()
    made.close()


def chunks_of(*sizes: tuple[int, int]):
    """A manifest of chunks with these stored and raw lengths."""
    rows, offset = [], 0
    for number, (stored, raw) in enumerate(sizes):
        blob = f"{number:064x}"
        rows.append(Chunk(0, offset, raw, blob, "zstd", {}, blob, stored))
        offset += raw
    return manifest_of(segments=(Segment(1, "weights", "eager", offset),), chunks=tuple(rows))


def test_what_is_handed_over_is_what_is_taken(ring):
    """A filled slot shows its bytes to who copies, with the chunk's number and its form."""
    slot, epoch = ring.take()
    ring.slot(slot, 5)[:] = b"chunk"
    ring.hand_over(slot, epoch, 7, is_raw=True)
    assert ring.filled(4) == [Filled(slot, 7, is_raw=True)]
    assert bytes(ring.slot(slot, 5)) == b"chunk"


def test_a_slot_is_nobody_elses_until_it_is_released(ring):
    """All slots are handed out once; the next one to take a slot waits until one is released."""
    taken = [ring.take() for _ in range(3)]
    assert {slot for slot, _ in taken} == {0, 1, 2}
    got = []
    waiting = threading.Thread(target=lambda: got.append(ring.take()[0]), daemon=True)
    waiting.start()
    ring.hand_over(*taken[1], 0, is_raw=False)
    (filled,) = ring.filled(4)
    assert not got
    ring.release([filled.slot])
    waiting.join(PATIENCE_SECONDS)
    assert got == [taken[1][0]]


def test_several_are_taken_at_once_and_no_more_than_asked_for(ring):
    """Who copies takes what has come by then, in its order, up to a number."""
    for number in range(3):
        ring.hand_over(*ring.take(), number, is_raw=False)
    assert [filled.chunk for filled in ring.filled(2)] == [0, 1]
    assert [filled.chunk for filled in ring.filled(2)] == [2]


@pytest.mark.parametrize("filled", [0, 1, 2])
def test_waking_loses_nothing(ring, filled):
    """Who is woken has taken everything that was handed over before, then hears of it once."""
    for number in range(filled):
        ring.hand_over(*ring.take(), number, is_raw=False)
    ring.wake()
    taken = []
    while group := ring.filled(2):
        taken += [each.chunk for each in group]
    assert taken == list(range(filled))
    ring.hand_over(*ring.take(), 9, is_raw=False)
    assert [each.chunk for each in ring.filled(2)] == [9]


def test_what_a_dead_fetcher_held_is_free_again(ring):
    """After a recovery every slot can be taken but those that are being copied, and what was handed over before is ignored."""
    held = ring.take()
    ring.hand_over(*held, 0, is_raw=False)
    (copying,) = ring.filled(1)
    ring.hand_over(*ring.take(), 1, is_raw=False)  # handed over, not taken: its fetcher's word does not count any more
    ring.take()  # and one that died with it
    ring.recover()
    taken = [ring.take() for _ in range(2)]
    assert {slot for slot, _ in taken} == {0, 1, 2} - {copying.slot}
    ring.hand_over(*taken[0], 2, is_raw=False)
    assert [filled.chunk for filled in ring.filled(4)] == [2]
    ring.release([copying.slot])
    assert ring.take()[0] == copying.slot


def test_stopping_tells_everybody(ring):
    """Whoever waits for a slot fails, and who copies takes nothing more."""
    taken = [ring.take() for _ in range(3)]
    failed = []

    def fetch():
        with pytest.raises(SnapshotError):
            ring.take()
        failed.append(True)

    waiting = threading.Thread(target=fetch, daemon=True)
    waiting.start()
    ring.hand_over(*taken[0], 0, is_raw=False)
    ring.stop()
    waiting.join(PATIENCE_SECONDS)
    assert failed
    assert ring.filled(4) == []
    ring.release([taken[0][0]])  # what was under way may still end


def test_a_ring_that_was_stopped_is_not_recovered(ring):
    """A fetcher that dies beside a failed copy leaves nothing to take up again: whoever would do its work hears of the stop."""
    ring.stop()
    with pytest.raises(SnapshotError, match="stopped"):
        ring.recover()


def test_another_process_shares_slots_and_records(ring):
    """Through the descriptors another hold on the ring sees the same bytes, and hears when the owner stops."""
    other = Ring(RingFiles(*map(os.dup, ring.files)), 4096, 3)
    other.take_no_more()
    slot, epoch = other.take()
    other.slot(slot, 3)[:] = b"abc"
    other.hand_over(slot, epoch, 4, is_raw=False)
    (filled,) = ring.filled(1)
    assert bytes(ring.slot(filled.slot, 3)) == b"abc"
    other.take()
    other.take()
    ring.stop()
    with pytest.raises(SnapshotError):
        other.take()
    other.close()


@pytest.mark.parametrize(
    ("sizes", "ring_bytes", "expected"),
    [
        ([(10, 20)], PINNED_BYTES, (4096, MINIMUM_SLOTS)),
        ([(5000, 20)] * 3, PINNED_BYTES, (8192, 4)),
        ([(16 << 20, 16 << 20)] * 40, PINNED_BYTES, (16 << 20, 16)),
        ([(1000, 1000)] * 5000, PINNED_BYTES, (4096, MOST_SLOTS)),
        ([(16 << 20, 16 << 20)] * 40, 1, (16 << 20, MINIMUM_SLOTS)),
    ],
)
def test_a_slot_has_room_for_any_chunk(sizes, ring_bytes, expected):
    """Slots are as large as the largest chunk, stored or raw, in whole pages; there are two at least and no useless ones."""
    assert shape_of(chunks_of(*sizes), ring_bytes) == expected


def test_no_chunks_have_a_ring_too():
    """A snapshot without bytes has a shape."""
    assert shape_of(manifest_of(), PINNED_BYTES) == (4096, MINIMUM_SLOTS)


def test_a_system_without_such_memory_is_told(monkeypatch):
    """Where no memory can be shared the device's error says so, and no descriptor is left open."""

    def refuse(*_):
        raise OSError("no more")

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "pipe2", refuse)
    with pytest.raises(DeviceError, match="no more"):
        Ring.make(4096, 2)
    assert set(os.listdir("/proc/self/fd")) == before
