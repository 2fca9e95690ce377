"""What many small buffers cost over the same bytes in one: a restore of both, by turns, in processes of their own.

    PYTHONPATH=. python benchmarks/small_buffers.py [--buffers N] [--rounds N] [--output FILE.json]

The many are the parameters of a tree, a dictionary of numpy arrays, and those of a torch module with as many, whose
skeleton is made beforehand. Seconds run from the look-up to the last bound array, imports excluded; the store is a
folder in the disk cache, and segments are not mapped. Medians of rounds, and the difference pair by pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from coldstart.bench.machine import describe_machine

BUFFER_BYTES = 4096
KINDS = ("one", "tree", "module")
LIMIT_SECONDS = 120.0


def state_of(kind: str, buffers: int) -> Any:
    """A state of ``buffers`` times BUFFER_BYTES."""
    import numpy as np

    if kind == "one":
        return {"all": np.arange(buffers * BUFFER_BYTES // 4, dtype=np.float32)}
    arrays = [np.full(BUFFER_BYTES // 4, number, np.float32) for number in range(buffers)]
    if kind == "tree":
        return {f"layer{number}": array for number, array in enumerate(arrays)}
    import torch

    return torch.nn.ParameterList(torch.from_numpy(array) for array in arrays)


def store_of(folder: Path) -> Any:
    """A folder store without flat files: what is measured here is a fetch."""
    from coldstart.stores.local import LocalStore

    class Fetched(LocalStore):
        flat_files = None  # type: ignore[assignment]

    return Fetched(folder)


def publish(folder: Path, kind: str, buffers: int) -> None:
    """Capture the state, and make it current under its kind's name."""
    from coldstart.capture import Capture, Encoding, write_generation
    from coldstart.frameworks import survey
    from coldstart.repository import Repository

    repository = Repository(store_of(folder))
    capture = Capture(
        name=kind,
        key=_key(),
        survey=survey(state_of(kind, buffers)),
        files=(),
        device_type="cpu",
        parent=None,
        parent_key="",
        generation=1,
        kinds={},
        warmup_digests=(),
        provenance={},
    )
    written = write_generation(capture, repository, encoding=Encoding("raw", 1), pace=lambda: None)
    repository.publish(written.manifest, written.manifest_key, replaces=repository.look_up(kind, capture.key))


def _key() -> Any:
    from coldstart.manifest import KeyRecord

    return KeyRecord("a" * 32, {"load": "1" * 32})


def restore_seconds(folder: Path, kind: str, buffers: int) -> float:
    """Restore it once, and see that the last array is right."""
    import numpy as np

    from coldstart import events
    from coldstart.devices.cpu import CpuDevice
    from coldstart.repository import Repository
    from coldstart.restore import Request, Restoration, Restored, bind_arrays, rebuild_tree

    skeleton = state_of(kind, buffers) if kind == "module" else None
    began = time.perf_counter()
    request = Request(
        kind, _key(), lambda: Repository(store_of(folder)), CpuDevice(), 16, 192 << 20, "", engine="threads"
    )
    outcome = Restoration(request, events.EventBus()).outcome()
    assert isinstance(outcome, Restored), outcome
    outcome.arena.seal()
    state = bind_arrays(outcome, skeleton) if kind == "module" else rebuild_tree(outcome)
    seconds = time.perf_counter() - began
    last = state["all"] if kind == "one" else state[buffers - 1] if kind == "module" else state[f"layer{buffers - 1}"]
    wanted = np.arange(buffers * BUFFER_BYTES // 4, dtype=np.float32) if kind == "one" else np.float32(buffers - 1)
    assert bool((np.asarray(last.detach() if kind == "module" else last) == wanted).all())
    return seconds


def trial(folder: Path, kind: str, buffers: int) -> float:
    """``restore_seconds`` in a process of its own."""
    command = [sys.executable, __file__, "--trial", str(folder), kind, "--buffers", str(buffers)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    return float(ended.stdout)


def measure(buffers: int, rounds: int) -> dict[str, Any]:
    """Medians of each kind, and what the many cost over the one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in KINDS:
            publish(folder, kind, buffers)
        trials = [{kind: trial(folder, kind, buffers) for kind in KINDS} for _ in range(rounds)]
    return {
        "buffers": buffers,
        "buffer_bytes": BUFFER_BYTES,
        "rounds": rounds,
        "median_seconds": {kind: statistics.median(each[kind] for each in trials) for kind in KINDS},
        "over_one_seconds": {
            kind: statistics.median(each[kind] - each["one"] for each in trials) for kind in KINDS[1:]
        },
        "trials": trials,
        "machine": describe_machine()._asdict(),
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--buffers", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--trial", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trial:
        print(restore_seconds(Path(options.trial[0]), options.trial[1], options.buffers))
        return
    result = measure(options.buffers, options.rounds)
    print(json.dumps({name: result[name] for name in ("median_seconds", "over_one_seconds")}, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
