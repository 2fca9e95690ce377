"""Fetching: the chunks of a manifest from a store into an arena, verified; one seam, so that engines can differ.

A start that is to read a remote store calls ``look_ahead`` first: a fetcher process finds ref and manifest by itself and
begins (``ahead``). Where it has not, ``start_fetch`` fetches a manifest that is known: on ``threads`` of this process, or
by fetcher processes (``process``), each of which runs the same threads (``child``); several share the work (``crew``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.fetch.base import Address, Fetch, FetchRequest
from coldstart.fetch.threads import processors, start_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.fetch.ahead import LookAhead
    from coldstart.fetch.base import RingWay
    from coldstart.fetch.crew import Bounds

__all__ = ["Address", "Fetch", "FetchRequest", "default_processes", "look_ahead", "start_fetch", "start_threads"]

ENGINES = ("auto", "process", "threads")
PROCESS_MINIMUM_BYTES = 32 << 20
"""Stored bytes below which a fetcher process costs more than it saves: its own start takes 60 to 80 ms of a core."""
MOST_PROCESSES = 4
REMOTE = ("s3://", "r2://")
"""Stores that take time to answer. A folder answers before a fetcher has started."""


def default_processes() -> int:
    """Fetcher processes for a large snapshot: the other processors are for importing."""
    return max(1, min(MOST_PROCESSES, processors() // 2))


def start_fetch(request: FetchRequest, *, engine: str) -> Fetch:
    """Begin fetching with ``engine``, one of ENGINES; ``auto`` takes the process where it pays and can be had."""
    worthwhile = sum(chunk.stored_bytes for chunk in request.manifest.chunks) >= PROCESS_MINIMUM_BYTES
    wanted = engine == "process" or (engine == "auto" and worthwhile)
    if not wanted:
        return start_threads(request)
    from coldstart.fetch.process import can_start, start_process  # 5 ms, and most small starts need none of it

    return start_process(request) if can_start(request) else start_threads(request)


def look_ahead(
    address: Address | None,
    ref_key: str,
    bounds: Bounds,
    *,
    engine: str,
    programs: Sequence[str] = (),
    way: RingWay | None = None,
    kernels: str = "",
) -> LookAhead | None:
    """Begin to fetch what the ref stored at ``ref_key`` names, in a fetcher; None where none can, or is to.

    ``programs``: the ids of the programs that this start accepts, the preferred one first. ``kernels``: the consumer of the
    kernel caches that it accepts. ``way``: how chunks reach a device with memory of its own.
    """
    if engine == "threads" or address is None or not address.url.startswith(REMOTE):
        return None
    from coldstart.fetch.ahead import begin

    return begin(address, ref_key, bounds, programs, kernels, way)
