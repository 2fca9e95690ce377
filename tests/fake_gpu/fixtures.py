"""Fixtures that give tests the fake libraries; tests/conftest.py makes them everybody's."""

from __future__ import annotations

import fcntl
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.fake_gpu.build import emulation
from tests.fake_gpu.libraries import fake_cuda, fake_nvcomp

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def fake_gpu_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder with the fake driver, nvCOMP and kernels, compiled once however many processes run the tests.

    ``libcuda.so.1``, ``libnvcomp.so.6`` and ``libcoldstart_emulation.so``.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "fake-gpu"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            emulation(folder)
            fake_nvcomp(folder)
            fake_cuda(folder)
            (folder / "whole").touch()
    return folder


@pytest.fixture(scope="session")
def own_gpu_folder(fake_gpu_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the same, for tests that reset the driver: loaded in one process, each has a state of its own."""
    folder = tmp_path_factory.mktemp("own-gpu")
    for library in fake_gpu_folder.glob("lib*"):
        shutil.copy(library, folder)
    return folder
