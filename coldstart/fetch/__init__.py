"""Fetching: the chunks of a manifest from a store into an arena, verified; one seam, so that engines can differ."""

from coldstart.fetch.base import Fetch, FetchRequest
from coldstart.fetch.threads import start_threads

__all__ = ["Fetch", "FetchRequest", "start_threads"]
