"""Fetching: the chunks of a manifest from a store into an arena, verified; one seam, so that engines can differ."""

from coldstart.fetch.base import Address, Fetch, FetchRequest
from coldstart.fetch.threads import start_threads

__all__ = ["Address", "Fetch", "FetchRequest", "start_fetch", "start_threads"]

ENGINES = ("auto", "process", "threads")
PROCESS_MINIMUM_BYTES = 32 << 20
"""Stored bytes below which a fetcher process costs more than it saves: its own start takes 60 to 80 ms of a core."""


def start_fetch(request: FetchRequest, *, engine: str) -> Fetch:
    """Begin fetching with ``engine``, one of ENGINES; ``auto`` takes the process where it pays and can be had."""
    worthwhile = sum(chunk.stored_bytes for chunk in request.manifest.chunks) >= PROCESS_MINIMUM_BYTES
    wanted = engine == "process" or (engine == "auto" and worthwhile)
    if not wanted:
        return start_threads(request)
    from coldstart.fetch.process import can_start, start_process  # 5 ms, and most small starts need none of it

    return start_process(request) if can_start(request) else start_threads(request)
