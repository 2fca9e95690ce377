"""Handlers written to a folder and started there, in real processes; and handlers of this process, started in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import events
from coldstart.registry import worker_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coldstart.worker import Worker

ROOT = Path(__file__).parent.parent
RUN_SECONDS = 200.0
CAPTURE_WAIT = {"COLDSTART_CAPTURE_WAIT_SECONDS": "180"}
"""What makes a snapshot works only where nobody else wants to: on a busy machine it needs far longer than by itself."""

SCALES = """
import numpy as np
from coldstart import coldstart

FACTOR = 3.0

def load():
    return {"scale": np.arange(64, dtype=np.float32) * FACTOR, "offset": np.ones(64, np.float32), "unit": "m"}

@coldstart("scales", load=load, warmup=[{"x": 2}])
def handler(event, model):
    value = model["scale"] * event["input"]["x"] + model["offset"]
    return {"sum": float(value.sum()), "unit": model["unit"]}
"""
"""A state that is a tree of arrays and plain values."""

SCALED = {"sum": 12160.0, "unit": "m"}
"""What SCALES answers to its warm-up input."""


class Start(NamedTuple):
    """One ``coldstart run --json``: its document (empty when it failed), exit status and standard error."""

    document: dict[str, Any]
    code: int
    errors: str

    @property
    def kind(self) -> str:
        return str(self.document["start"]["kind"])

    @property
    def reason(self) -> str:
        return str(self.document["start"]["reason"])

    @property
    def output(self) -> Any:
        return self.document["output"]

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["start"]
        return found

    @property
    def capture(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["capture"]
        return found


class Project:
    """A folder with handler files, a store and a folder for restored files of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.environment: dict[str, str] = {}
        self._written = 0
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, text: str, name: str = "handler.py") -> Path:
        """Write a file; its time moves on with every write, so that no stale bytecode of the same second is used."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        self._written += 1
        os.utime(path, (1_700_000_000 + self._written, 1_700_000_000 + self._written))
        return path

    def edit(self, old: str, new: str, name: str = "handler.py") -> None:
        """Replace ``old``, which must be there once."""
        text = (self.folder / name).read_text()
        assert text.count(old) == 1
        self.write(text.replace(old, new), name)

    def variables(self, environment: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of this project's processes."""
        own = {
            "PYTHONPATH": str(ROOT),
            "COLDSTART_STORE": f"file://{self.store}",
            "COLDSTART_FILES_FOLDER": str(self.folder / "files"),
            "COLDSTART_CAPTURE_IDLE_SECONDS": "0",
            **CAPTURE_WAIT,
            **self.environment,
            **(environment or {}),
        }
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return {**kept, **own}

    def popen(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """A Python process of this project."""
        environment = self.variables(options.pop("environment", None))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        return subprocess.Popen([sys.executable, *arguments], cwd=self.folder, env=environment, text=True, **pipes)

    def python(self, *arguments: str, environment: Mapping[str, str] | None = None, source: str = "") -> Start:
        """Run a Python process of this project to its end; its last line of output is the document."""
        with self.popen(*arguments, environment=environment, stdin=subprocess.PIPE) as process:
            try:
                output, errors = process.communicate(source, timeout=RUN_SECONDS)
            finally:
                process.kill()
        lines = output.splitlines()
        return Start(json.loads(lines[-1]) if lines else {}, process.returncode, errors)

    def try_run(self, *arguments: str, target: str = "handler.py", **environment: str) -> Start:
        """``coldstart run TARGET --json``, whatever comes of it."""
        return self.python("-m", "coldstart", "run", target, "--json", *arguments, environment=environment)

    def run(self, *arguments: str, target: str = "handler.py", **environment: str) -> Start:
        """``coldstart run TARGET --json``, which must succeed."""
        start = self.try_run(*arguments, target=target, **environment)
        assert start.code == 0, start.errors
        return start

    def objects(self, kind: str) -> list[Path]:
        """The stored objects of a kind (blobs, manifests, refs, starts), sorted."""
        found = (self.store / kind).rglob("*")
        return sorted(path for path in found if path.is_file() and not path.name.startswith("."))

    def ref(self, name: str) -> Path:
        """The file of the only ref of a snapshot."""
        (path,) = (path for path in self.objects(f"refs/{name}") if path.name != "newest")
        return path

    def copy(self, folder: Path) -> Project:
        """This project, with its store, in another folder."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        copy = Project(folder)
        copy.environment, copy._written = dict(self.environment), self._written
        return copy


def flip(path: Path, position: int = 0) -> None:
    """Alter one byte of a file in place."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x55
    path.write_bytes(data)


class Seen:
    """A subscriber that keeps the events of one handler."""

    def __init__(self, name: str, bus: events.EventBus = events.bus) -> None:
        self._name = name
        self._bus = bus
        self._events: list[Any] = []
        self._changed = threading.Condition()
        self.stop: Callable[[], None] = bus.subscribe(self)

    def __call__(self, event: events.Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def wait_for(self, kind: type[Any], count: int = 1) -> Any:
        """Wait for the ``count``-th event of a kind, and return it."""
        with self._changed:
            found = self._changed.wait_for(lambda: len(self._of(kind)) >= count, RUN_SECONDS)
            assert found, f"no {kind.__name__} came, but {self._events}"
            return self._of(kind)[count - 1]

    def all(self) -> list[Any]:
        """All events that were published before this call, in order: another thread may still be delivering them."""
        marker = events.UserLine("", "marker", {})
        self._bus.publish(marker)
        with self._changed:
            assert self._changed.wait_for(lambda: any(event is marker for event in self._events), RUN_SECONDS)
            return [event for event in self._events if self._is_of_name(event)]

    def of(self, kind: type[Any]) -> list[Any]:
        """Those of a kind that were published before this call, in order."""
        return [event for event in self.all() if isinstance(event, kind)]

    def _of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self._events if isinstance(event, kind) and self._is_of_name(event)]

    def _is_of_name(self, event: Any) -> bool:
        return bool(getattr(event, "name", "").split("=")[0] == self._name)


def one() -> int:
    """The smallest load."""
    return 1


def started(handler: Any) -> Worker:
    """The worker of a handler of this process, ready."""
    return worker_for(handler.__coldstart__).wait()


def in_threads(number: int, work: Callable[[], Any]) -> list[Any]:
    """The results of ``work`` on that many threads at once; an error counts as a result."""
    together = threading.Barrier(number)

    def attempt(_: int) -> Any:
        together.wait(RUN_SECONDS)
        try:
            return work()
        except BaseException as error:
            return error

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(attempt, range(number)))
