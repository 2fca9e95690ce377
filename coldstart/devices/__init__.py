"""Where state lives, and the one function that picks the place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    from coldstart.devices.base import Device


def pick(setting: str) -> Device:
    """Return the device for ``setting``: ``auto``, ``cpu`` or ``cuda``.

    Raises DeviceError where the device asked for is missing, ConfigError for any other setting.
    """
    if setting in ("auto", "cpu"):
        from coldstart.devices.cpu import CpuDevice

        return CpuDevice()
    if setting == "cuda":
        raise DeviceError("the cuda device needs coldstart-gpu[gpu] and comes with the GPU path")
    raise ConfigError(f"the device setting is {setting!r}: use auto, cpu or cuda")
