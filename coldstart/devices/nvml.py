"""The GPUs of this machine and their driver, without a CUDA context: by NVML, else by the driver's own record in /proc."""

from __future__ import annotations

import os

_LIBRARY = "libnvidia-ml.so.1"
_ROOM = 96
_PROC = "/proc/driver/nvidia"


def gpu_facts() -> dict[str, str]:
    """``gpu`` and ``driver``; with NVML the GPUs' compute capabilities too. Empty where neither answers."""
    return _by_nvml() or _by_proc()


def _by_nvml() -> dict[str, str]:
    import ctypes

    try:
        nvml = ctypes.CDLL(_LIBRARY)
    except OSError:
        return {}
    if nvml.nvmlInit_v2():
        return {}
    try:
        text, count = ctypes.create_string_buffer(_ROOM), ctypes.c_uint()
        if nvml.nvmlSystemGetDriverVersion(text, _ROOM) or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return {}
        driver, gpus = text.value.decode(), set[str]()
        for index in range(count.value):
            handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            if (
                nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
                or nvml.nvmlDeviceGetName(handle, text, _ROOM)
                or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
            ):
                return {}
            gpus.add(f"{text.value.decode()} ({major.value}.{minor.value})")
    finally:
        nvml.nvmlShutdown()
    return {"gpu": ", ".join(sorted(gpus)), "driver": driver} if gpus else {}


def _by_proc() -> dict[str, str]:
    names = set[str]()
    try:
        for bus in os.listdir(f"{_PROC}/gpus"):
            with open(f"{_PROC}/gpus/{bus}/information", encoding="utf-8") as file:
                names.update(line.partition(":")[2].strip() for line in file if line.startswith("Model"))
        with open(f"{_PROC}/version", encoding="utf-8") as file:
            driver = file.readline().strip()
    except OSError:
        return {}
    return {"gpu": ", ".join(sorted(names)), "driver": driver} if names else {}
