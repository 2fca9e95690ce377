"""Giving way to those who serve: a process that works while nobody else wants to, a thread that lets others go first."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

NICENESS = 19
_NICENESS_OF_THREADS = 10
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


def hurry(group: int) -> None:
    """Let a process group that gave way have its share of the processors again: somebody does nothing but wait for it.

    Best effort; as nice as it was it stays, for only root may change that.
    """
    if getattr(os, "SCHED_IDLE", None) is None:
        return
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # gone since, or another user's
            if os.getpgid(int(pid)) != group:
                continue
            for thread in os.listdir(f"/proc/{pid}/task"):
                if os.sched_getscheduler(int(thread)) == os.SCHED_IDLE:
                    os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))


def lower_priority() -> None:
    """Let this thread wait for those that serve, more than it does already (Linux: a thread has a priority of its own)."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = max(_NICENESS_OF_THREADS, os.getpriority(os.PRIO_PROCESS, thread))
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
