"""Going back to an earlier generation: it becomes current again as a copy with a number of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.errors import UsageError

if TYPE_CHECKING:
    from coldstart.manifest import KeyRecord, Published, Ref
    from coldstart.repository import Repository

ORIGIN = "rolled back to"
"""Where a copy's provenance says which generation it is a copy of."""


def roll_back(repository: Repository, name: str, key: KeyRecord, generation: int | None = None) -> Ref:
    """Make ``generation`` (default: the one before the current) current again.

    The ref names it, so it is live until the ref moves: nothing is read or written but its manifest. Raises UsageError for
    one that the ref does not name, ManifestError, StoreError, and what ``Repository.publish`` does.
    """
    seen = repository.look_up(name, key)
    if seen.ref is None:
        raise UsageError(f"there is no snapshot {name!r} to roll back")
    chosen = _chosen(seen.ref, generation)
    before = repository.manifest(chosen.manifest, name=name)
    copy = before._replace(
        generation=seen.ref.generation + 1,
        parent=seen.ref.manifest,
        signature="",
        provenance={**before.provenance, ORIGIN: str(chosen.generation)},
    )
    return repository.publish(copy, repository.put_manifest(copy), replaces=seen, relies_on=chosen.manifest)


def _chosen(ref: Ref, generation: int | None) -> Published:
    kept = ref.named[1:]
    found = [entry for entry in kept if generation in (None, entry.generation)]
    if found:
        return found[0]
    others = ", ".join(str(entry.generation) for entry in kept) or "none"
    wanted = "there is none" if generation is None else f"generation {generation} is not kept"
    raise UsageError(f"{wanted} before generation {ref.generation} of {ref.name!r}; kept are: {others}")
