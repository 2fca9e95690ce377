"""Reading a start's files ahead: does a cold start import sooner if the kernel is told which files come.

    PYTHONPATH=. python -m benchmarks.import_working_set [--rounds N] [--image FOLDER] [--output FILE.json]

An image (this interpreter, its standard library and the packages in question, copied) is put on a file system and
a fresh process of it runs one line of imports, from spawn to exit. A first cold start records what it opens: an audit hook
for modules and data, /proc/self/maps for libraries, mincore for the pages of each file that came to memory. Then, by turns
in rounds, each start from a cold page cache: plain; with whole files read ahead by a second process, started just before
from the same image, one file after another in the order of their use; with the same by 16 threads; with 16 threads that
read only the pages recorded; with these 0.3 s later, as a worker would that has to fetch the list first; and with this only
where it is slow: where five files of the list take 0.5 ms or more (median) to open and to give a byte. "Warm" are starts on
pages that an earlier start left. "Ahead, alone" is the read-ahead with nobody importing: until its pages are in memory.

"Disk" is this machine's, with the caches of the whole machine dropped before each start. The others are the same folder behind
a FUSE pass-through (slow_folder.c) that answers each read late, and on one row also each lookup, open and listing; it is mounted
afresh for each start, its source is in memory, its answers overlap (up to 64 reads ahead, on one row 12, which is FUSE's
default), its bandwidth is not limited. Needs root, gcc and libfuse3-dev.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.working_set import Image, Way, alone, plan_bytes, plans_of, record, start, write_plan
from coldstart.bench.machine import describe_machine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

WORKLOADS = {"torch": "import torch, tokenizers, numpy", "onnxruntime": "import onnxruntime, tokenizers, numpy"}
THREADS = 16
LATE_SECONDS, SLOW_MS = 0.3, 0.5


class Place(NamedTuple):
    """A file system: the machine's disk (``read_ms`` None) or one with latency."""

    name: str
    read_ms: float | None = None
    metadata_ms: float = 0.0
    background: int = 64
    """Reads ahead that the kernel may have outstanding."""


PLACES = (
    Place("disk"),
    Place("1 ms a read", 1.0),
    Place("5 ms a read", 5.0),
    Place("5 ms a read, 12 at a time", 5.0, background=12),
    Place("1 ms a read, lookup, open and listing", 1.0, 1.0),
)


WAYS: dict[str, Way | None] = {
    "plain": None,
    "whole files, in order": Way("whole", 1),
    "whole files, threads": Way("whole", THREADS),
    "recorded pages, threads": Way("pages", THREADS),
    "recorded pages, threads, late": Way("pages", THREADS, LATE_SECONDS),
    "the same, where slow": Way("pages", THREADS, LATE_SECONDS, SLOW_MS),
}
WARM: dict[str, Way | None] = {
    "warm": None,
    "warm, recorded pages": WAYS["recorded pages, threads"],
    "warm, where slow": Way("pages", THREADS, slow_ms=SLOW_MS),
}

# --- the file systems -------------------------------------------------------------------------------------------------


def build_slow_folder(folder: Path) -> Path:
    """Compile the file system with latency."""
    flags = subprocess.run(["pkg-config", "fuse3", "--cflags", "--libs"], check=True, capture_output=True, text=True)
    built = folder / "slow_folder"
    source = str(Path(__file__).with_name("slow_folder.c"))
    subprocess.run(["gcc", "-O2", source, "-o", str(built), *flags.stdout.split()], check=True)
    return built


@contextmanager
def cold(place: Place, image: Image, folder: Path, counts: dict[str, int]) -> Iterator[Image]:
    """The image at a place, none of it in the page cache; what was read there is added to ``counts`` at the end."""
    if place.read_ms is None:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    with mounted(place, image, folder, counts) as there:
        yield there


