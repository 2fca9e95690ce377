"""Restoring from flat files of segments: mapped and verified, against a fetch from a folder and from the local cache.

    PYTHONPATH=. python benchmarks/mapped_segments.py [--mib N] [--rounds N] [--output FILE.json]

Every trial is a fresh process that restores one state of bf16 weights from this machine's disk cache, by turns in rounds;
round 0 is not counted. Seconds run from the allocation or mapping to a sealed arena of which every chunk is verified,
imports excluded; then all of it is read once, which is where a mapping pays for its pages, and hashed outside the clock: every
trial must have the captured bytes. "Beside torch" is the wall time of the restore in a thread while the main thread
imports torch, from before both to after both. Memory is the proportional set size of two workers that hold the restored
state at the same time, less that of two that hold none; pages that they share count once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldstart.bench.machine import describe_machine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from coldstart.manifest import Manifest
    from coldstart.stores.base import Store

ROOT = Path(__file__).parent.parent
CODECS = ("raw", "planes+zstd")
WAYS = ("folder, process", "folder, threads", "cache, threads", "mapped")
BESIDE = ("import alone", "folder, process", "mapped")
LIMIT_SECONDS = 120.0
THREADS, BUDGET_BYTES, CACHE_BYTES = 8, 256 << 20, 1 << 40


# --- one trial, in a process of its own ------------------------------------------------------------------------------


def open_way(way: str, folder: Path) -> Store:
    """The store that a way of restoring reads."""
    from coldstart.stores.cached import CachedStore
    from coldstart.stores.local import LocalStore

    store = LocalStore(folder / "store")
    return CachedStore(store, str(folder / "cache"), limit_bytes=CACHE_BYTES) if way.startswith("cache") else store


def restore(way: str, folder: Path, manifest: Manifest) -> Any:
    """A sealed arena with the state, every chunk of which was verified."""
    from coldstart.devices.cpu import CpuDevice
    from coldstart.fetch import Address, FetchRequest, start_fetch
    from coldstart.segments import map_segments
    from coldstart.stores import StoreOptions

    store, device = open_way(way, folder), CpuDevice()
    if way == "mapped":
        mapped = map_segments(manifest, store, device, threads=THREADS, degraded=fail)
        assert mapped is not None
        arena = mapped.arena
    else:
        arena = device.allocate([segment.length_bytes for segment in manifest.segments])
        address = Address(store.url, StoreOptions())
        request = FetchRequest(manifest, store, arena, THREADS, BUDGET_BYTES, address=address)
        engine = way.partition(", ")[2]
        report = start_fetch(request, engine=engine).wait()
        assert report.engine == engine, report
    arena.seal()
    return arena


def fail(reason: str) -> None:
    """Nothing may degrade here."""
    raise SystemExit(reason)


def trial(way: str, folder: Path, *, beside: bool, hold: bool) -> None:
    """Restore once, print what it took, and wait for the end of standard input if the state is to be held."""
    import numpy as np
    from blake3 import blake3

    import coldstart.codecs.planes
    import coldstart.devices.cpu
    import coldstart.fetch.process
    import coldstart.segments
    import coldstart.stores.cached
    import coldstart.stores.local  # noqa: F401
    from coldstart.manifest import manifest_from_json

    manifest = manifest_from_json((folder / "manifest.json").read_bytes())
    arenas: list[Any] = []

    def work() -> None:
        if way not in ("import alone", "idle"):
            arenas.append(restore(way, folder, manifest))

    before = _processor_seconds()
    began = time.perf_counter()
    if beside:
        thread = threading.Thread(target=work)
        thread.start()
        import torch  # noqa: F401

        thread.join()
    else:
        work()
    seconds = time.perf_counter() - began
    processor_seconds = _processor_seconds() - before
    result = {"seconds": seconds, "processor_seconds": processor_seconds}
    for arena in arenas:
        arrays = [arena.array(index, 0, length) for index, length in enumerate(arena.segment_bytes)]
        began = time.perf_counter()
        for array in arrays:
            int(array.view(np.uint64).max(initial=0))
        result["first_pass_seconds"] = time.perf_counter() - began
        hasher = blake3()
        for array in arrays:
            hasher.update(array)
        assert hasher.hexdigest() == (folder / "digest").read_text(), way
    print(json.dumps(result), flush=True)
    if hold:
        sys.stdin.read()


def _processor_seconds() -> float:
    """Processor time of this process and of the children that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


# --- all trials ------------------------------------------------------------------------------------------------------


