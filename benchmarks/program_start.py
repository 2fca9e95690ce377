"""A start with a program against its floor: the same handler written by hand, and the same snapshot without its program.

    PYTHONPATH=. python benchmarks/program_start.py [--rounds N] [--output FILE.json]

The floor is MiniLM as somebody would write it who knows all this: tokenizer, runtime and a session from a local file, one
answer. Its graph is the very one that the snapshot holds, optimised for this machine, its weights an external file. Both
get the same text, in fresh interpreters with compiled bytecode, alternately; times run from just before the spawn to the
first answer. Memory is that of the process after 20 more answers: anonymous pages by the kernel's account, and the
weights as often as they are mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import config
from coldstart.bench.machine import describe_machine
from coldstart.manifest import manifest_from_json, ref_from_json
from coldstart.programs.record import consumer_of, programs_of
from coldstart.repository import Repository
from coldstart.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).parent.parent
HANDLER = ROOT / "handlers" / "minilm.py"
INPUT = {"texts": ["a"]}
WARM = 20
LIMIT_SECONDS = 120.0
GOALS = {"over the floor": 1.25, "of ours before the answer, ms": 60.0}

FLOOR = """
import json, sys, time
import numpy as np
from tokenizers import Tokenizer
import onnxruntime

folder, texts = sys.argv[1], json.loads(sys.argv[2])["texts"]
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.enable_truncation(256)
tokenizer.enable_padding()
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
options.log_severity_level = 3
session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
names = [each.name for each in session.get_inputs()]

def answer():
    batch = tokenizer.encode_batch(texts)
    arrays = [np.array([getattr(each, name) for each in batch]) for name in ("ids", "attention_mask")]
    return session.run(None, dict(zip(names, arrays)))[0].tolist()

first = answer()
answered = time.monotonic()
warm = []
for _ in range(int(sys.argv[3])):
    began = time.perf_counter(); answer(); warm.append(time.perf_counter() - began)
print(json.dumps({"output": {"embeddings": first}, "answered": answered, "warm_seconds": warm}))
"""

MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__") if sys.argv[0].endswith(".py") else runpy.run_module(
        sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    sys.stdout.flush()
    lines = open("/proc/self/smaps_rollup").read().splitlines()[1:]
    print({line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}, file=sys.stderr)
"""
"""Runs a script or a module, and says at its end what memory the process has, in KiB."""


class Sample(NamedTuple):
    """One process: seconds to the first answer, to a warm one, and what it said."""

    first_seconds: float
    warm_seconds: float
    document: Mapping[str, Any]
    memory_kib: Mapping[str, int]


def main() -> None:
    """Measure and print; write the file that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="program-start-") as name:
        folder = Path(name)
        base = _environment(folder)
        prepared = prepare(folder, base)
        contenders = _contenders(folder, base)
        samples: dict[str, list[Sample]] = {each: [] for each in contenders}
        for number in range(options.rounds + 1):
            for each, run in contenders.items():
                sample = run()
                if number:
                    samples[each].append(sample)
            print(f"round {number}/{options.rounds}", file=sys.stderr, flush=True)
        imports = _imports(base)
    result = summary(samples, prepared, imports)
    print(report(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(report(result) + "\n")


def prepare(folder: Path, base: Mapping[str, str]) -> dict[str, int]:
    """Make the snapshot with its program, and of it the floor's files. Gives the stored bytes without and with it."""
    document = _json(_run([sys.executable, "-m", "coldstart", "run", str(HANDLER), "--json"], base))
    for capture in document["captures"]:
        if not capture["published"]:
            raise SystemExit(f"no snapshot to measure: {capture['reason']}")
    repository = Repository(open_store(base["COLDSTART_STORE"]))
    ref = ref_from_json(next((folder / "store" / "refs" / "minilm").glob("[0-9a-f]*")).read_bytes())
    manifest = manifest_from_json(repository.store.get(ref.manifest).data)
    _write_floor(folder / "floor", manifest, base)
    without, with_program = (capture["stored_bytes"] for capture in document["captures"])
    return {"arrays_stored_bytes": without, "program_stored_bytes": with_program, "raw_bytes": manifest.raw_bytes}


def _write_floor(target: Path, manifest: Any, base: Mapping[str, str]) -> None:
    """The floor's files: the program's graph with its weights in one external file, and the tokenizer."""
    import onnx

    from coldstart.devices.cpu import CpuDevice
    from coldstart.fetch import FetchRequest, start_threads

    arena = CpuDevice().allocate([segment.length_bytes for segment in manifest.segments])
    store = open_store(base["COLDSTART_STORE"])
    start_threads(FetchRequest(manifest, store, arena, 8, 192 << 20)).wait()
    target.mkdir()
    program = programs_of(manifest.programs)[0]
    for entry in manifest.files:
        data = bytes(arena.readable(entry.segment)[entry.offset_bytes :][: entry.length_bytes])
        if entry.root == consumer_of(program.id):
            graph = onnx.load_model_from_string(data)
        else:
            (target / Path(entry.name).name).write_bytes(data)
    buffers = {buffer.name: buffer for buffer in manifest.buffers}
    places = {place.name: place for place in program.entries[0].constants}
    with (target / "weights").open("wb") as file:
        for tensor in graph.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            buffer, place = buffers[places[tensor.name].buffer], places[tensor.name]
            held = {each.key: each for each in tensor.external_data}
            begin = buffer.offset_bytes + place.offset_bytes
            file.write(bytes(-file.tell() % 4096))
            held["location"].value, held["offset"].value = "weights", str(file.tell())
            file.write(arena.readable(buffer.segment)[begin : begin + int(held["length"].value)])
    (target / "model.onnx").write_bytes(graph.SerializeToString())
    (target.parent / "floor.py").write_text(FLOOR)


