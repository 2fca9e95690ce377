"""The commit protocol: which generation is current, whoever writes at the same time and whatever answer is lost."""

from __future__ import annotations

import json
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coldstart.errors import (
    AccessDeniedError,
    FormatVersionError,
    ManifestError,
    ObjectMissingError,
    StateChangedError,
    StoreError,
    StoreTransientError,
)
from coldstart.manifest import (
    FileEntry,
    KeyRecord,
    Segment,
    blob_key,
    manifest_key,
    newest_ref_key,
    ref_from_json,
    ref_key,
)
from coldstart.repository import COLLECTION_GRACE_SECONDS, Lookup, Repository
from coldstart.stores.memory import MemoryStore
from coldstart.stores.retrying import RetryingStore
from coldstart.testing import FakeClock, Fault, FaultyStore
from tests.generations import KEY, OTHER_KEY, hash_of, manifest_of

REF = ref_key("model", KEY.digest)
NEWEST = newest_ref_key("model")
HALF_GRACE = COLLECTION_GRACE_SECONDS / 2


class Meanwhile(FaultyStore):
    """A faulty store during whose next reads of a ref somebody else does something: one action a read."""

    def __init__(self, store, faults=()):
        super().__init__(store, faults)
        self.actions = []

    def get(self, key):
        if self.actions and key == REF:
            self.actions.pop(0)()
        return super().get(key)


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


def publish(repository, *, key=KEY, name="model", replaces=None):
    """Write the next generation after what ``replaces`` saw (default: what is there now), and make it current."""
    replaces = replaces or repository.look_up(name, key)
    generation = replaces.ref.generation + 1 if replaces.ref else 1
    manifest = manifest_of(name, generation, key)
    return repository.publish(manifest, repository.put_manifest(manifest), replaces=replaces)


# --- publishing ------------------------------------------------------------------------------------------------------


def test_nothing_is_found_where_nothing_was_published(repository):
    """A look-up in an empty store finds neither a generation nor a newer key."""
    assert repository.look_up("model", KEY) == Lookup(None, "", None)


def test_what_was_published_is_found(repository, clock):
    """The ref names the manifest, the key, the number and the time; the manifest reads back as it was written."""
    clock.advance(5)
    ref = publish(repository)
    found = repository.look_up("model", KEY)
    assert (found.ref, found.newest) == (ref, ref)
    assert found.etag
    assert (ref.name, ref.key, ref.generation, ref.updated_seconds) == ("model", KEY, 1, clock.time())
    assert (ref.previous_generation, ref.previous_manifest) == (0, "")
    assert repository.manifest(ref.manifest, name="model") == manifest_of()


def test_generations_are_numbered_and_name_the_one_before(repository):
    """Every generation follows the one it replaced, by number and by manifest, and that stays readable."""
    refs = [publish(repository) for _ in range(4)]
    assert [ref.generation for ref in refs] == [1, 2, 3, 4]
    assert [ref.previous_generation for ref in refs] == [0, 1, 2, 3]
    assert [ref.previous_manifest for ref in refs] == ["", *(ref.manifest for ref in refs[:-1])]
    assert [repository.manifest(ref.manifest, name="model").generation for ref in refs] == [1, 2, 3, 4]
    assert len({ref.write_id for ref in refs}) == 4


def test_keys_and_names_do_not_see_each_other(repository):
    """Generations are counted per key, and another name's snapshot is another snapshot."""
    first, second = publish(repository), publish(repository, key=OTHER_KEY)
    part = publish(repository, name="model=encoder")
    assert (first.generation, second.generation, part.generation) == (1, 1, 1)
    assert repository.look_up("model", KEY).ref == first
    assert repository.look_up("model", OTHER_KEY).ref == second
    assert repository.look_up("model=encoder", KEY).ref == part


def test_readers_and_publishers_never_list(repository, store):
    """A restore and a capture work where listing is slow, stale or forbidden."""
    store.inject(Fault("denied", "list", times=None))
    publish(repository)
    ref = publish(repository)
    repository.manifest(ref.manifest, name="model")
    repository.put_blob(hash_of(b"blob"), b"blob")
    assert store.count("list") == 0


@pytest.mark.parametrize("generations_before", [0, 1, 3])
def test_a_writer_with_a_stale_look_up_loses(repository, other, generations_before):
    """Of two writers that saw the same generation, or none, the first one wins and the second one changes nothing."""
    for _ in range(generations_before):
        publish(other)
    seen = repository.look_up("model", KEY)
    winner = publish(other, replaces=seen)
    with pytest.raises(StateChangedError, match="another worker"):
        publish(repository, replaces=seen)
    assert repository.look_up("model", KEY).ref == winner
    assert repository.look_up("model", OTHER_KEY).newest == winner


