"""``coldstart bench FILE[:NAME]``: what a cold start of this handler costs, in real processes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from coldstart.errors import HandlerError, UsageError

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from coldstart.bench.report import Report

DEFAULT_TRIALS = 5


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="measure cold starts in real processes",
        description="Measure cold starts in real processes: the ordinary way, naive, the first worker, a restored one.",
    )
    parser.add_argument(
        "handler", metavar="FILE[:NAME]", help="the handler file, and the function where it has several"
    )
    parser.add_argument(
        "--input", metavar="JSON", help="the event's input (default: the first warm-up input in the source)"
    )
    parser.add_argument("--trials", metavar="N", type=int, default=DEFAULT_TRIALS, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--ordinary",
        metavar="FILE",
        help="the same served the ordinary way (default: <stem>_ordinary.py beside the file)",
    )
    parser.add_argument("--json", action="store_true", help="print the JSON document instead of the table")
    parser.add_argument(
        "--output", metavar="FOLDER", help="write <handler>-<machine>.json and .md there (default: ./bench-<handler>.*)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and write the files. Raises UsageError for arguments that cannot be used."""
    if arguments.trials < 1:
        raise UsageError(f"--trials {arguments.trials} must be at least 1")
    report = _measure(arguments)
    from coldstart.bench.report import to_json, to_text, write

    print(to_json(report) if arguments.json else to_text(report))
    for path in write(report, _stem(arguments.output, report)):
        _say(f"written: {path}")
    _warn_of_imports(arguments.handler, report)
    return 0


def _measure(arguments: argparse.Namespace) -> Report:
    from coldstart.bench.machine import describe_machine
    from coldstart.bench.report import Report
    from coldstart.bench.rounds import run_rounds
    from coldstart.bench.summary import summarise
    from coldstart.bench.target import read_target

    target = read_target(arguments.handler, input_text=arguments.input, ordinary=arguments.ordinary)
    if target.ordinary is None:
        _say(f"no {target.file.stem}_ordinary.py beside the file and no --ordinary: the ordinary way is left out")
    trials = run_rounds(target, trials=arguments.trials, say=_say)
    return Report(target.label, target.input, describe_machine(), trials, summarise(trials))


def _warn_of_imports(reference: str, report: Report) -> None:
    """Say what the handler's module imports for ``load`` alone, unless its snapshot runs ``load`` at every start anyway."""
    from coldstart.bench.trial import RESTORED
    from coldstart.cli.imports import warning_of
    from coldstart.imports.costs import measure_imports
    from coldstart.imports.needs import read_needs
    from coldstart.loading import parse_target

    if any(trial.scenario == RESTORED and trial.start.get("rung") == "files" for trial in report.trials):
        return
    try:
        target = parse_target(reference)
        if not any(need.is_only_for_load for need in read_needs(target.path, target.name)):
            return
        warning = warning_of(measure_imports(target.path, target.name))
    except HandlerError as error:  # the benchmark itself is done
        warning = f"what the file imports could not be measured: {error}"
    if warning is not None:
        _say(warning)


def _stem(folder: str | None, report: Report) -> Path:
    from pathlib import Path

    if folder is None:
        return Path(f"bench-{report.name}")
    return Path(folder) / f"{report.name}-{report.machine.label}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
