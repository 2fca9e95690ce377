"""Worker processes with RunPod's real SDK, both lines of it, that serve a ``Plane`` of this machine."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from tests.runpod_plane import LIMIT_SECONDS, TICK_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from tests.runpod_plane import Plane

ROOT = Path(__file__).parent.parent
SECOND_LINE = ROOT / ".sdk" / "runpod-2"
MARK = "WORKER_OF_A_TEST"
"""Variable that a worker's processes inherit, whatever session they are in."""


class Line(NamedTuple):
    """A line of the SDK: ``folder`` is where it is installed, "" for this environment; ``lack`` why it cannot be used."""

    name: str
    folder: str
    lack: str


def _installed() -> str:
    return metadata.version("runpod") if importlib.util.find_spec("runpod") else "none"


def lines() -> tuple[Line, Line]:
    """Both lines of the SDK."""
    first = (
        "" if _installed().startswith("1.") else f"runpod 1.x is not installed ({_installed()}): pip install 'runpod<2'"
    )
    command = f"pip install --pre --no-deps --target {SECOND_LINE.relative_to(ROOT)} runpod==2.0.0rc2"
    # Without dependencies: they are those of the installed 1.x.
    second = first or ("" if (SECOND_LINE / "runpod").is_dir() else f"the 2.x line is not there: {command}")
    return Line("runpod-1", "", first), Line("runpod-2", str(SECOND_LINE), second)


class Worker:
    """One worker process in a session of its own. Leaving ends all its processes, and asserts that none outlived it.

    ``arguments`` are those of Python: a script, or ``-m coldstart serve FILE``. Its output goes to files in ``folder``.
    """

    def __init__(
        self,
        plane: Plane,
        *arguments: str,
        line: Line,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._output, self._errors = folder / f"{self._mark}.out", folder / f"{self._mark}.err"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("RUNPOD_")
            and not name.lower().endswith("_proxy")
            and name != "PYTHONDONTWRITEBYTECODE"
        }
        own = {
            **plane.environment(),
            "RUNPOD_POD_ID": f"worker-{self._mark[:8]}",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (line.folder, str(ROOT)))),
            MARK: self._mark,
        }
        self._plane = plane
        plane.obituary = self._obituary
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.spawned_seconds = time.monotonic()
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env={**inherited, **own, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has written to standard output."""
        return self._output.read_text(errors="replace")

    @property
    def errors(self) -> str:
        """What it has written to standard error."""
        return self._errors.read_text(errors="replace")

    def wait(self, seconds: float = LIMIT_SECONDS) -> int:
        """Wait for its end, without asking for it. The exit status, and no process of its may be left."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the worker still runs after {seconds} s: {self._told()}") from None
        deadline = time.monotonic() + 5.0
        while self.left() and time.monotonic() < deadline:  # daemon children are reaped a moment later
            time.sleep(TICK_SECONDS)
        assert self.left() == [], f"the worker left processes behind: {self.left()}"
        return status

    def terminate(self, seconds: float = LIMIT_SECONDS) -> int:
        """Ask for its end as the platform does, and wait for it."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(seconds)

    def left(self) -> list[str]:
        """Command lines of the processes that it started and that still run, by session and by an inherited mark."""
        return [_command(process) for process in _processes() if self._is_mine(process)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = self.process.poll() is not None
        left = self.left() if ended else []
        for process in (int(found) for found in _processes() if self._is_mine(found)):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not ended:
            self.wait(LIMIT_SECONDS)
        assert left == [] or kind is not None, f"the worker left processes behind: {left}"

    def _is_mine(self, process: str) -> bool:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
            fields = stat.rpartition(")")[2].split()
            if fields[0] == "Z":
                return False
            marked = f"{MARK}={self._mark}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended, or is somebody else's
            return False
        return marked or int(fields[3]) == self.process.pid

    def _obituary(self) -> str:
        return "" if self.process.poll() is None else f"the worker ended with {self.process.returncode}: {self._told()}"

    def _told(self) -> str:
        return f"\n{self.output[-2000:]}\n{self.errors[-4000:]}"


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]


def _command(process: str) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return process
