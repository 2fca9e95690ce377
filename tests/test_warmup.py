"""Phases, warm-up events and the digests of their answers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from coldstart import events, warmup
from coldstart.errors import PhaseError, StoreSetupError
from coldstart.metrics import Timeline
from coldstart.testing import FakeClock
from coldstart.warmup import Phases, digest, warm_up

if TYPE_CHECKING:
    from collections.abc import Callable

# --- digests -----------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.sampled_from([0.0, -0.0, 1.0, 1.5, float("inf"), float("nan")]),
    st.sampled_from(["", "1", "a", "None", "list1", "é", "\ud800"]),
    st.sampled_from([b"", b"1", b"a"]),
    st.sampled_from([1j, 0j]),
)
"""Few and alike, so that two values that are drawn independently often nearly agree."""

PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "1"]), inner, max_size=2),
    max_leaves=6,
)
ARRAYS = arrays.arrays(
    dtype=st.sampled_from(["<f4", "<f8", "<i4", "<i8", "|u1", "|b1", "<c8", "<U2", "<M8[s]"]),
    shape=arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


def alike(left: Any, right: Any) -> bool:
    """Whether two plain values have the same types and bits."""
    return repr(left) == repr(right)


@given(value=PLAIN)
def test_equal_plain_values(value: Any) -> None:
    """Equal plain values have equal digests, of 32 hex digits."""
    found = digest(value)
    assert digest(copy.deepcopy(value)) == found
    assert len(bytes.fromhex(found)) == 16


@given(left=PLAIN, right=PLAIN)
def test_different_plain_values(left: Any, right: Any) -> None:
    """Plain values have equal digests exactly if their types, structure and bits are equal."""
    assert (digest(left) == digest(right)) == alike(left, right)


@given(value=st.lists(PLAIN, max_size=4))
def test_tuples_count_as_lists(value: list[Any]) -> None:
    """A tuple has the digest of the list of its items: an answer that went through JSON is the same answer."""
    assert digest(tuple(value)) == digest(value)


@given(left=ARRAYS, right=ARRAYS)
@example(left=np.array(0.0), right=np.array([0.0]))
def test_different_arrays(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> None:
    """Arrays have equal digests exactly if dtype, shape and bytes are equal."""
    same = (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    assert (digest(left) == digest(right)) == same
    assert digest(left) == digest(left.copy()) != ""


@given(array=ARRAYS.filter(lambda array: array.nbytes > 0), data=st.data())
def test_one_bit_of_an_array(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    """One altered bit of one item alters the digest."""
    altered = bytearray(array.tobytes())
    altered[data.draw(st.integers(0, len(altered) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    other = np.frombuffer(bytes(altered), dtype=array.dtype).reshape(array.shape)
    assert digest([other]) != digest([array])


@given(array=ARRAYS.filter(lambda array: array.ndim > 0))
def test_layout_of_an_array(array: np.ndarray[Any, Any]) -> None:
    """What counts is an array's items, not how they lie in memory."""
    assert digest(np.asfortranarray(array)) == digest(array)
    assert digest(array[::-1]) == digest(array[::-1].copy())


@given(value=PLAIN)
def test_arrays_in_containers(value: Any) -> None:
    """An array in an answer is told from its list, and its place in the answer counts."""
    array = np.arange(3)
    assert digest([value, array]) != digest([value, array.tolist()])
    assert digest({"a": value, "b": array}) != digest({"a": array, "b": value})


def recursive() -> list[Any]:
    """A list that holds itself."""
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, {"a": [object()]}, np.array([object()]), (value for value in ()), recursive(), 10**5000],
    ids=["object", "set", "nested", "objects", "generator", "recursive", "huge"],
)
def test_incomparable_answers(value: Any) -> None:
    """Answers that cannot be compared bit for bit have no digest, and are no error."""
    assert digest(value) == ""


@pytest.mark.demo
def test_tensors() -> None:
    """Tensors are compared by dtype, shape and bits, whatever view they are; those without plain bytes are not."""
    torch = pytest.importorskip("torch")
    plain = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert digest(plain) == digest(plain.t().contiguous().t()) == digest(plain.clone().requires_grad_())
    found = {digest(plain.to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int32)}
    assert len(found) == 4
    assert digest(plain) != digest(plain.reshape(3, 2))
    assert digest(plain) != digest(plain.numpy())
    complex_ = torch.tensor([1 + 2j])
    assert digest(complex_.conj()) == digest(torch.tensor([1 - 2j])) != ""
    assert digest(complex_.conj().imag) == digest(torch.tensor([-2.0])) != ""
    assert digest(plain.to_sparse()) == digest(torch.empty(2, device="meta")) == ""


# --- warm-up events ------------------------------------------------------------------------------------------------------


def test_warm_up_events() -> None:
    """Inputs become events with ids, all of them once an iteration; the answers of the first two iterations count."""
    asked: list[Any] = []

    def answer(event: Any) -> Any:
        asked.append((event["id"], event["input"]))
        return len(asked)

    report = warm_up(("a", {"b": 1}), answer, iterations=4, maximum_seconds=1000.0)
    assert asked == [("warmup-0", "a"), ("warmup-1", {"b": 1})] * 4
    assert report.iterations == 4
    assert report.digests == ((digest(1), digest(2)), (digest(3), digest(4)))
    assert report.memory_bytes > 1 << 20


