"""``coldstart serve FILE[:NAME]``: the worker loop of the platform that this machine is; with ``--http``, a server."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from coldstart.adapters.http import HttpService


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("serve", help="serve events on the platform that this machine is")
    parser.add_argument("target", metavar="FILE[:NAME]", help="the handler's file, and its name if there are several")
    parser.add_argument(
        "--http",
        nargs="?",
        const="",
        metavar="HOST:PORT",
        help="serve POST /run and GET /ping over HTTP; without a value, on every interface at PORT, or 8000",
    )
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
    with ExitStack() as stack:
        http = None if options.http is None else _listen(options.http, stack)
        began = time.monotonic()
        module = import_file(target.path)
        handler = choose_handler(module, target)
        worker_for(handler.__coldstart__).note_import(began, time.monotonic())
        (http.serve if http else serve)(handler.__coldstart__, handler)
    return 0


def _listen(text: str, stack: ExitStack) -> HttpService:
    """Listen before the file is imported: who asks for /ping meanwhile hears that the start is under way."""
    from coldstart.adapters.http import HttpService, address_of

    address = address_of(text)
    service = HttpService(address)
    stack.callback(service.close)
    host = f"[{address.host}]" if ":" in address.host else address.host
    print(f"coldstart: serving at http://{host}:{service.port}", file=sys.stderr, flush=True)
    return service
