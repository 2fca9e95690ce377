"""torch's caching allocator on a GPU: how much it needs beside weights and pools, and having that before it is asked.

A first allocation of a size goes to the driver, which takes its time and waits for the device; a freed block is kept by
the allocator and cut up for later ones. So one block as large as all that was in use at once during a warm-up, allocated
and freed, serves the next warm-up without the driver. Counted is what tensors used, not what the allocator had reserved:
in a start that loaded, that includes the weights, and slack that their loading left.
"""

from __future__ import annotations

import sys
from typing import Any

from coldstart.errors import DeviceError

ROUNDED_BYTES = 2 << 20
"""The allocator takes large blocks of the driver in multiples of this."""


class Workspace:
    """What torch's allocator holds for activations on ``device``. ``torch``: the module, None for the one that is imported."""

    def __init__(self, device: str, torch: Any = None) -> None:
        self._device = device
        self._torch = torch
        self._began_bytes: int | None = None

    def begin(self) -> None:
        """Count from now on. Resets torch's own peak statistics; does nothing where torch uses no GPU."""
        cuda = self._cuda()
        if cuda is not None:
            cuda.reset_peak_memory_stats(self._device)
            self._began_bytes = int(cuda.memory_allocated(self._device))

    @property
    def peak_bytes(self) -> int:
        """The most that was in use beyond what was at ``begin``, rounded up to what the driver is asked for."""
        cuda = self._cuda()
        if cuda is None or self._began_bytes is None:
            return 0
        used_bytes = max(0, int(cuda.max_memory_allocated(self._device)) - self._began_bytes)
        return -(-used_bytes // ROUNDED_BYTES) * ROUNDED_BYTES

    def warm(self, length_bytes: int) -> None:
        """Have the allocator hold a free block of this size. Raises DeviceError where that cannot be had."""
        try:
            torch = self._torch or _imported()
            torch.empty(length_bytes, dtype=torch.uint8, device=self._device)
        except (ImportError, RuntimeError, AssertionError) as error:  # RuntimeError: no memory; AssertionError: no CUDA
            raise DeviceError(f"torch's allocator could not be warmed by {length_bytes} bytes: {error}") from error

    def _cuda(self) -> Any:
        torch = self._torch or sys.modules.get("torch")
        if self._device == "cpu" or torch is None or not torch.cuda.is_initialized():
            return None
        return torch.cuda


def _imported() -> Any:
    import torch

    return torch
