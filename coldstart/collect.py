"""Collection: deletes what no snapshot needs any more. A command of its own; no worker ever runs it.

In this order, with one look at the store's clock before all else:

1. Each ref is swapped to name no more than retention keeps. From then on no writer relies on what it forgot: a writer that
   had seen it loses its swap, or swaps anew having seen what is named now.
2. Everything that is live is read: all refs, the manifests that they name, and manifests that nobody names but that are
   younger than the grace. If one of them cannot be read, nothing is deleted: it could name anything.
3. Manifests, then blobs, that are not live and were not written within the grace before the first look are deleted, one by
   one, each blob after a second look at its age: a capture that wants it writes it again first. Start records go by age.
   In a folder, flat files of segments that no live manifest has go too.

**Why a capture and a collection cannot hurt each other.** What a generation names that is published after step 2 is: named
by the generation that it replaced, which was live in step 2 or was itself published after it; or written, or found
younger than half the grace, by the capture, and younger than three quarters of it at the last look (``coldstart.commit``).
Nothing of that was written before the grace began. What is left is a blob that was old, and is written again between a
collector's second look and its deletion: a store of this machine looks and deletes in one step; elsewhere the capture looks
again ``Margins.settle_seconds`` later, and is made again if it is gone. So one thing is assumed of time: a deletion that is
asked for takes effect, or never does, within two minutes. It is asked for once, and not again if the answer is lost: the
next collection finds what is left.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import CollectionRefusedError, ManifestError, ObjectMissingError, StoreTransientError, UsageError
from coldstart.leases import COLLECTOR, Held, Leases
from coldstart.manifest import manifest_from_json
from coldstart.pipeline import Job, run_all
from coldstart.retention import DAY_SECONDS, Retention, expired
from coldstart.segments import segment_names
from coldstart.stores.base import innermost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coldstart.manifest import Manifest, Ref
    from coldstart.repository import Repository
    from coldstart.stores.base import ObjectInfo

THREADS = 8


class Rules(NamedTuple):
    """What is kept and what goes. ``starts_days``: how long start records stay, 0 for ever. ``dry_run`` changes nothing."""

    retention: Retention = Retention()
    starts_days: float = 30.0
    dry_run: bool = False


class Collected(NamedTuple):
    """What was deleted, or would be. ``forgotten``: manifests that no ref names any more, theirs to delete when old enough.

    ``left``: objects whose deletion failed; the next collection tries them again.
    """

    forgotten: tuple[str, ...]
    manifests: int
    blobs: int
    blob_bytes: int
    starts: int
    flat_files: int
    left: int
    live_blobs: int


def collect(repository: Repository, rules: Rules, *, threads: int = THREADS) -> Collected:
    """Collect once. Raises CollectionRefusedError, StoreError, and UsageError while another collector is at it."""
    leases = Leases(repository)
    if rules.dry_run or not leases.are_kept:
        return _Collection(repository, rules, threads).run()
    lease = leases.take(COLLECTOR)
    if isinstance(lease, Held):
        raise UsageError(f"{lease.owner} collects in {repository.store.url}, for another {lease.left_seconds:.0f} s")
    try:
        return _Collection(repository, rules, threads).run()
    finally:
        leases.release(lease)


class _Live(NamedTuple):
    named: frozenset[str]
    blobs: frozenset[str]
    segments: frozenset[str]


class _Collection:
    def __init__(self, repository: Repository, rules: Rules, threads: int) -> None:
        self._repository = repository
        self._store = repository.store
        self._once = innermost(repository.store)
        self._rules = rules
        self._threads = threads
        self._now = repository.time.now()
        self._before = self._now - repository.margins.grace_seconds
        self._left = 0

    def run(self) -> Collected:
        forgotten = self._forget()
        manifests = list(self._store.list("manifests/"))
        live = self._live(manifests, forgotten)
        old = [info for info in manifests if info.key not in live.named and self._is_old(info)]
        gone = self._delete(old, looks_again=False)
        doomed = [info for info in self._store.list("blobs/") if _name(info) not in live.blobs and self._is_old(info)]
        lengths = self._delete(doomed, looks_again=True)
        starts = self._delete(self._old_starts(), looks_again=False)
        flat_files = self._drop_flat_files(live)
        return Collected(
            tuple(sorted(forgotten)), len(gone), len(lengths), sum(lengths), len(starts), flat_files, self._left,
            len(live.blobs),
        )  # fmt: skip

    def _is_old(self, info: ObjectInfo) -> bool:
        return info.modified_seconds < self._before

    # --- what is live --------------------------------------------------------------------------------------------------

    def _refs(self) -> list[tuple[str, Ref]]:
        refs = []
        for key, ref in self._repository.refs():
            if isinstance(ref, ManifestError):
                raise _refused(f"the ref {key} cannot be read ({ref})") from ref
            refs.append((key, ref))
        return refs

    def _forget(self) -> set[str]:
        """Let the refs name what is kept. Not where a store cannot swap: that would undo what is published meanwhile."""
        forgotten: set[str] = set()
        for key, ref in self._refs():
            doomed = expired(
                ref.named,
                self._rules.retention,
                now_seconds=self._now,
                grace_seconds=self._repository.margins.grace_seconds,
            )
            if not doomed or not self._store.capabilities.compare_and_swap:
                continue
            if self._rules.dry_run or self._repository.forget(key, doomed):
                forgotten |= doomed
        return forgotten

    def _live(self, manifests: list[ObjectInfo], forgotten: set[str]) -> _Live:
        named = {entry.manifest for _, ref in self._refs() for entry in ref.named}
        if self._rules.dry_run:
            named -= forgotten
        young = {info.key for info in manifests if not self._is_old(info)} - named
        found = [self._read(key) for key in sorted(named)]
        found += [manifest for key in sorted(young) if (manifest := self._read_young(key)) is not None]
        return _Live(
            frozenset(named),
            frozenset(blob for manifest in found for blob in manifest.blobs),
            frozenset(name for manifest in found for name in segment_names(manifest)),
        )

    def _read(self, key: str) -> Manifest:
        try:
            return manifest_from_json(self._store.get(key).data)
        except (ManifestError, ObjectMissingError) as error:
            raise _refused(f"the live manifest {key} cannot be read ({error})") from error

    def _read_young(self, key: str) -> Manifest | None:
        """A manifest that nobody names yet; one that goes meanwhile was deleted with its snapshot."""
        try:
            return manifest_from_json(self._store.get(key).data)
        except ObjectMissingError:
            return None
        except ManifestError as error:
            raise _refused(f"the manifest {key}, which may become live, cannot be read ({error})") from error

    # --- what goes -------------------------------------------------------------------------------------------------------

    def _old_starts(self) -> list[ObjectInfo]:
        if not self._rules.starts_days:
            return []
        before = self._now - self._rules.starts_days * DAY_SECONDS
        return [info for info in self._store.list("starts/") if info.modified_seconds < before]

    def _delete(self, doomed: Iterable[ObjectInfo], *, looks_again: bool) -> list[int]:
        """Delete objects, and return the lengths of those that went."""
        gone: list[int] = []
        jobs = (Job(0, partial(self._delete_one, info, gone.append, looks_again)) for info in doomed)
        run_all(jobs, threads=self._threads, budget_bytes=0, name="coldstart-collect")
        return gone

    def _delete_one(self, info: ObjectInfo, went: Callable[[int], None], looks_again: bool) -> None:  # noqa: FBT001
        if self._rules.dry_run:
            went(info.size_bytes)
            return
        try:
            if not self._is_gone(info, looks_again):
                return
        except ObjectMissingError:
            return
        except StoreTransientError:
            self._left += 1
            return
        went(info.size_bytes)

    def _is_gone(self, info: ObjectInfo, looks_again: bool) -> bool:  # noqa: FBT001
        delete_older: Callable[[str, float], bool] | None = getattr(self._once, "delete_older", None)
        if delete_older is not None:
            return delete_older(info.key, self._now if not looks_again else self._before)
        if looks_again and not self._is_old(self._once.head(info.key)):
            return False
        self._once.delete(info.key)
        return True

    def _drop_flat_files(self, live: _Live) -> int:
        flat_files = getattr(self._store, "flat_files", None)
        folder = flat_files() if flat_files is not None and self._store.url.startswith("file:") else None
        if folder is None:
            return 0
        doomed = [name for name, used in folder.names("segments") if name not in live.segments and used < self._before]
        for name in doomed:
            if not self._rules.dry_run:
                folder.drop("segments", name)
        return len(doomed)


def _name(info: ObjectInfo) -> str:
    return info.key.rpartition("/")[2]


def _refused(what: str) -> CollectionRefusedError:
    return CollectionRefusedError(
        f"nothing was collected: {what}, and what it names is not known; delete that snapshot, roll it back, keep fewer"
        " generations, or upgrade coldstart if a newer one wrote it"
    )
