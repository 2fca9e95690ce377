"""Recovery: how far each mode goes down the order, what a start says of each step, and what it tries first next time."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from coldstart import events
from coldstart.config import SETTINGS
from coldstart.errors import RecoveryError
from coldstart.manifest import blob_key
from coldstart.recovery import MODES, STEPS, check_load
from coldstart.repository import Repository
from coldstart.restore import Missing, Restored, Unusable
from coldstart.stores.base import Tally
from coldstart.stores.memory import MemoryStore
from coldstart.stores.replicated import Member, ReplicatedStore
from coldstart.testing import Fault, FaultyStore
from tests.starts import SCALED, SCALES, Project
from tests.test_restore import World, state, value_of

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.capture import Written

LOADS = {
    "none": (False, True),
    "standard": (True, True),
    "high_availability": (True, True),
    "checkpoint": (False, False),
}
"""Mode -> whether load may run where a snapshot could not be used, and where there is none."""


# --- modes ---------------------------------------------------------------------------------------------------------------------


def test_the_modes_are_those_of_the_setting():
    """COLDSTART_RECOVERY takes the modes of the table and no others."""
    (setting,) = (setting for setting in SETTINGS if setting.field == "recovery")
    assert set(setting.kind.words) == set(MODES) == set(LOADS)
    assert setting.default == "standard"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("failed", [True, False])
def test_whether_load_may_run(mode: str, failed: bool) -> None:
    """A mode that forbids it says which, why it would have to run, and what to do."""
    if LOADS[mode][0 if failed else 1]:
        check_load(mode, failed=failed, reason="r", snapshot="model")
        return
    with pytest.raises(RecoveryError) as caught:
        check_load(mode, failed=failed, reason="the reason", snapshot="model")
    assert all(part in str(caught.value) for part in ("the reason", f"COLDSTART_RECOVERY={mode}"))
    assert caught.value.snapshot == "model"


class TwoGenerations(World):
    """A store with replica, two generations, and a blob that only the current one has."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.primary, self.replica = self.store, FaultyStore(MemoryStore())
        self.joined = ReplicatedStore([Member(store, store) for store in (self.primary, self.replica)])
        self.repository = Repository(self.joined)
        self.old = self.publish(state(0))
        self.new = self.publish(state(1), follows=self.old)
        self.own = blob_key(only_in(self.new, self.old))

    def begin(self, **options: Any) -> Any:
        return super().begin(**{"files_folder": self.folder, **options})

    def spoil(self, store: FaultyStore, key: str = "") -> None:
        """From now on the store gives altered bytes of a blob."""
        store.inject(Fault("corrupt", "read_into", key or self.own, times=None))

    def steps(self) -> list[str]:
        """The steps that were told since the last call of this."""
        found = [event.step for event in self.seen.of(events.Recovered)]
        new, self._told = found[getattr(self, "_told", 0) :], len(found)
        return new


def only_in(one: Written, other: Written) -> str:
    """The blob that one generation has and the other has not."""
    (blob,) = {chunk.blob for chunk in one.manifest.chunks} - {chunk.blob for chunk in other.manifest.chunks}
    return blob


@pytest.fixture
def two(tmp_path: Path) -> TwoGenerations:
    """Two generations in a store with a replica."""
    return TwoGenerations(str(tmp_path))


@pytest.mark.parametrize("mode", ["standard", "high_availability", "checkpoint"])
def test_the_order_of_steps(two: TwoGenerations, mode: str) -> None:
    """Chunk again, replica, previous generation: each is taken when the one before it did not help, and is told."""
    two.primary.inject(Fault("corrupt", "read_into", two.own, times=1))
    first = two.outcome(recovery=mode)
    two.spoil(two.primary)
    second = two.outcome(recovery=mode)
    two.spoil(two.replica)
    third = two.outcome(recovery=mode)
    found = [(value_of(each), each.recovered_by, each.replica_reads) for each in (first, second, third)]
    # The first blob is hashed on its second read, and right on it; the second start's first read is of a blob read before.
    assert found == [(1, "chunk_retry", 0), (1, "replica", 1), (0, "previous_generation", 0)]
    assert two.steps() == list(STEPS[:3])


def test_none_takes_the_current_generation_or_fails(two: TwoGenerations) -> None:
    """A chunk is read again in every mode; the generation before is not touched in this one."""
    two.primary.inject(Fault("corrupt", "read_into", two.own, times=1))
    assert two.outcome(recovery="none").recovered_by == "chunk_retry"
    two.spoil(two.primary)
    two.spoil(two.replica)
    outcome = two.outcome(recovery="none")
    assert isinstance(outcome, Unusable)
    assert [event.generation for event in two.seen.of(events.SnapshotFound)] == [2, 2]


@pytest.mark.parametrize("kind", ["transient_before", "missing", "denied", "truncate"])
def test_a_replica_serves_whatever_the_primary_does(two: TwoGenerations, kind: Any) -> None:
    """A primary whose blobs cannot be had costs nothing but the label."""
    two.primary.inject(Fault(kind, "read_into", times=None))
    outcome = two.outcome()
    assert isinstance(outcome, Restored)
    assert (value_of(outcome), outcome.recovered_by) == (1, "replica")