@contextmanager
def mounted(place: Place, image: Image, folder: Path, counts: dict[str, int]) -> Iterator[Image]:
    """The image at a place: what has latency is mounted afresh, and knows nothing."""
    if place.read_ms is None:
        yield image
        return
    mount, written = folder / "mount", folder / "counts"
    mount.mkdir(exist_ok=True)
    written.unlink(missing_ok=True)
    delays = [str(int(each * 1000)) for each in (place.read_ms, place.metadata_ms)]
    options = ["-f", "-o", "ro,max_threads=128,max_idle_threads=128", str(mount)]
    process = subprocess.Popen(
        [str(folder / "slow_folder"), str(image.root), *delays, str(place.background), str(written), *options]
    )
    try:
        while not mount.is_mount():
            assert process.poll() is None, "the file system did not come up"
            time.sleep(0.01)
        yield Image(mount, image.python)
    finally:
        subprocess.run(["umount", str(mount)], check=True)
        process.wait()
    for name, count in zip(("reads", "bytes", "metadata"), written.read_text().split(), strict=True):
        counts[name] = counts.get(name, 0) + int(count)


def image_in(root: Path, folder: Path) -> Image:
    """Copy this interpreter, its standard library and the packages whose files the workloads open."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    image = Image(root, f"bin/{version}")
    if root.exists():
        return image
    spec = importlib.util.find_spec("numpy")
    assert spec
    assert spec.origin
    packages, base = Path(spec.origin).parent.parent, Path(sys.base_prefix)
    here = Image(packages, sys.executable)
    opened = [name for code in WORKLOADS.values() for name in record(here, code, folder)]
    # A module that is a file of its own is opened as bytecode.
    sources = {f"{Path(name).name.partition('.')[0]}.py" for name in opened if name.startswith("__pycache__/")}
    top = {name.partition("/")[0] for name in opened} | sources
    skipped = shutil.ignore_patterns("site-packages", "test", "idlelib", "config-*")
    shutil.copytree(base / "lib" / version, root / "lib" / version, symlinks=True, ignore=skipped)
    for shared in (base / "lib").glob("libpython*"):
        shutil.copy2(shared, root / "lib")
    (root / "bin").mkdir()
    shutil.copy2((base / image.python).resolve(), root / image.python)
    for name in sorted(top):
        into = root / "lib" / version / "site-packages" / name
        copy = shutil.copytree if (packages / name).is_dir() else shutil.copy2
        copy(packages / name, into)
    os.sync()
    return image


# --- all starts ------------------------------------------------------------------------------------------------------


def measure(place: Place, image: Image, code: str, rounds: int, folder: Path) -> dict[str, Any]:
    """All starts of one workload at one place."""
    with cold(place, image, folder, {}) as there:
        plans = plans_of(there.root, record(there, code, folder))
    for name, plan in plans.items():
        write_plan(folder / name, plan)
    ahead: dict[str, Any] = {}
    for name, way in WAYS.items():
        if way:
            with cold(place, image, folder, {}) as there:
                ahead[name] = alone(there, way, plans[way.plan], folder)
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in (*WAYS, *WARM)}
    counts: dict[str, dict[str, int]] = {name: {} for name in WAYS}
    for number in range(rounds):
        for name in turned(list(WAYS), number):
            with cold(place, image, folder, counts[name]) as there:
                starts[name].append(start(there, code, WAYS[name], folder)._asdict())
        with mounted(place, image, folder, {}) as there:
            start(there, code, WARM["warm, recorded pages"], folder)
            for name in turned(list(WARM), number):
                starts[name].append(start(there, code, WARM[name], folder)._asdict())
    return {
        "files": len(plans["whole"]),
        "plan_bytes": {name: plan_bytes(plan) for name, plan in plans.items()},
        "ahead_alone": ahead,
        "starts": starts,
        "counts": {name: {what: each / rounds for what, each in found.items()} for name, found in counts.items()},
    }


def turned(names: list[str], number: int) -> list[str]:
    """The names in another order each round, so that none always comes after the same one."""
    shift = number % len(names)
    order = names[shift:] + names[:shift]
    return order[::-1] if number % 2 else order


def summary(starts: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Median, least and most seconds of each way, and how many times faster than plain it is: the median of rounds."""
    plain = [each["seconds"] for each in starts["plain"]]
    found = {}
    for name, each in starts.items():
        seconds = [one["seconds"] for one in each]
        found[name] = {
            "median": statistics.median(seconds),
            "least": min(seconds),
            "most": max(seconds),
            "processor": statistics.median(one["processor_seconds"] + one["ahead_processor_seconds"] for one in each),
            "faster": statistics.median(slow / fast for slow, fast in zip(plain, seconds, strict=True)),
        }
    return found


