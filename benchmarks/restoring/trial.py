"""One reader in a fresh process: when it was spawned, what it reports, how much memory it and its children took."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.restoring.peers import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.restoring.reading import Task

LIMIT_SECONDS = 300.0
SAMPLE_SECONDS = 0.005
_LEFT_OUT = ("COLDSTART_", "AWS_", "RUNAI_", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "SSL_CERT_")
_READERS = "benchmarks.restoring.readers"


class Trial(NamedTuple):
    """What one reader took.

    ``seconds`` run from its imports being done, ``spawn_seconds`` from its spawn, both until all tensors are usable;
    ``touch_seconds`` is a first look at each page after that. ``processor_seconds``: user and system, children included, of
    the former.
    ``memory_bytes``: the most that it and its children held until then; ``before_bytes``: what it held after its imports
    (both 0 where nobody looked). ``wrong``: tensors that are not bit for bit the model's (none are expected of a
    reader that reads none).
    """

    seconds: float
    spawn_seconds: float
    processor_seconds: float
    touch_seconds: float
    memory_bytes: int
    before_bytes: int
    wrong: tuple[str, ...]
    details: Mapping[str, Any]


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """What a reader's process sees: this one's without the settings of whoever runs it, and ``changes``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_LEFT_OUT)}
    return {**inherited, "PYTHONPATH": str(ROOT), **changes}


def run_trial(
    python: Path,
    reader: str,
    task: Task,
    variables: Mapping[str, str],
    expected: Mapping[str, str],
    *,
    within: Sequence[str] = (),
) -> Trial:
    """Run one reader. Memory is looked at if the task has pauses, which costs the reader time. Raises RuntimeError."""
    command = [*within, str(python), "-m", f"{_READERS}.{reader}", json.dumps(task._asdict())]
    spawned = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    watch = Watch(process.pid) if task.pause_seconds else None
    try:
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if watch is not None:
            watch.end()
    if process.returncode:
        raise RuntimeError(f"{reader} ended with {process.returncode}: {errors[-2000:]}")
    return _trial(json.loads(output.splitlines()[-1]), task.pause_seconds, spawned, expected, watch)


def _trial(
    document: Mapping[str, Any], pause_seconds: float, spawned: float, expected: Mapping[str, str], watch: Watch | None
) -> Trial:
    began, ended = document["imported_monotonic_seconds"], document["usable_monotonic_seconds"]
    return Trial(
        seconds=ended - began,
        spawn_seconds=ended - spawned,
        processor_seconds=document["processor_seconds"],
        touch_seconds=document["touch_seconds"],
        memory_bytes=watch.most(began, ended + pause_seconds) if watch else 0,
        before_bytes=watch.last_before(began) if watch else 0,
        wrong=wrong_of(document["digests"], expected) if document["reads"] else (),
        details=document["details"],
    )


def wrong_of(found: Mapping[str, str], expected: Mapping[str, str]) -> tuple[str, ...]:
    """Names of tensors that are missing, too many or not the same. A reader has all tensors, or the whole file ("")."""
    wanted = {"": expected[""]} if set(found) == {""} else {name: expected[name] for name in expected if name}
    return tuple(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))


class Watch:
    """Looks at the memory of a process and all below it, every few milliseconds, from the outside.

    Counted are private and file-backed pages by their proportional share (``Pss_Anon``, ``Pss_File`` of ``smaps_rollup``), and
    memory files once, by the pages that they have, whoever maps them: a page that one process filled and another will
    read is in nobody's share in between.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._samples: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop looking."""
        self._ended.set()
        self._thread.join()

    def most(self, began: float, ended: float) -> int:
        """The most bytes seen between two moments of the monotonic clock."""
        return max((size for at, size in self._samples if began <= at <= ended), default=0)

    def last_before(self, moment: float) -> int:
        """The bytes seen last before a moment."""
        return next((size for at, size in reversed(self._samples) if at < moment), 0)

    def _look(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            at = time.monotonic()
            self._samples.append((at, memory_bytes(self._pid)))


def memory_bytes(pid: int) -> int:
    """Memory of a process and all below it, now."""
    own_bytes, shared_bytes = 0, 0
    files: dict[int, int] = {}
    for each in _family(pid):
        with suppress(OSError):  # it has ended meanwhile
            shares = _shares(each)
            own_bytes += shares.get("Pss_Anon:", 0) + shares.get("Pss_File:", 0)
            shared_bytes += shares.get("Pss_Shmem:", 0)
        with suppress(OSError):
            files.update(_memory_files(each))
    return own_bytes + max(shared_bytes, sum(files.values()))


def _family(pid: int) -> Iterator[int]:
    """A process and all below it. A child that is not another program yet has its parent's memory: it would count twice."""
    yield pid
    with suppress(OSError):
        own = Path(f"/proc/{pid}/cmdline").read_bytes()
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                    if Path(f"/proc/{child}/cmdline").read_bytes() != own:
                        yield from _family(int(child))


def _shares(pid: int) -> dict[str, int]:
    """Field -> bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return {words[0]: int(words[1]) << 10 for words in lines}


def _memory_files(pid: int) -> Iterator[tuple[int, int]]:
    """Inode and size of what is there, of each memory file that a process has open."""
    folder = f"/proc/{pid}/fd"
    for descriptor in os.listdir(folder):
        with suppress(OSError):
            if os.readlink(f"{folder}/{descriptor}").startswith("/memfd:"):
                status = os.stat(f"{folder}/{descriptor}")
                yield status.st_ino, status.st_blocks * 512
