"""From recorded calls to an exported program: which dimensions are free, and what stands in the way of an export."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldstart.errors import ExportError, ProgramCallError
from coldstart.exports import export
from coldstart.programs.calls import EagerCall
from coldstart.programs.making import make_program
from coldstart.programs.recording import Recorder, given_call
from coldstart.programs.signature import UNBOUNDED
from coldstart.programs.tracing import resized, trace
from tests.programs import recorded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from coldstart.programs.signature import Signature
    from coldstart.programs.tracing import Traced

torch: Any = pytest.importorskip("torch")
pytestmark = pytest.mark.demo


class Pair(torch.nn.Module):
    """Two arguments that belong together, one that need not be there, and a text."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(8, 3)

    def forward(self, x: Any, mask: Any, past: Any = None, *, mode: str = "sum") -> Any:
        found = self.mix(x) * mask[..., None]
        return OrderedDict(total=found.sum(1) if mode == "sum" else found, past=past)


def x_of(*shape: int) -> Any:
    """An array of that shape."""
    return np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape) / 100


def traced(state: Any, *calls: Mapping[str, Any], **given: Mapping[int, tuple[int, int]]) -> Traced:
    """A state's own call, exported from these calls and given ranges."""
    point, recorder = recorded(state, "", *calls)
    return trace(point, recorder.of(""), given)


def ranges(signature: Signature) -> list[tuple[int, int]]:
    """The limits of the free dimensions, in the order in which the inputs have them."""
    return list(signature.ranges.values())


def refused(function: Callable[..., Any], *calls: Mapping[str, Any], **given: Mapping[int, tuple[int, int]]) -> str:
    """What is said of an export."""
    with pytest.raises(ExportError) as caught:
        traced(function, *calls, **given)
    return str(caught.value)


# --- free dimensions -------------------------------------------------------------------------------------------------


def test_free_dimensions_are_those_that_differ() -> None:
    """Sizes that differ between the calls are free and tied where they go together; the others are what they were."""
    found = traced(Pair(), {"x": x_of(2, 4, 8), "mask": x_of(2, 4)}, {"x": x_of(3, 6, 8), "mask": x_of(3, 6)})
    signature = found.signature
    x, mask = signature.inputs
    assert (x.name, x.dtype, mask.name) == ("x", "float32", "mask")
    batch, size, width = x.shape
    assert (mask.shape, width) == ((batch, size), 8)
    assert isinstance(batch, str)
    assert isinstance(size, str)
    assert batch != size
    assert ranges(signature) == [(1, UNBOUNDED), (1, UNBOUNDED)]
    assert signature.parameters == ("x", "mask", "past")
    assert signature.results == ["outputs", [["total", ["array", 0]], ["past", ["plain", None]]]]
    assert [(array.dtype, array.shape) for array in signature.outputs] == [("float32", (batch, 3))]


def test_exported_program_answers_for_other_sizes() -> None:
    """What was exported computes as the state does, for sizes that no call had, one of them 1."""
    state = Pair().eval()
    found = traced(state, {"x": x_of(2, 4, 8), "mask": x_of(2, 4)}, {"x": x_of(3, 6, 8), "mask": x_of(3, 6)})
    for batch, size in ((5, 9), (1, 7), (4, 1)):
        x, mask = torch.tensor(x_of(batch, size, 8)), torch.tensor(x_of(batch, size))
        (total,) = found.exported.module(check_guards=False)(x, mask)
        assert torch.allclose(total, state(x, mask)["total"], atol=1e-6)


def test_given_ranges() -> None:
    """Given ranges are the limits; a size of 1 in the only call does not make the dimension fixed."""
    signature = traced(
        Pair(), {"x": x_of(1, 1, 8), "mask": x_of(1, 1)}, x={0: (1, 16), 1: (1, 256)}, mask={0: (1, 16), 1: (1, 256)}
    ).signature
    assert ranges(signature) == [(1, 16), (1, 256)]
    assert signature.inputs[0].shape[:2] == signature.inputs[1].shape


def test_nothing_is_free_without_a_reason() -> None:
    """One call and no ranges: every size is fixed, 1 too."""
    signature = traced(Pair(), {"x": x_of(1, 4, 8), "mask": x_of(1, 4)}).signature
    assert [array.shape for array in signature.inputs] == [(1, 4, 8), (1, 4)]
    assert signature.ranges == {}


def test_function_without_a_module() -> None:
    """A state may be a plain function of arrays; numbers and texts in its arguments are part of the program."""
    signature = traced(
        lambda a, b: [a @ b["w"], None, 2], {"a": x_of(2, 4), "b": {"w": x_of(4, 3), "k": "n"}}
    ).signature
    assert [array.name for array in signature.inputs] == ["a", "b.w"]
    assert signature.results == ["list", [["array", 0], ["plain", None], ["plain", 2]]]


@pytest.mark.parametrize(
    ("sizes", "expected"), [({0: 3}, [[0, 1], [2, 3], [0, 1]]), ({1: 1}, [[0], [2]]), ({0: 0}, [])]
)
def test_resized(sizes: dict[int, int], expected: Any) -> None:
    """An example gets other sizes by cutting it off, or by repeating it from its beginning."""
    assert resized(torch.arange(4).reshape(2, 2), sizes).tolist() == expected


# --- what stands in the way ------------------------------------------------------------------------------------------


def test_size_that_the_code_fixes() -> None:
    """A dimension that should be free and that the code computes with for one size only is named, with both."""

    def fixes(x: Any) -> Any:
        return x * 2 if x.shape[0] == 3 else x * 3

    said = refused(fixes, {"x": x_of(2, 8)}, {"x": x_of(3, 8)})
    assert "dimension 0 of x should be free (it was 2, 3)" in said
    assert "fixed at 3" in said


