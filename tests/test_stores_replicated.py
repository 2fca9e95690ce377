"""A store with replicas: who decides, what is written where, and who answers when one is down, wrong or behind."""

from __future__ import annotations

import threading

import pytest

from coldstart.config import load
from coldstart.errors import (
    AccessDeniedError,
    BlobCorruptError,
    ConditionFailedError,
    ManifestError,
    ObjectMissingError,
    StoreError,
    StoreTransientError,
)
from coldstart.fetch import Address, FetchRequest
from coldstart.fetch.process import start_process
from coldstart.manifest import blob_key, ref_key
from coldstart.repository import Repository
from coldstart.stores import StoreOptions, open_store
from coldstart.stores.base import Tally
from coldstart.stores.local import LocalStore
from coldstart.stores.memory import MemoryStore
from coldstart.stores.replicated import REST_SECONDS, Member, ReplicatedStore
from coldstart.stores.retrying import RetryingStore
from coldstart.testing import FakeClock, Fault, FaultyStore
from tests.generations import KEY, arena_of, hash_of, manifest_of, publish, stored_chunks

DATA = b"the bytes of a blob" * 50
BLOB = hash_of(DATA)
KEY_OF_BLOB = blob_key(BLOB)
MANIFEST = "manifests/model/000001-0a"
REF = "refs/model/key"
DOWN = Fault("transient_before", times=None)


class Three:
    """A primary and two replicas, each of which may fail, joined under a clock of the test's own."""

    def __init__(self, **options):
        self.bare = [MemoryStore(name) for name in ("primary", "first", "second")]
        self.stores = [FaultyStore(store) for store in self.bare]
        self.clock = FakeClock()
        self.told = []
        self.joined = ReplicatedStore(
            [Member(store, store) for store in self.stores], degraded=self.told.append, clock=self.clock, **options
        )

    def have(self, key):
        """What each of the stores has under a key."""
        found = []
        for store in self.bare:
            try:
                found.append(store.get(key).data)
            except ObjectMissingError:
                found.append(None)
        return found

    def read(self):
        """The bytes of the blob, as a fetch reads them."""
        target = bytearray(len(DATA))
        self.joined.read_into(KEY_OF_BLOB, memoryview(target))
        return bytes(target)


@pytest.fixture
def three():
    """Three stores that hold one blob and one manifest."""
    world = Three()
    world.joined.put(KEY_OF_BLOB, DATA)
    world.joined.put(MANIFEST, b"{}")
    return world


# --- writes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [KEY_OF_BLOB, MANIFEST, REF, "refs/model/newest"])
def test_a_write_goes_to_all(key):
    """Blobs, manifests and refs are in every store, and the etag is the primary's."""
    three = Three()
    assert three.joined.put(key, b"data") == three.bare[0].get(key).etag
    assert three.have(key) == [b"data"] * 3


@pytest.mark.parametrize("key", ["starts/model/2026-01-01/a.json", "leases/model", "probes/0a"])
def test_what_no_restore_reads_is_the_primarys_alone(key):
    """Start records, leases and probes are not copied, nor are their deletions."""
    three = Three()
    three.joined.put(key, b"data")
    assert three.have(key) == [b"data", None, None]
    three.joined.delete(key)
    assert [store.count("delete") for store in three.stores] == [1, 0, 0]


@pytest.mark.parametrize(("copies", "down", "works"), [(1, 2, True), (2, 1, True), (2, 2, False), (3, 1, False)])
@pytest.mark.parametrize("key", [KEY_OF_BLOB, MANIFEST])
def test_too_few_copies_are_an_error(key, copies, down, works):
    """A blob or manifest has to be in as many stores as are asked for; replicas that missed it are counted and named."""
    three = Three(copies=copies)
    for store in three.stores[3 - down :]:
        store.inject(DOWN)
    if works:
        three.joined.put(key, DATA)
    else:
        with pytest.raises(StoreTransientError, match=f"of the {copies} stores"):
            three.joined.put(key, DATA)
    assert three.have(key) == [DATA] * (3 - down) + [None] * down
    assert three.joined.tally.behind == down
    assert len(three.told) == down


