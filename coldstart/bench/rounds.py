"""Runs the trials of a benchmark: scenario after scenario, round after round, never two processes at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from coldstart.bench.trial import FIRST, ORDINARY, PROGRAM, RESTORED, SCENARIOS, Trial, run_trial

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.bench.target import Target


def scenarios_of(target: Target) -> tuple[str, ...]:
    """The scenarios that can be measured, in their order: the ordinary one needs a companion, the program one a program."""
    left_out = {ORDINARY} if target.ordinary is None else set()
    if not target.has_program:
        left_out.add(PROGRAM)
    return tuple(name for name in SCENARIOS if name not in left_out)


def run_rounds(target: Target, *, trials: int, say: Callable[[str], None]) -> tuple[Trial, ...]:
    """Run ``trials`` rounds of every scenario, and before them round 0, which only warms the machine's disk caches.

    Scenarios alternate, so that a slow minute of the machine hits all of them. Each round has a store of its own:
    ``first`` finds it empty, ``restored`` finds what ``first`` has left. Round 0 is in the result too. ``say`` gets a
    line of progress after every process. Raises StartError and CaptureError from the trials.
    """
    done: list[Trial] = []
    for number in range(trials + 1):
        with tempfile.TemporaryDirectory(prefix="coldstart-bench-") as folder:
            for scenario in scenarios_of(target):
                if scenario == RESTORED and _has_program_alone(done):
                    continue
                trial = run_trial(target, scenario, number, Path(folder))
                done.append(trial)
                say(f"{_heading(number, trials)}  {scenario:9} {trial.first_response_seconds:8.3f} s")
    return tuple(done)


def _has_program_alone(done: list[Trial]) -> bool:
    """Whether ``first`` could store nothing of the state but its program: then there is no state to restore."""
    captures = next(trial.captures for trial in reversed(done) if trial.scenario == FIRST)
    return bool(captures) and all(capture.get("program") for capture in captures)


def _heading(number: int, trials: int) -> str:
    return f"round {number}/{trials}" if number else "warm-up  "
