"""The fake libraries of a GPU machine, compiled by gcc: put their folder into LD_LIBRARY_PATH of a child, or load them by path.

What each setting of the fake driver does (environment, read when the library is loaded and by ``fakecu_reset``):

- ``FAKE_CUDA_DEVICES`` (1), ``FAKE_CUDA_MEMORY_BYTES`` (2 GiB a device), ``FAKE_CUDA_DRIVER_VERSION`` (12080), ``FAKE_CUDA_INIT_SECONDS`` (0);
- ``FAKE_CUDA_JITTER=seed``: streams pause between operations, differently for each seed;
- ``FAKE_CUDA_FAIL=cuMemAlloc_v2:2=2,cuMemHostRegister_v2:*=1``: the second call, and every call, return that code;
- ``FAKE_CUDA_EMULATION=path``: the library that does what kernels do; without it ``libcoldstart_emulation.so`` beside the driver;
- ``FAKE_CUDA_REPORT=path``: at exit each process appends one line of JSON, the same as ``fakecu_report()``.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent
DRIVER = ("configuration.c", "memory.c", "streams.c", "modules.c", "queues.c", "libcuda.c")


def build(target: Path, sources: tuple[str, ...]) -> None:
    """Compile the C files into one shared library. Whoever looks for it sees a whole one or none.

    It has no soname: a process that has it loaded by its path still finds the real library by name.
    """
    unfinished = target.with_name(f"{target.name}.{id(target)}")
    command = ["gcc", "-O2", "-Wall", "-Werror", "-pthread", "-fPIC", "-shared"]
    files = [str(SOURCES / name) for name in sources]
    subprocess.run([*command, "-o", str(unfinished), *files, "-ldl"], check=True, timeout=120)
    unfinished.rename(target)


def fake_cuda(folder: Path) -> Path:
    """Compile the fake driver into ``folder`` as ``libcuda.so.1``, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    build(folder / "libcuda.so.1", DRIVER)
    return folder


def fake_nvcomp(folder: Path) -> Path:
    """Compile the fake nvCOMP into ``folder`` as ``libnvcomp.so.6``, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    build(folder / "libnvcomp.so.6", ("libnvcomp.c",))
    return folder


def report(driver: ctypes.CDLL) -> dict[str, Any]:
    """What the fake driver counted since it was loaded or reset."""
    driver.fakecu_report.restype = ctypes.c_char_p
    counted: dict[str, Any] = json.loads(driver.fakecu_report())
    return counted
