"""What bind() and arrays() say when a skeleton, or a manifest, does not fit."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from coldstart.errors import ManifestError, StateMismatchError
from coldstart.frameworks import arrays, bind, survey
from coldstart.manifest import NO_BUFFER, Leaf
from tests.frameworks_arena import store


def model(**layers: nn.Module) -> nn.Module:
    """A module with these children."""
    made = nn.Module()
    for name, layer in layers.items():
        made.add_module(name, layer)
    return made


def mismatch(state: Any, skeleton: Any) -> StateMismatchError:
    """The error of binding one into the other."""
    with pytest.raises(StateMismatchError) as caught:
        store(state).into(skeleton)
    return caught.value


def test_every_difference_is_named_in_one_error():
    """Missing and unexpected arrays, other shapes, dtypes and roles, and missing modules come together."""
    state = model(a=nn.Linear(2, 3), b=nn.Linear(2, 2, bias=False), gone=nn.ReLU())
    state.table = torch.zeros(4)
    skeleton = model(a=nn.Linear(2, 3, dtype=torch.float16), b=nn.Linear(2, 4, bias=False))
    skeleton.register_buffer("table", torch.zeros(4))
    skeleton.extra = np.zeros(1)
    error = mismatch(state, skeleton)
    assert str(error).splitlines() == [
        "build() and the captured state differ in 6 places:",
        "  - state.extra (<f8 [1]) was made by build(), and not captured",
        "  - state.table was captured with role tensor, made with buffer",
        "  - state.a.weight was captured with dtype float32, made with float16",
        "  - state.a.bias was captured with dtype float32, made with float16",
        "  - state.b.weight was captured with shape [2, 2], made with [4, 2]",
        "  - state.gone was a torch module when captured, and build() did not make it",
        "Let build() make what load() returns; until it does, load runs instead.",
    ]
    assert len(error.differences) == 6


def test_a_renamed_array_gets_a_hint():
    """An array of the same shape with nearly the same name is offered on both sides."""
    text = str(mismatch(model(encoder=nn.Linear(2, 3)), model(encoders=nn.Linear(2, 3))))
    assert (
        "state.encoder.weight (float32 [3, 2]) was captured, and build() did not make it; is it state.encoders.weight?"
        in text
    )
    assert "state.encoders.bias (float32 [3]) was made by build(), and not captured; is it state.encoder.bias?" in text


def test_a_hint_is_of_the_same_shape():
    """A name that is close but of another shape would lead astray."""
    assert "is it" not in str(mismatch({"w1": np.zeros(2)}, {"w2": np.zeros(3)}))


def test_twenty_differences_are_listed_and_all_are_counted():
    """A wholly different model does not flood the log, and the error object has everything."""
    error = mismatch({str(index): np.zeros(1) for index in range(30)}, {})
    assert str(error).splitlines()[0] == "build() and the captured state differ in 30 places:"
    assert str(error).splitlines()[21] == "  ... and 10 more"
    assert len(error.differences) == 30


def test_one_difference_reads_as_one():
    """The heading counts like a person."""
    assert "differ in 1 place:" in str(mismatch([np.zeros(1)], [np.zeros(2)]))


def test_ten_thousand_differences_take_no_quadratic_time():
    """Two models without a common name are compared in time that grows with their size."""
    error = mismatch(
        [np.zeros(1)] * 1 + [np.zeros(1) for _ in range(9999)], {index: np.zeros(1) for index in range(-9999, 0)}
    )
    assert len(error.differences) == 19_999


def test_frameworks_must_agree():
    """An array of numpy is no tensor."""
    assert "framework torch, made with numpy; role tensor" in str(mismatch([torch.zeros(1)], [np.zeros(1, "f4")]))


def test_strides_may_differ():
    """The captured layout wins over the skeleton's."""
    state = {"w": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    made = store(state).into({"w": torch.empty(2, 3, 4, 4)})
    assert made["w"].is_contiguous(memory_format=torch.channels_last)


def test_modules_that_build_adds_are_no_difference():
    """A module without arrays that only build() makes does no harm, and keeps its mode."""
    skeleton = store(model(a=nn.Linear(1, 1)).eval()).into(model(a=nn.Linear(1, 1), drop=nn.Dropout()))
    assert [skeleton.training, skeleton.a.training, skeleton.drop.training] == [False, False, True]


def test_nothing_is_changed_by_a_failed_bind():
    """Differences and impossible leaves are found before the first array is replaced."""
    stored = store(model(a=nn.Linear(1, 1), b=nn.Linear(1, 1)).eval())
    skeleton = model(a=nn.Linear(1, 1), b=nn.Linear(1, 2))
    before = dict(skeleton.named_parameters())
    with pytest.raises(StateMismatchError):
        stored.into(skeleton)
    good = model(a=nn.Linear(1, 1), b=nn.Linear(1, 1))
    good_before = dict(good.named_parameters())
    odd = [stored.leaves[0], *(leaf._replace(offset_bytes=1 << 20) for leaf in stored.leaves[1:])]
    with pytest.raises(ManifestError):
        bind(good, odd, stored.modules, stored.buffer_array)
    assert all(parameter is before[name] for name, parameter in skeleton.named_parameters())
    assert all(parameter is good_before[name] for name, parameter in good.named_parameters())
    assert skeleton.training
    assert good.training


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool):
    """Collections pause during a bind, and only then, also when it fails."""
    stored = store([np.zeros(1)])
    (gc.enable if enabled else gc.disable)()
    try:
        stored.into([np.zeros(1)])
        with pytest.raises(StateMismatchError):
            stored.into([np.zeros(2)])
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


