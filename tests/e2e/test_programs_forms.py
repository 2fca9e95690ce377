"""Programs of other forms, in real processes: inside an object, in class form, of several entry points, alone in a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coldstart.programs.record import programs_of
from tests.programs import ASK, HANDLER, TELL, far, made, manifests, write_net

if TYPE_CHECKING:
    from tests.starts import Project

# Each makes a program of its own, which takes ten seconds of a processor that nobody else wants.
pytestmark = [pytest.mark.demo, pytest.mark.slow, pytest.mark.timeout(1200)]

INSIDE = """
import sys
import numpy as np
from coldstart import coldstart, export

class Pipeline:
    def __init__(self, net):
        import torch
        self.net, self.scale = net, torch.nn.Parameter(torch.full((64,), 2.0), requires_grad=False)

    def run(self, x):
        y, total = self.net(x)
        return y * self.scale

def load():
    import torch
    from net import Net
    torch.manual_seed(7)
    return Pipeline(Net().eval())

def build(ctx):
    from net import Net
    with ctx.meta():
        return Pipeline(Net().eval())

@coldstart("inside", load=load, build=build, program=export("net"), warmup=[{"rows": 2}, {"rows": 3}])
def handler(event, model):
    import torch
    rows = event["input"]["rows"]
    x = torch.linspace(-1, 1, 8 * rows).reshape(rows, 8)
    if event["input"].get("tell"):
        return {"meta": [item.is_meta for item in model.net.parameters()], "scale": model.scale.tolist()}
    return {"y": model.run(x).tolist()}
"""


def test_inside_an_object(project: Project) -> None:
    """With build the program takes the call's place at its path: the arrays around it are bound, its own are not fetched."""
    write_net(project, INSIDE)
    start = made(project, "--input", ASK)
    assert [capture["program"] for capture in start.document["captures"]] == ["", "onnx"]
    assert all(capture["published"] for capture in start.document["captures"])
    second = project.run("--input", ASK)
    assert (second.kind, second.record["program"]) == ("restored", "onnx")
    assert far(second.output, start.output) < 1e-5
    told = project.run("--input", TELL).output
    assert told == {"meta": [True] * 4, "scale": [2.0] * 64}


CLASS = """
import sys
import numpy as np
from coldstart import coldstart, export

@coldstart("class", program=export(entry="encoder"), warmup=[{"rows": 2}, {"rows": 3}])
class Model:
    def load(self, ctx):
        import torch
        from net import Net
        torch.manual_seed(7)
        self.encoder = Net().eval()
        self.words = ["a", "b"]

    def handle(self, event):
        rows = event["input"]["rows"]
        if event["input"].get("tell"):
            return {"torch": "torch" in sys.modules, "words": hasattr(self, "words")}
        y, total = self.encoder(np.linspace(-1, 1, 8 * rows, dtype=np.float32).reshape(rows, 8))
        return {"y": y.tolist(), "total": total.tolist()}
"""


def test_class_form(project: Project) -> None:
    """In class form the program is found on self under its name, and nothing else of the state is there."""
    write_net(project, CLASS)
    start = made(project, "--input", ASK)
    *_, program = start.document["captures"]
    assert (program["published"], program["program"]) == (True, "onnx"), program["reason"]
    second = project.run("--input", ASK)
    assert (second.kind, second.record["program"]) == ("restored", "onnx")
    assert far(second.output, start.output) < 1e-5
    assert project.run("--input", TELL).output == {"torch": False, "words": False}


BUILT_CLASS = """
import numpy as np
from coldstart import coldstart, export

@coldstart("class", program=export(entry="encoder"), warmup=[{"rows": 2}, {"rows": 3}])
class Model:
    def load(self, ctx):
        import torch
        from net import Net
        torch.manual_seed(7)
        self.encoder = Net().eval()
        self.bias = np.arange(64, dtype=np.float32)

    def build(self, ctx):
        from net import Net
        with ctx.meta():
            self.encoder = Net().eval()
        self.bias = np.empty(64, np.float32)

    def handle(self, event):
        rows = event["input"]["rows"]
        if event["input"].get("tell"):
            return {"meta": [item.is_meta for item in self.encoder.parameters()], "bias": self.bias.tolist()}
        y, total = self.encoder(np.linspace(-1, 1, 8 * rows, dtype=np.float32).reshape(rows, 8))
        return {"y": (y + self.bias).tolist()}
"""


