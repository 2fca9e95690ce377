"""Restoring a part: its program in place of the state where there is one, else the state by its generation's rung."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldstart import caches, events
from coldstart.early import restoration_of
from coldstart.errors import ProgramError, ProofError, StateMismatchError, StoreSetupError
from coldstart.kernel_caches.ahead import compiles, import_compiler
from coldstart.part_loading import subject
from coldstart.program_start import in_place, load_calls, owners, stands_alone, unsuitable
from coldstart.programs import backend_of
from coldstart.restore import Missing, Unusable, bind_arrays, rebuild_tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.definition import Definition
    from coldstart.devices.base import Device
    from coldstart.early import Opener, Services
    from coldstart.metrics import Timeline
    from coldstart.part import Part
    from coldstart.part_loading import Loader
    from coldstart.pools import Pools
    from coldstart.program_start import Accepted
    from coldstart.programs.record import Program
    from coldstart.restore import Restoration, Restored


class Restorer:
    """Restores the parts of one handler. ``accepted_programs``: those that a start of a snapshot can run and may."""

    def __init__(
        self,
        definition: Definition,
        services: Services,
        timeline: Timeline,
        device: Device,
        open_repository: Opener,
        loader: Loader,
        accepted_programs: Callable[[str], Accepted],
        pools: Pools,
    ) -> None:
        self._definition = definition
        self._services = services
        self._timeline = timeline
        self._device = device
        self._open_repository = open_repository
        self._loader = loader
        self._accepted_programs = accepted_programs
        self._pools = pools

    def restore(self, part: Part, restoration: Restoration) -> tuple[Any] | None:
        """The restored state in a tuple of one, or None when there is nothing to restore. Any error means: fall back."""
        program = restoration.program()
        if program is None:
            return self._restore_state(part, restoration)
        try:
            return self._restore_program(part, restoration, program)
        except (ProgramError, ProofError, StoreSetupError) as error:
            if self._services.pinned.get(part.snapshot):
                raise
            pass_over(part, f"{error}", self._services.bus)
        restoration.cancel()
        assert part.key is not None
        part.restoration = restoration_of(part.snapshot, part.key, self._open_repository, self._device, self._services)
        return self._restore_state(part, part.restoration)

    def _restore_program(self, part: Part, restoration: Restoration, program: Program) -> tuple[Any] | None:
        """The program in place of the state. Raises ProgramError where it cannot be used, and so the state is restored."""
        self._check_suitable(program)
        part.context.kind = "restored"
        with self._timeline.span("import runtime"):  # in the shadow of the fetch
            backend_of(program.backend).import_runtime()
        outcome = restoration.outcome()
        part.lookup = outcome.lookup
        if isinstance(outcome, (Missing, Unusable)) or outcome.program is None:
            return self._restore_state(part, restoration)  # the generation before it, which has none
        self._check_suitable(outcome.program)  # of that generation, if it was the one before
        part.restored, part.reason = outcome, outcome.reason
        self._use_files(part, outcome)
        return (self._program_in_place(part, outcome, outcome.program),)

    def _check_suitable(self, program: Program) -> None:
        obstacle = unsuitable(program, self._definition.program)
        if obstacle:
            raise ProgramError(obstacle)

    def _program_in_place(self, part: Part, restored: Restored, program: Program) -> Any:
        """What the handler gets of a state whose computation is the program's: ``build`` runs if anything else is left of it."""
        definition = self._definition
        with self._timeline.span("load program"):
            calls = load_calls(program, restored, self._pools.raw)
        if self._services.cases:
            from coldstart.programs.cases import check_cases  # imports what only a proof needs

            check_cases(Path(self._services.cases), calls, program)
        build = definition.build.get(part.name)
        skeleton = None
        if build is not None and not stands_alone(definition):
            skeleton = self._loader.build(build, part)
            if restored.manifest.rung == "arrays":
                besides = owners(definition, skeleton) + _pool_paths(restored)
                bind_arrays(restored, subject(definition, skeleton), besides=besides)
        part.program = program
        return in_place(definition, skeleton, calls)

    def _restore_state(self, part: Part, restoration: Restoration) -> tuple[Any] | None:
        """The restored state itself, by its rung."""
        manifest = restoration.manifest()
        build = self._definition.build.get(part.name)
        skeleton = None
        part.context.kind = "restored"  # what build and, on rung files, load see; a load after a failure sets its own
        if manifest is not None and manifest.rung == "arrays" and build is not None and not manifest.files:
            skeleton = self._loader.build(build, part)  # in the shadow of the fetch
        if compiles(restoration.request.kernels, manifest):
            with self._timeline.span("import compiler"):  # in the shadow too
                import_compiler()
        outcome = restoration.outcome()
        part.lookup = outcome.lookup
        if isinstance(outcome, Missing):
            part.reason = outcome.reason
            self._services.bus.publish(events.SnapshotPassedOver(part.snapshot, outcome.reason))
            return None
        if isinstance(outcome, Unusable):
            part.fall_back(outcome.reason, self._services.bus)
            return None
        part.restored, part.reason = outcome, outcome.reason
        self._use_files(part, outcome)
        if outcome.manifest.rung == "files":
            if not caches.own_files(outcome.manifest):
                raise StateMismatchError(
                    "the snapshot holds a program alone, and this start cannot run it"
                    f" ({part.program_obstacle or self._accepted_programs(part.snapshot).obstacle or 'none for this platform'})"
                )
            outcome.arena.seal()
            return (self._loader.call(self._definition.load[part.name], part),)
        if skeleton is None and build is not None:
            skeleton = self._loader.build(build, part)
        outcome.arena.seal()
        return (self._bound(outcome, skeleton, build is not None),)

    def _bound(self, restored: Restored, skeleton: Any, built: bool) -> Any:  # noqa: FBT001
        """The state with the restored arrays in it: bound to a skeleton, or a tree made from nothing."""
        if built:
            bound = bind_arrays(restored, subject(self._definition, skeleton), besides=_pool_paths(restored))
            return bound if self._definition.owner is None else skeleton
        if restored.manifest.tree is None:
            raise StateMismatchError("the snapshot holds arrays for a build() that the handler no longer has")
        held = {
            path: self._pools.recorded(array, restored.manifest)
            for array in restored.manifest.pool_arrays
            for path in array.paths
        }
        tree = rebuild_tree(restored, held)
        if self._definition.owner is None:
            return tree
        instance: Any = object.__new__(self._definition.owner)
        vars(instance).update(tree)
        return instance

    def _use_files(self, part: Part, restored: Restored) -> None:
        manifest = restored.manifest
        if not caches.own_files(manifest):
            return
        with self._timeline.span("place files"):
            folder = caches.place_files(manifest, restored.arena, self._files_folder)
        late = caches.point_to(folder, manifest)
        if late:
            self._services.bus.publish(events.StoreDegraded(part.snapshot, late))
        part.files = [
            caches.FileSource(entry.root, entry.name, str(folder / entry.root / entry.name))
            for entry in caches.own_files(manifest)
        ]
        part.context.use_restored(
            folder, tuple(entry.name for entry in caches.own_files(manifest) if entry.root == caches.KEPT)
        )

    @property
    def _files_folder(self) -> Path:
        return Path(self._services.settings.files_folder)


def _pool_paths(restored: Restored) -> tuple[str, ...]:
    """Where the state holds memory of pools: what ``build`` made there stays, since no snapshot has it."""
    return tuple(path for array in restored.manifest.pool_arrays for path in array.paths)


def pass_over(part: Part, reason: str, bus: events.EventBus) -> None:
    """The start goes on without the generation's program."""
    part.program_obstacle = reason
    bus.publish(events.ProgramPassedOver(part.snapshot, reason))
