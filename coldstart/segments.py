"""Flat files: every segment of a generation as one file of decoded bytes, which the workers of a host map and share.

A worker that starts from them fetches, decodes and copies nothing: it maps the files, hashes what it mapped, and binds.
All workers of the host that map a file see the same pages of the file cache; a page that one of them writes to becomes
its own.

**Where.** The store says (``flat_files``): in front of a remote store they lie in the local cache, as one more kind of
copy that counts towards its limit and goes when it was used longest ago; a ``file://`` store has a folder of the same make
below its own, which no listing shows. A read-only store, one of another user, or one on a file system that other hosts
write to has none, and its workers fetch as ever. Blobs stay beside them: the next generation is fetched from those of its
parent that did not change; a start that maps does not touch them, so that they go first where room is short.

**Under which name.** A hash over the segment's length and the offsets, lengths and raw hashes of its chunks: what the
bytes are, and nothing of how they are stored. Generations, snapshots and codecs that share a segment share its file.

**Who writes them.** The worker that fetched, once it is ready, from its arena's memory file, which keeps the bytes as they
were fetched whatever the user's code does to its views (``devices.cpu``). Each chunk is hashed as it is written; the file
gets its name when it is whole, and one worker of a host writes it. Whatever goes wrong costs the file and nothing else.
Below MINIMUM_BYTES a fetch is as fast.

**How they are used.** All or none: if one segment has no good file, everything is fetched. Nearly all bytes of a
model lie in one segment, which changes with any of its weights, so half of the files is close to none; and one arena of
two makes would have two of every rule. A file must be regular, no link, of just the length, and nobody else's to change.
Then every chunk's raw hash is computed over the mapping, in threads, each without the interpreter's lock for a whole
chunk; nobody sees a byte before the last one is right. If any is wrong, the files of the generation are dropped, the
fetch runs, and they are written anew.

**What can go wrong with a mapping** and with no read: a page that cannot be had any more is a SIGBUS, which ends the
process. A file that is cut off: these are written once, mode 0400 in a folder of mode 0700, renamed when whole and only
ever unlinked, which leaves the pages to who has them; other hosts are kept out by the kind of the file system. A sector that
cannot be read: every chunk is first sent to /dev/null by the kernel, which copies nothing, reads ahead from a cold disk, and
turns such a sector into an error that leads to the fetch. What remains is a disk that fails later, under pages that were
dropped for want of memory: that is the risk of every mapped model file.

Hashing is nearly all that it costs: 512 MiB in 0.17 s on two cores, and 0.02 s for /dev/null. Reading into a buffer to hash
that, and mapping afterwards, took 0.25 s; MADV_POPULATE_READ, which finds bad sectors too, 0.195 s with the interpreter's
lock held. One thread a chunk and the hash's own threads on one chunk after another came to the same.

On a GPU the same files are what pinned memory is filled from, decoded already; there is nothing to map them to.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from coldstart.devices.base import MappedFile
from coldstart.errors import BlobCorruptError, DeviceError
from coldstart.fetch.base import FetchReport
from coldstart.pipeline import Job, run_all

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from coldstart.devices.base import Arena, Device
    from coldstart.manifest import Chunk, Manifest
    from coldstart.stores.base import Store
    from coldstart.stores.cache_folder import CacheFolder

ENGINE = "mapped"
MINIMUM_BYTES = 8 << 20
"""Bytes of a snapshot below which flat files are not written or looked for."""

_CONTEXT = "coldstart flat segment 1"
_NOT_OURS = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS})
"""How a folder fails that is not there, or another user's, or read-only: nothing to report, that is how it was set up."""
_NO_SPLICE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""How ``sendfile`` fails where a file system has no such thing, which says nothing about the file."""


class Mapped(NamedTuple):
    """A whole generation in memory, verified. ``report`` is that of a fetch that fetched nothing."""

    arena: Arena
    report: FetchReport


def map_segments(
    manifest: Manifest,
    store: Store,
    device: Device,
    *,
    threads: int,
    stop: threading.Event | None = None,
    degraded: Callable[[str], None],
) -> Mapped | None:
    """The generation from flat files, verified; None if it has to be fetched, or ``stop`` was set meanwhile.

    ``degraded`` is told why files that are there could not be used.
    """
    began = time.monotonic()
    folder = _folder_of(manifest, store)
    if folder is None:
        return None
    try:
        folder.check()
        with ExitStack() as opened:
            files = _open_files(folder, manifest, opened)
            arena = device.map_files(files) if files else None
            if arena is None:
                return None
            problem = _first_problem(manifest, files, arena, threads, stop)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            degraded(f"flat files of segments are not used: {error}")
        return None
    except DeviceError as error:
        degraded(str(error))
        return None
    if problem:
        _drop(folder, manifest)
        degraded(problem)
        return None
    if stop is not None and stop.is_set():
        return None
    return Mapped(arena, FetchReport(ENGINE, 0, 0, began, time.monotonic()))


def keep_segments(
    manifest: Manifest,
    store: Store,
    arena: Arena,
    *,
    pace: Callable[[], None],
    stop: threading.Event | None = None,
    degraded: Callable[[str], None],
) -> int:
    """Write the flat files that are missing, from the sealed arena of a generation that was fetched; bytes written.

    ``pace`` is called before every chunk and may wait. Once ``stop`` is set no further chunk is written, and no half file
    is left. What goes wrong with the files is told to ``degraded`` and not raised.
    """
    folder = _folder_of(manifest, store)
    if folder is None or not arena.stays_clean or not folder.fits(manifest.raw_bytes) or not folder.is_on_this_host():
        return 0
    written_bytes = 0
    try:
        folder.prepare()
        for index, name in enumerate(segment_names(manifest)):
            if name:
                chunks = _right_chunks(manifest, arena, index, pace, stop)
                written_bytes += _keep_segment(folder, name, manifest.segments[index].length_bytes, chunks)
    except _StoppedError:
        pass
    except OSError as error:
        if error.errno not in _NOT_OURS:
            degraded(f"segments are not kept as flat files: {error}")
    except BlobCorruptError as error:
        degraded(str(error))
    return written_bytes


def segment_names(manifest: Manifest) -> list[str]:
    """The name of each segment's flat file, 64 hexadecimal digits; "" for a segment without bytes."""
    from blake3 import blake3

    hashers = [blake3(b"%d\n" % segment.length_bytes, derive_key_context=_CONTEXT) for segment in manifest.segments]
    for chunk in manifest.chunks:
        hashers[chunk.segment].update(f"{chunk.offset_bytes} {chunk.length_bytes} {chunk.raw_hash}\n".encode())
    return [
        hasher.hexdigest() if segment.length_bytes else ""
        for hasher, segment in zip(hashers, manifest.segments, strict=True)
    ]


