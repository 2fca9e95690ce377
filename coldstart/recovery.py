"""What a start may do when its snapshot cannot be used: the modes, as one table. Pure.

The order of steps is always the same, and a mode says how far down it a start may go:

1. *chunk*: a chunk that came altered is read once more. In every mode: it costs one read, and bytes are verified anyway.
2. *replica*: what the store lacks, holds altered or does not give is read from a replica, where there are any.
3. *previous generation*: the generation before the current one.
4. *load*: the handler's own ``load``.

Two things are no recovery and need no step: a request to a store that is sent again because its answer may still come,
and a cold start, for which there was no snapshot at all. Only ``checkpoint`` refuses the latter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import RecoveryError

if TYPE_CHECKING:
    from collections.abc import Mapping

CHUNK_RETRY, REPLICA, PREVIOUS_GENERATION, LOAD = STEPS = ("chunk_retry", "replica", "previous_generation", "load")
"""The steps beyond a plain restore, in their order: the words of ``recovered_by`` and of the event ``Recovered``."""


class Mode(NamedTuple):
    """How far down the order a start may go. ``replicas`` to ``loads`` are steps 2 to 4.

    ``loads_first``: ``load`` may run where there is no snapshot for the key. ``is_brief``: one of several stores is not
    waited for long, since another may answer.
    """

    replicas: bool
    previous: bool
    loads: bool
    loads_first: bool
    is_brief: bool


NONE, STANDARD, HIGH_AVAILABILITY, CHECKPOINT = ("none", "standard", "high_availability", "checkpoint")
MODES: Mapping[str, Mode] = {
    NONE: Mode(replicas=False, previous=False, loads=False, loads_first=True, is_brief=False),
    STANDARD: Mode(replicas=True, previous=True, loads=True, loads_first=True, is_brief=False),
    HIGH_AVAILABILITY: Mode(replicas=True, previous=True, loads=True, loads_first=True, is_brief=True),
    CHECKPOINT: Mode(replicas=True, previous=True, loads=False, loads_first=False, is_brief=False),
}


def check_load(mode: str, *, failed: bool, reason: str, snapshot: str) -> None:
    """Raise RecoveryError unless ``load`` may run in ``mode``.

    ``failed``: there was a snapshot, and it could not be used; else there was none. ``reason`` says why.
    """
    allowed = MODES[mode].loads if failed else MODES[mode].loads_first
    if allowed:
        return
    if failed:
        what, remedy = "the snapshot cannot be used", "mend the store (coldstart snapshot verify)"
    else:
        what, remedy = "there is no snapshot to start from", "make one with a start in mode standard"
    raise RecoveryError(
        f"{what}: {reason}. COLDSTART_RECOVERY={mode} does not let load run instead: {remedy}, or set another mode",
        snapshot=snapshot,
    )
