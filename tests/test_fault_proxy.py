"""Faults between the real client and a real server: every outcome is the right bytes or a typed error, never other bytes."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest

from coldstart import events
from coldstart.devices.cpu import CpuDevice
from coldstart.errors import (
    AccessDeniedError,
    BlobCorruptError,
    ColdstartError,
    ObjectMissingError,
    StoreError,
    StoreSetupError,
    StoreTransientError,
)
from coldstart.fetch import FetchRequest, start_threads
from coldstart.repository import Repository
from coldstart.restore import Request, Restoration, Restored, Unusable
from coldstart.stores import s3
from coldstart.stores.hedging import HedgePolicy
from coldstart.stores.http1_answer import Limits
from coldstart.stores.location import locate
from coldstart.stores.probing import ProbingStore
from coldstart.stores.replicated import Member, ReplicatedStore
from coldstart.stores.retrying import RetryingStore, RetryPolicy
from coldstart.stores.s3_reader import ReadingS3Store
from coldstart.testing import FakeClock
from tests.fault_proxy import FaultProxy, Rule
from tests.generations import KEY, arena_of, capture_of, restored, write

ATTEMPTS = 3
QUICK = Limits(
    connect_seconds=2.0,
    answer_seconds=0.5,
    silence_seconds=0.4,
    floor_bytes_per_second=1 << 20,
    floor_window_seconds=0.4,
    look_seconds=0.05,
)
NO_HEDGES = HedgePolicy(at_once=0)
STATES = [
    {
        "w": np.arange(40_000, dtype=np.float32) * seed,
        "noise": np.random.default_rng(seed).bytes(60_000).hex(),
        "same": np.ones(9),
    }
    for seed in (1, 2)
]
for _state in STATES:
    _state["noise"] = np.frombuffer(bytes.fromhex(_state["noise"]), np.uint8).copy()


class Way:
    """A bucket, a proxy before it, and a store that goes through the proxy; its waits between attempts take no time."""

    def __init__(
        self, endpoint: str, bucket: str, options: Any, *, limits: Limits = QUICK, hedging: Any = NO_HEDGES
    ) -> None:
        self.proxy = FaultProxy(endpoint, f"{bucket}/prefix")
        self.direct = self._open(options._replace(endpoint_url=endpoint), bucket, limits, hedging)
        self.store = self._open(options._replace(endpoint_url=self.proxy.url), bucket, limits, hedging)
        self.repository = Repository(self.store)

    def _open(self, options: Any, bucket: str, limits: Limits, hedging: Any) -> RetryingStore:
        reading = ReadingS3Store(locate(f"s3://{bucket}/prefix", options), options, limits=limits, hedging=hedging)
        probing = ProbingStore(reading, identity=bucket)
        return RetryingStore(probing, RetryPolicy(attempts=ATTEMPTS), clock=FakeClock())

    def publish(self, number: int, *, through: RetryingStore | None = None) -> Any:
        """Capture a state and make it current, directly unless through another store."""
        repository = Repository(through or self.direct)
        lookup = repository.look_up("model", KEY)
        capture = capture_of(STATES[number])
        if lookup.ref is not None:
            capture = capture._replace(generation=lookup.ref.generation + 1)
        written = write(capture, repository, codec="auto")
        return repository.publish(written.manifest, written.manifest_key, replaces=lookup)

    def fetched(self, number: int) -> Any:
        """The report of a fetch of the current generation, all of whose bytes were compared with the captured state's."""
        ref = Repository(self.direct).look_up("model", KEY).ref
        assert ref is not None
        manifest = Repository(self.direct).manifest(ref.manifest, name="model")
        arena = arena_of(manifest)
        report = start_threads(FetchRequest(manifest, self.store, arena, 4, 64 << 20)).wait()
        for index, buffer in enumerate(manifest.buffers):
            (leaf,) = (leaf for leaf in manifest.leaves if leaf.buffer == index)
            expected = STATES[number][leaf.path.strip('[]"')].tobytes()
            found = bytes(
                arena.writable(buffer.segment)[buffer.offset_bytes : buffer.offset_bytes + buffer.length_bytes]
            )
            assert found == expected, "wrong bytes, and nobody noticed"
        return report

    def outcome(self, folder: Any, **options: Any) -> Any:
        """What a start would find through the proxy."""
        values = {
            "name": "model",
            "key": KEY,
            "open_repository": lambda: self.repository,
            "device": CpuDevice(),
            "threads": 4,
            "budget_bytes": 64 << 20,
            "files_folder": str(folder),
        }
        return Restoration(Request(**{**values, **options}), events.EventBus()).outcome()

    def current(self) -> int:
        """Which of the states the current generation is; every byte of it is compared."""
        repository = Repository(self.direct)
        ref = repository.look_up("model", KEY).ref
        assert ref is not None
        found = restored(repository.manifest(ref.manifest, name="model"), self.direct)
        (number,) = (n for n, each in enumerate(STATES) if all(np.array_equal(found[k], each[k]) for k in each))
        return number


