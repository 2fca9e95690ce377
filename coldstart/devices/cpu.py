"""The CPU: an arena that a fetch fills and the user's arrays see without a copy.

The arena is one memory file with the segments one after another, each on a page of its own, so that one descriptor
hands all of it to another process. It is mapped twice:

- shared, for whoever fills it (threads of this process, or a fetcher process that maps ``fileno`` itself);
- private and writable, for the user: numpy views of it, and whatever a framework builds on them, write to copies of
  the pages they touch, so no write of the user's code reaches the file, a forked child or a parent.

**Views may be taken before the fill, and must not be written to until ``seal``.** On Linux a private page shows what is
written through the shared mapping, before and after it was read, until this process writes to it; from then on
that whole page is a copy of its own and later writes of a fetch to it are lost without an error.

Users write to private pages alone and the shared mapping ends at ``seal``, after which the kernel allows no further one
that is writable: so the file keeps the bytes as they were fetched, and ``readable`` shows those for as long as the arena
lives.

Where the decoded bytes lie in files of this host, ``MappedArena`` maps those instead, private and writable as well: what
nobody writes to are pages of the file cache, one for all workers that map them.

Nothing is prefaulted: a plain copy into a fresh arena of 90 MiB took 80 ms, with MADV_POPULATE_WRITE before it 70 in
all; on 1 GiB the difference was lost in the noise. MADV_POPULATE_READ of the private mapping costs what it saves.
"""

from __future__ import annotations

import mmap
import os
import weakref
from contextlib import suppress
from errno import EACCES, EINVAL, ENOSYS, EPERM
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.devices.base import Arena, Device, DeviceInfo, MappedFile
from coldstart.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

MARGIN_BYTES = 64 << 20
"""Memory that an arena leaves free for the rest of the process."""

_F_SEAL_FUTURE_WRITE = 0x10
"""Linux 5.1; the ``fcntl`` module of Python 3.11 does not name it."""


class CpuDevice(Device):
    """Host memory. ``read_text`` reads a file of /proc or /sys and raises OSError where there is none."""

    type = "cpu"

    def __init__(self, *, read_text: Callable[[str], str] | None = None) -> None:
        self._read_text = read_text or _read_text

    def info(self) -> DeviceInfo:
        """The processor's model, and the memory that this process may use: the smallest limit above it counts."""
        memory = _memory(self._read_text)
        return DeviceInfo(self.type, _processor(self._read_text), memory.limit_bytes, memory.free_bytes)

    def allocate(self, segment_bytes: Sequence[int], *, host_segments: Collection[int] = ()) -> CpuArena:  # noqa: ARG002
        """Memory for segments of these sizes, zeroed. Raises DeviceError with what was asked and what is free."""
        asked_bytes = sum(segment_bytes)
        memory = _memory(self._read_text)
        if memory.limit_bytes and asked_bytes + MARGIN_BYTES > memory.free_bytes:
            raise DeviceError(
                f"the snapshot needs {asked_bytes} bytes of memory and {memory.free_bytes} are free "
                f"({MARGIN_BYTES} stay reserved): give the worker more memory"
            )
        try:
            return CpuArena(segment_bytes)
        except (OSError, OverflowError) as error:
            raise DeviceError(
                f"the snapshot needs {asked_bytes} bytes of memory, which were refused: {error}"
            ) from error

    def adopt(self, memory_file: int, segment_bytes: Sequence[int]) -> CpuArena:
        """An arena over the memory file of one that ``allocate`` made elsewhere for segments of these sizes."""
        try:
            return CpuArena(segment_bytes, memory_file=memory_file)
        except (OSError, OverflowError, ValueError) as error:  # ValueError: it is shorter than its mapping would be
            raise DeviceError(f"the memory that is being filled cannot be mapped: {error}") from error

    def map_files(self, files: Sequence[MappedFile]) -> MappedArena:
        """An arena of mapped files. It is no question of free memory: pages that nobody wrote to can be dropped."""
        try:
            return MappedArena(files)
        except (OSError, OverflowError, ValueError) as error:  # ValueError: a file is shorter than its mapping would be
            raise DeviceError(f"files of the snapshot's segments could not be mapped: {error}") from error


