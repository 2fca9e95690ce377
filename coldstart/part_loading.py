"""Loading a part: running the user's ``load`` and ``build``, and looking through what they made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coldstart import caches, events
from coldstart.definition import accepts
from coldstart.errors import UncapturableError
from coldstart.frameworks import survey

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.context import Context
    from coldstart.definition import Definition
    from coldstart.loops import Loops
    from coldstart.metrics import Timeline
    from coldstart.part import Part
    from coldstart.pools import Pools


class Loader:
    """Loads the parts of one handler. ``make_context``: a context as ``load`` expects it, without restored files.

    ``gpu``: the number of the GPU that the state may be on, -1 for none.
    """

    def __init__(
        self,
        definition: Definition,
        timeline: Timeline,
        loops: Loops,
        make_context: Callable[[], Context],
        pools: Pools,
        *,
        gpu: int,
    ) -> None:
        self._definition = definition
        self._timeline = timeline
        self._loops = loops
        self._make_context = make_context
        self._pools = pools
        self._gpu = gpu
        self._records_opens = False

    def load(self, part: Part, *, wants_capture: bool) -> Any:
        """Run the user's ``load``, note which cache files it used and what its arrays look like before anyone changes them."""
        self._let_go_of_files(part)
        part.context.kind = part.kind
        if wants_capture and not self._records_opens:
            self._records_opens = True
            caches.recorder.begin(caches.cache_roots().values())
        with self._timeline.span("load"):
            state = self.call(self._definition.load[part.name], part)
        if wants_capture:
            self.survey(part, state)
        return state

    def _let_go_of_files(self, part: Part) -> None:
        """Before ``load`` runs for real: hubs go online again and ``ctx.keep`` no longer finds restored copies.

        Hubs may have been pointed at files that then could not be fetched, or turned out to be of another key.
        """
        caches.point_back()
        if part.restored is not None:
            part.files = []
            part.context = self._make_context()

    def survey(self, part: Part, state: Any) -> None:
        """Look through a state for a capture; where it cannot be captured, the part's ``obstacle`` says why."""
        with self._timeline.span("survey"):
            try:
                found = survey(subject(self._definition, state), gpu=self._gpu)
                found, part.pool_paths = self._pools.without(found)
            except UncapturableError as error:
                part.obstacle = str(error)
                return
            except Exception as error:  # noqa: BLE001  the user's objects: whatever they do when looked at, the start goes on
                part.obstacle = f"the state cannot be looked through: {events.error_text(error)}"
                return
            if found.tree is None and part.name not in self._definition.build:
                part.obstacle = f"{found.tree_obstacle}; give build= to put its arrays into the snapshot"
                return
            from coldstart.marks import marks_of  # 4 ms, with what it stands on, that a restored start saves

            part.survey = found
            part.marks = marks_of(found)

    def call(self, hook: Callable[..., Any], part: Part) -> Any:
        """Call ``load`` or ``build``; in class form the state is a fresh instance that the method fills."""
        owner = self._definition.owner
        if owner is None:
            return self._loops.finish(hook(part.context) if accepts(hook, 1) else hook())
        instance: Any = object.__new__(owner)
        self._loops.finish(hook(instance, part.context) if accepts(hook, 2) else hook(instance))
        return instance

    def build(self, build: Callable[..., Any], part: Part) -> Any:
        """Call ``build`` for the objects that arrays are bound to."""
        with self._timeline.span("build"):
            return self.call(build, part)


def subject(definition: Definition, state: Any) -> Any:
    """What is surveyed and bound: in class form what the methods set on ``self``."""
    return vars(state) if definition.owner is not None else state