@pytest.fixture
def way(s3_endpoint: str, s3_bucket: str, s3_options: Any):
    """A way to an empty bucket."""
    made = Way(s3_endpoint, s3_bucket, s3_options)
    with made.proxy:
        yield made
    made.store.close()
    made.direct.close()


# --- reads -----------------------------------------------------------------------------------------------------------------

READS = {
    "flip": ("chunk", BlobCorruptError),
    "lying": ("chunk", BlobCorruptError),
    "truncate": ("request", StoreTransientError),
    "shorten": ("request", StoreTransientError),
    "reset": ("request", StoreTransientError),
    "reset_before": ("request", StoreTransientError),
    "stall": ("request", StoreTransientError),
    "trickle": ("request", StoreTransientError),
    "whole": ("request", StoreTransientError),
    "shifted": ("request", StoreTransientError),
    "error200": ("request", StoreTransientError),
    "html200": ("request", StoreTransientError),
    "refuse 408": ("request", StoreTransientError),
    "refuse 429": ("request", StoreTransientError),
    "refuse 500": ("request", StoreTransientError),
    "refuse 503": ("request", StoreTransientError),
    "refuse 403": ("", AccessDeniedError),
    "refuse 404": ("", ObjectMissingError),
    "refuse 301": ("", StoreSetupError),
    "refuse 307": ("", StoreSetupError),
}
"""What happens to a blob -> what heals it when it happens once ("": nothing, it will not pass), and the error when it stays."""


def rule(what: str, **options: Any) -> Rule:
    """A rule for blobs by its name in the table."""
    action, _, status = what.partition(" ")
    return Rule(action, prefix="blobs/", status=int(status or 503), **options)


@pytest.mark.parametrize("what", READS)
def test_a_fault_of_one_read_is_healed_or_named(way: Way, what: str) -> None:
    """Once: the right bytes, after one more request or one more look at the chunk; what cannot pass is an error at once."""
    way.publish(0)
    way.proxy.add(rule(what))
    heals, error = READS[what]
    if not heals:
        with pytest.raises(error):
            way.fetched(0)
        assert way.store.counts.retries == 0
        return
    report = way.fetched(0)
    assert (report.retried_chunks, way.store.counts.retries) == ((1, 0) if heals == "chunk" else (0, 1))
    assert len(way.proxy.struck) == 1


@pytest.mark.parametrize("what", READS)
def test_a_fault_that_stays_is_a_typed_error(way: Way, what: str) -> None:
    """For ever: the error that the table says, after no more requests for a blob than the policy has attempts and looks."""
    way.publish(0)
    way.proxy.add(rule(what, times=None))
    with pytest.raises(READS[what][1]) as caught:
        way.fetched(0)
    most = 2 if READS[what][0] == "chunk" else ATTEMPTS if READS[what][0] else 1
    blobs = [key for method, key in way.proxy.seen if key.startswith("blobs/")]
    assert max(blobs.count(key) for key in blobs) <= most
    assert "secret" not in str(caught.value)


def test_a_burst_of_refusals_is_outlasted(way: Way) -> None:
    """Every other request of all is refused for a while, with one status or another."""
    way.publish(0)
    statuses = Random(0).choices([429, 503, 500, 408], k=8)
    way.proxy.add(*(rule(f"refuse {status}", skip=1) for status in statuses))
    for _ in range(3):
        way.fetched(0)
    assert way.store.counts.retries == len(way.proxy.struck) > 0


