"""Hundreds to thousands of starts and captures, and whether anything grows that should not.

    python benchmarks/soak.py [--starts N] [--processes N] [--store folder|s3] [--output FILE.json]

In one process: ``--starts`` workers one after another, each of which restores, answers, writes its start record and is closed;
every tenth makes and proves a new generation instead. Threads and fetcher processes fetch by turns. Across processes:
``--processes`` runs of ``coldstart run``, of which every tenth captures too. ``s3`` is moto's server in a process of its own.

Looked at after each start, when its worker is closed: resident memory, threads, descriptors and child processes of the
process; entries of its temporary folder, of /dev/shm and of the folder for restored files. At the end, of the store: every object
must be named by something (a blob by a manifest, a manifest by its generation, a record by its start), and nothing temporary may
lie about. A worker that is closed at once may leave without its record. Growth is the median of the last quarter less that of
the second, so what is kept once does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from coldstart.bench.machine import describe_machine
from coldstart.errors import ObjectMissingError, StoreError
from coldstart.repository import Repository
from coldstart.stores import StoreOptions, open_store

ROOT = Path(__file__).parent.parent
CAPTURE_EVERY = 10
MOST_GROWN = {"resident_kib": 16 << 10, "threads": 0, "descriptors": 0, "children": 0, "temporary": 0, "shared": 0}
"""How much each may grow over half of all starts. Memory has a level of its own that allocators reach slowly."""
KEYS = {"COLDSTART_ACCESS_KEY_ID": "id", "COLDSTART_SECRET_ACCESS_KEY": "secret", "COLDSTART_REGION": "us-east-1"}
HANDLER = """
from pathlib import Path
import numpy as np
from coldstart import coldstart

HERE = Path(__file__).parent

def load(ctx):
    ctx.keep(HERE / "words.txt")
    seed = int((HERE / "seed.txt").read_text())
    same = np.random.default_rng(0).standard_normal(1 << 18, dtype=np.float32)
    return {"same": same, "other": np.random.default_rng(seed).standard_normal(1 << 16, dtype=np.float32)}

def init(ctx, state):
    return {**state, "words": len(Path(ctx.files["words.txt"]).read_text())}

@coldstart("soak", load=load, init=init, warmup=[1], version="1")
def handler(event, model):
    return [float(model["same"].sum()), float(model["other"].sum()), model["words"]]
"""
WORKER = """
import gc, json, os, sys, threading, time
sys.path[:0] = [sys.argv[1], os.getcwd()]
starts, every = int(sys.argv[2]), int(sys.argv[3])
from coldstart import events
from coldstart.registry import enter_serving, forget_workers, worker_for
import served

over = threading.Event()
ended = []
def hear(event):
    if type(event) in (events.CaptureEnded, events.CaptureFailed):
        ended.append(repr(event))
        over.set()
events.bus.subscribe(hear)

def look():
    gc.collect()  # what only its cycles hold is no leak, and comes at moments of its own
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    return {
        "resident_kib": int(status["VmRSS"].split()[0]), "threads": int(status["Threads"]),
        "descriptors": len(os.listdir("/proc/self/fd")), "children": len(children),
        "temporary": len(os.listdir(os.environ["TMPDIR"])), "shared": len(os.listdir("/dev/shm")),
        "files": sum(len(names) for _, _, names in os.walk(os.environ["COLDSTART_FILES_FOLDER"])),
    }

kinds, samples, captures = {}, [], 0
for number in range(starts):
    captures_now = number % every == 0
    os.environ["COLDSTART_FRESH"] = "1" if captures_now else "0"
    os.environ["COLDSTART_FETCH_ENGINE"] = ("threads", "process")[number % 2]
    if captures_now:
        open("seed.txt", "w").write(str(number))
    over.clear()
    enter_serving()
    began = time.monotonic()
    worker = worker_for(served.handler.__coldstart__)
    served.handler({"id": "0", "input": 1})
    record = worker.record
    kinds[record["kind"]] = kinds.get(record["kind"], 0) + 1
    if captures_now:
        assert over.wait(300), "no capture"
        captures += ended[-1].startswith("CaptureEnded")
    worker = None
    forget_workers()
    samples.append({**look(), "seconds": time.monotonic() - began})
