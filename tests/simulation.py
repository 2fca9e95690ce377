"""A small world in which the real commit protocol, leases and collector run under a seeded scheduler and a virtual clock.

Actors are threads of which one runs at a time: every call of the store is a scheduling point, where the seed decides who
goes on, how much time passes (at most a second), whether the request is lost, the answer is lost or the bucket throttles,
and whether the actor is killed. The same seed gives the same run. What must hold is looked at after every write of a ref
and every deletion; see ``World.check``.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.collect import Rules, collect
from coldstart.commit import confirm, has_to_settle
from coldstart.errors import (
    BlobCorruptError,
    CaptureError,
    ColdstartError,
    ConditionFailedError,
    ManifestError,
    ObjectMissingError,
    StateChangedError,
    StoreError,
    StoreTransientError,
)
from coldstart.leases import Held, hold
from coldstart.manifest import (
    Chunk,
    KeyRecord,
    Manifest,
    Published,
    Ref,
    Segment,
    blob_key,
    manifest_from_json,
    ref_from_json,
    ref_key,
    tombstone_from_json,
)
from coldstart.plan import known_chunks
from coldstart.repository import Margins, Repository
from coldstart.retention import Retention
from coldstart.rollback import roll_back
from coldstart.save import Terms
from coldstart.save.stage import Rate, Stage
from coldstart.stores.base import Capabilities, ObjectInfo, Store, StoredObject
from coldstart.stores.retrying import RetryingStore, RetryPolicy
from tests.generations import KEY, OTHER_KEY, hash_of, manifest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GRACE_SECONDS = 2000.0
MARGINS = Margins(grace_seconds=GRACE_SECONDS, settle_seconds=120.0, ref_interval_seconds=1.0)
NAME = "model"
KEYS = (KEY, OTHER_KEY)
REFS = [ref_key(NAME, key.digest) for key in KEYS]
CONTENTS = [bytes([number]) * 8 for number in range(6)]
BASE = manifest_of(NAME)
FAULT_SHARE, KILL_SHARE = 0.06, 0.002


class Violation(AssertionError):
    """The protocol broke a promise."""


class Killed(BaseException):
    """An actor's process is no more. Nothing that it does on the way out reaches the store."""


class Actor:
    """One process: a thread that runs only when it is its turn."""

    def __init__(self, world: World, name: str, work: Callable[[Actor], None], *, skew_seconds: float = 0.0) -> None:
        self.world = world
        self.name = name
        self.skew_seconds = skew_seconds
        self.wake_seconds = 0.0
        self.is_dead = False
        self.turn = threading.Lock()
        self.turn.acquire()
        self._work = work
        self.thread = threading.Thread(target=self._run, daemon=True)

    def time(self) -> float:
        """This machine's clock, which may be hours off."""
        return self.world.now + self.skew_seconds

    def monotonic(self) -> float:
        return self.world.now

    def sleep(self, seconds: float) -> None:
        self.wake_seconds = self.world.now + seconds
        self.world.schedule(self)

    def _run(self) -> None:
        self.turn.acquire()
        try:
            self._work(self)
        except Killed:
            pass
        except BaseException as error:
            self.world.failure = self.world.failure or error
        self.world.leave(self)