class CpuArena(Arena):
    """One memory file for all segments; an anonymous private mapping where the platform has no memory files.

    ``fileno`` is the file's descriptor, open as long as the arena is (views keep the memory alive, not the descriptor),
    or None: then only threads of this process can fill the arena. ``segment_offsets`` says where in the file each
    segment begins, in bytes. ``memory_file``: a descriptor, from now on the arena's, of a file that is there already.
    """

    def __init__(self, segment_bytes: Sequence[int], *, memory_file: int | None = None) -> None:
        ends = list(accumulate(map(_whole_pages, segment_bytes), initial=0))
        self._segment_bytes = tuple(segment_bytes)
        self.segment_offsets = tuple(ends[:-1])
        size_bytes = max(ends[-1], mmap.PAGESIZE)
        self.fileno = _memory_file(size_bytes) if memory_file is None else memory_file
        if self.fileno is None:
            self._private = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._shared: mmap.mmap | None = self._private
        else:
            weakref.finalize(self, os.close, self.fileno)
            self.stays_clean = True
            self._private = mmap.mmap(self.fileno, size_bytes, flags=mmap.MAP_PRIVATE)
            self._shared = mmap.mmap(self.fileno, size_bytes, flags=mmap.MAP_SHARED)

    @property
    def segment_bytes(self) -> Sequence[int]:
        """The size of each segment."""
        return self._segment_bytes

    def writable(self, segment: int) -> memoryview:
        """The segment's memory, to be filled by a fetch. Its users let go of it before ``seal``."""
        if self._shared is None:
            raise RuntimeError("the arena is sealed: no fetch may write to it")
        start = self.segment_offsets[segment]
        return memoryview(self._shared)[start : start + self._segment_bytes[segment]]

    def place(self, segment: int, offset_bytes: int, data: memoryview) -> None:
        """Write to the memory file: for a fresh page half the work of storing through a mapping."""
        room = self._room(segment, offset_bytes, len(data))
        if self.fileno is None:
            room[:] = data
            return
        try:
            _write_all(self.fileno, data, self.segment_offsets[segment] + offset_bytes)
        except OSError as error:
            raise DeviceError(f"the memory of the snapshot could not be had: {error}") from error

    def readable(self, segment: int) -> memoryview:
        """The segment in the memory file, for as long as the view lives; without one, only until ``seal``."""
        start = self.segment_offsets[segment]
        return memoryview(self._clean())[start : start + self._segment_bytes[segment]].toreadonly()

    def _clean(self) -> mmap.mmap:
        if self._shared is not None:
            return self._shared
        if self.fileno is None:
            raise RuntimeError("the arena is sealed, and users may have written to it")
        return mmap.mmap(self.fileno, 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)

    def seal(self) -> None:
        """Drop the shared mapping: from now on views may be written to, and they are the only way in."""
        self._shared = None
        if self.fileno is not None:
            _forbid_writing(self.fileno)

    def array(self, segment: int, offset_bytes: int, length_bytes: int) -> Any:
        """A writable numpy array of uint8 over the range. It keeps the mapping alive, which is never closed."""
        import numpy as np

        return np.frombuffer(
            self._private, dtype=np.uint8, count=length_bytes, offset=self.segment_offsets[segment] + offset_bytes
        )


class MappedArena(Arena):
    """Files mapped one by one, private and writable: no byte is read, copied or counted before somebody touches it.

    ``fileno`` is None: there is nothing to fill.
    """

    def __init__(self, files: Sequence[MappedFile]) -> None:
        self.fileno = None
        self._segment_bytes = tuple(file.length_bytes for file in files)
        self._sealed = False
        self._maps = [_private_mapping(file) for file in files]

    @property
    def segment_bytes(self) -> Sequence[int]:
        """The size of each segment."""
        return self._segment_bytes

    def writable(self, segment: int) -> memoryview:
        """Raises RuntimeError: every segment has its bytes already."""
        raise RuntimeError(f"segment {segment} is mapped from a file: no fetch may write to it")

    def readable(self, segment: int) -> memoryview:
        """The file's bytes, until users may write to them."""
        if self._sealed:
            raise RuntimeError("the arena is sealed, and users may have written to it")
        return memoryview(self._maps[segment])[: self._segment_bytes[segment]].toreadonly()

    def seal(self) -> None:
        """From now on views may be written to."""
        self._sealed = True

    def array(self, segment: int, offset_bytes: int, length_bytes: int) -> Any:
        """A writable numpy array of uint8 over the range. It keeps the mapping alive, which is never closed."""
        import numpy as np

        return np.frombuffer(self._maps[segment], dtype=np.uint8, count=length_bytes, offset=offset_bytes)


