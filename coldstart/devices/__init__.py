"""Where state lives, and the one function that picks the place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.config import read_variable
from coldstart.errors import ConfigError

if TYPE_CHECKING:
    from coldstart.devices.base import Device


def pick(setting: str) -> Device:
    """Return the device for ``setting``: ``auto``, ``cpu``, ``cuda`` or ``cuda:<number>``. Opens nothing.

    ``auto`` is the first GPU where there seems to be one (a driver's device files, not hidden by CUDA_VISIBLE_DEVICES), else
    the CPU. Raises ConfigError for any other setting. That a GPU is missing shows when it is used.
    """
    name, _, number = setting.partition(":")
    if setting not in ("auto", "cpu") and (name != "cuda" or not (number or "0").isdecimal()):
        raise ConfigError(f"the device setting is {setting!r}: use auto, cpu, cuda or cuda:<number>")
    if setting == "auto":
        from coldstart.devices import visible

        name = "cuda" if visible.is_visible(read_variable("CUDA_VISIBLE_DEVICES")) else "cpu"
    if name == "cpu":
        from coldstart.devices.cpu import CpuDevice

        return CpuDevice()
    from coldstart.devices.cuda import CudaDevice

    return CudaDevice(int(number or 0))