def _folder_of(manifest: Manifest, store: Store) -> CacheFolder | None:
    """Where the store's flat files are, if it has any and the generation is worth it."""
    if manifest.raw_bytes < MINIMUM_BYTES:
        return None
    flat_files: Callable[[], CacheFolder | None] | None = getattr(store, "flat_files", None)
    return flat_files() if flat_files is not None else None


# --- from files to an arena ------------------------------------------------------------------------------------------


def _open_files(folder: CacheFolder, manifest: Manifest, opened: ExitStack) -> list[MappedFile]:
    """All segments' files, in order; none at all if one is missing."""
    files = []
    for name, segment in zip(segment_names(manifest), manifest.segments, strict=True):
        file = folder.open_to_map("segments", name, segment.length_bytes) if name else -1
        if file is None:
            return []
        if name:
            opened.callback(os.close, file)
        files.append(MappedFile(file, segment.length_bytes))
    return files if folder.is_on_this_host() else []


def _first_problem(
    manifest: Manifest, files: Sequence[MappedFile], arena: Arena, threads: int, stop: threading.Event | None
) -> str:
    """What is wrong with the first chunk that was found wrong; "" if all are right, or it was stopped."""
    problems: list[str] = []
    views = [arena.readable(segment) for segment in range(len(files))]
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)

    def check(chunk: Chunk) -> None:
        if not problems:
            problems.extend(_problems_of(chunk, files[chunk.segment].descriptor, views[chunk.segment], null))

    jobs = (Job(0, partial(check, chunk)) for chunk in manifest.chunks)
    try:
        run_all(jobs, threads=max(1, threads), budget_bytes=0, name="coldstart-map", stop=stop)
    finally:
        os.close(null)
    return next(iter(problems), "")


def _problems_of(chunk: Chunk, file: int, segment: memoryview, null: int) -> Iterator[str]:
    from blake3 import blake3

    end = chunk.offset_bytes + chunk.length_bytes
    place = f"the flat file of segment {chunk.segment}"
    try:
        _read_in(file, chunk.offset_bytes, end, null)
    except OSError as error:
        yield f"{place} cannot be read and was dropped: {error.strerror}"
        return
    if blake3(segment[chunk.offset_bytes : end]).hexdigest() != chunk.raw_hash:
        yield f"{place} was damaged and is dropped"


def _read_in(file: int, begin: int, end: int, null: int) -> None:
    """Have the kernel read a range into its cache, so that touching it in a mapping cannot fail. Raises OSError."""
    while begin < end:
        try:
            count = os.sendfile(null, file, begin, end - begin)
        except OSError as error:
            if error.errno in _NO_SPLICE:
                return
            raise
        if not count:
            raise OSError(errno.EIO, "it ends early")
        begin += count


def _drop(folder: CacheFolder, manifest: Manifest) -> None:
    for name in filter(None, segment_names(manifest)):
        try:
            folder.drop("segments", name)
        except OSError:  # read-only: whoever comes next finds out as this one did
            return


# --- from an arena to files ------------------------------------------------------------------------------------------


class _StoppedError(Exception):
    """No further chunk is to be written."""


def _keep_segment(folder: CacheFolder, name: str, size_bytes: int, chunks: Iterator[memoryview]) -> int:
    """Write one segment's file if there is none and nobody else is writing it; bytes written."""
    from coldstart.stores.retrying import SystemClock

    if _is_there(folder, name, size_bytes):
        return 0
    with folder.turn(name, SystemClock(), 0) as mine:
        if not mine or _is_there(folder, name, size_bytes):
            return 0
        folder.keep_to_map("segments", name, chunks, size_bytes)
    return size_bytes


def _is_there(folder: CacheFolder, name: str, size_bytes: int) -> bool:
    file = folder.open_to_map("segments", name, size_bytes)
    if file is None:
        return False
    os.close(file)
    return True


def _right_chunks(
    manifest: Manifest, arena: Arena, index: int, pace: Callable[[], None], stop: threading.Event | None
) -> Iterator[memoryview]:
    """A segment's chunks in order, each hashed. Raises BlobCorruptError for one that is not what was captured."""
    from blake3 import blake3

    segment = arena.readable(index)
    for chunk in manifest.chunks:
        if chunk.segment != index:
            continue
        pace()
        if stop is not None and stop.is_set():
            raise _StoppedError
        data = segment[chunk.offset_bytes : chunk.offset_bytes + chunk.length_bytes]
        if blake3(data).hexdigest() != chunk.raw_hash:
            raise BlobCorruptError(
                f"segment {index} in memory is not what was captured, so it is not kept as a flat file", key=chunk.blob
            )
        yield data
