"""Programs of other platforms: a generation that adds this platform's keeps theirs, as its parent has them.

Their bytes are not read: segments, chunks, buffers, files and pools are taken over as they are, which is right as long as
the state's own arrays are the parent's. A worker adds a program only to the state that it has restored or just published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.plan import with_segments_of
from coldstart.programs.record import MOST_PROGRAMS, Program, consumer_of, programs_of, to_json

if TYPE_CHECKING:
    from coldstart.manifest import Manifest


def shared_buffers(parent: Manifest | None, identity: str) -> set[str]:
    """Names of the state's buffers that hold constants of the parent's programs, but for the one of this id."""
    if parent is None:
        return set()
    names = {
        place.buffer for program in _kept(parent, identity) for entry in program.entries for place in entry.constants
    }
    return names & {buffer.name for buffer in parent.buffers if not _is_programs(parent, buffer.segment)}


def with_programs_of(manifest: Manifest, parent: Manifest, identity: str) -> Manifest:
    """The manifest with the parent's programs behind its own, but for the one of this id, which it has anew."""
    kept = [program for program in _kept(parent, identity) if _is_complete(program, manifest, parent)]
    consumers = {consumer_of(program.id) for program in kept}
    taken = [index for index, segment in enumerate(parent.segments) if segment.consumer in consumers]
    pools = {place.buffer for program in kept for entry in program.entries for place in entry.constants}
    return with_segments_of(manifest, parent, taken)._replace(
        pools=manifest.pools + tuple(pool for pool in parent.pools if pool.name in pools),
        programs=manifest.programs + tuple(map(to_json, kept)),
    )


def _kept(parent: Manifest, identity: str) -> list[Program]:
    return [program for program in programs_of(parent.programs) if program.id != identity][: MOST_PROGRAMS - 1]


def _is_programs(parent: Manifest, segment: int) -> bool:
    return parent.segments[segment].consumer.startswith(consumer_of(""))


def _is_complete(program: Program, manifest: Manifest, parent: Manifest) -> bool:
    """Whether all its constants will be there: in its own segments, or in buffers that the new manifest has too."""
    own = {buffer.name for buffer in parent.buffers if _is_programs(parent, buffer.segment)}
    there = own | {buffer.name for buffer in manifest.buffers} | {pool.name for pool in parent.pools}
    return all(place.buffer in there for entry in program.entries for place in entry.constants)
