"""One trial: a fresh interpreter answers one event, and the parent's clock says how long that took from the spawn."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import config
from coldstart.errors import CaptureError, StartError
from coldstart.kernel_caches.kinds import KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.bench.target import Target

ORDINARY, NAIVE, FIRST, RESTORED, PROGRAM = "ordinary", "naive", "first", "restored", "program"
SCENARIOS: Mapping[str, str] = {
    ORDINARY: "a plain script that imports and loads everything, without coldstart",
    NAIVE: "the handler under coldstart without a store: load runs at every start",
    FIRST: "the handler with an empty store: load runs, a snapshot is made after the answer",
    RESTORED: "the handler with the store that `first` of the same round has filled; its state is restored, not its program",
    PROGRAM: "the same store, and the snapshot's program in place of the state",
}
"""Scenario -> what it is, in the order in which a round runs them."""

WARM_REPEATS = 20
TIMEOUT_SECONDS = 1800.0
_STDERR_SHOWN = 4000
_PLAIN = Path(__file__).with_name("plain.py")


class Trial(NamedTuple):
    """What one process did. Seconds count from just before it was spawned, except ``start``, which has its own zero."""

    scenario: str
    round: int
    first_response_seconds: float
    process_seconds: float
    warm_seconds: tuple[float, ...]
    output: Any
    answers_equal: bool
    start: Mapping[str, Any]
    """The start record: kind, phases, spans, bytes. Of the ordinary way only the spans."""
    captures: tuple[Mapping[str, Any], ...]
    """How the captures of ``first`` went, that of the state and that of its program; empty in other scenarios."""


def command_of(target: Target, scenario: str) -> list[str]:
    """The command line of one trial."""
    event_input = json.dumps(target.input)
    if scenario == ORDINARY:
        function = target.name or "handler"
        return [sys.executable, str(_PLAIN), str(target.ordinary), function, event_input, str(WARM_REPEATS)]
    run = [sys.executable, "-m", "coldstart", "run", target.reference]
    return [*run, "--input", event_input, "--json", "--repeat", str(WARM_REPEATS)]


def environment_of(scenario: str, folder: Path) -> dict[str, str]:
    """The environment of one trial, with store and restored files below ``folder``, which is this round's own."""
    store = "off" if scenario in (ORDINARY, NAIVE) else f"file://{folder / 'store'}"
    files = str(folder / f"files-{scenario}")
    variables: dict[str, str | None] = {"COLDSTART_STORE": store, "COLDSTART_FILES_FOLDER": files}
    variables["COLDSTART_STORE_REPLICAS"] = None
    if scenario == FIRST:
        variables["COLDSTART_CAPTURE_WAIT_SECONDS"] = str(TIMEOUT_SECONDS)  # a program takes minutes to make
    if scenario == RESTORED:
        variables["COLDSTART_PROGRAMS"] = "off"
    if scenario in (ORDINARY, NAIVE):  # on a fresh machine nothing is compiled yet
        variables |= {kind.variable: str(folder / f"kernels-{scenario}" / kind.name) for kind in KINDS}
    return config.child_environment(variables)


def run_trial(target: Target, scenario: str, number: int, folder: Path) -> Trial:
    """Run one process to its end, in round ``number`` with ``folder`` as the round's own.

    Raises StartError when the process fails, says something else than it should, or (``restored``) did not start from
    the snapshot; CaptureError when ``first`` published none.
    """
    spawned_seconds = time.monotonic()
    text = run_child(command_of(target, scenario), scenario=scenario, environment=environment_of(scenario, folder))
    process_seconds = time.monotonic() - spawned_seconds
    trial = read_trial(
        read_document(text, scenario),
        scenario,
        number,
        spawned_seconds=spawned_seconds,
        process_seconds=process_seconds,
    )
    check_trial(trial)
    return trial


