"""The GPU of this machine, for tests that need one: where there is none, each is skipped and says why."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from coldstart.codecs.nvcomp import Nvcomp
from coldstart.config import read_variable
from coldstart.devices.cuda_driver import open_gpu
from coldstart.errors import CodecError, DeviceError
from tests.fake_gpu.machine import FakeMachine

if TYPE_CHECKING:
    from coldstart.devices.cuda_driver import Gpu


class RealMachine(FakeMachine):
    """The GPU of number 0 of NVIDIA's driver, in the place of the fake one."""

    def __init__(self) -> None:
        self.gpu: Gpu = open_gpu(0)

    def frames(self) -> Nvcomp:
        """NVIDIA's nvCOMP."""
        return Nvcomp.load()

    def report(self) -> NoReturn:
        """Only a fake counts."""
        raise NotImplementedError("a real driver counts nothing")


@pytest.fixture(scope="session")
def real_gpu() -> Gpu:
    """The GPU; the one place that decides whether tests of a GPU can run. Open until the session ends."""
    try:
        gpu = open_gpu(0)
    except DeviceError as error:
        pytest.skip(f"no GPU: {error}")
    return gpu


@pytest.fixture(scope="session")
def machine(real_gpu: Gpu) -> RealMachine:
    """The GPU as a machine, with nvCOMP. Skips where that is missing: restores without it are other tests' business."""
    made = RealMachine()
    try:
        made.frames()
    except CodecError as error:
        pytest.skip(f"no nvCOMP: {error}")
    return made


@pytest.fixture(scope="session")
def gpu(real_gpu: Gpu) -> Gpu:
    """The GPU."""
    return real_gpu


@pytest.fixture(scope="session")
def cupy(real_gpu: Gpu) -> Any:
    """The real cupy, on the same GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of toolkits that it did not find, which nothing here needs
        return pytest.importorskip("cupy", exc_type=ImportError)


@pytest.fixture(scope="session")
def torch(real_gpu: Gpu) -> Any:
    """The torch that sees the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("torch", exc_type=ImportError)
    if not module.cuda.is_available():
        pytest.skip(f"torch {module.__version__} sees no GPU")
    return module


def packages_of_this_process() -> str:
    """PYTHONPATH of this process: what was brought along for it is for its children too."""
    return read_variable("PYTHONPATH") or ""
