"""A run of a GPU's memory, as those who compute there see it."""

from __future__ import annotations

from typing import Any


class DeviceBytes:
    """A run of device memory as a one-dimensional array of uint8, for whoever knows ``__cuda_array_interface__`` (version 3).

    torch, cupy and numba make views of it without a copy, and keep it, and so ``owner``, alive.
    """

    def __init__(self, address: int, length_bytes: int, ordinal: int, owner: Any) -> None:
        self.address = address
        self.length_bytes = length_bytes
        self.ordinal = ordinal
        self.owner = owner

    def __len__(self) -> int:
        return self.length_bytes

    def __getitem__(self, part: slice) -> DeviceBytes:
        """A part of the run, which keeps the owner alive too."""
        begin, end, _ = part.indices(self.length_bytes)
        return DeviceBytes(self.address + begin, max(0, end - begin), self.ordinal, self.owner)

    @property
    def nbytes(self) -> int:
        """The length in bytes."""
        return self.length_bytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Ready to be used on any stream; an empty array has no address."""
        address = self.address if self.length_bytes else 0
        return {
            "version": 3,
            "typestr": "|u1",
            "shape": (self.length_bytes,),
            "strides": None,
            "data": (address, False),
            "stream": None,
        }

    def read(self, begin: int, end: int) -> memoryview:
        """A copy of a part in host memory. Raises DeviceError."""
        from coldstart.devices.cuda_driver import open_gpu
        from coldstart.devices.cuda_memory import copy_out

        return memoryview(copy_out(open_gpu(self.ordinal), self.address + begin, end - begin))


def host_bytes(data: Any) -> memoryview:
    """The bytes of an array, or a copy of them where they are on a GPU."""
    return data.read(0, data.length_bytes) if isinstance(data, DeviceBytes) else memoryview(data)
