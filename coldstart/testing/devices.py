"""The contract suite of devices: subclass ``DeviceContract`` in a test module and say how your device is made."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import pytest

from coldstart.errors import DeviceError
from coldstart.manifest import SEGMENT_ALIGNMENT_BYTES

if TYPE_CHECKING:
    from coldstart.devices.base import Arena, Device

SEGMENTS = (5, 0, 4096, 300_000, 1)


def fill(arena: Arena, segment: int) -> bytes:
    """Write a pattern of its own to a whole segment, as a fetch would, and return it."""
    pattern = bytes((7 * segment + index) % 251 for index in range(arena.segment_bytes[segment]))
    arena.writable(segment)[:] = pattern
    return pattern


class DeviceContract:
    """What every device promises: see ``coldstart.devices.base``. A subclass overrides ``make``.

    A device whose arrays numpy cannot read also overrides ``to_bytes`` and ``address``.
    """

    def make(self) -> Device:
        """Return the device under test."""
        raise NotImplementedError

    def to_bytes(self, array: Any) -> bytes:
        """The content of an array of the device."""
        return bytes(array.tobytes())

    def address(self, array: Any) -> int:
        """The address of an array's first byte on the device."""
        return int(array.__array_interface__["data"][0])

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

    def test_no_segments_are_an_arena_too(self) -> None:
        """A snapshot without bytes can be restored."""
        arena = self.make().allocate([])
        arena.seal()
        assert tuple(arena.segment_bytes) == ()

    def test_what_was_filled_is_what_arrays_show(self) -> None:
        """Every segment shows its own bytes: writing one touches no other."""
        arena = self.make().allocate(SEGMENTS)
        patterns = [fill(arena, segment) for segment in range(len(SEGMENTS))]
        arena.seal()
        for segment, pattern in enumerate(patterns):
            assert self.to_bytes(arena.array(segment, 0, len(pattern))) == pattern

    def test_arrays_may_be_taken_before_the_fill(self) -> None:
        """Binding happens while bytes still arrive, so an array taken (and read) early shows what comes later."""
        arena = self.make().allocate(SEGMENTS)
        early = arena.array(3, 256, 1000)
        self.to_bytes(early)
        pattern = fill(arena, 3)
        arena.seal()
        assert self.to_bytes(early) == pattern[256:1256]

    def test_arrays_are_flat_writable_bytes(self) -> None:
        """An array is one-dimensional uint8 of the length asked for, at an aligned address for an aligned offset."""
        arena = self.make().allocate(SEGMENTS)
        arena.seal()
        for segment, offset_bytes, length_bytes in ((2, 0, 4096), (3, 512, 70_000), (3, 300_000, 0), (1, 0, 0)):
            array = arena.array(segment, offset_bytes, length_bytes)
            assert (str(array.dtype), array.shape) == ("uint8", (length_bytes,))
            if length_bytes:
                assert self.address(array) % SEGMENT_ALIGNMENT_BYTES == 0

    def test_writes_are_seen_by_every_array_of_the_range(self) -> None:
        """Two arrays of one range are the same memory, so tied leaves stay tied."""
        arena = self.make().allocate(SEGMENTS)
        pattern = fill(arena, 3)
        arena.seal()
        one, other = arena.array(3, 0, 1024), arena.array(3, 512, 1024)
        one[512:] = 9
        assert self.to_bytes(other) == bytes([9]) * 512 + pattern[1024:1536]

    def test_arrays_outlive_the_arena(self) -> None:
        """An array keeps its memory: the arena may be forgotten."""
        arena = self.make().allocate(SEGMENTS)
        pattern = fill(arena, 3)
        arena.seal()
        array = arena.array(3, 0, len(pattern))
        del arena
        gc.collect()
        assert self.to_bytes(array) == pattern

    def test_arenas_are_apart(self) -> None:
        """Two arenas of one device share nothing."""
        device = self.make()
        first, second = device.allocate([1000]), device.allocate([1000])
        first.writable(0)[:] = b"1" * 1000
        second.writable(0)[:] = b"2" * 1000
        for arena in (first, second):
            arena.seal()
        assert self.to_bytes(first.array(0, 0, 1000)) == b"1" * 1000

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
