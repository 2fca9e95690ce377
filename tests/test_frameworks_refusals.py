"""What cannot be captured exactly is refused by its path, with the remedy."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from coldstart.errors import StateMismatchError, UncapturableError
from coldstart.frameworks import bind, survey

REMEDY = "the start keeps to rung files: load runs again from restored files"


class Params4bit(nn.Parameter):
    """Quantized weights whose scales hang beside the tensor, as bitsandbytes keeps them."""

    quant_state: Any = None


class Plain(torch.Tensor):
    """A subclass that says nothing of its parts."""


class Unready(Plain):
    """A subclass that could be taken apart but is not able to yet."""

    def __tensor_flatten__(self) -> None:
        raise NotImplementedError

    @staticmethod
    def __tensor_unflatten__(*_: object) -> None:
        raise NotImplementedError


class Misnamed(Unready):
    """A subclass that names a part which is no tensor."""

    def __tensor_flatten__(self) -> Any:
        return ["shape", "missing"], None


def with_attribute(value: object) -> torch.Tensor:
    """A tensor that carries a Python attribute."""
    tensor = torch.zeros(2)
    tensor.scale = value
    return tensor


def offloaded() -> nn.Module:
    """A module as accelerate leaves it: a hook that has the weights, and parameters without bytes."""
    module = nn.Linear(2, 2, device="meta")
    module._hf_hook = object()
    return module


def quantized() -> torch.Tensor:
    """A tensor of torch's own quantization, which it deprecates but still makes."""
    return torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)


REFUSED = {
    "meta": (lambda: torch.zeros(2, device="meta"), "is on the meta device"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "is a sparse or packed tensor"),
    "csr": (lambda: torch.eye(2).to_sparse_csr(), "is a sparse or packed tensor"),
    "mkldnn": (lambda: torch.eye(2).to_mkldnn(), "is a sparse or packed tensor"),
    "quantized": (quantized, "is a quantized tensor"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]), "is a nested tensor"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)], layout=torch.jagged),
        "NestedTensor, a kind of tensor that cannot be taken apart",
    ),
    "conjugate": (lambda: torch.zeros(2, dtype=torch.complex64).conj(), "is a lazy conjugate"),
    "negative": (lambda: torch.zeros(2, dtype=torch.complex64).conj().imag, "is a lazy conjugate, negative"),
    "zero": (lambda: torch._efficientzerotensor(2), "is a lazy conjugate, negative or zero"),
    "subclass": (lambda: torch.zeros(2).as_subclass(Plain), "Plain, a kind of tensor that cannot be taken apart"),
    "unready": (lambda: torch.zeros(2).as_subclass(Unready), "Unready, a kind of tensor that cannot be taken apart"),
    "misnamed": (lambda: torch.zeros(2).as_subclass(Misnamed), "Misnamed, a kind of tensor that cannot be taken apart"),
    "bitsandbytes": (lambda: Params4bit(torch.zeros(2), requires_grad=False), "is a Params4bit of bitsandbytes"),
    "lazy": (lambda: nn.UninitializedParameter(), "is a lazy parameter without a shape"),
    "graph": (lambda: nn.Parameter(torch.zeros(2)) * 2, "is the result of a computation"),
    "subclass graph": (lambda: nn.Parameter(TwoTensor(torch.ones(1), torch.ones(1))) * 2, "is the result of a comp"),
    "attribute": (lambda: with_attribute(torch.zeros(1)), "is an attribute of a tensor"),
    "subclass attribute": (
        lambda: with_attribute(TwoTensor(torch.ones(1), torch.ones(1))),
        "is an attribute of a tensor",
    ),
    "deep attribute": (lambda: with_attribute([{"s": np.zeros(1)}]), "is an attribute of a tensor"),
    "module attribute": (lambda: with_attribute(nn.Linear(1, 1)), "is an attribute of a tensor"),
    "script": (lambda: torch.jit.script(nn.Linear(2, 2)), "is a TorchScript module"),
    "keyed by tensor": (lambda: {torch.zeros(1): torch.zeros(2)}, "has a tensor or a module as its key"),
    "object": (lambda: np.array([object()]), "is an array of the dtype object"),
    "structured": (lambda: np.zeros(2, "i4,f4"), "is an array of the dtype"),
    "void": (lambda: np.zeros(2, "V3"), "is an array of the dtype"),
    "text": (lambda: np.array(["a"], np.dtypes.StringDType()), "is an array of the dtype StringDType"),
    "masked": (lambda: np.ma.masked_array([1, 2], [True, False]), "is a MaskedArray"),
    "matrix": (lambda: np.zeros((2, 2)).view(np.matrix), "is a matrix"),
    "backwards": (lambda: np.arange(4)[::-1], "runs backwards"),
    "between items": (lambda: np.zeros(2, "u1,i4")["f1"], "runs backwards or between items"),
}


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*:UserWarning", "ignore:.*[Ss]parse CSR.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning", "ignore:.*nested tensors.*:UserWarning")
@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_with_path_and_remedy(name: str):
    """Each error says where, what it is, and what the start does instead."""
    make, reason = REFUSED[name]
    with pytest.raises(UncapturableError) as caught:
        survey({"model": {"w": make()}})
    assert str(caught.value).startswith('state["model"]["w"]')
    assert reason in str(caught.value)
    assert str(caught.value).endswith(REMEDY)
    assert caught.value.path.startswith('["model"]["w"]')