class World:
    """The store, the clock, and what has happened."""

    def __init__(self, seed: int, protocol: Protocol) -> None:
        self.random = Random(seed)
        self.protocol = protocol
        self.now = 1_700_000_000.0
        self.entries: dict[str, tuple[bytes, str, float]] = {}
        self.steps = 0
        self.faults = True
        self.failure: BaseException | None = None
        self.ever_named: dict[str, int] = {}
        """Manifest -> its number, of everything that a ref has ever named."""
        self.contents: dict[str, tuple[str, ...]] = {}
        """Manifest -> the blobs that its writer meant."""
        self.acknowledged: list[str] = []
        self.collected = 0
        self.lost = 0
        self.unsettled = 0
        self._numbers: dict[tuple[str, int], str] = {}
        self._slots: dict[str, Any] = {}
        self._actors: list[Actor] = []
        self._over = threading.Event()
        for content in CONTENTS:  # orphans of captures that nobody remembers
            if self.random.random() < 0.6:
                written_seconds = self.now - GRACE_SECONDS * (0.3 + self.random.random())
                self.entries[blob_key(hash_of(content))] = (content, "before", written_seconds)

    # --- scheduling ----------------------------------------------------------------------------------------------------

    def run(self, *actors: Actor) -> None:
        """Run all actors to their ends. Raises what the first failing one raised."""
        self._actors = list(actors)
        self._over.clear()
        for actor in actors:
            actor.thread.start()
        self._next().turn.release()
        assert self._over.wait(60), "the simulation stands still"
        for actor in actors:
            actor.thread.join()
        if self.failure is not None:
            raise self.failure

    def _next(self) -> Actor:
        ready = [actor for actor in self._actors if actor.wake_seconds <= self.now]
        if not ready:
            self.now = min(actor.wake_seconds for actor in self._actors)
            ready = [actor for actor in self._actors if actor.wake_seconds <= self.now]
        return ready[int(self.random.random() * len(ready))]

    def schedule(self, actor: Actor) -> None:
        """Let the seed decide who goes on; returns when it is this actor's turn again."""
        chosen = self._next()
        if chosen is not actor:
            chosen.turn.release()
            actor.turn.acquire()
        if self.failure is not None:
            raise Killed

    def leave(self, actor: Actor) -> None:
        self._actors.remove(actor)
        if self._actors:
            self._next().turn.release()
        else:
            self._over.set()

    def step(self, actor: Actor) -> None:
        """A call of the store is about to happen."""
        if actor.is_dead:
            raise Killed
        self.steps += 1
        self.now += self.random.random()
        self.schedule(actor)
        if self.faults and self.random.random() < KILL_SHARE:
            actor.is_dead = True
            raise Killed

    # --- what must hold -------------------------------------------------------------------------------------------------

    def ref_written(self, key: str, data: bytes, actor: Actor) -> None:
        """Numbers are unique, generations are what their writers meant, and nobody but a collector forgets one."""
        before = self._slots.get(key)
        self._slots[key] = slot = tombstone_from_json(data) or ref_from_json(data)
        if not isinstance(slot, Ref):
            return
        for entry in slot.named:
            if self._numbers.setdefault((key, entry.generation), entry.manifest) != entry.manifest:
                raise Violation(f"two generations have number {entry.generation}")
            if entry.manifest not in self.ever_named and entry.manifest != slot.manifest:
                raise Violation(f"{entry.manifest} is named as an earlier generation and never was current")
            self.ever_named.setdefault(entry.manifest, entry.generation)
        kept = {entry.manifest for entry in slot.named}
        if isinstance(before, Ref):
            lost = {entry.manifest for entry in before.named} - kept
            if lost and (not actor.name.startswith("collector") or before.manifest in lost):
                raise Violation(f"{actor.name} lost {sorted(lost)}")
        self.check()

    def check(self) -> None:
        """Every generation that a ref names restores: its manifest and all of its blobs are there."""
        for entry in self._live():
            if entry.manifest not in self.entries:
                raise Violation(f"the live manifest {entry.manifest} is gone")
            for blob in self.contents[entry.manifest]:
                if blob_key(blob) not in self.entries:
                    raise Violation(f"blob {blob[:8]} of live generation {entry.generation} is gone")

    def acknowledge(self, ref: Ref) -> None:
        """A writer was told that its generation became current: it must have been."""
        if ref.manifest not in self.ever_named:
            raise Violation(f"generation {ref.generation} was acknowledged and never was current")
        self.acknowledged.append(ref.manifest)

    def refuse(self, manifest_key: str) -> None:
        """A writer was told that another one was first: its generation must never have been current."""
        self.lost += 1
        if manifest_key in self.ever_named:
            raise Violation(f"generation {self.ever_named[manifest_key]} was current, and its writer was told it lost")

    def is_live(self, manifest_key: str) -> bool:
        return any(entry.manifest == manifest_key for entry in self._live())

    def _live(self) -> list[Published]:
        return [entry for slot in self._slots.values() if isinstance(slot, Ref) for entry in slot.named]


