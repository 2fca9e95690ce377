"""How several fetchers share one fetch: how many there are, the bounds of each, and the queue that they take chunks from."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.manifest import Manifest

BYTES_PER_FETCHER = 256 << 20
"""Stored bytes that are worth a further fetcher: what one reads over TLS in about half a second."""
FETCHER_BYTES = 32 << 20
"""What a further fetcher takes of the byte budget: its interpreter and libraries."""

_INDEX = struct.Struct("<I")


class Bounds(NamedTuple):
    """What fetchers may use, all together or one of them. ``processes``: how many there are, or may be."""

    threads: int
    budget_bytes: int
    processes: int
    verify_raw: bool


def share_of(bounds: Bounds, manifest: Manifest) -> Bounds:
    """The bounds of each fetcher of a manifest, with as many fetchers as there are bytes for."""
    worthwhile = sum(chunk.stored_bytes for chunk in manifest.chunks) // BYTES_PER_FETCHER
    affordable = bounds.budget_bytes // (2 * FETCHER_BYTES)  # each has as much left for chunks as it takes
    crew = max(1, min(bounds.processes, worthwhile, affordable))
    budget_bytes = bounds.budget_bytes - (crew - 1) * FETCHER_BYTES
    return Bounds(max(1, bounds.threads // crew), budget_bytes // crew, crew, bounds.verify_raw)


def queue_of(order: Sequence[int]) -> int:
    """A memory file of chunk indices. Whoever reads the next four bytes has that chunk: its position is everybody's."""
    queue_fd = os.memfd_create("coldstart-queue", os.MFD_CLOEXEC)
    os.write(queue_fd, b"".join(map(_INDEX.pack, order)))
    os.lseek(queue_fd, 0, os.SEEK_SET)
    return queue_fd


def next_chunk(queue_fd: int) -> int | None:
    """The index of a chunk that nobody else has, None at the end: reading moves the position of all.

    The kernel does not make that one step for memory files: without the lock, which is a process', two of them may get one
    index. Each calls it from one thread at a time.
    """
    fcntl.lockf(queue_fd, fcntl.LOCK_EX)
    try:
        found = os.read(queue_fd, _INDEX.size)
    finally:
        fcntl.lockf(queue_fd, fcntl.LOCK_UN)
    return int(_INDEX.unpack(found)[0]) if found else None
