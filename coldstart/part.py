"""One part of a handler's state in one start: what is known of it, as the start goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coldstart.events import FellBack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coldstart.caches import FileSource
    from coldstart.context import Context
    from coldstart.events import EventBus
    from coldstart.frameworks import Survey
    from coldstart.manifest import KeyRecord
    from coldstart.programs.record import Program
    from coldstart.repository import Lookup
    from coldstart.restore import Restoration, Restored


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
        self.program: Program | None = None
        """The program that this start runs, if it has one."""
        self.program_obstacle = ""
        """Why it has none, where the handler asks for one."""
        self.unfit_program_generation = 0
        """The generation whose program failed the warm-up of this start, 0 for none."""
        self.lookup: Lookup | None = None
        self.state: Any = None
        self.survey: Survey | None = None
        self.obstacle = ""
        self.pool_paths: Mapping[str, str] = {}
        """Where the state holds memory of pools, as the survey found them: path -> the pool's name."""
        self.marks: dict[str, Any] = {}
        self.files: list[FileSource] = []

    def fall_back(self, reason: str, bus: EventBus) -> None:
        """What the store holds for this part cannot be used: ``load`` is to answer that, and everybody is told why."""
        self.kind, self.reason = "fallback", reason
        bus.publish(FellBack(self.snapshot, "restore", reason))
