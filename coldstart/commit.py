"""The last look at a new generation before its ref moves: whether what it names is there, whole, and nobody's to delete.

Three things are asked of the store, and none of the copies that this host may have:

- the length of the manifest and of every blob that the replaced generation does not name (those are live until the swap);
- their age: what is older than three quarters of the grace could be collected before the swap. That happens to a capture
  that takes most of a day, which then has to be made again;
- the bytes of some of those blobs, chosen by chance: one in a hundred bytes, one blob at least.

A blob that was old when it was written again, by this capture or by another one a moment ago, may have been on a
collector's list at that moment. Whoever relies on such a blob, and on no generation that was published with it, looks
``Margins.settle_seconds`` later, when a deletion that was decided before has taken effect; but for a store where no
collector has been at work for as long.
"""

from __future__ import annotations

from functools import partial
from random import random
from typing import TYPE_CHECKING

from coldstart.errors import BlobCorruptError, StateChangedError
from coldstart.leases import COLLECTOR, was_released
from coldstart.manifest import blob_key
from coldstart.pipeline import Job, run_all

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from coldstart.manifest import Manifest
    from coldstart.repository import Repository

SAMPLED_SHARE = 0.01
"""Of the new bytes, how many are read back."""
THREADS = 8


def confirm(
    repository: Repository,
    manifest: Manifest,
    key: str,
    *,
    replaced: Manifest | None,
    chance: Callable[[], float] = random,
    threads: int = THREADS,
) -> None:
    """Look at a generation that was written under ``key`` to follow ``replaced``, whose blobs are not looked at.

    Raises ObjectMissingError for what is gone, BlobCorruptError for what is not what its name says, StateChangedError for
    what is too old to rely on, StoreError.
    """
    lengths = new_blobs(manifest, replaced)
    _check(repository, key, len(repository.manifest_bytes(manifest, key)))
    sample = _sampled(lengths, chance)
    jobs = [
        Job(length * (blob in sample), partial(_look_at, repository, blob, length, reads=blob in sample))
        for blob, length in lengths.items()
    ]
    run_all(jobs, threads=threads, budget_bytes=64 << 20, name="coldstart-confirm")


def new_blobs(manifest: Manifest, replaced: Manifest | None) -> dict[str, int]:
    """The blobs of a generation, with their lengths, that the one before it does not name."""
    known = replaced.blobs if replaced else {}
    return {blob: length for blob, length in manifest.blobs.items() if blob not in known}


def has_to_settle(
    repository: Repository, unsettled: Collection[str], *, parent: Manifest | None, parent_key: str
) -> bool:
    """Whether to wait before ``confirm``: see the module. ``parent``, stored under its key, is the generation made from.

    No deletion of a live generation's blobs was decided since it was published, and then they were settled. Raises
    StoreError, ManifestError.
    """
    if not unsettled:
        return False
    if was_released(repository, COLLECTOR, seconds=repository.settle_seconds):
        return False
    if parent is None or not set(parent.blobs).issuperset(unsettled):
        return True
    return not repository.is_live(parent_key, parent)


def _sampled(lengths: Mapping[str, int], chance: Callable[[], float]) -> set[str]:
    """Blobs by chance, until they hold a hundredth of all bytes."""
    wanted_bytes = SAMPLED_SHARE * sum(lengths.values())
    found: set[str] = set()
    for blob in sorted(lengths, key=lambda _: chance()):
        if wanted_bytes <= 0:
            break
        found.add(blob)
        wanted_bytes -= lengths[blob]
    return found


def _look_at(repository: Repository, blob: str, length_bytes: int, *, reads: bool) -> None:
    _check(repository, blob_key(blob), length_bytes)
    if reads:
        from blake3 import blake3

        if blake3(repository.store.get(blob_key(blob)).data).hexdigest() != blob:
            raise BlobCorruptError("the store gives other bytes back than were written", key=blob_key(blob))


def _check(repository: Repository, key: str, length_bytes: int) -> None:
    info = repository.store.head(key)
    if info.size_bytes != length_bytes:
        raise BlobCorruptError(f"{key} was written with {length_bytes} bytes and has {info.size_bytes}", key=key)
    age_seconds = repository.time.now() - info.modified_seconds
    if age_seconds > 0.75 * repository.margins.grace_seconds:
        raise StateChangedError(
            f"{key} was written {age_seconds / 3600:.1f} hours ago and may be collected soon: capture again"
        )
