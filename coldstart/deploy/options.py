"""Options of ``coldstart deploy`` that every platform has, and how they override the block of the handler's file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.errors import UsageError
from coldstart.script import OPTIONS

if TYPE_CHECKING:
    import argparse

    from coldstart.script import Script

_OVERRIDES = ("concurrency", "min_workers", "max_workers", "idle_seconds")
"""Options of the command that stand for keys of the block."""


def add_common_arguments(parser: argparse.ArgumentParser, deployed: str) -> None:
    """Add them. ``deployed``: what the platform calls that which is deployed."""
    parser.add_argument("--name", default="", help=f"the {deployed}'s name (default: the handler's)")
    parser.add_argument("--gpu", metavar="GPU", action="append", help="a GPU that workers may have; may be repeated")
    for key in _OVERRIDES:
        parser.add_argument(f"--{key.replace('_', '-')}", metavar="N", type=int, help=OPTIONS[key].doc)
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    parser.add_argument("--delete", action="store_true", help=f"delete the {deployed}")


def overridden(script: Script, options: argparse.Namespace) -> Script:
    """The block, with what the command line says instead. Raises UsageError for a number that the block could not have."""
    given = {key: getattr(options, key) for key in _OVERRIDES if getattr(options, key) is not None}
    for key, value in given.items():
        try:
            OPTIONS[key].read(value)
        except ValueError:
            option = f"--{key.replace('_', '-')}"
            raise UsageError(f"{option} {value} has to be {OPTIONS[key].allowed}") from None
    if options.gpu:
        gpu = tuple(options.gpu)
        script = script._replace(gpu=gpu, runpod=script.runpod._replace(gpu=()), modal=script.modal._replace(gpu=()))
    script = script._replace(**given)
    if script.min_workers > script.max_workers:
        raise UsageError(f"{script.min_workers} workers at least are more than {script.max_workers} at most")
    return script
