"""Restoring: a snapshot on its way into memory, from the look-up of its ref to the last verified chunk.

A ``Restoration`` works from the moment it is made, in the shadow of whatever the main thread does (imports, mostly):

1. where the store is remote, whoever makes it spawns a fetcher, which looks ref and manifest up and begins by itself;
2. a thread of its own reads ref and manifest, as the fetcher found them or from the store;
3. if this host has the segments as flat files, they are mapped; else the arena is adopted from the fetcher or allocated,
   and the chunks are fetched into it, by that fetcher or the engine that is asked for;
4. what fails is tried once more with the generation before it, where the recovery mode lets it; a generation of which this
   host knows that it was bad is tried last.

It ends in one of three outcomes: Restored, Missing (there is no snapshot for the key) or Unusable (there is one, and
neither it nor the generation before it could be read).
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import events
from coldstart.config import PINNED_BYTES
from coldstart.devices.cpu import CpuDevice
from coldstart.errors import (
    CodecError,
    ColdstartError,
    DeviceError,
    ObjectMissingError,
    SnapshotError,
    StoreError,
    StoreTransientError,
)
from coldstart.fetch import FetchRequest, look_ahead, start_fetch
from coldstart.fetch.base import RingWay
from coldstart.fetch.crew import Bounds
from coldstart.frameworks import arrays, bind, rebuild
from coldstart.kernel_caches.merging import is_of_kernels, without_kernels
from coldstart.kernel_caches.placing import NOTHING, Placed, place_kernels
from coldstart.keys import explain_change
from coldstart.manifest import ref_key
from coldstart.metrics import Span
from coldstart.plan import in_forms, needed
from coldstart.programs.record import chosen, consumer_of
from coldstart.quarantine import Quarantine
from coldstart.recovery import CHUNK_RETRY, MODES, PREVIOUS_GENERATION, REPLICA
from coldstart.segments import map_segments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coldstart.devices.base import Arena, Device
    from coldstart.fetch.ahead import LookAhead
    from coldstart.fetch.base import Address, Fetch, FetchReport
    from coldstart.kernel_caches.home import Kernels
    from coldstart.manifest import KeyRecord, Manifest
    from coldstart.metrics import Timeline
    from coldstart.programs.record import Program
    from coldstart.repository import Lookup, Repository
    from coldstart.stores.base import StoredObject


STALLED_SECONDS = 20.0
"""A store that fails after as long is not waited for as long again, for the previous generation: the handler can load."""


class Request(NamedTuple):
    """What to restore. ``pinned``: the key of one manifest to restore instead of the current one (a proof)."""

    name: str
    key: KeyRecord
    open_repository: Callable[[], Repository]
    device: Device
    threads: int
    budget_bytes: int
    files_folder: str
    address: Address | None = None
    """The store's, for another process to open it."""
    engine: str = "auto"
    processes: int = 1
    """Fetcher processes at most."""
    pinned: str = ""
    programs: tuple[str, ...] = ()
    """Ids of the programs that this start can run and may, the preferred one first."""
    fresh: bool = False
    """Look the current generation up, so that it can be replaced, but do not use it (``--fresh``)."""
    ring_bytes: int = PINNED_BYTES
    """Pinned host memory through which chunks reach a device with memory of its own."""
    kernels: Kernels | None = None
    """Where this process keeps compiled kernels, and which of the snapshot it may take."""
    recovery: str = "standard"
    """How far down the order of recovery it may go: a mode of ``coldstart.recovery``."""

    @property
    def kernels_consumer(self) -> str:
        """The consumer of the segments with kernel caches that it takes, "" for none."""
        return self.kernels.wanted if self.kernels else ""


