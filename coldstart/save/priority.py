"""The lowest priority that a process can have: it works while nobody else wants to."""

from __future__ import annotations

import os
from contextlib import suppress

NICENESS = 19
_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """Let the kernel wake this process, if it is stopped, when the thread that started it ends; then be as nice as can be.

    Awake it notices by itself that it is alone. The niceness tells that parent: from now on this process may be stopped.
    """
    import ctypes
    import signal

    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0) == 0:
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


def follows_parent(pid: int) -> bool:
    """Whether a child has come so far. Raises ProcessLookupError."""
    return os.getpriority(os.PRIO_PROCESS, pid) == NICENESS


def give_way(pid: int = 0) -> None:
    """Let a process (0: this one; threads that it starts later follow it) run only where a processor is idle.

    Linux has a scheduling policy for that, which gives up a processor at once when another process wants it; a nice one
    may finish its turn. Best effort: where neither is allowed the process stays as it is.
    """
    policy = getattr(os, "SCHED_IDLE", None)
    try:
        if policy is not None:
            os.sched_setscheduler(pid, policy, os.sched_param(0))
            return
    except OSError:
        pass
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