@pytest.mark.parametrize(("maximum_seconds", "iterations"), [(1000.0, 5), (25.0, 3), (20.0, 2), (10.0, 1), (0.0, 1)])
def test_maximum_time(maximum_seconds: float, iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No iteration is begun after the maximum time, and there is always one."""
    clock = FakeClock()
    monkeypatch.setattr(warmup, "time", clock)
    report = warm_up(("a",), lambda event: clock.advance(10.0), iterations=5, maximum_seconds=maximum_seconds)
    assert report.iterations == iterations
    assert len(report.digests) == min(iterations, 2)


def test_error_in_a_warm_up() -> None:
    """An error of the handler ends the warm-up at once and passes unchanged."""
    asked = []

    def answer(event: Any) -> Any:
        asked.append(event["id"])
        raise KeyError("texts")

    with pytest.raises(KeyError, match="texts"):
        warm_up(("a", "b"), answer, iterations=2, maximum_seconds=1000.0)
    assert asked == ["warmup-0"]


def test_memory_where_there_is_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc the resident memory is 0, which nobody takes for an error."""

    def no_file(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", no_file)
    assert warmup.resident_bytes() == 0


# --- phases --------------------------------------------------------------------------------------------------------------


class Run:
    """Phases on a clock that stands still, with all they publish."""

    def __init__(self, *, skip: tuple[str, ...] = (), target_seconds: float = 30.0) -> None:
        self.clock = FakeClock()
        self.published: list[Any] = []
        bus = events.EventBus()
        bus.subscribe(self.published.append)
        timeline = Timeline(self.clock.monotonic)
        self.phases = Phases("name", timeline, bus, skip=skip, target_seconds=target_seconds)

    def taking(self, seconds: float, result: Any = None) -> Callable[[], Any]:
        def work() -> Any:
            self.clock.advance(seconds)
            return result

        return work


def test_phases() -> None:
    """A phase gives its work's result, and its record and events say when it was and how long it took."""
    run = Run()
    assert run.phases.run("weight_load", run.taking(2.0, "state")) == "state"
    assert run.phases.run("custom_init", run.taking(3.0, None), otherwise="state") is None
    assert [tuple(record) for record in run.phases.records] == [
        ("weight_load", 0.0, 2.0, ""),
        ("custom_init", 2.0, 5.0, ""),
    ]
    assert run.published == [
        events.PhaseBegan("name", "weight_load"),
        events.PhaseEnded("name", "weight_load", 2.0, ""),
        events.PhaseBegan("name", "custom_init"),
        events.PhaseEnded("name", "custom_init", 3.0, ""),
    ]


def test_phases_left_out() -> None:
    """A phase without work, or that is switched off, gives the other result, takes no time and says why."""
    run = Run(skip=("custom_init",))
    run.clock.advance(1.0)
    assert run.phases.run("kernel_compile", None, reason="no compile=", otherwise="a") == "a"
    assert run.phases.run("custom_init", run.taking(9.0, "b"), reason="no init=", otherwise="c") == "c"
    assert [tuple(record) for record in run.phases.records] == [
        ("kernel_compile", 1.0, 1.0, "no compile="),
        ("custom_init", 1.0, 1.0, "switched off"),
    ]
    assert run.published == [
        events.PhaseEnded("name", "kernel_compile", 0.0, "no compile="),
        events.PhaseEnded("name", "custom_init", 0.0, "switched off"),
    ]


@pytest.mark.parametrize(("seconds", "is_slow"), [(29.0, False), (30.0, False), (31.0, True)])
def test_target_time(seconds: float, is_slow: bool) -> None:
    """A phase that takes longer than the target is reported, with both times."""
    run = Run(target_seconds=30.0)
    run.phases.run("weight_load", run.taking(seconds))
    slow = [event for event in run.published if isinstance(event, events.PhaseSlow)]
    assert slow == ([events.PhaseSlow("name", "weight_load", seconds, 30.0)] if is_slow else [])


def test_failing_phase() -> None:
    """An error of the user's code becomes a PhaseError that names the phase; the phase is recorded as ended."""
    run = Run()

    def work() -> None:
        run.clock.advance(4.0)
        raise KeyError("weights")

    with pytest.raises(PhaseError, match="phase weight_load of 'name' failed: KeyError: 'weights'") as caught:
        run.phases.run("weight_load", work)
    assert isinstance(caught.value.__cause__, KeyError)
    assert (caught.value.phase, caught.value.snapshot) == ("weight_load", "name")
    assert [tuple(record) for record in run.phases.records] == [("weight_load", 0.0, 4.0, "")]


def test_failing_phase_with_an_error_of_ours() -> None:
    """An error of the library passes as it is and learns its phase, unless it knows a more exact one."""
    run = Run()
    error = StoreSetupError("no such bucket")
    with pytest.raises(StoreSetupError) as caught:
        run.phases.run("weight_load", _raiser(error))
    assert caught.value is error
    assert error.phase == "weight_load"
    with pytest.raises(StoreSetupError):
        run.phases.run("custom_init", _raiser(error))
    assert error.phase == "weight_load"


def _raiser(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work
