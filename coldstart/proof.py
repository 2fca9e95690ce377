"""The proof of a generation: a fresh process restores it and must answer the warm-up inputs like the worker that made it.

This is the worker's half: it starts ``coldstart prove`` with the handler's file and the manifest's key, and judges the digests
that come back. The child does a real start with nothing to fall back on (``coldstart.cli.prove``). It ends when its
standard input does, so it never outlives the worker.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.config import child_environment
from coldstart.errors import ProofError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

PROOF_SECONDS = 900.0
"""How long a proof may take: a whole start, and the warm-up twice, on a machine that serves at the same time."""

QUIET = {"COLDSTART_CAPTURE": "off", "COLDSTART_START_RECORDS": "off", "COLDSTART_LOG": "off", "COLDSTART_FRESH": "off"}
"""A proof writes nothing: no generation, no record, no log."""


class Origin(NamedTuple):
    """Where a handler comes from, enough for another process to import it again."""

    file: str
    module: str
    name: str


class Proof:
    """One proof. ``run`` blocks; ``stop`` from another thread ends the child."""

    def __init__(self, origin: Origin, pinned: Mapping[str, str], store_url: str) -> None:
        self._spec = {"file": origin.file, "module": origin.module, "name": origin.name, "pinned": dict(pinned)}
        self._store_url = store_url
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, expected: tuple[str, ...]) -> bool:
        """Prove, and return whether answers could be compared (False: the handler answers differently each time).

        Raises ProofError when the fresh process fails or answers differently from ``expected``.
        """
        result = self._child_result()
        if "error" in result:
            raise ProofError(f"a fresh process could not start from the new generation: {result['error']}")
        first, second = tuple(result["digests"][0]), tuple(result["digests"][1])
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
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _child_result(self) -> dict[str, Any]:
        import subprocess

        if self._stopped:
            raise ProofError("the worker is ending")
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as results:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "coldstart", "prove", "--result-fd", str(writing)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[writing],
                    env=child_environment({**QUIET, "COLDSTART_STORE": self._store_url}),
                )
            finally:
                os.close(writing)
            return self._converse(self._process, results)

    def _converse(self, process: subprocess.Popen[bytes], results: Any) -> dict[str, Any]:
        import subprocess
        import threading

        assert process.stdin is not None
        assert process.stderr is not None
        errors: list[bytes] = []
        drain = threading.Thread(target=lambda stream=process.stderr: errors.append(stream.read()), daemon=True)
        drain.start()
        timer = threading.Timer(PROOF_SECONDS, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(json.dumps({**self._spec, "sys_path": sys.path, "folder": os.getcwd()}).encode() + b"\n")
            process.stdin.flush()
            answer = results.read()
        except BrokenPipeError:
            answer = b""
        finally:
            timer.cancel()
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            drain.join()
            process.stderr.close()
        if not answer:
            tail = b"".join(errors).decode(errors="replace").strip().splitlines()[-3:]
            raise ProofError(f"the proving process ended with status {process.returncode} and no answer: {' | '.join(tail)}")
        result: dict[str, Any] = json.loads(answer)
        return result