def rows(found: Mapping[str, Any]) -> Iterator[str]:
    """The table of one workload at one place."""
    yield "| way | start s: median (least-most) | plain / way | processor s | MiB read | reads | ahead, alone: s | of its pages |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, row in summary(found["starts"]).items():
        count, alone_ = found["counts"].get(name) or {}, found["ahead_alone"].get(name)
        read = f"{count['bytes'] / (1 << 20):.0f} | {count['reads']:.0f}" if count else " | "
        ahead = f"{alone_['seconds']:.2f} | {alone_['covered']:.0%}" if alone_ else " | "
        yield (
            f"| {name} | {row['median']:.2f} ({row['least']:.2f}-{row['most']:.2f}) | {row['faster']:.2f} |"
            f" {row['processor']:.2f} | {read} | {ahead} |"
        )


def report(document: Mapping[str, Any]) -> str:
    """The document as Markdown."""
    out = ["# Reading a start's files ahead", "", *document["end"], "", f"Machine: {document['machine']['text']}.", ""]
    out += [*(__doc__ or "").splitlines()[4:], "", f"{document['rounds']} rounds; load average {document['load']}."]
    for entry in document["rows"]:
        plans = entry["plan_bytes"]
        out += [
            "",
            f"## {entry['place']}: `{entry['code']}`{entry['note']}",
            "",
            f"{entry['files']} files, {plans['whole'] >> 20} MiB; pages recorded: {plans['pages'] >> 20} MiB.",
            "",
            *rows(entry),
        ]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", action="append", choices=[place.name for place in PLACES], help="default: all")
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="default: all")
    parser.add_argument("--image", type=Path, help="where the image is kept: made where there is none")
    parser.add_argument(
        "--output", type=Path, help="JSON; the report goes beside it as .md; rows are added to those there"
    )
    options = parser.parse_args()
    document = document_of(options.output, options.rounds)
    with tempfile.TemporaryDirectory(prefix="coldstart-working-set-") as name:
        folder = Path(name)
        build_slow_folder(folder)
        image = image_in(options.image or folder / "image", folder)
        for place in PLACES:
            for workload in options.workload or WORKLOADS:
                if place.name in (options.place or [place.name]):
                    found = measure(place, image, WORKLOADS[workload], options.rounds, folder)
                    add_row(document, place, workload, found)
                    print("\n".join([f"{place.name}: {workload}", *rows(found)]), flush=True)
                    save(document, options.output)


def document_of(output: Path | None, rounds: int) -> dict[str, Any]:
    """What earlier runs left, or an empty document."""
    if output and output.exists():
        found: dict[str, Any] = json.loads(output.read_text())
        return found
    machine = describe_machine()
    return {
        "machine": {**machine._asdict(), "text": str(machine)},
        "rounds": rounds,
        "load": f"{os.getloadavg()[1]:.1f}",
        "end": [],
        "rows": [],
    }


def add_row(document: dict[str, Any], place: Place, workload: str, found: Mapping[str, Any]) -> None:
    """A row that was measured before is marked as its repetition."""
    code = WORKLOADS[workload]
    before = any((row["place"], row["code"]) == (place.name, code) for row in document["rows"])
    document["rows"].append({"place": place.name, "code": code, "note": " (again)" if before else "", **found})


def save(document: Mapping[str, Any], output: Path | None) -> None:
    if output:
        output.write_text(json.dumps(document, indent=1) + "\n")
        output.with_suffix(".md").write_text(report(document))


if __name__ == "__main__":
    main()
