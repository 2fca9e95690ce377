"""Which generations of a snapshot are kept: arithmetic only, times in Unix seconds.

The current one always is, and so is one that was replaced less than the grace ago: workers may be starting from it. Of the
others those that any rule keeps: the last N, those of the last days, and the last one of each of the last days.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.manifest import Published

DAY_SECONDS = 86_400.0


class Retention(NamedTuple):
    """What is kept. ``last`` counts the current generation; ``days`` are those since a generation was published.

    ``daily``: of each of the last so many days (UTC) on which one was published, its last.
    """

    last: int = 3
    days: float = 0.0
    daily: int = 0


def expired(
    generations: Sequence[Published], retention: Retention, *, now_seconds: float, grace_seconds: float
) -> frozenset[str]:
    """The manifests of those that need not be kept, of ``generations`` from the current one backwards."""
    kept = {entry.manifest for entry in generations[: max(1, retention.last)]}
    since_seconds = now_seconds - retention.days * DAY_SECONDS
    kept |= {entry.manifest for entry in generations if entry.published_seconds > since_seconds}
    kept |= set(_last_of_days(generations)[: retention.daily])
    for newer, entry in pairwise(generations):
        if now_seconds - newer.published_seconds < grace_seconds:
            kept.add(entry.manifest)
    return frozenset(entry.manifest for entry in generations if entry.manifest not in kept)


def _last_of_days(generations: Sequence[Published]) -> list[str]:
    """Of each day the generation that was published last, the newest day first."""
    last: dict[int, str] = {}
    for entry in generations:
        last.setdefault(int(entry.published_seconds // DAY_SECONDS), entry.manifest)
    return list(last.values())
