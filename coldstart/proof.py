"""The proof of a generation: a fresh process restores it and must answer the warm-up inputs like the worker that made it.

This is the worker's half: it starts ``coldstart prove`` with the handler's file and the manifest's key, and judges the digests
that come back. The child does a real start with nothing to fall back on (``coldstart.cli.prove``). It ends when its
standard input does, so it never outlives the worker.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.config import child_environment
from coldstart.errors import ProofError
from coldstart.save.priority import give_way

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

PROOF_SECONDS = 900.0
"""How long a proof may take: a whole start, and the warm-up twice, on a machine that serves at the same time."""

QUIET = {
    "COLDSTART_CAPTURE": "off",
    "COLDSTART_START_RECORDS": "off",
    "COLDSTART_LOG": "off",
    "COLDSTART_FRESH": "off",
    "COLDSTART_CACHE": "",
    "COLDSTART_STORE_REPLICAS": "",
}
"""A proof writes nothing: no generation, no record, no log; and it reads the store itself, no copy of it anywhere."""


class Origin(NamedTuple):
    """Where a handler comes from, enough for another process to import it again."""

    file: str
    module: str
    name: str


class Proof:
    """One proof. ``run`` blocks; ``stop`` from another thread ends the child.

    ``beside`` is entered with the child's process group while the child works.
    """

    def __init__(
        self,
        origin: Origin,
        pinned: Mapping[str, str],
        store_url: str,
        *,
        beside: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self._beside = beside
        self._spec = {"file": origin.file, "module": origin.module, "name": origin.name, "pinned": dict(pinned)}
        self._store_url = store_url
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._late = False

    def run(self, expected: tuple[str, ...]) -> bool:
        """Prove, and return whether answers could be compared (False: the handler answers differently each time).

        Raises ProofError when the fresh process fails or answers differently from ``expected``.
        """
        result = self._child_result()
        if "error" in result:
            raise ProofError(f"a fresh process could not start from the new generation: {result['error']}")
        first, second = result["digests"][0], result["digests"][-1]  # but one, if the warm-up ran out of its time
        comparable = [index for index, digest in enumerate(expected) if digest]
        differing = [index for index in comparable if first[index] != expected[index]]
        if not differing:
            return bool(comparable)
        if all(first[index] != second[index] for index in differing):
            return False
        raise ProofError(
            f"a fresh process, started from the new generation, answered warm-up input {differing[0]} differently; does load"
            " leave something in the state that build, init or the arrays do not bring back?"
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

    def _child_result(self) -> dict[str, Any]:
        import tempfile

        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as results, tempfile.TemporaryFile() as errors:
            try:
                process = self._process = self._child(writing, errors)
                give_way(process.pid)
            finally:
                os.close(writing)
            answer = self._converse(process, results)
            if answer:
                result: dict[str, Any] = json.loads(answer)
                return result
            errors.seek(0)
            told = " | ".join(errors.read().decode(errors="replace").strip().splitlines()[-3:])
        if self._stopped:
            raise ProofError("the worker ended during the proof")
        if self._late:
            raise ProofError(f"the proving process gave no answer within {PROOF_SECONDS:.0f} s and was ended: {told}")
        raise ProofError(f"the proving process ended with status {process.returncode} and no answer: {told}")

    def _child(self, result_fd: int, errors: Any) -> subprocess.Popen[bytes]:
        import subprocess

        return subprocess.Popen(
            [sys.executable, "-P", "-m", "coldstart", "prove", "--result-fd", str(result_fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=[result_fd],
            env=child_environment({**QUIET, "COLDSTART_STORE": self._store_url}),
            process_group=0,  # no session: Linux may give each one an equal share, whatever the priorities in it
        )

    def _converse(self, process: subprocess.Popen[bytes], results: Any) -> bytes:
        """Tell the child what to prove; its answer, or nothing if it ended without one."""
        import threading

        assert process.stdin is not None
        timer = threading.Timer(PROOF_SECONDS, self._too_late)
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
