"""The ``coldstart`` command: one file a subcommand, each with ``add_parser`` and ``run``; imported only if it is the one."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from coldstart.errors import ColdstartError
from coldstart.terms import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "run": "one start, one event, the timeline on the screen",
    "serve": "serve events on the platform that this machine is",
    "bench": "cold starts in real processes: ordinary, naive, first, restored",
    "snapshot": "list, show, verify or delete snapshots",
    "doctor": "what this machine has, lacks, and how to get it",
    "config": "every setting, its value and where it came from",
}
HIDDEN = ("prove",)
"""Commands that coldstart gives itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a failure that is told, 2 for wrong usage."""
    import argparse

    words = list(sys.argv[1:] if arguments is None else arguments)
    chosen = words[0] if words and words[0] in (*COMMANDS, *HIDDEN) else None
    parser = argparse.ArgumentParser(
        prog="coldstart", description="Cold starts of inference workers from snapshots of their state."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        if chosen == name:
            import_module(f"coldstart.cli.{name}").add_parser(subparsers)
        elif chosen is None:
            subparsers.add_parser(name, help=text, add_help=False)
    if chosen in HIDDEN:
        import_module(f"coldstart.cli.{chosen}").add_parser(subparsers)
    options = parser.parse_args(words)
    if options.version:
        print(VERSION)
        return 0
    if chosen is None:
        parser.print_help()
        return 2
    try:
        status: int = options.run(options)
    except ColdstartError as error:
        return tell(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    return status


def tell(error: ColdstartError) -> int:
    """Print an error for a person and return the exit status. The user's own traceback follows where there is one."""
    import traceback

    print(f"coldstart: {type(error).__name__}: {error}", file=sys.stderr)
    if error.__cause__ is not None and not isinstance(error.__cause__, (ColdstartError, OSError, ValueError)):
        frames = traceback.extract_tb(error.__cause__.__traceback__)
        own = [frame for frame in frames if "/coldstart/" not in frame.filename.replace("\\", "/")]
        print("".join(traceback.format_list(own or frames)[-6:]), end="", file=sys.stderr)
    return 1