def test_a_stalled_read_is_overtaken_by_its_hedge(s3_endpoint: str, s3_bucket: str, s3_options: Any) -> None:
    """A connection that falls silent costs the hedge's patience and one more request, and no attempt of the retries."""
    patient = Limits(look_seconds=0.02)
    way = Way(
        s3_endpoint, s3_bucket, s3_options, limits=patient, hedging=HedgePolicy(silence_seconds=0.1, late_seconds=0.1)
    )
    with way.proxy:
        way.publish(0)
        way.proxy.add(rule("stall"))
        assert way.fetched(0).retried_chunks == 0
        assert (way.store.counts.retries, way.proxy.struck) == (0, ["stall"])
        way.store.close()
        way.direct.close()


# --- starts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", READS)
def test_a_start_falls_back_with_a_label(way: Way, tmp_path: Any, what: str) -> None:
    """A fault that stays on what only the current generation has: the one before it, with the reason, and its right bytes."""
    old = way.publish(0)
    new = way.publish(1)
    manifests = [Repository(way.direct).manifest(ref.manifest, name="model") for ref in (old, new)]
    before, now = ({chunk.blob for chunk in manifest.chunks} for manifest in manifests)
    for blob in now - before:
        way.proxy.add(rule(what, times=None)._replace(prefix=f"blobs/{blob[:2]}/{blob}"))
    outcome = way.outcome(tmp_path)
    assert isinstance(outcome, Restored)
    assert (outcome.recovered_by, outcome.manifest.generation) == ("previous_generation", 1)
    assert READS[what][1].__name__ in outcome.reason


@pytest.mark.parametrize("prefix", ["refs/", "manifests/", "blobs/"])
def test_credentials_that_expire_in_the_middle(way: Way, tmp_path: Any, prefix: str) -> None:
    """From some moment on everything is refused: the start says so, names no credential and loads."""
    way.publish(1)
    order = ("refs/", "manifests/", "blobs/")
    for each in order[order.index(prefix) :]:
        way.proxy.add(Rule("refuse", prefix=each, times=None, status=403, skip=each == "blobs/"))
    outcome = way.outcome(tmp_path)
    assert isinstance(outcome, Unusable)
    assert "AccessDeniedError" in outcome.reason
    assert "secret" not in outcome.reason


@pytest.mark.parametrize("action", ["flip", "truncate", "shorten", "reset", "error200", "html200", "no_etag"])
@pytest.mark.parametrize("prefix", ["refs/", "manifests/"])
def test_a_ref_or_manifest_that_arrives_wrong(way: Way, tmp_path: Any, prefix: str, action: str) -> None:
    """For ever: a reason or a generation that is whole; once and noticed by the client: asked again, and as if nothing was."""
    way.publish(1)
    way.proxy.add(Rule(action, prefix=prefix, times=1))
    first = way.outcome(tmp_path)
    way.proxy.add(Rule(action, prefix=prefix, times=None))
    for outcome in (first, way.outcome(tmp_path)):
        if isinstance(outcome, Restored):
            assert outcome.manifest.generation == 1
        else:
            assert isinstance(outcome, Unusable)
            assert "Error: " in outcome.reason
    if action in ("truncate", "reset", "no_etag"):
        assert isinstance(first, Restored)


@pytest.mark.parametrize("what", ["flip", "stall", "refuse 503", "refuse 403", "refuse 404", "reset_before"])
def test_a_replica_serves_what_the_way_to_the_store_spoils(
    s3_endpoint: str, new_s3_bucket: Any, s3_options: Any, tmp_path: Any, what: str
) -> None:
    """With a healthy replica behind another way, a start is restored from the current generation whatever befalls the blobs."""
    bad, good = (Way(s3_endpoint, new_s3_bucket(), s3_options) for _ in range(2))
    joined = ReplicatedStore([Member(way.store, way.store) for way in (bad, good)], clock=FakeClock())
    with bad.proxy, good.proxy:
        bad.publish(1, through=joined)  # type: ignore[arg-type]
        bad.proxy.add(rule(what, times=None))
        outcome = bad.outcome(tmp_path, open_repository=lambda: Repository(joined))
        assert isinstance(outcome, Restored)
        assert (outcome.recovered_by, outcome.reason) == ("replica", "")
        for way in (bad, good):
            way.store.close()
            way.direct.close()