def test_more_copies_than_stores_are_all():
    """Asking for more copies than there are stores asks for all of them."""
    three = Three(copies=16)
    three.joined.put(KEY_OF_BLOB, DATA)
    three.stores[2].inject(DOWN)
    with pytest.raises(StoreTransientError, match="of the 3 stores"):
        three.joined.put(KEY_OF_BLOB, DATA)


def test_a_ref_moves_once_the_primary_has_moved_it():
    """A replica that is down does not undo a ref: it stays a generation behind, and that is told."""
    three = Three(copies=3)
    three.joined.put(REF, b"1")
    three.stores[1].inject(DOWN)
    three.joined.put(REF, b"2")
    assert three.have(REF) == [b"2", b"1", b"2"]
    assert three.told


def test_a_primary_that_is_down_takes_no_write(three):
    """Nothing is written anywhere before the primary has it."""
    three.stores[0].inject(DOWN)
    with pytest.raises(StoreTransientError):
        three.joined.put("blobs/aa/" + "a" * 64, b"x")
    assert [store.count("put", "blobs/aa/*") for store in three.stores] == [1, 0, 0]


def test_conditions_are_the_primarys():
    """What a replica holds neither allows nor forbids a write, and is replaced by it."""
    three = Three()
    three.bare[1].put(REF, b"stale")
    etag = three.joined.put(REF, b"1", if_absent=True)
    three.bare[2].delete(REF)
    with pytest.raises(ConditionFailedError):
        three.joined.put(REF, b"lost", if_absent=True)
    with pytest.raises(ConditionFailedError):
        three.joined.put(REF, b"lost", if_match="another")
    three.joined.put(REF, b"2", if_match=etag)
    assert three.have(REF) == [b"2"] * 3


def test_a_replica_that_failed_is_not_waited_for_at_every_write(three):
    """It rests, and is written again when its time is over."""
    before = three.stores[1].count("put")
    three.stores[1].inject(Fault("transient_before", "put"))
    for number in range(3):
        three.joined.put(blob_key(f"{number}" * 64), b"x")
    assert three.stores[1].count("put") == before + 1
    three.clock.sleep(REST_SECONDS)
    three.joined.put(blob_key("3" * 64), b"x")
    assert three.bare[1].get(blob_key("3" * 64)).data == b"x"
    assert three.joined.tally.behind == 3


def test_of_two_writers_the_later_one_stays_everywhere():
    """A writer that is held up before it writes a replica does not put the older ref there for good."""
    three = Three()
    etag = three.joined.put(REF, b"0")
    held, go = threading.Event(), threading.Event()
    put = three.stores[1].put

    def slow(key, data, **options):
        if bytes(data) == b"1" and not held.is_set():
            held.set()
            assert go.wait(30)
        return put(key, data, **options)

    three.stores[1].put = slow
    first = threading.Thread(target=three.joined.put, args=(REF, b"1"), kwargs={"if_match": etag})
    first.start()
    assert held.wait(30)
    three.joined.put(REF, b"2", if_match=three.bare[0].get(REF).etag)
    go.set()
    first.join(30)
    assert three.have(REF) == [b"2"] * 3


def test_a_ref_that_is_deleted_meanwhile_is_not_brought_back():
    """A writer whose ref somebody deletes before it reaches the replicas leaves none there."""
    three = Three()
    put = three.stores[1].put

    def late(key, data, **options):
        three.bare[0].delete(key)
        return put(key, data, **options)

    three.stores[1].put = late
    three.joined.put(REF, b"1")
    assert three.have(REF) == [None, None, None]


def test_a_deletion_goes_to_all_and_says_what_stays(three):
    """One that failed somewhere is an error after the others were tried, and can be repeated."""
    three.stores[1].inject(Fault("denied", "delete"))
    with pytest.raises(AccessDeniedError):
        three.joined.delete(KEY_OF_BLOB)
    assert three.have(KEY_OF_BLOB) == [None, DATA, None]
    three.joined.delete(KEY_OF_BLOB)
    assert three.have(KEY_OF_BLOB) == [None] * 3


# --- reads ---------------------------------------------------------------------------------------------------------------


def test_the_primary_answers_while_it_can(three):
    """No replica is asked for anything."""
    assert three.read() == three.joined.get(KEY_OF_BLOB).data == DATA
    assert [len(store.calls) for store in three.stores[1:]] == [2, 2], "their puts alone"
    assert three.joined.tally == Tally()


