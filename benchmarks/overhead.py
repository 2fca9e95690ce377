"""What coldstart itself costs: its import, a warm call through the decorator, the bookkeeping of a start.

    python benchmarks/overhead.py [--rounds N] [--output FILE.json]

Both sides of each figure run alternately in one run; medians of rounds are reported. Import times are whole processes
(``python -c ...``) less a bare interpreter beside them, with compiled bytecode in place.
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

from coldstart.bench.machine import describe_machine

HANDLER = """
from coldstart import coldstart

def load(ctx):
    return {"scale": 2.0}

@coldstart("overhead", load=load, warmup=[1])
def handler(event, model):
    return event["input"] * model["scale"]
"""
CALLS = 20_000


def spawn_seconds(code: str) -> float:
    """Wall seconds of one interpreter that runs ``code``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    return time.perf_counter() - began


def import_cost(rounds: int) -> dict[str, float]:
    """Milliseconds over a bare interpreter for the decorator's import, pair by pair."""
    code = "from coldstart import coldstart"
    spawn_seconds(code)  # compiles the bytecode
    pairs = [(spawn_seconds("pass"), spawn_seconds(code)) for _ in range(rounds)]
    return {
        "bare_interpreter_ms": 1000 * statistics.median(bare for bare, _ in pairs),
        "import_coldstart_over_bare_ms": 1000 * statistics.median(loaded - bare for bare, loaded in pairs),
    }


def warm_call_cost(rounds: int) -> dict[str, float]:
    """Microseconds of a call through the decorator over the bare function, both in alternating batches."""
    from coldstart import coldstart

    @coldstart("overhead-warm", load=lambda: 2.0, version="1")
    def handler(event: dict[str, float], model: float) -> float:
        return event["input"] * model

    event = {"id": "0", "input": 1.0}
    handler(event)
    differences, bare_each = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(CALLS):
            handler.run(event, 2.0)
        middle = time.perf_counter()
        for _ in range(CALLS):
            handler(event)
        ended = time.perf_counter()
        bare_each.append((middle - began) / CALLS)
        differences.append((ended - middle - (middle - began)) / CALLS)
    return {
        "bare_call_us": 1e6 * statistics.median(bare_each),
        "decorator_over_bare_us": 1e6 * statistics.median(differences),
    }


def bookkeeping_cost(rounds: int) -> dict[str, float]:
    """Milliseconds from the beginning of the key's computation to ready, in a restored start with nothing to load."""
    with tempfile.TemporaryDirectory(prefix="coldstart-overhead-") as folder:
        path = Path(folder) / "overhead.py"
        path.write_text(HANDLER)
        environment = dict(
            os.environ, COLDSTART_STORE=f"file://{folder}/store", COLDSTART_FILES_FOLDER=f"{folder}/files"
        )
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, "-m", "coldstart", "run", str(path), "--json"]
        records = []
        for _ in range(rounds + 1):
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            records.append(json.loads(done.stdout)["start"])
    restored = [record for record in records if record["kind"] == "restored"]
    begun = [min(span["began_seconds"] for span in record["spans"]) for record in restored]
    work = [_own_seconds(record) for record in restored]
    return {
        "interpreter_and_our_imports_ms": 1000 * statistics.median(begun),
        "bookkeeping_without_imports_ms": 1000 * statistics.median(work),
        "ready_ms": 1000 * statistics.median(record["ready_seconds"] for record in restored),
    }


def _own_seconds(record: dict) -> float:  # type: ignore[type-arg]
    """What the start's thread itself spends: keys, binding, phases; without waiting for the store or the import."""
    own = ("key from source", "key from functions")
    spans = sum(item["ended_seconds"] - item["began_seconds"] for item in record["spans"] if item["name"] in own)
    return spans + sum(item["ended_seconds"] - item["began_seconds"] for item in record["phases"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = {
        **import_cost(options.rounds),
        **warm_call_cost(options.rounds),
        **bookkeeping_cost(options.rounds),
    }
    for name, value in results.items():
        print(f"{name:36} {value:9.2f}")
    if options.output:
        options.output.write_text(
            json.dumps({"machine": describe_machine()._asdict(), "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
