"""A stand-in for cupy on the fake driver: the few names that coldstart uses, and enough arithmetic for a handler.

Device memory of the fake driver is host memory, so an array is a numpy view of it. Whether real cupy has these names, and
means the same by them, ``tests/gpu/test_cupy.py`` asks of it where there is a GPU.
"""

from __future__ import annotations

import ctypes
from typing import Any, Self

import numpy as np

from coldstart.devices.cuda_driver import open_gpu
from coldstart.devices.cuda_memory import DeviceMemory

dtype = np.dtype
__version__ = "0.0.fake"


class _Memory:
    def __init__(self, address: int, size: int, owner: Any, device_id: int) -> None:
        self.ptr, self.size, self.owner, self.device_id = address, size, owner, device_id


class _Pointer:
    def __init__(self, mem: _Memory, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset


class _Device:
    def __init__(self, number: int) -> None:
        self.id = number

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class cuda:
    """What is used of ``cupy.cuda``."""

    Device = _Device
    UnownedMemory = _Memory
    MemoryPointer = _Pointer


class _Window:
    def __init__(self, address: int, interface: dict[str, Any]) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, False), **interface}


class ndarray:
    """An array of the fake device; without attributes of its own, like cupy's."""

    __slots__ = ("__weakref__", "_host", "data", "device", "dtype", "nbytes", "shape", "size", "strides")

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None) -> None:
        kind = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if memptr is None:
            memory = DeviceMemory(open_gpu(0), int(np.prod(shape)) * kind.itemsize)
            memptr = _Pointer(_Memory(memory.address, memory.length_bytes, memory, 0), 0)
        self.data = memptr
        self.device = _Device(memptr.mem.device_id)
        view = {"shape": shape, "typestr": kind.str, "strides": strides}
        self._host = np.asarray(_Window(memptr.ptr, view))
        self.shape, self.dtype, self.size = self._host.shape, self._host.dtype, self._host.size
        self.strides, self.nbytes = self._host.strides, self._host.nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The array, for others that compute on the device."""
        return {"version": 3, "shape": self.shape, "typestr": self.dtype.str, "data": (self.data.ptr, False)}

    def get(self) -> np.ndarray:
        """A copy in host memory."""
        return self._host.copy()

    def __getitem__(self, index: Any) -> ndarray:
        part = self._host[index]
        offset = part.__array_interface__["data"][0] - self.data.mem.ptr
        return ndarray(part.shape, part.dtype, _Pointer(self.data.mem, offset), part.strides)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[index] = value.get() if isinstance(value, ndarray) else value

    def __matmul__(self, other: ndarray) -> ndarray:
        return asarray(self._host @ other.get())

    def sum(self) -> ndarray:
        """The sum, as an array without dimensions."""
        return asarray(self._host.sum())


def asarray(values: Any, dtype: Any = None) -> ndarray:
    """Copy values to the fake device; an array that is there already is returned as it is."""
    if isinstance(values, ndarray):
        return values
    host = np.array(values, dtype, order="C")
    made = ndarray(host.shape, host.dtype)
    ctypes.memmove(made.data.ptr, host.ctypes.data, host.nbytes)
    return made


def empty(shape: Any, dtype: Any = float) -> ndarray:
    """Fresh memory."""
    return ndarray(shape, dtype)


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    """Fresh memory, zeroed."""
    made = ndarray(shape, dtype)
    made[...] = 0
    return made