def test_a_primary_that_is_down_altogether(two: TwoGenerations) -> None:
    """Ref, manifest and blobs come from the replica."""
    two.primary.inject(Fault("transient_before", times=None))
    outcome = two.outcome()
    assert (value_of(outcome), outcome.recovered_by) == (1, "replica")


def test_a_frame_that_does_not_decode_leads_to_the_generation_before(world: World, tmp_path: Path) -> None:
    """A chunk whose stored bytes are what its name says, and no frame, is a bad generation and no bug of ours."""
    old = world.publish(state(0))
    new = world.publish(state(1), follows=old)
    blob = only_in(new, old)
    chunks = tuple(
        chunk._replace(codec="zstd", parameters={}) if chunk.blob == blob else chunk for chunk in new.manifest.chunks
    )
    key = world.repository.put_manifest(new.manifest._replace(chunks=chunks))
    lookup = world.repository.look_up("model", new.manifest.key)
    assert lookup.ref is not None
    from coldstart.manifest import ref_key, ref_to_json

    ref = lookup.ref._replace(manifest=key)
    world.store.put(ref_key("model", new.manifest.key.digest), ref_to_json(ref))
    outcome = world.outcome(files_folder=str(tmp_path))
    assert (value_of(outcome), outcome.recovered_by) == (0, "previous_generation")
    assert "CodecError" in outcome.reason


@pytest.fixture
def world() -> World:
    """An empty store."""
    return World()


# --- quarantine ----------------------------------------------------------------------------------------------------------------


def test_a_bad_generation_is_not_tried_first_again(two: TwoGenerations) -> None:
    """The next worker of the host begins with the one before, and says why; the store is as it was."""
    for store in (two.primary, two.replica):
        two.spoil(store)
    before = {info.key for info in two.primary.list("")}
    assert two.outcome().recovered_by == "previous_generation"
    reads = two.primary.count("read_into", two.own)
    again = two.outcome()
    assert (value_of(again), again.recovered_by) == (0, "previous_generation")
    assert "in quarantine on this host: BlobCorruptError" in again.reason
    assert two.primary.count("read_into", two.own) == reads, "nothing of it was read"
    assert {info.key for info in two.primary.list("")} == before
    assert two.steps() == ["previous_generation"] * 2


def test_a_quarantined_generation_is_tried_before_load(two: TwoGenerations) -> None:
    """If the generation before is worse, the noted one is tried after all, and lifts its note when it is good."""
    for store in (two.primary, two.replica):
        two.spoil(store)
    two.outcome()
    for store in (two.primary, two.replica):
        store.heal()
        two.spoil(store, blob_key(only_in(two.old, two.new)))
    outcome = two.outcome()
    assert (value_of(outcome), outcome.recovered_by) == (1, "none")
    for store in (two.primary, two.replica):
        store.heal()
    assert (value_of(two.outcome()), two.outcome().reason) == (1, "")


def test_of_two_bad_generations_the_current_one_is_tried_first(two: TwoGenerations) -> None:
    """Where both have notes the usual order holds, and nothing is left out."""
    for store in (two.primary, two.replica):
        store.inject(Fault("missing", "read_into", times=None))
    for _ in range(2):
        outcome = two.outcome()
        assert isinstance(outcome, Unusable)
        assert outcome.reason.count("ObjectMissingError") == 2
    for store in (two.primary, two.replica):
        store.heal()
    assert (value_of(two.outcome()), two.outcome().recovered_by) == (1, "none")


@pytest.mark.parametrize("kind", ["transient_before", "denied"])
def test_a_store_in_trouble_is_no_bad_generation(two: TwoGenerations, kind: Any) -> None:
    """What may pass, and a credential that has expired, say nothing about a generation."""
    for store in (two.primary, two.replica):
        store.inject(Fault(kind, "read_into", times=None))
    assert isinstance(two.outcome(), Unusable)
    two.joined._rests_until.clear()
    for store in (two.primary, two.replica):
        store.heal()
    assert (value_of(two.outcome()), two.outcome().recovered_by) == (1, "none")


def test_no_snapshot_is_no_failure(world: World) -> None:
    """A key without a snapshot is missing in every mode; what then may run is decided by the start."""
    for mode in MODES:
        assert isinstance(world.outcome(recovery=mode), Missing)


# --- starts --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose store has a replica and one generation. Copy it before changing it."""
    project = Project(tmp_path_factory.mktemp("recovery") / "whole")
    project.write(SCALES)
    with_replica(project)
    assert project.run().capture["published"]
    return project


def with_replica(project: Project) -> None:
    """Have a replica beside the store."""
    project.environment["COLDSTART_STORE_REPLICAS"] = f"file://{project.folder}/replica"


