"""Snapshots in a store: which generation is current, and how a new one becomes current. Knows the store contract alone.

Publishing is three steps, each harmless if the process dies after it: blobs (content-named, written once), the manifest
(immutable, a fresh name), the ref (compare-and-swap). Until the ref moves, readers see the previous generation; what
is left behind by a writer that died is an orphan that nothing names. A restore reads in the reverse order
and never lists.
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
    StateChangedError,
    StoreError,
    StoreTransientError,
)
from coldstart.manifest import (
    Manifest,
    Ref,
    blob_key,
    check_name,
    manifest_from_json,
    manifest_key,
    manifest_to_json,
    newest_ref_key,
    ref_from_json,
    ref_key,
    ref_to_json,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coldstart.manifest import KeyRecord
    from coldstart.stores.base import Store, StoredObject

    Reader = Callable[[str], StoredObject | None]
    """Gives an object by its key if it has it."""

COLLECTION_GRACE_SECONDS = 24 * 3600.0
"""No collector deletes a blob younger than this, by the store's clock; see ``put_blob``."""


class Lookup(NamedTuple):
    """The answer to "is there a snapshot for this key?": its ref and etag, or None.

    ``newest`` is the ref itself or, without one, that of the name's newest other key.
    """

    ref: Ref | None
    etag: str
    newest: Ref | None


