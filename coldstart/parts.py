"""The parts of a handler's state: where each comes from in this start, and what a snapshot of it would hold.

An undivided state is one part, named ""; ``load={"encoder": ..., "adapter": ...}`` makes several, each with a key, a
snapshot and a fallback of its own. A part is restored if it can be, by the highest rung that its generation has; whatever
stands in the way is published, remembered as the start's reason, and answered by running ``load``.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import caches, events
from coldstart.capture import Capture, Encoding
from coldstart.config import Settings, read_variable
from coldstart.context import Context, Declared
from coldstart.definition import Policy, accepts
from coldstart.devices import pick
from coldstart.errors import ColdstartError, KeyUncomputableError, StateMismatchError, StoreError, UncapturableError
from coldstart.frameworks import survey
from coldstart.keys import find_handlers, key_from_functions, key_from_source
from coldstart.metrics import Span, Timeline, process_clock
from coldstart.proof import Origin
from coldstart.repository import Lookup, Repository
from coldstart.resnapshot import Plan, marks_of
from coldstart.restore import Missing, Request, Restoration, Restored, Unusable, bind_arrays, rebuild_tree
from coldstart.stores import StoreOptions, open_store
from coldstart.terms import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coldstart.definition import Definition
    from coldstart.devices.base import Device
    from coldstart.fetch.base import FetchReport
    from coldstart.frameworks import Survey
    from coldstart.loops import Loops
    from coldstart.manifest import KeyRecord

NO_STORE = "no store"


class Services(NamedTuple):
    """What a start is given: settings, whether this process serves, what a proof pinned, and where events go."""

    settings: Settings
    serving: bool
    pinned: Mapping[str, str]
    bus: events.EventBus

    @property
    def uses_store(self) -> bool:
        """A plain call in a user's tests must not touch real snapshots: the default store is for processes that serve."""
        return self.settings.has_store and (self.serving or self.settings.store_is_explicit)


class Opener:
    """Opens the store once, on first use, in whichever thread needs it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._repository: Repository | None = None

    def __call__(self) -> Repository:
        with self._lock:
            if self._repository is None:
                settings = self._settings
                options = StoreOptions(*(getattr(settings, field) for field in StoreOptions._fields))
                self._repository = Repository(open_store(settings.store, options))
            return self._repository


def snapshot_name(name: str, part: str) -> str:
    """The snapshot of a part: the handler's name, and ``=part`` where the state has named parts."""
    return f"{name}={part}" if part else name


# --- before the import -----------------------------------------------------------------------------------------------


class Early:
    """Restorations begun from a file's source, before it was imported. Used only for parts whose key turns out the same."""

    def __init__(
        self,
        name: str,
        timeline: Timeline,
        opener: Opener,
        restorations: Mapping[str, Restoration],
        bus: events.EventBus,
    ) -> None:
        self.name = name
        self.timeline = timeline
        self.opener = opener
        self.restorations = dict(restorations)
        self._bus = bus

    def point_hubs(self) -> None:
        """Let hub libraries, which are about to be imported, find restored files: waits until it is known which."""
        for restoration in self.restorations.values():
            manifest = restoration.manifest()
            if manifest is not None:
                caches.point_to(caches.folder_of(manifest, Path(restoration.request.files_folder)), manifest)

    def forget(self) -> None:
        """In a forked child, where the threads at work on them are not: have nothing that one could wait for."""
        self.restorations.clear()

    def take(self, part: str, key: KeyRecord) -> Restoration | None:
        """The restoration of a part if it is of this key; one of another key is cancelled."""
        restoration = self.restorations.pop(part, None)
        if restoration is not None and restoration.request.key.digest != key.digest:
            restoration.cancel()
            self._bus.publish(
                events.SnapshotPassedOver(self.name, "the imported module has another key than its source")
            )
            return None
        return restoration


