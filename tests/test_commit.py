"""The last look at a generation before its ref moves, the pace of ref writes, rollback, and the store's clock."""

from __future__ import annotations

import numpy as np
import pytest

from coldstart.capture import Encoding, Writing
from coldstart.commit import confirm, has_to_settle
from coldstart.errors import (
    BlobCorruptError,
    CaptureError,
    ObjectMissingError,
    PublishUnknownError,
    StateChangedError,
    UsageError,
)
from coldstart.leases import COLLECTOR, LEASE_SECONDS, Holder, Leases
from coldstart.manifest import blob_key, ref_from_json, ref_key, tombstone_from_json
from coldstart.repository import COLLECTION_GRACE_SECONDS, Repository
from coldstart.rollback import roll_back
from coldstart.stores.memory import MemoryStore
from coldstart.testing import FakeClock, Fault, FaultyStore
from tests.generations import KEY, OTHER_KEY, capture_of, hash_of, publish, restored, write

REF = ref_key("model", KEY.digest)


class Remote(MemoryStore):
    """A bucket: what others than this machine write to, by a clock of its own."""

    @property
    def url(self) -> str:
        return "s3://bucket"


@pytest.fixture
def clock():
    """The time of the store and of everyone who uses it."""
    return FakeClock()


@pytest.fixture
def store(clock):
    """The store, which a test may let fail."""
    return FaultyStore(MemoryStore(clock=clock.time))


@pytest.fixture
def repository(store, clock):
    """The snapshots in it."""
    return Repository(store, clock=clock.time, sleep=clock.sleep)


def state(number: int) -> dict:
    """A state of one array that all numbers share and one of this number."""
    return {"same": np.arange(9 << 17, dtype=np.float64), "new": np.full(50, number)}


# --- the last look ---------------------------------------------------------------------------------------------------


def test_a_whole_generation_is_confirmed(repository, store) -> None:
    """The length of every new blob is asked for, and one of them at least is read back."""
    written = write(capture_of(state(1)), repository)
    before = store.count("head"), store.count("get", "blobs/*")
    confirm(repository, written.manifest, written.manifest_key, replaced=None)
    blobs = {chunk.blob for chunk in written.manifest.chunks}
    assert store.count("head") - before[0] == len(blobs) + 1
    assert store.count("get", "blobs/*") - before[1] >= 1


def test_what_the_replaced_generation_names_is_not_looked_at(repository, store) -> None:
    """Blobs that are live until the swap cost nothing: only new ones are asked for."""
    first = write(capture_of(state(1)), repository)
    second = write(capture_of(state(2), follows=first), repository)
    before = len(store.calls)
    confirm(repository, second.manifest, second.manifest_key, replaced=first.manifest)
    looked_at = {call.key for call in store.calls[before:] if call.operation == "head"} - {second.manifest_key}
    known = {blob_key(chunk.blob) for chunk in first.manifest.chunks}
    assert known & {blob_key(chunk.blob) for chunk in second.manifest.chunks}
    assert looked_at == {blob_key(chunk.blob) for chunk in second.manifest.chunks} - known


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda store, key, data: store.delete(key), ObjectMissingError),
        (lambda store, key, data: store.put(key, data[:-1]), BlobCorruptError),
        (lambda store, key, data: store.put(key, data + b"x"), BlobCorruptError),
        (lambda store, key, data: store.put(key, bytes(len(data))), BlobCorruptError),
    ],
    ids=["gone", "shorter", "longer", "other bytes"],
)
def test_what_the_store_lost_is_found(repository, store, spoil, error) -> None:
    """A blob that is not there as it was written keeps the generation from becoming current."""
    written = write(capture_of({"w": np.arange(100.0)}), repository)
    (blob,) = {chunk.blob for chunk in written.manifest.chunks}
    spoil(store, blob_key(blob), store.get(blob_key(blob)).data)
    with pytest.raises(error):
        confirm(repository, written.manifest, written.manifest_key, replaced=None)


def test_a_lost_manifest_is_found(repository, store) -> None:
    """A manifest that went keeps its ref from being written."""
    written = write(capture_of(state(1)), repository)
    store.delete(written.manifest_key)
    with pytest.raises(ObjectMissingError):
        confirm(repository, written.manifest, written.manifest_key, replaced=None)


def test_a_capture_that_took_a_day_is_made_again(repository, clock) -> None:
    """What is older than three quarters of the grace could be collected before the swap, so it is not relied on."""
    written = write(capture_of(state(1)), repository)
    clock.advance(0.74 * COLLECTION_GRACE_SECONDS)
    confirm(repository, written.manifest, written.manifest_key, replaced=None)
    clock.advance(0.02 * COLLECTION_GRACE_SECONDS)
    with pytest.raises(StateChangedError, match="capture again"):
        confirm(repository, written.manifest, written.manifest_key, replaced=None)


