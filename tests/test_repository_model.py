"""The repository against a plain model: publish, roll back, delete, look up and collect, in any order and at any age."""

from __future__ import annotations

from itertools import count
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coldstart.collect import Rules, collect
from coldstart.errors import UsageError
from coldstart.manifest import Chunk, Segment, blob_key, ref_key
from coldstart.repository import COLLECTION_GRACE_SECONDS, Repository
from coldstart.retention import Retention
from coldstart.rollback import roll_back
from coldstart.stores.memory import MemoryStore
from coldstart.testing import FakeClock
from tests.generations import KEY, OTHER_KEY, hash_of, manifest_of

GRACE = COLLECTION_GRACE_SECONDS
KEYS = st.sampled_from([KEY, OTHER_KEY])
CONTENTS = [bytes([number]) * 4 for number in range(4)]


class Generation(NamedTuple):
    """What the model knows of a published generation."""

    number: int
    content: tuple[bytes, ...]
    published_seconds: float


class Snapshots(RuleBasedStateMachine):
    """The model: key -> its kept generations, the newest first; the last number that was given; when blobs were written."""

    @initialize()
    def begin(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(clock=self.clock.time)
        numbers = count(1)
        self.repository = Repository(self.store, clock=self.clock.time, unique=lambda: f"{next(numbers):016x}")
        self.kept: dict[str, list[Generation]] = {KEY.digest: [], OTHER_KEY.digest: []}
        self.last = {KEY.digest: 0, OTHER_KEY.digest: 0}
        self.written: dict[bytes, float] = {}

    @rule(key=KEYS, content=st.lists(st.sampled_from(CONTENTS), min_size=1, max_size=3))
    def publish(self, key, content) -> None:
        seen = self.repository.look_up("model", key)
        for raw in content:
            if self.repository.put_blob(hash_of(raw), raw):
                self.written[raw] = self.clock.time()
        chunks = tuple(
            Chunk(index, 0, 4, hash_of(raw), "raw", {}, hash_of(raw), 4) for index, raw in enumerate(content)
        )
        segments = (Segment(1, "weights", "eager", 4),) * len(content)
        number = self.repository.next_generation("model", key, seen.ref)
        manifest = manifest_of("model", number, key, segments=segments, chunks=chunks)
        ref = self.repository.publish(manifest, self.repository.put_manifest(manifest), replaces=seen)
        self._note(key, ref, tuple(content))

    @rule(content=st.sampled_from(CONTENTS))
    def leave_an_orphan(self, content) -> None:
        if self.repository.put_blob(hash_of(content), content):
            self.written[content] = self.clock.time()

    @rule(key=KEYS, steps=st.integers(1, 3))
    def go_back(self, key, steps) -> None:
        kept = self.kept[key.digest]
        if len(kept) <= steps:
            with pytest.raises(UsageError):
                roll_back(self.repository, "model", key, kept[steps].number if len(kept) > steps else 10**6)
            return
        ref = roll_back(self.repository, "model", key, kept[steps].number)
        self._note(key, ref, kept[steps].content)

    def _note(self, key, ref, content) -> None:
        assert ref.generation == self.last[key.digest] + 1
        self.last[key.digest] += 1
        self.kept[key.digest].insert(0, Generation(ref.generation, content, self.clock.time()))

    @rule(key=KEYS)
    def delete_key(self, key) -> None:
        deleted = self.repository.delete("model", key.digest)
        assert (ref_key("model", key.digest) in deleted) == bool(self.kept[key.digest])
        self.kept[key.digest] = []

    @rule()
    def delete_all(self) -> None:
        deleted = self.repository.delete("model")
        assert {place for place in self.kept if ref_key("model", place) in deleted} == {
            place for place, kept in self.kept.items() if kept
        }
        self.kept = {place: [] for place in self.kept}

    @rule(hours=st.sampled_from([0.5, 11.0, 13.0, 25.0, 60.0]))
    def wait(self, hours) -> None:
        self.clock.advance(hours * 3600)

    @precondition(lambda self: self.written)
    @rule(last=st.integers(1, 3))
    def collect_garbage(self, last) -> None:
        now = self.clock.time()
        for place, kept in self.kept.items():
            self.kept[place] = [
                entry
                for index, entry in enumerate(kept)
                if index < last or now - kept[index - 1].published_seconds < GRACE
            ]
        collect(self.repository, Rules(Retention(last=last)), threads=1)
        live = {raw for kept in self.kept.values() for entry in kept for raw in entry.content}
        found = {raw for raw in CONTENTS if self._is_stored(raw)}
        assert live <= found
        young = {raw for raw, when in self.written.items() if now - when <= GRACE}
        assert found <= live | young | self._of_young_manifests(now)

    def _is_stored(self, raw) -> bool:
        return any(True for _ in self.store.list(blob_key(hash_of(raw))))

    def _of_young_manifests(self, now) -> set[bytes]:
        """What a manifest names that may still be about to become current."""
        named: set[str] = set()
        for info in self.store.list("manifests/"):
            if now - info.modified_seconds <= GRACE:
                named |= {chunk.blob for chunk in self.repository.manifest(info.key, name="model").chunks}
        return {raw for raw in CONTENTS if hash_of(raw) in named}

    @invariant()
    def look_ups_say_what_is_current(self) -> None:
        for key in (KEY, OTHER_KEY):
            ref = self.repository.look_up("model", key).ref
            kept = self.kept[key.digest]
            assert [entry.generation for entry in (ref.named if ref else ())] == [entry.number for entry in kept]

    @invariant()
    def every_kept_generation_restores(self) -> None:
        for key in (KEY, OTHER_KEY):
            ref = self.repository.look_up("model", key).ref
            for entry, kept in zip(ref.named if ref else (), self.kept[key.digest], strict=True):
                manifest = self.repository.manifest(entry.manifest, name="model")
                assert tuple(self.store.get(blob_key(chunk.blob)).data for chunk in manifest.chunks) == kept.content


TestSnapshots = Snapshots.TestCase
TestSnapshots.settings = settings(deadline=None, max_examples=50, stateful_step_count=25)
TestSnapshots.__doc__ = "Publications, rollbacks, deletions and collections keep to a plain model."
