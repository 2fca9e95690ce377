"""``coldstart serve FILE[:NAME]``: the worker loop of the platform that this machine is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("serve", help="serve events on the platform that this machine is")
    parser.add_argument("target", metavar="FILE[:NAME]", help="the handler's file, and its name if there are several")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Begin the restore, import the file in its shadow, and serve."""
    from coldstart.adapters import serve
    from coldstart.loading import choose_handler, import_file, parse_target, prepare_path
    from coldstart.registry import begin_early, enter_serving, worker_for

    target = parse_target(options.target)
    prepare_path(target.path)
    enter_serving()
    begin_early(target.path, target.name)
    began = time.monotonic()
    module = import_file(target.path)
    handler = choose_handler(module, target)
    worker_for(handler.__coldstart__).note_import(began, time.monotonic())
    serve(handler.__coldstart__, handler)
    return 0
