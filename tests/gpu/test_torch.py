"""States of torch in a GPU's memory: captured there, restored through ring, nvCOMP and kernels, and bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from coldstart.devices.device_bytes import DeviceBytes
from coldstart.frameworks import arrays, bind, rebuild, survey
from tests.contracts.gpu_torch import TorchContract, bits, network, tensors, tensors_of
from tests.generations import fetched

if TYPE_CHECKING:
    from coldstart.devices.base import Arena
    from coldstart.manifest import Manifest
    from coldstart.stores.base import Store
    from tests.gpu.conftest import RealMachine

pytestmark = pytest.mark.gpu


class TestTorch(TorchContract):
    device = "cuda"
    gpu = 0

    @pytest.fixture(autouse=True)
    def on(self, machine: RealMachine, torch: Any) -> None:
        self.machine = machine

    def arena_with(self, manifest: Manifest, store: Store) -> Arena:
        arena, landing = self.machine.restored(manifest, store, verify_raw=True)
        assert landing.degraded == []
        on_host = fetched(manifest, store)
        for number in range(len(manifest.segments)):  # what this GPU wrote a CPU reads
            assert bytes(arena.readable(number)) == bytes(on_host.readable(number))
        return arena

    def test_a_survey_names_the_memory_of_the_gpu(self, torch: Any):
        """Storages on the device are found there and not copied; tensors of the host stay the host's."""
        state = {"here": torch.ones(100, device="cuda"), "host": torch.ones(100)}
        found = survey(state, gpu=0)
        storages = {leaf.leaf.path: found.storages[leaf.leaf.buffer] for leaf in found.leaves}
        (here,) = (storage for path, storage in storages.items() if "here" in path)
        (host,) = (storage for path, storage in storages.items() if "host" in path)
        assert here.data.address <= state["here"].data_ptr() < here.data.address + here.length_bytes
        assert isinstance(here.data, DeviceBytes)
        assert not isinstance(host.data, DeviceBytes)

    def test_memory_of_torch_and_of_an_arena_are_one_device(self, torch: Any):
        """What torch computes with an arena's tensors is what it computes with its own, on streams of its own too."""
        state = tensors("cuda")
        manifest, buffer_array = self.stored(state, "planes+zstd")
        found = rebuild(manifest.tree, arrays(manifest.leaves, buffer_array))
        with torch.cuda.stream(torch.cuda.Stream()):
            products = found["whole"] @ found["whole"].t(), state["whole"] @ state["whole"].t()
        torch.cuda.synchronize()
        assert bits(products[0]) == bits(products[1])
        assert [name for name, _ in tensors_of(found)] == [name for name, _ in tensors_of(state)]

    def test_a_module_moves_on_like_any(self, torch: Any):
        """A restored module can be copied to the host and to another dtype."""
        module = network("cuda")
        manifest, buffer_array = self.stored(module, "raw")
        bound = bind(network("meta"), manifest.leaves, manifest.modules, buffer_array)
        assert bits(bound.to("cpu").embed.weight) == bits(module.embed.weight)
        assert bound.to(torch.float32).embed.weight.dtype == torch.float32
