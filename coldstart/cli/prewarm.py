"""``coldstart prewarm NAME --count N``: workers that are up before the first real event, and what each warm-up took."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from coldstart.errors import EventError, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from coldstart.deploy.prewarm import Outcome
    from coldstart.deploy.warmers import Result, Warmer

TIMEOUT_SECONDS = 900.0
"""A platform gives a worker about 7 minutes to start, and may pull its image before."""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "prewarm", help="start workers of what is deployed, before the first event needs them"
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help="an endpoint of RunPod; on Modal APP or APP/Class")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="workers, and warm-ups, of each name")
    parser.add_argument("--platform", choices=("runpod", "modal"), default="runpod")
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--input", metavar="JSON", help="the warm-ups' input")
    inputs.add_argument("--handler", metavar="FILE[:NAME]", help="take the warm-up inputs that this file spells out")
    parser.add_argument("--max-concurrent", type=int, metavar="M", help="warm-ups at a time (default: all)")
    parser.add_argument(
        "--priority",
        action="append",
        default=[],
        metavar="[NAME=]P",
        help="higher ones are warmed up first (default: 0)",
    )
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_SECONDS, metavar="SECONDS", help="each warm-up's limit"
    )
    parser.add_argument("--keep", action="store_true", help="leave the minimum of workers raised, which costs money")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Warm up, and print what each warm-up took. 0 only if all are done and all workers are ready."""
    from coldstart.deploy.warmers import prewarm

    _check(options)
    priorities = _priorities(options.names, options.priority)
    warmers = _warmers(options)
    if options.dry_run:
        for warmer in warmers:
            print("\n".join(warmer.planned()))
        return 0
    result = prewarm(
        [(warmer, priorities[warmer.name]) for warmer in warmers],
        max_concurrent=options.max_concurrent or options.count * len(warmers),
        timeout_seconds=options.timeout,
        keep=options.keep,
    )
    _print(result)
    return 130 if result.report.interrupted else 0 if result.good else 1


def _check(options: argparse.Namespace) -> None:
    for option, value in (("--count", options.count), ("--max-concurrent", options.max_concurrent)):
        if value is not None and value < 1:
            raise UsageError(f"{option} {value} has to be at least 1")
    if not (math.isfinite(options.timeout) and options.timeout > 0):
        raise UsageError(f"--timeout {options.timeout} has to be a number of seconds above 0")
    twice = sorted({name for name in options.names if options.names.count(name) > 1})
    if twice:
        raise UsageError(f"{', '.join(twice)} given twice: raise --count instead")


def _priorities(names: Sequence[str], given: Sequence[str]) -> dict[str, int]:
    """Name -> priority, from ``P`` (of all) and ``NAME=P``. Raises UsageError."""
    priorities = dict.fromkeys(names, 0)
    for text in sorted(given, key=lambda text: "=" in text):  # what is said of one name wins
        name, _, number = text.rpartition("=")
        try:
            priority = int(number)
        except ValueError:
            raise UsageError(f"--priority {text!r}: give a whole number, or NAME=P") from None
        if name and name not in priorities:
            raise UsageError(f"--priority {text!r}: {name!r} is none of the names given")
        priorities |= {name: priority} if name else dict.fromkeys(names, priority)
    return priorities


def _warmers(options: argparse.Namespace) -> Sequence[Warmer]:
    inputs, handler = _inputs(options)
    if options.platform == "modal":
        from coldstart.deploy.modal import class_name
        from coldstart.deploy.modal_warmers import modal_warmers

        named = class_name(handler) if handler else ""
        return modal_warmers(options.names, options.count, inputs, class_name=named)
    from coldstart.deploy.warmers import runpod_warmers

    return runpod_warmers(options.names, options.count, inputs, dry_run=options.dry_run)


def _inputs(options: argparse.Namespace) -> tuple[tuple[Any, ...], str]:
    """The warm-ups' inputs, and the handler's name where its file was given."""
    if options.input is not None:
        try:
            return (json.loads(options.input),), ""
        except ValueError as error:
            raise EventError(f"--input {options.input[:80]!r} is not JSON: {error}") from error
    from coldstart.deploy.shape import read_shape
    from coldstart.loading import parse_target

    target = parse_target(options.handler)
    shape = read_shape(target.path, target.name)
    if not shape.warmup_inputs:
        raise UsageError(f"{options.handler} spells out no warmup= inputs: give --input JSON")
    return tuple(shape.warmup_inputs), shape.name


def _print(result: Result) -> None:
    rows = [("warm-up", "status", "seconds", "delay", "execution", "worker", ""), *map(_row, result.report.outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, wanted in result.wanted.items():
        print(f"{name}: {result.ready.get(name, 0)} of {wanted} workers ready")


def _row(outcome: Outcome) -> tuple[str, ...]:
    warmed = outcome.result
    times = (None, None) if warmed is None else (warmed.delay_seconds, warmed.execution_seconds)
    worker = warmed.worker if warmed else ""
    return (outcome.name, outcome.status, *map(_shown, (outcome.seconds, *times)), worker, outcome.reason)


def _shown(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"
