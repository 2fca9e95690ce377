"""Faults between the real client and a real server: every outcome is the right bytes or a typed error, never other bytes."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from itertools import count, cycle
from random import Random
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        self._bucket, self._options = bucket, options
        self.direct = self.opened(endpoint, limits, hedging)
        self.store = self.opened(self.proxy.url, limits, hedging)

    def opened(self, endpoint: str, limits: Limits, hedging: HedgePolicy) -> RetryingStore:
        """The bucket, as it is reached at an endpoint."""
        options = self._options._replace(endpoint_url=endpoint)
        location = locate(f"s3://{self._bucket}/prefix", options)
        reading = ReadingS3Store(location, options, limits=limits, hedging=hedging)
        probing = ProbingStore(reading, identity=self._bucket)
        return RetryingStore(probing, RetryPolicy(attempts=ATTEMPTS), clock=FakeClock())

    def fresh(self) -> None:
        """As it was made, but for what is stored: without rules, and with nothing seen or counted."""
        self.proxy.heal()
        self.proxy.seen.clear()
        self.proxy.struck.clear()
        self.store._attempts = self.store._retries = 0

    def close(self) -> None:
        """Close the connections."""
        self.store.close()
        self.direct.close()

    def publish(self, number: int, *, through: Any = None) -> Any:
        """Capture a state and make it current, directly unless through another store. Nothing that is stored is relied on."""
        repository = Repository(through or self.direct)
        lookup = repository.look_up("model", KEY)
        capture = capture_of(STATES[number], mends=True)
        if lookup.ref is not None:
            capture = capture._replace(generation=lookup.ref.generation + 1)
        written = write(capture, repository, codec="auto")
        return repository.publish(written.manifest, written.manifest_key, replaces=lookup)

    def manifest(self, *, previous: bool = False) -> Any:
        """The current generation, or the one before it."""
        repository = Repository(self.direct)
        ref = repository.look_up("model", KEY).ref
        assert ref is not None
        return repository.manifest(ref.previous_manifest if previous else ref.manifest, name="model")

    def fetched(self, number: int = 1, *, store: Any = None) -> Any:
        """The report of a fetch of the current generation, all of whose bytes were compared with the captured state's."""
        manifest = self.manifest()
        arena = arena_of(manifest)
        report = start_threads(FetchRequest(manifest, store or self.store, arena, 4, 64 << 20)).wait()
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
            "open_repository": lambda: Repository(self.store),
            "device": CpuDevice(),
            "threads": 4,
            "budget_bytes": 64 << 20,
            "files_folder": str(folder),
        }
        return Restoration(Request(**{**values, **options}), events.EventBus()).outcome()

    def current(self) -> int:
        """Which of the states the current generation is; every byte of it is compared."""
        found = restored(self.manifest(), self.direct)
        (number,) = (n for n, each in enumerate(STATES) if all(np.array_equal(found[k], each[k]) for k in each))
        return number


@pytest.fixture(scope="module")
def published(s3_endpoint: str, new_s3_bucket: Any, s3_options: Any) -> Iterator[Way]:
    """A way to two generations, the second current."""
    made = Way(s3_endpoint, new_s3_bucket(), s3_options)
    with made.proxy:
        made.publish(0)
        made.publish(1)
        yield made
    made.close()


@pytest.fixture(scope="module")
def written(s3_endpoint: str, new_s3_bucket: Any, s3_options: Any) -> Iterator[Way]:
    """A way to a bucket that is written: there is a current generation."""
    made = Way(s3_endpoint, new_s3_bucket(), s3_options)
    with made.proxy:
        made.publish(0)
        yield made
    made.close()


@pytest.fixture
def way(published: Way) -> Way:
    """The way to two generations, for reading."""
    published.fresh()
    return published


@pytest.fixture
def writing(written: Way) -> Way:
    """The way to the bucket that is written."""
    written.fresh()
    return written


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
    "gzip": ("request", StoreTransientError),
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