@pytest.mark.parametrize("kind", ["transient_before", "missing", "denied", "truncate"])
def test_what_the_primary_cannot_give_a_replica_gives(three, kind):
    """A blob and a manifest that the primary lacks, refuses, cuts off or does not give come from the first replica."""
    three.stores[0].inject(
        Fault(kind, "read_into", times=None), Fault(kind if kind != "truncate" else "missing", "get")
    )
    assert three.read() == DATA
    assert three.joined.get(MANIFEST).data == b"{}"
    assert three.joined.tally.replica_reads == 2
    assert three.told


def test_a_blob_that_is_wrong_comes_from_a_replica_when_it_is_read_again(three):
    """The reader finds the first answer wrong and reads again; then wrong answers are passed over, whoever gives them."""
    for store in three.stores[:2]:
        store.inject(Fault("corrupt", "read_into", times=None))
    assert three.read() != DATA
    assert three.read() == DATA
    assert [store.count("read_into") for store in three.stores] == [2, 1, 1]


def test_a_blob_that_is_wrong_everywhere_is_corrupt(three):
    """Then the reader hears that it is, and gets no bytes to believe in."""
    for store in three.stores:
        store.inject(Fault("corrupt", "read_into", times=None))
    three.read()
    with pytest.raises(BlobCorruptError):
        three.read()


@pytest.mark.parametrize("kind", ["transient_before", "denied"])
def test_a_store_that_failed_is_asked_last_for_a_while(three, kind):
    """After one failure reads begin with a replica, and with the primary again when its time is over."""
    three.stores[0].inject(Fault(kind, "read_into"))
    for _ in range(3):
        assert three.read() == DATA
    assert [store.count("read_into") for store in three.stores] == [1, 3, 0]
    three.clock.sleep(REST_SECONDS)
    assert three.read() == DATA
    assert three.stores[0].count("read_into") == 2


def test_nobody_left_is_the_primarys_error(three):
    """Where no store can give an object the primary's own failure is raised."""
    three.stores[0].inject(Fault("denied", times=None))
    for store in three.stores[1:]:
        store.inject(Fault("missing", times=None))
    with pytest.raises(AccessDeniedError):
        three.read()
    three.clock.sleep(REST_SECONDS)
    three.stores[0].heal()
    three.bare[0].delete(KEY_OF_BLOB)
    with pytest.raises(ObjectMissingError):
        three.read()


def test_a_ref_that_the_primary_calls_missing_is_missing(three):
    """A replica that missed a deletion does not bring a snapshot back."""
    three.joined.put(REF, b"1")
    three.bare[0].delete(REF)
    with pytest.raises(ObjectMissingError):
        three.joined.get(REF)


def test_a_ref_of_a_replica_is_read_and_not_replaced(three):
    """Where the primary is down a replica says what is current; nothing is swapped on the strength of that."""
    three.joined.put(REF, b"1")
    three.stores[0].inject(Fault("transient_before", "get"))
    stored = three.joined.get(REF)
    assert stored.data == b"1"
    with pytest.raises(StoreTransientError, match="from a replica"):
        three.joined.put(REF, b"2", if_match=stored.etag)
    assert three.have(REF) == [b"1"] * 3


@pytest.mark.parametrize("key", [KEY_OF_BLOB, MANIFEST, REF])
def test_replicas_that_are_not_to_be_read_are_not(key):
    """A mode without replicas writes them and hears of a failing primary all the same."""
    three = Three(reads_replicas=False)
    three.joined.put(key, DATA)
    three.stores[0].inject(Fault("transient_before", "get", times=None))
    with pytest.raises(StoreTransientError):
        three.joined.get(key)
    assert list(three.joined.replica_copies(key)) == []
    assert [store.count("get", "[bm]*") for store in three.stores[1:]] == [0, 0]


# --- heads ---------------------------------------------------------------------------------------------------------------


def test_a_blob_in_too_few_stores_is_as_old_as_time(three):
    """A writer that asks before it writes is told of an age on which nobody relies, and writes it again."""
    assert three.joined.head(KEY_OF_BLOB).modified_seconds > 0
    three.bare[1].delete(KEY_OF_BLOB)
    assert three.joined.head(KEY_OF_BLOB).modified_seconds > 0
    three.bare[2].put(KEY_OF_BLOB, DATA[:-1])
    assert three.joined.head(KEY_OF_BLOB) == (KEY_OF_BLOB, len(DATA), 0.0)
    three.bare[0].delete(KEY_OF_BLOB)
    three.bare[2].delete(KEY_OF_BLOB)
    with pytest.raises(ObjectMissingError):
        three.joined.head(KEY_OF_BLOB)


