"""The GPU path on the fake driver, nvCOMP and cupy, under the same contracts as on a real GPU (tests/gpu)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coldstart.devices import cuda_driver
from coldstart.save import device_forms
from tests.contracts.cupy import CupyContract
from tests.contracts.gpu_devices import CudaArenaContract, GpuContract
from tests.contracts.gpu_parity import CaptureContract, ChunksContract
from tests.contracts.gpu_torch import TorchContract
from tests.fake_gpu.machine import FakeMachine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstart.devices.cuda_driver import Gpu


@pytest.fixture
def machine(fake_gpu_folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """The fake GPU, which is the one that ``open_gpu(0)`` gives."""
    made = FakeMachine(fake_gpu_folder)
    monkeypatch.setitem(cuda_driver._opened, (cuda_driver.LIBRARY, 0), made.gpu)
    monkeypatch.setattr(device_forms, "_nvcomp", made.frames)
    return made


@pytest.fixture
def gpu(machine: FakeMachine) -> Gpu:
    """The same, without its machine."""
    return machine.gpu


@pytest.fixture
def cupy(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The fake cupy, importable by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fake_gpu"))
    import cupy

    assert cupy.__version__ == "0.0.fake"
    yield cupy
    del sys.modules["cupy"]


class TestCupy(CupyContract):
    pass


class TestArena(CudaArenaContract):
    pass


class TestGpu(GpuContract):
    pass


class TestChunks(ChunksContract):
    pass


class TestCapture(CaptureContract):
    pass


class TestTorchOnACpu(TorchContract):
    """The tests that a GPU runs of torch, on the device that is here: so they are known to be right themselves."""
