"""Kernel caches in the next generation: what its parent has, of whatever platform, beside what was packed for this one.

No byte is read: segments, chunks and files are taken over as the parent has them. Kernels do not depend on weights, so they
outlive changed ones; and a generation that only adds kernels is its parent with one segment more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.kernel_caches.kinds import KERNELS_ROOT
from coldstart.kernel_caches.record import roots_of
from coldstart.plan import with_segments_of, without

if TYPE_CHECKING:
    from coldstart.kernel_caches.packing import Packed
    from coldstart.manifest import Manifest

MOST_PLATFORMS = 8
"""Platforms whose kernels one manifest holds: when one more comes, the one that was added to longest ago goes."""


def is_of_kernels(manifest: Manifest, consumer: str, key: str) -> bool:
    """Whether the object stored under ``key``, or the blob of that name, is needed for kernels of ``consumer`` alone."""
    blob = key.rpartition("/")[2]
    users = {manifest.segments[chunk.segment].consumer for chunk in manifest.chunks if chunk.blob == blob}
    return bool(consumer) and users == {consumer}


def without_kernels(manifest: Manifest) -> Manifest:
    """What a start needs of a generation but for kernels; indices of segments stay."""
    return without(manifest, [segment.consumer.startswith(KERNELS_ROOT) for segment in manifest.segments])


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
    return with_segments_of(manifest, parent, taken)._replace(platform={**records, **manifest.platform})


def as_addition_to(parent: Manifest, small: Manifest) -> Manifest:
    """The parent as a generation of its own, with the files of ``small``, whose number and origin it has, before its own."""
    base = with_kernels_of(small._replace(programs=()), parent)
    rest = [index for index, segment in enumerate(parent.segments) if segment.consumer not in roots_of(parent)]
    return with_segments_of(base, parent, rest)._replace(
        rung=parent.rung,
        leaves=parent.leaves,
        pools=parent.pools,
        pool_arrays=parent.pool_arrays,
        tree=parent.tree,
        modules=parent.modules,
        programs=parent.programs,
        warmup_digests=parent.warmup_digests,
        provenance=parent.provenance,
        extra=parent.extra,
    )
