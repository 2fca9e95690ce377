"""The GPU path on a real GPU: whether it is right, and how fast it is. One command of less than eight minutes.

    benchmarks/gpu.sh [--stages all] [--seconds 460] [--output STEM] [--rehearse]

``gpu.sh`` brings along what the machine lacks and calls ``python -m benchmarks.gpu``. Every stage is a process of its own with
a limit of its own; one that fails is written down with its error, and the next goes on. Stages, in the order of their turn:

- ``copies``: bare copies of 256 MiB, pinned, registered and pageable, and what pinning costs: the limits;
- ``path``: chunks through ring and landing, from full slots, a store in memory, files in the page cache, each against the copy;
- ``zstd``, ``ans``: nvCOMP on exponent planes and on bf16, by block and batch, with its scratch; what comes out is looked at;
- ``kernels``: merging planes, BLAKE3;
- ``tests``: ``pytest -m gpu``, parity of the devices included;
- ``restores``: 1, 4 and 16 GiB of seeded bf16, raw, planes+zstd and ANS, from a folder and an HTTP server of this machine;
- ``compile``: handlers/transformer.py in fresh processes: naive, first, restored, restored without its kernels;
- ``openings``: fresh processes that import torch or cupy, or open the device;
- ``latency``: requests while a generation is captured from the GPU;
- ``bench``: ``coldstart bench`` of the compiling handler, only if it is named in ``--stages``.

The result is one JSON document, STEM.json, and its tables, STEM.md (also printed). STEM is by default ``gpu-<its name>`` in the
folder that the variable OUT names, else in benchmarks/results. It is written anew after every stage. Its form::

    schema     1
    rehearsal  whether all of it ran on fakes: then nothing is written to benchmarks/results
    began      the time, in UTC
    seconds    all of it
    machine    gpu (name, capability, memory_bytes, driver), host (see coldstart.bench.machine), versions (package -> version)
    stages     name -> outcome (measured, failed, left out), seconds, and
                 result  of the stage; rates are {gb_per_second (median), slowest, fastest, samples}, GB = 10^9 bytes
                 error   its last words, if it failed; ``result`` is then what it had found before, if anything
                 reason  why it was left out

``--rehearse`` runs on the fakes of tests/fake_gpu (gcc and g++ are needed) with tiny sizes: that everything works before a
GPU is paid for. ``compile`` then starts a handler of its own, and what needs torch on a GPU is left out.

The exit status is 1 if a stage failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.on_gpu import partial, table
from benchmarks.on_gpu.timing import REHEARSAL, WHOLE, Sizes
from coldstart.config import child_environment, read_variable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SECONDS = 460.0
MACHINE_SECONDS = 60.0
LEAST_SECONDS = 8.0
"""Time below which a stage is not begun."""
PACKAGES = ("torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "nvidia-libnvcomp-cu12", "nvidia-libnvcomp-cu13", "numpy",
            "blake3", "zstandard")  # fmt: skip


class Stage(NamedTuple):
    """Where its function is, and how many seconds it may take."""

    module: str
    function: str
    seconds: float
    is_by_default: bool = True


STAGES = {
    "copies": Stage("copies", "copies", 45),
    "path": Stage("path", "path", 60),
    "zstd": Stage("decoding", "zstd", 60),
    "kernels": Stage("decoding", "kernels", 40),
    "ans": Stage("decoding", "ans", 60),
    "tests": Stage("suite", "suite", 160),
    "restores": Stage("restores", "restores", 150),
    "compile": Stage("starts", "compile_starts", 260),
    "openings": Stage("copies", "openings", 90),
    "latency": Stage("starts", "latency", 80),
    "bench": Stage("starts", "bench", 400, is_by_default=False),
}
DEFAULT = tuple(name for name, stage in STAGES.items() if stage.is_by_default)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    if options.stage:
        run_stage(options.stage, REHEARSAL if options.rehearse else WHOLE, Path(options.into))
        return 0
    with tempfile.TemporaryDirectory(prefix="coldstart-gpu-run-") as folder:
        environment = fakes(Path(folder)) if options.rehearse else {}
        document = measured(options, environment, Path(folder))
    if "error" in document["machine"]:
        print(f"nothing was measured: {document['machine']['error'].splitlines()[-1]}", file=sys.stderr)
        return 2
    print(table.to_markdown(document))
    return 1 if any(stage["outcome"] == "failed" for stage in document["stages"].values()) else 0


def measured(options: argparse.Namespace, environment: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """All stages, one after another; what is known is written after each, so that an end that comes early loses little."""
    began = time.monotonic()
    document: dict[str, Any] = {
        "schema": 1,
        "rehearsal": options.rehearse,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "machine": {},
        "stages": {},
    }
    found = child_says(("--stage", "machine"), environment, folder, MACHINE_SECONDS, rehearse=options.rehearse)
    document["machine"] = found.get("result") or {"error": found.get("error")}
    if "error" in document["machine"]:
        return document
    stem = stem_of(options, document["machine"].get("gpu", {}))
    for name in options.stages:
        left_seconds = options.seconds - (time.monotonic() - began)
        document["stages"][name] = one(name, left_seconds, environment, folder, rehearse=options.rehearse)
        document["seconds"] = round(time.monotonic() - began, 1)
        said = document["stages"][name]
        print(f"{name}: {said['outcome']} in {said['seconds']:.1f} s", file=sys.stderr, flush=True)
        write(stem, document)
    return document


def one(
    name: str, left_seconds: float, environment: Mapping[str, str], folder: Path, *, rehearse: bool
) -> dict[str, Any]:
    """One stage as the document has it."""
    if left_seconds < LEAST_SECONDS:
        return {"outcome": "left out", "seconds": 0.0, "reason": "no time was left (--seconds)"}
    limit_seconds = min(STAGES[name].seconds, left_seconds)
    return child_says(("--stage", name), environment, folder, limit_seconds, rehearse=rehearse)


def child_says(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, seconds: float, *, rehearse: bool
) -> dict[str, Any]:
    """Run a stage in a process of its own, whose whole group ends when its time is up."""
    into = folder / "said.json"
    for path in (into, partial.part_of(into)):
        path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--into", str(into)]
    command += ["--rehearse"] if rehearse else []
    began = time.monotonic()
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        error = _wait(process, seconds)
    said: dict[str, Any] = {"seconds": round(time.monotonic() - began, 2)}
    if not error and process.returncode == 0 and into.exists():
        result = json.loads(into.read_text())
        if "left_out" in result:
            return {"outcome": "left out", **said, "reason": result["left_out"]}
        return {"outcome": "measured", **said, "result": result}
    words = log.read_text(errors="replace").strip()[-4000:]
    said |= {"outcome": "failed", "error": "\n".join(filter(None, [words, error])) or "it said nothing"}
    if partial.part_of(into).exists():
        said["result"] = json.loads(partial.part_of(into).read_text())
    return said


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for the end; why it was ended, if it was."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return f"it was ended after {seconds:.0f} s"
    return ""


def run_stage(name: str, sizes: Sizes, into: Path) -> None:
    """In the process of a stage: measure, and write the result. What is raised is the stage's error."""
    from importlib import import_module

    if name == "machine":
        found = machine()
    else:
        partial.keep_in(into)
        stage = STAGES[name]
        found = getattr(import_module(f"benchmarks.on_gpu.{stage.module}"), stage.function)(sizes)
    into.write_text(json.dumps(found))