def test_a_head_that_nobody_answers_is_an_error(three):
    """It is not said that a blob is missing where the store could not be asked."""
    three.stores[0].inject(DOWN)
    for store in three.bare[1:]:
        store.delete(KEY_OF_BLOB)
    with pytest.raises(StoreTransientError):
        three.joined.head(KEY_OF_BLOB)


def test_a_blob_is_as_old_as_its_oldest_copy():
    """So no store's collector finds it old while a writer takes it for young."""
    clock = FakeClock()
    stores = [MemoryStore(clock=clock.time) for _ in range(2)]
    stores[1].put(KEY_OF_BLOB, DATA)
    oldest = clock.time()
    clock.sleep(100)
    stores[0].put(KEY_OF_BLOB, DATA)
    assert ReplicatedStore([Member(store, store) for store in stores]).head(KEY_OF_BLOB).modified_seconds == oldest


def test_a_generation_whose_blobs_a_replica_lacks_is_written_there():
    """A capture after a replica was added writes what that lacks, so the generation that is published is whole in both."""
    first, second = MemoryStore(), MemoryStore()
    data = b"raw" * 1000
    blob = hash_of(data)
    Repository(first).put_blob(blob, data)
    joined = Repository(ReplicatedStore([Member(first, first), Member(second, second)]))
    assert joined.put_blob(blob, data) is True
    assert second.get(blob_key(blob)).data == data
    assert joined.put_blob(blob, data) is False


# --- with what stands on it --------------------------------------------------------------------------------------------------


def test_a_malformed_manifest_is_read_from_a_replica():
    """The repository takes the first copy that is right; without one it is the error of the store's own."""
    three = Three()
    repository = Repository(three.joined)
    ref = publish(repository)
    three.bare[0].put(ref.manifest, b"{")
    three.bare[1].put(ref.manifest, b"[]")
    assert repository.manifest(ref.manifest, name="model").generation == 1
    assert three.joined.tally.replica_reads == 2
    three.bare[2].put(ref.manifest, b"nothing")
    with pytest.raises(ManifestError):
        repository.manifest(ref.manifest, name="model")


def test_publishing_leaves_a_whole_snapshot_in_every_store():
    """Each of the stores alone, opened as a store of its own, has the same current generation."""
    three = Three()
    publish(Repository(three.joined))
    ref = publish(Repository(three.joined))
    assert ref.generation == 2
    for store in three.bare:
        assert Repository(store).look_up("model", KEY).ref == ref


def test_the_primary_is_lost_and_a_replica_serves():
    """With the primary gone, current generation and blobs come from a replica, and a publication is an error, not a fork."""
    three = Three()
    ref = publish(Repository(three.joined))
    three.stores[0].inject(DOWN)
    repository = Repository(three.joined)
    lookup = repository.look_up("model", KEY)
    assert lookup.ref == ref
    manifest = manifest_of("model", 2, KEY)
    with pytest.raises(StoreError):
        repository.publish(manifest, f"manifests/model/000002-{'a' * 16}", replaces=lookup)
    assert [Repository(store).look_up("model", KEY).ref for store in three.bare] == [ref] * 3


def test_a_fetcher_process_reads_replicas(tmp_path):
    """The address of a replicated store opens it in a fetcher, which takes a blob from the replica that the primary lacks."""
    url, replica = f"file://{tmp_path}/a", f"file://{tmp_path}/b"
    options = StoreOptions(store_replicas=replica)
    store = open_store(url, options)
    assert isinstance(store, ReplicatedStore)
    manifest = stored_chunks(store, [[(b"x" * 5000, "raw"), (b"y" * 9000, "zstd")]])
    LocalStore(tmp_path / "a").delete(blob_key(manifest.chunks[1].blob))
    arena = arena_of(manifest)
    request = FetchRequest(manifest, store, arena, 2, 64 << 20, verify_raw=True, address=Address(url, options))
    report = start_process(request).wait()
    assert (report.engine, report.tally.replica_reads) == ("process", 1)
    assert bytes(arena.writable(0)[:14000]) == b"x" * 5000 + b"y" * 9000