def _private_mapping(file: MappedFile) -> mmap.mmap:
    """A segment without bytes gets a page of its own: an empty file cannot be mapped."""
    if not file.length_bytes:
        return mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(file.descriptor, file.length_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _write_all(file: int, data: memoryview, offset_bytes: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset_bytes + done)


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _memory_file(size_bytes: int) -> int | None:
    """A descriptor of ``size_bytes`` of memory, closed on exec and never to be resized; None where there are none."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        return _sized_memory_file(size_bytes)
    except OSError as error:
        if error.errno in (ENOSYS, EPERM, EACCES, EINVAL):  # a sandbox or an old kernel: threads can do without
            return None
        raise


def _sized_memory_file(size_bytes: int) -> int:
    """A file cut off under a mapping kills whoever reads it with SIGBUS; the kernel can rule that out."""
    import fcntl

    descriptor = os.memfd_create("coldstart", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _forbid_writing(descriptor: int) -> None:
    """Let nobody who gets hold of the descriptor change what was fetched."""
    import fcntl

    with suppress(OSError):  # an older kernel: there the descriptor is only kept from others by not being handed out
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)


class _Memory(NamedTuple):
    limit_bytes: int
    free_bytes: int


def _memory(read_text: Callable[[str], str]) -> _Memory:
    """What this process may use: the machine's memory or the tightest control group's; zeros where nothing is known."""
    known = [memory for memory in (_machine(read_text), *_groups(read_text)) if memory]
    if not known:
        return _Memory(0, 0)
    return _Memory(min(memory.limit_bytes for memory in known), max(0, min(memory.free_bytes for memory in known)))


def _machine(read_text: Callable[[str], str]) -> _Memory | None:
    try:
        lines = read_text("/proc/meminfo").splitlines()
        kibibytes = {words[0]: int(words[1]) for words in map(str.split, lines) if len(words) > 1}
        return _Memory(kibibytes["MemTotal:"] << 10, kibibytes["MemAvailable:"] << 10)
    except (OSError, ValueError, KeyError):
        return None


def _groups(read_text: Callable[[str], str]) -> Iterator[_Memory | None]:
    """The memory of each control group that this process is below.

    Inside a container the paths of /proc/self/cgroup may be the host's; the container's own group is then what is
    mounted at the top, which is the last ancestor of any path.
    """
    for line in _lines(read_text, "/proc/self/cgroup"):
        _, controllers, path = ([*line.split(":", 2), "", ""])[:3]
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file", "active_file")
            yield from (_group(read_text, folder, names) for folder in _ancestors("/sys/fs/cgroup", path))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
            yield from (_group(read_text, folder, names) for folder in _ancestors("/sys/fs/cgroup/memory", path))


def _group(read_text: Callable[[str], str], folder: str, names: tuple[str, str, str, str]) -> _Memory | None:
    """A group's limit and what is left of it. Cached files count as free: the kernel drops them before it refuses."""
    try:
        limit_bytes = int(read_text(f"{folder}/{names[0]}"))
        used_bytes = int(read_text(f"{folder}/{names[1]}"))
        statistics = dict(map(str.split, read_text(f"{folder}/memory.stat").splitlines()))
        cached_bytes = int(statistics[names[2]]) + int(statistics[names[3]])
    except (OSError, ValueError, KeyError):  # no such group, or "max": no limit here
        return None
    return _Memory(limit_bytes, limit_bytes - used_bytes + cached_bytes)


def _ancestors(mount: str, path: str) -> Iterator[str]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return ("/".join([mount, *parts[:count]]) for count in range(len(parts), -1, -1))


def _processor(read_text: Callable[[str], str]) -> str:
    for line in _lines(read_text, "/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine


def _lines(read_text: Callable[[str], str], path: str) -> list[str]:
    try:
        return read_text(path).splitlines()
    except OSError:
        return []


def _read_text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
