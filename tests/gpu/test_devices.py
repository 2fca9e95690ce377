"""The contracts that the fakes keep, asked of the real ones: driver, cupy, nvCOMP, kernels, arenas, and parity of devices.

The driver's own, and the kernels', are beside those of the fake: ``pytest -m gpu tests/test_fake_driver.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import zstandard

from coldstart.devices.cuda_driver import LIBRARY
from tests.contracts.cupy import CupyContract
from tests.contracts.gpu_devices import CudaArenaContract, GpuContract
from tests.contracts.gpu_parity import CaptureContract, ChunksContract
from tests.contracts.nvcomp import TEXT, Bench, NvcompContract
from tests.fake_gpu.calls import Driver

if TYPE_CHECKING:
    from tests.gpu.conftest import RealMachine

pytestmark = pytest.mark.gpu


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


class TestNvcomp(NvcompContract):
    @pytest.fixture
    def bench(self, machine: RealMachine) -> Bench:
        driver = Driver(LIBRARY)
        driver.open()
        made = Bench(driver, machine.frames(), driver.stream())
        made.zstd([zstandard.compress(TEXT)], [len(TEXT)])  # its code is on the device before a stream is held
        return made
