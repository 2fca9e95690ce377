"""``coldstart prove``: the child's half of a proof (see ``coldstart.proof``). Started by a worker, not by people."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from coldstart.errors import ColdstartError
from coldstart.save.priority import follow_parent

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("prove")
    parser.add_argument("--result-fd", type=int, required=True)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Start from the pinned generation, answer the warm-up inputs twice, and send the digests."""
    spec = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.platform == "linux":
        follow_parent()
    try:
        result: dict[str, Any] = {"digests": _prove(spec)}
    except Exception as error:  # noqa: BLE001  a process edge: whatever fails here is the proof's verdict
        result = {"error": f"{error}" if isinstance(error, ColdstartError) else _described(error)}
    with os.fdopen(options.result_fd, "wb") as results:
        results.write(json.dumps(result).encode() + b"\n")
    return 0


def _described(error: Exception) -> str:
    """An error of code that is not ours to know: its type and text, and the line that raised it."""
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


def _end_with_parent() -> None:
    """End at once, with whatever this process started, when standard input ends: the worker is gone."""
    while sys.stdin.buffer.read(1 << 10):
        pass
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(3)


def _prove(spec: dict[str, Any]) -> list[list[str]]:
    from coldstart.loading import Target, choose_handler, import_file
    from coldstart.registry import begin_early, enter_serving, worker_for

    sys.path[:] = spec["sys_path"]
    os.chdir(spec["folder"])
    enter_serving(pinned=spec["pinned"])
    begin_early(spec["file"], spec["name"])
    module = import_file(spec["file"], module=spec["module"])
    handler = choose_handler(module, Target(spec["file"], spec["name"]))
    worker = worker_for(handler.__coldstart__)
    from coldstart.adapters.local import on_one_loop

    on_one_loop(worker, lambda: None)
    return [list(digests) for digests in worker.warmup.digests] or [[], []]
