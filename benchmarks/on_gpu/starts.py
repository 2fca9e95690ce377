"""Starts of the handler that compiles, in fresh processes: naive, first, restored, and restored without its kernels.

Each process has a home of its own with nothing in it, so that no compiler finds what another left, unless a snapshot
brought it. The store is a folder in the page cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.on_gpu import partial
from coldstart.config import child_environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.on_gpu.timing import Sizes

ROOT = Path(__file__).parent.parent.parent
HANDLER = ROOT / "handlers" / "transformer.py"
SIZE = "1b"
PROCESS_SECONDS = 150.0
CAPTURE_SECONDS = 100.0
COMPILERS_OWN = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH")
"""Variables that name a folder of compiled kernels: taken out of the environment."""
INPUT = '{"tokens": [1, 2, 3], "count": 8}'
GOALS = {"naive_over_restored": 10, "compile_hit_over_miss": 0.1}

REHEARSED = """
import time
from coldstart import coldstart

def load(ctx):
    import cupy
    return {"weights": cupy.asarray(list(range(10_000)), "<f4")}

def compile(ctx, state):
    time.sleep(0.01)
    return state

@coldstart("rehearsed", load=load, compile=compile, warmup=[{"count": 1}], version="1")
def handler(event, model):
    return float(model["weights"].sum().get())
"""
"""Stands in for the handler where no torch knows the device."""

CAPTURE_LATENCY = (
    "benchmarks/capture_latency.py", "--device", "cuda", "--rounds", "1", "--megabytes", "2000", "--depth", "16",
    "--rows", "4096", "--window-seconds", "3", "--streams", "back-to-back",
)  # fmt: skip
LATENCY_SECONDS = 75.0
BENCH_SECONDS = 400.0


def compile_starts(sizes: Sizes, *, size: str = SIZE, device: str = "cuda") -> dict[str, Any]:
    """Seconds from spawn to the first answer, and of each phase; ratios; whether all gave the same answer."""
    if not HANDLER.exists() and not sizes.is_rehearsal:
        return {"left_out": f"there is no {HANDLER.relative_to(ROOT)}"}
    with tempfile.TemporaryDirectory(prefix="coldstart-starts-") as folder:
        place = Path(folder)
        handler = HANDLER
        if sizes.is_rehearsal:
            handler = place / "rehearsed.py"
            handler.write_text(REHEARSED)
        own = {"TRANSFORMER_SIZE": size, "COLDSTART_DEVICE": device}
        shared = {
            "COLDSTART_STORE": f"file://{place}/store",
            "COLDSTART_CAPTURE_IDLE_SECONDS": "0",
            "COLDSTART_CAPTURE_WAIT_SECONDS": f"{CAPTURE_SECONDS:.0f}",
        }
        runs: list[dict[str, Any]] = []
        for scenario, changes, *more in _scenarios(shared):
            runs.append(_run(scenario, place, handler, {**own, **changes}, *more))
            partial.keep({"handler": handler.name, "size": size, "runs": runs, "goals": GOALS})
    return {"handler": handler.name, "size": size, "runs": runs, **_figures(runs), "goals": GOALS}


def _scenarios(shared: Mapping[str, str]) -> Iterator[tuple[Any, ...]]:
    """Name, variables, options. The first one makes the snapshot; what is restored goes without its kernels in between."""
    yield "naive", {"COLDSTART_STORE": "off"}
    yield "first", shared
    yield "restored", shared, "--no-wait"
    yield "restored without kernels", {**shared, "COLDSTART_KERNEL_CACHES": "off"}, "--no-wait"
    yield "restored", shared, "--no-wait"


def _run(name: str, place: Path, handler: Path, changes: Mapping[str, str], *options: str) -> dict[str, Any]:
    home = tempfile.mkdtemp(dir=place)
    environment = child_environment(
        {
            "COLDSTART_LOG": "off",
            "COLDSTART_FILES_FOLDER": f"{home}/files",
            "HOME": home,
            "XDG_CACHE_HOME": f"{home}/cache",
            "TMPDIR": home,
            **dict.fromkeys(COMPILERS_OWN),
            **changes,
        }
    )
    command = [sys.executable, "-m", "coldstart", "run", str(handler), "--input", INPUT, "--json", *options]
    began = time.monotonic()
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the {name} start ended with {done.returncode}: {done.stderr.strip()[-1500:]}")
    document = json.loads(done.stdout.splitlines()[-1])
    return {"scenario": name, **_of_document(document, began)}


def _of_document(document: Mapping[str, Any], began_seconds: float) -> dict[str, Any]:
    start = document["start"]
    phases = {
        phase["name"]: round(phase["ended_seconds"] - phase["began_seconds"], 4)
        for phase in start["phases"]
        if not phase.get("skipped")
    }
    return {
        "kind": start["kind"],
        "reason": start["reason"],
        "seconds": round(document["first_answer_monotonic_seconds"] - began_seconds, 4),
        "phases": phases,
        "bytes": start.get("bytes"),
        "output": document["output"],
        "capture": document.get("capture"),
    }


def _figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by scenario and phase, and the ratios that goals are about."""
    seconds = {name: median(_of(runs, name, "seconds")) for name in {run["scenario"] for run in runs}}
    hit = [run["phases"].get("kernel_compile", 0.0) for run in runs if run["scenario"] == "restored"]
    miss = [run["phases"].get("kernel_compile", 0.0) for run in runs if run["scenario"] == "restored without kernels"]
    ratio = median(hit) / median(miss) if miss and median(miss) else None
    return {
        "median_seconds": seconds,
        "naive_over_restored": round(seconds["naive"] / seconds["restored"], 2),
        "compile_hit_seconds": median(hit),
        "compile_miss_seconds": median(miss),
        "compile_hit_over_miss": None if ratio is None else round(ratio, 4),
        "outputs_equal": all(run["output"] == runs[0]["output"] for run in runs),
    }


def _of(runs: list[dict[str, Any]], scenario: str, field: str) -> list[float]:
    return [run[field] for run in runs if run["scenario"] == scenario]


def bench(sizes: Sizes) -> dict[str, Any]:
    """``coldstart bench`` of the same handler: every scenario, all rounds. Takes minutes; only when asked for."""
    if sizes.is_rehearsal or not HANDLER.exists():
        return {"left_out": "a rehearsal" if sizes.is_rehearsal else f"there is no {HANDLER.relative_to(ROOT)}"}
    with tempfile.TemporaryDirectory() as folder:
        document = json.loads(
            _python(
                "-m", "coldstart", "bench", str(HANDLER), "--trials", "1", "--json", "--input", INPUT, "--output", folder,
                seconds=BENCH_SECONDS,
            )
        )  # fmt: skip
    return {"results": document["results"]}


def latency(sizes: Sizes) -> dict[str, Any]:
    """Requests of a worker whose state is on the GPU, while a generation of it is made: benchmarks/capture_latency.py."""
    if sizes.is_rehearsal:
        return {"left_out": "a rehearsal: it needs torch on a GPU"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "latency.json"
        _python(*CAPTURE_LATENCY, "--output", str(output), seconds=LATENCY_SECONDS)
        document: dict[str, Any] = json.loads(output.read_text())
    return {"setup": document["setup"], "results": document["results"]}


def _python(*arguments: str, seconds: float) -> str:
    environment = child_environment({"TRANSFORMER_SIZE": SIZE, "COLDSTART_DEVICE": "cuda"})
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}: {done.stderr.strip()[-1500:]}")
    return done.stdout