class SimulatedStore(Store):
    """The world's objects as one actor reaches them: with conditions, one write a second of a ref, and faults."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._world = actor.world

    @property
    def url(self) -> str:
        return "sim://store"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(create_if_absent=True, compare_and_swap=True, ranges=True)

    def get(self, key: str) -> StoredObject:
        data, etag, _ = self._call(lambda: self._entry(key))
        return StoredObject(data, etag)

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        raise NotImplementedError

    def head(self, key: str) -> ObjectInfo:
        data, _, modified_seconds = self._call(lambda: self._entry(key))
        return ObjectInfo(key, len(data), modified_seconds)

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        copied = bytes(data)
        return self._call(lambda: self._put(key, copied, if_absent=if_absent, if_match=if_match))

    def delete(self, key: str) -> None:
        """May be on its way for long, though less than writers wait who had written the object again meanwhile."""
        if self._world.random.random() < 0.3:
            self._actor.sleep(0.8 * MARGINS.settle_seconds * self._world.random.random())
        self._call(lambda: self._delete(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        world = self._world
        return self._call(
            lambda: iter(
                [
                    ObjectInfo(key, len(data), modified)
                    for key, (data, _, modified) in world.entries.items()
                    if key.startswith(prefix)
                ]
            )
        )

    def _call(self, action: Callable[[], Any]) -> Any:
        world = self._world
        world.step(self._actor)
        draw = world.random.random() if world.faults else 1.0
        if draw < FAULT_SHARE / 2:
            raise StoreTransientError("the request was lost")
        result = action()
        if draw < FAULT_SHARE:
            raise StoreTransientError("the answer was lost")
        return result

    def _entry(self, key: str) -> tuple[bytes, str, float]:
        if key not in self._world.entries:
            raise ObjectMissingError(f"nothing is stored under {key!r}", key=key)
        return self._world.entries[key]

    def _put(self, key: str, data: bytes, *, if_absent: bool, if_match: str | None) -> str:
        world = self._world
        there = world.entries.get(key)
        if (if_absent and there) or (if_match is not None and (there is None or there[1] != if_match)):
            raise ConditionFailedError(f"{key!r} is not what was read", key=key)
        if key.startswith("refs/") and there and world.now - there[2] < MARGINS.ref_interval_seconds:
            raise StoreTransientError("429: one write a second")
        etag = f"{world.steps}-{len(data)}"
        world.entries[key] = (data, etag, world.now)
        if key.startswith("manifests/"):
            world.contents[key] = tuple(chunk.blob for chunk in manifest_from_json(data).chunks)
        if key in REFS:
            world.ref_written(key, data, self._actor)
        return etag

    def _delete(self, key: str) -> None:
        if self._world.entries.pop(key, None) is not None:
            self._world.collected += 1
            self._world.check()


class Protocol(NamedTuple):
    """Which code the actors run; the deliberately broken ones differ in one of these."""

    repository: type[Repository] = Repository
    retrying: type[RetryingStore] = RetryingStore
    collector_grace_seconds: float = GRACE_SECONDS
    settle_seconds: float = MARGINS.settle_seconds
    confirms: bool = True


def repository_of(actor: Actor, **margins: float) -> Repository:
    """The snapshots as one actor sees them, through the wrapper that repeats what failed."""
    protocol, random = actor.world.protocol, actor.world.random
    policy = RetryPolicy(attempts=5, first_wait_seconds=0.5, longest_wait_seconds=4.0)
    store = protocol.retrying(SimulatedStore(actor), policy, clock=actor, jitter=random.random)
    return protocol.repository(
        store,
        clock=actor.time,
        unique=lambda: f"{random.getrandbits(64):016x}",
        sleep=actor.sleep,
        margins=MARGINS._replace(**margins),
    )


def _nap(actor: Actor, quarters: int) -> None:
    """Wait for a multiple of a quarter of the grace, so that actors meet."""
    random = actor.world.random
    actor.sleep(GRACE_SECONDS / 4 * random.randrange(quarters + 1) + 5 * random.random())


def write_generations(actor: Actor, key: KeyRecord, *, leased: bool) -> None:
    """A worker that captures now and then."""
    for _ in range(2):
        _nap(actor, 6)
        for _attempt in range(2):
            try:
                _capture(actor, key, leased=leased)
            except (StoreError, CaptureError, ManifestError, BlobCorruptError):
                continue
            break


def _capture(actor: Actor, key: KeyRecord, *, leased: bool) -> None:
    repository = repository_of(actor)
    holding = hold(repository, NAME) if leased else None
    if isinstance(holding, Held):
        return
    try:
        _write_generation(actor, repository, key)
    finally:
        if holding is not None:
            holding.end()


def _write_generation(actor: Actor, repository: Repository, key: KeyRecord) -> None:
    world, random = actor.world, actor.world.random
    seen = repository.look_up(NAME, key)
    parent, parent_key = _parent(repository, seen.ref or seen.newest)
    chosen = [CONTENTS[0], *random.sample(CONTENTS[1:], 2)]
    terms = Terms("raw", 1, known_chunks(parent) if parent else {}, seen.ref is not None, True, 24, 8)
    stage = Stage(repository, terms, Rate(0, threading.Event()))
    saved = [
        stage.reused(hash_of(raw), 1, len(raw)) or stage.stored(memoryview(raw), hash_of(raw), 0, 1, "raw")
        for raw in chosen
    ]
    manifest = BASE._replace(
        key=key,
        generation=repository.next_generation(NAME, key, seen.ref),
        parent=parent_key,
        segments=(Segment(1, "weights", "eager", 8),) * 3,
        chunks=tuple(
            Chunk(index, 0, 8, one.raw_hash, one.codec, one.parameters, one.blob, one.stored_bytes)
            for index, one in enumerate(saved)
        ),
    )
    manifest_key = repository.put_manifest(manifest)
    if random.random() < 0.5:
        _nap(actor, 3)  # a proof that takes long
    unsettled = frozenset(one.blob for one in saved if not one.is_settled)
    world.unsettled += bool(unsettled)
    if world.protocol.confirms:
        if has_to_settle(repository, unsettled, parent=parent, parent_key=parent_key):
            actor.sleep(world.protocol.settle_seconds)
        replaced = parent if seen.ref else None
        confirm(repository, manifest, manifest_key, replaced=replaced, chance=random.random, threads=1)
    try:
        world.acknowledge(repository.publish(manifest, manifest_key, replaces=seen))
    except StateChangedError:
        world.refuse(manifest_key)
        raise


def _parent(repository: Repository, ref: Ref | None) -> tuple[Manifest | None, str]:
    """The generation to go on from, of this key or another; one that is gone is no obstacle."""
    if ref is None:
        return None, ""
    with suppress(ObjectMissingError):
        return repository.manifest(ref.manifest, name=NAME), ref.manifest
    return None, ""


def go_back(actor: Actor) -> None:
    """An operator who goes back to some earlier generation."""
    for _ in range(2):
        _nap(actor, 8)
        with suppress(ColdstartError):
            actor.world.acknowledge(roll_back(repository_of(actor), NAME, KEY))


def delete(actor: Actor) -> None:
    """An operator who deletes the snapshot once."""
    _nap(actor, 10)
    with suppress(ColdstartError):
        repository_of(actor).delete(NAME)


def collect_often(actor: Actor, passes: int) -> None:
    """An operator's collector."""
    for _ in range(passes):
        _nap(actor, 4)
        repository = repository_of(actor, grace_seconds=actor.world.protocol.collector_grace_seconds)
        with suppress(ColdstartError):
            collect(repository, Rules(Retention(last=1), starts_days=1.0), threads=1)