def early_restorations(path: str, name: str | None, services: Services) -> tuple[Early | None, str]:
    """Begin restoring for handler ``name`` (None: the only one) of a file that is not imported yet; or say why not."""
    timeline = Timeline(process_clock())
    if not services.uses_store:
        return None, NO_STORE
    with timeline.span("key from source"):
        sources = [source for source in find_handlers(path) if name in (None, source.name, source.attribute)]
        if len(sources) != 1 or not sources[0].name:
            return None, "the handler's name is computed: its start waits for the import"
        device = pick(services.settings.device)
        try:
            keys = key_from_source(sources[0], device_type=device.type, environment=read_variable)
        except KeyUncomputableError as error:
            return None, str(error)
    opener = Opener(services.settings)
    restorations = {
        part: _restoration(snapshot_name(sources[0].name, part), part, key, opener, device, services)
        for part, key in keys.items()
    }
    early = Early(sources[0].name, timeline, opener, restorations, services.bus)
    caches.before_import("huggingface_hub", early.point_hubs)
    return early, ""


def _restoration(
    name: str, part: str, key: KeyRecord, opener: Opener, device: Device, services: Services
) -> Restoration:
    settings = services.settings
    request = Request(
        name=name,
        key=key,
        open_repository=opener,
        device=device,
        threads=settings.fetch_threads,
        budget_bytes=settings.memory_budget_bytes,
        files_folder=settings.files_folder,
        pinned=services.pinned.get(part, ""),
        fresh=settings.fresh,
    )
    return Restoration(request, services.bus)


# --- the parts of a start --------------------------------------------------------------------------------------------


class Part:
    """One part of a state in one start."""

    def __init__(
        self, name: str, snapshot: str, key: KeyRecord | None, restoration: Restoration | None, context: Context
    ) -> None:
        self.name = name
        self.snapshot = snapshot
        self.key = key
        self.restoration = restoration
        self.context = context
        self.kind = "cold"
        self.reason = ""
        self.restored: Restored | None = None
        self.lookup: Lookup | None = None
        self.state: Any = None
        self.survey: Survey | None = None
        self.obstacle = ""
        self.marks: dict[str, Any] = {}
        self.files: list[caches.FileSource] = []


