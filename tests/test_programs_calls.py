"""Calling an entry point: the state's own code and a program take the same arguments and give the same results."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldstart.errors import ProgramCallError, ProgramError
from coldstart.programs.base import Array, Runner
from coldstart.programs.calls import EagerCall, ProgramCall, as_numpy
from coldstart.programs.entries import entry_point
from coldstart.programs.record import Entry
from coldstart.programs.signature import UNBOUNDED, Signature, taken_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

torch: Any = pytest.importorskip("torch")
pytestmark = pytest.mark.demo

ROWS = Array("x", "float32", ("n", 2))


def eager(function: Any) -> EagerCall:
    """A state that is a function, as the handler gets it."""
    return EagerCall(entry_point(function, "", alone=True))


def program(
    run: Callable[[Sequence[Any]], Sequence[Any]],
    *,
    framework: str = "numpy",
    results: Any = None,
    mutated: tuple[str, ...] = (),
) -> ProgramCall:
    """A loaded program of one argument ``x`` with n rows of two; its results are of ``results``' structure, else one array."""
    structure, arrays = taken_apart(results if results is not None else np.ones(1), "", entry="")
    outputs = tuple(Array(f"result {place}", "float32", ("n", 2)) for place in range(len(arrays)))
    arguments, _ = taken_apart({"x": np.ones(1)}, "", entry="")
    signature = Signature(("x",), arguments, (ROWS,), structure, outputs, {"n": (1, UNBOUNDED)})
    return ProgramCall(Entry("", signature, "0.onnx", (), mutated), Runner(framework, run))


def doubled(x: Any) -> Any:
    """A computation."""
    return x * 2


BOTH: dict[str, Callable[[], Any]] = {
    "eager": lambda: eager(doubled),
    "numpy program": lambda: program(lambda arrays: [arrays[0] * 2]),
    "torch program": lambda: program(lambda arrays: [arrays[0] * 2], framework="torch"),
}
X = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_results_are_of_the_arguments_kind(make: Callable[[], Any]) -> None:
    """Arrays of numpy give arrays of numpy, tensors give tensors, whoever computes; so does passing by name."""
    call = make()
    for got in (call(X), call(x=X)):
        assert type(got) is np.ndarray
        assert got.tolist() == (X * 2).tolist()
    got = call(torch.from_numpy(X))
    assert isinstance(got, torch.Tensor)
    assert got.tolist() == (X * 2).tolist()
    assert not got.requires_grad


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_arrays_of_any_layout(make: Callable[[], Any]) -> None:
    """Transposed, strided, reversed and read-only arrays are taken for the numbers that they hold."""
    call = make()
    frozen = X.copy()
    frozen.flags.writeable = False
    for x in (np.asfortranarray(X), np.repeat(X, 2, 0)[::2], X[::-1], frozen):
        assert call(x).tolist() == (x * 2).tolist()
    assert call(torch.from_numpy(X).T.contiguous().T).tolist() == (X * 2).tolist()


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_arguments_stay_as_they_are(make: Callable[[], Any]) -> None:
    """A result is memory of its own: changing it does not change the argument."""
    call, x = make(), X.copy()
    call(x)[:] = -1
    assert x.tolist() == X.tolist()


def test_results_of_any_structure() -> None:
    """What comes back has the structure that the state's own code gave: None, numbers, mappings with attributes."""
    answer = OrderedDict(y=np.ones((1, 2), np.float32), past=[(np.ones((1, 2), np.float32), None)], n=2)
    call = program(lambda arrays: [arrays[0], arrays[0] + 1], results=answer)
    got = call(X)
    assert got.y.tolist() == X.tolist()
    assert got.past[0][0].tolist() == (X + 1).tolist()
    assert (got.past[0][1], got["n"], list(got)) == (None, 2, ["y", "past", "n"])


def test_call_that_does_not_fit() -> None:
    """A program is not run for a call that it was not made for."""
    ran = []
    call = program(lambda arrays: ran.append(arrays) or [])
    for x in (X.astype(np.float64), X[:0], X.T, 1.0, None):
        with pytest.raises(ProgramCallError):
            call(x)
    with pytest.raises(ProgramCallError, match="got the argument 'mask'"):
        call(X, mask=X)
    assert ran == []


def test_another_number_of_results() -> None:
    """A program that gives more or fewer results than its record says is an error, not a shorter answer."""
    with pytest.raises(ProgramError, match="entry point '' gave 2 results instead of 1"):
        program(lambda arrays: [arrays[0], arrays[0]])(X)


def test_one_call_at_a_time() -> None:
    """Calls that write to a cache take turns; others run side by side."""
    together, now, most = threading.Lock(), [0], [0]
    meet = threading.Barrier(2, timeout=60)

    def run(arrays: Sequence[Any], *, waits: bool) -> Sequence[Any]:
        with together:
            now[0] += 1
            most[0] = max(most[0], now[0])
        if waits:
            meet.wait()
        else:
            threading.Event().wait(0.001)  # long enough for another to come in, if nothing keeps it out
        with together:
            now[0] -= 1
        return [arrays[0]]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(program(lambda arrays: run(arrays, waits=True)), [X, X]))
        assert most == [2]
        most[0] = 0
        list(pool.map(program(lambda arrays: run(arrays, waits=False), mutated=("cache",)), [X] * 50))
    assert most == [1]


def test_bfloat16_comes_as_float32() -> None:
    """Numpy has no bfloat16: a caller of numpy gets the same numbers in float32, a caller of torch the tensor itself."""
    half = torch.tensor([[1.5, 2.0]], dtype=torch.bfloat16)
    assert as_numpy(half).dtype == np.float32
    call = program(lambda arrays: [half], framework="torch")
    assert call(X[:1]).tolist() == [[1.5, 2.0]]
    assert call(torch.from_numpy(X[:1])).dtype == torch.bfloat16


def test_no_gradients() -> None:
    """The state's own code runs in inference mode: what it gives holds on to nothing."""
    weight = torch.nn.Parameter(torch.ones(2))
    got = eager(lambda x: x * weight)(torch.from_numpy(X))
    assert not got.requires_grad
    assert got.tolist() == X.tolist()


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_the_call_is_all_that_there_is(make: Callable[[], Any]) -> None:
    """A handler that wants more of the state than its call is told so in every start, also the first, with the remedy."""
    with pytest.raises(
        AttributeError, match=r"'config': with program=export\(\) the state is its call alone, in every start"
    ):
        _ = make().config
    assert not hasattr(make(), "__len__")


def test_any_number_of_arguments() -> None:
    """Functions with * take their arguments by place, in the recorded call and later."""
    call = eager(lambda *arrays: arrays[0] + arrays[1])
    assert call(X, X).tolist() == (X + X).tolist()


def test_arguments_go_where_the_state_is() -> None:
    """The eager call moves its arguments to the device of the module that it calls, here to meta in place of a GPU."""
    net = torch.nn.Linear(2, 4, device="meta")
    assert eager(net)(torch.ones(3, 2)).device.type == "meta"
    assert eager(net.forward)(torch.ones(3, 2)).device.type == "meta"
    assert eager(doubled)(torch.ones(3, 2)).device.type == "cpu"