class Restored(NamedTuple):
    """A snapshot in memory, verified. ``recovered_by``: none, chunk_retry, replica or previous_generation.

    ``manifest`` is what was needed of the generation: with a ``program``, what that needs, else what the state needs.
    ``reason``: why the current generation was not the one, in the last case. ``replica_reads``: objects that came from one.
    """

    manifest: Manifest
    manifest_key: str
    arena: Arena
    report: FetchReport
    recovered_by: str
    lookup: Lookup | None
    whole: Manifest
    """The generation as it is stored, of which ``manifest`` may be a part."""
    program: Program | None = None
    reason: str = ""
    replica_reads: int = 0
    kernels: Placed = NOTHING
    """The kernel caches that it brought."""


class Missing(NamedTuple):
    """No snapshot for this key; ``reason`` says why an older one was passed over."""

    reason: str
    lookup: Lookup | None


class Unusable(NamedTuple):
    """A snapshot that should have been used could not be: ``reason`` says what stood in the way."""

    reason: str
    lookup: Lookup | None


Outcome = Restored | Missing | Unusable


class Restoration:
    """One snapshot on its way into memory."""

    def __init__(self, request: Request, bus: events.EventBus) -> None:
        self.request = request
        self.began_monotonic_seconds = time.monotonic()
        self.found_monotonic_seconds = 0.0
        self.ended_monotonic_seconds = 0.0
        self.failed: list[str] = []
        """Keys of the manifests that were tried in vain."""
        self._bus = bus
        self._manifest: Manifest | None = None
        self._program: Program | None = None
        self._found = threading.Event()
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._cancelled = threading.Event()
        self._is_on_timeline = False
        self._way: RingWay | None = None
        if request.device.has_own_memory:
            from coldstart.fetch.landing import device_codecs

            self._way = RingWay(request.ring_bytes, device_codecs())
        self._ahead = self._look_ahead()
        self._under_way: Fetch | None = None
        self._thread = threading.Thread(target=self._run, name=f"coldstart-restore-{request.name}", daemon=True)
        self._thread.start()

    def manifest(self) -> Manifest | None:
        """Wait until it is known which generation is being fetched (None: none is)."""
        self._found.wait()
        return self._manifest

    def program(self) -> Program | None:
        """Wait like ``manifest``; the program of that generation which this start is to use, None for none."""
        self._found.wait()
        return self._program

    def outcome(self) -> Outcome:
        """Wait until the snapshot is in memory or it is known that it will not be."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return self._outcome

    def succeeded(self) -> bool:
        """Wait for the end, and tell whether the snapshot is in memory."""
        self._thread.join()
        return isinstance(self._outcome, Restored)

    def put_on(self, timeline: Timeline) -> None:
        """Put this restoration's stretches on a timeline, by its clock. Once: a second call does nothing."""
        if self._is_on_timeline:
            return
        self._is_on_timeline = True
        offset = timeline.clock() - time.monotonic()
        began, found, ended = self.began_monotonic_seconds, self.found_monotonic_seconds, self.ended_monotonic_seconds
        timeline.record(Span("look up", "fetch", began + offset, (found or ended) + offset))
        if found and ended >= found:
            timeline.record(Span("fetch", "fetch", found + offset, ended + offset))

    def cancel(self) -> None:
        """The snapshot is not wanted (its key turned out to be another): stop soon."""
        self._cancelled.set()
        for work in (self._ahead, self._under_way):
            if work is not None:
                work.cancel()

    def _run(self) -> None:
        try:
            self._outcome = self._restore()
        except BaseException as error:  # noqa: BLE001  raised again by outcome(), in the thread that asked
            _let_go(error)
            self._error = error
        finally:
            self.ended_monotonic_seconds = time.monotonic()
            self._found.set()
            if self._ahead is not None:
                self._ahead.end()

    def _restore(self) -> Outcome:
        request = self.request
        try:
            repository = request.open_repository()
            if request.pinned:
                return self._fetch(repository, request.pinned, "none", None)
            lookup = repository.look_up(request.name, request.key, ahead=self._read_ahead)
        except (StoreError, SnapshotError, DeviceError) as error:
            return Unusable(_reason(error), None)
        if lookup.distrust:
            return Unusable(f"UntrustedError: {lookup.distrust}", lookup)
        if lookup.ref is None:
            return Missing(_why_missing(request, lookup), lookup)
        if request.fresh:
            return Missing("a fresh start was asked for", lookup)
        return self._try_generations(repository, lookup)

    def _try_generations(self, repository: Repository, lookup: Lookup) -> Outcome:
        quarantine = Quarantine(self.request.files_folder, repository.store.url)
        keys, reasons = self._order(lookup, quarantine)
        for key in keys:
            began = time.monotonic()
            recovered_by = "none" if lookup.ref is None or key == lookup.ref.manifest else PREVIOUS_GENERATION
            try:
                restored = self._fetch(repository, key, recovered_by, lookup)._replace(reason="; ".join(reasons))
            except (StoreError, SnapshotError, DeviceError, CodecError) as error:
                reasons.append(_reason(error))
                _let_go(error)
                if self._cancelled.is_set():  # nobody wants the one before it either
                    break
                self.failed.append(key)
                if isinstance(error, (ObjectMissingError, SnapshotError, CodecError)):
                    quarantine.note(key, reasons[-1])
                self._bus.publish(events.FellBack(self.request.name, "generation", reasons[-1]))
                if isinstance(error, StoreTransientError) and time.monotonic() - began > STALLED_SECONDS:
                    break
            else:
                if recovered_by != PREVIOUS_GENERATION:
                    quarantine.clear(self.request.name)
                else:
                    quarantine.lift(key)
                    self._bus.publish(events.Recovered(self.request.name, PREVIOUS_GENERATION, restored.reason))
                return restored
        return Unusable("; ".join(reasons), lookup)

    def _order(self, lookup: Lookup, quarantine: Quarantine) -> tuple[list[str], list[str]]:
        """The manifests to try, one after another, and why the current one is not the first, if it is not."""
        assert lookup.ref is not None
        current, previous = lookup.ref.manifest, lookup.ref.previous_manifest
        if not previous or not MODES[self.request.recovery].previous:
            return [current], []
        bad = quarantine.reason(current)
        if not bad or quarantine.reason(previous):
            return [current, previous], []
        return [previous, current], [f"the current generation is in quarantine on this host: {bad}"]

    def _fetch(self, repository: Repository, key: str, recovered_by: str, lookup: Lookup | None) -> Restored:
        request = self.request
        whole = repository.manifest(key, name=request.name, ahead=self._read_ahead)
        program = chosen(whole.programs, request.programs)
        kernels = request.kernels_consumer
        manifest = needed(whole, consumer_of(program.id) if program else "", kernels)
        if manifest.device_type != request.device.type:
            raise SnapshotError(
                f"generation {manifest.generation} is for device {manifest.device_type}", snapshot=request.name
            )
        if self._way is not None:
            manifest = in_forms(manifest, self._way.device_codecs)
        self._manifest, self._program = manifest, program
        ahead_seconds = 0.0 if self._ahead is None else self._ahead.found_monotonic_seconds(key)
        self.found_monotonic_seconds = ahead_seconds or time.monotonic()
        self._found.set()
        self._bus.publish(
            events.SnapshotFound(
                request.name, manifest.generation, manifest.rung, manifest.raw_bytes, manifest.stored_bytes
            )
        )
        before = repository.store.tally
        unread = ""
        try:
            arena, report = self._mapped(repository, manifest) or self._fetched(repository, manifest, key)
        except (StoreError, SnapshotError) as error:
            if not is_of_kernels(manifest, kernels, error.key or ""):
                raise
            manifest, unread = self._without_kernels(manifest), _reason(error)
            arena, report = self._fetched(repository, manifest, key)
        placed = self._place_kernels(whole, manifest, arena, unread)
        seconds = report.ended_monotonic_seconds - report.began_monotonic_seconds
        self._bus.publish(events.FetchEnded(request.name, report.fetched_bytes, seconds, report.engine))
        for reason in report.degraded:
            self._degrade(reason)
        replica_reads = (report.tally + repository.store.tally - before).replica_reads
        step = self._step(report.retried_chunks, replica_reads)
        if recovered_by == "none":
            recovered_by = step
        restored = Restored(manifest, key, arena, report, recovered_by, lookup, whole, program)
        return restored._replace(replica_reads=replica_reads, kernels=placed)

    def _without_kernels(self, manifest: Manifest) -> Manifest:
        """The manifest to go on with where nothing but a kernel cache is bad: fetched again, by somebody who knows of it."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.end()
        self._manifest = without_kernels(manifest)
        return self._manifest

    def _place_kernels(self, whole: Manifest, manifest: Manifest, arena: Arena, unread: str) -> Placed:
        """Put kernel caches in place before anybody compiles: this thread works beside the imports."""
        placed = place_kernels(self.request.kernels, whole, manifest, arena, unread)
        if placed.obstacle:
            self._bus.publish(events.KernelCachesPassedOver(self.request.name, placed.obstacle))
        return placed

    def _step(self, retried_chunks: int, replica_reads: int) -> str:
        """What made the bytes of a generation whole, told to whoever subscribes."""
        if replica_reads:
            reason, step = f"{replica_reads} reads were answered by a replica", REPLICA
        elif retried_chunks:
            reason, step = f"{retried_chunks} chunks were altered, and right when read again", CHUNK_RETRY
        else:
            return "none"
        self._bus.publish(events.Recovered(self.request.name, step, reason))
        return step

    def _mapped(self, repository: Repository, manifest: Manifest) -> tuple[Arena, FetchReport] | None:
        """The generation from this host's flat files. Not for a proof, which is to read what the store holds."""
        request, device = self.request, self._device_of(manifest)
        if request.pinned or device.has_own_memory:
            return None
        return map_segments(
            manifest,
            repository.store,
            device,
            threads=request.threads,
            stop=self._cancelled,
            degraded=self._degrade,
        )

    def _fetched(self, repository: Repository, manifest: Manifest, key: str) -> tuple[Arena, FetchReport]:
        request = self.request
        arena = self._arena(manifest, key)
        wanted = FetchRequest(
            manifest,
            repository.store,
            arena,
            request.threads,
            request.budget_bytes,
            verify_raw=bool(request.pinned),
            address=request.address,
            progress=self._progressed,
            processes=request.processes,
        )
        if self._way is None or not manifest.device_segments:
            return arena, self._waited_for(self._begin(wanted, key))
        return arena, self._landed(wanted, key, self._way)

    def _landed(self, wanted: FetchRequest, key: str, way: RingWay) -> FetchReport:
        """Fetch by way of a ring, from which chunks are copied to the device as they come."""
        from coldstart.fetch.landing import land
        from coldstart.fetch.ring import Ring, shape_of

        ring = None if self._ahead is None else self._ahead.ring(key)
        ring = ring or Ring.make(*shape_of(wanted.manifest, way.ring_bytes))
        wanted = wanted._replace(ring=ring, device_codecs=way.device_codecs)
        landing = land(wanted, ring)
        try:
            fetch = self._begin(wanted._replace(arena=None), key)
            report = self._waited_for(fetch)
            landing.wait()
        except ColdstartError as error:
            raise landing.error or error from None  # what stopped the landing is why the fetch was stopped
        finally:
            landing.cancel()
            ring.close()
        return report._replace(degraded=(*report.degraded, *landing.degraded))

    def _waited_for(self, fetch: Fetch) -> FetchReport:
        self._under_way = fetch
        if self._cancelled.is_set():
            fetch.cancel()
        try:
            return fetch.wait()
        except MemoryError as error:
            raise DeviceError("there is too little memory for fetching the snapshot: give the worker more") from error
        finally:
            self._under_way = None

    def _arena(self, manifest: Manifest, key: str) -> Arena:
        """Memory for the segments: that which is being filled already, if there is one."""
        lengths, device = [segment.length_bytes for segment in manifest.segments], self._device_of(manifest)
        filling = None if self._ahead is None else self._ahead.arena_fd(key)
        if filling is not None:
            return device.adopt(filling, lengths)
        return device.allocate(lengths, host_segments=manifest.host_segments)

    def _device_of(self, manifest: Manifest) -> Device:
        """The device, unless nothing belongs there: it is not opened then, which would take its memory and the right to fork."""
        device = self.request.device
        return CpuDevice() if device.has_own_memory and not manifest.device_segments else device

    def _degrade(self, reason: str) -> None:
        self._bus.publish(events.StoreDegraded(self.request.name, reason))

    def _look_ahead(self) -> LookAhead | None:
        """Spawn the fetcher at once, by whoever begins: a thread of ours would wait for the imports at every file it opens."""
        request = self.request
        if request.pinned or request.fresh:
            return None
        url = request.address.url if request.address else ""
        if Quarantine(request.files_folder, url).has_notes(request.name):
            return None  # a fetcher would begin with the current generation, which may not be the one to begin with
        bounds = Bounds(request.threads, request.budget_bytes, request.processes, verify_raw=False)
        wanted = ref_key(request.name, request.key.digest)
        return look_ahead(
            request.address,
            wanted,
            bounds,
            engine=request.engine,
            programs=request.programs,
            kernels=request.kernels_consumer,
            way=self._way,
        )

    def _read_ahead(self, key: str) -> StoredObject | None:
        return None if self._ahead is None else self._ahead.read(key)

    def _begin(self, request: FetchRequest, key: str) -> Fetch:
        """Fetch with whoever has looked the manifest up, if it can, or with the engine that is asked for."""
        fetch = None if self._ahead is None else self._ahead.fetch(request, key)
        return fetch or start_fetch(request, engine=self.request.engine)

    def _progressed(self, fetched_bytes: int) -> None:
        assert self._manifest is not None
        if self._cancelled.is_set():
            return
        seconds = time.monotonic() - self.found_monotonic_seconds
        self._bus.publish(events.FetchProgress(self.request.name, fetched_bytes, self._manifest.stored_bytes, seconds))


