"""The ``coldstart`` command: one file a subcommand, each with ``add_parser`` and ``run``; only the chosen one is imported."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from coldstart.errors import ColdstartError, StartError
from coldstart.terms import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence
    from traceback import FrameSummary

    from coldstart.imports.watch import ImportWatch

COMMANDS = {
    "run": "one start, one event, the timeline on the screen",
    "serve": "serve events on the platform that this machine is",
    "imports": "what importing a handler's file costs, and which of it only load needs",
    "bench": "cold starts in real processes: ordinary, naive, first, restored",
    "deploy": "put a handler's file on RunPod or Modal",
    "prewarm": "start workers of what is deployed, before the first event needs them",
    "hibernate": "end a pod once its snapshot is in the store and verified",
    "wake": "a new pod that starts from the snapshot of one that hibernates",
    "snapshot": "list, show, verify or delete snapshots",
    "doctor": "what this machine has, lacks, and how to get it",
    "config": "every setting, its value and where it came from",
}
HIDDEN = ("prove", "make-program")
"""Commands that coldstart gives itself, in ``coldstart.cli.errand``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a failure that is told, 2 for wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    watch = _import_watch(words)
    import argparse

    if sys.platform == "win32":
        print("coldstart: Windows is not supported: run it on Linux, in WSL or in a container", file=sys.stderr)
        return 1
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
        import_module("coldstart.cli.errand").add_parser(subparsers)
    options = parser.parse_args(words)
    options.watch = watch
    if options.version:
        print(VERSION)
        return 0
    if chosen is None:
        parser.print_help()
        return 2
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except ColdstartError as error:
        return tell(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has gone: no news, nor at the interpreter's last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001  the process' edge: the handler's file or the handler raised it
        return tell(error)
    finally:
        if watch is not None:
            watch.end()
    return status


def _import_watch(words: Sequence[str]) -> ImportWatch | None:
    """A watch on this process' imports from here on, for the options of ``run`` that show them, abbreviated too."""
    if words[:1] != ["run"] or not any(word.startswith(("--ti", "--tr")) for word in words):
        return None
    from coldstart.imports.watch import ImportWatch

    return ImportWatch().begin()


def tell(error: Exception) -> int:
    """Print an error for a person and return the exit status. Where the user's own code failed, its traceback follows."""
    import traceback

    print(f"coldstart: {type(error).__name__}: {error}", file=sys.stderr)
    source = error.__cause__ if isinstance(error, StartError) else error
    if source is not None and not isinstance(source, ColdstartError):
        print("".join(traceback.format_list(_users_frames(source))), end="", file=sys.stderr)
    return 1


def _users_frames(error: BaseException) -> list[FrameSummary]:
    """The frames from the first one that is not of coldstart or Python; all of them if there is none: a bug of ours."""
    import sysconfig
    import traceback

    paths = sysconfig.get_paths()
    folders = [os.path.dirname(os.path.dirname(__file__)), *(paths[name] for name in ("stdlib", "purelib", "platlib"))]
    others = ("<frozen", *(folder + os.sep for folder in folders))
    frames = list(traceback.extract_tb(error.__traceback__))
    first = next((index for index, frame in enumerate(frames) if not frame.filename.startswith(others)), 0)
    return frames[first:]
