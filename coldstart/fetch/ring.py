"""A ring of slots through which chunks reach a device: one memory file, shared by all who fetch and by who copies from it.

A fetcher takes a free slot, fills it with a chunk and hands it over; the process that owns the device copies it from there
and frees the slot. Slots and chunks travel as fixed records through two pipes, which any number of threads and
processes may use at once: a record is written and read whole. The owner pins the file's pages once, so that the device
reads them by itself; nothing is copied in host memory on the way.

A fetcher that dies takes its slots with it. ``recover`` gives the ring a new epoch: all slots that the owner does not hold
are free again, and what was handed over before is not taken any more.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import DeviceError, SnapshotError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coldstart.manifest import Manifest

MINIMUM_SLOTS = 2
MOST_SLOTS = 256
"""Records of so many slots fit into a pipe even where the system gives it one page, so who frees one never waits."""

_FREE = struct.Struct("<HH")
_FILLED = struct.Struct("<HHI?")
_WAKING = (0xFFFF, 0, 0, False)
_NO_CHUNK = 0xFFFFFFFF
"""In place of a chunk's number: the slot comes back as it went."""


class Filled(NamedTuple):
    """A chunk in a slot. ``is_raw``: it was decoded there; else these are its stored bytes. Either way they are verified."""

    slot: int
    chunk: int
    is_raw: bool


class RingFiles(NamedTuple):
    """The descriptors that a ring is made of, as they are passed between processes."""

    memory: int
    free_reader: int
    free_writer: int
    filled_reader: int
    filled_writer: int


