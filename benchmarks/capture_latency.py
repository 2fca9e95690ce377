"""What requests notice of a capture: their p50 and p95 while a generation is made, against without.

    python benchmarks/capture_latency.py [--rounds N] [--megabytes N] [--against CHECKOUT] [--output FILE.json]

``--against`` is another checkout of this project, whose rounds alternate with ours; beside FILE.json its table is written as
FILE.md.

A real worker process (the decorator, a folder store) answers one request after another, without a gap or with one as long
as an answer. Every round is a process of its own with an empty store: requests without a capture, a pause that lets the capture
begin, requests while the generation is written (hashed, encoded, stored), then while it is proven, requests without a capture
again. A round's ratio has the windows before and after below the line. The pause is no part of any window.

Memory is sampled from outside, twenty times a second: of the worker over what it had before the capture, and of its children.
The process that proves holds a state of its own, as any worker does, so it counts apart from the one that saves.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from coldstart.bench.machine import describe_machine

ROOT = Path(__file__).parent.parent
ROUND_SECONDS = 170.0
SAMPLE_SECONDS = 0.05
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

HANDLER = '''
"""A state of bf16 weights, of fp32 weights, and some norms; answers come from the fp32 weights."""

import os

import torch

if {threads}:
    torch.set_num_threads({threads})

from coldstart import coldstart

WIDTH, DEPTH, NORMS = 1024, {depth}, 256
WIDE = {megabytes} * 1_000_000 // (2 * WIDTH * 4096)


def load():
    torch.manual_seed(0)
    torch.set_default_device("{device}")
    wide = [(torch.randn(4096, WIDTH) * 0.02).to(torch.bfloat16) for _ in range(WIDE)]
    layers = [torch.randn(WIDTH, WIDTH) * 0.03 for _ in range(DEPTH)]
    return {{"wide": wide, "layers": layers, "norms": [torch.ones(WIDTH) for _ in range(NORMS)]}}


@coldstart("capture-latency", load=load, warmup=[{{"rows": 8}}])
def handler(event, model):
    with torch.inference_mode():
        x = torch.linspace(-1, 1, event["input"]["rows"] * WIDTH, device="{device}").reshape(-1, WIDTH)
        for layer, norm in zip(model["layers"], model["norms"]):
            x = torch.tanh(x @ layer) * norm
        return float(x.sum())
'''

WORKER = """
import json, sys, time

sys.path.insert(0, sys.argv[1])
from coldstart import coldstart, events
import served

spec = json.loads(sys.argv[2])
seen = {}
events.bus.subscribe(lambda event: seen.setdefault(type(event).__name__, (time.time(), event)))
event = {"id": "0", "input": {"rows": spec["rows"]}}
samples = []


def stream(seconds, until=None):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and not (until and until()):
        began = time.time()
        t = time.perf_counter()
        served.handler(event)
        samples.append((began, time.perf_counter() - t))
        if spec["gap_seconds"]:
            time.sleep(spec["gap_seconds"])


def over():
    return "CaptureEnded" in seen or "CaptureFailed" in seen


served.handler(event)
stream(2.0)
samples.clear()
stream(spec["window_seconds"])
assert "CaptureBegan" not in seen
pause = time.time()
print(json.dumps({"mark": "pause"}), flush=True)
while "CaptureBegan" not in seen:
    time.sleep(0.001)
    assert time.time() - pause < 30, seen
stream(spec["limit_seconds"], over)
ended = time.time()
stream(0.5)
resumed = len(samples)
stream(spec["window_seconds"])
name = lambda kind: repr(seen[kind][1]) if kind in seen else ""
print(json.dumps({
    "samples": samples, "began": seen["CaptureBegan"][0], "ended": ended, "resumed": samples[resumed][0],
    "outcome": name("CaptureEnded") or name("CaptureFailed"),
    "published": "CaptureEnded" in seen,
    "written_bytes": seen["CaptureEnded"][1].written_bytes if "CaptureEnded" in seen else 0,
    "raw_bytes": seen["CaptureEnded"][1].raw_bytes if "CaptureEnded" in seen else 0,
}), flush=True)
"""


class Memory:
    """Resident bytes of a worker and of its children, by what they are, sampled until ``stop``."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stopping = threading.Event()
        self.before_bytes = 0
        self.peaks = {"worker": 0, "saver": 0, "proof": 0}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def mark(self) -> None:
        """What the worker has now is what it has without a capture."""
        self.before_bytes = self._resident(self._pid)
        self.peaks = dict.fromkeys(self.peaks, 0)

    def stop(self) -> dict[str, int]:
        """Peak bytes: of the worker over the mark, of what saves, of what proves."""
        self._stopping.set()
        self._thread.join()
        return {**self.peaks, "worker": max(0, self.peaks["worker"] - self.before_bytes)}

    def _run(self) -> None:
        while not self._stopping.wait(SAMPLE_SECONDS):
            self._note("worker", self._pid)
            for child in self._children():
                if what := self._kind_of(child):
                    self._note(what, child)

    def _note(self, what: str, pid: int) -> None:
        self.peaks[what] = max(self.peaks[what], self._resident(pid))

    def _children(self) -> list[int]:
        found: list[int] = []
        try:
            for task in os.listdir(f"/proc/{self._pid}/task"):
                found += map(int, Path(f"/proc/{self._pid}/task/{task}/children").read_text().split())
        except OSError:
            pass
        return found

    @staticmethod
    def _kind_of(pid: int) -> str:
        """What a child is by its command; "" while it still shares its parent's memory."""
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return ""
        return "proof" if b"\0prove\0" in command else "saver" if b"coldstart.save.child" in command else ""

    @staticmethod
    def _resident(pid: int) -> int:
        try:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
        except (OSError, ValueError, IndexError):
            return 0


