"""Making new generations, off the request path: when each is tried, and what becomes of one that fails.

First what is due at once, then what the handler's policy asks for. Any failure ends here as an event and a reason; it never
reaches a request. Who does not get the snapshot's lease leaves the capture to who has it, and asks again in a while, as long
as the snapshot is missing. How a generation is made: ``coldstart.generation_making``.

A restored worker that is to make none does not import this module, nor what it stands on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from coldstart import events
from coldstart.definition import Policy
from coldstart.due import Due
from coldstart.errors import ColdstartError
from coldstart.generation_making import GenerationMaking
from coldstart.generation_plan import Outcome, Plan
from coldstart.leases import Held
from coldstart.save import IN_THREAD
from coldstart.save.priority import lower_priority

if TYPE_CHECKING:
    from coldstart.capture import Encoding
    from coldstart.metrics import Transfers
    from coldstart.repository import Repository
    from coldstart.save import Saving

_REAP_SECONDS = 0.5
"""How long ending a saver process may take when its time is over."""

POLL_SECONDS = 0.5
"""How often a policy's conditions are looked at."""

_Make = Callable[[Plan, float], Outcome | Held]
"""Carries a plan out, begun at a moment of the monotonic clock."""


class Resnapshot:
    """Makes the planned generations, one after another, in a thread of its own, then what the handler's policy asks for."""

    def __init__(
        self,
        plans: list[Plan],
        open_repository: Callable[[], Repository],
        *,
        encoding: Encoding,
        idle: Callable[[float], None],
        idle_seconds: float,
        policy: Policy,
        served: Callable[[], int],
        saves: Transfers,
        bus: events.EventBus,
        saving: Callable[[], Saving] = lambda: IN_THREAD,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._making = GenerationMaking(
            open_repository,
            encoding=encoding,
            idle=idle,
            idle_seconds=idle_seconds,
            saves=saves,
            bus=bus,
            saving=saving,
        )
        self._plans = plans
        self._policy = policy
        self._served = served
        self._bus = bus
        self._first_done = threading.Event()
        self._postponed: list[tuple[float, Plan, _Make]] = []
        """Plans that another worker is at, each with the moment when to ask again."""
        self._thread = threading.Thread(target=self._run, name="coldstart-capture", daemon=True)
        self._thread.start()

    def wait_first(self, seconds: float) -> bool:
        """Wait until what was due at once is done, or ``seconds`` have passed; True if it is done.

        Whoever waits has nothing else to do, so those who do it for this worker need not stand back any longer.
        """
        if seconds > 0:
            self._making.hurry()
        return self._first_done.wait(seconds)

    def stop(self, seconds: float) -> None:
        """Begin no further chunk, end the proof, and give the puts under way ``seconds`` to finish."""
        self._making.stop(seconds)
        self._thread.join(seconds + _REAP_SECONDS)

    def _run(self) -> None:
        lower_priority()
        try:
            for plan in self._plans:
                if plan.due_at_once:
                    self._attempt(plan, self._making.of_state)
                if plan.program is not None and not self._making.stopping.is_set():
                    self._attempt(plan, self._making.with_program)
                if plan.adds_kernels and not self._making.stopping.is_set():
                    self._attempt(plan, self._making.with_kernels)
        finally:  # whatever happens, nobody waits for what will not come
            self._first_done.set()
        due = [Due(plan, self._policy, self._served()) for plan in self._plans]
        while (self._policy != Policy() or self._postponed) and not self._making.stopping.wait(POLL_SECONDS):
            self._attempt_postponed()
            for condition in due:
                served = self._served()  # what is served during the capture counts for the next
                if condition.is_met(served):
                    self._attempt(condition.plan, self._making.of_state)
                    condition.restart(served)

    def _attempt_postponed(self) -> None:
        now = time.monotonic()
        due = [each for each in self._postponed if each[0] <= now]
        self._postponed = [each for each in self._postponed if each[0] > now]
        for _, plan, make in due:
            self._attempt(plan, make)

    def _attempt(self, plan: Plan, make: _Make) -> None:
        try:
            made = make(plan, time.monotonic())
            outcome = self._postpone(plan, made, make) if isinstance(made, Held) else made
        except Exception as error:  # noqa: BLE001  an edge of the process: a failing capture must not take the worker along
            self._bus.publish(events.CaptureFailed(plan.capture.name, events.error_text(error)))
            reason = str(error) if isinstance(error, ColdstartError) else events.error_text(error)
            outcome = Outcome.none(reason, self._making.engine)
            if plan.program is not None and self._is_for_program(make):
                outcome = outcome._replace(program=plan.program.backend)
        finally:
            self._making.end()
        self.outcomes.append(outcome)

    def _postpone(self, plan: Plan, held: Held, make: _Make) -> Outcome:
        """Leave a capture to who has the lease. What a policy asks for is not asked for again."""
        if plan.due_at_once or self._is_for_program(make):
            self._postponed.append((time.monotonic() + held.retry_seconds(), plan, make))
        return self._making.skip(plan, f"{held.owner} captures this snapshot")

    def _is_for_program(self, make: _Make) -> bool:
        return make == self._making.with_program