def empty(project: Project, folder: str) -> None:
    """Remove the blobs, and the decoded segments, of one store of a project."""
    for path in (project.folder / folder).rglob("*"):
        if path.is_file() and (".flat" in path.parts or "blobs" in path.parts):
            path.unlink()


def test_a_start_from_a_replica_says_so(whole: Project, tmp_path: Path) -> None:
    """With the blobs of the store gone, the start is restored from the replica, and its record and events say so."""
    project = whole.copy(tmp_path / "copy")
    with_replica(project)
    empty(project, "store")
    project.environment["COLDSTART_LOG"] = "json"
    start = project.run()
    assert (start.kind, start.record["recovered_by"], start.output) == ("restored", "replica", SCALED)
    recovery = start.record["recovery"]
    assert recovery["replica_reads"] > 0
    assert (recovery["mode"], recovery["failed_generations"]) == ("standard", 0)
    lines = [json.loads(line) for line in start.errors.splitlines() if line.startswith("{")]
    assert [line["step"] for line in lines if line["event"] == "recovered"] == ["replica"]
    assert [line for line in lines if line["event"] == "store_degraded"]


@pytest.mark.parametrize("engine", ["process", "threads"])
def test_a_start_whose_bucket_cannot_be_reached_comes_from_a_replica(
    whole: Project, tmp_path: Path, engine: str
) -> None:
    """Ref, manifest and blobs come from a folder where nobody listens at the bucket's endpoint, whoever fetches."""
    project = whole.copy(tmp_path / "copy")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    start = project.run(
        COLDSTART_STORE="s3://bucket/prefix",
        COLDSTART_STORE_REPLICAS=f"file://{project.store}",
        COLDSTART_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        COLDSTART_REGION="us-east-1",
        COLDSTART_ACCESS_KEY_ID="id",
        COLDSTART_SECRET_ACCESS_KEY="secret",
        COLDSTART_RECOVERY="high_availability",
        COLDSTART_FETCH_ENGINE=engine,
        COLDSTART_CAPTURE="off",
        COLDSTART_START_RECORDS="off",
    )
    assert (start.kind, start.record["recovered_by"], start.output) == ("restored", "replica", SCALED)
    assert start.record["engines"] == [engine]


def test_a_start_that_loads_after_all_says_what_is_pending(whole: Project, tmp_path: Path) -> None:
    """With the blobs gone everywhere, load answers, and the record names the manifest that somebody has to look at."""
    project = whole.copy(tmp_path / "copy")
    with_replica(project)
    for folder in ("store", "replica"):
        empty(project, folder)
    start = project.run(COLDSTART_CAPTURE="off", COLDSTART_LOG="json")
    assert (start.kind, start.output) == ("fallback", SCALED)
    recovery = start.record["recovery"]
    assert recovery["failed_generations"] == 1
    assert recovery["pending"]["generations"][0].startswith("manifests/scales/000001-")
    lines = [json.loads(line) for line in start.errors.splitlines() if line.startswith("{")]
    assert [line["step"] for line in lines if line["event"] == "recovered"] == ["load"]


@pytest.mark.parametrize("mode", ["none", "checkpoint"])
def test_a_mode_without_load_fails_where_the_snapshot_cannot_be_used(whole: Project, tmp_path: Path, mode: str) -> None:
    """The start fails with one clear error; with the bytes back it is restored."""
    project = whole.copy(tmp_path / "copy")
    blobs = {path: path.read_bytes() for path in project.objects("blobs")}
    empty(project, "store")
    project.environment.pop("COLDSTART_STORE_REPLICAS")
    start = project.try_run(COLDSTART_RECOVERY=mode)
    assert start.code != 0
    assert f"COLDSTART_RECOVERY={mode} does not let load run" in start.errors
    for path, data in blobs.items():
        path.write_bytes(data)
    assert project.run(COLDSTART_RECOVERY=mode).kind == "restored"


def test_where_there_is_no_snapshot_checkpoint_fails_and_none_does_not(tmp_path: Path) -> None:
    """A cold start is no recovery; checkpoint wants a generation all the same, unless a fresh one is asked for."""
    project = Project(tmp_path / "project")
    project.write(SCALES)
    start = project.try_run(COLDSTART_RECOVERY="checkpoint")
    assert start.code != 0
    assert "there is no snapshot to start from: no snapshot yet" in start.errors
    assert project.run("--fresh", COLDSTART_RECOVERY="checkpoint").capture["published"]
    assert project.run(COLDSTART_RECOVERY="checkpoint").kind == "restored"
    project.edit("FACTOR = 3.0", "FACTOR = 4.0")
    assert project.run(COLDSTART_RECOVERY="none", COLDSTART_CAPTURE="off").kind == "cold"


def test_tallies_add_up() -> None:
    """Those of several stores and processes are summed field by field."""
    assert Tally(1, 2, 3) + Tally(10, 20, 30) == Tally(11, 22, 33)
    assert Tally(11, 22, 33) - Tally(1, 2, 3) == Tally(10, 20, 30)
