"""The contract suites of devices and arenas: subclass one in a test module and say how yours is made.

``DeviceContract`` includes ``ArenaContract``, for the arenas that the device allocates. An arena that is full from the
beginning, such as one of mapped files, is put under ``ArenaContract`` alone.
"""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import pytest

from coldstart.errors import DeviceError
from coldstart.manifest import SEGMENT_ALIGNMENT_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.devices.base import Arena, Device

SEGMENTS = (5, 0, 4096, 300_000, 1)
PATTERNS = tuple(
    bytes((7 * segment + index) % 251 for index in range(length_bytes)) for segment, length_bytes in enumerate(SEGMENTS)
)
"""A content of its own for each segment."""


def fill(arena: Arena, segment: int) -> bytes:
    """Write its pattern to a whole segment of an arena of ``SEGMENTS``, as a fetch would, and return it."""
    half = len(PATTERNS[segment]) // 2
    arena.place(segment, 0, memoryview(PATTERNS[segment])[:half])
    arena.writable(segment)[half:] = PATTERNS[segment][half:]
    return PATTERNS[segment]


class ArenaContract:
    """What every arena promises once it is full. A subclass overrides ``filled``.

    An arena whose arrays numpy cannot read also overrides ``to_bytes`` and ``address``.
    """

    def filled(self, contents: Sequence[bytes]) -> Arena:
        """Return an arena with these segments, not sealed yet."""
        raise NotImplementedError

    def to_bytes(self, array: Any) -> bytes:
        """The content of an array of the device."""
        return bytes(array.tobytes())

    def address(self, array: Any) -> int:
        """The address of an array's first byte on the device."""
        return int(array.__array_interface__["data"][0])

    def sealed(self) -> Arena:
        """An arena with the contents of ``PATTERNS``, sealed."""
        arena = self.filled(PATTERNS)
        arena.seal()
        return arena

    def test_no_segments_are_an_arena_too(self) -> None:
        """A snapshot without bytes can be restored."""
        arena = self.filled([])
        arena.seal()
        assert tuple(arena.segment_bytes) == ()

    def test_what_was_filled_is_what_arrays_show(self) -> None:
        """Every segment has its length and shows its own bytes, empty ones included."""
        arena = self.sealed()
        assert tuple(arena.segment_bytes) == SEGMENTS
        for segment, pattern in enumerate(PATTERNS):
            assert self.to_bytes(arena.array(segment, 0, len(pattern))) == pattern

    def test_what_was_filled_can_be_read_before_the_seal(self) -> None:
        """Files are written from the host's memory of a segment, which nobody can write to that way."""
        arena = self.filled(PATTERNS)
        for segment, pattern in enumerate(PATTERNS):
            view = arena.readable(segment)
            assert view.readonly
            assert view == pattern

    def test_what_is_read_after_the_seal_is_what_was_filled(self) -> None:
        """A user's writes do not show there, or there is nothing to read any more."""
        arena = self.sealed()
        arena.array(3, 0, SEGMENTS[3])[:] = 9
        if arena.stays_clean:
            assert arena.readable(3) == PATTERNS[3]
        else:
            with pytest.raises(RuntimeError, match="sealed"):
                arena.readable(3)

    def test_nothing_is_filled_after_the_seal(self) -> None:
        """Filling a sealed arena is a bug of the caller and does not pass silently."""
        arena = self.sealed()
        with pytest.raises(RuntimeError, match=r"sealed|mapped"):
            arena.writable(0)
        with pytest.raises(RuntimeError, match=r"sealed|mapped"):
            arena.place(0, 0, memoryview(b"x"))

    def test_arrays_are_flat_writable_bytes(self) -> None:
        """An array is one-dimensional uint8 of the length asked for, at an aligned address for an aligned offset."""
        arena = self.sealed()
        for segment, offset_bytes, length_bytes in ((2, 0, 4096), (3, 512, 70_000), (3, 300_000, 0), (1, 0, 0)):
            array = arena.array(segment, offset_bytes, length_bytes)
            assert (str(array.dtype), array.shape) == ("uint8", (length_bytes,))
            if length_bytes:
                assert self.address(array) % SEGMENT_ALIGNMENT_BYTES == 0

    def test_writes_are_seen_by_every_array_of_the_range(self) -> None:
        """Two arrays of one range are the same memory, so tied leaves stay tied."""
        arena = self.sealed()
        one, other = arena.array(3, 0, 1024), arena.array(3, 512, 1024)
        one[512:] = 9
        assert self.to_bytes(other) == bytes([9]) * 512 + PATTERNS[3][1024:1536]

    def test_arrays_outlive_the_arena(self) -> None:
        """An array keeps its memory: the arena may be forgotten."""
        array = self.sealed().array(3, 0, SEGMENTS[3])
        gc.collect()
        assert self.to_bytes(array) == PATTERNS[3]

    def test_arenas_of_the_same_bytes_are_apart(self) -> None:
        """What is written to one arena is not seen in another, whatever they were filled from."""
        first, second = self.sealed(), self.sealed()
        first.array(3, 0, SEGMENTS[3])[:] = 9
        assert self.to_bytes(second.array(3, 0, SEGMENTS[3])) == PATTERNS[3]


