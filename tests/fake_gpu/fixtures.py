"""Fixtures that give tests the fake libraries; tests/conftest.py makes them everybody's."""

from __future__ import annotations

import fcntl
from typing import TYPE_CHECKING

import pytest

from tests.fake_gpu.libraries import fake_cuda, fake_nvcomp

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def fake_gpu_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder with the fake ``libcuda.so.1`` and ``libnvcomp.so.6``, compiled once however many processes run the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "fake-gpu"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "libnvcomp.so.6").exists():
            fake_cuda(folder)
            fake_nvcomp(folder)
    return folder
