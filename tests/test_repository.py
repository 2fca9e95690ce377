"""The commit protocol: which generation is current, whoever writes at the same time and whatever answer is lost."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coldstart.errors import AccessDeniedError, ObjectMissingError, StateChangedError, StoreError, StoreTransientError
from coldstart.manifest import KeyRecord, newest_ref_key, ref_from_json, ref_key
from coldstart.repository import COLLECTION_GRACE_SECONDS, Lookup, Repository
from coldstart.stores.memory import MemoryStore
from coldstart.stores.retrying import RetryingStore
from coldstart.testing import FakeClock, Fault, FaultyStore
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
    ref = publish(repository, replaces=seen, generation=1)
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
