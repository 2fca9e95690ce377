"""Kernel caches in the next generation: what its parent has, of whatever platform, beside what was packed for this one.

No byte is read: segments, chunks and files are taken over as the parent has them. Kernels do not depend on weights, so they
outlive changed ones; and a generation that only adds kernels is its parent with one segment more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.kernel_caches.record import roots_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.kernel_caches.packing import Packed
    from coldstart.manifest import Manifest

MOST_PLATFORMS = 8
"""Platforms whose kernels one manifest holds: when one more comes, the one that was added to longest ago goes."""


def is_of_kernels(manifest: Manifest, consumer: str, key: str) -> bool:
    """Whether the object stored under ``key``, or the blob of that name, is needed for kernels of ``consumer`` alone."""
    blob = key.rpartition("/")[2]
    users = {manifest.segments[chunk.segment].consumer for chunk in manifest.chunks if chunk.blob == blob}
    return bool(consumer) and users == {consumer}


def with_record(manifest: Manifest, packed: Packed | None) -> Manifest:
    """The manifest, which holds the packed files, with what is to be said of them."""
    if packed is None:
        return manifest
    return manifest._replace(platform={**manifest.platform, packed.root: packed.record})


def with_kernels_of(manifest: Manifest, parent: Manifest) -> Manifest:
    """The manifest with the parent's kernels behind its own."""
    own = set(roots_of(manifest))
    others = [root for root in roots_of(parent) if root not in own]
    kept = {*[root for root in roots_of(parent) if root in own], *others[: MOST_PLATFORMS - max(1, len(own))]}
    records = {root: text for root, text in parent.platform.items() if root in kept}
    taken = [index for index, segment in enumerate(parent.segments) if segment.consumer in kept]
    merged = _appended(manifest, parent, taken)
    return merged._replace(platform={**records, **manifest.platform})


def as_addition_to(parent: Manifest, small: Manifest) -> Manifest:
    """The parent as a generation of its own, with the files of ``small``, whose number and origin it has, before its own."""
    base = with_kernels_of(small._replace(programs=()), parent)
    kernels = roots_of(parent)
    rest = [index for index, segment in enumerate(parent.segments) if segment.consumer not in kernels]
    places = {old: len(base.segments) + new for new, old in enumerate(rest)}
    return _appended(base, parent, rest)._replace(
        rung=parent.rung,
        buffers=tuple(buffer._replace(segment=places[buffer.segment]) for buffer in parent.buffers),
        **{field: getattr(parent, field) for field in _OF_THE_STATE},
    )


_OF_THE_STATE = (
    "leaves",
    "pools",
    "pool_arrays",
    "tree",
    "modules",
    "programs",
    "warmup_digests",
    "provenance",
    "requires",
    "extra",
)
"""What a generation that only adds kernels has as its parent has it."""


def _appended(manifest: Manifest, parent: Manifest, taken: Sequence[int]) -> Manifest:
    """The manifest with these segments of the parent's behind its own, and the files in them."""
    places = {old: len(manifest.segments) + new for new, old in enumerate(taken)}
    held = [index for index, chunk in enumerate(parent.chunks) if chunk.segment in places]
    numbers = {old: len(manifest.chunks) + new for new, old in enumerate(held)}
    moved = [parent.chunks[index] for index in held]
    forms = tuple(form._replace(chunk=numbers[form.chunk]) for form in parent.forms if form.chunk in numbers)
    return manifest._replace(
        segments=manifest.segments + tuple(parent.segments[index] for index in taken),
        chunks=manifest.chunks + tuple(chunk._replace(segment=places[chunk.segment]) for chunk in moved),
        files=manifest.files
        + tuple(entry._replace(segment=places[entry.segment]) for entry in parent.files if entry.segment in places),
        host_segments=manifest.host_segments
        + tuple(places[index] for index in parent.host_segments if index in places),
        forms=manifest.forms + forms,
    )