def test_offloaded_modules_are_refused():
    """Offloading by accelerate leaves every tensor without bytes, and the message says so."""
    with pytest.raises(UncapturableError, match=r"state\.weight is on the meta device.*accelerate"):
        survey(offloaded())


def test_distributed_tensors_are_refused():
    """A DTensor flattens too, but its placement is of a process group that the next process has not."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tensor = DTensor.from_local(torch.zeros(2), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(UncapturableError, match=r"DTensor, a kind of tensor that cannot be taken apart"):
            survey([tensor])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("sets", [1, 2])
def test_a_tuple_of_tensors_in_a_set_is_refused_though_it_is_elsewhere_too(sets: int):
    """A tuple is made anew when a member is replaced, and a set would keep the old one."""
    member = (torch.zeros(1), 2)
    with pytest.raises(UncapturableError, match="lies in a set"):
        survey([member, *({member} for _ in range(sets))])


def test_more_arrays_than_the_format_holds_are_refused(monkeypatch: pytest.MonkeyPatch):
    """The limit of the manifest is found before anything is written."""
    monkeypatch.setattr(importlib.import_module("coldstart.frameworks.survey"), "MAX_LEAVES", 3)
    survey([np.zeros(1)] * 3)
    with pytest.raises(UncapturableError, match="state holds 4 arrays, more than the 3"):
        survey([np.zeros(1)] * 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tensors_on_a_device_are_refused():
    """Tensors on a GPU are not read through the CPU."""
    with pytest.raises(UncapturableError, match="this start's state belongs on the cpu"):
        survey([torch.zeros(1, device="cuda")])


def test_a_part_that_requires_a_gradient_itself_is_refused():
    """A wrapper around parameters would lose which of its parts trains."""
    wrapper = TwoTensor(torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True))
    with pytest.raises(UncapturableError, match="requires a gradient of its own"):
        survey([wrapper])


def test_items_that_cannot_be_aligned_together_are_refused():
    """Tensors of two item sizes at an odd distance on one memory have no common alignment."""
    memory = np.zeros(64, np.uint8)
    odd = torch.frombuffer(memory[1:33], dtype=torch.float32)
    even = torch.frombuffer(memory[8:40], dtype=torch.float64)
    with pytest.raises(UncapturableError, match="shares its memory with an array of another item size"):
        survey([odd, even])


@pytest.mark.parametrize("value", [1, "tag", [1, {"k": None}], lambda: 0, len])
def test_harmless_attributes_of_a_tensor_are_no_obstacle(value: object):
    """Tags and weight loaders on parameters are common; only arrays there are refused."""
    assert [found.leaf.path for found in survey([with_attribute(value)]).leaves] == ["[0]"]


@pytest.mark.parametrize("name", ["subclass", "sparse", "attribute", "backwards"])
def test_a_skeleton_with_such_an_array_is_a_mismatch(name: str):
    """What could not be captured cannot be in a skeleton either: bind() says so as a difference."""
    good = torch.zeros(2)
    leaves = [found.leaf for found in survey({"w": good}).leaves]
    with pytest.raises(StateMismatchError) as caught:
        bind({"w": REFUSED[name][0]()}, leaves, {}, lambda index: np.zeros(8, np.uint8))
    assert REFUSED[name][1] in str(caught.value) or "and not captured" in str(caught.value)


def test_a_skeleton_without_bytes_is_welcome():
    """The meta device is refused in a capture and expected in a skeleton."""
    leaves = [found.leaf for found in survey({"w": torch.zeros(2)}).leaves]
    made = bind({"w": torch.zeros(2, device="meta")}, leaves, {}, lambda index: np.zeros(8, np.uint8))
    assert made["w"].tolist() == [0.0, 0.0]


def test_packed_parameters_of_dynamic_quantisation_are_refused():
    """What torch packs into a compiled object cannot be read back exactly, so it is refused and not left out silently."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(4, 4)), {torch.nn.Linear})
    with pytest.raises(UncapturableError, match="packed parameters"):
        survey(model)
