"""A small handler with a program, and the folders in which programs are handed over, for the tests of programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from coldstart.manifest import manifest_from_json
from coldstart.programs.calls import EagerCall
from coldstart.programs.entries import entry_point
from coldstart.programs.folder import RECORD, ArrayWriter, write_document
from coldstart.programs.record import signature_to_json
from coldstart.programs.recording import Recorder
from tests.starts import RUN_SECONDS, Start

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from coldstart.manifest import Manifest
    from coldstart.programs.entries import EntryPoint
    from coldstart.programs.signature import Signature
    from tests.starts import Project

MAKING_SECONDS = 570
ASK = '{"rows": 2}'
TELL = '{"rows": 2, "tell": true}'
"""Two events for the handler; the second asks what was imported."""

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 64)
        self.second = torch.nn.Linear(64, 64)
        self.register_buffer("shift", torch.arange(64.0))

    def forward(self, x, scale=1.0):
        hidden = torch.relu(self.first(x) + self.shift / 64)
        return self.second(hidden) * scale, hidden.sum(1)
"""

HANDLER = """
import sys
import numpy as np
from coldstart import coldstart, export

def load():
    import torch
    from net import Net
    torch.manual_seed(7)
    return Net().eval()

def build(ctx):
    from net import Net
    with ctx.meta():
        return Net().eval()

@coldstart("net", load=load, build=build, program=export(dynamic={"x": {0: (1, 16)}}), warmup=[{"rows": 1}, {"rows": 3}])
def handler(event, model):
    rows = event["input"]["rows"]
    if event["input"].get("tell"):
        return {"torch": "torch" in sys.modules, "onnxruntime": "onnxruntime" in sys.modules}
    x = np.linspace(-1, 1, 8 * rows, dtype=np.float32).reshape(rows, 8)
    y, total = model(x)
    return {"y": y.tolist(), "total": total.tolist()}
"""
"""A torch module behind an entry point that takes and gives numpy arrays. Its warm-up does not tell who computes."""


def write_net(project: Project, text: str = HANDLER) -> None:
    """The handler and the module with its model."""
    project.write(NET, "net.py")
    project.write(text)


def far(one: Any, other: Any) -> float:
    """The largest difference between the numbers of two answers of the same form."""
    assert one.keys() == other.keys()
    return max(float(np.abs(np.array(one[key]) - np.array(other[key])).max()) for key in one)


def manifests(project: Project) -> list[Manifest]:
    """The stored generations of a project, in their order."""
    return [manifest_from_json(path.read_bytes()) for path in project.objects("manifests")]


def written_record(
    folder: Path, entries: Sequence[tuple[Signature, Mapping[str, Any], frozenset[str]]], backend: str = "onnx"
) -> None:
    """What the process that makes a program leaves behind: entries 0, 1, ... with constants that are numpy arrays."""
    arrays = ArrayWriter(folder)
    documents = []
    for number, (signature, constants, mutated) in enumerate(entries):
        (folder / f"{number}.{backend}").write_bytes(b"file %d" % number)
        rows = []
        for name, array in constants.items():
            identity = f"at {array.ctypes.data}" if name in mutated else ""
            data = array.reshape(-1).view(np.uint8)
            rows.append([name, list(arrays.add(data, array.dtype.name, array.shape, identity=identity))])
        documents.append(
            {
                "path": str(number),
                "signature": signature_to_json(signature),
                "file": f"{number}.{backend}",
                "constants": rows,
                "mutated": sorted(mutated),
            }
        )
    arrays.close()
    record = {"backend": backend, "platform": {"device": "cpu"}, "options": "", "tolerance": {}, "entries": documents}
    write_document(folder, RECORD, record)


def made(project: Project, *arguments: str, target: str = "handler.py", **environment: str) -> Start:
    """``coldstart run --json`` until its program is made, however long that takes on a busy machine."""
    waits = {"COLDSTART_CAPTURE_WAIT_SECONDS": str(MAKING_SECONDS), **environment}
    with project.popen("-m", "coldstart", "run", target, "--json", *arguments, environment=waits) as process:
        try:
            output, errors = process.communicate(timeout=MAKING_SECONDS + RUN_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    return Start(json.loads(output.splitlines()[-1]), process.returncode, errors)


def recorded(state: Any, path: str, *calls: Mapping[str, Any], alone: bool = True) -> tuple[EntryPoint, Recorder]:
    """An entry point of a state, and what a warm-up that made these calls of it has noted."""
    recorder = Recorder()
    point = entry_point(state, path, alone=alone)
    call = EagerCall(point, recorder.at(point))
    for options in calls:
        call(**options)
    return point, recorder
