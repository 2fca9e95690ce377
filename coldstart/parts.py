"""The parts of a handler's state: where each comes from in this start.

An undivided state is one part, named ""; ``load={"encoder": ..., "adapter": ...}`` makes several, each with a key, a
snapshot and a fallback of its own. A part is restored if it can be, by the highest rung that its generation has; whatever
stands in the way is published, remembered as the start's reason, and answered by running ``load``.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldstart import events
from coldstart.codecs import check_setting
from coldstart.config import read_variable, redactor
from coldstart.context import Context, Declared
from coldstart.devices import pick
from coldstart.early import (
    NO_STORE,
    Early,
    Services,
    address_of,
    opener_of_start,
    programs_of_start,
    restoration_of,
    snapshot_name,
)
from coldstart.errors import (
    AccessDeniedError,
    KeyUncomputableError,
    PhaseError,
    ProgramCallError,
    ProgramError,
    StateMismatchError,
    StoreError,
    StoreSetupError,
)
from coldstart.kernel_caches import home
from coldstart.kernel_caches.use import NONE as NO_KERNELS
from coldstart.kernel_caches.use import use_of
from coldstart.keys import key_from_functions
from coldstart.part import Part
from coldstart.part_loading import Loader
from coldstart.part_restoring import Restorer, pass_over
from coldstart.pools import Plan, Pools, planned
from coldstart.program_start import NONE as NO_PROGRAMS
from coldstart.program_start import eager_entries
from coldstart.recovery import LOAD, check_load
from coldstart.segments import keep_segments

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping

    from coldstart.capture import Encoding
    from coldstart.definition import Definition
    from coldstart.errors import ColdstartError
    from coldstart.fetch.base import FetchReport
    from coldstart.kernel_caches.home import Kernels
    from coldstart.loops import Loops
    from coldstart.metrics import Timeline
    from coldstart.program_start import Accepted
    from coldstart.save import Saving


UNSIGNED = (
    "this worker has no signing key (COLDSTART_SIGNING_KEY), and what is not signed is refused (COLDSTART_SIGNATURES)"
)


class Parts:
    """All parts of a handler's state in one start. ``load_state`` is the work of phase weight_load."""

    def __init__(
        self, definition: Definition, services: Services, timeline: Timeline, early: Early | None, loops: Loops
    ) -> None:
        self.no_capture_reason = ""
        self.kernels = NO_KERNELS
        self._may_not_write = False
        self._definition = definition
        self._services = services
        self._timeline = timeline
        self.device = pick(services.settings.device)
        check_setting(services.settings.codec, self.device.type)
        self.open_repository = early.opener if early else opener_of_start(definition.name, services)
        self.pools = Pools(definition.name, self.device, timeline, services.bus)
        self._loader = Loader(definition, timeline, loops, self._make_context, self.pools, gpu=self.device.ordinal)
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
                # As the early key saw it: an import, or pointing hubs at restored files, may have changed it since.
                environment = early.environment.get if early else read_variable
                key = key_from_functions(definition, name, device_type=self.device.type, environment=environment)
            except KeyUncomputableError as error:
                self.no_capture_reason = str(error)
                if early is not None:
                    early.cancel(name)
                return Part(name, snapshot, None, None, self._make_context())
        restoration = early.take(name, key) if early else None
        if restoration is None:
            restoration = restoration_of(
                snapshot, key, self.open_repository, self.device, services, self.accepted_programs(snapshot).identities
            )
        return Part(name, snapshot, key, restoration, self._make_context())

    def _make_context(self) -> Context:
        """A context for one part, with the declared files kept: what a part keeps is its own."""
        definition = self._definition
        context = Context(
            device=self.device.label,
            declared=Declared(definition.env, definition.secrets),
            span=lambda name: self._timeline.span(name, "phase"),
            log=lambda message, fields: self._services.bus.publish(events.UserLine(definition.name, message, fields)),
            scratch=Path(self._services.settings.files_folder) / definition.name / "downloads",
            pool=self.pools.take,
        )
        base = Path(definition.file).parent
        for name, path in definition.files.items():
            if (base / path).exists():
                context.keep(base / path, name=name)
        return context

    def leave_program(self, error: BaseException) -> bool:
        """After a failed warm-up: whether ``error`` is the program's, and the start is to be tried again without it.

        The handler is no part of the key, so a program may be older than the way in which it is called.
        """
        part = self.parts[0]
        cause = _of_program(error)
        if part.program is None or part.key is None or part.lookup is None or cause is None or self._services.pinned:
            return False
        part.unfit_program_generation = part.lookup.ref.generation if part.lookup.ref is not None else 0
        part.program, part.restored, part.kind, part.reason = None, None, "cold", ""
        pass_over(part, f"the handler cannot be answered by it: {cause}", self._services.bus)
        part.restoration = restoration_of(part.snapshot, part.key, self.open_repository, self.device, self._services)
        return True

    def leave_kernels(self, error: ColdstartError) -> bool:
        """After a failed phase of the user's: whether kernels were restored, and the start is to be tried again without any."""
        part = self.parts[0]
        is_users = isinstance(error, PhaseError) and error.phase in (
            "kernel_compile",
            "custom_init",
            "warmup_inference",
        )
        if not is_users or part.key is None or part.restored is None or self._services.pinned:
            return False
        if not part.restored.kernels.files:
            return False
        reason = f"the start failed with them: {error}"
        home.give_up(reason)
        compiler = sys.modules.get("torch.compiler")
        if "torch._dynamo" in sys.modules and compiler is not None:
            compiler.reset()
        self._services.bus.publish(events.KernelCachesPassedOver(part.snapshot, reason))
        part.restored, part.kind, part.reason = None, "cold", ""
        programs = self.accepted_programs(part.snapshot).identities
        part.restoration = restoration_of(
            part.snapshot, part.key, self.open_repository, self.device, self._services, programs
        )
        return True

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
    def recovery(self) -> str:
        """How far down the order of recovery this start may go: a mode of ``coldstart.recovery``."""
        return self._services.settings.recovery

    @property
    def restored(self) -> list[FetchReport]:
        """How the parts that were restored were fetched."""
        return [part.restored.report for part in self.parts if part.restored and part.kind == "restored"]

    # --- phase weight_load, and pool_alloc beside it ------------------------------------------------------------------

    def pool_plan(self) -> Plan:
        """The pools of the generations that are being restored: waits until it is known which those are."""
        restorations = [part.restoration for part in self.parts if part.restoration is not None]
        found = [(each.manifest(), each.program()) for each in restorations]
        pools = {
            each.pool.name: each
            for manifest, program in found
            if manifest is not None
            for each in planned(manifest, program)
        }
        return Plan(tuple(pools.values()), sum(manifest.raw_bytes for manifest, _ in found if manifest is not None))

    def load_state(self) -> Any:
        """Restore or load every part, and return the state: the part's own if there is but one unnamed, else by name."""
        definition = self._definition
        restorer = Restorer(
            definition,
            self._services,
            self._timeline,
            self.device,
            self.open_repository,
            self._loader,
            self.accepted_programs,
            self.pools,
        )
        for part in self.parts:
            part.state = self._state_of(part, restorer)
        self.context = self._joint_context()
        if definition.owner is None and list(definition.load) != [""]:
            return {part.name: part.state for part in self.parts}
        return self._entries(self.parts[0])

    def _entries(self, part: Part) -> Any:
        """The state as the handler gets it: behind the calls of its entry points, where it asks for a program."""
        if self._definition.program is None or part.program is not None:
            return part.state
        if part.kind == "restored" and not part.program_obstacle:
            part.program_obstacle = (
                self.accepted_programs(part.snapshot).obstacle or "the snapshot has none for this platform"
            )
        if self.wants_program(part) and part.survey is None and not part.obstacle and part.kind == "restored":
            self._loader.survey(part, part.state)  # before anything is put into it: a further generation is made of it
        return eager_entries(self._definition, part.state, self._services.recorder)

    def _joint_context(self) -> Context:
        """What ``compile`` and ``init`` get: the one part's context, or one with the files of all parts."""
        if len(self.parts) == 1:
            return self.parts[0].context
        context = self._make_context()
        context.kind = self.kind
        for part in self.parts:
            context.files.update(part.context.files)
        return context

    def _state_of(self, part: Part, restorer: Restorer) -> Any:
        if part.restoration is None:
            part.reason = self.no_capture_reason
            self._check_load(part)
            return self._loader.load(part, wants_capture=self.wants_capture(part))
        try:
            restored = restorer.restore(part, part.restoration)
        except Exception as error:  # noqa: BLE001  the start's edge: a snapshot is an optimisation, so load answers any failure of it
            part.fall_back(events.error_text(error), self._services.bus)
            restored = None
        part.restoration.put_on(self._timeline)
        if restored is None:
            if self._services.pinned.get(part.snapshot):
                raise StateMismatchError(
                    f"the generation to be proven cannot be used: {part.reason}", snapshot=part.snapshot
                )
            self._check_load(part)
            state = self._loader.load(part, wants_capture=self.wants_capture(part))
            if part.kind == "fallback":
                self._services.bus.publish(events.Recovered(part.snapshot, LOAD, part.reason))
            return state
        part.kind = "restored"
        return restored[0]

    def _check_load(self, part: Part) -> None:
        """Raise RecoveryError where the recovery mode does not let ``load`` run; who asked for a fresh start wants it to."""
        settings = self._services.settings
        if self._services.uses_store and not settings.fresh:
            check_load(settings.recovery, failed=part.kind == "fallback", reason=part.reason, snapshot=part.snapshot)

    @property
    def is_proof(self) -> bool:
        """Whether this start proves a generation, with nothing to fall back on."""
        return bool(self._services.pinned)

    @property
    def is_fresh(self) -> bool:
        """Whether everything is to be made anew."""
        return self._services.settings.fresh

    def accepted_programs(self, snapshot: str, backend: str = "") -> Accepted:
        """The programs that this start can run and may, by what the handler asks for."""
        if self._definition.program is None:
            return NO_PROGRAMS
        wanted = backend or self._definition.program.backend
        return programs_of_start(self._services, self.device, snapshot, wanted)

    def kernels_of(self, part: Part) -> Kernels | None:
        """Where this process keeps compiled kernels; None for parts but the first: one snapshot of a handler holds them."""
        return part.restoration.request.kernels if part.restoration and part is self.parts[0] else None

    def note_kernels(self) -> None:
        """After the warm-up: what was compiled. ``kernels`` says so from now on, and an event."""
        part = self.parts[0]
        kernels = self.kernels_of(part)
        if kernels is None:
            return
        use = use_of(kernels, part.restored.kernels) if part.restored else use_of(kernels)
        self.kernels = use
        bus, name = self._services.bus, self._definition.name
        if kernels.late:
            bus.publish(events.KernelCachesPassedOver(name, kernels.late))
        if use.restored_files or use.new_files:
            bus.publish(events.KernelCachesUsed(name, use.restored_files, use.restored_bytes, use.new_files))

    # --- after ready -------------------------------------------------------------------------------------------------

    def renew(self, services: Services) -> None:
        """After a freeze: settings and credentials of now, and a new connection to the store."""
        self._services = services
        self.open_repository.let_go(services.settings, close=False)  # a capture may be using it

    @property
    def encoding(self) -> Encoding:
        """How new generations are stored."""
        from coldstart.capture import Encoding

        return Encoding(self._services.settings.codec, self._services.settings.zstd_level)

    @property
    def saving(self) -> Saving:
        """Who stores new generations, and at what pace."""
        from coldstart.save import Saving

        settings = self._services.settings
        return Saving(
            settings.capture_engine,
            address_of(settings),
            settings.memory_budget_bytes,
            settings.capture_bytes_per_second,
        )

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Store the start record, best effort: where this worker may not write, one event says so and none is tried again."""
        services = self._services
        if not (services.uses_store and services.settings.start_records) or services.pinned or self._may_not_write:
            return
        try:
            self.open_repository().write_start_record(
                self._definition.name, redactor(services.settings).value(dict(record))
            )
        except (AccessDeniedError, StoreSetupError) as error:
            self._may_not_write = True
            services.bus.publish(events.StoreDegraded(self._definition.name, f"start records are off: {error}"))
        except StoreError as error:
            services.bus.publish(events.StoreDegraded(self._definition.name, f"this start has no record: {error}"))

    def keep_segments(self, *, pace: Callable[[], None], stop: threading.Event) -> None:
        """Write the flat files of what was fetched, so that the next worker of this host maps them. Raises StoreError."""
        for part in self.parts:
            if part.restored is not None and part.kind == "restored":
                keep_segments(
                    part.restored.manifest,
                    self.open_repository().store,
                    part.restored.arena,
                    pace=pace,
                    stop=stop,
                    degraded=partial(self._degrade, part.snapshot),
                )

    def _degrade(self, snapshot: str, reason: str) -> None:
        self._services.bus.publish(events.StoreDegraded(snapshot, reason))

    def wants_program(self, part: Part) -> bool:
        """Whether a program is to be made for this platform: the handler asks for one, and this start has none."""
        return (
            self._definition.program is not None
            and part.program is None
            and self._services.settings.programs
            and self.wants_capture(part)
        )

    def wants_capture(self, part: Part) -> bool:
        """Whether a part that was loaded may be captured: it has a key, a readable store, and nobody said no."""
        return not self.why_no_capture(part)

    def why_no_capture(self, part: Part) -> str:
        """Why a part may not be captured, "" if it may."""
        if part.key is None or part.lookup is None:
            return part.reason or NO_STORE
        if not self._services.settings.capture or self._services.pinned:
            return "captures are switched off"
        return UNSIGNED if self.open_repository().seals.refuses_own else ""


def _of_program(error: BaseException | None) -> ProgramError | ProgramCallError | None:
    """The error of a program that ``error`` is, or was raised from."""
    while error is not None and not isinstance(error, (ProgramError, ProgramCallError)):
        error = error.__cause__ or error.__context__
    return error
