"""``coldstart prove`` and ``make-program``: a worker's errands, the child's half (see ``coldstart.errand``). Not for people."""

from __future__ import annotations

import errno
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
    from collections.abc import Callable

    from coldstart.programs.recording import Recorder
    from coldstart.worker import Worker


def add_parser(subparsers: Any) -> None:
    """Register both commands."""
    for command, work in (("prove", _prove), ("make-program", _make_program)):
        parser = subparsers.add_parser(command)
        parser.add_argument("--result-fd", type=int, required=True)
        parser.set_defaults(run=run, work=work)


def run(options: argparse.Namespace) -> int:
    """Do the errand that standard input tells, and send its result."""
    spec = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.platform == "linux":
        follow_parent()
    try:
        result: dict[str, Any] = options.work(spec)
    except Exception as error:  # noqa: BLE001  a process edge: whatever fails here is the errand's result
        result = {
            "error": f"{error}" if isinstance(error, ColdstartError) else _described(error),
            "room": want_of_room(error),
        }
    with os.fdopen(options.result_fd, "wb") as results:
        results.write(json.dumps(result).encode() + b"\n")
    return 0


def _described(error: Exception) -> str:
    """An error of code that is not ours to know: its type and text, and the line that raised it."""
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


def want_of_room(error: BaseException | None) -> str:
    """What the system said, if a full disk or a lack of memory is what ``error`` was raised from; else ""."""
    full = os.strerror(errno.ENOSPC)
    while error is not None:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
        if is_full or isinstance(error, MemoryError) or (full in str(error) and error.__cause__ is None):
            return f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__
    return ""


def _end_with_parent() -> None:
    """End at once, with whatever this process started, when standard input ends: the worker is gone."""
    while sys.stdin.buffer.read(1 << 10):
        pass
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(3)


def _prove(spec: dict[str, Any]) -> dict[str, Any]:
    """Start from the pinned generation and answer the warm-up inputs twice.

    What it has in memory then is what the next start of this host maps, if the store is a folder.
    """
    worker = _started(spec, cases=spec["cases"], then=lambda worker: worker.keep_segments())
    digests = [list(digests) for digests in worker.warmup.digests] or [[], []]
    return {"digests": digests, "answers": worker.warmup.answers}


def _make_program(spec: dict[str, Any]) -> dict[str, Any]:
    """Start without a program, note the calls of the warm-up, and make one of them."""
    from pathlib import Path

    from coldstart.programs.making import make_program
    from coldstart.programs.recording import Recorder

    recorder = Recorder()
    worker = _started(spec, recorder=recorder)
    definition = worker.definition
    assert definition.program is not None
    count = make_program(
        definition.program,
        recorder,
        spec["backend"],
        Path(spec["target"]),
        device_type=worker.record["device"]["type"],
        concurrency=definition.concurrency,
    )
    return {"cases": count}


def _started(
    spec: dict[str, Any],
    *,
    recorder: Recorder | None = None,
    cases: str = "",
    then: Callable[[Worker], None] = lambda _: None,
) -> Worker:
    """The handler's worker in this process; it was ready, has done what was to be done ``then``, and is closed."""
    from coldstart.loading import Target, choose_handler, import_file
    from coldstart.registry import begin_early, enter_serving, worker_for

    sys.path[:] = spec["sys_path"]
    os.chdir(spec["folder"])
    enter_serving(pinned=spec["pinned"], recorder=recorder, cases=cases)
    begin_early(spec["file"], spec["name"])
    module = import_file(spec["file"], module=spec["module"])
    handler = choose_handler(module, Target(spec["file"], spec["name"]))
    worker = worker_for(handler.__coldstart__)
    from coldstart.adapters.local import on_one_loop

    on_one_loop(worker, lambda: then(worker))
    return worker
