"""Retention and collection: what is kept, what goes, and what is never touched."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress

import numpy as np
import pytest

from coldstart.cli import main
from coldstart.collect import Rules, collect
from coldstart.errors import AccessDeniedError, CollectionRefusedError, StoreTransientError, UsageError
from coldstart.leases import COLLECTOR, Holder, Leases
from coldstart.manifest import Published, blob_key, manifest_key, newest_ref_key, ref_key
from coldstart.repository import COLLECTION_GRACE_SECONDS, Repository
from coldstart.retention import Retention, expired
from coldstart.segments import segment_names
from coldstart.stores.local import LocalStore
from coldstart.stores.memory import ALL_CAPABILITIES, MemoryStore
from coldstart.stores.retrying import RetryingStore
from coldstart.testing import FakeClock, Fault, FaultyStore
from tests.generations import KEY, OTHER_KEY, capture_of, hash_of, publish, restored, write

DAY = 86_400.0
NOW = 20_000 * DAY + 3600.0
GRACE = COLLECTION_GRACE_SECONDS
REF = ref_key("model", KEY.digest)
LAST = Rules(Retention(last=1))


@pytest.fixture
def clock():
    """The time of the store and of everyone who uses it."""
    return FakeClock()


@pytest.fixture
def memory(clock):
    """The objects themselves."""
    return MemoryStore(clock=clock.time)


@pytest.fixture
def store(memory):
    """The store, which a test may let fail."""
    return FaultyStore(memory)


@pytest.fixture
def repository(store, clock):
    """The snapshots in it."""
    return Repository(store, clock=clock.time, sleep=clock.sleep)


def generation(repository, number, *, key=KEY):
    """Publish a generation whose one blob no other has; its manifest."""
    seen = repository.look_up("model", key)
    follows = capture_of(
        {"w": np.full(100, number)}, key=key, generation=repository.next_generation("model", key, seen.ref)
    )
    written = write(follows, repository)
    repository.publish(written.manifest, written.manifest_key, replaces=seen)
    return written


def keys(store, kind):
    """The keys of all objects of a kind."""
    return {info.key for info in store.list(kind)}


# --- retention ---------------------------------------------------------------------------------------------------------


def history(*ages_days):
    """Generations of those ages, the newest first."""
    count = len(ages_days)
    return [
        Published(count - index, f"manifests/model/{count - index:06d}-aa", NOW - age * DAY)
        for index, age in enumerate(ages_days)
    ]


@pytest.mark.parametrize(
    ("ages_days", "retention", "kept"),
    [
        ((10, 20, 30, 40, 50), Retention(last=1), [5]),
        ((10, 20, 30, 40, 50), Retention(last=3), [5, 4, 3]),
        ((10, 20, 30, 40, 50), Retention(last=99), [5, 4, 3, 2, 1]),
        ((10, 20, 30, 40, 50), Retention(last=0), [5]),
        ((10, 20, 30, 40, 50), Retention(last=1, days=35), [5, 4, 3]),
        ((3, 3.01, 4, 4.01, 5), Retention(last=1, daily=2), [5, 3]),
        ((3, 3.01, 4, 4.01, 5), Retention(last=1, daily=9), [5, 3, 1]),
        ((0.5, 20, 30), Retention(last=1), [3, 2]),
        ((0.1, 0.5, 0.9, 20), Retention(last=1), [4, 3, 2, 1]),
    ],
)
def test_which_generations_are_kept(ages_days, retention, kept) -> None:
    """The current one, what any rule keeps, and what was replaced less than the grace ago."""
    generations = history(*ages_days)
    gone = expired(generations, retention, now_seconds=NOW, grace_seconds=DAY)
    assert [entry.generation for entry in generations if entry.manifest not in gone] == kept


# --- what goes ---------------------------------------------------------------------------------------------------------


def test_old_generations_go_with_their_blobs(repository, store, clock) -> None:
    """What retention does not keep is forgotten by the ref, then deleted; what is kept restores."""
    made = []
    for number in range(5):
        made.append(generation(repository, number))
        clock.advance(2 * GRACE)
    collected = collect(repository, Rules(Retention(last=2)))
    assert collected.forgotten == tuple(one.manifest_key for one in made[:3])
    assert (collected.manifests, collected.blobs, collected.left) == (3, 3, 0)
    ref = repository.look_up("model", KEY).ref
    assert [entry.generation for entry in ref.named] == [5, 4]
    assert keys(store, "manifests/") == {one.manifest_key for one in made[3:]}
    for number, one in enumerate(made[3:], 3):
        assert set(restored(one.manifest, store)["w"]) == {number}
    assert collect(repository, Rules(Retention(last=2)))[:4] == ((), 0, 0, 0)


def test_a_forgotten_generation_is_not_the_fallback(repository, clock) -> None:
    """A ref whose previous generation went names none, so that no start asks for it in vain."""
    generation(repository, 0)
    generation(repository, 1)
    clock.advance(2 * GRACE)
    collect(repository, LAST)
    ref = repository.look_up("model", KEY).ref
    assert (ref.previous_generation, ref.previous_manifest) == (0, "")


def test_a_dry_run_tells_the_same_and_changes_nothing(repository, store, clock) -> None:
    """What a dry run says would go is what goes then; it writes and deletes nothing."""
    for number in range(3):
        generation(repository, number)
        clock.advance(2 * GRACE)
    repository.put_blob(hash_of(b"orphan"), b"orphan")
    repository.write_start_record("model", {})
    clock.advance(40 * DAY)
    before = {info.key: store.get(info.key) for info in store.list("")}
    told = collect(repository, LAST._replace(dry_run=True))
    assert {info.key: store.get(info.key) for info in store.list("")} == before
    assert collect(repository, LAST) == told
    assert (told.manifests, told.blobs, told.starts) == (2, 3, 1)


@pytest.mark.parametrize(("age_seconds", "goes"), [(0, False), (GRACE - 1, False), (GRACE + 1, True)])
def test_orphans_go_when_they_are_old(repository, store, clock, age_seconds, goes) -> None:
    """Blobs and manifests that nobody names stay for the grace: they may be those of a capture at work."""
    written = write(capture_of({"w": np.arange(100)}), repository)
    clock.advance(age_seconds)
    collected = collect(repository, LAST)
    assert (collected.manifests, collected.blobs) == ((1, 1) if goes else (0, 0))
    assert (written.manifest_key in keys(store, "manifests/")) == (not goes)


def test_a_deleted_snapshot_is_collected(repository, store, clock) -> None:
    """After a deletion nothing but the tombstone stays; other snapshots and keys are as they were."""
    generation(repository, 1)
    other = generation(repository, 2, key=OTHER_KEY)
    clock.advance(2 * GRACE)
    repository.delete("model", KEY.digest)
    collect(repository, LAST)
    assert keys(store, "manifests/") == {other.manifest_key}
    assert keys(store, "blobs/") == {blob_key(chunk.blob) for chunk in other.manifest.chunks}
    assert set(restored(other.manifest, store)["w"]) == {2}


def test_start_records_go_by_age(repository, store, clock) -> None:
    """Start records older than their days go, younger ones stay, and 0 keeps all."""
    repository.write_start_record("model", {"number": 1})
    clock.advance(20 * DAY)
    repository.write_start_record("model", {"number": 2})
    clock.advance(11 * DAY)
    assert collect(repository, LAST._replace(starts_days=0.0)).starts == 0
    assert collect(repository, LAST).starts == 1
    (kept,) = keys(store, "starts/")
    assert json.loads(store.get(kept).data) == {"number": 2}


def test_flat_files_of_what_is_gone_go(tmp_path, clock) -> None:
    """In a folder the mapped copies of segments that no live manifest has go, when nobody used them for the grace."""
    store = LocalStore(str(tmp_path / "store"))
    repository = Repository(store)
    live = write(capture_of({"w": np.arange(100)}), repository)
    repository.publish(live.manifest, live.manifest_key, replaces=repository.look_up("model", KEY))
    folder = store.flat_files()
    folder.prepare()
    (name,) = filter(None, segment_names(live.manifest))
    old, young = "0" * 64, "1" * 64
    for one in (name, old, young):
        folder.keep("segments", one, [memoryview(b"bytes")])
    for one in (name, old):
        os.utime(tmp_path / "store" / ".flat" / "v1" / "segments" / one, (1e9, 1e9))
    assert collect(repository, LAST).flat_files == 1
    assert {found for found, _ in folder.names("segments")} == {name, young}


# --- what is never touched ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil", ["ref", "ref of a newer format", "manifest", "no manifest", "earlier manifest", "young manifest"]
)
def test_nothing_goes_where_something_live_cannot_be_read(repository, memory, clock, spoil) -> None:
    """A ref or manifest that cannot be read could name anything: nothing at all is deleted, and the error says what to do."""
    orphan = write(capture_of({"w": np.arange(7)}), repository)
    first = generation(repository, 1)
    clock.advance(2 * GRACE)
    second = generation(repository, 2)
    if spoil == "ref":
        memory.put(REF, b"{}")
    elif spoil == "ref of a newer format":
        document = json.loads(memory.get(REF).data)
        document["format"]["major"] = 9
        memory.put(REF, json.dumps(document).encode())
    elif spoil == "no manifest":
        memory.delete(second.manifest_key)
    elif spoil == "young manifest":
        memory.put(manifest_key("model", 9, "ab"), b"{}")
    else:
        memory.put(first.manifest_key if spoil == "earlier manifest" else second.manifest_key, b"{}")
    before = keys(memory, "manifests/"), keys(memory, "blobs/")
    with pytest.raises(CollectionRefusedError, match="nothing was collected"):
        collect(repository, Rules(Retention(last=9)))
    assert (keys(memory, "manifests/"), keys(memory, "blobs/")) == before
    assert orphan.manifest_key in before[0]


@pytest.mark.parametrize("is_local", [True, False])
def test_a_blob_that_is_wanted_meanwhile_stays(memory, clock, is_local) -> None:
    """A capture that writes an orphan again while the collector lists saves it: its age is looked at once more."""
    data, key = b"orphan", blob_key(hash_of(b"orphan"))
    memory.put(key, data)
    memory.put(blob_key(hash_of(b"other")), b"other")
    clock.advance(2 * GRACE)

    class Meanwhile(FaultyStore):
        def list(self, prefix):
            found = list(super().list(prefix))
            if prefix == "blobs/":
                memory.put(key, data)
            return iter(found)

    repository = Repository(Meanwhile(memory), clock=clock.time)
    if is_local:
        repository.store.delete_older = memory.delete_older
    assert collect(repository, LAST).blobs == 1
    assert memory.get(key).data == data


def test_a_deletion_is_asked_for_once(memory, clock) -> None:
    """A deletion whose answer was lost is not repeated, because a capture may have written the object since."""
    for content in (b"1", b"2", b"3"):
        memory.put(blob_key(hash_of(content)), content)
    clock.advance(2 * GRACE)
    faulty = FaultyStore(memory)
    repository = Repository(RetryingStore(faulty, clock=clock), clock=clock.time)
    faulty.inject(Fault("transient_before", "delete", key="blobs/*"))
    collected = collect(repository, LAST)
    assert (collected.blobs, collected.left) == (2, 1)
    assert faulty.count("delete") == 3
    assert collect(repository, LAST).blobs == 1


def test_one_collector_at_a_time(repository) -> None:
    """A second collector is told who is at it; one that failed leaves no lease behind."""
    lease = Leases(repository, Holder("host 7", 1)).take(COLLECTOR)
    with pytest.raises(UsageError, match="process 1 of host 7 collects in memory://"):
        collect(repository, LAST)
    Leases(repository, Holder("host 7", 1)).release(lease)
    repository.store.inject(Fault("transient_before", "list", "blobs/"))
    with pytest.raises(StoreTransientError):
        collect(repository, LAST)
    assert collect(repository, LAST).blobs == 0


def test_no_swaps_no_forgetting(clock) -> None:
    """In a store that cannot swap, refs are left as they are; orphans go all the same."""
    lax = MemoryStore(clock=clock.time, capabilities=ALL_CAPABILITIES._replace(compare_and_swap=False))
    repository = Repository(lax, clock=clock.time)
    made = [generation(repository, number) for number in range(3)]
    repository.put_blob(hash_of(b"orphan"), b"orphan")
    clock.advance(2 * GRACE)
    collected = collect(repository, LAST)
    assert (collected.forgotten, collected.manifests, collected.blobs) == ((), 0, 1)
    assert keys(lax, "manifests/") == {one.manifest_key for one in made}


def test_there_is_always_a_usable_snapshot(memory, clock) -> None:
    """A collection that breaks off at any of its steps leaves the current generation whole, and the next one finishes."""
    for calls in range(0, 60, 3):
        for info in list(memory.list("")):
            memory.delete(info.key)
        store = FaultyStore(memory)
        repository = Repository(store, clock=clock.time)
        for number in range(4):
            current = generation(repository, number)
            clock.advance(2 * GRACE)
        store.inject(Fault("denied", "*", skip=calls, times=None))
        with suppress(AccessDeniedError):
            collect(repository, LAST, threads=1)
        store.heal()
        ref = repository.look_up("model", KEY).ref
        assert ref.manifest == current.manifest_key
        assert set(restored(repository.manifest(ref.manifest, name="model"), store)["w"]) == {3}
        clock.advance(3600)  # the lease of the one that broke off
        collect(repository, LAST, threads=1)
        assert len(keys(memory, "blobs/")) == 1


# --- in one step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_delete_older_looks_and_deletes_in_one_step(kind, tmp_path) -> None:
    """Of an object that writers keep writing, none of their writes is deleted; an old one is."""
    store = MemoryStore() if kind == "memory" else LocalStore(str(tmp_path))
    store.put("k/old", b"x")
    assert not store.delete_older("k/old", 1e9)
    assert store.delete_older("k/old", 1e11)
    assert not store.delete_older("k/old", 1e11)
    assert not store.delete_older("k/none/none", 1e11)
    since = store.put("k/new", b"0") and store.head("k/new").modified_seconds
    stop = threading.Event()

    def write_on():
        while not stop.is_set():
            store.put("k/new", b"1")

    writer = threading.Thread(target=write_on)
    writer.start()
    for _ in range(50):
        assert not store.delete_older("k/new", since)
    stop.set()
    writer.join()
    assert store.get("k/new").data in (b"0", b"1")


# --- commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs ``coldstart snapshot`` on a store of its own: exit status, standard output and error."""
    monkeypatch.setenv("COLDSTART_STORE", str(tmp_path / "store"))
    repository = Repository(LocalStore(str(tmp_path / "store")))

    def run(*words):
        return (main(["snapshot", *words]), *capsys.readouterr())

    run.repository = repository
    return run