def _reason(error: ColdstartError) -> str:
    return f"{type(error).__name__}: {error}"


def _let_go(error: BaseException) -> None:
    """Empty the frames of an error that is over: they hold an arena, as large as the state that is to be loaded instead."""
    from traceback import clear_frames

    cause: BaseException | None = error
    while cause is not None:
        clear_frames(cause.__traceback__)
        cause = cause.__context__


def _why_missing(request: Request, lookup: Lookup) -> str:
    if lookup.newest is None:
        return "no snapshot yet"
    return explain_change(lookup.newest.key, request.key)


def bind_arrays(restored: Restored, skeleton: Any, *, besides: tuple[str, ...] = ()) -> Any:
    """Bind the arrays of a restored snapshot to what ``build`` made, as views of the arena, and return that.

    ``besides``: paths of objects whose arrays a program makes superfluous: they stay as ``build`` made them.
    Raises StateMismatchError, listing how the two differ.
    """
    manifest = restored.manifest
    return bind(skeleton, manifest.leaves, manifest.modules, _buffer_array(restored), besides=besides)


def rebuild_tree(restored: Restored, besides: Mapping[str, Any] | None = None) -> Any:
    """Make a state that needs no ``build``: a tree of arrays and plain values. Raises ManifestError.

    ``besides``: arrays by their paths that the snapshot has no bytes of.
    """
    found = arrays(restored.manifest.leaves, _buffer_array(restored))
    return rebuild(restored.manifest.tree, {**found, **(besides or {})})


def _buffer_array(restored: Restored) -> Callable[[int], Any]:
    manifest, arena = restored.manifest, restored.arena

    def buffer_array(index: int) -> Any:
        buffer = manifest.buffers[index]
        return arena.array(buffer.segment, buffer.offset_bytes, buffer.length_bytes)

    return buffer_array