def test_class_form_with_build(project: Project) -> None:
    """In class form with build the program takes its place on self, and the arrays beside it are bound."""
    write_net(project, BUILT_CLASS)
    start = made(project, "--input", ASK)
    assert [(each["published"], each["program"], each["reason"]) for each in start.document["captures"]] == [
        (True, "", ""),
        (True, "onnx", ""),
    ]
    second = project.run("--input", ASK)
    assert (second.kind, second.record["program"]) == ("restored", "onnx")
    assert far(second.output, start.output) < 1e-5
    assert project.run("--input", TELL).output == {"meta": [True] * 4, "bias": [float(n) for n in range(64)]}


TWO = """
import numpy as np
from coldstart import coldstart, export

class Two:
    def __init__(self, net, scale):
        self.net, self.scale = net, scale

    def encode(self, x):
        return self.net(x)[0]

    def decode(self, x, past=None, *, flip=False):
        return {"out": self.net(x)[0] * self.scale, "past": past}

def load():
    import torch
    from net import Net
    torch.manual_seed(7)
    return Two(Net().eval(), torch.tensor(3.0))

@coldstart("two", load=load, program=export(("encode", "decode")), warmup=[{"rows": 1}, {"rows": 3}])
def handler(event, model):
    rows = event["input"]["rows"]
    x = np.linspace(-1, 1, 8 * rows, dtype=np.float32).reshape(rows, 8)
    got = model.decode(x, past=None, flip=True)
    return {"y": model.encode(x).tolist(), "z": got["out"].tolist(), "past": float(got["past"] is None)}
"""


def test_two_entry_points(project: Project) -> None:
    """Two methods of one object are two entry points of one program, whose weights are stored once."""
    write_net(project, TWO)
    start = made(project, "--input", ASK)
    (capture,) = start.document["captures"]
    assert (capture["published"], capture["program"], capture["reason"]) == (True, "onnx", "")
    second = project.run("--input", ASK)
    assert (second.kind, second.record["program"]) == ("restored", "onnx")
    assert far(second.output, start.output) < 1e-5
    (manifest,) = manifests(project)
    (program,) = programs_of(manifest.programs)
    encode, decode = program.entries
    assert (encode.path, decode.path, encode.file, decode.file) == ("encode", "decode", "0.onnx", "1.onnx")
    assert [place[1:] for place in encode.constants] == [place[1:] for place in decode.constants]
    assert sum(buffer.length_bytes for buffer in manifest.buffers) == 4 * (64 * 64 + 8 * 64)


def test_examples_without_a_warm_up(project: Project) -> None:
    """With export(example=...) a handler without warm-up inputs gets a program too, and is told what was not compared."""
    calls = '[{"x": np.ones((n, 8), np.float32)} for n in (2, 3)]'
    text = HANDLER.replace('dynamic={"x": {0: (1, 16)}}', f'example={{"": {calls}}}')
    write_net(project, text.replace(', warmup=[{"rows": 1}, {"rows": 3}]', ""))
    start = made(project, "--input", ASK)
    *_, capture = start.document["captures"]
    assert (capture["published"], capture["program"]) == (True, "onnx"), capture["reason"]
    assert "no answers were compared" in capture["reason"]
    second = project.run("--input", ASK)
    assert (second.kind, second.record["program"]) == ("restored", "onnx")
    assert far(second.output, start.output) < 1e-5


def test_nothing_below_the_program(project: Project) -> None:
    """A state that no lower rung can hold has a generation with its program alone; where that cannot run, load does."""
    write_net(project, HANDLER.replace("build=build, ", ""))
    start = made(project, "--input", ASK)
    (program,) = start.document["captures"]
    assert (program["published"], program["generation"], program["program"]) == (True, 1, "onnx"), program["reason"]
    (manifest,) = manifests(project)
    assert (manifest.rung, manifest.leaves) == ("files", ())
    second = project.run("--input", ASK)
    assert (second.kind, second.record["program"]) == ("restored", "onnx")
    assert far(second.output, start.output) < 1e-5
    without = project.run("--input", ASK, COLDSTART_PROGRAMS="off", COLDSTART_CAPTURE="off")
    assert without.kind == "fallback"
    assert "the snapshot holds a program alone, and this start cannot run it" in without.reason
    assert without.output == start.output
