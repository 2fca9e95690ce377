"""Modules and tensors of torch, captured from a device and bound to it again, bit for bit.

For a CPU and for a GPU alike: a subclass says which device, and how a generation is brought into an arena.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from coldstart.capture import Capture, Encoding, write_generation
from coldstart.frameworks import arrays, bind, rebuild, survey
from coldstart.repository import Repository
from coldstart.stores.memory import MemoryStore
from tests.contracts.gpu_parity import CODECS, buffers_of
from tests.generations import KEY, fetched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstart.devices.base import Arena
    from coldstart.manifest import Manifest
    from coldstart.stores.base import Store


def bits(tensor: Any) -> bytes:
    """The elements of a tensor, in their order, as bytes."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def network(device: str) -> Any:
    """A small module with bf16 parameters, a tied one, buffers, and no grain of regularity in its bits."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(300, 64, dtype=torch.bfloat16)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64, dtype=torch.bfloat16) for _ in range(6))
            self.norm = torch.nn.LayerNorm(64)
            self.convolution = torch.nn.Conv2d(8, 4, 3)
            self.head = torch.nn.Linear(64, 300, bias=False, dtype=torch.bfloat16)
            self.head.weight = self.embed.weight
            self.register_buffer("steps", torch.arange(7))
            self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).tril(), persistent=False)
            self.layers[2].weight.requires_grad_(False)

    with torch.device(device):
        torch.manual_seed(5)
        made = Network().eval()
        made.layers[1].train()
        made.convolution = made.convolution.to(memory_format=torch.channels_last)
    return made


def tensors(device: str) -> dict[str, Any]:
    """Tensors whose memory is laid out in every way that a capture keeps."""
    import torch

    whole = torch.randn(50, 40, generator=torch.Generator().manual_seed(2)).to(device)
    return {
        "whole": whole,
        "rows": whole[10:20],
        "columns": whole.t(),
        "stepped": whole[::2, 1::3],
        "expanded": torch.arange(6.0, device=device).reshape(1, 6).expand(4, 6),
        "images": torch.randn(2, 3, 8, 8).to(device).to(memory_format=torch.channels_last),
        "halves": torch.randn(1001).to(device, torch.bfloat16),
        "small": torch.randn(33).to(device).to(torch.float8_e4m3fn),
        "numbers": torch.arange(-9, 9, dtype=torch.int64, device=device),
        "flags": (torch.arange(11, device=device) % 3 == 0),
        "complex": torch.randn(5, dtype=torch.complex64).to(device),
        "empty": torch.empty(0, 4, device=device),
        "scalar": torch.tensor(2.5, device=device),
        "plain": [1, "two", 3.0],
    }


class TorchContract:
    """Override ``device``, ``gpu`` and ``arena_with``."""

    device = "cpu"
    gpu = -1

    def arena_with(self, manifest: Manifest, store: Store) -> Arena:
        """An arena that holds a generation."""
        return fetched(manifest, store)

    @pytest.fixture(params=CODECS)
    def codec(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def stored(self, state: Any, codec: str) -> tuple[Manifest, Any]:
        """Capture a state, and give the manifest and the buffers of a fresh arena with it."""
        self.synchronize()
        repository = Repository(MemoryStore())
        capture = Capture(
            name="model",
            key=KEY,
            survey=survey(state, gpu=self.gpu),
            files=(),
            device_type=self.device,
            parent=None,
            parent_key="",
            generation=1,
            kinds={},
            warmup_digests=("d" * 32,),
            provenance={},
        )
        written = write_generation(capture, repository, encoding=Encoding(codec, 3), pace=lambda: None)
        arena = self.arena_with(written.manifest, repository.store)
        arena.seal()
        return written.manifest, buffers_of(written.manifest, arena)

    def synchronize(self) -> None:
        """Wait for what the state was computed by."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def test_tensors_come_back_as_they_were(self, codec: str):
        """Device, dtype, shape, strides and bits; what shared memory shares it again, and plain values are the same."""
        state = tensors(self.device)
        manifest, buffer_array = self.stored(state, codec)
        found = rebuild(manifest.tree, arrays(manifest.leaves, buffer_array))
        for name, expected in tensors_of(state):
            tensor = found[name]
            assert tensor.device.type == self.device, name
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
            if expected.numel():
                assert tensor.stride() == expected.stride(), name
            assert bits(tensor) == bits(expected), name
        assert found["plain"] == [1, "two", 3.0]
        found["whole"][10:20] = 0
        self.synchronize()
        assert not bits(found["rows"]).strip(b"\0")

    def test_a_module_is_bound(self, codec: str):
        """A skeleton on the meta device gets parameters and buffers: tied where they were, with gradients where they had them."""
        import torch

        module = network(self.device)
        manifest, buffer_array = self.stored(module, codec)
        bound = bind(network("meta"), manifest.leaves, manifest.modules, buffer_array)
        expected = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        found = {**dict(bound.named_parameters()), **dict(bound.named_buffers())}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert bits(found[name]) == bits(tensor), name
            assert (found[name].requires_grad, found[name].device.type) == (tensor.requires_grad, self.device), name
            assert found[name].stride() == tensor.stride(), name
        assert bound.head.weight is bound.embed.weight
        assert isinstance(bound.head.weight, torch.nn.Parameter)
        assert [each.training for each in bound.modules()] == [each.training for each in module.modules()]

    def test_a_bound_module_computes_the_same(self):
        """Bit for bit, and its memory is the arena's: a change there is a change of the module."""
        import torch

        module = network(self.device)
        manifest, buffer_array = self.stored(module, "planes+zstd")
        bound = bind(network("meta"), manifest.leaves, manifest.modules, buffer_array)
        x = torch.arange(12, device=self.device)

        def answer(each: Any) -> Any:
            with torch.inference_mode():
                hidden = each.embed(x)
                for layer in each.layers:
                    hidden = torch.nn.functional.gelu(layer(hidden))
                return each.head(hidden)

        assert bits(answer(bound)) == bits(answer(module))
        again = bind(network("meta"), manifest.leaves, manifest.modules, buffer_array)
        with torch.no_grad():
            again.norm.weight.fill_(7)
        self.synchronize()
        assert bound.norm.weight.tolist() == [7.0] * 64


def tensors_of(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in state.items() if hasattr(value, "numel"))


__all__ = ["TorchContract"]
