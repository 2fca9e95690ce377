"""The proof of a program: what a program is refused for that answers the recorded calls rightly and others wrongly."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldstart.errors import ExportError, ProofError
from coldstart.programs.base import Array, Runner
from coldstart.programs.calls import ProgramCall
from coldstart.programs.cases import LONGEST_SEQUENCE, CaseWriter, check_cases
from coldstart.programs.folder import ArrayWriter
from coldstart.programs.record import Entry, Program
from coldstart.programs.signature import UNBOUNDED, Signature
from coldstart.programs.tolerance import answer_difference, array_difference, plain
from coldstart.programs.tracing import Traced, flat_module, trace
from tests.programs import recorded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

torch: Any = pytest.importorskip("torch")
pytestmark = pytest.mark.demo


class Mean(torch.nn.Module):
    """The mean of the rows, by their number."""

    def forward(self, x: Any) -> Any:
        return x.sum(0) / x.shape[0]


class MeanOfThree(Mean):
    """The same with the number of rows of an example baked in."""

    def forward(self, x: Any) -> Any:
        return x.sum(0) / 3


class Greeting(torch.nn.Module):
    """A result that depends on values."""

    def forward(self, x: Any) -> Any:
        return x * x.abs().max()


class GreetingOfOne(Greeting):
    """The same with a value of an example baked in."""

    def forward(self, x: Any) -> Any:
        return x * 1.75


class OneIsSpecial(Mean):
    """A computation that a batch of one takes another way through."""

    def forward(self, x: Any) -> Any:
        return x * 2 if x.shape[0] == 1 else x


class Remembering(torch.nn.Module):
    """A sum over all calls, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Any) -> Any:
        self.seen.add_(x)
        return self.seen * 1.0


class Forgetting(Remembering):
    """The same without the write."""

    def forward(self, x: Any) -> Any:
        return self.seen + x


class Proof:
    """A state's calls, the cases made of them, and programs that are to answer them."""

    def __init__(self, folder: Path, state: Any, *calls: Mapping[str, Any]) -> None:
        self.folder = folder
        self.calls = calls
        self.point, recorder = recorded(state, "", *calls)
        recorded_calls = recorder.of("")
        self.traced = trace(self.point, recorded_calls, {})
        arrays = ArrayWriter(folder)
        modules = {"": flat_module(self.point, recorded_calls[0].structure)}
        writer = CaseWriter(modules, {"": self.traced}, arrays, Random(0))
        self.signature = writer.narrowed("", recorded_calls)
        _reset(state)
        self.count = writer.write(recorded_calls, folder)
        arrays.close()
        _reset(state)

    def check(self, program: Any, tolerance: Mapping[str, float] | None = None) -> int:
        """Export another module from the same calls, and have it answer the cases."""
        point, recorder = recorded(program, "", *self.calls)
        exported = trace(point, recorder.of(""), {}).exported
        _reset(program)
        return self.check_runner(exported.module(check_guards=False), tolerance)

    def check_runner(self, run: Any, tolerance: Mapping[str, float] | None = None) -> int:
        """Have a function of flat tensors answer the cases."""
        entry = Entry("", self.signature, "", (), ())
        call = ProgramCall(entry, Runner("torch", lambda arrays: run(*arrays)))
        return check_cases(self.folder, {"": call}, Program("", "onnx", {}, "", tolerance or {}, (entry,)))


def _reset(state: Any) -> None:
    with torch.no_grad():
        for buffer in state.buffers():
            buffer.zero_()


def rows(count: int, scale: float = 1.0) -> Any:
    """Rows of numbers that differ."""
    return {"x": np.linspace(-scale, scale, 4 * count, dtype=np.float32).reshape(count, 4)}


def test_right_program(tmp_path: Path) -> None:
    """The state's own computation passes its cases: the recorded calls, and sequences of others, each twice."""
    proof = Proof(tmp_path, Mean(), rows(2), rows(3))
    assert proof.count == 2 + 2 + 3 * 2 * 2
    assert proof.check(Mean()) == proof.count


