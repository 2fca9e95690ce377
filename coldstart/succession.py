"""What follows a ref: the commit protocol's decisions, without a store. ``coldstart.repository`` carries them out.

A slot is what stands in a ref's place: a ref, a tombstone after a deletion, or None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.errors import StateChangedError
from coldstart.manifest import MAX_HISTORY, Ref, Tombstone

if TYPE_CHECKING:
    from collections.abc import Collection

    from coldstart.manifest import KeyRecord, Manifest

    Slot = Ref | Tombstone | None


def next_number(slot: Slot) -> int:
    """The number after all that were given."""
    return slot.generation + 1 if slot else 1


def successor(manifest: Manifest, key: str, before: Slot, *, write_id: str, now_seconds: float) -> Ref:
    """The ref that makes the manifest at ``key`` current. Raises StateChangedError for a number that was given before."""
    if before is not None and manifest.generation <= before.generation:
        raise StateChangedError(
            f"snapshot {manifest.name!r} has had a generation {before.generation}: {manifest.generation} would be a"
            " number given twice; capture again",
            snapshot=manifest.name,
        )
    named = before.named if isinstance(before, Ref) else ()
    return Ref(
        name=manifest.name,
        key=manifest.key,
        generation=manifest.generation,
        manifest=key,
        write_id=write_id,
        updated_seconds=round(now_seconds, 3),
        previous_generation=named[0].generation if named else 0,
        previous_manifest=named[0].manifest if named else "",
        history=named[:MAX_HISTORY],
    )


def took_effect(ref: Ref, current: Slot) -> bool:
    """Whether a swap to ``ref`` took effect: what is there now is it, or names it among those before."""
    if isinstance(current, Tombstone):
        return any(entry.manifest == ref.manifest for entry in current.history)
    return current is not None and names(current, ref.manifest)


def may_follow(ref: Ref, current: Slot, seen: Ref | None, *, relies_on: str = "") -> bool:
    """Whether ``ref``, made to replace ``seen``, may take the place of what is there instead.

    That is a tombstone where nothing was seen, and the same generation where a collector let the ref forget older ones, as
    long as it names ``relies_on``, the manifest of which the new generation is a copy.
    """
    if seen is None:
        return isinstance(current, Tombstone) and current.generation < ref.generation
    if not isinstance(current, Ref) or current.manifest != seen.manifest:
        return False
    return not relies_on or names(current, relies_on)


def names(ref: Ref, manifest: str) -> bool:
    """Whether a manifest is live by this ref."""
    return any(entry.manifest == manifest for entry in ref.named)


def without(ref: Ref, manifests: Collection[str], *, write_id: str) -> Ref:
    """The ref when it names ``manifests``, none of them current, no more."""
    history = tuple(entry for entry in ref.named[1:] if entry.manifest not in manifests)
    changed = ref._replace(history=history, write_id=write_id)
    if ref.previous_manifest in manifests:
        return changed._replace(previous_generation=0, previous_manifest="")
    return changed


def tombstone(
    ref: Ref | None, name: str, key: KeyRecord, *, highest: int, write_id: str, now_seconds: float
) -> Tombstone:
    """What takes a ref's place when it is deleted. ``highest``: the number to go on from where the ref cannot be read."""
    generation = ref.generation if ref else highest
    history = ref.named[:MAX_HISTORY] if ref else ()
    return Tombstone(name, key, generation, write_id, round(now_seconds, 3), history)
