"""From the ring to the device: every chunk that fetchers hand over is copied to its place in an arena on a GPU, or decoded there.

One thread takes what has been handed over, as much as has come by then, and queues it: copies on one stream, decoding on
another, which waits on the device for the copies. It waits for nothing itself but for scratch. Two more threads wait for
the GPU: one frees slots as soon as they were copied, so that fetchers go on, the other looks at what decoding gave. So
reading, copying and decoding go on at the same time, and no chunk is waited for by itself.

Chunks that belong to the host (files), and those that the GPU cannot decode, are put in place by this process' processor. Of
chunks in a form that only a GPU decodes (``manifest.Form``) it reads the other form then, one after another: that comes to
pass where nvCOMP is installed and does not work, and is slow.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from coldstart.codecs import FOR_DEVICES, codec
from coldstart.devices.cuda import CudaArena
from coldstart.devices.cuda_driver import Event, Stream
from coldstart.devices.cuda_hashes import Hashes
from coldstart.devices.cuda_memory import DeviceMemory
from coldstart.errors import BlobCorruptError, CodecError, DeviceError, SnapshotError
from coldstart.fetch.decoding import ANS, PLANES, Arrived, Decoders, Table, arrived, is_for_gpu, table_of
from coldstart.fetch.lanes import Waiter, drained
from coldstart.manifest import blob_key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coldstart.fetch.base import FetchRequest
    from coldstart.fetch.decoding import GpuDecoder
    from coldstart.fetch.ring import Filled, Ring
    from coldstart.manifest import Chunk, Manifest
    from coldstart.stores.base import Store

SCRATCHES = 2
"""Batches that are on the device at once: while one is decoded, the next is copied."""
MOST_BATCH_BYTES = 64 << 20
"""Stored bytes of a batch at most. With the planes and nvCOMP's own scratch (three times what it decodes to), twice, this is
some 700 MB of device memory; where there is less, one batch at a time is decoded, or the processor does it."""


class Landing:
    """All chunks of a manifest on their way from a ring into an arena. Begins at once, in threads of its own.

    ``open_frames``: opens what decodes on the GPU, called if there are chunks for it; None, or a CodecError of it, leaves
    decoding to the processor, and ``degraded`` says so. ``verify_raw``: hash every chunk once it is in place. ``store``: where
    other forms of chunks are.
    """

    def __init__(
        self,
        manifest: Manifest,
        arena: CudaArena,
        ring: Ring,
        *,
        open_frames: Callable[[], GpuDecoder] | None,
        verify_raw: bool = False,
        store: Store | None = None,
    ) -> None:
        self.degraded: list[str] = []
        self.error: BaseException | None = None
        """What it ended with."""
        self._manifest = manifest
        self._arena = arena
        self._ring = ring
        self._open_frames = open_frames
        self._frames: GpuDecoder | None = None
        self._store = store
        self._verify_raw = verify_raw
        self._batch = max(1, min(ring.slots // 2, MOST_BATCH_BYTES // ring.slot_bytes))
        self._taken: set[int] = set()
        self._scratches: queue.SimpleQueue[_Scratch | None] = queue.SimpleQueue()
        self._made: list[_Scratch] = []
        self._is_short = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"coldstart-landing-{manifest.name}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """After the fetch has ended: wait until all is in place. Raises CodecError, BlobCorruptError, DeviceError.

        SnapshotError: it was cancelled.
        """
        self._ring.wake()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Take nothing more; wait until nothing is under way."""
        self._ring.stop()
        self._scratches.put(None)
        self._thread.join()

    def _fail(self, error: BaseException) -> None:
        """Note the first error, and let whoever fetches, or waits here, hear of the end."""
        with self._lock:
            self.error = self.error or error
        self._ring.stop()
        self._scratches.put(None)

    def _run(self) -> None:
        try:
            self._land_all()
        except BaseException as error:  # noqa: BLE001  raised again by wait(), in the thread that asked
            self._fail(error)

    def _land_all(self) -> None:
        gpu = self._arena.gpu
        host = ctypes.addressof(ctypes.c_char.from_buffer(self._ring.view))
        with ExitStack() as ending:
            ending.callback(self._end_scratches)
            if self._pin(host):
                ending.callback(gpu.unpin, host)
            copying, decoding = (ending.enter_context(drained(Stream(gpu))) for _ in range(2))
            decoded = Waiter("decoded", self._fail)
            ending.callback(decoded.end)
            copied = Waiter("copied", self._fail)
            ending.callback(copied.end)
            self._prepare_decoding()  # in the shadow of the first reads
            lanes = _Lanes(host, copying, decoding, copied, decoded)
            while group := self._ring.filled(self._batch):
                self._land(group, lanes)
        if self.error is None and len(self._taken) < len(self._manifest.chunks):
            raise SnapshotError("the fetch was cancelled", snapshot=self._manifest.name)

    def _end_scratches(self) -> None:
        for scratch in self._made:
            scratch.end()

    def _pin(self, address: int) -> bool:
        try:
            self._arena.gpu.pin(address, len(self._ring.view))
        except DeviceError as error:
            self.degraded.append(f"copies to the GPU are slow, since memory could not be pinned: {error}")
            return False
        return True

    def _land(self, group: Sequence[Filled], lanes: _Lanes) -> None:
        """Queue a group. Its slots are free again when it is copied."""
        batch = self._sorted(group)
        if not batch.slots:
            return
        for filled in batch.raw:
            chunk = self._manifest.chunks[filled.chunk]
            lanes.copying.copy_in(self._target(chunk), self._host(filled, lanes), chunk.length_bytes)
        scratch = self._scratch() if batch.stored or self._verify_raw else None
        encoded = [] if scratch is None else self._copy_stored(batch.stored, scratch, lanes)
        event = Event(self._arena.gpu).record(lanes.copying)
        try:
            if scratch is not None:
                lanes.decoding.wait_for(event)
                self._decode(batch.chunks, encoded, scratch, lanes.decoding)
                decoded = Event(self._arena.gpu).record(lanes.decoding)
                lanes.decoded.add(decoded, partial(self._finish, batch.chunks, scratch))
        except BaseException:
            event.end()
            raise
        lanes.copied.add(event, partial(self._ring.release, batch.slots))

    def _sorted(self, group: Sequence[Filled]) -> _Batch:
        """What of a group is for the device. The rest is put in place here, or was there before, and its slots are free."""
        batch = _Batch([], [], [], [])
        for filled in group:
            chunk = self._manifest.chunks[filled.chunk]
            table = self._table(filled, chunk)
            if filled.chunk in self._taken:  # a fetcher died, and another did its work again
                self._ring.release([filled.slot])
                continue
            self._taken.add(filled.chunk)
            if not self._arena.is_on_device(chunk.segment) or (table is None and not filled.is_raw):
                self._place(filled, chunk)
                self._ring.release([filled.slot])
                continue
            batch.slots.append(filled.slot)
            batch.chunks.append(chunk)
            if table is None:
                batch.raw.append(filled)
            else:
                batch.stored.append((filled, table))
        return batch

    def _copy_stored(self, stored: Sequence[tuple[Filled, Table]], scratch: _Scratch, lanes: _Lanes) -> list[Arrived]:
        """Queue the copies of what is decoded there, and tell where each then is."""
        found = []
        for place, (filled, table) in enumerate(stored):
            chunk = self._manifest.chunks[filled.chunk]
            address = scratch.stored_address(place * self._ring.slot_bytes)
            lanes.copying.copy_in(address, self._host(filled, lanes), chunk.stored_bytes)
            item_bytes = self._manifest.segments[chunk.segment].item_bytes
            found.append(arrived(address, self._target(chunk), chunk, item_bytes, table))
        return found

    def _host(self, filled: Filled, lanes: _Lanes) -> int:
        return lanes.ring_address + filled.slot * self._ring.slot_bytes

    def _table(self, filled: Filled, chunk: Chunk) -> Table | None:
        """The table of a chunk that the GPU is to decode; None for any other."""
        if self._frames is None or filled.is_raw:
            return None
        if not self._arena.is_on_device(chunk.segment) or not is_for_gpu(chunk):
            return None
        stored = self._ring.slot(filled.slot, chunk.stored_bytes)
        return table_of(chunk, stored, self._manifest.segments[chunk.segment].item_bytes)

    def _target(self, chunk: Chunk) -> int:
        return self._arena.address(chunk.segment, chunk.offset_bytes, chunk.length_bytes)

    def _place(self, filled: Filled, chunk: Chunk) -> None:
        """Put a chunk in place without the GPU's help."""
        if filled.is_raw:
            raw = self._ring.slot(filled.slot, chunk.length_bytes)
        else:
            raw = memoryview(bytearray(chunk.length_bytes))
            stored = self._ring.slot(filled.slot, chunk.stored_bytes)
            if chunk.codec in FOR_DEVICES:
                chunk, stored = self._other_form(filled.chunk)
            item_bytes = self._manifest.segments[chunk.segment].item_bytes
            codec(chunk.codec).decode(stored, raw, item_bytes=item_bytes, parameters=chunk.parameters)
        self._arena.place(chunk.segment, chunk.offset_bytes, raw)

    def _other_form(self, index: int) -> tuple[Chunk, memoryview]:
        """A chunk in the form that a processor decodes, and its stored bytes, verified. Raises StoreError, CodecError."""
        from blake3 import blake3

        chunk = self._manifest.chunks[index]
        form = next((form for form in self._manifest.forms if form.chunk == index), None)
        if form is None or self._store is None:
            raise CodecError(f"a chunk is stored as {chunk.codec}, which nothing here decodes: blob {chunk.blob}")
        key = blob_key(form.blob)
        stored = self._store.get(key).data
        if blake3(stored).hexdigest() != form.blob:
            raise BlobCorruptError(
                f"blob {form.blob} is not what its name says: altered or damaged in the store", key=key
            )
        return form.of(chunk), memoryview(stored)

    # --- on the device -----------------------------------------------------------------------------------------------

    def _prepare_decoding(self) -> None:
        """Open what decodes on the GPU, with scratch for one batch, if there is anything for it to decode."""
        if self._open_frames is None or not any(map(is_for_gpu, self._manifest.chunks)):
            return
        try:
            self._frames = self._open_frames()
            self._scratches.put(self._new_scratch())
        except (CodecError, DeviceError) as error:
            self._frames = None
            self.degraded.append(f"chunks are decoded by the processor and not by the GPU: {error}")

    def _scratch(self) -> _Scratch:
        """Scratch that nothing is using: more is made while there are few and the GPU has room, then it is waited for."""
        scratch = self._more_scratch() if self._scratches.empty() else None
        scratch = scratch or self._scratches.get()
        if scratch is None:
            raise self.error or SnapshotError("the fetch was cancelled", snapshot=self._manifest.name)
        return scratch

    def _more_scratch(self) -> _Scratch | None:
        """Further scratch; None where there is enough, or no room for more. Raises DeviceError where there is none at all."""
        if self._is_short or len(self._made) >= SCRATCHES:
            return None
        try:
            return self._new_scratch()
        except DeviceError:
            if not self._made:
                raise
            self._is_short = True
            return None

    def _new_scratch(self) -> _Scratch:
        gpu, slot_bytes = self._arena.gpu, self._ring.slot_bytes
        hashes = decoder = stored = None
        if self._verify_raw:
            hashes = Hashes(gpu, self._batch, max(chunk.length_bytes for chunk in self._manifest.chunks))
        if self._frames is not None:
            decoder = Decoders(gpu, self._frames, self._manifest, self._batch)
            stored = DeviceMemory(gpu, self._batch * slot_bytes)
        self._made.append(_Scratch(stored, decoder, hashes))
        return self._made[-1]

    def _decode(self, chunks: Sequence[Chunk], encoded: list[Arrived], scratch: _Scratch, decoding: Stream) -> None:
        if scratch.decoder is not None:
            scratch.decoder.decode(encoded, decoding)
        if scratch.hashes is not None:
            scratch.hashes.queue([(self._target(chunk), chunk.length_bytes) for chunk in chunks], decoding)

    def _finish(self, chunks: Sequence[Chunk], scratch: _Scratch) -> None:
        if scratch.decoder is not None:
            scratch.decoder.check()
        if scratch.hashes is not None:
            for chunk, found in zip(chunks, scratch.hashes.found(), strict=True):
                if found != chunk.raw_hash:
                    raise BlobCorruptError(
                        f"a chunk in device memory is not what was captured: blob {chunk.blob}",
                        key=blob_key(chunk.blob),
                    )
        self._scratches.put(scratch)


