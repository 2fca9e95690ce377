"""What a ready worker does beside answering: log lines, its start record, and new generations of its snapshots."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from coldstart import events
from coldstart.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coldstart.config import Settings
    from coldstart.definition import Policy
    from coldstart.generation_plan import Outcome, Plan
    from coldstart.metrics import Transfers
    from coldstart.parts import Parts
    from coldstart.resnapshot import Resnapshot

SINK_QUIET_SECONDS = 1.0
"""How long a ready worker waits for its first answer before log lines are written after all (importing structlog takes time)."""
STOP_SECONDS = 2.0


class AfterReady:
    """One worker's work off the request path, in threads of its own. ``stopping``: no capture is begun once it is set."""

    def __init__(
        self,
        parts: Parts,
        plans: list[Plan],
        *,
        settings: Settings,
        policy: Policy,
        answered: threading.Event,
        stopping: threading.Event,
        idle: Callable[[float], None],
        served: Callable[[], int],
        saves: Transfers,
    ) -> None:
        self._parts = parts
        self._plans = plans
        self._settings = settings
        self._policy = policy
        self._answered = answered
        self._stopping = stopping
        self._idle = idle
        self._served = served
        self._saves = saves
        self._resnapshot: Resnapshot | None = None
        self._settled = threading.Event()
        """Whether it is known if a generation will be made."""
        self._thread: threading.Thread | None = None

    def begin(self, record: Mapping[str, Any]) -> None:
        """Begin, with the record of the start as it is now."""
        thread = threading.Thread(target=self._run, args=(record,), name="coldstart-after", daemon=True)
        thread.start()
        self._thread = thread  # only now: a worker that is being closed meanwhile could not join it before

    def _run(self, record: Mapping[str, Any]) -> None:
        """What must not delay the first answer."""
        self._answered.wait(SINK_QUIET_SECONDS)
        from coldstart.sinks import attach_once

        try:
            attach_once(self._settings)
            self._parts.write_record(record)
            if self._plans and not self._stopping.is_set():
                self._resnapshot = self._make_snapshots()
        finally:
            self._settled.set()
        from coldstart.save.priority import lower_priority

        lower_priority()
        if not self._parts.is_proof:  # a proof does so itself once it has answered
            self.keep_segments()

    def keep_segments(self) -> None:
        """Write flat files of what was fetched, between events."""
        with suppress(StoreError):  # the store cannot even be opened any more: then there is no place for flat files
            self._parts.keep_segments(pace=lambda: self._idle(0.0), stop=self._stopping)

    def _make_snapshots(self) -> Resnapshot:
        from coldstart.resnapshot import Resnapshot

        return Resnapshot(
            self._plans,
            self._parts.open_repository,
            encoding=self._parts.encoding,
            idle=self._idle,
            idle_seconds=self._settings.capture_idle_seconds,
            policy=self._policy,
            served=self._served,
            saves=self._saves,
            bus=events.bus,
            saving=lambda: self._parts.saving,
        )

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Store a further record, best effort, in the background."""
        threading.Thread(target=self._parts.write_record, args=(record,), name="coldstart-record", daemon=True).start()

    def outcomes(self, seconds: float) -> list[Outcome]:
        """Wait up to ``seconds`` for the generations that are being made, and return what became of them."""
        deadline = time.monotonic() + seconds
        if not self._plans or self._thread is None or not self._settled.wait(seconds) or self._resnapshot is None:
            return []
        self._resnapshot.wait_first(max(0.0, deadline - time.monotonic()))
        return list(self._resnapshot.outcomes)

    @property
    def is_capturing(self) -> bool:
        """Whether a generation that was due at once is still being made."""
        return self._resnapshot is not None and not self._resnapshot.wait_first(0)

    def stop(self) -> None:
        """End the capture under way: what it has stored is found by the next."""
        if self._resnapshot is not None:
            self._resnapshot.stop(STOP_SECONDS)

    def join(self) -> None:
        """Give log lines and the record, which are worth that, a moment."""
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