class Forgetful(TwoTensor):
    """A subclass whose metadata insists on the meta device."""

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> Any:
        return Forgetful(*(inner[name].to("meta") for name in ("a", "b")))


def test_what_stays_on_meta_is_an_error():
    """A parameter that is still without bytes after the binding is named: it would compute nothing."""
    state, skeleton = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    state.weight = nn.Parameter(Forgetful(torch.ones(1, 1), torch.ones(1, 1)))
    skeleton.weight = nn.Parameter(Forgetful(torch.ones(1, 1, device="meta"), torch.ones(1, 1, device="meta")))
    assert "state.weight is still on the meta device" in str(mismatch(state, skeleton))


class Failing(TwoTensor):
    """A subclass that cannot be put together."""

    @staticmethod
    def __tensor_unflatten__(*_: object) -> None:
        raise AssertionError("not like this")


def test_a_subclass_that_cannot_be_made_again_is_a_mismatch():
    """Whatever a foreign class raises becomes one error of ours, with its text."""
    state = {"w": Failing(torch.ones(1), torch.ones(1))}
    assert "a Failing could not be made again" in str(mismatch(state, {"w": Failing(torch.ones(1), torch.ones(1))}))


# --- leaves that no capture writes ---------------------------------------------------------------------------------

TORCH = Leaf("w", "torch", "tensor", "float32", 4, (2, 2), (2, 1), 0, 0, requires_grad=False, same_as="")
NUMPY = TORCH._replace(framework="numpy", role="array", dtype="<f4")


def made(*leaves: Leaf) -> Any:
    """The arrays of these leaves over a buffer of 16 bytes."""
    return arrays(leaves, lambda index: np.zeros(16, np.uint8))


@pytest.mark.parametrize("leaf", [TORCH, NUMPY], ids=["torch", "numpy"])
def test_the_leaf_that_the_odd_ones_are_made_of_is_fine(leaf: Leaf):
    """The whole buffer can be used."""
    assert tuple(made(leaf)["w"].shape) == (2, 2)


@pytest.mark.parametrize(
    "odd",
    [
        {"framework": "jax"},
        {"dtype": "O", "item_bytes": 8},
        {"dtype": "|O", "item_bytes": 8},
        {"dtype": "|V4"},
        {"dtype": "<f4,<f4", "item_bytes": 8},
        {"dtype": "nn"},
        {"dtype": "<f3", "item_bytes": 3},
        {"dtype": "__doc__"},
        {"dtype": "qint8", "item_bytes": 1},
        {"dtype": "float64" * 40},
        {"dtype": "<U0", "item_bytes": 0},
        {"item_bytes": 8},
        {"item_bytes": 0},
        {"offset_bytes": 4},
        {"offset_bytes": 1 << 40},
        {"shape": (3, 2)},
        {"strides": (4, 1)},
        {"strides": (1 << 50, 1 << 50)},
        {"shape": (1 << 50, 1 << 50), "strides": (0, 0)},
        {"shape": (2,)},
        {"buffer": NO_BUFFER},
        {"same_as": "elsewhere"},
        {"same_as": "w"},
    ],
    ids=lambda odd: "-".join(odd) + str(next(iter(odd.values())))[:12],
)
@pytest.mark.parametrize("leaf", [TORCH, NUMPY], ids=["torch", "numpy"])
def test_a_leaf_that_no_capture_writes_is_a_manifest_error(leaf: Leaf, odd: dict[str, Any]):
    """An untrusted leaf cannot reach outside its buffer, nor name a dtype whose items are pointers."""
    with pytest.raises(ManifestError, match="leaf '"):
        made(leaf._replace(**odd))


