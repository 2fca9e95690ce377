"""What a start opens, and a second process that has the kernel read it ahead (see import_working_set.py)."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PAGE_BYTES = 4096
STEP_BYTES = 128 << 10
"""One call of posix_fadvise reads at most the device's read-ahead window, whatever it is asked for: Linux' default."""
GAP_BYTES = 256 << 10
"""Recorded pages that lie closer together are read as one range."""

Range = tuple[int, int]
"""Offset of the first byte, offset after the last."""


class Way(NamedTuple):
    """What is read ahead, by how many threads, how long after the second process is up.

    ``slow_ms``: nothing is, where five files of the plan open and give a byte in less than this (median; 0: always).
    """

    plan: str
    threads: int
    late_seconds: float = 0.0
    slow_ms: float = 0.0


class Image(NamedTuple):
    """``python`` and all that it opens lie in ``root`` (``python`` is relative to it)."""

    root: Path
    python: str


# --- what a start opens -----------------------------------------------------------------------------------------------

RECORD = """
import sys
root, code, out = sys.argv[1:]
opened, state = {}, {"maps": False, "off": False}
def note(path):
    if isinstance(path, str) and path.startswith(root): opened.setdefault(path)
def maps():
    state["off"], state["maps"] = True, False
    with open("/proc/self/maps") as lines:
        for line in lines: note(line.rstrip().split(None, 5)[-1])
    state["off"] = False
def hook(event, arguments):
    if state["off"] or event not in ("open", "import"): return
    if state["maps"]: maps()
    if event == "open": note(arguments[0])
    elif arguments[1]:
        note(arguments[1])
        state["maps"] = True
maps()
for module in list(sys.modules.values()):
    spec = getattr(module, "__spec__", None)
    note(getattr(spec, "cached", None) or getattr(spec, "origin", None))
sys.addaudithook(hook)
exec(code, {})
maps()
state["off"] = True
with open(out, "w") as file: file.writelines(path[len(root) + 1:] + chr(10) for path in opened)
"""

AHEAD = """
import _thread, os, sys, time
root, plan, threads, step, late, slow = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *map(float, sys.argv[5:])
time.sleep(late)
with open(plan) as file: lines = file.read().splitlines()
def took(line):
    path, begin, _ = line.split(chr(9), 2)
    began = time.perf_counter()
    fd = os.open(root + "/" + path, os.O_RDONLY)
    os.pread(fd, 1, int(begin))
    os.close(fd)
    return time.perf_counter() - began
