"""What lies in a repository: refs and manifests that are checked, blobs that may be relied on, people's commands."""

from __future__ import annotations

import json

import pytest

from coldstart.errors import (
    AccessDeniedError,
    FormatVersionError,
    ManifestError,
    ObjectMissingError,
    StoreTransientError,
)
from coldstart.manifest import FileEntry, Segment, blob_key, manifest_key, newest_ref_key, ref_key
from coldstart.repository import COLLECTION_GRACE_SECONDS, Lookup, Repository
from coldstart.stores.memory import MemoryStore
from coldstart.testing import FakeClock, Fault
from tests.generations import KEY, OTHER_KEY, Meanwhile, hash_of, manifest_of, publish

REF = ref_key("model", KEY.digest)
NEWEST = newest_ref_key("model")
HALF_GRACE = COLLECTION_GRACE_SECONDS / 2


@pytest.fixture
def clock():
    """The store's and the repository's time."""
    return FakeClock()


@pytest.fixture
def memory(clock):
    """The objects themselves."""
    return MemoryStore(clock=clock.time)


@pytest.fixture
def store(memory):
    """The store that a test may let fail."""
    return Meanwhile(memory)


@pytest.fixture
def repository(store, clock):
    """The repository under test."""
    return Repository(store, clock=clock.time)


@pytest.fixture
def other(memory, clock):
    """Another worker's repository over the same objects, which never fails."""
    return Repository(memory, clock=clock.time)


# --- what is read is checked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b'{"format": {"major": 1, "minor": 0}}'])
def test_a_malformed_ref_is_an_error(repository, memory, data):
    """A ref that is not one is refused, not taken for a missing snapshot."""
    memory.put(REF, data)
    with pytest.raises(ManifestError):
        repository.look_up("model", KEY)


def test_a_ref_of_a_newer_format_is_told_apart(repository, memory):
    """A ref of another major version asks for an upgrade."""
    publish(repository)
    document = json.loads(memory.get(REF).data)
    document["format"]["major"] = 2
    memory.put(REF, json.dumps(document).encode())
    with pytest.raises(FormatVersionError):
        repository.look_up("model", KEY)


@pytest.mark.parametrize(("name", "key"), [("other", KEY), ("model", OTHER_KEY)])
def test_a_ref_in_anothers_place_is_refused(repository, memory, name, key):
    """A ref of another snapshot or key is not believed, however it came here: its weights are other weights."""
    publish(repository, name=name, key=key)
    memory.put(REF, memory.get(ref_key(name, key.digest)).data)
    with pytest.raises(ManifestError, match="names another snapshot"):
        repository.look_up("model", KEY)


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "a" * 200, "-a"])
def test_an_impossible_name_reaches_no_store(repository, store, name):
    """What cannot name a snapshot is refused before anything is asked of the store."""
    for action in (lambda: repository.look_up(name, KEY), lambda: list(repository.refs(name))):
        with pytest.raises(ManifestError):
            action()
    with pytest.raises(ManifestError):
        repository.delete(name)
    assert store.calls == []


def test_a_manifest_of_another_name_is_refused(repository):
    """The manifest of another snapshot is not restored under this name."""
    ref = publish(repository, name="other")
    with pytest.raises(ManifestError, match="'other', not 'model'"):
        repository.manifest(ref.manifest, name="model")


def test_a_missing_manifest_is_the_stores_error(repository):
    """A ref whose manifest is gone gives the error of a missing object, with its key."""
    key = manifest_key("model", 1, "0" * 16)
    with pytest.raises(ObjectMissingError) as raised:
        repository.manifest(key, name="model")
    assert raised.value.key == key


def test_manifests_of_one_number_do_not_meet(repository):
    """Two writers of one generation number write two manifests, and neither is ever overwritten."""
    keys = {repository.put_manifest(manifest_of(generation=7)) for _ in range(20)}
    assert len(keys) == 20
    assert all(key.startswith("manifests/model/000007-") for key in keys)


