"""Programs of AOTInductor: compiled without their constants, run on the caller's memory, refused with a reason."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from coldstart.errors import ExportError, ProgramError
from coldstart.programs.aoti import Aoti
from coldstart.programs.base import Array, Constant, Made, Runner

# torch of its own code, while it copies an exported program.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

ROOT = Path(__file__).parent.parent
PLACES, WIDTH, WORDS = 8, 6, 11


class Remembering(nn.Module):
    """Attention over a cache, with one of every kind of constant: tied, transposed, not persistent, scalar, bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.turned = nn.Parameter(torch.randn(WIDTH, WIDTH).t())
        self.narrow = nn.Parameter(torch.randn(WIDTH, dtype=torch.bfloat16))
        self.plain = torch.randn(WIDTH)
        self.register_buffer("cache", torch.randn(1, PLACES, WIDTH))
        self.register_buffer("calls", torch.tensor(3))
        self.register_buffer("order", torch.arange(PLACES), persistent=False)

    def forward(self, ids: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Scores, (1, n, WORDS), what was read, turned round, (1, WIDTH, n), and how often it was called."""
        self.calls += 1
        x = self.words(ids) @ self.turned * self.narrow.float() + self.plain
        self.cache.index_copy_(1, places, x)
        scores = (x @ self.cache.transpose(1, 2)).masked_fill(self.order > places[:, None], float("-inf"))
        return self.head(scores.softmax(-1) @ self.cache), x.transpose(1, 2), self.calls, self.cache[:, 0]


INPUTS = [Array("ids", "int64", (1, "n")), Array("places", "int64", ("n",))]
OUTPUTS = [Array(str(place), "float32", ()) for place in range(4)]


class Compiled(NamedTuple):
    """A model and the program that was made of it."""

    model: nn.Module
    made: Made
    left: list[str]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Compiled:
    """The one program that these tests compile."""
    import torch._inductor.config as inductor

    from coldstart.programs.aoti_make import make

    torch.manual_seed(0)
    model = Remembering().eval()
    folder = tmp_path_factory.mktemp("aoti")
    exported = export_of(
        copy.deepcopy(model), (torch.tensor([[1, 2, 3]]), torch.arange(3)), n=Dim("n", min=1, max=PLACES)
    )
    with inductor.patch({"cpp.vec_isa_ok": True}):  # ten seconds of asking the compiler what it is able to
        made = make(exported, file=folder / "program.pt2", scratch=folder)
    return Compiled(model, made, sorted(os.listdir(folder)))


def export_of(module: nn.Module, arguments: tuple[Any, ...], n: Any = None) -> Any:
    """The module as an exported program; ``n`` is the size of the arguments' last dimension."""
    shapes = None if n is None else tuple({argument.ndim - 1: n} for argument in arguments)
    with torch.no_grad():
        return torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)


def writable(constants: tuple[Constant, ...]) -> dict[str, Constant]:
    """The constants with bytes of their own, as a start has them."""
    return {each.name: each._replace(data=each.data.copy()) for each in constants}


def loaded(file: Path | bytes, constants: Any) -> Runner:
    """The program as a start loads it."""
    data = file if isinstance(file, bytes) else file.read_bytes()
    return Aoti().load(memoryview(data), list(constants), INPUTS, OUTPUTS)


def prompt(length: int, seed: int, start: int = 0) -> list[torch.Tensor]:
    """Token ids, (1, length), and their places from ``start`` on."""
    ids = torch.randint(WORDS, (1, length), generator=torch.Generator().manual_seed(seed))
    return [ids, torch.arange(start, start + length)]


def assert_same(got, wanted) -> None:
    """Equal to what torch computes by itself, within 1e-5."""
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.demo
def test_sequences_of_calls_equal_eager(compiled):
    """Prompts of every length and tokens behind them, over a cache and a counter that calls write: as in torch."""
    model = copy.deepcopy(compiled.model)
    runner = loaded(compiled.made.file, writable(compiled.made.constants).values())
    with torch.no_grad():
        for length in (3, 1, PLACES - 1, 2):
            calls = [prompt(length, length), prompt(1, 90 + length, start=length)]
            for arguments in calls:
                assert_same(runner.run(arguments), model(*arguments))
    assert runner.framework == "torch"


@pytest.mark.demo
def test_constants_are_named_and_tied_ones_come_once(compiled):
    """The record has buffers that are not persistent and plain tensors; a cache has the bytes of before the capture."""
    held = {each.name: each for each in compiled.made.constants}
    assert compiled.made.mutated == {"cache", "calls"}
    assert {"turned", "narrow", "cache", "calls", "order"} < set(held)
    assert len({"words.weight", "head.weight"} & set(held)) == 1
    assert len(held) == 7
    assert (held["narrow"].dtype, held["calls"].shape) == ("bfloat16", ())
    assert held["cache"].data.tobytes() == compiled.model.cache.numpy().tobytes()
    assert held["turned"].data.tobytes() == compiled.model.turned.detach().contiguous().numpy().tobytes()