failed = [text for text in ended if "Failed" in text]
print(json.dumps({"kinds": kinds, "captures": captures, "failed": failed, "samples": samples}))
"""


def environment(folder: Path, store: str, endpoint: str) -> dict[str, str]:
    (folder / "tmp").mkdir(exist_ok=True)
    own = {
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder / "tmp"),
        "COLDSTART_STORE": store,
        "COLDSTART_FILES_FOLDER": str(folder / "files"),
        "COLDSTART_CAPTURE_IDLE_SECONDS": "0",
        "COLDSTART_LOG": "off",
        **({"COLDSTART_ENDPOINT_URL": endpoint, **KEYS} if endpoint else {}),
    }
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("COLDSTART_", "AWS_"))}
    return {**kept, **own}


def in_one_process(folder: Path, variables: dict[str, str], starts: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(ROOT), str(starts), str(CAPTURE_EVERY)],
        cwd=folder,
        env=variables,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"the process of the soak failed: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def across_processes(folder: Path, variables: dict[str, str], runs: int) -> dict:
    kinds: dict[str, int] = {}
    captures, seconds, left = 0, [], []
    for number in range(runs):
        captures_now = number % CAPTURE_EVERY == 0
        if captures_now:
            (folder / "seed.txt").write_text(str(10_000 + number))
        words = [
            sys.executable,
            "-m",
            "coldstart",
            "run",
            "served.py",
            "--json",
            *(["--fresh"] if captures_now else []),
        ]
        began = time.monotonic()
        done = subprocess.run(words, cwd=folder, env=variables, check=True, capture_output=True, text=True)
        seconds.append(time.monotonic() - began)
        document = json.loads(done.stdout.splitlines()[-1])
        kind = document["start"]["kind"]
        kinds[kind] = kinds.get(kind, 0) + 1
        captures += bool(captures_now and document["capture"]["published"])
        left.append({"temporary": len(os.listdir(folder / "tmp")), "shared": len(os.listdir("/dev/shm"))})
    return {
        "kinds": kinds,
        "captures": captures,
        "seconds": seconds,
        "left": left,
        "processes_left": _processes(folder),
    }


def _processes(folder: Path) -> int:
    """Processes that work in the folder and should have ended."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            count += os.readlink(f"/proc/{pid}/cwd") == str(folder)
        except OSError:
            continue
    return count


def strays(url: str, options: StoreOptions) -> dict:
    """Every object of the store, and those that nothing names."""
    store = open_store(url, options)
    repository = Repository(store)
    keys = {info.key for info in store.list("")}
    kinds: dict[str, int] = {}
    named: set[str] = set()
    for key in keys:
        kinds[key.split("/")[0]] = kinds.get(key.split("/")[0], 0) + 1
        if key.startswith("manifests/"):
            manifest = repository.manifest(key, name=key.split("/")[1])
            named |= {f"blobs/{chunk.blob[:2]}/{chunk.blob}" for chunk in manifest.chunks}
    stray = sorted(key for key in keys if key.startswith("blobs/") and key not in named)
    stray += sorted(key for key in keys if not key.startswith(("blobs/", "manifests/", "refs/", "starts/")))
    lacking = []
    for key in named:
        try:
            store.head(key)
        except ObjectMissingError:
            lacking.append(key)
    store.close()
    return {"objects": kinds, "stray": stray, "lacking": lacking}


