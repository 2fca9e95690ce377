"""The contract of a device: one arena for all segments of a snapshot, and arrays that are views of it.

A restore fills ``writable(segment)`` with verified, decoded bytes, calls ``seal``, and hands ``array(...)`` views to the
framework. On a CPU the writable memory *is* the arena. An arena is never moved, resized or closed while a view of it may
live: views keep it alive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class DeviceInfo(NamedTuple):
    """What a start record and ``coldstart doctor`` say of a device. Sizes in bytes, 0 where unknown."""

    type: str
    name: str
    memory_bytes: int
    free_bytes: int


class Arena(ABC):
    """Memory for the segments of one snapshot on one device."""

    @property
    @abstractmethod
    def segment_bytes(self) -> Sequence[int]:
        """The size of each segment."""

    @abstractmethod
    def writable(self, segment: int) -> memoryview:
        """The segment's host memory, to be filled by a fetch. Valid until ``seal``."""

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

    @abstractmethod
    def info(self) -> DeviceInfo:
        """What the device is, and its memory. Raises DeviceError."""

    @abstractmethod
    def allocate(self, segment_bytes: Sequence[int]) -> Arena:
        """Memory for segments of these sizes. Raises DeviceError with what was asked and what is free."""