def test_a_manifest_that_no_reader_would_take_is_not_stored(repository, store):
    """What the strict reader refuses is refused where it is written, and not at the next start."""
    manifest = manifest_of()._replace(
        segments=(Segment(1, "other", "files", 0),), files=(FileEntry("kept", "../escape", 0o644, 0, 0, 0),)
    )
    with pytest.raises(ManifestError, match="escape"):
        repository.put_manifest(manifest)
    assert store.count("put") == 0


# --- blobs -----------------------------------------------------------------------------------------------------------


def test_a_new_blob_is_stored(repository, memory):
    """A blob that is not there is written under its hash."""
    assert repository.put_blob(hash_of(b"blob"), b"blob")
    assert memory.get(blob_key(hash_of(b"blob"))).data == b"blob"


@pytest.mark.parametrize("age_seconds", [0, 3600, HALF_GRACE - 1])
def test_a_young_blob_is_relied_on(repository, store, clock, age_seconds):
    """A blob that no collector can be about to delete is not sent again."""
    repository.put_blob(hash_of(b"blob"), b"blob")
    clock.advance(age_seconds)
    assert not repository.put_blob(hash_of(b"blob"), b"blob")
    assert store.count("put") == 1


@pytest.mark.parametrize("age_seconds", [HALF_GRACE, HALF_GRACE + 1, 10 * COLLECTION_GRACE_SECONDS])
def test_an_old_blob_is_put_again(repository, store, memory, clock, age_seconds):
    """A blob older than half the grace may be an orphan whose time is nearly up: written again, it is young."""
    key = blob_key(hash_of(b"blob"))
    repository.put_blob(hash_of(b"blob"), b"blob")
    clock.advance(age_seconds)
    assert repository.put_blob(hash_of(b"blob"), b"blob")
    assert memory.head(key).modified_seconds == clock.time()
    assert not repository.put_blob(hash_of(b"blob"), b"blob")
    assert store.count("put", key) == 2


def test_a_blob_of_another_length_is_put_again(repository, memory):
    """A blob that was cut off in the store is not relied on."""
    key = blob_key(hash_of(b"blob"))
    memory.put(key, b"blo")
    assert repository.put_blob(hash_of(b"blob"), b"blob")
    assert memory.get(key).data == b"blob"


def test_a_blob_can_be_written_whatever_is_there(repository, memory):
    """Who knows that the store holds damaged bytes writes them anew."""
    key = blob_key(hash_of(b"blob"))
    memory.put(key, b"bl0b")
    assert not repository.put_blob(hash_of(b"blob"), b"blob")
    assert repository.put_blob(hash_of(b"blob"), b"blob", rely_on_stored=False)
    assert memory.get(key).data == b"blob"


def test_a_failing_store_fails_the_blob(repository, store):
    """A blob of which nobody knows whether it is there is not taken for stored."""
    store.inject(Fault("transient_before", "head"))
    with pytest.raises(StoreTransientError):
        repository.put_blob(hash_of(b"blob"), b"blob")
    store.inject(Fault("transient_after", "put"))
    with pytest.raises(StoreTransientError):
        repository.put_blob(hash_of(b"blob"), b"blob")


# --- people's commands -----------------------------------------------------------------------------------------------


def test_refs_are_listed_by_their_place(repository):
    """Every ref comes with its key, those of one name alone if asked, and the newest refs are not among them."""
    published = {
        ref_key(name, key.digest): publish(repository, name=name, key=key)
        for name, key in (("model", KEY), ("model", OTHER_KEY), ("mode", KEY), ("model=part", KEY))
    }
    assert list(repository.refs()) == sorted(published.items())
    of_model = [(place, ref) for place, ref in sorted(published.items()) if ref.name == "model"]
    assert list(repository.refs("model")) == of_model
    assert list(repository.refs("unknown")) == []


def test_a_malformed_ref_is_listed_as_its_error(repository, memory):
    """One bad ref neither hides nor stops the list of the others."""
    good = publish(repository, key=OTHER_KEY)
    memory.put(REF, b"{}")
    (place, error), *rest = repository.refs()
    assert place == REF
    assert isinstance(error, ManifestError)
    assert rest == [(ref_key("model", OTHER_KEY.digest), good)]


