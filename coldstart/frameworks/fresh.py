"""Arrays that are made anew in every start, as zeros: what they look like, and the memory for them.

The framework of an array is its dtype's: ``torch.bfloat16`` makes a tensor, ``"float32"`` an array of numpy, and of cupy
on a GPU. Nothing is imported to find that out: who has a dtype of torch has torch.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from coldstart.errors import DeviceError, HandlerError, ManifestError
from coldstart.frameworks import cupy as for_cupy
from coldstart.frameworks import numpy as for_numpy
from coldstart.frameworks import torch as for_torch
from coldstart.frameworks.memory import Form

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.manifest import PoolArray


def form_of(shape: Sequence[int], dtype: Any, *, device_type: str) -> tuple[str, Form]:
    """The framework, and what an array of this shape (in items) and dtype looks like. Raises HandlerError."""
    if not all(type(size) is int and size > 0 for size in shape):
        raise HandlerError(f"the shape {tuple(shape)!r} is not one of whole numbers above 0")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        name, item_bytes = str(dtype).removeprefix("torch."), int(dtype.itemsize)
        return "torch", Form(name, item_bytes, tuple(shape), c_order(shape))
    import numpy as np

    try:
        found = np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise HandlerError(f"{dtype!r} is no dtype of numpy; pass torch's own, such as torch.bfloat16") from error
    if found.kind not in "biufc":
        raise HandlerError(f"the dtype {found} has items that are not plain numbers")
    framework = "numpy" if device_type == "cpu" else "cupy"
    return framework, Form(found.str, found.itemsize, tuple(shape), c_order(shape))


def zeros(array: PoolArray, *, label: str, ordinal: int) -> Any:
    """The array, of zeros that are really there: memory that the kernel only promised is had now, not by a request.

    ``label`` is the device as torch calls it, ``ordinal`` its number. Raises DeviceError where the memory is refused,
    ManifestError for a dtype or a framework that is not known here, StateMismatchError where torch or cupy is missing.
    """
    try:
        if array.framework == "numpy":
            return for_numpy.zeros(array.dtype, array.shape)
        made = None
        if array.framework == "torch":
            made = for_torch.zeros(array.dtype, array.shape, label)
        if array.framework == "cupy":
            made = for_cupy.zeros(array.dtype, array.shape, ordinal)
        if made is not None:
            _wait_for(ordinal)
            return made
    except (MemoryError, RuntimeError, AssertionError) as error:  # the last: torch asserts that it is built for CUDA
        raise DeviceError(f"{type(error).__name__}: {error}") from error
    raise ManifestError(f"pool {array.name!r} is an array of {array.framework!r}, which this coldstart does not know")


def _wait_for(ordinal: int) -> None:
    """Until what a framework has only queued on its own stream is done: who gets the array may use another one."""
    if ordinal >= 0:
        from coldstart.devices.cuda_driver import open_gpu

        open_gpu(ordinal).synchronize()


def clear(array: Any) -> None:
    """Fill an array with zeros in place."""
    array[...] = 0


def address_of(array: Any) -> int:
    """The device address of an array's first byte."""
    if hasattr(array, "data_ptr"):
        return int(array.data_ptr())
    if hasattr(array, "__cuda_array_interface__"):
        return int(array.__cuda_array_interface__["data"][0])
    return int(array.__array_interface__["data"][0])


def c_order(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in items, of an array of this shape whose last dimension runs fastest."""
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