def test_size_that_is_baked_in(tmp_path: Path) -> None:
    """A program that has an example's size in it is refused, with the inputs that show it and what may be done."""
    proof = Proof(tmp_path, Mean(), rows(2), rows(3))
    with pytest.raises(
        ProofError, match=r"the program is not the state's own code: result 0 of entry point '' is off by"
    ):
        proof.check(MeanOfThree())


def test_size_of_one(tmp_path: Path) -> None:
    """An export takes a size of 1 for any other: whether the state's own code does is asked first, not left to chance."""
    proof = Proof(tmp_path, OneIsSpecial(), rows(2), rows(3))
    with pytest.raises(ProofError, match=r"is off by .* in case 2 of \d+ \(inputs \(1, 4\)\)"):
        proof.check(OneIsSpecial())


def test_value_that_is_baked_in(tmp_path: Path) -> None:
    """A program that has an example's value in it answers the recorded calls rightly, and is refused by the others."""
    proof = Proof(tmp_path, Greeting(), rows(2, 1.75), rows(3, 1.75))
    assert proof.check(Greeting()) == proof.count
    with pytest.raises(
        ProofError, match=r"in case ([2-9]|1\d) of \d+ \(inputs \(\d+, 4\)\); export\(tolerance=\.\.\.\) sets"
    ):
        proof.check(GreetingOfOne())


def test_write_that_is_dropped(tmp_path: Path) -> None:
    """A program that does not write to its cache answers the first call rightly, and is refused by the sequence."""
    calls = [{"x": np.array([1, 2, 3, number], np.float32)} for number in range(3)]
    proof = Proof(tmp_path, Remembering(), *calls)
    assert proof.check(Remembering()) == proof.count
    with pytest.raises(ProofError, match=r"in case 1 of"):
        proof.check(Forgetting())


def test_tolerance(tmp_path: Path) -> None:
    """A difference beyond the tolerance is refused with how far it is; what was asked for is what counts."""
    proof = Proof(tmp_path, Mean(), rows(2), rows(3))
    with pytest.raises(ProofError, match=r"is off by 0\.001 \(largest value .*, allowed 2e-05\)"):
        proof.check_runner(lambda x: [x.mean(0) + 1e-3])
    assert proof.check_runner(lambda x: [x.mean(0) + 1e-3], {"float32": 2e-3}) == proof.count
    with pytest.raises(ProofError, match=r"is float64 \(4,\) instead of float32 \(4,\)"):
        proof.check_runner(lambda x: [x.mean(0).double()])
    with pytest.raises(ProofError, match="is off by inf"):
        proof.check_runner(lambda x: [x.mean(0) / 0])


def test_long_sequences_are_cut(tmp_path: Path) -> None:
    """Of a warm-up with hundreds of calls a sequence has the first ones."""
    calls = [{"x": np.full(4, number, np.float32)} for number in range(LONGEST_SEQUENCE + 6)]
    assert Proof(tmp_path, Remembering(), *calls).count == LONGEST_SEQUENCE * (1 + 3 * 2)