@pytest.mark.demo
def test_constants_are_used_where_they_are(compiled):
    """Other bytes in the caller's memory are other weights at the next call, and the cache is written there."""
    held = writable(compiled.made.constants)
    runner = loaded(compiled.made.file, held.values())
    model = copy.deepcopy(compiled.model)
    arguments = prompt(3, 1)
    with torch.no_grad():
        assert_same(runner.run(arguments), model(*arguments))
        held["turned"].data.view(np.float32)[:] *= 2
        model.turned.mul_(2)
        assert_same(runner.run(arguments), model(*arguments))
    assert held["cache"].data.tobytes() != compiled.model.cache.numpy().tobytes()
    assert int(held["calls"].data.view(np.int64)[0]) == 5


@pytest.mark.demo
def test_two_programs_share_one_cache(compiled):
    """What one loaded program writes to a cache, another that was given the same memory reads."""
    held = writable(compiled.made.constants)
    first, second = (loaded(compiled.made.file, held.values()) for _ in range(2))
    model = copy.deepcopy(compiled.model)
    with torch.no_grad():
        for runner, arguments in (
            (first, prompt(4, 2)),
            (second, prompt(1, 3, start=4)),
            (first, prompt(1, 4, start=5)),
        ):
            assert_same(runner.run(arguments), model(*arguments))


@pytest.mark.demo
def test_results_are_no_views_of_the_cache(compiled):
    """A result stays what it was when a later call writes to the memory that it was read from."""
    runner = loaded(compiled.made.file, writable(compiled.made.constants).values())
    results = runner.run(prompt(2, 5))
    before = [result.clone() for result in results]
    runner.run(prompt(2, 6))
    assert all(torch.equal(result, copied) for result, copied in zip(results, before, strict=True))