# --- blobs that may be under deletion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age_seconds", "is_settled"),
    [(None, True), (1.0, False), (119.0, False), (121.0, True), (COLLECTION_GRACE_SECONDS / 2, False)],
)
def test_which_blobs_are_settled(clock, age_seconds, is_settled) -> None:
    """New blobs are, and those that were young for a while; one that was old, or may have been a moment ago, is not."""
    remote = Remote(clock=clock.time)
    data = np.arange(128.0)  # all of its segment
    blob = hash_of(memoryview(data).cast("B"))
    if age_seconds is not None:
        remote.put(blob_key(blob), memoryview(data).cast("B"))
        clock.advance(age_seconds)
    written = write(capture_of({"w": data}), Repository(remote, clock=clock.time, sleep=clock.sleep))
    assert written.unsettled == (frozenset() if is_settled else {blob})


def test_an_unsettled_blob_is_waited_for(clock) -> None:
    """The last look is two minutes after the writing of such a blob, and does not outlast the worker."""
    import threading

    remote = Remote(clock=clock.time)
    repository = Repository(remote, clock=clock.time, sleep=clock.sleep)
    data = np.arange(128.0)  # all of its segment
    repository.put_blob(hash_of(memoryview(data).cast("B")), memoryview(data).cast("B"))
    Leases(repository, Holder("elsewhere", 1)).take(COLLECTOR)
    waits = []

    class Stopping(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return super().wait(0)

    stopping = Stopping()
    writing = Writing(capture_of({"w": data}), repository, encoding=Encoding("raw", 1), stopping=stopping)
    written = writing.write(lambda: None)
    writing.confirm(written)
    assert 100 < waits[-1] <= 120
    stopping.set()
    with pytest.raises(CaptureError, match="the worker ended"):
        writing.confirm(written)


@pytest.mark.parametrize(
    ("past", "waits"), [("none", False), ("at work", True), ("just over", True), ("long over", False), ("killed", True)]
)
def test_a_blob_is_unsettled_only_while_a_collector_may_delete(clock, past, waits) -> None:
    """Nothing is waited for where no collector has been at work for two minutes; one that never let go may still be."""
    remote = Remote(clock=clock.time)
    repository = Repository(remote, clock=clock.time, sleep=clock.sleep)
    leases = Leases(repository, Holder("elsewhere", 1))
    if past != "none":
        lease = leases.take(COLLECTOR)
        if past.endswith("over"):
            leases.release(lease)
        clock.advance({"long over": 121, "killed": 2 * LEASE_SECONDS}.get(past, 1))
    assert has_to_settle(repository, {"a blob"}, parent=None, parent_key="") is waits


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_live_parent_s_blobs_are_settled(clock, monkeypatch, is_deleted) -> None:
    """What a generation of another key has is waited for only if that is live no more: a changed handler publishes at once."""
    remote = Remote(clock=clock.time)
    repository = Repository(remote, clock=clock.time, sleep=clock.sleep)
    Leases(repository, Holder("elsewhere", 1)).take(COLLECTOR)
    first = write(capture_of(state(1)), repository)
    repository.publish(first.manifest, first.manifest_key, replaces=repository.look_up("model", KEY))
    changed = capture_of(state(1), follows=first, key=OTHER_KEY, generation=1)
    if is_deleted:
        repository.delete("model", KEY.digest)
    waits = []
    writing = Writing(changed, repository, encoding=Encoding("raw", 1))
    monkeypatch.setattr(writing._stopping, "wait", waits.append)
    written = writing.write(lambda: None)
    assert written.written_bytes == 0
    writing.confirm(written)
    assert len(waits) == is_deleted


# --- the ref ---------------------------------------------------------------------------------------------------------------


def test_an_unreadable_read_back_has_an_error_of_its_own(repository, store) -> None:
    """Who cannot find out what became of the swap says so, with both failures in the text."""
    seen = repository.look_up("model", KEY)
    store.inject(Fault("transient_after", "put", key=REF), Fault("denied", "get", key=REF))
    with pytest.raises(PublishUnknownError, match=r"not known.*answer.*lost.*may not be touched"):
        publish(repository, replaces=seen, generation=1)


@pytest.mark.parametrize("since_seconds", [0.0, 0.4, 1.0, 60.0, -5.0])
def test_a_bucket_s_ref_is_written_once_a_second(clock, since_seconds) -> None:
    """The next write of a ref waits until a second has passed since the last one, whoever wrote it."""
    repository = Repository(Remote(clock=clock.time), clock=clock.time, sleep=clock.sleep)
    publish(repository)
    clock.advance(since_seconds)
    began = clock.time()
    publish(repository)
    waited = clock.time() - began
    assert waited == pytest.approx(min(1.0, max(0.0, 1.0 - since_seconds)), abs=0.01) or since_seconds < 0.0


def test_ages_are_told_by_the_store_s_clock(clock) -> None:
    """A machine whose clock is a day off relies on the same blobs as any other."""
    remote = Remote(clock=clock.time)
    for skew_seconds in (-86_400.0, 0.0, 86_400.0):
        repository = Repository(remote, clock=lambda skew=skew_seconds: clock.time() + skew, sleep=clock.sleep)
        blob = hash_of(b"%f" % skew_seconds)
        repository.put_blob(blob, b"blob")
        assert repository.has_blob(blob, 4)
        clock.advance(0.6 * COLLECTION_GRACE_SECONDS)
        assert not repository.has_blob(blob, 4)


def test_the_ref_names_what_is_kept(repository, store) -> None:
    """Every generation stays named, the newest first, each with its time; 64 before the current one at most."""
    refs = [publish(repository) for _ in range(70)]
    current = ref_from_json(store.get(REF).data)
    assert [entry.generation for entry in current.named] == list(range(70, 5, -1))
    assert [entry.manifest for entry in current.named] == [ref.manifest for ref in reversed(refs[5:])]


def test_a_number_is_never_given_twice(repository, store) -> None:
    """After a rollback and after a deletion, of a damaged ref too, numbers go on; a stale writer cannot give one again."""
    never = repository.look_up("model", KEY)
    publish(repository)
    publish(repository)
    assert roll_back(repository, "model", KEY).generation == 3
    repository.delete("model")
    assert publish(repository).generation == 4
    store.put(REF, b"{}")
    repository.delete("model")
    with pytest.raises(StateChangedError):
        publish(repository, replaces=never, generation=1)
    assert publish(repository).generation > 4


def test_a_tombstone_says_what_was_deleted(repository, store) -> None:
    """It keeps the number and what was named, and no reader takes it for a ref."""
    refs = [publish(repository) for _ in range(2)]
    repository.delete("model", KEY.digest)
    tombstone = tombstone_from_json(store.get(REF).data)
    assert tombstone is not None
    assert (tombstone.name, tombstone.key, tombstone.generation) == ("model", KEY, 2)
    assert [entry.manifest for entry in tombstone.history] == [refs[1].manifest, refs[0].manifest]
    assert repository.look_up("model", KEY).ref is None


def test_a_collector_s_bookkeeping_is_no_conflict(repository, store, clock) -> None:
    """A writer whose ref only forgot older generations meanwhile swaps it again; one whose parent went loses."""
    old = publish(repository)
    publish(repository)
    seen = repository.look_up("model", KEY)
    assert Repository(store, clock=clock.time).forget(REF, {old.manifest})
    ref = publish(repository, replaces=seen)
    assert [entry.generation for entry in ref.named] == [3, 2]


# --- rollback ----------------------------------------------------------------------------------------------------------------


def test_rollback_makes_the_one_before_current(repository) -> None:
    """The earlier state restores under a new number; what was current stays, and the next rollback goes back to it."""
    first = write(capture_of(state(1)), repository)
    repository.publish(first.manifest, first.manifest_key, replaces=repository.look_up("model", KEY))
    second = write(capture_of(state(2), follows=first), repository)
    repository.publish(second.manifest, second.manifest_key, replaces=repository.look_up("model", KEY))
    for generation, number in ((3, 1), (4, 2)):
        ref = roll_back(repository, "model", KEY)
        assert ref.generation == generation
        manifest = repository.manifest(ref.manifest, name="model")
        assert set(restored(manifest, repository.store)["new"]) == {number}
    assert roll_back(repository, "model", KEY, 1).generation == 5


def test_rollback_to_what_is_not_there_is_refused(repository) -> None:
    """No snapshot, no generation before, and one that is not kept are each told with what there is."""
    with pytest.raises(UsageError, match="no snapshot 'model'"):
        roll_back(repository, "model", KEY)
    publish(repository)
    with pytest.raises(UsageError, match="there is none before generation 1"):
        roll_back(repository, "model", KEY)
    publish(repository)
    with pytest.raises(UsageError, match="generation 7 is not kept before generation 2 of 'model'; kept are: 1"):
        roll_back(repository, "model", KEY, 7)
    assert repository.look_up("model", OTHER_KEY).ref is None