class _Batch(NamedTuple):
    """What of a group is for the device: its slots and chunks, those that lie raw in their slots, those to be decoded there."""

    slots: list[int]
    chunks: list[Chunk]
    raw: list[Filled]
    stored: list[tuple[Filled, Table]]


class _Lanes(NamedTuple):
    """What carries chunks: the ring's address in host memory, a stream each for copies and decoding, and who waits for each."""

    ring_address: int
    copying: Stream
    decoding: Stream
    copied: Waiter
    decoded: Waiter


class _Scratch(NamedTuple):
    """Device memory for one batch."""

    stored: DeviceMemory | None
    decoder: Decoders | None
    hashes: Hashes | None

    def stored_address(self, offset_bytes: int) -> int:
        """A place for stored bytes."""
        if self.stored is None:
            raise CodecError("there is no scratch for chunks that were not announced")
        return self.stored.address + offset_bytes

    def end(self) -> None:
        """Give all of it back."""
        for part in self:
            if part is not None:
                part.end()


def land(request: FetchRequest, ring: Ring) -> Landing:
    """Begin to put what comes through ``ring`` into the arena of a request, which is on a GPU."""
    assert isinstance(request.arena, CudaArena)
    can_decode = not {PLANES, ANS}.isdisjoint(request.device_codecs)
    return Landing(
        request.manifest,
        request.arena,
        ring,
        open_frames=_open_frames if can_decode else None,
        verify_raw=request.verify_raw,
        store=request.store,
    )


def device_codecs() -> tuple[str, ...]:
    """Codecs that GPUs decode here, as far as can be told without opening one: where nvCOMP is installed, those that need it."""
    from coldstart.codecs.nvcomp import is_installed

    return (PLANES, ANS) if is_installed() else ()


def _open_frames() -> GpuDecoder:
    from coldstart.codecs.nvcomp import Nvcomp

    return Nvcomp.load()
