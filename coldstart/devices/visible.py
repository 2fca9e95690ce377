"""Whether there seems to be a GPU here: a look at files, since asking the driver takes a third of a second."""

from __future__ import annotations

import os

_CONTROL_FILES = ("/dev/nvidiactl", "/dev/dxg")
"""What a driver leaves where a GPU is handed in: Linux, and Linux on Windows."""
_NONE_VISIBLE = ("", "-1", "NoDevFiles", "none", "void")


def is_visible(visible_devices: str | None) -> bool:
    """Whether this machine seems to have a GPU that this process may use; only opening it makes certain.

    ``visible_devices``: the value of CUDA_VISIBLE_DEVICES, None where it is not set.
    """
    hidden = visible_devices is not None and visible_devices.split(",")[0].strip() in _NONE_VISIBLE
    return not hidden and any(map(os.path.exists, _CONTROL_FILES))
