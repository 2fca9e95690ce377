"""What a generation is made from: the one that is current, and what it has already."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from coldstart.caches import own_files
from coldstart.errors import SnapshotError, StoreError
from coldstart.programs.record import programs_of

if TYPE_CHECKING:
    from coldstart.capture import Capture
    from coldstart.repository import Lookup, Repository


def usable_without(repository: Repository, replaces: Lookup) -> str:
    """The key of the current generation's manifest, "" where a start without a program cannot use it and has to run ``load``."""
    if replaces.ref is None:
        return ""
    try:
        manifest = repository.manifest(replaces.ref.manifest, name=replaces.ref.name)
    except (StoreError, SnapshotError):
        return ""
    return replaces.ref.manifest if manifest.rung != "files" or own_files(manifest) else ""


def has_program(repository: Repository, replaces: Lookup, identity: str, options: str) -> bool:
    """Whether the current generation has this program already, as it is wished for."""
    if replaces.ref is None:
        return False
    try:
        manifest = repository.manifest(replaces.ref.manifest, name=replaces.ref.name)
    except (StoreError, SnapshotError):
        return False
    return any((each.id, each.options) == (identity, options) for each in programs_of(manifest.programs))


def with_parent(capture: Capture, replaces: Lookup, repository: Repository) -> Capture:
    """The capture with its number and its parent: the generation it replaces, else the newest of another key.

    An unreadable parent is no obstacle: it only means that nothing is reused by it.
    """
    parent, parent_key = None, ""
    known = replaces.ref or replaces.newest
    if replaces.ref is None and known is not None and known.key.digest == capture.key.digest:
        known = None  # of a deleted snapshot, whose blobs are the collector's
    if known is not None:
        with suppress(StoreError, SnapshotError):
            parent, parent_key = repository.manifest(known.manifest, name=capture.name), known.manifest
    generation = repository.next_generation(capture.name, capture.key, replaces.ref)
    return capture._replace(parent=parent, parent_key=parent_key, generation=generation)


def is_overtaken(repository: Repository, capture: Capture, replaces: Lookup) -> bool:
    """Whether a generation was published since ``replaces`` was looked up: then nothing need be written."""
    current = repository.look_up(capture.name, capture.key).ref
    return current is not None and (replaces.ref is None or current.manifest != replaces.ref.manifest)
