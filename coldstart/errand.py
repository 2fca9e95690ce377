"""Errands of a worker: a fresh process starts the same handler from one generation, does something, and tells the result.

The child is ``coldstart prove`` or ``coldstart make-program``, given the handler's file and a manifest's key. It writes
nothing to the store but flat files beside it, gives way to the worker, and ends when its standard input does, so it never
outlives the worker.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.config import child_environment
from coldstart.save.priority import give_way

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from coldstart.errors import CaptureError

QUIET = {
    "COLDSTART_CAPTURE": "off",
    "COLDSTART_START_RECORDS": "off",
    "COLDSTART_LOG": "off",
    "COLDSTART_FRESH": "off",
    "COLDSTART_CACHE": "",
    "COLDSTART_STORE_REPLICAS": "",
}
"""An errand writes nothing: no generation, no record, no log; and it reads the store itself, not this host's copies."""


class Origin(NamedTuple):
    """Where a handler comes from, enough for another process to import it again."""

    file: str
    module: str
    name: str


class Errand:
    """One errand. ``run`` blocks; ``stop`` from another thread ends the child.

    ``command``: of ``coldstart``. ``task``: what the child is told beside the origin and ``pinned``, the manifest's key by
    snapshot. ``failure``: the error for a child that gives no answer, ``what`` the errand's name in it. ``beside`` is
    entered with the child's process group while the child works.
    """

    def __init__(
        self,
        command: str,
        origin: Origin,
        pinned: Mapping[str, str],
        store_url: str,
        *,
        what: str,
        failure: type[CaptureError],
        task: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        beside: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self._command = command
        self._what = what
        self._failure = failure
        self._beside = beside
        self._spec = {
            "file": origin.file,
            "module": origin.module,
            "name": origin.name,
            "pinned": dict(pinned),
            **(task or {}),
        }
        self._variables = {**QUIET, **(environment or {}), "COLDSTART_STORE": store_url}
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._late = False
        self.was_killed = False
        """The child was ended by somebody else, as a kernel does that is short of memory: its end says nothing about its work."""

    def run(self, seconds: float) -> dict[str, Any]:
        """What the child answers, within ``seconds``. Raises ``failure`` where it ends, or is ended, without an answer."""
        import signal
        import tempfile

        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as results, tempfile.TemporaryFile() as errors:
            try:
                process = self._process = self._child(writing, errors)
                give_way(process.pid)
            finally:
                os.close(writing)
            answer = self._converse(process, results, seconds)
            if answer:
                result: dict[str, Any] = json.loads(answer)
                return result
            errors.seek(0)
            told = " | ".join(errors.read().decode(errors="replace").strip().splitlines()[-3:])
        if self._stopped:
            raise self._failure(f"the worker ended during the {self._what}")
        if self._late:
            raise self._failure(
                f"the process of the {self._what} gave no answer within {seconds:.0f} s and was ended: {told}"
            )
        self.was_killed = process.returncode == -signal.SIGKILL
        raise self._failure(
            f"the process of the {self._what} ended with status {process.returncode} and no answer: {told}"
        )

    def stop(self) -> None:
        """End the child, if it runs."""
        self._stopped = True
        self._end_child()

    def _end_child(self) -> None:
        """End the child with whatever it started: it leads a process group of its own."""
        import signal

        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _child(self, result_fd: int, errors: Any) -> subprocess.Popen[bytes]:
        import subprocess

        return subprocess.Popen(
            [sys.executable, "-P", "-m", "coldstart", self._command, "--result-fd", str(result_fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=[result_fd],
            env=child_environment(self._variables),
            process_group=0,  # no session: Linux may give each one an equal share, whatever the priorities in it
        )

    def _converse(self, process: subprocess.Popen[bytes], results: Any, seconds: float) -> bytes:
        """Tell the child what to do; its answer, or nothing if it ended without one."""
        import threading

        assert process.stdin is not None
        timer = threading.Timer(seconds, self._too_late)
        timer.daemon = True
        timer.start()
        if self._stopped:  # while the child was being started
            self._end_child()
        question = json.dumps({**self._spec, "sys_path": sys.path, "folder": os.getcwd()}).encode()
        try:
            with suppress(BrokenPipeError):  # it ended already: what it said then is among its errors
                process.stdin.write(question + b"\n")
                process.stdin.flush()
            with self._beside(process.pid):
                answer: bytes = results.readline()
        finally:
            timer.cancel()
            self._end_child()
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
        return answer

    def _too_late(self) -> None:
        self._late = True
        self._end_child()
