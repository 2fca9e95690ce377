"""Where the model, its snapshots and the server's files lie, and how they get there."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.restoring import model, ours
from benchmarks.restoring.peers import ROOT
from benchmarks.restoring.trial import environment

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BUCKET = "models"
CODECS = {"raw": "raw", "planes": "planes+zstd"}
"""Prefix of a store in the bucket -> the codec of its snapshot."""

INPUT = json.dumps("norm.weight")
_PREPARE_SECONDS = 1200.0


class Place(NamedTuple):
    """A folder: ``root`` is served, ``work`` holds what processes write."""

    folder: Path
    size_bytes: int

    @property
    def root(self) -> Path:
        """What the server serves."""
        return self.folder / "root"

    @property
    def work(self) -> Path:
        """The handler, and downloads."""
        return self.folder / "work"

    @property
    def bucket(self) -> Path:
        """The only one."""
        return self.root / BUCKET

    @property
    def handler(self) -> Path:
        """The handler whose state is the model."""
        return self.work / "handler.py"

    def digests(self) -> dict[str, str]:
        """Tensor -> hash of its bytes; "" is the whole file."""
        found: dict[str, str] = json.loads((self.bucket / model.DIGESTS).read_text())
        return found

    def object_bytes(self, key: str) -> int:
        """The size of an object, or of all objects below a prefix."""
        path = self.bucket / key
        return path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.rglob("*"))

    def stored_bytes(self, prefix: str) -> int:
        """What a restore of the snapshot reads: its blobs."""
        return self.object_bytes(f"{prefix}/blobs")


def prepared(cache: Path, python: Path, size_bytes: int, seed: int) -> Place:
    """The model's files, made on first use, and fresh snapshots of it by the coldstart of this tree."""
    place = Place(cache / f"model-{size_bytes}-{seed}", size_bytes)
    place.bucket.mkdir(parents=True, exist_ok=True)
    place.work.mkdir(exist_ok=True)
    if not (place.bucket / model.DIGESTS).exists():
        print(f"making a model of {size_bytes >> 20} MiB in {place.folder}", flush=True)
        command = [str(python), "-m", "benchmarks.restoring.model", str(place.bucket), str(size_bytes), str(seed)]
        subprocess.run(command, cwd=ROOT, env=environment({}), check=True, timeout=_PREPARE_SECONDS)
    ours.write_handler(place.handler, place.bucket / model.SAFETENSORS)
    for prefix in CODECS:
        _publish(place, python, prefix)
    return place


def _publish(place: Place, python: Path, prefix: str) -> None:
    """A first start, whose capture is proven and published as any other."""
    print(f"publishing a snapshot, codec {CODECS[prefix]}", flush=True)
    shutil.rmtree(place.bucket / prefix, ignore_errors=True)
    variables = {
        "COLDSTART_STORE": f"file://{place.bucket / prefix}",
        "COLDSTART_CODEC": CODECS[prefix],
        "COLDSTART_CAPTURE_IDLE_SECONDS": "0",
        "COLDSTART_CAPTURE_WAIT_SECONDS": f"{_PREPARE_SECONDS:.0f}",
        "COLDSTART_FILES_FOLDER": str(place.work / "files"),
    }
    _, document = run_handler(place, python, variables)
    if not document["capture"]["published"]:
        raise RuntimeError(f"the snapshot was not published: {document['capture']}")


def run_handler(
    place: Place, python: Path, variables: Mapping[str, str], *options: str, within: tuple[str, ...] = ()
) -> tuple[float, dict[str, Any]]:
    """``coldstart run`` of the handler: the moment before its spawn (monotonic clock), and its document.

    Raises RuntimeError where it failed.
    """
    command = [*within, str(python), "-m", "coldstart", "run", str(place.handler), "--input", INPUT, "--json", *options]
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=place.work,
        env=environment(variables),
        check=False,
        capture_output=True,
        text=True,
        timeout=_PREPARE_SECONDS,
    )
    if done.returncode:
        raise RuntimeError(f"coldstart run ended with {done.returncode}: {done.stderr[-2000:]}")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return began, document