def growth(samples: list[dict]) -> dict[str, float]:
    quarter = max(1, len(samples) // 4)
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    fields = [field for field in samples[0] if field != "seconds"]
    return {
        field: statistics.median(sample[field] for sample in last) - statistics.median(s[field] for s in second)
        for field in fields
    }


def moto(folder: Path) -> tuple[subprocess.Popen, str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    import boto3

    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="id", aws_secret_access_key="secret", region_name="us-east-1"
    )
    for _ in range(100):
        try:
            client.create_bucket(Bucket="soak")
            break
        except Exception:
            time.sleep(0.2)
    return server, endpoint


def soak(kind: str, starts: int, processes: int) -> dict:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="coldstart-soak-") as name:
        folder = Path(os.path.realpath(name))
        (folder / "served.py").write_text(HANDLER)
        (folder / "words.txt").write_text("word " * 1000)
        (folder / "seed.txt").write_text("0")
        server, endpoint = moto(Path(tempfile.gettempdir())) if kind == "s3" else (None, "")
        try:
            url = "s3://soak/prefix" if kind == "s3" else f"file://{folder}/store"
            variables = environment(folder, url, endpoint)
            one = in_one_process(folder, variables, starts)
            several = across_processes(folder, variables, processes)
            options = StoreOptions(endpoint, "us-east-1", "id", "secret") if endpoint else StoreOptions()
            found = strays(url, options)
        finally:
            if server is not None:
                server.send_signal(signal.SIGTERM)
                server.wait()
        temporary = [str(path) for path in folder.rglob(".tmp-*")]
    generations = one["captures"] + several["captures"]
    return {
        "store": kind,
        "starts": starts,
        "processes": processes,
        "seconds": round(time.monotonic() - began, 1),
        "kinds": one["kinds"],
        "kinds_across_processes": several["kinds"],
        "generations": generations,
        "failed_captures": one["failed"],
        "first": one["samples"][len(one["samples"]) // 4],
        "last": one["samples"][-1],
        "growth_over_half": growth(one["samples"]),
        "left_across_processes": {"first": several["left"][0], "last": several["left"][-1]} if processes else {},
        "processes_left": several["processes_left"],
        "temporary_files": temporary,
        **found,
        "expected": {"manifests": generations, "starts": starts + processes, "refs": 2},
        "resident_kib": [sample["resident_kib"] for sample in one["samples"]],
    }


def problems(result: dict) -> list[str]:
    """What is wrong, in words."""
    found = [
        f"{field} grew by {result['growth_over_half'][field]}"
        for field, most in MOST_GROWN.items()
        if result["growth_over_half"][field] > most
    ]
    found += [f"stray object {key}" for key in result["stray"]] + [f"lacking object {key}" for key in result["lacking"]]
    found += [f"temporary file {path}" for path in result["temporary_files"]] + result["failed_captures"]
    found += [
        f"{result['objects'].get(kind, 0)} {kind}, {count} were expected"
        for kind, count in result["expected"].items()
        if result["objects"].get(kind, 0) > count or (kind != "starts" and result["objects"].get(kind, 0) < count)
    ]
    left = result["left_across_processes"]
    if left and left["first"] != left["last"]:
        found.append(f"left behind across processes: {left}")
    if result["processes_left"]:
        found.append(f"{result['processes_left']} processes have not ended")
    return found


def table(results: list[dict]) -> str:
    machine = describe_machine()
    columns = (
        "store",
        "starts in one process",
        "runs of processes",
        "generations",
        "seconds",
        "memory KiB (first quarter, end)",
        "growth: memory KiB, threads, descriptors, children, temporary, /dev/shm",
        "stray objects",
        "problems",
    )
    lines = [
        "# Soak: starts and captures without end",
        "",
        f"Machine: {machine.processor}, {machine.cores:g} cores, Python {machine.python}.",
        "",
        (__doc__ or "").split("\n\n", 2)[2],
        "",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]
    for result in results:
        grown = result["growth_over_half"]
        shown = ", ".join(f"{grown[field]:g}" for field in MOST_GROWN)
        lines.append(
            f"| {result['store']} | {result['starts']} | {result['processes']} | {result['generations']} |"
            f" {result['seconds']} | {result['first']['resident_kib']}, {result['last']['resident_kib']} | {shown} |"
            f" {len(result['stray'])} | {'; '.join(result['problems']) or 'none'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Starts and captures without end: does anything grow?")
    parser.add_argument("--starts", type=int, default=400)
    parser.add_argument("--processes", type=int, default=30)
    parser.add_argument("--store", choices=("folder", "s3", "both"), default="both")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    for kind in ("folder", "s3") if options.store == "both" else (options.store,):
        try:
            result = soak(kind, options.starts, options.processes)
        except StoreError as error:
            sys.exit(f"the store failed: {error}")
        result["problems"] = problems(result)
        results.append(result)
        print(json.dumps({key: value for key, value in result.items() if key != "resident_kib"}, indent=1))
    if options.output:
        options.output.write_text(
            json.dumps({"machine": describe_machine()._asdict(), "results": results}, indent=1) + "\n"
        )
        options.output.with_suffix(".md").write_text(table(results))
    return 1 if any(result["problems"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