class Ring:
    """One process' hold on a ring. All methods are safe from several threads."""

    def __init__(self, files: RingFiles, slot_bytes: int, slots: int) -> None:
        """Takes the descriptors over. Raises DeviceError where the memory cannot be mapped."""
        self.files = files
        self.slot_bytes = slot_bytes
        self.slots = slots
        self._lock = threading.Lock()
        self._epoch = 0
        self._held: set[int] = set()
        self._is_stopped = False
        self._is_woken = False
        try:
            self._memory = mmap.mmap(files.memory, slot_bytes * slots, flags=mmap.MAP_SHARED)
        except (OSError, ValueError) as error:
            self.close()
            raise DeviceError(f"the memory that chunks pass through cannot be mapped: {error}") from error
        self.view = memoryview(self._memory)

    @classmethod
    def make(cls, slot_bytes: int, slots: int) -> Ring:
        """A new ring with all slots free. Raises DeviceError where this system gives no memory for it."""
        opened: list[int] = []
        try:
            opened.append(os.memfd_create("coldstart-ring", os.MFD_CLOEXEC))
            os.ftruncate(opened[0], slot_bytes * slots)
            opened += os.pipe2(os.O_CLOEXEC)
            opened += os.pipe2(os.O_CLOEXEC)
        except (OSError, AttributeError) as error:
            for descriptor in opened:
                os.close(descriptor)
            raise DeviceError(f"there is no memory that fetchers could share with a GPU: {error}") from error
        ring = cls(RingFiles(*opened), slot_bytes, slots)
        ring._refill()
        return ring

    def close(self) -> None:
        """Let go of the descriptors; the memory stays mapped as long as somebody has a view of it."""
        files, self.files = self.files, RingFiles(-1, -1, -1, -1, -1)
        for descriptor in files:
            if descriptor >= 0:
                os.close(descriptor)

    def slot(self, number: int, length_bytes: int) -> memoryview:
        """The first bytes of a slot."""
        begin = number * self.slot_bytes
        return self.view[begin : begin + length_bytes]

    # --- who fetches -------------------------------------------------------------------------------------------------

    def take(self) -> tuple[int, int]:
        """Wait for a free slot: its number, and the epoch to hand it over in. Raises SnapshotError where none will come."""
        record = _read(self.files.free_reader, _FREE.size)
        if record is None:
            raise SnapshotError("the fetch was stopped")
        slot, epoch = _FREE.unpack(record)
        return slot, epoch

    def hand_over(self, slot: int, epoch: int, chunk: int, *, is_raw: bool) -> None:
        """Give a filled slot to who copies."""
        os.write(self.files.filled_writer, _FILLED.pack(slot, epoch, chunk, is_raw))

    @contextmanager
    def taken(self) -> Iterator[tuple[int, int]]:
        """``take``, for a block that hands the slot over last. Where it fails the slot goes back, for others wait for one."""
        slot, epoch = self.take()
        try:
            yield slot, epoch
        except BaseException:
            self.hand_over(slot, epoch, _NO_CHUNK, is_raw=False)
            raise

    def take_no_more(self) -> None:
        """Keep only what fetchers need, so that they hear of it when the owner stops."""
        files = self.files
        for descriptor in (files.free_writer, files.filled_reader):
            os.close(descriptor)
        self.files = files._replace(free_writer=-1, filled_reader=-1)

    # --- who copies --------------------------------------------------------------------------------------------------

    def filled(self, most: int) -> list[Filled]:
        """Wait for a filled slot, and take what else is there, up to ``most``. Empty after ``wake``, and once stopped."""
        found: list[Filled] = []
        while not (self._is_stopped or self._is_woken) and len(found) < most:
            if not _has_input(self.files.filled_reader, 0.0 if found else None):
                break
            for record in _FILLED.iter_unpack(os.read(self.files.filled_reader, _FILLED.size * (most - len(found)))):
                if record == _WAKING:
                    self._is_woken = True
                else:
                    found += self._accepted(*record)
        if not found:
            self._is_woken = False
        return found

    def wake(self) -> None:
        """Let ``filled`` return when it has taken all that was handed over until now."""
        os.write(self.files.filled_writer, _FILLED.pack(*_WAKING))

    def _accepted(self, slot: int, epoch: int, chunk: int, is_raw: bool) -> Sequence[Filled]:  # noqa: FBT001
        with self._lock:
            if epoch != self._epoch:
                return ()
            self._held.add(slot)
        if chunk == _NO_CHUNK:
            self.release([slot])
            return ()
        return (Filled(slot, chunk, is_raw),)

    def release(self, slots: Sequence[int]) -> None:
        """These slots are free again."""
        with self._lock:
            self._held.difference_update(slots)
            if not self._is_stopped:
                os.write(self.files.free_writer, b"".join(_FREE.pack(slot, self._epoch) for slot in slots))

    def recover(self) -> None:
        """Take back all slots that fetchers had: they are gone. Nobody may be fetching. Raises SnapshotError once stopped."""
        with self._lock:
            if self._is_stopped:
                raise SnapshotError("the fetch was stopped")
            while _has_input(self.files.free_reader, 0.0):
                _read(self.files.free_reader, _FREE.size)
            self._epoch += 1
            self._refill()

    def _refill(self) -> None:
        for slot in range(self.slots):
            if slot not in self._held:
                os.write(self.files.free_writer, _FREE.pack(slot, self._epoch))

    def stop(self) -> None:
        """Nothing is filled or copied any more: whoever waits hears of it."""
        with self._lock:
            if self._is_stopped:
                return
            self._is_stopped = True
            self.wake()
            os.close(self.files.free_writer)
            self.files = self.files._replace(free_writer=-1)


def _has_input(descriptor: int, seconds: float | None) -> bool:
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(None if seconds is None else 1000 * seconds))


def _read(descriptor: int, size_bytes: int) -> bytes | None:
    """The next record, None at the end. Pipes give whole records where only whole ones are written and read."""
    record = os.read(descriptor, size_bytes)
    return record if len(record) == size_bytes else None


def shape_of(manifest: Manifest, ring_bytes: int) -> tuple[int, int]:
    """The size of a slot and the number of slots, for a manifest's chunks: the same in every process.

    A slot holds any of its chunks, stored or raw.
    """
    largest_bytes = max((max(chunk.stored_bytes, chunk.length_bytes) for chunk in manifest.chunks), default=1)
    slot_bytes = -(-largest_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    wanted = min(ring_bytes // slot_bytes, 1 + len(manifest.chunks), MOST_SLOTS)
    return slot_bytes, max(MINIMUM_SLOTS, wanted)
