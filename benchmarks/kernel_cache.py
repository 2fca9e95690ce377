"""The compile step of a ``torch.compile`` handler with kernel caches from the snapshot, and without them.

    PYTHONPATH=. python benchmarks/kernel_cache.py [--rounds N] [--output FILE.json]

Three starts a round, alternately, each a ``coldstart run`` in a process of its own that restores the same weights from the
same store: ``cached`` with the snapshot's kernels; ``fresh`` with kernel caches switched off on a machine where torch has
never compiled (its temporary folder is empty); ``headers`` the same where torch's precompiled headers are there, and nothing
else. Only the first has anything of the others' compilations, and none has a folder that an earlier start has used.

The compile step is phase kernel_compile and the import of torch's compiler, which a start with kernels in its snapshot moves
before that phase, beside the fetch. Afterwards one more cached start is profiled, to say what remains.
"""

from __future__ import annotations

import argparse
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from coldstart import config
from coldstart.bench.machine import describe_machine

ROOT = Path(__file__).parent.parent
HANDLER = ROOT / "benchmarks" / "kernels" / "handler.py"
LIMIT_SECONDS = 600.0
GOAL = 0.1
CACHED, FRESH, HEADERS = SIDES = ("cached", "fresh", "headers")
REMAINS = {
    "hash of torch's sources": ("codecache.py", "torch_key"),
    "loading kernels": ("codecache.py", "cache_hit_post_compile"),
    "key of the graph": ("autograd_cache.py", "autograd_cache_key"),
    "import of setuptools": ("cpp_extension.py", "<module>"),
}
"""Parts of a compilation that finds everything: by file and function of torch 2.13, some inside others."""


class Sample(NamedTuple):
    """One start, in seconds: its compile step, phase kernel_compile alone, and all to the first answer."""

    compile_seconds: float
    phase_seconds: float
    answer_seconds: float


