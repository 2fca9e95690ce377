"""A link of a given rate: the loopback device of a network namespace of its own, behind a token bucket of the kernel.

Server and clients both run inside, so that endpoints stay on 127.0.0.1. It needs root and the programs ``ip`` and ``tc``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

LATENCY = "50ms"
"""The longest that a packet waits in the queue before it is dropped."""

_SMALLEST_BURST_BYTES = 256 << 10
_BURST_SECONDS = 0.004
"""One tick of a kernel with 250 of them: with less, a fast link would wait for the clock."""


class Link:
    """A link of ``megabytes_per_second`` (10^6 bytes)."""

    def __init__(self, megabytes_per_second: float) -> None:
        self._rate_bytes = int(megabytes_per_second * 1e6)
        self._name = f"coldstart-{os.getpid()}"
        self.within = ("ip", "netns", "exec", self._name)

    def __enter__(self) -> Self:
        """Make it. Raises subprocess.CalledProcessError where this machine does not allow it."""
        burst_bytes = max(_SMALLEST_BURST_BYTES, int(self._rate_bytes * _BURST_SECONDS))
        limit = ["rate", f"{self._rate_bytes * 8}bit", "burst", str(burst_bytes), "latency", LATENCY]
        _do("ip", "netns", "add", self._name)
        try:
            _do(*self.within, "ip", "link", "set", "lo", "up")
            _do(*self.within, "tc", "qdisc", "add", "dev", "lo", "root", "tbf", *limit)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        with suppress(subprocess.CalledProcessError):
            _do("ip", "netns", "delete", self._name)


def lack() -> str:
    """Why this machine has no limited links, "" where it has."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (apt-get install iproute2)"
    try:
        with Link(100.0):
            return ""
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