def test_a_ref_that_goes_while_it_is_listed_is_left_out(repository, other, store):
    """A list taken while somebody deletes is a list of what is left."""
    publish(other)
    kept = publish(other, key=OTHER_KEY)
    store.actions.append(lambda: other.delete("model", KEY.digest))
    assert list(repository.refs()) == [(ref_key("model", OTHER_KEY.digest), kept)]


def test_one_key_is_deleted(repository):
    """Deleting a key leaves the other keys, and the newest ref where it names another."""
    publish(repository)
    kept = publish(repository, key=OTHER_KEY)
    assert repository.delete("model", KEY.digest) == [REF]
    assert repository.look_up("model", KEY) == Lookup(None, "", kept)
    assert repository.look_up("model", OTHER_KEY).ref == kept


def test_the_newest_key_is_deleted_with_its_newest_ref(repository):
    """After the newest key is gone nothing names it any more."""
    publish(repository)
    assert repository.delete("model", KEY.digest) == [REF, NEWEST]
    assert repository.look_up("model", KEY) == Lookup(None, "", None)


def test_all_of_a_snapshot_is_deleted(repository, memory):
    """Refs and manifests of all keys go, other names and the blobs stay, and the numbers go on where they ended."""
    publish(repository)
    publish(repository)
    publish(repository, key=OTHER_KEY)
    kept = publish(repository, name="model2")
    repository.put_blob(hash_of(b"blob"), b"blob")
    deleted = repository.delete("model")
    assert len([key for key in deleted if key.startswith("refs/")]) == 3
    assert len([key for key in deleted if key.startswith("manifests/")]) == 3
    assert {info.key for info in memory.list("")} == {
        REF, ref_key("model", OTHER_KEY.digest),  # tombstones, which say the last number
        ref_key("model2", KEY.digest), newest_ref_key("model2"), kept.manifest, blob_key(hash_of(b"blob"))
    }  # fmt: skip
    assert list(repository.refs("model")) == []
    assert publish(repository).generation == 3
    assert publish(repository, key=OTHER_KEY).generation == 2


def test_deleting_the_unknown_deletes_nothing(repository):
    """A name or a key that is not there is an empty list, not an error."""
    assert repository.delete("unknown") == []
    publish(repository)
    assert repository.delete("model", "f" * 32) == []
    assert repository.look_up("model", KEY).ref is not None


def test_a_damaged_snapshot_can_be_deleted(repository, memory):
    """Malformed refs do not protect a snapshot from being deleted, all of it or one key."""
    publish(repository)
    publish(repository, key=OTHER_KEY)
    memory.put(REF, b"{}")
    memory.put(NEWEST, b"{}")
    assert repository.delete("model", KEY.digest) == [REF]
    assert sorted(repository.delete("model"))[-2:] == [ref_key("model", OTHER_KEY.digest), NEWEST]


@pytest.mark.parametrize("deletions", range(1, 5))
def test_a_deletion_that_broke_off_leaves_no_ref_without_its_manifest(repository, other, store, deletions):
    """Refs go before manifests, and the same command finishes what was begun."""
    publish(other)
    publish(other)
    store.inject(Fault("denied", "delete", skip=deletions - 1, times=1))
    try:
        repository.delete("model")
    except AccessDeniedError:
        for _, ref in other.refs("model"):
            assert other.manifest(ref.manifest, name="model")
        assert repository.delete("model")
    assert repository.delete("model") == []


def test_start_records_lie_by_name_and_day(repository, memory, clock):
    """Each start record is an object of its own below the day of the start."""
    repository.write_start_record("model", {"kind": "restored"})
    repository.write_start_record("model", {"kind": "cold"})
    infos = list(memory.list("starts/model/2023-11-14/"))
    assert len(infos) == 2
    kinds = [json.loads(memory.get(info.key).data)["kind"] for info in infos]
    assert sorted(kinds) == ["cold", "restored"]
