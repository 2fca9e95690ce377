"""Programs for ONNX Runtime: weights stay where they are, results are the state's own, and what it cannot do is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from coldstart.errors import ExportError, ProgramError, ProgramRuntimeError
from coldstart.programs import AOTI, ONNX, backend_of, default_backend
from coldstart.programs import onnx as backend
from coldstart.programs.base import Array, Constant
from coldstart.programs.onnx import Onnx
from coldstart.programs.tracing import trace
from tests.programs import recorded

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.programs.tracing import Traced

torch: Any = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.demo, pytest.mark.timeout(900)]

WIDTH = 64


class Net(torch.nn.Module):
    """A large weight that the graph does not keep, small ones that it does, and one that an exporter transposes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(8, WIDTH)
        self.second = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.words = torch.nn.Embedding(100, 8)

    def forward(self, ids: Any) -> Any:
        hidden = torch.relu(self.first(self.words(ids)))
        return self.second(hidden).sum(1), ids + 1


class Made(NamedTuple):
    """A program as it was made, and the state that it was made of."""

    state: Any
    traced: Traced
    graph: bytes
    constants: tuple[Constant, ...]

    def load(self, graph: bytes | None = None, **changes: Any) -> Any:
        """Load it around constants in memory of this test's own; ``changes``: other constants, inputs, outputs."""
        data = self.graph if graph is None else graph
        file = memoryview(data)
        signature = self.traced.signature
        options = {"constants": self.copied(), "inputs": signature.inputs, "outputs": signature.outputs, **changes}
        return Onnx().load(file, **options)

    def copied(self) -> list[Constant]:
        """The constants in memory that can be written to, like an arena's."""
        return [each._replace(data=np.array(each.data)) for each in self.constants]

    def expected(self, ids: Any) -> list[Any]:
        """What the state's own code answers."""
        with torch.no_grad():
            return [result.numpy() for result in self.state(torch.from_numpy(ids))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The one export of this file."""
    from coldstart.programs.onnx_make import make

    state = Net().eval()
    point, recorder = recorded(state, "", {"ids": np.array([[1, 2, 3]])}, {"ids": np.array([[4, 5], [6, 7]])})
    traced = trace(point, recorder.of(""), {})
    folder = tmp_path_factory.mktemp("made")
    program = make(traced.exported, file=folder / "0.onnx", scratch=folder)
    assert program.mutated == frozenset()
    return Made(state, traced, program.file.read_bytes(), program.constants)


def ids(batch: int, size: int) -> Any:
    """Token ids that differ."""
    return (np.arange(batch * size) * 7 % 100).reshape(batch, size)


# --- what is made and what it computes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (2, 3), (5, 40)])
def test_results(made: Made, batch: int, size: int) -> None:
    """The optimised graph answers like the state's own code, for sizes that no example had."""
    runner = made.load()
    assert runner.framework == "numpy"
    results = runner.run([ids(batch, size)])
    for result, expected in zip(results, made.expected(ids(batch, size)), strict=True):
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        assert np.abs(result - expected).max() < 1e-5


def test_large_constants_are_outside(made: Made) -> None:
    """Weights are not in the graph; small constants are, which the runtime computes with when it loads."""
    assert {each.shape for each in made.constants} == {(8, WIDTH), (WIDTH, WIDTH), (100, 8)}
    for each in made.constants:
        assert each.dtype == "float32"
        assert len(each.data) == 4 * np.prod(each.shape) > 1024
    assert len(made.graph) < 4 * WIDTH * WIDTH
    assert made.state.first.bias.detach().numpy().tobytes() in made.graph


def test_constants_are_not_copied(made: Made) -> None:
    """The session computes with the bytes that it was given: whoever changes them there changes what it answers."""
    constants = made.copied()
    runner = made.load(constants=constants)
    before = runner.run([ids(2, 3)])[0]
    (weight,) = (each for each in constants if each.shape == (WIDTH, WIDTH))
    weight.data.view(np.float32)[:] *= 2
    assert np.allclose(runner.run([ids(2, 3)])[0], 2 * before, rtol=1e-6)
    weight.data[:] = 0
    assert not runner.run([ids(2, 3)])[0].any()


def test_graph_is_an_optimised_one(made: Made) -> None:
    """What is stored is the graph as the runtime would run it here, so that no start optimises it again."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(made.graph)
    assert "com.microsoft" in {each.domain for each in model.opset_import}
    external = [each for each in model.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
    assert {each.name for each in external} == {each.name for each in made.constants}


def test_nothing_is_left_beside(made: Made, tmp_path: Path) -> None:
    """Loading writes no file and needs none: the graph and the weights come from memory."""
    made.load().run([ids(1, 2)])
    assert list(tmp_path.iterdir()) == []


# --- programs that cannot be loaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [b"", b"no graph", bytes(100)], ids=["empty", "text", "zeros"])
def test_wrong_graph(made: Made, graph: bytes) -> None:
    """Bytes that are no graph are a ProgramError with the runtime's words."""
    with pytest.raises(ProgramError, match="ONNX Runtime refused the program"):
        made.load(graph)


def test_cut_graph(made: Made) -> None:
    """Half a graph is refused too."""
    with pytest.raises(ProgramError, match="ONNX Runtime refused the program"):
        made.load(made.graph[: len(made.graph) // 2])


def test_missing_constant(made: Made) -> None:
    """A graph without one of its weights is refused."""
    with pytest.raises(ProgramError, match="ONNX Runtime refused the program"):
        made.load(constants=made.copied()[1:])


def test_constant_of_another_form(made: Made) -> None:
    """A constant whose bytes are not what its record says is refused by its name; one of another shape by the runtime."""
    first, *rest = made.copied()
    for change in ({"dtype": "int3"}, {"data": first.data[:-4]}, {"shape": (3, 3)}):
        with pytest.raises(ProgramError, match=f"constant '{first.name}' of the program has impossible bytes"):
            made.load(constants=[first._replace(**change), *rest])
    with pytest.raises(ProgramError, match="ONNX Runtime refused the program"):
        made.load(constants=[first._replace(shape=first.shape[::-1]), *rest])


def test_other_number_of_arrays(made: Made) -> None:
    """A graph that is not the one of the record is noticed before it is called."""
    more = (*made.traced.signature.inputs, Array("mask", "int64", (1,)))
    for change in ({"inputs": more}, {"outputs": ()}):
        with pytest.raises(ProgramError, match="another number of inputs or results than its record says"):
            made.load(**change)


# --- programs that cannot be made --------------------------------------------------------------------------------------


class Cache(torch.nn.Module):
    """A state that a call writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("past", torch.zeros(4))

    def forward(self, x: Any) -> Any:
        self.past.add_(x)
        return self.past * 1.0


def writes_to_its_argument(x: Any) -> Any:
    """A call that changes the caller's array."""
    x.add_(1)
    return x * 2


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (Cache(), r"writes to 'owner\.past'.*export\(backend='aoti'\) keeps it"),
        (writes_to_its_argument, r"writes to '.*'.*export\(backend='aoti'\) keeps it"),
        (
            torch.nn.Linear(4, 4).bfloat16(),
            r"bfloat16 \(owner\.weight\).*export\(backend='aoti'\) has them, or convert",
        ),
    ],
    ids=["buffer", "argument", "bfloat16"],
)
def test_refused(state: Any, said: str, tmp_path: Path) -> None:
    """What ONNX would get wrong or cannot run is refused by name, with the remedy, and nothing is written."""
    from coldstart.programs.onnx_make import make

    dtype = torch.bfloat16 if "bfloat16" in said else torch.float32
    point, recorder = recorded(state, "", {"input" if dtype is torch.bfloat16 else "x": torch.ones(4, dtype=dtype)})
    traced = trace(point, recorder.of(""), {})
    with pytest.raises(ExportError, match=said):
        make(traced.exported, file=tmp_path / "0.onnx", scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- the runtime -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.20.0", "1.32.0", "2.0.0", "1.33.0.dev20261101"])
def test_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program depends on the runtime's version, the instruction set and the device."""
    monkeypatch.setattr(backend, "installed_version", lambda: version)
    platform = Onnx().platform("cpu")
    assert (platform["device"], platform["onnxruntime"], set(platform)) == (
        "cpu",
        version,
        {"device", "onnxruntime", "processor"},
    )


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("", "the snapshot's program needs ONNX Runtime, which is not installed: pip install"),
        ("1.19.2", r"ONNX Runtime 1\.19\.2 is too old, 1\.20 is needed: pip install"),
        ("1.9.0", r"ONNX Runtime 1\.9\.0 is too old"),
    ],
)
def test_missing_or_too_old(version: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a runtime that can run it there is no program, and the error says how to get one."""
    monkeypatch.setattr(backend, "installed_version", lambda: version)
    with pytest.raises(ProgramRuntimeError, match=said):
        Onnx().platform("cpu")


def test_runtime_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that is there and cannot be imported is told with the import's own words."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProgramRuntimeError, match=r"ONNX Runtime cannot be imported: .*onnxruntime"):
        Onnx().import_runtime()


REPORTING = """
import os, sys
from coldstart.programs.onnx import Onnx

Onnx().import_runtime()
print(os.environ["ORT_DISABLE_TELEMETRY"], os.listdir(sys.argv[1]))
"""


@pytest.mark.parametrize(("given", "said"), [({}, "1 []"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0 ")])
def test_runtime_does_not_report(given: dict[str, str], said: str, tmp_path: Path) -> None:
    """The runtime reports nothing to its makers, and keeps no file for it in TMPDIR, unless the user wants it to."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    command = [sys.executable, "-c", REPORTING, str(tmp_path)]
    printed = subprocess.run(command, env=environment | given, capture_output=True, text=True, check=True).stdout
    assert printed.startswith(said)


def test_version_without_an_import() -> None:
    """The version is the one that an import would find, read without importing anything."""
    import onnxruntime

    assert backend.installed_version() == onnxruntime.__version__


@pytest.mark.parametrize(("device", "expected"), [("cpu", ONNX), ("cuda", AOTI)])
def test_default_backend(device: str, expected: str) -> None:
    """On a CPU the runtime that imports fastest is the default, on a GPU the one that carries its kernels."""
    assert default_backend(device) == expected
    assert backend_of(expected).name == expected


def test_unknown_backend() -> None:
    """A backend of a newer coldstart is an error that names those of this one."""
    with pytest.raises(ProgramError, match="unknown backend 'tvm': this coldstart has onnx, aoti"):
        backend_of("tvm")