def test_a_loser_may_try_again_after_looking_again(repository, other):
    """The next look-up of a writer that lost gives it the number after the winner's."""
    seen = repository.look_up("model", KEY)
    publish(other, replaces=seen)
    with pytest.raises(StateChangedError):
        publish(repository, replaces=seen)
    assert publish(repository).generation == 2


def test_a_snapshot_that_was_deleted_meanwhile_is_not_replaced(repository, other):
    """A generation that was to replace one that is gone is not published: somebody wanted the snapshot away."""
    publish(other)
    seen = repository.look_up("model", KEY)
    other.delete("model")
    with pytest.raises(StateChangedError):
        publish(repository, replaces=seen)
    assert repository.look_up("model", KEY).ref is None


@pytest.mark.parametrize("last_write", range(1, 5))
def test_a_writer_may_die_after_any_write(repository, other, store, last_write):
    """However many of a publication's writes took place, readers see a whole generation: the old one or the new one."""
    old = publish(other)
    store.inject(Fault("denied", "put", skip=last_write - 1, times=None))
    seen = repository.look_up("model", KEY)
    try:
        repository.put_blob(hash_of(b"new"), b"new")
        new = publish(repository, replaces=seen)
    except AccessDeniedError:
        new = None
    found = other.look_up("model", KEY).ref
    assert found == (new or old)
    assert other.manifest(found.manifest, name="model").generation == found.generation
    assert (new is None) == (last_write < 4)


# --- answers that are lost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generations_before", [0, 1])
def test_a_lost_answer_is_settled_by_reading_back(repository, other, store, generations_before):
    """A swap that took effect and whose answer was lost is a success: the ref holds this writer's own write id."""
    for _ in range(generations_before):
        publish(other)
    store.inject(Fault("transient_after", "put", key=REF))
    ref = publish(repository)
    assert other.look_up("model", KEY).ref == ref
    assert ref.generation == generations_before + 1


def test_a_lost_answer_is_settled_behind_the_retrying_wrapper_too(store, other, clock):
    """A repeated swap fails against its own first attempt, and is settled all the same."""
    repository = Repository(RetryingStore(store, clock=clock), clock=clock.time)
    publish(repository)
    store.inject(Fault("transient_after", "put", key=REF))
    ref = publish(repository)
    assert other.look_up("model", KEY).ref == ref


def test_a_lost_answer_counts_when_the_next_writer_has_built_on_it(repository, other, store):
    """A generation that was replaced before its writer could read back had been published: its successor names it."""
    store.inject(Fault("transient_after", "put", key=REF))
    seen = repository.look_up("model", KEY)
    store.actions.append(lambda: publish(other))
    ref = publish(repository, replaces=seen)
    current = other.look_up("model", KEY).ref
    assert (current.generation, current.previous_manifest) == (2, ref.manifest)


def test_a_swap_that_never_arrived_is_an_error_and_no_conflict(repository, other, store):
    """A swap that failed without effect is the store's failure: nobody else was first."""
    old = publish(other)
    store.inject(Fault("transient_before", "put", key=REF))
    with pytest.raises(StoreTransientError):
        publish(repository)
    assert other.look_up("model", KEY).ref == old


@pytest.mark.parametrize("kind", ["transient_before", "denied"])
def test_an_inconclusive_read_back_is_an_error_and_no_conflict(repository, store, kind):
    """Who cannot read back does not know what became of the swap, and must not say that somebody else was first."""
    seen = repository.look_up("model", KEY)
    store.inject(Fault("transient_after", "put", key=REF), Fault(kind, "get", key=REF))
    with pytest.raises(StoreError) as raised:
        publish(repository, replaces=seen)
    assert not isinstance(raised.value, StateChangedError)


# --- the newest key --------------------------------------------------------------------------------------------------


def test_the_newest_ref_follows(repository):
    """A look-up of a key that has no generation says which key was published last."""
    publish(repository)
    assert repository.look_up("model", OTHER_KEY) == Lookup(None, "", repository.look_up("model", KEY).ref)
    newer = publish(repository, key=OTHER_KEY)
    assert repository.look_up("model", KeyRecord("c" * 32, {})).newest == newer
    again = publish(repository)
    assert repository.look_up("model", KeyRecord("c" * 32, {})).newest == again


@pytest.mark.parametrize("operation", ["get", "put"])
@pytest.mark.parametrize("kind", ["transient_before", "transient_after", "denied"])
def test_failing_to_point_newest_is_harmless(repository, other, store, operation, kind):
    """A generation is published when its own ref is; that the newest ref cannot follow is nobody's error."""
    publish(other)
    seen = repository.look_up("model", KEY)
    store.inject(Fault(kind, operation, key=NEWEST, times=None))
    ref = publish(repository, replaces=seen)
    assert other.look_up("model", KEY).ref == ref