# --- opening -----------------------------------------------------------------------------------------------------------------


def test_the_settings_open_all_stores(tmp_path):
    """COLDSTART_STORE_REPLICAS names further stores; the address stays that of the first, for all who show or compare it."""
    variables = {"HOME": str(tmp_path), "COLDSTART_STORE": f"{tmp_path}/a"}
    settings = load({**variables, "COLDSTART_STORE_REPLICAS": f"{tmp_path}/b,file://{tmp_path}/c"})
    options = StoreOptions(*(getattr(settings, field) for field in StoreOptions._fields))
    store = open_store(settings.store, options)
    assert [each.url for each in store.stores] == [f"file://{tmp_path}/{name}" for name in "abc"]
    assert store.url == f"file://{tmp_path}/a"
    assert store.flat_files is not None, "segments of a folder are mapped, with replicas too"


def test_a_store_of_the_command_line_has_no_replicas_of_the_environment(tmp_path):
    """Who names another store for one command does not mean the replicas of the usual one, in its children neither."""
    variables = {"HOME": str(tmp_path), "COLDSTART_STORE": "/a", "COLDSTART_STORE_REPLICAS": "/b"}
    assert load(variables).store_replicas == "/b"
    assert load(variables, store="/c").store_replicas == ""
    assert load(variables, store="/c", store_replicas="/d").store_replicas == "/d"


REMOTE = StoreOptions("https://a.example.org", "eu", "planted-id", "planted-secret", "planted-token")


def _locations(store):
    return [each._store._store._reader._endpoint.host for each in store.stores]


def test_replicas_have_an_endpoint_and_credentials_of_their_own():
    """Unset ones are the store's; credentials are never mixed."""
    own = REMOTE._replace(
        store_replicas="s3://other/prefix",
        replica_endpoint_url="https://b.example.org",
        replica_access_key_id="second-id",
        replica_secret_access_key="second-secret",
    )
    store = open_store("s3://bucket/prefix", own)
    assert _locations(store) == ["a.example.org", "b.example.org"]
    signers = [each._store._store._reader._signer for each in store.stores]
    shown = [signer.headers("GET", "/", "h", unix_seconds=0.0) for signer in signers]
    assert "planted-id" in shown[0]["authorization"]
    assert "second-id" in shown[1]["authorization"]
    assert "x-amz-security-token" not in shown[1]
    same = open_store("s3://bucket/prefix", REMOTE._replace(store_replicas="s3://other/prefix"))
    assert _locations(same) == ["a.example.org"] * 2
    assert not [secret for secret in ("second-id", "second-secret", "planted") if secret in repr(own)]
    for opened in (store, same):
        opened.close()


def test_high_availability_waits_for_none_of_several():
    """A read has two attempts within two seconds at each of several stores; a write, and a lone store, have all there are."""
    options = REMOTE._replace(recovery="high_availability")
    store = open_store("s3://bucket", options._replace(store_replicas="s3://other,/folder"))
    members = store._members
    assert [member.reading._policy.attempts for member in members[:2]] == [2, 2]
    assert [member.writing._policy.attempts for member in members[:2]] == [6, 6]
    assert members[0].reading._store._store._reader._http._limits.silence_seconds == 3.0
    lone = open_store("s3://bucket", options)
    assert isinstance(lone, RetryingStore)
    assert lone._policy.attempts == 6
    for opened in (store, lone):
        opened.close()


def test_mode_none_reads_no_replica(tmp_path):
    """Its replicas are written, for others."""
    store = open_store(f"{tmp_path}/a", StoreOptions(store_replicas=f"{tmp_path}/b", recovery="none"))
    store.put(KEY_OF_BLOB, DATA)
    LocalStore(tmp_path / "a").delete(KEY_OF_BLOB)
    assert LocalStore(tmp_path / "b").get(KEY_OF_BLOB).data == DATA
    with pytest.raises(ObjectMissingError):
        store.get(KEY_OF_BLOB)


def test_a_ref_key_is_one_that_can_change():
    """The names that this module tells apart are those of the format."""
    assert ref_key("model", KEY.digest).startswith("refs/")
    assert KEY_OF_BLOB.startswith("blobs/")
