"""Torch states through bytes and back into a skeleton, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

from coldstart.frameworks import meta, survey
from coldstart.manifest import NO_BUFFER
from tests.frameworks_arena import store

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


class Tied(nn.Module):
    """A language model's skeleton: the head is the embedding, with buffers of both sorts and a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(2)])
        self.extras = nn.ModuleDict({"gate": nn.Linear(6, 1), "odd-name": nn.Dropout(0.5)})
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(1), requires_grad=False)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(6))
        self.register_buffer("mask", torch.rand(6, 6) > 0.5, persistent=False)
        self.register_buffer("absent", None)
        self.table = torch.rand(6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Some arithmetic that every array takes part in."""
        x = self.embed(ids) + self.table + self.positions * self.mask[0]
        for block in self.blocks:
            x = x + block(x) * self.scales[0] * self.scales[1]
        return self.head(x * self.extras["odd-name"](torch.sigmoid(self.extras["gate"](x))))


class Convolutional(nn.Module):
    """BatchNorm's counters and a channels_last weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A small net."""
        return self.norm(self.conv(x))


class Pipeline:
    """What an image pipeline looks like: modules in attributes and dicts, no module itself."""

    def __init__(self) -> None:
        self.unet = Convolutional()
        self.parts = {"text": Tied(), 3: nn.Linear(2, 2)}
        self.scheduler = Scheduler(betas=torch.linspace(0, 1, 5), steps=np.arange(5))
        self.unet.owner = self
        self.name = "pipeline"

    def __call__(self, image: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
        """All of it, used."""
        return [self.unet(image), self.parts["text"](ids), self.parts[3](self.scheduler.betas[:2])]


@dataclasses.dataclass
class Scheduler:
    """A dataclass that holds arrays of two libraries."""

    betas: torch.Tensor
    steps: Any


def bits(tensor: torch.Tensor) -> bytes:
    """The elements as bytes, whatever the dtype and strides."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(one: Any, other: Any) -> None:
    """Two surveys describe equal arrays: leaves, strides and bytes."""
    first, second = survey(one), survey(other)
    assert first.modules == second.modules
    assert len(first.leaves) == len(second.leaves)
    for left, right in zip(first.leaves, second.leaves, strict=True):
        ours = left.leaf._replace(buffer=0, offset_bytes=0)
        assert ours == right.leaf._replace(buffer=0, offset_bytes=0)
        assert type(left.array) is type(right.array)
        if isinstance(left.array, torch.Tensor):
            assert bits(left.array) == bits(right.array)
        else:
            assert left.array.tobytes() == right.array.tobytes()


@pytest.mark.parametrize("without_bytes", [False, True])
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (Tied, (torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]),)),
        (Convolutional, (torch.rand(2, 3, 8, 8),)),
        (lambda: nn.LSTM(3, 4, num_layers=2), (torch.rand(5, 2, 3),)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), (torch.rand(2, 3),)),
        (lambda: nn.MultiheadAttention(4, 2), (torch.rand(3, 1, 4), torch.rand(3, 1, 4), torch.rand(3, 1, 4))),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (torch.rand(2, 3, 4),)),
        (lambda: nn.Linear(3, 4).to(torch.bfloat16), (torch.rand(2, 3, dtype=torch.bfloat16),)),
        (Pipeline, (torch.rand(2, 3, 8, 8), torch.tensor([[1, 2, 3, 4, 5, 6]]))),
    ],
)
def test_a_fresh_skeleton_answers_like_the_captured_state(make: Any, inputs: Any, without_bytes: bool):
    """Bound arrays give the outputs of the original, to the bit, from real skeletons and from ones without bytes."""
    torch.manual_seed(1)
    state = make()
    for module in [state] if isinstance(state, nn.Module) else [state.unet, *state.parts.values()]:
        module.eval()
    stored = store(state)
    if without_bytes:
        with meta():
            skeleton = make()
    else:
        skeleton = make()
    assert stored.into(skeleton) is skeleton
    assert_same(state, skeleton)
    with torch.inference_mode():
        expected, answer = state(*inputs), skeleton(*inputs)
    for one, other in zip(tree_leaves(expected), tree_leaves(answer), strict=True):
        assert one is other is None or bits(one) == bits(other)


def test_paths_are_those_of_the_state_dict():
    """Parameters and buffers have the names that torch gives them; tied ones and plain tensors come beside."""
    state = Tied()
    leaves = {found.leaf.path: found.leaf for found in survey(state).leaves}
    assert set(state.state_dict()) <= set(leaves)
    assert set(leaves) - set(state.state_dict()) == {"mask", "table"}
    assert leaves["head.weight"].same_as == "embed.weight"
    roles = {name: leaves[name].role for name in ("embed.weight", "positions", "mask", "table")}
    assert roles == {"embed.weight": "parameter", "positions": "buffer", "mask": "buffer", "table": "tensor"}
    assert not leaves["scales.1"].requires_grad


def test_submodules_named_before_the_plain_attributes_that_hold_them_too():
    """A list that a module keeps beside its children does not take their names away."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(1, 1)
            self.first.friends = []
            self.second = nn.Linear(1, 1)
            self.first.friends.append(self.second)

    assert {found.leaf.path for found in survey(Model()).leaves} == set(Model().state_dict())


def test_tied_parameters_are_one_object_again():
    """The head and the embedding are the very same parameter, whether build() ties them or not."""
    stored = store(Tied())
    for tie in (True, False):
        skeleton = Tied()
        if not tie:
            skeleton.head.weight = nn.Parameter(torch.zeros(11, 6))
        stored.into(skeleton)
        assert skeleton.head.weight is skeleton.embed.weight


def test_what_was_not_tied_is_not_tied_afterwards():
    """A skeleton that ties what the captured state held twice gets two objects."""
    state = Tied()
    state.head.weight = nn.Parameter(torch.zeros(11, 6))
    skeleton = store(state).into(Tied())
    assert skeleton.head.weight is not skeleton.embed.weight
    assert not skeleton.head.weight.any()


def test_parameters_are_views_of_the_arena():
    """No byte is copied: writing the arena changes the model, and training writes the arena."""
    stored = store(nn.Linear(2, 1, bias=False))
    model = stored.into(nn.Linear(2, 1, bias=False))
    stored.arena[:8] = np.frombuffer(np.array([3.0, 4.0], "<f4").tobytes(), np.uint8)
    assert model(torch.tensor([1.0, 10.0])).item() == 43.0
    with torch.no_grad():
        model.weight.zero_()
    assert not stored.arena[:8].any()


def test_bound_arrays_keep_the_arena_alive():
    """The arena may be forgotten by everybody else while a tensor of it lives."""
    model = store(nn.Linear(300, 300)).into(nn.Linear(300, 300))
    before = bits(model.weight)
    garbage = [torch.zeros(300, 300) for _ in range(20)]
    assert bits(model.weight) == before
    assert len(garbage) == 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_travels(dtype: torch.dtype):
    """Each dtype comes back with its name, its bits and its shape, from a tree and in a skeleton."""
    tensor = torch.randint(0, 2, (3, 16), dtype=torch.uint8).view(dtype)
    stored = store({"t": tensor})
    for made in (stored.alone(), stored.into({"t": torch.empty_like(tensor, device="meta")})):
        assert (made["t"].dtype, made["t"].shape) == (dtype, tensor.shape)
        assert bits(made["t"]) == bits(tensor)
    assert stored.leaves[0].dtype == str(dtype).removeprefix("torch.")


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", ["complex32", "float8_e8m0fnu", "float4_e2m1fn_x2", "uint4", "int4", "bits8"])
def test_dtypes_that_torch_hardly_supports_travel_too(name: str):
    """A dtype without arithmetic is bytes with a name."""
    data = torch.randint(0, 255, (8,), dtype=torch.uint8)
    tensor = torch.empty(0, dtype=getattr(torch, name)).set_(data.untyped_storage(), 0, (2,), (1,))
    made = store({"t": tensor}).alone()["t"]
    assert made.dtype == tensor.dtype
    assert bytes(made.untyped_storage())[: 2 * tensor.element_size()] == bytes(
        data[: 2 * tensor.element_size()].numpy()
    )


STRANGE = {
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "empty_permuted": torch.empty(0, 3, 2).permute(2, 0, 1),
    "expanded": torch.arange(3.0).expand(4, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "strided": torch.arange(20.0)[2::3],
    "packed_int4": torch.randint(0, 255, (4, 4), dtype=torch.uint8),
    "reinterpreted": torch.arange(4, dtype=torch.int32).view(torch.bfloat16),
}


@pytest.mark.parametrize("name", list(STRANGE))
def test_every_layout_travels(name: str):
    """Strides and offsets come back as they were: nothing is made contiguous on the way."""
    tensor = STRANGE[name]
    stored = store({"t": tensor})
    for made in (stored.alone()["t"], stored.into({"t": torch.empty(tensor.shape, dtype=tensor.dtype)})["t"]):
        assert (made.shape, made.stride(), bits(made)) == (tensor.shape, tensor.stride(), bits(tensor))


def test_arrays_without_elements_have_no_buffer_and_are_not_tied():
    """All empty tensors lie at address 0, which makes none of them the same."""
    state = {"a": torch.empty(0), "b": torch.empty(0), "c": np.empty((0, 2))}
    found = survey(state)
    assert [(leaf.leaf.buffer, leaf.leaf.same_as) for leaf in found.leaves] == [(NO_BUFFER, "")] * 3
    assert found.storages == ()
    assert store(state).alone()["a"].shape == (0,)


def test_views_share_one_storage_trimmed_to_what_they_use():
    """Two windows on a big tensor are stored as the bytes between them, and are windows on one memory again."""
    big = torch.arange(1_000_000.0)
    state = {"head": big[1000:1100], "tail": big[1050:1200], "far": big[900_000:900_010]}
    found = survey(state)
    assert [storage.length_bytes for storage in found.storages] == [800, 40]
    made = store(state).alone()
    made["head"][60] = -1.0
    assert made["tail"][10] == -1.0
    assert made["tail"].tolist()[11:] == big[1061:1200].tolist()


def test_parts_of_one_flat_allocation_stay_together():
    """Neighbours in one allocation (flattened RNN weights) share a storage; neighbours by accident do not."""
    flat = torch.rand(64)
    found = survey([flat[:10], flat[16:26], torch.rand(4)])
    assert [leaf.leaf.buffer for leaf in found.leaves] == [0, 0, 1]
    assert [leaf.leaf.offset_bytes for leaf in found.leaves] == [0, 64, 0]


def test_allocations_that_touch_are_two_storages():
    """Where one allocation ends and another begins says nothing about the state."""
    memory = np.zeros(32, np.uint8)
    state = [torch.frombuffer(memory[start : start + 16], dtype=torch.float32) for start in (0, 16)]
    assert [storage.length_bytes for storage in survey(state).storages] == [16, 16]


def test_storages_are_numbered_by_their_first_leaf():
    """The order of storages is the order of the walk and not of addresses, which differ in every process."""
    tensors = [torch.rand(100) for _ in range(20)]
    tensors.sort(key=lambda tensor: -tensor.data_ptr())
    assert [found.leaf.buffer for found in survey(tensors).leaves] == list(range(20))


def test_numpy_and_torch_on_the_same_memory_share_it_again():
    """A tensor made from an array is one storage with it, and stays so."""
    array = np.arange(10, dtype=np.float32)
    state = {"array": array, "tensor": torch.from_numpy(array)[2:]}
    stored = store(state)
    assert len(stored.offsets) == 1
    made = stored.alone()
    made["array"][2] = 77.0
    assert made["tensor"][0] == 77.0


def test_items_of_different_sizes_on_one_memory():
    """Views of several dtypes on one allocation are aligned for the largest of them."""
    base = torch.arange(32, dtype=torch.uint8)
    state = [base[2:5], base[8:24].view(torch.float64), base[4:8].view(torch.int16)]
    stored = store(state)
    made = stored.into([torch.empty_like(tensor) for tensor in state])
    assert [bits(tensor) for tensor in made] == [bits(tensor) for tensor in state]
    assert [found.leaf.buffer for found in survey(made).leaves] == [0, 0, 0]


def test_storage_data_is_a_view_that_keeps_its_memory_alive():
    """A capture reads the live bytes, also after the state dropped the tensor."""
    state = {"t": torch.arange(4, dtype=torch.uint8)}
    data = survey(state).storages[0].data
    state["t"][0] = 9
    assert data.tolist() == [9, 1, 2, 3]
    assert not data.flags.writeable
    del state["t"]
    torch.zeros(4)
    assert data.tolist() == [9, 1, 2, 3]


def test_version_counters_tell_writes():
    """An in-place write raises a tensor's counter; arrays of numpy and inference tensors have none."""
    with torch.inference_mode():
        silent = torch.zeros(1)
    state = {"t": torch.zeros(2), "n": np.zeros(1), "i": silent}
    before = [found.version and found.version() for found in survey(state).leaves]
    state["t"].add_(1)
    after = [found.version and found.version() for found in survey(state).leaves]
    assert after[0] != before[0]
    assert (before[1:], after[1:]) == ([None, None], [None, None])


def test_modes_come_back_as_captured():
    """A model captured in eval mode with one part in training mode is exactly that again."""
    state = Tied().eval()
    state.extras["odd-name"].train()
    skeleton = store(state).into(Tied())
    assert [module.training for module in skeleton.modules()] == [module.training for module in state.modules()]
    assert not skeleton.training
    assert skeleton.extras["odd-name"].training


def test_gradients_are_required_as_captured():
    """requires_grad is the capture's, for parameters and plain tensors, whatever build() made."""
    state = {"frozen": nn.Parameter(torch.zeros(1), requires_grad=False), "leaf": torch.zeros(1, requires_grad=True)}
    stored = store(state)
    skeleton = {"frozen": nn.Parameter(torch.zeros(1)), "leaf": torch.zeros(1)}
    for made in (stored.into(skeleton), stored.alone()):
        assert type(made["frozen"]) is nn.Parameter
        assert (made["frozen"].requires_grad, made["leaf"].requires_grad) == (False, True)


def test_what_else_the_skeleton_has_stays():
    """Hooks, configuration and attributes of parameters are build()'s, and survive the binding."""
    stored = store(nn.Linear(2, 2))
    skeleton = nn.Linear(2, 2)
    calls = []
    skeleton.register_forward_hook(lambda *_: calls.append(1))
    skeleton.weight.loader = "mine"
    skeleton.config = {"k": 1}
    stored.into(skeleton)
    skeleton(torch.zeros(1, 2))
    assert (calls, skeleton.weight.loader, skeleton.config) == ([1], "mine", {"k": 1})


def test_plain_attributes_tuples_and_dicts_of_a_module():
    """Tensors that a module keeps outside its registries are replaced where they are."""

    def make(fill: float) -> nn.Module:
        module = nn.Module()
        module.cache = {"k": torch.full((2,), fill), 0: (torch.full((1,), fill), "x")}
        module.holder = Scheduler(torch.full((3,), fill), np.full(2, fill))
        return module

    made = store(make(5.0)).into(make(0.0))
    assert made.cache["k"].tolist() == [5.0, 5.0]
    assert (made.cache[0][0].item(), made.cache[0][1]) == (5.0, "x")
    assert (made.holder.betas.tolist(), made.holder.steps.tolist()) == ([5.0] * 3, [5.0] * 2)


def test_a_root_that_cannot_be_changed_is_returned():
    """A tuple or a bare array is made anew: what bind() returns is the state."""
    state = (torch.ones(1), [torch.ones(2)])
    made = store(state).into((torch.zeros(1), [torch.zeros(2)]))
    assert (made[0].tolist(), made[1][0].tolist()) == ([1.0], [1.0, 1.0])
    assert store(torch.ones(3)).into(torch.zeros(3)).tolist() == [1.0] * 3


def test_results_of_torch_are_tuples_too():
    """What torch.max returns has a type with a constructor of its own, and comes back as that type."""
    made = store([torch.max(torch.eye(2), 0)]).into([torch.max(torch.zeros(2, 2), 0)])
    assert type(made[0]) is torch.return_types.max
    assert (made[0].values.tolist(), made[0].indices.tolist()) == ([1.0, 1.0], [0, 1])


# --- tensor subclasses -----------------------------------------------------------------------------------------------


def two(*values: float, device: str = "cpu") -> TwoTensor:
    """A subclass of two tensors."""
    return TwoTensor(torch.tensor(values, device=device), torch.tensor(values, device=device) * 2)


def test_a_tensor_subclass_is_taken_apart_and_made_again():
    """Its inner tensors are leaves; the skeleton's own instance says how to put it together."""
    state = nn.Linear(2, 1)
    state.weight = nn.Parameter(two(1.0, 2.0))
    stored = store(state)
    assert [leaf.path for leaf in stored.leaves] == ["weight.a", "weight.b", "bias"]
    assert stored.tree is None
    with meta():
        skeleton = nn.Linear(2, 1)
        skeleton.weight = nn.Parameter(two(0.0, 0.0), requires_grad=False)
    assert skeleton.weight.is_meta
    stored.into(skeleton)
    assert type(skeleton.weight) is TwoTensor
    assert isinstance(skeleton.weight, nn.Parameter)
    assert skeleton.weight.requires_grad
    assert (skeleton.weight.a.tolist(), skeleton.weight.b.tolist()) == ([1.0, 2.0], [2.0, 4.0])
    stored.arena[:4] = np.frombuffer(np.array([8.0], "<f4").tobytes(), np.uint8)
    assert skeleton.weight.a[0] == 8.0


def test_subclasses_in_subclasses_and_in_two_places():
    """Wrappers nest, and one that is shared is one object again."""
    inner = TwoTensor(two(1.0), two(2.0))
    skeleton_inner = TwoTensor(two(0.0), two(0.0))
    stored = store({"a": inner, "b": [inner]})
    assert [leaf.path for leaf in stored.leaves] == ['["a"].a.a', '["a"].a.b', '["a"].b.a', '["a"].b.b']
    made = stored.into({"a": skeleton_inner, "b": [skeleton_inner]})
    assert made["a"] is made["b"][0]
    assert (made["a"].a.b.item(), made["a"].b.b.item()) == (2.0, 4.0)


def test_a_subclass_needs_build():
    """No tree holds a subclass: its class and metadata are code."""
    found = survey({"w": two(1.0)})
    assert (found.tree, found.tree_obstacle) == (None, 'state["w"] is a TwoTensor')


def test_writes_through_a_subclass_are_seen():
    """The version of an inner tensor counts writes to its wrapper too."""
    state = {"w": two(1.0)}
    before = [found.version and found.version() for found in survey(state).leaves]
    state["w"].add_(1)
    assert [found.version and found.version() for found in survey(state).leaves] != before
