"""What a start did with kernel caches: what came with the snapshot, what had to be compiled, and what a capture could add."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from coldstart.kernel_caches.kinds import names_in, novel
from coldstart.kernel_caches.packing import MOST_ROUNDS, additions
from coldstart.kernel_caches.placing import NOTHING

if TYPE_CHECKING:
    from coldstart.kernel_caches.home import Kernels
    from coldstart.kernel_caches.placing import Placed


class Use(NamedTuple):
    """Kernel caches in a start that has warmed up.

    ``restored_files`` and their bytes came with the snapshot; ``new_files`` were compiled; ``lacking`` are those that the
    snapshot does not have. ``obstacle``: why caches are not used, or not all of them.
    """

    restored_files: int
    restored_bytes: int
    new_files: int
    lacking: int
    obstacle: str


NONE = Use(0, 0, 0, 0, "")


def use_of(kernels: Kernels | None, placed: Placed = NOTHING) -> Use:
    """What became of the caches of a start that took ``placed`` from its snapshot."""
    if kernels is None:
        return NONE
    obstacle = kernels.obstacle or placed.obstacle or kernels.capture_distrust()
    if not kernels.folder:
        return NONE._replace(obstacle=obstacle)
    names = names_in(kernels.folder, kernels.kinds)
    lacking = additions(kernels, placed.names, placed.rounds)
    if not lacking and placed.rounds >= MOST_ROUNDS and novel(names, placed.names):
        obstacle = (
            obstacle or f"other kernels are compiled at every start: after {MOST_ROUNDS} generations no more are added"
        )
    new = novel(names, kernels.before | placed.names)
    return Use(placed.files, placed.total_bytes, len(new), len(lacking), obstacle)
