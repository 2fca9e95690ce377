"""A capture into a folder, killed at every syscall that changes a file system.

    python benchmarks/kill_capture.py [--output FILE.json] [--step N]

A store holds a published generation. A process writes the next one (blobs, manifest, ref) and is killed by strace at the N-th
call of one syscall, before that takes effect; N goes up from 1 until the process comes through, for each of the syscalls in
turn. So every state that a crash can leave between two changes is looked at. After each kill:

- the ref names the first generation or the second, and every chunk of it is read, hashed, decoded and hashed again;
- the state that is restored from it is, byte for byte, the one that was captured;
- the next capture goes through and is what is restored then: no lock and no leftover is in its way.

It needs strace (apt-get install strace). A machine that loses power is not simulated: that is what the fsyncs are for.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from coldstart.bench.machine import describe_machine
from coldstart.repository import Repository
from coldstart.stores.local import LocalStore
from coldstart.verify import verify
from tests.generations import KEY, capture_of, restored, write

ROOT = Path(__file__).parent.parent
SYSCALLS = (
    "write",
    "pwrite64",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "unlink",
    "unlinkat",
    "fsync",
    "fdatasync",
    "mkdir",
    "mkdirat",
    "flock",
    "ftruncate",
)
KILLED = -9
MOST = 400
WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from benchmarks.kill_capture import publish
publish(sys.argv[2], int(sys.argv[3]))
"""


def state(number: int) -> dict[str, np.ndarray]:
    """A state with a part that is the same in all generations."""
    return {
        "same": np.arange(5000, dtype=np.float64),
        "own": np.full(3000, number, np.float32),
        "noise": np.random.default_rng(number).standard_normal(20_000),
    }


def publish(folder: str, number: int) -> None:
    """Write a generation after the current one and make it current."""
    repository = Repository(LocalStore(folder))
    lookup = repository.look_up("model", KEY)
    capture = capture_of(state(number))
    if lookup.ref is not None:
        parent = repository.manifest(lookup.ref.manifest, name="model")
        capture = capture._replace(parent=parent, parent_key=lookup.ref.manifest, generation=lookup.ref.generation + 1)
    written = write(capture, repository, codec="auto")
    repository.publish(written.manifest, written.manifest_key, replaces=lookup)


def current(folder: Path) -> int:
    """The number of the state that the current generation is; raises AssertionError where it is not whole."""
    store = LocalStore(folder)
    repository = Repository(store)
    ref = repository.look_up("model", KEY).ref
    assert ref is not None, "the ref is gone"
    manifest = repository.manifest(ref.manifest, name="model")
    findings = list(verify(manifest, store))
    assert not findings, findings
    found = restored(manifest, store)
    number = int(found["own"][0])
    expected = state(number)
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), f"{name} of state {number} is wrong"
    return number


def killed_at(folder: Path, syscall: str, number: int) -> int:
    """Write the second generation with a kill at that call; the exit status, KILLED where it struck."""
    inject = f"inject={syscall}:signal=KILL:when={number}"
    words = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={syscall}", "-e", inject]
    words += [sys.executable, "-B", "-c", WRITER, str(ROOT), str(folder), "2"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode not in (0, KILLED, 137):
        raise SystemExit(f"the writer failed at {syscall} {number}: {done.stderr[-2000:]}")
    return KILLED if done.returncode else 0


def walk(base: Path, folder: Path, syscall: str, step: int) -> dict:
    """All kills at one syscall."""
    outcomes = {"old": 0, "new": 0}
    temporary, problems = 0, []
    number = 1
    for number in range(1, MOST, step):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        if killed_at(folder, syscall, number) == 0:
            break
        temporary = max(temporary, sum(1 for _ in folder.rglob(".tmp-*")))
        try:
            outcomes["new" if current(folder) == 2 else "old"] += 1
            publish(str(folder), 3)
            assert current(folder) == 3, "the next capture is not what is restored"
        except Exception as error:
            problems.append(f"{syscall} {number}: {type(error).__name__}: {error}")
    return {
        "syscall": syscall,
        "kills": number - 1 if step == 1 else sum(outcomes.values()),
        **outcomes,
        "most_temporary_files": temporary,
        "problems": problems,
    }


def table(results: list[dict], machine: object) -> str:
    lines = [
        "# A capture killed at every syscall",
        "",
        f"Machine: {machine.processor}, {machine.cores:g} cores, {machine.system}.",  # type: ignore[attr-defined]
        "",
        (__doc__ or "").split("\n\n", 2)[2],
        "",
        "| syscall | kills | the old generation restored | the new one restored | most temporary files | problems |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in results:
        problems = "; ".join(each["problems"]) or "none"
        cells = (each["syscall"], each["kills"], each["old"], each["new"], each["most_temporary_files"], problems)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    kills = sum(each["kills"] for each in results)
    bad = sum(len(each["problems"]) for each in results)
    return "\n".join([*lines, "", f"{kills} kills, {bad} problems."]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a capture at every syscall that changes a file system.")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--step", type=int, default=1, help="kill at every so many calls only")
    options = parser.parse_args()
    if shutil.which("strace") is None:
        sys.exit("strace is not installed: apt-get install strace")
    began = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory(prefix="coldstart-kill-") as name:
        base, folder = Path(name) / "base", Path(name) / "store"
        publish(str(base), 1)
        for syscall in SYSCALLS:
            results.append(walk(base, folder, syscall, options.step))
            print(json.dumps(results[-1]), flush=True)
    machine = describe_machine()
    if options.output:
        document = {"machine": machine._asdict(), "seconds": round(time.monotonic() - began, 1), "results": results}
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(table(results, machine))
    return 1 if any(each["problems"] for each in results) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
