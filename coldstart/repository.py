"""Snapshots in a store: which generation is current, and how a new one becomes current. Knows the store contract alone.

Publishing is three steps, each harmless if the process dies after it: blobs (content-named, written once), the manifest
(immutable, a fresh name), the ref (compare-and-swap). Until the ref moves, readers see the previous generation; what
is left behind by a writer that died is an orphan that nothing names. A restore reads in the reverse order
and never lists.

What a ref names, the current generation and those before it that are kept, is live. What no ref names may be collected
(``coldstart.collect``) once it is old. A writer therefore relies on two kinds of blobs only: those of the generation that
its swap replaces, live until then, and those that it has written, or found young, itself. Whoever changes what is live
does it by a compare-and-swap of the ref, so a writer whose swap goes through saw the truth; ``coldstart.commit`` looks
at the new generation once more before that.

A deleted snapshot leaves a tombstone in the ref's place, so that its numbers are never given again.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import (
    ConditionFailedError,
    FormatVersionError,
    ManifestError,
    ObjectMissingError,
    PublishUnknownError,
    StateChangedError,
    StoreError,
    StoreTransientError,
    UntrustedError,
)
from coldstart.manifest import (
    KeyRecord,
    Manifest,
    Ref,
    Tombstone,
    blob_key,
    check_name,
    manifest_from_json,
    manifest_key,
    manifest_to_json,
    newest_ref_key,
    ref_from_json,
    ref_key,
    ref_to_json,
    tombstone_from_json,
    tombstone_to_json,
)
from coldstart.signing import Seals
from coldstart.store_clock import StoreClock
from coldstart.succession import may_follow, names, next_number, successor, tombstone, took_effect, without

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from coldstart.stores.base import Store, StoredObject

    Reader = Callable[[str], StoredObject | None]
    """Gives an object by its key if it has it."""

COLLECTION_GRACE_SECONDS = 24 * 3600.0
"""No collector deletes an object younger than this, by the store's clock; see ``put_blob``."""

_SWAPS = 5
"""Times a ref is swapped anew because only what else it names had changed."""


class Margins(NamedTuple):
    """Times that writers and collectors of one store agree on.

    ``settle_seconds``: within this a deletion that the collector decided has taken effect; who relies on a blob that may
    be one of those looks at it that much later. ``ref_interval_seconds``: between two writes of one ref, which a bucket may
    limit.
    """

    grace_seconds: float = COLLECTION_GRACE_SECONDS
    settle_seconds: float = 120.0
    ref_interval_seconds: float = 1.0


class Lookup(NamedTuple):
    """The answer to "is there a snapshot for this key?": its ref and etag, or None.

    ``newest`` is the ref itself or, without one, that of the name's newest other key. ``distrust``: why the ref must not
    be used, though a new generation may replace it.
    """

    ref: Ref | None
    etag: str
    newest: Ref | None
    distrust: str = ""