@pytest.mark.demo
def test_a_start_imports_no_compiler_and_leaves_no_file(compiled, tmp_path):
    """A fresh process says its platform before torch is there, and runs the program without Inductor or Dynamo."""
    script = f"""
import os, sys
import numpy as np
from coldstart.programs.aoti import Aoti
from coldstart.programs.base import Constant
backend = Aoti()
facts = backend.platform("cpu")
assert "torch" not in sys.modules and "numpy" in sys.modules
backend.import_runtime()
stored = np.load({str(tmp_path / "constants.npz")!r})
constants = [Constant(n, d, tuple(s), stored[n].copy()) for n, d, s in {[(c.name, c.dtype, c.shape) for c in compiled.made.constants]!r}]
data = memoryview(open({str(compiled.made.file)!r}, "rb").read())
runner = backend.load(data, constants, [0, 0], [0, 0, 0, 0])
import torch
assert facts["torch"] == torch.__version__ and facts["torch_commit"] == torch.version.git_version, facts
assert os.listdir({str(tmp_path / "temporary")!r}) == []
print(runner.run([torch.tensor([[4]]), torch.tensor([0])])[0].tolist())
assert not [name for name in sys.modules if name.startswith(("torch._inductor", "torch._dynamo"))]
"""
    np.savez(tmp_path / "constants.npz", **{each.name: each.data for each in compiled.made.constants})
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = copy.deepcopy(compiled.model)(torch.tensor([[4]]), torch.tensor([0]))[0]
    torch.testing.assert_close(torch.tensor(eval(done.stdout)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.demo
def test_making_leaves_nothing_but_the_package(compiled):
    """The compiler's own files are gone, from the folder that it was given and from the user's home."""
    assert compiled.left == ["program.pt2"]
    assert not list(Path.home().glob("**/*inductor*"))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.demo
@pytest.mark.parametrize("data", [b"", b"no package", b"PK\x05\x06" + bytes(18)], ids=["nothing", "text", "empty"])
def test_damaged_packages_are_refused(data):
    """Bytes that are no package are an error of ours, whatever the loader makes of them."""
    with pytest.raises(ProgramError, match="package"):
        loaded(data, [])


@pytest.mark.demo
def test_constants_that_do_not_fit_are_refused(compiled):
    """A constant too few, one too many, and one of another length are named: the loader would read what is not there."""
    held = writable(compiled.made.constants)
    with pytest.raises(ProgramError, match="lacks constants that its code reads: cache"):
        loaded(compiled.made.file, [each for each in held.values() if each.name != "cache"])
    with pytest.raises(ProgramError, match="does not know: other"):
        loaded(compiled.made.file, [*held.values(), held["cache"]._replace(name="other")])
    with pytest.raises(ProgramError, match="'cache' of the program is 188 bytes long, not 192"):
        loaded(compiled.made.file, (held | {"cache": held["cache"]._replace(data=held["cache"].data[4:])}).values())
    with pytest.raises(ProgramError, match="takes 2 arrays and was given 1"):
        loaded(compiled.made.file, held.values()).run(prompt(1, 1)[:1])


class Written(nn.Module):
    """Writes to what no program can write to for its caller."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.zeros(3)
        self.register_buffer("whole", torch.zeros(4, 3))
        self.register_buffer("part", self.whole[:2])

    def argument(self, x):
        """Its own argument."""
        return x.add_(1) * 2

    def attribute(self, x):
        """A tensor that is no buffer."""
        return self.plain.add_(x) * 2

    def views(self, x):
        """A buffer whose memory another one has too."""
        self.part.add_(x)
        return self.whole.sum(0)

    def nothing(self, x):
        """And gives what is no array."""
        return x * 2, x.shape[0]

    def sparse(self, x):
        """Uses an operator that does not compile."""
        return x.to_sparse().to_dense()


class Entry(nn.Module):
    """A method of a module as a module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *arguments):
        """Call the method."""
        return getattr(self.module, self.name)(*arguments)


REFUSED = {
    "argument": r"writes to its argument .*return it as a result",
    "attribute": r"Constant module\.plain is mutated.*register it as buffer",
    "views": r"writes to memory that module\.(part|whole) shares with module\.(part|whole)",
    "nothing": r"result 1 of the entry point is a Constant and no array",
    "sparse": r"cannot compile the operator aten::_to_dense",
}


@pytest.mark.demo
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_is_refused_with_its_reason(name, tmp_path):
    """The message names what stands in the way, and nothing is left of the attempt."""
    from coldstart.programs.aoti_make import make

    exported = export_of(Entry(Written(), name), (torch.ones(3),))
    with pytest.raises(ExportError, match=REFUSED[name]):
        make(exported, file=tmp_path / "program.pt2", scratch=tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.demo
def test_a_missing_compiler_is_named(tmp_path):
    """Without g++ in the image the remedy is to install it, or the other backend."""
    import torch._inductor.config as inductor

    from coldstart.programs.aoti_make import make

    exported = export_of(nn.Linear(2, 2), (torch.ones(1, 2),))
    with (
        inductor.patch({"cpp.cxx": (None, "no-such-compiler"), "cpp.vec_isa_ok": True}),
        pytest.raises(ExportError, match=r"install g\+\+ .* backend=\"onnx\""),
    ):
        make(exported, file=tmp_path / "program.pt2", scratch=tmp_path)


# --- the transformer of the examples ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_generating_example_says_the_same_token_by_token(tmp_path, monkeypatch):
    """Prefill and decode, two packages over one set of constants, give eager's tokens on prompts of many lengths."""
    from coldstart.programs.aoti_make import make

    monkeypatch.syspath_prepend(ROOT / "handlers")
    from generate_model import seeded

    model = seeded(2, "cpu")
    examples = {"prefill": (torch.randint(256, (1, 7)),), "decode": (torch.tensor([[3]]), torch.tensor([7]))}
    held: dict[str, Constant] = {}
    runners = {}
    for name, arguments in examples.items():
        shapes = ({1: Dim("n", min=1, max=256)},) if name == "prefill" else ({}, {})
        with torch.no_grad():
            exported = torch.export.export(
                Entry(copy.deepcopy(model), name), arguments, dynamic_shapes=(shapes,), strict=False
            )
        made = make(exported, file=tmp_path / f"{name}.pt2", scratch=tmp_path)
        held = held or writable(made.constants)
        assert set(held) == {each.name for each in made.constants}
        assert len(made.mutated) == 4
        runners[name] = Aoti().load(memoryview(made.file.read_bytes()), list(held.values()), list(arguments), [None])
    for text in ("a", "The quick brown fox", "xy" * 128):
        ids = torch.tensor([list(text.encode())])
        said = [tokens_of(lambda *a: runners["prefill"].run(a)[0], lambda *a: runners["decode"].run(a)[0], ids)]
        with torch.no_grad():
            said.append(tokens_of(model.prefill, model.decode, ids))
        assert said[0] == said[1]


def tokens_of(prefill, decode, ids: torch.Tensor) -> list[int]:
    """The 16 likeliest tokens that follow ``ids``."""
    said, scores = [], prefill(ids)
    for place in range(ids.shape[1], ids.shape[1] + 16):
        said.append(int(scores.argmax()))
        scores = decode(torch.tensor([said[-1:]]), torch.tensor([place]))
    return said