def machine() -> dict[str, Any]:
    """The GPU, the host, and the versions of what takes part. Raises DeviceError without a GPU."""
    from coldstart.bench.machine import describe_machine
    from coldstart.devices.cuda_driver import open_gpu

    gpu = open_gpu(0)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "gpu": {
            "name": gpu.name,
            "capability": list(gpu.capability),
            "memory_bytes": gpu.memory().total_bytes,
            "driver": gpu.driver.version(),
            "kernel_module": kernel_module(),
            "count": gpu.driver.count(),
        },
        "host": describe_machine()._asdict(),
        "versions": versions,
    }


def kernel_module() -> str:
    """The version of NVIDIA's kernel module, "" where the system does not tell."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return found[0] if found else ""


def fakes(folder: Path) -> dict[str, str]:
    """Compile the fake libraries, and give the environment in which they are the real ones."""
    sys.path.insert(0, str(ROOT))
    from tests.fake_gpu.build import emulation
    from tests.fake_gpu.libraries import fake_cuda, fake_nvcomp

    libraries = folder / "fake-gpu"
    fake_cuda(libraries)
    fake_nvcomp(libraries)
    emulation(libraries)
    paths = [str(ROOT), str(ROOT / "tests" / "fake_gpu"), read_variable("PYTHONPATH") or ""]
    return {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def stem_of(options: argparse.Namespace, gpu: Mapping[str, Any]) -> Path | None:
    """Where results go; None: nowhere."""
    if options.output:
        return Path(options.output)
    out = read_variable("OUT")
    if options.rehearse and not out:
        return None
    words = re.findall(r"[a-z0-9]+", str(gpu.get("name", "unknown")).lower())
    return (Path(out) if out else RESULTS) / f"gpu-{'rehearsal-' if options.rehearse else ''}{'-'.join(words)}"


def write(stem: Path | None, document: Mapping[str, Any]) -> None:
    if stem is None:
        return
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_name(f"{stem.name}.md").write_text(table.to_markdown(document))


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=_stages, default=DEFAULT, help=f"all, or some of {','.join(STAGES)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--output", metavar="STEM", help="results without their endings")
    parser.add_argument("--rehearse", action="store_true", help="on fakes, with tiny sizes")
    parser.add_argument("--stage", choices=("machine", *STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--into", default=os.devnull, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _stages(text: str) -> tuple[str, ...]:
    words = DEFAULT if text == "all" else tuple(text.split(","))
    unknown = [word for word in words if word not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return words


if __name__ == "__main__":
    sys.exit(main())