if slow and sorted(took(lines[len(lines) * each // 5]) for each in range(5))[2] * 1000 < slow: sys.exit()
lines = iter(lines)
def work():
    for line in lines:
        path, *numbers = line.split(chr(9))
        fd = os.open(root + "/" + path, os.O_RDONLY)
        for begin, end in zip(map(int, numbers[::2]), map(int, numbers[1::2])):
            for at in range(begin, end, step): os.posix_fadvise(fd, at, min(step, end - at), os.POSIX_FADV_WILLNEED)
        os.close(fd)
def one(done):
    work()
    done.release()
locks = [_thread.allocate_lock() for _ in range(threads - 1)]
for lock in locks:
    lock.acquire()
    _thread.start_new_thread(one, (lock,))
work()
for lock in locks: lock.acquire()
"""


def ranges_of(resident: bytes, size: int) -> list[Range]:
    """The ranges of a file of ``size`` bytes of which a page lies in memory (mincore's bytes, one a page)."""
    found: list[Range] = []
    for number, flags in enumerate(resident):
        begin, end = number * PAGE_BYTES, min(size, (number + 1) * PAGE_BYTES)
        if not flags & 1:
            continue
        if found and begin - found[-1][1] < GAP_BYTES:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found


def resident_pages(path: Path) -> bytes:
    """One byte a page of the file: its lowest bit is set where the page lies in memory. Reads nothing."""
    import numpy as np

    size = path.stat().st_size
    if not size:
        return b""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        flags = np.zeros(-(-size // PAGE_BYTES), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(flags.ctypes.data)
        )
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed", str(path))
    return flags.tobytes()


def plans_of(root: Path, names: Sequence[str]) -> dict[str, dict[str, list[Range]]]:
    """What to read ahead, in the order of use: whole files, or the pages of them that lie in memory now."""
    sizes = {name: (root / name).stat().st_size for name in names}
    return {
        "whole": {name: [(0, size)] for name, size in sizes.items()},
        "pages": {name: ranges_of(resident_pages(root / name), size) for name, size in sizes.items()},
    }


def plan_bytes(plan: Mapping[str, Sequence[Range]]) -> int:
    """Bytes that a plan names."""
    return sum(end - begin for ranges in plan.values() for begin, end in ranges)


def write_plan(path: Path, plan: Mapping[str, Sequence[Range]]) -> None:
    """As the process that reads ahead takes it: a line a file, its name and its offsets, by tabs."""
    lines = ["\t".join([name, *(str(at) for each in ranges for at in each)]) for name, ranges in plan.items() if ranges]
    path.write_text("\n".join(lines) + "\n")


# --- one start --------------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """From the spawn of the first process to the end of the one that imports; processor time of each."""

    seconds: float
    processor_seconds: float
    ahead_processor_seconds: float


def spawn(image: Image, *arguments: str) -> subprocess.Popen[bytes]:
    """A process of the image's interpreter, with nothing of our environment."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LD_LIBRARY_PATH": str(image.root / "lib")}
    command = [str(image.root / image.python), "-I", *arguments]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def end_of(process: subprocess.Popen[bytes]) -> float:
    """Wait for it; its processor seconds."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.args
    return usage.ru_utime + usage.ru_stime


def read_ahead(image: Image, way: Way, plans: Path) -> subprocess.Popen[bytes]:
    """The second process of a start."""
    numbers = (way.threads, STEP_BYTES, way.late_seconds, way.slow_ms)
    return spawn(image, "-S", "-c", AHEAD, str(image.root), str(plans / way.plan), *map(str, numbers))


def start(image: Image, code: str, way: Way | None, plans: Path) -> Start:
    """One start, timed."""
    began = time.perf_counter()
    ahead = read_ahead(image, way, plans) if way else None
    used = end_of(spawn(image, "-c", f"{code}\nimport os\nos._exit(0)"))
    seconds = time.perf_counter() - began
    return Start(seconds, used, end_of(ahead) if ahead else 0.0)


def record(image: Image, code: str, folder: Path) -> list[str]:
    """The files in the image that a start opens, in the order of their use."""
    out = folder / "opened"
    end_of(spawn(image, "-c", RECORD, str(image.root), code, str(out)))
    return [name for name in out.read_text().splitlines() if (image.root / name).is_file()]


def covered(root: Path, plan: Mapping[str, Sequence[Range]]) -> float:
    """The share of a plan's pages that lie in memory."""
    there = named = 0
    for name, ranges in plan.items():
        pages = resident_pages(root / name)
        for begin, end in ranges:
            part = pages[begin // PAGE_BYTES : -(-end // PAGE_BYTES)]
            there, named = there + sum(flags & 1 for flags in part), named + len(part)
    return there / named if named else 1.0


def alone(image: Image, way: Way, plan: Mapping[str, Sequence[Range]], plans: Path) -> dict[str, float]:
    """Reading ahead with nobody importing: until its pages are there, or no more of them come for two seconds."""
    began = time.perf_counter()
    end_of(read_ahead(image, way, plans))
    asked_seconds = seconds = time.perf_counter() - began
    share = covered(image.root, plan)
    while share < 1 and time.perf_counter() - began < seconds + 2:
        now = covered(image.root, plan)
        if now > share:
            share, seconds = now, time.perf_counter() - began
        time.sleep(0.02)
    return {"asked_seconds": asked_seconds, "seconds": seconds, "covered": share}