def test_data_dependent_control_flow() -> None:
    """A branch on values is told with the user's own line and the remedy."""

    def branches(x: Any) -> Any:
        if x.sum() > 0:
            return x * 2
        return x

    line = branches.__code__.co_firstlineno + 1
    said = refused(branches, {"x": x_of(2, 8)})
    assert "(the state itself)" in said
    assert f"{__file__}:{line}" in said
    assert "export another entry point, change that line, or leave program= out: starts stay eager" in said


def test_training_mode() -> None:
    """Layers that answer otherwise in training mode are refused in it, with the remedy; a mode that changes nothing is kept."""
    state = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    point, recorder = recorded(state, "", {"input": torch.zeros(2, 4)})
    with pytest.raises(ExportError, match=r"1 \(Dropout\) is in training mode.*have load call \.eval\(\) on the model"):
        trace(point, recorder.of(""), {})
    state.eval()
    assert trace(point, recorder.of(""), {}).signature.inputs[0].shape == (2, 4)


class Switched(torch.nn.Module):
    """Computes otherwise in training mode, without a layer that shows it."""

    def forward(self, x: Any) -> Any:
        return x * 3 if self.training else x


@pytest.mark.parametrize(("training", "factor"), [(True, 3), (False, 1)])
def test_mode_of_the_state(training: bool, factor: int) -> None:
    """The program computes what the state computes in the mode that ``load`` left it in."""
    point, recorder = recorded(Switched().train(training), "", {"x": torch.ones(3)})
    exported = trace(point, recorder.of(""), {}).exported
    assert exported.module()(torch.ones(3))[0].tolist() == [factor] * 3


def test_users_error_while_it_is_traced() -> None:
    """Code that cannot be traced because it leaves torch is an ExportError too, with the line."""

    def leaves(x: Any) -> Any:
        return torch.from_numpy(np.array(x.tolist(), np.float32) * 2)

    said = refused(leaves, {"x": x_of(2, 8)})
    assert "cannot be exported" in said
    assert "starts stay eager" in said


@pytest.mark.parametrize(
    ("calls", "given", "said"),
    [
        ([{"x": x_of(2)}, {"x": x_of(2, 2)}], {}, "x has 1 dimensions in one call and another number in the next"),
        (
            [{"x": x_of(2)}, {"x": x_of(2).astype(np.float64)}],
            {},
            "x has different dtypes in different calls: convert it before",
        ),
        ([{"x": x_of(2)}], {"y": {0: (1, 2)}}, r"export(dynamic=...): no recorded call has the array 'y'; there are x"),
        ([{"x": x_of(2)}], {"x": {1: (1, 2)}}, r"export(dynamic=...): x has 1 dimensions, and no dimension 1"),
    ],
)
def test_calls_that_do_not_go_together(calls: list[Any], given: dict[str, Any], said: str) -> None:
    """Calls that no one program could take, and ranges of what is not there, are errors that name the argument."""
    assert said in refused(lambda x: x * 2, *calls, **given)


def test_structures_that_differ() -> None:
    """Calls that differ in more than their arrays are two entry points: both are shown."""
    _, recorder = recorded(
        Pair(), "", {"x": x_of(2, 4, 8), "mask": x_of(2, 4)}, {"x": x_of(2, 4, 8), "mask": x_of(2, 4), "mode": "all"}
    )
    with pytest.raises(
        ExportError, match=r"is called in two ways \(.*mode='all'\): let each be an entry point of its own"
    ):
        recorder.of("")
    _, recorder = recorded(lambda x, n: x * n, "", {"x": x_of(2), "n": 1}, {"x": x_of(2), "n": 1.0})
    with pytest.raises(ExportError, match=r"n=1 and .*n=1\.0"):
        recorder.of("")


def test_no_call() -> None:
    """An entry point that the warm-up never called has no example: the error says how to give one."""
    with pytest.raises(
        ExportError, match=r"made no call of entry point 'decoder': give warmup= inputs that do, or export"
    ):
        Recorder().of("decoder")


def test_given_examples() -> None:
    """An example by name is a call like a recorded one; one that no call could be is refused by name."""
    point, _ = recorded(Pair(), "")
    call = given_call(point, {"mask": x_of(2, 4), "x": x_of(2, 4, 8)})
    assert call.names == ("x", "mask")
    with pytest.raises(ProgramCallError, match=r"x is a object"):
        given_call(point, {"x": object()})


def test_recorded_arrays_are_copies() -> None:
    """What was recorded stays what it was when the caller changes its array afterwards."""
    array = x_of(2)
    _, recorder = recorded(lambda x: x * 2, "", {"x": array})
    array[:] = -1
    assert recorder.of("")[0].arrays[0].tolist() == x_of(2).tolist()


def test_calls_after_the_warm_up() -> None:
    """Calls that an entry point makes of another one while it is traced are none of the warm-up's."""
    point, recorder = recorded(Switched().eval(), "", {"x": torch.ones(3)})
    call = EagerCall(point, recorder.at(point))
    call(x=torch.ones(3))
    recorder.end()
    call(x=torch.ones(3))
    assert len(recorder.of("")) == 2


class Doubling(torch.nn.Module):
    """Works in place on what it is given."""

    def forward(self, x: Any) -> Any:
        return x.mul_(2)


def test_argument_that_is_written_to(tmp_path: Path) -> None:
    """An argument that is changed in place is refused by its name in the call, with the remedy."""
    _, recorder = recorded(Doubling(), "", {"x": torch.ones(3)})
    with pytest.raises(ExportError, match=r"writes to its argument 'x': let it work on a copy \(x\.clone\(\)\)"):
        make_program(export(), recorder, "onnx", tmp_path, device_type="cpu")