class Machines:
    """A store with one generation, and fresh machines that start from it: each has folders of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._headers = str(folder / "headers")
        os.mkdir(self._headers)
        self._run("headers", TMPDIR=self._headers, COLDSTART_KERNEL_CACHES="off")
        self._run("caches", "--fresh")

    def start(self, side: str, **variables: str) -> dict[str, Any]:
        """One restored start of this side."""
        own = {CACHED: {}, FRESH: {"COLDSTART_KERNEL_CACHES": "off"}, HEADERS: self._with_headers()}[side]
        document = self._run(side, COLDSTART_CAPTURE="off", **own, **variables)
        hit = document["output"]["inductor"].get("fxgraph_cache_hit", 0)
        if document["start"]["kind"] != "restored" or hit != (side == CACHED):
            raise SystemExit(f"a start of side {side} is not what it should be: {document['start']}")
        return document

    def _with_headers(self) -> dict[str, str]:
        own = str(self._folder / f"kernels-{self._count}")
        return {"COLDSTART_KERNEL_CACHES": "off", "TMPDIR": self._headers, "TORCHINDUCTOR_CACHE_DIR": own}

    def _run(self, side: str, *arguments: str, **variables: str) -> dict[str, Any]:
        self._count += 1
        own = self._folder / f"{self._count}-{side}"
        (own / "tmp").mkdir(parents=True)
        environment = {
            "PYTHONPATH": str(ROOT),
            "COLDSTART_STORE": f"file://{self._folder}/store",
            "COLDSTART_FILES_FOLDER": str(own / "files"),
            "COLDSTART_CAPTURE_WAIT_SECONDS": str(LIMIT_SECONDS),
            "TMPDIR": str(own / "tmp"),
            **variables,
        }
        command = [sys.executable, "-m", "coldstart", "run", str(HANDLER), "--json", *arguments]
        run = subprocess.run(
            command, env=config.child_environment(environment), capture_output=True, timeout=LIMIT_SECONDS, check=False
        )
        if run.returncode:
            raise SystemExit(run.stderr.decode())
        document: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return document


def sample_of(document: dict[str, Any]) -> Sample:
    """The times of a start."""
    start = document["start"]
    (phase,) = (each for each in start["phases"] if each["name"] == "kernel_compile")
    imports = [each for each in start["spans"] if each["name"] == "import compiler"]
    seconds = [each["ended_seconds"] - each["began_seconds"] for each in (phase, *imports)]
    return Sample(sum(seconds), seconds[0], document["first_answer_seconds"])


def remains(path: str) -> dict[str, float]:
    """Where a profiled compilation spent its time: cumulative seconds of some of its parts, under the profiler."""
    stats = pstats.Stats(path)
    table: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = stats.stats  # type: ignore[attr-defined]
    found = {"all": stats.total_tt}  # type: ignore[attr-defined]
    for part, (file, function) in REMAINS.items():
        times = [row[3] for (place, _, name), row in table.items() if place.endswith(f"/{file}") and name == function]
        found[part] = max(times, default=0.0)
    return found


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    """All rounds, one side after another in each, and the profile."""
    machines = Machines(folder)
    samples: dict[str, list[Sample]] = {side: [] for side in SIDES}
    answers = set()
    for number in range(rounds):
        for side in SIDES:
            document = machines.start(side)
            samples[side].append(sample_of(document))
            answers.add(document["output"]["sum"])
            print(number, side, samples[side][-1], file=sys.stderr, flush=True)
    profiled = machines.start(CACHED, COMPILE_PROFILE=str(folder / "profile"))
    use = profiled["start"]["kernel_caches"]
    return {
        "machine": str(describe_machine()),
        "rounds": rounds,
        "samples": {side: [each._asdict() for each in samples[side]] for side in SIDES},
        "answers_equal": len(answers) == 1,
        "caches": {name: use[name] for name in ("restored_files", "restored_bytes")},
        "remains_seconds": remains(str(folder / "profile")),
        "ratios": {side: ratio(samples[CACHED], samples[side]) for side in (FRESH, HEADERS)},
    }


def ratio(cached: list[Sample], other: list[Sample]) -> dict[str, float]:
    """The median of cached / other, round by round: of the compile step, and of all to the first answer."""
    return {
        field: statistics.median(
            getattr(mine, field) / getattr(theirs, field) for mine, theirs in zip(cached, other, strict=True)
        )
        for field in Sample._fields
    }


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"# The compile step with and without kernel caches ({result['machine']}, {result['rounds']} alternating rounds)",
        "",
        "| start | compile step, s: median (least to most) | of it phase kernel_compile | first answer, s |",
        "| --- | --- | --- | --- |",
    ]
    for side, rows in result["samples"].items():
        steps = sorted(row["compile_seconds"] for row in rows)
        phase, answer = (statistics.median(row[field] for row in rows) for field in ("phase_seconds", "answer_seconds"))
        step = f"{statistics.median(steps):.2f} ({steps[0]:.2f} to {steps[-1]:.2f})"
        lines.append(f"| {side} | {step} | {phase:.2f} | {answer:.2f} |")
    ratios = {side: {field: f"{value:.3f}" for field, value in each.items()} for side, each in result["ratios"].items()}
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in result["remains_seconds"].items())
    told = [
        f"cached / {side} {each['compile_seconds']} (phase alone {each['phase_seconds']}, first answer {each['answer_seconds']})"
        for side, each in ratios.items()
    ]
    equal = "yes" if result["answers_equal"] else "NO"
    caches = f"{result['caches']['restored_files']} files, {result['caches']['restored_bytes'] / 1e6:.1f} MB"
    lines += ["", f"{', '.join(told)}; the goal is {GOAL}. Answers equal bit for bit: {equal}. Restored: {caches}."]
    lines += ["", f"What remains of phase kernel_compile, s under a profiler (some inside others): {parts}."]
    return "\n".join(lines)


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="coldstart-kernel-cache-") as folder:
        result = measure(options.rounds, Path(folder))
    print(report(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