def prepare(folder: Path, codec: str, mib: int) -> dict[str, Any]:
    """Store a generation, fill the cache, and have its flat files written; sizes and what writing them took."""
    import numpy as np
    from blake3 import blake3

    from coldstart.devices.cpu import CpuDevice
    from coldstart.fetch import FetchRequest, start_threads
    from coldstart.manifest import manifest_to_json
    from coldstart.repository import Repository
    from coldstart.segments import keep_segments
    from tests.generations import capture_of, write

    count = mib << 19
    random = np.random.default_rng(1)
    weights = np.empty(count, np.uint16)
    for begin in range(0, count, 1 << 22):  # bf16: the upper half of float32
        values = random.standard_normal(min(1 << 22, count - begin), np.float32) * 0.02
        weights[begin : begin + len(values)] = values.view(np.uint32) >> 16
    store = open_way("folder", folder)
    manifest = write(capture_of({"w": weights}), Repository(store), codec=codec).manifest
    del weights
    for way in ("cache", "folder"):
        arena = CpuDevice().allocate([segment.length_bytes for segment in manifest.segments])
        request = FetchRequest(manifest, open_way(way, folder), arena, THREADS, BUDGET_BYTES, verify_raw=True)
        start_threads(request).wait()
    arena.seal()
    began = time.perf_counter()
    written_bytes = keep_segments(manifest, store, arena, pace=lambda: None, degraded=fail)
    keeping_seconds = time.perf_counter() - began
    assert written_bytes == manifest.raw_bytes
    (folder / "manifest.json").write_bytes(manifest_to_json(manifest))
    hasher = blake3()
    for index in range(len(manifest.segments)):
        hasher.update(arena.readable(index))
    (folder / "digest").write_text(hasher.hexdigest())
    os.sync()
    return {
        "raw_bytes": manifest.raw_bytes,
        "stored_bytes": manifest.stored_bytes,
        "chunks": len(manifest.chunks),
        "writing_flat_files_seconds": keeping_seconds,
    }


def spawn(way: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    """The process of one trial."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, "--trial", way, "--folder", str(folder), *options]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> None:
    """End a trial and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def run(way: str, folder: Path, *options: str) -> dict[str, float]:
    """One trial to its end."""
    process = spawn(way, folder, *options)
    try:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        end(process)
    assert process.returncode == 0, way
    found: dict[str, float] = json.loads(output)
    return found


def held_bytes(way: str, folder: Path) -> int:
    """The proportional set sizes of two workers that hold their state at the same time, added up."""
    processes = [spawn(way, folder, "--hold") for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline(), way
        return sum(_proportional_bytes(process.pid) for process in processes)
    finally:
        for process in processes:
            end(process)


def _proportional_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise AssertionError(pid)


def measure(codec: str, mib: int, rounds: int) -> dict[str, Any]:
    """All trials of one codec."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coldstart-mapped-")))
        found: dict[str, Any] = prepare(folder, codec, mib)
        trials: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        beside: dict[str, list[float]] = {way: [] for way in BESIDE}
        for number in range(rounds + 1):
            for way in WAYS:
                trial_of = run(way, folder)
                if number:
                    trials[way].append(trial_of)
            for way in BESIDE if number else ():
                beside[way].append(run(way, folder, "--beside")["seconds"])
        idle_bytes = held_bytes("idle", folder)
        memory = {way: held_bytes(way, folder) - idle_bytes for way in WAYS}
        return {**found, "trials": trials, "beside_torch_seconds": beside, "two_workers_bytes": memory}


def rows(found: Mapping[str, Any]) -> Iterator[str]:
    """The tables of one codec."""
    ours = [each["seconds"] for each in found["trials"]["mapped"]]
    yield (
        "| way | restored s | GB/s | processor s | one pass over it s | way / mapped (median of pairs) |"
        " two workers' memory MiB |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for way, trials in found["trials"].items():
        seconds = [each["seconds"] for each in trials]
        middle = {name: statistics.median(each[name] for each in trials) for name in trials[0]}
        ratio = statistics.median(theirs / mapped for theirs, mapped in zip(seconds, ours, strict=True))
        yield (
            f"| {way} | {middle['seconds']:.3f} | {found['raw_bytes'] / 1e9 / middle['seconds']:.2f} |"
            f" {middle['processor_seconds']:.2f} | {middle['first_pass_seconds']:.3f} | {ratio:.2f} |"
            f" {found['two_workers_bytes'][way] / (1 << 20):.0f} |"
        )
    yield ""
    alone = found["beside_torch_seconds"]["import alone"]
    yield "| beside torch | wall s | over the import alone s (median of pairs) |"
    yield "| --- | --- | --- |"
    for way, seconds in found["beside_torch_seconds"].items():
        over = statistics.median(both - one for both, one in zip(seconds, alone, strict=True))
        yield f"| {way} | {statistics.median(seconds):.3f} | {over:.3f} |"


def report(document: Mapping[str, Any]) -> str:
    """The document as Markdown."""
    out = [
        "# Restoring from flat files of segments",
        "",
        f"Machine: {document['machine']['text']}.",
        "",
        *(__doc__ or "").splitlines()[4:],
        "",
        f"{document['rounds']} rounds, one process at a time; medians.",
    ]
    for codec, found in document["codecs"].items():
        out += [
            "",
            f"## Codec {codec}: {found['raw_bytes'] >> 20} MiB, stored as {found['stored_bytes'] >> 20}",
            "",
            *rows(found),
            "",
            f"Writing the flat files, once, after ready: {found['writing_flat_files_seconds']:.2f} s.",
        ]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON; the report goes beside it as .md")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--beside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trial:
        trial(options.trial, options.folder, beside=options.beside, hold=options.hold)
        return
    machine = describe_machine()
    document = {
        "machine": {**machine._asdict(), "text": str(machine)},
        "rounds": options.rounds,
        "codecs": {codec: measure(codec, options.mib, options.rounds) for codec in CODECS},
    }
    print(report(document))
    if options.output:
        options.output.write_text(json.dumps(document, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(report(document))


if __name__ == "__main__":
    main()