def run_child(
    command: Sequence[str], *, scenario: str, environment: Mapping[str, str], timeout_seconds: float = TIMEOUT_SECONDS
) -> str:
    """What a process wrote to standard output. Raises StartError, with the end of its standard error, when it fails."""
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise StartError(f"scenario {scenario} was not done after {timeout_seconds:.0f} s and was ended") from error
    if done.returncode != 0:
        words = done.stderr[-_STDERR_SHOWN:]
        raise StartError(f"scenario {scenario} ended with status {done.returncode}; its last words were:\n{words}")
    return done.stdout


def read_document(text: str, scenario: str) -> Mapping[str, Any]:
    """The one JSON object that ends ``text``; what a handler printed before it is passed over. Raises StartError."""
    begin = 0 if text.startswith("{") else text.find("\n{") + 1
    while begin >= 0 and text[begin : begin + 1] == "{":
        try:
            return dict(json.loads(text[begin:]))
        except ValueError:
            begin = text.find("\n{", begin) + 1 or -1
    raise StartError(f"scenario {scenario} printed no JSON document but {text[-200:]!r}")


def read_trial(
    document: Mapping[str, Any], scenario: str, number: int, *, spawned_seconds: float, process_seconds: float
) -> Trial:
    """The trial that a child's document describes. Raises StartError for a document that lacks what is needed."""
    try:
        answered_seconds = float(document["first_answer_monotonic_seconds"])
        warm_seconds = tuple(float(seconds) for seconds in document["warm_seconds"])
        output, equal = document["output"], bool(document["answers_equal"])
        start = _spans_of_plain(document, spawned_seconds) if scenario == ORDINARY else _with_edges(document)
        captures = tuple(map(dict, document["captures"])) if scenario == FIRST else ()
    except (KeyError, TypeError, ValueError) as error:
        raise StartError(f"scenario {scenario} printed a document that cannot be read: {error!r}") from error
    first_response_seconds = answered_seconds - spawned_seconds
    return Trial(
        scenario, number, first_response_seconds, process_seconds, warm_seconds, output, equal, start, captures
    )


def check_trial(trial: Trial) -> None:
    """A number under the wrong heading is worse than none: see to it that the scenario is what took place."""
    kind, reason = trial.start.get("kind"), trial.start.get("reason") or "no reason was recorded"
    if trial.scenario in (RESTORED, PROGRAM) and kind != "restored":
        raise StartError(f"scenario {trial.scenario} went as a {kind} start ({reason}): there is nothing to measure")
    if trial.scenario == PROGRAM and not trial.start.get("program"):
        obstacle = trial.start.get("program_obstacle") or "no reason was recorded"
        raise StartError(f"scenario program ran without one ({obstacle}): there is nothing to measure")
    if trial.scenario == FIRST:
        for capture in trial.captures:
            if not capture.get("published"):
                why = capture.get("reason") or "no reason was recorded"
                what = "program" if capture.get("program") else "snapshot"
                raise CaptureError(f"scenario first published no {what} ({why}): there is nothing to restore")


def _with_edges(document: Mapping[str, Any]) -> dict[str, Any]:
    """The start record, with what lies before its first span (the interpreter, the command) and after ready."""
    start = dict(document["start"])
    spans, ready = list(start.get("spans") or ()), start.get("ready_seconds")
    if spans:
        spans.append(_span("interpreter and command", 0.0, min(float(span["began_seconds"]) for span in spans)))
    if ready is not None and "first_answer_seconds" in document:
        spans.append(_span("first answer", float(ready), float(document["first_answer_seconds"])))
    return {**start, "spans": spans}


def _spans_of_plain(document: Mapping[str, Any], spawned_seconds: float) -> dict[str, Any]:
    ends = [float(document[f"{what}_monotonic_seconds"]) for what in ("began", "imported", "first_answer")]
    interpreter, imported, answered = (end - spawned_seconds for end in ends)
    return {
        "spans": [
            _span("interpreter", 0.0, interpreter),
            _span("import and load", interpreter, imported),
            _span("first answer", imported, answered),
        ]
    }


def _span(name: str, began_seconds: float, ended_seconds: float) -> dict[str, Any]:
    return {"name": name, "track": "main", "began_seconds": began_seconds, "ended_seconds": ended_seconds}
