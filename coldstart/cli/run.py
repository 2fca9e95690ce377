"""``coldstart run FILE[:NAME] --input JSON``: one start, one event, and the timeline on the screen.

The order matters: the restore begins from the file's source, then the file is imported in its shadow.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import EventError, UsageError

if TYPE_CHECKING:
    import argparse

    from coldstart.generation_plan import Outcome
    from coldstart.imports.watch import ImportWatch
    from coldstart.worker import Worker


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("run", help="one start, one event, the timeline on the screen")
    parser.add_argument("target", metavar="FILE[:NAME]", help="the handler's file, and its name if there are several")
    parser.add_argument("--input", metavar="JSON", help="the event's input (default: the first warm-up input)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.add_argument("--fresh", action="store_true", help="ignore snapshots, run load and make a new snapshot")
    parser.add_argument("--repeat", type=int, default=0, metavar="N", help="answer the event N more times, warm")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for a snapshot that is being made")
    parser.add_argument("--timeline", action="store_true", help="say where the time went: phases, imports by package")
    parser.add_argument("--trace", metavar="FILE", help="write the start as Chrome trace events, for ui.perfetto.dev")
    parser.set_defaults(run=run, watch=None)


def run(options: argparse.Namespace) -> int:
    """Start the handler, answer one event, report."""
    from coldstart.config import read_variable, set_variables

    if options.trace is not None:
        from coldstart.cli.trace import check_writable

        check_writable(options.trace)
    if options.fresh:
        set_variables({"COLDSTART_FRESH": "on"})
    if read_variable("COLDSTART_LOG") is None:
        set_variables({"COLDSTART_LOG": "off"})  # the report at the end says it all
    worker, answers = _start_and_answer(options)
    document = _document(worker, answers)
    if options.watch is not None:
        document["imports"] = _imports(worker, answers, options.watch)
    if options.trace is not None:
        from coldstart.cli.trace import write_trace

        write_trace(options.trace, document)
    if options.json:
        print(json.dumps(document, default=_as_json))
    else:
        from coldstart.cli.timeline import report

        print(report(document), file=sys.stderr)
        if options.timeline:
            from coldstart.cli.import_table import tables

            print(f"\n{tables(document)}", file=sys.stderr)
    return 0


_UNFINISHED = (
    "the wait for it was over; what is stored already is not written again, and COLDSTART_CAPTURE_WAIT_SECONDS sets"
    " how long the end waits"
)


class _Answers(NamedTuple):
    """The answers to the event: the first and when it was there, how long the others took, whether they were equal."""

    first: Any
    first_monotonic_seconds: float
    warm_seconds: list[float]
    equal: bool
    outcomes: list[Outcome]
    is_capturing: bool


def _start_and_answer(options: argparse.Namespace) -> tuple[Worker, _Answers]:
    from coldstart.loading import choose_handler, import_file, parse_target, prepare_path
    from coldstart.registry import begin_early, enter_serving, worker_for

    target = parse_target(options.target)
    given = None if options.input is None else _parsed(options.input)
    prepare_path(target.path)
    enter_serving()
    begin_early(target.path, target.name)
    began = time.monotonic()
    module = import_file(target.path)
    imported = time.monotonic()
    if options.watch is not None:
        options.watch.add(module.__name__, began, imported)
    handler = choose_handler(module, target)
    worker = worker_for(handler.__coldstart__)
    worker.note_import(began, imported)
    inputs = worker.definition.warmup.inputs if options.input is None else (given,)
    if not inputs:
        raise UsageError(f"give the event's input: coldstart run {options.target} --input '{{...}}'")
    worker.begin()
    return worker, _answer(handler, worker, {"id": "run-0", "input": inputs[0]}, options)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise EventError(f"--input {text[:80]!r} is not JSON: {error}") from error


def _answer(handler: Any, worker: Worker, event: Any, options: argparse.Namespace) -> _Answers:
    """Answer through the handler itself, as a platform would; the time of the first answer is taken at its end."""
    from coldstart.adapters.local import answer_one, on_one_loop

    def all_answers() -> _Answers:
        first = answer_one(handler, event)
        answered = time.monotonic()
        if options.watch is not None:
            options.watch.end()
        if not options.json:
            print(json.dumps(_plain(first), default=_as_json), flush=True)
        seconds, equal = [], True
        for _ in range(options.repeat):
            began = time.perf_counter()
            again = answer_one(handler, event)
            seconds.append(time.perf_counter() - began)
            equal = equal and repr(again) == repr(first)
        outcomes = worker.capture_outcomes(0.0 if options.no_wait else _capture_wait_seconds())
        return _Answers(first, answered, seconds, equal, outcomes, worker.is_capturing and not options.no_wait)

    answers: _Answers = on_one_loop(worker, all_answers)
    return answers


def _capture_wait_seconds() -> float:
    from coldstart.config import load

    return load().capture_wait_seconds


def _document(worker: Worker, answers: _Answers) -> dict[str, Any]:
    offset = worker.timeline.clock() - time.monotonic()
    captures = [outcome._asdict() for outcome in answers.outcomes]
    if answers.is_capturing:
        captures.append({"published": False, "reason": _UNFINISHED})
    nothing = {"published": False, "reason": worker.capture_reason}
    return {
        "output": _plain(answers.first),
        "answers_equal": answers.equal,
        "first_answer_monotonic_seconds": answers.first_monotonic_seconds,
        "first_answer_seconds": round(answers.first_monotonic_seconds + offset, 6),
        "start": worker.record,
        "warm_seconds": answers.warm_seconds,
        "capture": captures[0] if captures else nothing,
        "captures": captures or [nothing],
        "metrics": worker.metrics.to_dict(),
    }


def _imports(worker: Worker, answers: _Answers, watch: ImportWatch) -> dict[str, Any]:
    """What was imported from the command's first lines to the first answer, in seconds since the process began."""
    from coldstart.imports.sums import describe

    offset = worker.timeline.clock() - time.monotonic()
    loads = [load for load in watch.loads if load.ended_seconds <= answers.first_monotonic_seconds]
    return describe(loads, handler=watch.handler, began_seconds=watch.began_seconds, offset_seconds=offset)


def _plain(value: Any) -> Any:
    """``value`` if JSON can say it, with the help of ``_as_json``; else its repr, for people want to see it anyway."""
    try:
        json.dumps(value, default=_as_json)
    except (TypeError, ValueError):  # keys that are no text, a cycle
        return repr(value)
    return value


def _as_json(value: Any) -> Any:
    """What a handler may return beyond JSON, as people can read it."""
    for method in ("tolist", "_asdict", "isoformat"):
        if hasattr(value, method):
            return getattr(value, method)()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return repr(value)
