"""The contracts that the fakes keep, asked of the real ones: driver, cupy, nvCOMP, kernels, arenas, and parity of devices.

The driver's own and nvCOMP's are beside those of the fakes: ``pytest -m gpu tests/test_fake_driver.py
tests/test_codecs_nvcomp.py``.
"""

from __future__ import annotations

import pytest

from tests.contracts.cupy import CupyContract
from tests.contracts.gpu_devices import CudaArenaContract, GpuContract
from tests.contracts.gpu_parity import CaptureContract, ChunksContract

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