class Parts:
    """All parts of a handler's state in one start. ``load_state`` is the work of phase weight_load."""

    def __init__(
        self, definition: Definition, services: Services, timeline: Timeline, early: Early | None, loops: Loops
    ) -> None:
        self.no_capture_reason = ""
        self._records_opens = False
        self._definition = definition
        self._services = services
        self._timeline = timeline
        self._loops = loops
        self.device = pick(services.settings.device)
        self.open_repository = early.opener if early else Opener(services.settings)
        self.parts = [self._part(name, early) for name in definition.load]
        self.context = self.parts[0].context

    def _part(self, name: str, early: Early | None) -> Part:
        definition, services = self._definition, self._services
        snapshot = snapshot_name(definition.name, name)
        if not services.uses_store:
            self.no_capture_reason = NO_STORE
            return Part(name, snapshot, None, None, self._make_context())
        with self._timeline.span("key from functions"):
            try:
                key = key_from_functions(definition, name, device_type=self.device.type, environment=read_variable)
            except KeyUncomputableError as error:
                self.no_capture_reason = str(error)
                return Part(name, snapshot, None, None, self._make_context())
        restoration = early.take(name, key) if early else None
        if restoration is None:
            restoration = _restoration(snapshot, name, key, self.open_repository, self.device, services)
        return Part(name, snapshot, key, restoration, self._make_context())

    def _make_context(self) -> Context:
        """A context for one part, with the declared files kept: what a part keeps is its own."""
        definition = self._definition
        context = Context(
            device=self.device.type,
            declared=Declared(definition.env, definition.secrets),
            span=lambda name: self._timeline.span(name, "phase"),
            log=lambda message, fields: self._services.bus.publish(events.UserLine(definition.name, message, fields)),
            scratch=Path(self._services.settings.files_folder) / definition.name / "downloads",
        )
        base = Path(definition.code.co_filename).parent
        for name, path in definition.files.items():
            if (base / path).exists():
                context.keep(base / path, name=name)
        return context

    # --- what the start record says ----------------------------------------------------------------------------------

    @property
    def key_digest(self) -> str:
        """The key of an undivided state, or those of all parts."""
        return " ".join(part.key.digest for part in self.parts if part.key)

    @property
    def kind(self) -> str:
        """The start's kind: restored only if every part was; a fallback in any part makes it one."""
        kinds = {part.kind for part in self.parts}
        return next(kind for kind in ("fallback", "cold", "restored") if kind in kinds)

    @property
    def reason(self) -> str:
        """Why the start is not simply restored, part by part."""
        return "; ".join(
            f"{part.name}: {part.reason}" if part.name else part.reason for part in self.parts if part.reason
        )

    @property
    def restored(self) -> list[FetchReport]:
        """How the parts that were restored were fetched."""
        return [part.restored.report for part in self.parts if part.restored and part.kind == "restored"]

    # --- phase weight_load -------------------------------------------------------------------------------------------

    def load_state(self) -> Any:
        """Restore or load every part, and return the state: the part's own if there is but one unnamed, else by name."""
        for part in self.parts:
            part.state = self._state_of(part)
        self.context = self._joint_context()
        if self._definition.owner is None and list(self._definition.load) != [""]:
            return {part.name: part.state for part in self.parts}
        return self.parts[0].state

    def _joint_context(self) -> Context:
        """What ``compile`` and ``init`` get: the one part's context, or one with the files of all parts."""
        if len(self.parts) == 1:
            return self.parts[0].context
        context = self._make_context()
        context.kind = self.kind
        for part in self.parts:
            context.files.update(part.context.files)
        return context

    def _state_of(self, part: Part) -> Any:
        if part.restoration is None:
            part.reason = self.no_capture_reason
            return self._load(part)
        try:
            restored = self._restore(part, part.restoration)
        except Exception as error:  # the start's edge: a snapshot is an optimisation, so load answers any failure of it
            self._fall_back(part, "restore", events.error_text(error))
            restored = None
        self._record_spans(part.restoration)
        if restored is None:
            if self._services.pinned.get(part.name):
                raise StateMismatchError(
                    f"the generation to be proven cannot be used: {part.reason}", snapshot=part.snapshot
                )
            self._let_go_of_files(part)
            return self._load(part)
        part.kind = part.context.kind = "restored"
        return restored[0]

    def _restore(self, part: Part, restoration: Restoration) -> tuple[Any] | None:
        """The restored state in a tuple of one, or None when there is nothing to restore. Any error means: fall back."""
        manifest = restoration.manifest()
        build = self._definition.build.get(part.name)
        skeleton = None
        if manifest is not None and manifest.rung == "arrays" and build is not None and not manifest.files:
            skeleton = self._build(build, part)  # in the shadow of the fetch
        outcome = restoration.outcome()
        part.lookup = outcome.lookup
        if isinstance(outcome, Missing):
            part.reason = outcome.reason
            self._services.bus.publish(events.SnapshotPassedOver(part.snapshot, outcome.reason))
            return None
        if isinstance(outcome, Unusable):
            self._fall_back(part, "restore", outcome.reason)
            return None
        part.restored = outcome
        self._use_files(part, outcome)
        if outcome.manifest.rung == "files":
            outcome.arena.seal()
            return (self._call(self._definition.load[part.name], part),)
        if skeleton is None and build is not None:
            skeleton = self._build(build, part)
        outcome.arena.seal()
        return (self._bound(outcome, skeleton, build is not None),)

    def _bound(self, restored: Restored, skeleton: Any, built: bool) -> Any:  # noqa: FBT001
        """The state with the restored arrays in it: bound to a skeleton, or a tree made from nothing."""
        if built:
            bound = bind_arrays(restored, self._subject(skeleton))
            return bound if self._definition.owner is None else skeleton
        if restored.manifest.tree is None:
            raise StateMismatchError("the snapshot holds arrays for a build() that the handler no longer has")
        tree = rebuild_tree(restored)
        if self._definition.owner is None:
            return tree
        instance: Any = object.__new__(self._definition.owner)
        vars(instance).update(tree)
        return instance

    def _use_files(self, part: Part, restored: Restored) -> None:
        manifest = restored.manifest
        if not manifest.files:
            return
        with self._timeline.span("place files"):
            folder = caches.place_files(manifest, restored.arena, Path(self._services.settings.files_folder))
        late = caches.point_to(folder, manifest)
        if late:
            self._services.bus.publish(events.StoreDegraded(part.snapshot, late))
        part.files = [
            caches.FileSource(entry.root, entry.name, str(folder / entry.root / entry.name)) for entry in manifest.files
        ]
        part.context.use_restored(folder, tuple(entry.name for entry in manifest.files if entry.root == caches.KEPT))

    def _let_go_of_files(self, part: Part) -> None:
        """Before ``load`` runs for real: hubs go online again and ``ctx.keep`` no longer finds restored copies."""
        if part.restored is not None:
            caches.point_back()
            part.files = []
            part.context = self._make_context()

    def _load(self, part: Part) -> Any:
        """Run the user's ``load``, note which cache files it used and what its arrays look like before anyone changes them."""
        if part.kind != "fallback":
            part.kind = "cold"
        part.context.kind = part.kind
        wants_capture = self._wants_capture(part)
        if wants_capture and not self._records_opens:
            self._records_opens = True
            caches.recorder.begin(caches.cache_roots().values())
        with self._timeline.span("load"):
            state = self._call(self._definition.load[part.name], part)
        if wants_capture:
            self._survey(part, state)
        return state

    def _survey(self, part: Part, state: Any) -> None:
        with self._timeline.span("survey"):
            try:
                found = survey(self._subject(state))
            except UncapturableError as error:
                part.obstacle = str(error)
                return
            if found.tree is None and part.name not in self._definition.build:
                part.obstacle = f"{found.tree_obstacle}; give build= to put its arrays into the snapshot"
                return
            part.survey = found
            part.marks = marks_of(found)

    def _call(self, hook: Callable[..., Any], part: Part) -> Any:
        """Call ``load`` or ``build``; in class form the state is a fresh instance that the method fills."""
        owner = self._definition.owner
        if owner is None:
            return self._loops.finish(hook(part.context) if accepts(hook, 1) else hook())
        instance: Any = object.__new__(owner)
        self._loops.finish(hook(instance, part.context) if accepts(hook, 2) else hook(instance))
        return instance

    def _build(self, build: Callable[..., Any], part: Part) -> Any:
        with self._timeline.span("build"):
            return self._call(build, part)

    def _subject(self, state: Any) -> Any:
        """What is surveyed and bound: in class form what the methods set on ``self``."""
        return vars(state) if self._definition.owner is not None else state

    def _fall_back(self, part: Part, stage: str, reason: str) -> None:
        part.kind, part.reason = "fallback", reason
        self._services.bus.publish(events.FellBack(part.snapshot, stage, reason))

    def _record_spans(self, restoration: Restoration) -> None:
        """Put the restoration's stretches on the timeline, by its clock."""
        offset = self._timeline.clock() - time.monotonic()
        began, found = restoration.began_monotonic_seconds, restoration.found_monotonic_seconds
        ended = restoration.ended_monotonic_seconds
        self._timeline.record(Span("look up", "fetch", began + offset, (found or ended) + offset))
        if found and ended >= found:
            self._timeline.record(Span("fetch", "fetch", found + offset, ended + offset))

    # --- after ready -------------------------------------------------------------------------------------------------

    @property
    def encoding(self) -> Encoding:
        """How new generations are stored."""
        return Encoding(self._services.settings.codec, self._services.settings.zstd_level)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Store the start record, best effort: a credential that may not write ends it with one event."""
        if not (self._services.uses_store and self._services.settings.start_records) or self._services.pinned:
            return
        try:
            self.open_repository().write_start_record(self._definition.name, dict(record))
        except StoreError as error:
            self._services.bus.publish(events.StoreDegraded(self._definition.name, f"start records are off: {error}"))

    def _wants_capture(self, part: Part) -> bool:
        settings = self._services.settings
        return part.key is not None and settings.capture and part.lookup is not None and not self._services.pinned

    def capture_plans(self, digests: tuple[str, ...]) -> list[Plan]:
        """The generations that this worker is to make: of parts that were not restored, or by the handler's policy."""
        touched = caches.recorder.end()
        return [plan for part in self.parts if (plan := self._capture_plan(part, digests, touched)) is not None]

    def _capture_plan(self, part: Part, digests: tuple[str, ...], touched: set[str]) -> Plan | None:
        policy = self._definition.policy
        if part.kind == "restored":
            return self._policy_plan(part, digests) if policy != Policy() or _recovered(part) else None
        if not self._wants_capture(part):
            self._no_capture(part, part.reason or "captures are switched off")
            return None
        files = self._files_for(part, touched)
        if part.survey is None and not files:
            self._no_capture(part, f"{part.obstacle}; load used no hub cache either, so there is nothing to store")
            return None
        return self._plan(part, tuple(files), digests)

    def _policy_plan(self, part: Part, digests: tuple[str, ...]) -> Plan | None:
        """A further generation of a restored state. What it holds is surveyed anew; rung *files* stays as it is."""
        assert part.restored is not None
        if part.restored.manifest.rung == "arrays":
            try:
                part.survey = survey(self._subject(part.state))
            except ColdstartError as error:
                self._no_capture(part, str(error))
                return None
            part.marks = marks_of(part.survey)
        return self._plan(part, tuple(part.files), digests)

    def _plan(self, part: Part, files: tuple[caches.FileSource, ...], digests: tuple[str, ...]) -> Plan:
        assert part.key is not None
        assert part.lookup is not None
        capture = Capture(
            name=part.snapshot,
            key=part.key,
            survey=part.survey,
            files=files,
            device_type=self.device.type,
            parent=None,
            parent_key="",
            generation=0,
            kinds=self._definition.kinds,
            warmup_digests=digests,
            provenance=versions(),
            mends=part.lookup.ref is not None and (_unusable(part) or _recovered(part)),
        )
        created = part.restored.manifest.created_seconds if part.kind == "restored" and part.restored else 0.0
        due_at_once = part.kind != "restored" or _recovered(part)
        return Plan(part.name, capture, part.lookup, part.marks, _origin(self._definition), due_at_once, created)

    def _files_for(self, part: Part, touched: set[str]) -> list[caches.FileSource]:
        """Kept files and those of hub caches; beside captured arrays without the files that held them."""
        hub = caches.used_files(touched, caches.cache_roots())
        if part.survey is not None:
            hub = [file for file in hub if Path(file.name).suffix not in caches.WEIGHT_SUFFIXES]
        files = hub + part.context.kept
        if files:
            total_bytes = sum(Path(file.path).stat().st_size for file in files)
            self._services.bus.publish(events.FilesKept(part.snapshot, len(files), total_bytes))
        return files

    def _no_capture(self, part: Part, reason: str) -> None:
        self.no_capture_reason = reason
        self._services.bus.publish(events.CaptureSkipped(part.snapshot, reason))


def _unusable(part: Part) -> bool:
    """Whether what the store holds for the part's key could not be read."""
    return part.kind == "fallback" and part.restored is None


def _recovered(part: Part) -> bool:
    """Whether the current generation was bad and the one before it served: a new one is due at once."""
    return part.restored is not None and part.restored.recovered_by == "previous_generation"


def _origin(definition: Definition) -> Origin:
    """Where another process finds the handler: the file of its module, and the module's name even if it runs as ``-m``."""
    defined = definition.owner or definition.function
    module = sys.modules.get(defined.__module__)
    file = getattr(module, "__file__", None) or definition.code.co_filename
    spec = getattr(module, "__spec__", None)
    return Origin(os.path.abspath(file), spec.name if spec else defined.__module__, definition.name)


def versions() -> dict[str, str]:
    """Versions of what took part in this start, for the manifest and the record."""
    found = {"coldstart": VERSION, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("numpy", "torch", "transformers", "onnxruntime"):
        version = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(version, str):
            found[name] = version
    return found