def read(actor: Actor) -> None:
    """A worker that starts: what it reads is one generation, whole, as long as that is live."""
    for _ in range(3):
        _nap(actor, 4)
        repository = repository_of(actor)
        with suppress(StoreTransientError):
            ref = repository.look_up(NAME, KEY).ref
            if ref is not None:
                _restore(actor, repository, ref)


def _restore(actor: Actor, repository: Repository, ref: Ref) -> None:
    try:
        manifest = repository.manifest(ref.manifest, name=NAME)
        stored = {chunk.blob: repository.store.get(blob_key(chunk.blob)).data for chunk in manifest.chunks}
    except ObjectMissingError as error:
        if actor.world.is_live(ref.manifest):
            raise Violation(f"live generation {ref.generation} cannot be restored: {error}") from error
        return
    if manifest.generation != ref.generation or any(hash_of(data) != blob for blob, data in stored.items()):
        raise Violation(f"generation {ref.generation} is a mix")


def simulate(seed: int, protocol: Protocol = Protocol()) -> World:  # noqa: B008  a frozen value
    """One run: three writers, a reader, operators and a collector, then a quiet collection. Raises Violation."""
    world = World(seed, protocol)
    hours = [world.random.choice((0.0, 0.0, -7200.0, 7200.0)) for _ in range(3)]
    actors = [
        Actor(
            world,
            f"writer {n}",
            lambda actor, n=n: write_generations(actor, KEYS[n // 2], leased=n > 0),
            skew_seconds=hours[n],
        )
        for n in range(3)
    ]
    actors.append(Actor(world, "collector", lambda actor: collect_often(actor, 4)))
    actors.append(Actor(world, "reader", read))
    actors.append(Actor(world, "roll back", go_back))
    if seed % 4 == 0:
        actors.append(Actor(world, "delete", delete))
    world.run(*actors)
    world.faults = False
    world.now += 3 * GRACE_SECONDS
    world.run(Actor(world, "collector at last", lambda actor: collect_often(actor, 1)))
    return world