def some(cases: Any, *usual: Any) -> list[Any]:
    """All cases, of which the usual run always and the others with ``-m slow``."""
    return [case if case in usual else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def rule(what: str, **options: Any) -> Rule:
    """A rule for blobs by its name in the table."""
    action, _, status = what.partition(" ")
    return Rule(action, prefix="blobs/", status=int(status or 503), **options)


@pytest.mark.parametrize("what", READS)
def test_a_fault_of_one_read_is_healed_or_named(way: Way, what: str) -> None:
    """Once: the right bytes, after one more request or one more look at the chunk; what cannot pass is an error at once."""
    way.proxy.add(rule(what))
    heals, error = READS[what]
    if not heals:
        with pytest.raises(error):
            way.fetched()
        assert way.store.counts.retries == 0
        return
    report = way.fetched()
    assert (report.retried_chunks, way.store.counts.retries) == ((1, 0) if heals == "chunk" else (0, 1))
    assert len(way.proxy.struck) == 1


@pytest.mark.parametrize(
    "what", some(READS, "flip", "stall", "whole", "error200", "refuse 503", "refuse 403", "refuse 404")
)
def test_a_fault_that_stays_is_a_typed_error(way: Way, what: str) -> None:
    """For ever: the error that the table says, after no more requests for a blob than the policy has attempts and looks."""
    way.proxy.add(rule(what, times=None))
    with pytest.raises(READS[what][1]) as caught:
        way.fetched()
    most = 2 if READS[what][0] == "chunk" else ATTEMPTS if READS[what][0] else 1
    blobs = [key for method, key in way.proxy.seen if key.startswith("blobs/")]
    assert max(blobs.count(key) for key in blobs) <= most + 1, "one more where a connection kept open had been closed"
    assert "secret" not in str(caught.value)


def test_a_burst_of_refusals_is_outlasted(way: Way) -> None:
    """Two of three requests for each object are refused for a while, with one status or another."""
    numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
    statuses = cycle((429, 503, 500, 408))
    way.proxy.chance = lambda _, key: Rule("refuse", status=next(statuses)) if next(numbers[key]) % ATTEMPTS else None
    way.fetched()
    for _ in range(3):
        way.fetched()
    assert way.store.counts.retries == len(way.proxy.struck) > 3


def test_a_stalled_read_is_overtaken_by_its_hedge(way: Way) -> None:
    """A connection that falls silent costs the hedge's patience and one more request, and no attempt of the retries."""
    hedging = HedgePolicy(silence_seconds=0.1, late_seconds=0.1)
    store = way.opened(way.proxy.url, Limits(look_seconds=0.02), hedging)
    way.proxy.add(rule("stall"))
    assert way.fetched(store=store).retried_chunks == 0
    assert (store.counts.retries, way.proxy.struck) == (0, ["stall"])
    assert store._store._store.hedges == (1, 1)  # type: ignore[attr-defined]
    store.close()


# --- starts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", some(READS, "flip", "truncate", "stall", "refuse 403"))
def test_a_start_falls_back_with_a_label(way: Way, tmp_path: Any, what: str) -> None:
    """A fault that stays on what only the current generation has: the one before it, with the reason, and its right bytes."""
    before, now = ({chunk.blob for chunk in way.manifest(previous=each).chunks} for each in (True, False))
    for blob in now - before:
        way.proxy.add(rule(what, times=None)._replace(prefix=f"blobs/{blob[:2]}/{blob}"))
    outcome = way.outcome(tmp_path)
    assert isinstance(outcome, Restored)
    assert (outcome.recovered_by, outcome.manifest.generation) == ("previous_generation", 1)
    assert READS[what][1].__name__ in outcome.reason


@pytest.mark.parametrize("prefix", ["refs/", "manifests/", "blobs/"])
def test_credentials_that_expire_in_the_middle(way: Way, tmp_path: Any, prefix: str) -> None:
    """From some moment on everything is refused: the start says so, names no credential and loads."""
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
    way.proxy.add(Rule(action, prefix=prefix, times=1))
    first = way.outcome(tmp_path)
    way.proxy.add(Rule(action, prefix=prefix, times=None))
    for outcome in (first, way.outcome(tmp_path)):
        if isinstance(outcome, Restored):
            assert outcome.manifest.generation in (1, 2)
        else:
            assert isinstance(outcome, Unusable)
            assert "Error: " in outcome.reason
    if action in ("truncate", "reset", "no_etag"):
        assert isinstance(first, Restored)


@pytest.mark.parametrize(
    "what", some(("flip", "stall", "refuse 503", "refuse 403", "refuse 404", "reset_before"), "flip", "stall")
)
def test_a_replica_serves_what_the_way_to_the_store_spoils(
    s3_endpoint: str, new_s3_bucket: Any, s3_options: Any, tmp_path: Any, what: str
) -> None:
    """With a healthy replica behind another way, a start is restored from the current generation whatever befalls the blobs."""
    bad, good = (Way(s3_endpoint, new_s3_bucket(), s3_options) for _ in range(2))
    joined = ReplicatedStore([Member(way.store, way.store) for way in (bad, good)], clock=FakeClock())
    with bad.proxy, good.proxy:
        bad.publish(1, through=joined)
        bad.proxy.add(rule(what, times=None))
        outcome = bad.outcome(tmp_path, open_repository=lambda: Repository(joined))
        assert isinstance(outcome, Restored)
        assert (outcome.recovered_by, outcome.reason) == ("replica", "")
        for way in (bad, good):
            way.close()


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


@pytest.mark.parametrize("what", some(WRITES, "reset_before", "reset_after", "refuse_after 503", "flip_up"))
@pytest.mark.parametrize("prefix", ["blobs/", "manifests/", "refs/model/"])
def test_a_write_whose_request_or_answer_is_lost_once_takes_effect_once(writing: Way, prefix: str, what: str) -> None:
    """Whether the server heard of it or not: the generation is published, under the next number, and whole."""
    before, other = writing.manifest().generation, 1 - writing.current()
    writing.proxy.add(write_rule(what, prefix))
    ref = writing.publish(other, through=writing.store)
    assert writing.proxy.struck == [what.split(maxsplit=1)[0]]
    assert writing.current() == other
    stored = Repository(writing.direct).look_up("model", KEY).ref
    assert stored is not None
    assert (stored.generation, stored.write_id) == (before + 1, ref.write_id)


@pytest.mark.parametrize("what", some((*WRITES, "refuse 403", "refuse_after 403"), "reset_after", "refuse 403"))
@pytest.mark.parametrize("prefix", ["blobs/", "manifests/", "refs/model/"])
def test_a_write_that_never_goes_through_leaves_a_whole_generation(writing: Way, prefix: str, what: str) -> None:
    """The capture fails with a store's error, or is found to have succeeded; either way the current generation is whole."""
    before = writing.current()
    writing.proxy.add(write_rule(what, prefix, times=None))
    try:
        writing.publish(1 - before, through=writing.store)
        published = True
    except StoreError:
        published = False
    took_effect = published or ("after" in what and prefix == "refs/model/")
    assert writing.current() == (1 - before if took_effect else before)


def test_a_server_that_falls_silent_after_a_write(
    s3_endpoint: str, s3_bucket: str, s3_options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The swap of the ref took effect and its answer never comes: the client gives up, looks, and finds its own."""
    monkeypatch.setattr(s3, "READ_TIMEOUT_SECONDS", 0.5)
    way = Way(s3_endpoint, s3_bucket, s3_options)
    with way.proxy:
        way.publish(0)
        way.proxy.add(Rule("stall_after", "PUT", "refs/model/"))
        way.publish(1, through=way.store)
        assert way.proxy.struck == ["stall_after"]
        assert way.current() == 1
    way.close()


# --- everything at once ----------------------------------------------------------------------------------------------------

CHAOS = [
    *(
        Rule(action)
        for action in ("flip", "lying", "truncate", "shorten", "reset", "whole", "shifted", "error200", "reset_before")
    ),
    *(Rule("refuse", status=status) for status in (429, 503, 404, 403)),
]
CHAOS_WRITES = [Rule("reset_before"), Rule("reset_after"), Rule("flip_up"), Rule("refuse"), Rule("refuse_after")]


@pytest.mark.parametrize("seed", some(range(30), 0, 1))
def test_no_fault_of_any_request_is_taken_for_bytes(writing: Way, seed: int) -> None:
    """Any request may suffer anything: what comes of it is the captured bytes or an error of ours, and the store stays whole."""
    random = Random(seed)

    def chance(method: str, key: str) -> Rule | None:
        if random.random() > 0.2 or key.startswith("probes/"):
            return None
        return random.choice(CHAOS_WRITES if method == "PUT" else CHAOS)

    writing.proxy.chance = chance
    for turn in range(5):
        with suppress(ColdstartError):
            writing.publish(turn % 2, through=writing.store)
        number = writing.current()
        with suppress(ColdstartError):
            writing.fetched(number)
    assert writing.proxy.struck
    writing.proxy.heal()
    writing.fetched(writing.current())