class Repository:
    """All snapshots of one store."""

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], float] = time.time,
        unique: Callable[[], str] = lambda: os.urandom(8).hex(),
    ) -> None:
        self.store = store
        self._clock = clock
        self._unique = unique

    # --- reading -----------------------------------------------------------------------------------------------------

    def look_up(self, name: str, key: KeyRecord, *, ahead: Reader | None = None) -> Lookup:
        """The current generation for a key. ``ahead`` may have it read already. Raises StoreError, ManifestError."""
        try:
            ref, etag = self._read_ref(ref_key(check_name(name), key.digest), ahead)
        except FormatVersionError:
            raise
        except ManifestError as error:
            raise ManifestError(
                f"{error}; if nobody else can mend it: coldstart snapshot delete {name}", snapshot=name
            ) from error
        if ref is None:
            return Lookup(None, "", self._newest(name))
        if ref.name != name or ref.key.digest != key.digest:
            raise ManifestError(f"the ref of {name!r} names another snapshot ({ref.name!r})", snapshot=name)
        return Lookup(ref, etag, ref)

    def manifest(self, key: str, *, name: str, ahead: Reader | None = None) -> Manifest:
        """Read the manifest ``key``, which must be of snapshot ``name``. Raises StoreError, ManifestError."""
        try:
            manifest = manifest_from_json(self._get(key, ahead).data)
        except FormatVersionError:
            raise
        except ManifestError as error:
            manifest = self._manifest_of_replica(key, error)
        if manifest.name != name:
            raise ManifestError(
                f"manifest {key} is of snapshot {manifest.name!r}, not {name!r}", snapshot=name, key=key
            )
        return manifest

    def _manifest_of_replica(self, key: str, error: ManifestError) -> Manifest:
        """The manifest as a replica has it; raises ``error``, that of the store's own, where none has a good one."""
        for copy in self.store.replica_copies(key):
            with suppress(ManifestError):
                return manifest_from_json(copy)
        raise error

    def _get(self, key: str, ahead: Reader | None) -> StoredObject:
        found = None if ahead is None else ahead(key)
        return self.store.get(key) if found is None else found

    def _read_ref(self, key: str, ahead: Reader | None = None) -> tuple[Ref | None, str]:
        try:
            stored = self._get(key, ahead)
        except ObjectMissingError:
            return None, ""
        return ref_from_json(stored.data), stored.etag

    def _newest(self, name: str) -> Ref | None:
        """The newest ref, which only explains and suggests: a malformed one is as good as none."""
        try:
            newest, _ = self._read_ref(newest_ref_key(name))
        except ManifestError:
            return None
        return newest if newest is not None and newest.name == name else None

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
        for clocks that differ and for captures that take hours). Writing it again makes it young.
        """
        try:
            info = self.store.head(blob_key(blob))
        except ObjectMissingError:
            return False
        is_young = self._clock() - info.modified_seconds < COLLECTION_GRACE_SECONDS / 2
        return is_young and info.size_bytes == length_bytes

    def put_manifest(self, manifest: Manifest) -> str:
        """Store a manifest under a fresh key, and return the key.

        Raises ManifestError for one that no reader would take (names that cannot be, limits): it is not stored.
        """
        data = manifest_to_json(manifest)
        manifest_from_json(data)
        key = manifest_key(manifest.name, manifest.generation, self._unique())
        self.store.put(key, data, if_absent=True)
        return key

    def publish(self, manifest: Manifest, key: str, *, replaces: Lookup) -> Ref:
        """Make the generation stored under ``key`` the current one, if the ref is still what ``replaces`` saw.

        Raises StateChangedError when another writer was first (its generation stays), and StoreError when the store
        failed and cannot say whether the ref was moved.
        """
        before = replaces.ref
        ref = Ref(
            name=manifest.name,
            key=manifest.key,
            generation=manifest.generation,
            manifest=key,
            write_id=self._unique(),
            updated_seconds=round(self._clock(), 3),
            previous_generation=before.generation if before else 0,
            previous_manifest=before.manifest if before else "",
        )
        target = ref_key(manifest.name, manifest.key.digest)
        try:
            self._swap(target, ref, replaces.etag)
        except (ConditionFailedError, StoreTransientError) as error:
            self._settle(target, ref, error)
        self._point_newest(ref)
        return ref

    def _settle(self, target: str, ref: Ref, error: StoreError) -> None:
        """Return if a swap that seemed to fail had taken effect and only its answer was lost; else raise.

        It had if the ref is ours, or was ours when the writer after us replaced it.
        """
        current, _ = self._read_ref(target)
        if current is not None and (current.write_id == ref.write_id or current.previous_manifest == ref.manifest):
            return
        if isinstance(error, StoreTransientError):
            raise error
        raise StateChangedError(
            f"another worker published snapshot {ref.name!r} first; its generation is kept", snapshot=ref.name
        ) from error

    def _swap(self, key: str, ref: Ref, etag: str) -> None:
        if not self.store.capabilities.compare_and_swap and self._etag(key) != etag:
            raise ConditionFailedError(
                f"{key!r} has changed since it was read", key=key
            )  # a late look, for want of better
        self.store.put(key, ref_to_json(ref), if_absent=not etag, if_match=etag or None)

    def _point_newest(self, ref: Ref) -> None:
        """Let ``refs/<name>/newest`` follow. A convenience for people: failing, or losing a race, loses nothing."""
        key = newest_ref_key(ref.name)
        try:
            self._swap(key, ref, self._etag(key))
        except StoreError:
            return

    def _etag(self, key: str) -> str:
        try:
            return self.store.get(key).etag
        except ObjectMissingError:
            return ""

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
                ref, _ = self._read_ref(info.key)
            except ManifestError as error:
                yield info.key, error
                continue
            if ref is not None:  # else deleted since it was listed
                yield info.key, ref

    def delete(self, name: str, key_digest: str | None = None) -> list[str]:
        """Delete the refs of a snapshot (of one key, or all), and with all of them its manifests.

        Blobs, and the manifests of a single key, are left to the collector. Returns the deleted object keys. Refs go
        first, so that no reader finds a ref without its manifest.
        """
        listed = [info.key for info in self.store.list(f"refs/{check_name(name)}/")]
        if key_digest is None:
            doomed = listed + [info.key for info in self.store.list(f"manifests/{name}/")]
        else:
            doomed = [key for key in listed if key == ref_key(name, key_digest)]
            newest = self._newest(name)
            if newest is not None and newest.key.digest == key_digest:
                doomed.append(newest_ref_key(name))
        for key in doomed:
            self.store.delete(key)
        return doomed