# --- writes ----------------------------------------------------------------------------------------------------------------

WRITES = [
    "reset_before",
    "reset_after",
    "refuse 503",
    "refuse 429",
    "refuse 500",
    "refuse_after 503",
    "refuse_after 500",
    "flip_up",
]


def write_rule(what: str, prefix: str, **options: Any) -> Rule:
    """A rule for the writes of some objects."""
    action, _, status = what.partition(" ")
    return Rule(action, "PUT", prefix, status=int(status or 503), **options)


@pytest.mark.parametrize("what", WRITES)
@pytest.mark.parametrize("prefix", ["blobs/", "manifests/", "refs/model/"])
def test_a_write_whose_request_or_answer_is_lost_once_takes_effect_once(way: Way, prefix: str, what: str) -> None:
    """Whether the server heard of it or not: the generation is published, under the next number, and whole."""
    way.publish(0)
    way.proxy.add(write_rule(what, prefix))
    ref = way.publish(1, through=way.store)
    assert way.proxy.struck == [what.split(maxsplit=1)[0]]
    assert way.current() == 1
    stored = Repository(way.direct).look_up("model", KEY).ref
    assert stored is not None
    assert (stored.generation, stored.write_id) == (2, ref.write_id)


@pytest.mark.parametrize("what", [*WRITES, "refuse 403", "refuse_after 403"])
@pytest.mark.parametrize("prefix", ["blobs/", "manifests/", "refs/model/"])
def test_a_write_that_never_goes_through_leaves_a_whole_generation(way: Way, prefix: str, what: str) -> None:
    """The capture fails with a store's error, or is found to have succeeded; either way the current generation is whole."""
    way.publish(0)
    way.proxy.add(write_rule(what, prefix, times=None))
    try:
        way.publish(1, through=way.store)
        published = True
    except StoreError:
        published = False
    assert way.current() == (1 if published or ("after" in what and prefix == "refs/model/") else 0)
    way.proxy.heal()
    way.publish(1, through=way.store)
    assert way.current() == 1


def test_a_server_that_falls_silent_after_a_write(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """The swap of the ref took effect and its answer never comes: the client gives up, looks, and finds its own."""
    monkeypatch.setattr(s3, "READ_TIMEOUT_SECONDS", 0.5)
    way.publish(0)
    way.proxy.add(Rule("stall_after", "PUT", "refs/model/"))
    way.publish(1, through=way.store)
    assert way.proxy.struck == ["stall_after"]
    assert way.current() == 1


# --- everything at once ----------------------------------------------------------------------------------------------------

CHAOS = [
    *(
        Rule(action)
        for action in ("flip", "lying", "truncate", "shorten", "reset", "whole", "shifted", "error200", "reset_before")
    ),
    *(Rule("refuse", status=status) for status in (429, 503, 404, 403)),
]
CHAOS_WRITES = [Rule("reset_before"), Rule("reset_after"), Rule("flip_up"), Rule("refuse"), Rule("refuse_after")]


@pytest.mark.parametrize("seed", range(4))
def test_no_fault_of_any_request_is_taken_for_bytes(way: Way, tmp_path: Any, seed: int) -> None:
    """Any request may suffer anything: what comes of it is the captured bytes or an error of ours, and the store stays whole."""
    random = Random(seed)

    def chance(method: str, key: str) -> Rule | None:
        if random.random() > 0.15 or key.startswith("probes/"):
            return None
        return random.choice(CHAOS_WRITES if method == "PUT" else CHAOS)

    way.publish(0)
    outcomes = []
    for turn in range(6):
        way.proxy.chance = chance
        try:
            way.publish(turn % 2, through=way.store)
        except ColdstartError as error:
            outcomes.append(type(error).__name__)
        number = way.current()
        try:
            way.fetched(number)
            outcomes.append("whole")
        except ColdstartError as error:
            outcomes.append(type(error).__name__)
    assert way.proxy.struck
    way.proxy.heal()
    way.fetched(way.current())