def test_state_that_takes_only_some_sizes(tmp_path: Path) -> None:
    """A limit that the state's own code refuses is narrowed to what was seen; others stay as they are."""

    class Picky(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            if not 2 <= x.shape[0] <= 3:
                raise ValueError("no such size")
            return x * 1.0

    point, recorder = recorded(Picky(), "", rows(2), rows(3))
    calls = recorder.of("")
    structure = calls[0].structure
    wide = Signature(
        ("x",),
        structure,
        (Array("x", "float32", ("n", "m")),),
        ["array", 0],
        (Array("r", "float32", ("n", "m")),),
        {"n": (1, UNBOUNDED), "m": (1, UNBOUNDED)},
    )
    modules = {"": flat_module(point, structure)}
    arrays = ArrayWriter(tmp_path)
    arrays.close()
    writer = CaseWriter(modules, {"": Traced(None, wide)}, arrays, Random(0))
    assert dict(writer.narrowed("", calls).ranges) == {"n": (2, 3), "m": (1, UNBOUNDED)}


def test_state_that_answers_nothing_again(tmp_path: Path) -> None:
    """A state that takes no call a second time has no cases, so no program can be proven: that is an error."""

    class Once(Mean):
        left = 3

        def forward(self, x: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise ValueError("once")
            return x * 1.0

    point, recorder = recorded(Mean(), "", rows(2))
    calls = recorder.of("")
    signature = trace(point, calls, {}).signature
    once = Once()
    once.left = 0
    arrays = ArrayWriter(tmp_path)
    arrays.close()
    writer = CaseWriter({"": lambda x: (once(x),)}, {"": Traced(None, signature)}, arrays, Random(0))
    with pytest.raises(ExportError, match="answered none of the recorded calls a second time"):
        writer.write(calls, tmp_path)


# --- distances ---------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("expected", "got", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 1e-5], ""),
        ([1.0, 2.0], [1.0, 2.1], "is off by 0.1 (largest value 2, allowed 4e-05)"),
        ([1000.0, 2.0], [1000.0, 2.01], ""),
        ([NAN, INF, -INF], [NAN, INF, -INF], ""),
        ([NAN, 1.0], [1.0, 1.0], "differs in its infinities or NaNs"),
        ([INF, 1.0], [-INF, 1.0], "differs in its infinities or NaNs"),
        ([], [], ""),
    ],
)
def test_distance_of_arrays(expected: list[float], got: list[float], difference: str) -> None:
    """Numbers may be off by the tolerance, relative to the largest of the array; infinities and NaN have to be the same."""
    assert array_difference(np.array(expected, np.float32), np.array(got, np.float32), 2e-5) == difference


def test_whole_numbers_have_to_be_equal() -> None:
    """Token ids and flags are right or wrong; a program whose NaN is where a number was is wrong."""
    assert array_difference(np.arange(4), np.array([0, 1, 3, 3]), 1.0) == "differs in 1 of 4 values"
    assert array_difference(np.array([True]), np.array([True]), 0.0) == ""
    assert array_difference(np.ones(2, np.float32), np.array([1, NAN], np.float32), 1.0) != ""


@pytest.mark.parametrize(
    ("expected", "got", "difference"),
    [
        ({"a": [1.0, "x"], "b": None}, {"a": [1.0 + 1e-6, "x"], "b": None}, ""),
        ({"a": 1.0}, {"a": 1.1}, "answer.a is 1.1 instead of 1.0"),
        ({"a": 1.0}, {"a": 1}, ""),
        ({"a": 1}, {"a": 2}, "answer.a is 2 instead of 1"),
        ({"a": 1.0}, {"b": 1.0}, "answer is {'b': 1.0} instead of {'a': 1.0}"),
        ([1.0, 2.0], [1.0], "answer is [1.0] instead of [1.0, 2.0]"),
        ([0.5, True], [0.5, 1], "answer[1] is 1 instead of True"),
        ([[NAN]], [[NAN]], ""),
        ([[NAN]], [[1.0]], "answer[0][0] is 1.0 instead of nan"),
        ("x", "y", "answer is 'y' instead of 'x'"),
    ],
)
def test_distance_of_answers(expected: Any, got: Any, difference: str) -> None:
    """Answers are compared number by number; anything else in them has to be equal, and its place is told."""
    assert answer_difference(expected, got, 2e-5) == difference


def test_plain_answers() -> None:
    """Answers of every kind have a form that can be compared in another process."""
    answer = {"a": np.array([1.5]), 2: (torch.tensor([1, 2]), b"\x01"), "o": object()}
    assert plain(answer) == {"a": [1.5], "2": [[1, 2], "01"], "o": "object"}
