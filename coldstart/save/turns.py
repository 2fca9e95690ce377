"""Letting a process work only between events: priority alone does not spare those who share its core or its memory's bandwidth.

The process is stopped while an event is served, and goes on when none is, or after a while all the same, for a moment.
A stopped process does not notice that its parent is gone, so turns begin once the kernel will wake it then.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from coldstart.save.priority import follows_parent

if TYPE_CHECKING:
    from collections.abc import Callable

TURN_SECONDS = 0.003
"""How long the process works before it is looked whether an event has come."""


class Turns:
    """One process group's turns, from now until ``end``. ``idle(0.0)`` returns when it may go on."""

    def __init__(self, group: int, idle: Callable[[float], None]) -> None:
        self._group = group
        self._idle = idle
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="coldstart-turns", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Let it work on. To be called before its end is waited for: the number of a process that is gone may be another's."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            while not self._over.wait(TURN_SECONDS):
                if not follows_parent(self._group):
                    continue
                os.killpg(self._group, signal.SIGSTOP)
                try:
                    self._idle(0.0)
                finally:
                    os.killpg(self._group, signal.SIGCONT)