def age(command, seconds):
    """Make everything in the store look as if it was written so long ago."""
    root = command.repository.store.url.removeprefix("file://")
    for info in list(command.repository.store.list("")):
        os.utime(f"{root}/{info.key}", (info.modified_seconds - seconds,) * 2)


def test_gc_command(command) -> None:
    """``gc --dry-run`` says what would go, ``gc`` deletes it; both as JSON too."""
    repository = command.repository
    repository.put_blob(hash_of(b"orphan"), b"orphan")
    age(command, 2 * GRACE)
    kept = publish(repository)
    assert command("gc", "--dry-run")[:2] == (
        0, "would delete 1 blobs (0.0 MB), 0 manifests, 0 start records, 0 flat files; 0 blobs are live\n"
    )  # fmt: skip
    status, out, _ = command("gc", "--json")
    assert status == 0
    assert (json.loads(out)["blobs"], json.loads(out)["dry_run"]) == (1, False)
    assert command("gc")[1].startswith("deleted 0 blobs")
    assert repository.look_up("model", KEY).ref == kept


@pytest.mark.parametrize(
    "options", [["--grace-hours", "23"], ["--keep-last", "0"], ["--keep-days", "-1"], ["--keep-starts-days", "-1"]]
)
def test_gc_refuses_rules_that_cannot_be_meant(command, options) -> None:
    """A grace below a day, or to keep less than the current generation, is refused before anything is looked at."""
    status, out, err = command("gc", *options)
    assert (status, out) == (1, "")
    assert err.startswith("coldstart: UsageError: --")


def test_gc_says_why_it_refuses(command) -> None:
    """A ref that cannot be read stops it in one line."""
    command.repository.store.put(REF, b"{}")
    status, out, err = command("gc")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("coldstart: CollectionRefusedError: nothing was collected: the ref refs/model/")


def test_rollback_command(command) -> None:
    """``rollback NAME`` makes the generation before current, ``--generation`` any that is kept."""
    for _ in range(3):
        publish(command.repository)
    assert command("rollback", "model")[:2] == (0, "model generation 4 is current: a copy of generation 2\n")
    status, out, _ = command("rollback", "model", "--generation", "1", "--json")
    assert (status, json.loads(out)) == (0, {"name": "model", "generation": 5, "copy_of": 1})
    assert command.repository.look_up("model", KEY).ref.generation == 5
    status, _, err = command("rollback", "model", "--generation", "9")
    assert status == 1
    assert "generation 9 is not kept before generation 5 of 'model'; kept are: 4, 3, 2, 1" in err
    assert command("rollback", "absent")[0] == 1
    assert newest_ref_key("model") in keys(command.repository.store, "refs/")
