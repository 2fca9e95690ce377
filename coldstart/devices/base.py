"""The contract of a device: one arena for all segments of a snapshot, and arrays that are views of it.

A restore fills ``writable(segment)`` with verified, decoded bytes, calls ``seal``, and hands ``array(...)`` views to the
framework. On a CPU the writable memory *is* the arena. An arena is never moved, resized or closed while a view of it may
live: views keep it alive. Where the host has the decoded bytes in files already, ``map_files`` makes an arena of them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


class DeviceInfo(NamedTuple):
    """What a start record and ``coldstart doctor`` say of a device. Sizes in bytes, 0 where unknown."""

    type: str
    name: str
    memory_bytes: int
    free_bytes: int


class MappedFile(NamedTuple):
    """An open file that holds just one segment, decoded. ``descriptor`` is not used where ``length_bytes`` is 0."""

    descriptor: int
    length_bytes: int


class Arena(ABC):
    """Memory for the segments of one snapshot on one device."""

    stays_clean: bool = False
    """Whether ``readable`` goes on after ``seal``, with the bytes as they were filled, whatever users wrote since."""

    @property
    @abstractmethod
    def segment_bytes(self) -> Sequence[int]:
        """The size of each segment."""

    @abstractmethod
    def writable(self, segment: int) -> memoryview:
        """The segment's host memory, to be filled by a fetch. Valid until ``seal``.

        Raises RuntimeError once it is sealed, and in an arena that was full from the beginning.
        """

    def place(self, segment: int, offset_bytes: int, data: memoryview) -> None:
        """Put ``data`` into the segment from ``offset_bytes`` on. Valid until ``seal``; from several threads at once.

        Raises ValueError where that is not inside the segment, RuntimeError as ``writable`` does, DeviceError where the
        memory cannot be had.
        """
        self._room(segment, offset_bytes, len(data))[:] = data

    def _room(self, segment: int, offset_bytes: int, length_bytes: int) -> memoryview:
        """A range of the segment's writable memory, which has to be inside it."""
        room = self.writable(segment)
        if not 0 <= offset_bytes <= len(room) - length_bytes:
            raise ValueError(f"{length_bytes} bytes do not fit segment {segment} of {len(room)} at {offset_bytes}")
        return room[offset_bytes : offset_bytes + length_bytes]

    @abstractmethod
    def readable(self, segment: int) -> memoryview:
        """The segment's host memory for reading alone. Valid until ``seal``, and after it if the arena ``stays_clean``.

        Raises RuntimeError afterwards: users may have written to that memory.
        """

    @abstractmethod
    def seal(self) -> None:
        """No fetch writes any more: what is in the arena is the state."""

    @abstractmethod
    def array(self, segment: int, offset_bytes: int, length_bytes: int) -> Any:
        """A writable one-dimensional uint8 array (numpy on a CPU, cupy on a GPU) that is a view of the arena.

        Writes by the user's code stay in this process. The view keeps the arena alive.
        """


class Device(ABC):
    """A place where state lives."""

    type: str
    """``cpu`` or ``cuda``: part of a snapshot's key."""
    has_own_memory: bool = False
    """Whether its memory is not the host's: chunks then reach it by way of a ring (``fetch.ring``)."""

    ordinal: int = -1
    """The number of the GPU that it is, counted among those that the process may use; -1: it is none."""

    @property
    def label(self) -> str:
        """What frameworks call it."""
        return self.type

    @abstractmethod
    def info(self) -> DeviceInfo:
        """What the device is, and its memory. Raises DeviceError."""

    def known(self) -> DeviceInfo:
        """What can be told of the device without opening it: sizes are 0 where that takes more. Raises DeviceError."""
        return self.info()

    @abstractmethod
    def allocate(self, segment_bytes: Sequence[int], *, host_segments: Collection[int] = ()) -> Arena:
        """Memory for segments of these sizes. Raises DeviceError with what was asked and what is free.

        ``host_segments``: indices of those that belong into host memory, whatever the device.
        """

    def zeros(self, length_bytes: int) -> Any:
        """Bytes of no arena, like those of ``Arena.array``: zeros, and really there. Raises DeviceError, MemoryError."""
        import numpy as np

        made = np.empty(length_bytes, np.uint8)
        made.fill(0)
        return made

    def adopt(self, memory_file: int, segment_bytes: Sequence[int]) -> Arena:
        """An arena of segments of these sizes over a memory file that another process lays out as ``allocate`` would.

        The descriptor is the arena's from now on. Raises DeviceError: a device that has no such files, or cannot map it.
        """
        os.close(memory_file)
        raise DeviceError(f"device {self.type} has no memory files of {len(segment_bytes)} segments to adopt")

    def map_files(self, files: Sequence[MappedFile]) -> Arena | None:
        """An arena that *is* these files, one a segment, without reading them; None where the device has no such thing.

        The files are as long as said and never change again; their descriptors may be closed afterwards. Raises
        DeviceError where the system refuses.
        """
        del files
        return None