class DeviceContract(ArenaContract):
    """What every device promises: see ``coldstart.devices.base``. A subclass overrides ``make``."""

    def make(self) -> Device:
        """Return the device under test."""
        raise NotImplementedError

    def filled(self, contents: Sequence[bytes]) -> Arena:
        """An arena of the device, filled as a fetch does."""
        arena = self.make().allocate([len(content) for content in contents])
        for segment, content in enumerate(contents):
            arena.writable(segment)[:] = content
        return arena

    def test_info_says_what_it_is(self) -> None:
        """The device has a type and a name, and no more free memory than memory."""
        info = self.make().info()
        assert info.type == self.make().type
        assert info.name
        assert 0 <= info.free_bytes <= info.memory_bytes

    def test_segments_have_the_sizes_asked_for(self) -> None:
        """Each segment is as long as asked for, empty ones included."""
        arena = self.make().allocate(SEGMENTS)
        assert tuple(arena.segment_bytes) == SEGMENTS
        assert tuple(len(arena.writable(segment)) for segment in range(len(SEGMENTS))) == SEGMENTS

    def test_nothing_is_placed_outside_its_segment(self) -> None:
        """Bytes that would reach beyond the end of a segment, or before it, are refused: the next one's lie there."""
        arena = self.make().allocate(SEGMENTS)
        for segment, offset_bytes in ((0, 4), (1, 0), (2, 4095), (3, 1 << 40), (0, -1), (0, -2)):
            with pytest.raises(ValueError, match="do not fit"):
                arena.place(segment, offset_bytes, memoryview(b"xx"))
        assert all(not any(arena.writable(segment)) for segment in range(len(SEGMENTS)))

    def test_arrays_may_be_taken_before_the_fill(self) -> None:
        """Binding happens while bytes still arrive, so an array taken (and read) early shows what comes later."""
        arena = self.make().allocate(SEGMENTS)
        early = arena.array(3, 256, 1000)
        self.to_bytes(early)
        pattern = fill(arena, 3)
        arena.seal()
        assert self.to_bytes(early) == pattern[256:1256]

    def test_threads_fill_one_arena(self) -> None:
        """A fetch writes from several threads at once."""
        arena = self.make().allocate(SEGMENTS)
        patterns: dict[int, bytes] = {}

        def work(segment: int) -> None:
            patterns[segment] = fill(arena, segment)

        threads = [threading.Thread(target=work, args=(segment,)) for segment in range(len(SEGMENTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        arena.seal()
        shown = {segment: self.to_bytes(arena.array(segment, 0, size)) for segment, size in enumerate(SEGMENTS)}
        assert shown == patterns

    def test_more_than_there_is_is_refused(self) -> None:
        """A snapshot larger than the device raises DeviceError that says what was asked."""
        with pytest.raises(DeviceError, match=str(1 << 50)):
            self.make().allocate([1 << 50])