class Repository:
    """All snapshots of one store. ``seals`` signs what is written here, and judges what is read."""

    def __init__(
        self,
        store: Store,
        *,
        seals: Seals = Seals(),  # noqa: B008  it checks nothing
        clock: Callable[[], float] = time.time,
        unique: Callable[[], str] = lambda: os.urandom(8).hex(),
        sleep: Callable[[float], None] = time.sleep,
        margins: Margins = Margins(),  # noqa: B008  a frozen value
    ) -> None:
        self.store = store
        self.margins = margins
        self.time = StoreClock(store, clock, unique)
        self.seals = seals
        self._clock = clock
        self._unique = unique
        self._sleep = sleep
        self._is_local = store.url.startswith(("file:", "memory:"))

    def through(self, store: Store) -> Repository:
        """The same snapshots, read and written by another way."""
        return Repository(
            store,
            seals=self.seals,
            clock=self._clock,
            unique=self._unique,
            sleep=self._sleep,
            margins=self.margins,
        )

    # --- reading -----------------------------------------------------------------------------------------------------

    def look_up(self, name: str, key: KeyRecord, *, ahead: Reader | None = None) -> Lookup:
        """The current generation for a key. ``ahead`` may have it read already. Raises StoreError, ManifestError."""
        target = ref_key(check_name(name), key.digest)
        try:
            stored = self._get(target, ahead)
            ref = _slot(stored.data)
        except ObjectMissingError:
            return Lookup(None, "", self._newest(name))
        except FormatVersionError:
            raise
        except ManifestError as error:
            raise ManifestError(
                f"{error}; if nobody else can mend it: coldstart snapshot delete {name}", snapshot=name
            ) from error
        if not isinstance(ref, Ref):
            return Lookup(None, "", self._newest(name))
        if ref.name != name or ref.key.digest != key.digest:
            raise ManifestError(f"the ref of {name!r} names another snapshot ({ref.name!r})", snapshot=name)
        return Lookup(ref, stored.etag, ref, self.seals.check(ref, stored.data, target).objection)

    def manifest(self, key: str, *, name: str, ahead: Reader | None = None) -> Manifest:
        """Read the manifest ``key``, which must be of snapshot ``name``. Its ``signature`` is "" unless it was verified.

        Where the store's own is malformed or refused, a replica's is taken. Raises StoreError, ManifestError, and
        UntrustedError for one that the seals refuse.
        """
        try:
            return self._judged(self._get(key, ahead).data, key, name)
        except FormatVersionError:
            raise
        except (ManifestError, UntrustedError):
            for copy in self.store.replica_copies(key):
                with suppress(ManifestError, UntrustedError):
                    return self._judged(copy, key, name)
            raise

    def _judged(self, data: bytes, key: str, name: str) -> Manifest:
        manifest = manifest_from_json(data)
        if manifest.name != name:
            raise ManifestError(
                f"manifest {key} is of snapshot {manifest.name!r}, not {name!r}", snapshot=name, key=key
            )
        verdict = self.seals.check(manifest, data, key)
        if verdict.objection:
            raise UntrustedError(verdict.objection, snapshot=name, key=key)
        return manifest if verdict.is_good else manifest._replace(signature="")

    def _get(self, key: str, ahead: Reader | None) -> StoredObject:
        found = None if ahead is None else ahead(key)
        return self.store.get(key) if found is None else found

    def _read_slot(self, key: str, ahead: Reader | None = None) -> tuple[Ref | Tombstone | None, str]:
        """What stands in a ref's place, with its etag."""
        try:
            stored = self._get(key, ahead)
        except ObjectMissingError:
            return None, ""
        return _slot(stored.data), stored.etag

    def _newest(self, name: str) -> Ref | None:
        """The newest ref, which only explains and suggests: a malformed one is as good as none."""
        try:
            newest, _ = self._read_slot(newest_ref_key(name))
        except ManifestError:
            return None
        return newest if isinstance(newest, Ref) and newest.name == name else None

    def is_live(self, key: str, manifest: Manifest) -> bool:
        """Whether a ref names the generation that is stored under ``key``. Raises StoreError, ManifestError."""
        ref = self.look_up(manifest.name, manifest.key).ref
        return ref is not None and names(ref, key)

    def next_generation(self, name: str, key: KeyRecord, ref: Ref | None) -> int:
        """The number after ``ref``'s; without one, after that of a deleted snapshot. Raises StoreError, ManifestError."""
        number = next_number(ref or self._read_slot(ref_key(name, key.digest))[0])
        return max(number, self.seals.minimum_generation)

    # --- writing -----------------------------------------------------------------------------------------------------

    def put_blob(self, blob: str, data: bytes | memoryview, *, rely_on_stored: bool = True) -> bool:
        """Store a blob under its hash; False if it was there already and may be relied on.

        ``data`` must not change meanwhile: it is what the name says for ever. Without ``rely_on_stored`` it is written
        whatever is there, which mends a blob that was damaged in the store.
        """
        if rely_on_stored and self.has_blob(blob, len(data)):
            return False
        self.store.put(blob_key(blob), data)
        return True

    def has_blob(self, blob: str, length_bytes: int) -> bool:
        """Whether a blob of this length is stored that no collector is about to delete.

        One older than half the collection's grace could be an orphan whose time is nearly up (the other half is room
        for captures that take hours). Writing it again makes it young.
        """
        return self.is_young(self.blob_age_seconds(blob, length_bytes))

    def is_young(self, age_seconds: float | None) -> bool:
        """Whether a blob of this age may be relied on; None is that of one that is not there."""
        return age_seconds is not None and age_seconds < self.margins.grace_seconds / 2

    def is_settled(self, age_seconds: float | None) -> bool:
        """Whether a blob of this age, before it was written again if it was, cannot be one that is being deleted.

        One that is new cannot, nor one that was young for longer than a deletion is under way. One that was written a
        moment ago may have been old before that. A store of this machine looks at the age and deletes in one step.
        """
        if age_seconds is None or not self.settle_seconds:
            return True
        return self.settle_seconds <= age_seconds and self.is_young(age_seconds)

    @property
    def settle_seconds(self) -> float:
        """How long to wait before looking at a blob that is not settled; 0 where the store deletes by age in one step."""
        return 0.0 if self._is_local else self.margins.settle_seconds

    def blob_age_seconds(self, blob: str, length_bytes: int) -> float | None:
        """Seconds since a blob was last written, by the store's clock; None if none is there, infinite for another length."""
        try:
            info = self.store.head(blob_key(blob))
        except ObjectMissingError:
            return None
        return self.time.now() - info.modified_seconds if info.size_bytes == length_bytes else float("inf")

    def manifest_bytes(self, manifest: Manifest, key: str) -> bytes:
        """A manifest as it is stored under ``key``: signed if there is a key for that. Raises ConfigError."""
        return manifest_to_json(self.seals.signed_manifest(manifest, key))

    def put_manifest(self, manifest: Manifest) -> str:
        """Store a manifest, signed if there is a key for that, under a fresh object key, and return this one.

        Raises ManifestError for one that no reader would take (names that cannot be, limits): it is not stored.
        ConfigError where it cannot be signed.
        """
        key = manifest_key(manifest.name, manifest.generation, self._unique())
        data = self.manifest_bytes(manifest, key)
        manifest_from_json(data)
        self.store.put(key, data, if_absent=True)
        return key

    def publish(self, manifest: Manifest, key: str, *, replaces: Lookup, relies_on: str = "") -> Ref:
        """Make the generation stored under ``key`` the current one, if the ref is still what ``replaces`` saw.

        It is swapped anew where the ref forgot older generations meanwhile, unless one of them is ``relies_on``, a manifest
        that has to be live until then. Raises StateChangedError when another writer was first (its generation stays),
        PublishUnknownError when an answer was lost and the ref cannot be read back, and StoreError when the store failed.
        """
        target = ref_key(manifest.name, manifest.key.digest)
        before: Ref | Tombstone | None = replaces.ref
        etag = replaces.etag
        for _ in range(_SWAPS):
            ref = successor(manifest, key, before, write_id=self._unique(), now_seconds=self._clock())
            self._wait_for_turn(before)
            try:
                self._swap(target, self._ref_bytes(ref), etag)
            except (ConditionFailedError, StoreTransientError) as error:
                before, etag = self._read_back(target, ref, error)
                if not took_effect(ref, before):
                    if isinstance(error, StoreTransientError):
                        raise
                    if not may_follow(ref, before, replaces.ref, relies_on=relies_on):
                        raise _lost(manifest) from error
                    continue
            self._point_newest(ref)
            return ref
        raise _lost(manifest)

    def _wait_for_turn(self, before: Ref | Tombstone | None) -> None:
        """Write a ref of a bucket not sooner than a second after its last write, which would be refused (429)."""
        interval = 0.0 if self._is_local else self.margins.ref_interval_seconds
        if before is not None and interval:
            since = self._clock() - before.updated_seconds
            self._sleep(min(interval, max(0.0, interval - since)))

    def _read_back(self, target: str, ref: Ref, error: StoreError) -> tuple[Ref | Tombstone | None, str]:
        """What became of a swap that seemed to fail. Raises PublishUnknownError if that cannot be found out."""
        try:
            return self._read_slot(target)
        except (StoreError, ManifestError) as unreadable:
            raise PublishUnknownError(
                f"whether generation {ref.generation} of snapshot {ref.name!r} became current is not known: the swap ended"
                f" with {error}, and the ref cannot be read back: {unreadable}",
                snapshot=ref.name,
                key=target,
            ) from unreadable

    def _ref_bytes(self, ref: Ref) -> bytes:
        """The ref as it is stored: signed if there is a key for that."""
        return ref_to_json(self.seals.signed_ref(ref))

    def _swap(self, key: str, data: bytes, etag: str) -> None:
        if not self.store.capabilities.compare_and_swap and self._etag(key) != etag:
            raise ConditionFailedError(
                f"{key!r} has changed since it was read", key=key
            )  # a late look, for want of better
        self.store.put(key, data, if_absent=not etag, if_match=etag or None)

    def _etag(self, key: str) -> str:
        try:
            return self.store.get(key).etag
        except ObjectMissingError:
            return ""

    def _point_newest(self, ref: Ref) -> None:
        """Let ``refs/<name>/newest`` follow. A convenience for people: failing, or losing a race, loses nothing."""
        key = newest_ref_key(ref.name)
        try:
            try:
                stored = self.store.get(key)
            except ObjectMissingError:
                self._swap(key, self._ref_bytes(ref), "")
                return
            self._wait_for_turn(_slot_or_none(stored.data))
            self._swap(key, self._ref_bytes(ref), stored.etag)
        except StoreError:
            return

    def forget(self, key: str, manifests: Collection[str]) -> bool:
        """Let the ref at ``key`` no longer name ``manifests``, which are not its current one; False if it changed meanwhile.

        Only a collector does this. Raises StoreError, ManifestError.
        """
        ref, etag = self._read_slot(key)
        if not isinstance(ref, Ref) or ref.manifest in manifests:
            return False
        self._wait_for_turn(ref)
        try:
            self._swap(key, self._ref_bytes(without(ref, manifests, write_id=self._unique())), etag)
        except ConditionFailedError:
            return False
        return True

    def write_start_record(self, name: str, record: dict[str, Any]) -> None:
        """Store one start record. Raises StoreError."""
        day = time.strftime("%Y-%m-%d", time.gmtime(self._clock()))
        self.store.put(f"starts/{check_name(name)}/{day}/{self._unique()}.json", json.dumps(record).encode())

    # --- people's commands; these may list ---------------------------------------------------------------------------

    def refs(self, name: str | None = None) -> Iterator[tuple[str, Ref | ManifestError]]:
        """Every ref (or those of one name) with its key in the store; a malformed one comes as its error."""
        prefix = "refs/" if name is None else f"refs/{check_name(name)}/"
        for info in sorted(self.store.list(prefix)):
            if info.key.endswith("/newest"):
                continue
            try:
                ref, _ = self._read_slot(info.key)
            except ManifestError as error:
                yield info.key, error
                continue
            if isinstance(ref, Ref):  # else deleted
                yield info.key, ref

    def delete(self, name: str, key_digest: str | None = None) -> list[str]:
        """Delete a snapshot (of one key, or all), and with all of them the manifests that its refs name.

        A tombstone takes the place of each ref. Blobs, manifests of a single key and those that nothing names are left to
        the collector. Returns the keys of what went. Refs go first, so that no reader finds one without its manifest.
        """
        listed = [info.key for info in self.store.list(f"refs/{check_name(name)}/")]
        newest = self._newest(name)
        doomed, buried = [], []
        for key in sorted(listed):
            if key != newest_ref_key(name) and key_digest in (None, key.rpartition("/")[2]):
                is_new, tombstone = self._bury(name, key)
                doomed += [key] * is_new
                buried.append(tombstone)
        if newest_ref_key(name) in listed and (key_digest is None or (newest and newest.key.digest == key_digest)):
            self.store.delete(newest_ref_key(name))
            doomed.append(newest_ref_key(name))
        if key_digest is None:
            named = {entry.manifest for tombstone in buried for entry in tombstone.history}
            gone = [info.key for info in self.store.list(f"manifests/{name}/") if info.key in named]
            for key in gone:
                self.store.delete(key)
            doomed += gone
        return doomed

    def _bury(self, name: str, key: str) -> tuple[bool, Tombstone]:
        """Put a tombstone in the place of a ref, of a damaged one too; False if there was one."""
        for _ in range(_SWAPS):
            stored = self.store.get(key)
            found = _slot_or_none(stored.data)
            if isinstance(found, Tombstone):
                return False, found
            grave = tombstone(
                found,
                name,
                found.key if found else KeyRecord(key.rpartition("/")[2], {}),
                highest=0 if found else self._highest_number(name),
                write_id=self._unique(),
                now_seconds=self._clock(),
            )
            self._wait_for_turn(found)
            try:
                self._swap(key, tombstone_to_json(grave), stored.etag)
            except ConditionFailedError:
                continue
            return True, grave
        raise StateChangedError(f"snapshot {name!r} is being written by others: delete it again", snapshot=name)

    def _highest_number(self, name: str) -> int:
        keys = [info.key.rpartition("/")[2] for info in self.store.list(f"manifests/{name}/")]
        return max((int(key.partition("-")[0]) for key in keys if key.partition("-")[0].isdecimal()), default=0)


def _lost(manifest: Manifest) -> StateChangedError:
    name = manifest.name
    return StateChangedError(f"another worker published snapshot {name!r} first; its generation is kept", snapshot=name)


def _slot(data: bytes) -> Ref | Tombstone:
    """What stands in a ref's place. Raises ManifestError."""
    tombstone_or_none = tombstone_from_json(data) if b'"deleted"' in data else None
    return tombstone_or_none or ref_from_json(data)


def _slot_or_none(data: bytes) -> Ref | Tombstone | None:
    try:
        return _slot(data)
    except ManifestError:
        return None