def test_a_newest_ref_that_is_damaged_hides_nothing_and_heals(repository, memory):
    """A malformed newest ref is as good as none for a look-up, and the next publication replaces it."""
    ref = publish(repository)
    memory.put(NEWEST, b"{}")
    assert repository.look_up("model", KEY).ref == ref
    assert repository.look_up("model", OTHER_KEY) == Lookup(None, "", None)
    newer = publish(repository, key=OTHER_KEY)
    assert repository.look_up("model", KeyRecord("c" * 32, {})).newest == newer


def test_a_newest_ref_of_another_name_is_not_believed(repository, memory):
    """A newest ref that lies under the wrong name would explain a change that never was."""
    publish(repository, name="other")
    memory.put(NEWEST, memory.get(newest_ref_key("other")).data)
    assert repository.look_up("model", KEY).newest is None


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
    """Refs and manifests of all keys go, other names and the blobs stay, and the number begins anew."""
    publish(repository)
    publish(repository)
    publish(repository, key=OTHER_KEY)
    kept = publish(repository, name="model2")
    repository.put_blob(hash_of(b"blob"), b"blob")
    deleted = repository.delete("model")
    assert len([key for key in deleted if key.startswith("refs/")]) == 3
    assert len([key for key in deleted if key.startswith("manifests/")]) == 3
    assert {info.key for info in memory.list("")} == {
        ref_key("model2", KEY.digest), newest_ref_key("model2"), kept.manifest, blob_key(hash_of(b"blob"))
    }  # fmt: skip
    assert publish(repository).generation == 1


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


# --- many writers, any order -----------------------------------------------------------------------------------------


class Writers(RuleBasedStateMachine):
    """Several writers with look-ups of any age, against a dictionary that says what is current: ref key -> ref."""

    names = ("model", "model=part")
    keys = (KEY, OTHER_KEY)
    places = st.tuples(st.sampled_from(names), st.sampled_from(keys))

    @initialize()
    def begin(self) -> None:
        self.store = FaultyStore(MemoryStore())
        numbers = count(1)
        self.repository = Repository(self.store, unique=lambda: f"{next(numbers):016x}")
        self.current: dict = {}
        self.newest: dict = {}
        self.seen: list = []

    @rule(place=places)
    def look_up(self, place) -> None:
        name, key = place
        lookup = self.repository.look_up(name, key)
        assert lookup.ref == self.current.get(ref_key(name, key.digest))
        assert lookup.newest == (lookup.ref or self.newest.get(name))
        self.seen.append((name, key, lookup))

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), answer_is_lost=st.booleans(), newest_fails=st.booleans())
    def publish(self, data, answer_is_lost, newest_fails) -> None:
        name, key, lookup = data.draw(st.sampled_from(self.seen))
        place = ref_key(name, key.digest)
        if answer_is_lost:
            self.store.inject(Fault("transient_after", "put", key=place))
        if newest_fails:
            self.store.inject(Fault("transient_before", "put", key=newest_ref_key(name)))
        try:
            ref = publish(self.repository, key=key, name=name, replaces=lookup)
        except StateChangedError:
            assert self.current.get(place) != lookup.ref
        else:
            assert self.current.get(place) == lookup.ref
            before = (lookup.ref.manifest, lookup.ref.generation) if lookup.ref else ("", 0)
            assert (ref.previous_manifest, ref.previous_generation) == before
            self.current[place] = ref
            if not newest_fails:
                self.newest[name] = ref
        self.store.heal()

    @rule(place=places)
    def delete_key(self, place) -> None:
        name, key = place
        expected = [ref_key(name, key.digest)] if self.current.pop(ref_key(name, key.digest), None) else []
        if name in self.newest and self.newest[name].key == key:
            expected.append(newest_ref_key(name))
            del self.newest[name]
        assert self.repository.delete(name, key.digest) == expected

    @rule(name=st.sampled_from(names))
    def delete_all(self, name) -> None:
        deleted = self.repository.delete(name)
        gone = {place for place, ref in self.current.items() if ref.name == name}
        assert gone == set(deleted) & set(self.current)
        self.current = {place: ref for place, ref in self.current.items() if place not in gone}
        self.newest.pop(name, None)

    @invariant()
    def what_is_listed_is_what_is_current(self) -> None:
        assert dict(self.repository.refs()) == self.current

    @invariant()
    def every_current_generation_is_whole(self) -> None:
        for ref in self.current.values():
            assert self.repository.manifest(ref.manifest, name=ref.name).generation == ref.generation

    @invariant()
    def the_newest_ref_is_the_last_published(self) -> None:
        for name in self.names:
            try:
                found = ref_from_json(self.store.get(newest_ref_key(name)).data)
            except ObjectMissingError:
                found = None
            assert found == self.newest.get(name)


TestWriters = Writers.TestCase
TestWriters.settings = settings(deadline=None, max_examples=60, stateful_step_count=25)
TestWriters.__doc__ = "Several writers with stale look-ups, lost answers and deletions keep to a plain model."
