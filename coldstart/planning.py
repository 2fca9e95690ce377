"""Which generations a worker is to make, and of what: decided once, when it is ready, from what its start was like."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from coldstart import caches, events
from coldstart.definition import Policy
from coldstart.errors import ColdstartError
from coldstart.frameworks import survey
from coldstart.generation_plan import Plan, ProgramWish
from coldstart.part_loading import subject
from coldstart.program_start import is_below, owners, stands_alone
from coldstart.programs import default_backend
from coldstart.programs.record import options_digest
from coldstart.terms import VERSION

if TYPE_CHECKING:
    from coldstart.definition import Definition
    from coldstart.errand import Origin
    from coldstart.part import Part
    from coldstart.parts import Parts
    from coldstart.warmup import WarmupReport


def plan_captures(
    parts: Parts, definition: Definition, report: WarmupReport, bus: events.EventBus
) -> tuple[list[Plan], str]:
    """What to capture after a start, and "" or why some part is not: whatever goes wrong here, the worker serves."""
    planner = Planner(parts, definition, bus)
    touched = caches.recorder.end()  # whatever is planned: until then every file that this process opens is looked at
    if definition.warmup.inputs and not report.digests:
        planner.skip("the warm-up was switched off, so a new generation could not be proven")
        return [], planner.no_capture_reason
    try:
        plans = planner.plans(report, touched)
    except Exception as error:  # noqa: BLE001  the start's edge: a snapshot is an optimisation
        planner.skip(events.error_text(error))
        return [], planner.no_capture_reason
    return plans, planner.no_capture_reason


class Planner:
    """Plans the generations of one start's parts. ``no_capture_reason``: why a part gets none, "" if all do."""

    def __init__(self, parts: Parts, definition: Definition, bus: events.EventBus) -> None:
        self.no_capture_reason = parts.no_capture_reason
        self._parts = parts
        self._definition = definition
        self._bus = bus

    def plans(self, report: WarmupReport, touched: set[str]) -> list[Plan]:
        """The generations that this worker is to make.

        Of parts that were not restored, by the handler's policy, and with a program that this platform lacks.
        ``touched``: files below the caches that were opened since the first ``load`` began.
        """
        return [plan for part in self._parts.parts if (plan := self._capture_plan(part, report, touched)) is not None]

    def _capture_plan(self, part: Part, report: WarmupReport, touched: set[str]) -> Plan | None:
        policy = self._definition.policy
        digests = report.digests[0] if report.digests else ()
        wish = self._program_wish(part, report) if self._parts.wants_program(part) else None
        lacks_kernels = self._lacks_kernels(part)
        if part.kind == "restored" and policy == Policy() and not _recovered(part) and wish is None:
            return self._plan(part, (), digests)._replace(adds_kernels=True) if lacks_kernels else None
        if not self._parts.wants_capture(part):
            self._no_capture(part, self._parts.why_no_capture(part))
            return None
        if part.kind == "restored":
            plan = self._further_plan(part, digests, wish)
            return plan and plan._replace(adds_kernels=lacks_kernels and not plan.due_at_once)
        files = self._files_for(part, touched)
        has_something = part.survey is not None or bool(files)
        if not has_something and wish is None:
            self._no_capture(part, f"{part.obstacle}; load used no hub cache either, so there is nothing to store")
            return None
        plan = self._plan(part, tuple(files), digests)._replace(program=wish)
        return plan if has_something else plan._replace(due_at_once=False)

    def _lacks_kernels(self, part: Part) -> bool:
        """Whether this restored start has compiled what the snapshot could hold for the next one."""
        return (
            part is self._parts.parts[0]
            and part.kind == "restored"
            and part.program is None
            and self._parts.kernels.lacking > 0
            and self._parts.wants_capture(part)
        )

    def _program_wish(self, part: Part, report: WarmupReport) -> ProgramWish | None:
        """The program to be made for this platform; None, with the reason published, where nothing shows how it is called."""
        definition, export = self._definition, self._definition.program
        assert export is not None
        if not definition.warmup.inputs and not export.example:
            part.program_obstacle = (
                "no warmup= shows how the entry points are called: give warmup= or export(example=...)"
            )
            self._bus.publish(events.ProgramPassedOver(part.snapshot, f"no program is made: {part.program_obstacle}"))
            return None
        outside = None
        if definition.build and not stands_alone(definition):
            outside = partial(_is_outside, owners(definition, part.state))
        backend = export.backend or default_backend(self._parts.device.type)
        return ProgramWish(
            backend,
            options_digest(export),
            partial(self._parts.accepted_programs, part.snapshot, backend),
            self._parts.is_fresh,
            report.answers,
            dict(export.tolerance),
            outside,
            part.unfit_program_generation,
        )

    def _further_plan(self, part: Part, digests: tuple[str, ...], wish: ProgramWish | None) -> Plan | None:
        """A further generation of a restored state. What it holds is surveyed anew; rung *files* stays as it is."""
        assert part.restored is not None
        if part.program is not None:
            self._no_capture(part, "this start runs a program and has no state that could be captured")
            return None
        if part.restored.manifest.rung == "arrays" and part.survey is None:
            try:
                found = survey(subject(self._definition, part.state), gpu=self._parts.device.ordinal)
                part.survey, part.pool_paths = self._parts.pools.without(found)
            except ColdstartError as error:
                self._no_capture(part, str(error))
                return None
            from coldstart.marks import marks_of

            part.marks = marks_of(part.survey)
        return self._plan(part, tuple(part.files), digests)._replace(program=wish)

    def _plan(self, part: Part, files: tuple[caches.FileSource, ...], digests: tuple[str, ...]) -> Plan:
        from coldstart.capture import Capture

        assert part.key is not None
        assert part.lookup is not None
        pools, pool_arrays = self._parts.pools.listed(part.pool_paths)
        capture = Capture(
            name=part.snapshot,
            key=part.key,
            survey=part.survey,
            files=files,
            device_type=self._parts.device.type,
            parent=None,
            parent_key="",
            generation=0,
            kinds=self._definition.kinds,
            warmup_digests=digests,
            provenance=versions(),
            mends=part.lookup.ref is not None and (_unusable(part) or _recovered(part)),
            pools=pools,
            pool_arrays=pool_arrays,
        )
        created = part.restored.manifest.created_seconds if part.kind == "restored" and part.restored else 0.0
        due_at_once = part.kind != "restored" or _recovered(part)
        plan = Plan(capture, part.lookup, part.marks, _origin(self._definition), due_at_once, created)
        return plan._replace(kernels=self._parts.kernels_of(part))

    def _files_for(self, part: Part, touched: set[str]) -> list[caches.FileSource]:
        """Kept files and those of hub caches; beside captured arrays without the files that held them."""
        hub = caches.used_files(touched, caches.cache_roots())
        if part.survey is not None:
            hub = [file for file in hub if Path(file.name).suffix not in caches.WEIGHT_SUFFIXES]
        files = hub + part.context.kept
        if files:
            total_bytes = sum(Path(file.path).stat().st_size for file in files)
            self._bus.publish(events.FilesKept(part.snapshot, len(files), total_bytes))
        return files

    def skip(self, reason: str) -> None:
        """No part gets a generation, for ``reason``; parts that want none anyway keep theirs."""
        if self.no_capture_reason or not any(map(self._parts.wants_capture, self._parts.parts)):
            return
        self.no_capture_reason = reason
        self._bus.publish(events.CaptureSkipped(self._definition.name, reason))

    def _no_capture(self, part: Part, reason: str) -> None:
        self.no_capture_reason = reason
        self._bus.publish(events.CaptureSkipped(part.snapshot, reason))


def _is_outside(above: tuple[str, ...], path: str) -> bool:
    return not any(is_below(path, owner) for owner in above)


def _unusable(part: Part) -> bool:
    """Whether what the store holds for the part's key could not be read."""
    return part.kind == "fallback" and part.restored is None


def _recovered(part: Part) -> bool:
    """Whether the current generation was bad and the one before it served: a new one is due at once."""
    return part.restored is not None and part.restored.recovered_by == "previous_generation"


def _origin(definition: Definition) -> Origin:
    """Where another process finds the handler: the file of its module, and the module's name even if it runs as ``-m``."""
    from coldstart.errand import Origin

    defined = definition.owner or definition.function
    spec = getattr(sys.modules.get(defined.__module__), "__spec__", None)
    return Origin(os.path.abspath(definition.file), spec.name if spec else defined.__module__, definition.name)


def versions() -> dict[str, str]:
    """Versions of what took part in this start, for the manifest and the record."""
    found = {"coldstart": VERSION, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("numpy", "torch", "transformers", "onnxruntime"):
        version = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(version, str):
            found[name] = version
    return found