def test_a_tensor_that_starts_inside_an_item_is_a_manifest_error():
    """Tensors of torch are aligned to their items; arrays of numpy need not be."""
    with pytest.raises(ManifestError, match="inside an item"):
        made(TORCH._replace(offset_bytes=2, shape=(1, 1)))
    assert made(NUMPY._replace(offset_bytes=2, shape=(1, 1)))["w"].shape == (1, 1)


def test_integers_that_require_a_gradient_are_a_manifest_error():
    """No tensor of integers has a gradient in torch, and none comes out of a manifest."""
    with pytest.raises(ManifestError, match="requires a gradient"):
        made(TORCH._replace(dtype="int32", role="parameter", requires_grad=True))


def test_a_leaf_cannot_be_the_same_as_a_different_one():
    """Two leaves of one object agree in all that is the object's, and chains are not followed."""
    with pytest.raises(ManifestError, match="differs from it"):
        made(TORCH, TORCH._replace(path="v", same_as="w", shape=(1, 1)))
    with pytest.raises(ManifestError, match="no leaf of its own"):
        made(TORCH, TORCH._replace(path="v", same_as="w"), TORCH._replace(path="u", same_as="v"))


@settings(deadline=None)
@given(
    framework=st.sampled_from(["torch", "numpy"]),
    dtype=st.sampled_from(["float32", "int8", "bool", "complex64", "<f4", "|u1", "<U3", "<M8[ns]", "|S1"]),
    item_bytes=st.integers(0, 16),
    dimensions=st.lists(st.tuples(st.integers(0, 1 << 53), st.integers(0, 1 << 53)), max_size=4),
    buffer=st.integers(-1, 0),
    offset_bytes=st.integers(0, 1 << 53),
    requires_grad=st.booleans(),
    role=st.sampled_from(["parameter", "tensor", "array", "other"]),
)
def test_any_numbers_in_a_leaf_give_an_array_inside_the_buffer_or_one_error(**fields: Any):
    """Whatever sizes a manifest claims, no array reaches outside its buffer."""
    dimensions = fields.pop("dimensions")
    sizes, steps = (tuple(dimension[axis] for dimension in dimensions) for axis in (0, 1))
    leaf = Leaf(path="w", shape=sizes, strides=steps, same_as="", **fields)
    buffer = np.zeros(64, np.uint8)
    try:
        array = arrays([leaf], lambda index: buffer)["w"]
    except ManifestError:
        return
    if leaf.buffer != NO_BUFFER and 0 not in sizes:
        last = sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) + 1
        assert leaf.offset_bytes + last * leaf.item_bytes <= buffer.size
    assert tuple(array.shape) == sizes


def test_arrays_are_the_state_that_survey_saw():
    """arrays() gives each path its array, tied ones as one object, parameters as parameters."""
    weight = nn.Parameter(torch.arange(3.0), requires_grad=False)
    stored = store({"a": weight, "b": weight, "n": np.arange(2)})
    found = arrays(stored.leaves, stored.buffer_array)
    assert list(found) == ['["a"]', '["b"]', '["n"]']
    assert found['["a"]'] is found['["b"]']
    assert type(found['["a"]']) is nn.Parameter
    assert found['["n"]'].tolist() == [0, 1]


def test_each_buffer_is_asked_for_once():
    """Views of one buffer share one array over it, so that a device hands out each view once."""
    big = torch.arange(8.0)
    stored = store([big[:4], big[2:]])
    asked: list[int] = []

    def buffer_array(index: int) -> Any:
        asked.append(index)
        return stored.buffer_array(index)

    arrays(stored.leaves, buffer_array)
    assert asked == [0]


def test_a_process_without_torch_says_what_to_install():
    """A snapshot with tensors on a machine without torch is a mismatch with the command that helps."""
    code = """
import sys
sys.modules["torch"] = None
from coldstart.errors import StateMismatchError, UsageError
from coldstart.frameworks import arrays, meta
from coldstart.manifest import Leaf
leaf = Leaf("w", "torch", "tensor", "float32", 4, (1,), (1,), 0, 0, False, "")
for attempt, kind in ((lambda: arrays([leaf], bytearray), StateMismatchError), (lambda: meta().__enter__(), UsageError)):
    try:
        attempt()
    except kind as error:
        assert "pip install 'coldstart-gpu[torch]'" in str(error)
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_surveying_twice_names_everything_alike():
    """Two processes with the same structure agree on paths; here, two instances do."""
    names = [[found.leaf.path for found in survey(model(a=nn.LSTM(2, 2), b=nn.Linear(1, 1))).leaves] for _ in range(2)]
    assert names[0] == names[1]