def _contenders(folder: Path, base: Mapping[str, str]) -> dict[str, Callable[[], Sample]]:
    floor = [str(folder / "floor.py"), str(folder / "floor"), json.dumps(INPUT), str(WARM)]
    ours = [
        "coldstart",
        "run",
        str(HANDLER),
        "--json",
        "--no-wait",
        "--repeat",
        str(WARM),
        "--input",
        json.dumps(INPUT),
    ]
    return {
        "floor": lambda: _sample(floor, base, "answered", ""),
        "program": lambda: _sample(ours, base, "first_answer_monotonic_seconds", "program"),
        "restored": lambda: _sample(
            ours, {**base, "COLDSTART_PROGRAMS": "off"}, "first_answer_monotonic_seconds", "restored"
        ),
    }


def _environment(folder: Path) -> dict[str, str]:
    return config.child_environment(
        {
            "COLDSTART_STORE": f"file://{folder / 'store'}",
            "COLDSTART_FILES_FOLDER": str(folder / "files"),
            "COLDSTART_CAPTURE_WAIT_SECONDS": "1800",
            "PYTHONDONTWRITEBYTECODE": "",
        }
    )


def _sample(arguments: list[str], environment: Mapping[str, str], answered: str, kind: str) -> Sample:
    began = time.monotonic()
    done = _run([sys.executable, "-c", MEASURED, *arguments], environment)
    document = _json(done)
    if kind and (document["start"]["kind"] != "restored" or bool(document["start"]["program"]) != (kind == "program")):
        raise SystemExit(
            f"{kind} went otherwise: {document['start']['reason']} {document['start']['program_obstacle']}"
        )
    memory = json.loads(done.stderr.strip().splitlines()[-1].replace("'", '"'))
    warm = statistics.median(document["warm_seconds"])
    return Sample(document[answered] - began, warm, document, memory)


def _run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return done


def _json(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout[done.stdout.index("{") :])


def _imports(base: Mapping[str, str]) -> dict[str, float]:
    """Where the milliseconds before the first answer went, by whose they are, in one start that says so."""
    ours = [sys.executable, "-m", "coldstart", "run", str(HANDLER), "--json", "--no-wait", "--timeline"]
    found = [_json(_run(ours, base)) for _ in range(5)]
    owners: dict[str, list[float]] = {}
    for document in found:
        for owner, seconds in _owners(document["imports"]).items():
            owners.setdefault(owner, []).append(1000 * seconds)
        spans = {span["name"]: span["ended_seconds"] - span["began_seconds"] for span in document["start"]["spans"]}
        bookkeeping = sum(spans.get(name, 0.0) for name in ("key from source", "key from functions", "place files"))
        owners.setdefault("keys and files", []).append(1000 * bookkeeping)
    return {owner: statistics.median(milliseconds) for owner, milliseconds in owners.items()}


def _owners(imports: Mapping[str, Any]) -> dict[str, float]:
    return {f"imports of the {owner}": float(seconds) for owner, seconds in imports["owners"].items()}


def summary(
    samples: Mapping[str, list[Sample]], prepared: Mapping[str, int], imports: Mapping[str, float]
) -> dict[str, Any]:
    """Medians, and ratios pair by pair."""
    first = {name: [each.first_seconds for each in found] for name, found in samples.items()}
    ratios = [ours / floor for ours, floor in zip(first["program"], first["floor"], strict=True)]
    numbers = [
        abs(one - other)
        for mine, theirs in zip(samples["program"], samples["floor"], strict=True)
        for a, b in zip(mine.document["output"]["embeddings"], theirs.document["output"]["embeddings"], strict=True)
        for one, other in zip(a, b, strict=True)
    ]
    return {
        "machine": str(describe_machine()),
        "rounds": len(ratios),
        "first_answer_seconds": {name: _spread(values) for name, values in first.items()},
        "warm_ms": {
            name: 1000 * statistics.median(each.warm_seconds for each in found) for name, found in samples.items()
        },
        "program_over_floor": _spread(ratios),
        "anonymous_mib": {
            name: statistics.median(each.memory_kib["Anonymous"] for each in found) / 1024
            for name, found in samples.items()
        },
        "proportional_mib": {
            name: statistics.median(each.memory_kib["Pss"] for each in found) / 1024 for name, found in samples.items()
        },
        "stored": dict(prepared),
        "largest_difference": max(numbers),
        "before_the_answer_ms": dict(imports),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def report(result: Mapping[str, Any]) -> str:
    """What a person reads."""
    first, stored = result["first_answer_seconds"], result["stored"]
    lines = [
        f"# A start with a program, MiniLM ({result['machine']}, {result['rounds']} alternating rounds)",
        "",
        "| who | first answer, s: median (least to most) | warm, ms | anonymous memory, MiB | its share of all, MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {each['median']:.3f} ({each['least']:.3f} to {each['most']:.3f}) | {result['warm_ms'][name]:.2f}"
        f" | {result['anonymous_mib'][name]:.0f} | {result['proportional_mib'][name]:.0f} |"
        for name, each in first.items()
    ]
    ratio, bytes_ratio = result["program_over_floor"], stored["program_stored_bytes"] / stored["arrays_stored_bytes"]
    found = (
        f"program / floor {ratio['median']:.2f} pair by pair ({ratio['least']:.2f} to {ratio['most']:.2f});"
        f" largest difference of their answers {result['largest_difference']:.1e}; stored bytes with the program over without"
        f" {bytes_ratio:.2f}."
    )
    spent = ", ".join(f"{what} {milliseconds:.0f}" for what, milliseconds in result["before_the_answer_ms"].items())
    lines += [
        "",
        found,
        "",
        "Before the first answer, ms in one start that was timed import by import (median of 5): " + spent + ".",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