def run_round(options: argparse.Namespace, folder: Path, gap_seconds: float, tree: Path) -> dict:  # type: ignore[type-arg]
    """One worker process, from its start to its end."""
    (folder / "served.py").write_text(
        HANDLER.format(megabytes=options.megabytes, depth=options.depth, threads=options.threads, device=options.device)
    )
    (folder / "worker.py").write_text(WORKER)
    spec = {
        "rows": options.rows,
        "gap_seconds": gap_seconds,
        "window_seconds": options.window_seconds,
        "limit_seconds": 100.0,
    }
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH", "")])),
        "COLDSTART_STORE": f"file://{folder}/store",
        "COLDSTART_FILES_FOLDER": f"{folder}/files",
        "COLDSTART_DEVICE": options.device,
        "COLDSTART_CAPTURE_IDLE_SECONDS": "0.5",
        "COLDSTART_LOG": "off",
    }
    process = subprocess.Popen(
        [sys.executable, str(folder / "worker.py"), str(folder), json.dumps(spec)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,
    )
    timer = threading.Timer(ROUND_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    memory = Memory(process.pid)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        memory.mark()
        result: dict = json.loads(process.stdout.readline())  # type: ignore[type-arg]
        result["memory_bytes"] = memory.stop()
        process.wait(30)
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    manifests = [path for path in (folder / "store" / "manifests").rglob("*") if path.is_file()]
    result["written"] = min(path.stat().st_mtime for path in manifests) if manifests else result["ended"]
    return result


def percentile(samples: list[float], fraction: float) -> float:
    """By linear interpolation between neighbours."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * fraction
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def windows(result: dict) -> dict[str, list[float]]:  # type: ignore[type-arg]
    """Request seconds by window: without a capture, while one is written, while it is proven, during all of it."""
    found: dict[str, list[float]] = {"without": [], "written": [], "proven": [], "during": []}
    for began, seconds in result["samples"]:
        if began < result["began"] or began >= result["resumed"]:
            found["without"].append(seconds)
        elif began < result["ended"]:
            found["written" if began < result["written"] else "proven"].append(seconds)
            found["during"].append(seconds)
    return found


def figures(result: dict) -> dict:  # type: ignore[type-arg]
    """What one round says: milliseconds and ratios by window, seconds of each part, bytes."""
    by_window = windows(result)
    row: dict = {  # type: ignore[type-arg]
        "published": result["published"],
        "outcome": result["outcome"],
        "write_seconds": result["written"] - result["began"],
        "proof_seconds": result["ended"] - result["written"],
        "raw_bytes": result["raw_bytes"],
        "written_bytes": result["written_bytes"],
        "memory_bytes": result["memory_bytes"],
        "windows": {},
    }
    for window, samples in by_window.items():
        if not samples:
            continue
        row["windows"][window] = {
            "requests": len(samples),
            "p50_ms": 1000 * percentile(samples, 0.50),
            "p95_ms": 1000 * percentile(samples, 0.95),
            "p99_ms": 1000 * percentile(samples, 0.99),
            "max_ms": 1000 * max(samples),
        }
    base = row["windows"]["without"]
    for found in row["windows"].values():
        for name in ("p50", "p95", "p99"):
            found[f"{name}_ratio"] = found[f"{name}_ms"] / base[f"{name}_ms"]
    return row


def summary(rows: list[dict]) -> dict:  # type: ignore[type-arg]
    """Medians over rounds, window by window."""
    found: dict = {"rounds": len(rows), "published": sum(row["published"] for row in rows), "windows": {}}  # type: ignore[type-arg]
    for name in ("write_seconds", "proof_seconds", "raw_bytes", "written_bytes"):
        found[name] = statistics.median(row[name] for row in rows)
    found["memory_bytes"] = {
        what: max(row["memory_bytes"][what] for row in rows) for what in ("worker", "saver", "proof")
    }
    for window in ("without", "written", "proven", "during"):
        there = [row["windows"][window] for row in rows if window in row["windows"]]
        if there:
            found["windows"][window] = {name: statistics.median(each[name] for each in there) for name in there[0]}
            found["windows"][window]["p95_ratios"] = [round(each["p95_ratio"], 3) for each in there]
    return found


def show(name: str, found: dict) -> None:  # type: ignore[type-arg]
    memory = {what: f"{bytes_ / 1e6:.0f}" for what, bytes_ in found["memory_bytes"].items()}
    print(
        f"{name}: {found['published']}/{found['rounds']} published, {found['raw_bytes'] / 1e6:.0f} MB of state, "
        f"{found['written_bytes'] / 1e6:.0f} MB stored, written in {found['write_seconds']:.1f} s, "
        f"proven in {found['proof_seconds']:.1f} s, peak MB {memory}"
    )
    for window, row in found["windows"].items():
        print(
            f"  {window:8} n={row['requests']:<6.0f} p50 {row['p50_ms']:7.2f}  p95 {row['p95_ms']:7.2f}  "
            f"p99 {row['p99_ms']:7.2f}  max {row['max_ms']:7.2f} ms   ratios {row['p50_ratio']:.3f} "
            f"{row['p95_ratio']:.3f} {row['p99_ratio']:.3f}  p95 by round {row['p95_ratios']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=256, help="of bf16 weights")
    parser.add_argument("--depth", type=int, default=16, help="fp32 layers of 4 MB")
    parser.add_argument("--rows", type=int, default=96, help="rows of a request: its work")
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where the state is")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as it takes by itself")
    parser.add_argument("--window-seconds", type=float, default=4.0)
    parser.add_argument("--streams", default="back-to-back,half", help="which of back-to-back and half")
    parser.add_argument("--gap-seconds", type=float, default=0.010, help="between requests of the stream `half`")
    parser.add_argument("--against", type=Path, help="another checkout, to alternate with")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a worker is ended with its benchmark
    gaps = {"back-to-back": 0.0, "half": options.gap_seconds}
    trees = {"": ROOT, **({" (against)": options.against} if options.against else {})}
    sides = [(name + side, gaps[name], tree) for name in options.streams.split(",") for side, tree in trees.items()]
    rows: dict[str, list] = {name: [] for name, _, _ in sides}  # type: ignore[type-arg]
    for number in range(options.rounds):
        for name, gap_seconds, tree in sides:
            with tempfile.TemporaryDirectory(prefix="coldstart-capture-") as folder:
                row = figures(run_round(options, Path(folder), gap_seconds, tree))
            rows[name].append(row)
            show(f"round {number + 1} {name}", summary([row]))
    results = {name: {**summary(found), "each": found} for name, found in rows.items()}
    for name, result in results.items():
        show(f"median {name}", result)
    if options.output:
        load = os.getloadavg()
        setup = {name: value for name, value in vars(options).items() if name not in ("output", "against")}
        document = {"machine": describe_machine()._asdict(), "setup": setup, "load": load, "results": results}
        options.output.write_text(json.dumps(document, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(report(document))


def report(document: dict) -> str:  # type: ignore[type-arg]
    """The table of a run, for people."""
    machine, setup = document["machine"], document["setup"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    about = (
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / (1 << 30):.1f} GiB, "
        f"{machine['system']}, Python {machine['python']}, {packages}. Load average at the end: {document['load'][0]:.1f}."
    )
    how = (
        f"Each round is a worker of its own with {setup['megabytes']} MB of bf16 weights, {setup['depth'] * 4} MiB of fp32 "
        f"weights and an empty folder store; torch has {setup['threads'] or 'its own number of'} thread(s). Ratios are against "
        "the same process' requests before and after the capture. Medians of rounds; `against` is another checkout."
    )
    head = ["stream", "window", "requests", "p50 ms", "p95 ms", "p50 ratio", "p95 ratio", "p95 ratio by round"]
    lines = ["# Requests while a generation is captured", "", about, "", how, "", f"| {' | '.join(head)} |"]
    lines.append("| --- " * len(head) + "|")
    for name, result in document["results"].items():
        for window, row in result["windows"].items():
            by_round = ", ".join(f"{ratio:.2f}" for ratio in row["p95_ratios"])
            lines.append(
                f"| {name} | {window} | {row['requests']:.0f} | {row['p50_ms']:.2f} | {row['p95_ms']:.2f} | "
                f"{row['p50_ratio']:.2f} | {row['p95_ratio']:.2f} | {by_round} |"
            )
    lines.append("")
    for name, result in document["results"].items():
        memory = result["memory_bytes"]
        lines.append(
            f"- {name}: {result['published']} of {result['rounds']} published, {result['written_bytes']:,.0f} of "
            f"{result['raw_bytes']:,.0f} bytes stored; written in {result['write_seconds']:.1f} s, proven in "
            f"{result['proof_seconds']:.1f} s; at most {memory['worker'] / 1e6:.0f} MB more in the worker, "
            f"{memory['saver'] / 1e6:.0f} MB in the saver, {memory['proof'] / 1e6:.0f} MB in the proof"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
