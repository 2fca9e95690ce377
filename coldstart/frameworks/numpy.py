"""Arrays of numpy: what can be captured of them, and arrays that are views of a buffer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from coldstart.errors import ManifestError
from coldstart.frameworks.memory import Extent, Form

if TYPE_CHECKING:
    from coldstart.manifest import Leaf

_KINDS = "biufcUSMm"
_DTYPE = re.compile(rf"[<>|][{_KINDS}]\d{{1,9}}(\[\d{{0,9}}[A-Za-z]{{1,2}}\])?\Z")
"""What a manifest may say: numpy.dtype() would also take "O", and an object array over foreign bytes is a crash."""


def refusal(array: Any) -> str:
    """Why this array cannot be captured, as the rest of a sentence about it; "" if it can."""
    import numpy as np

    dtype = array.dtype
    if type(array) is not np.ndarray:
        return f"is a {type(array).__name__}, a subclass of numpy's array that views of plain memory cannot replace"
    if dtype.kind not in _KINDS or dtype.hasobject or not dtype.itemsize:
        return f"is an array of the dtype {dtype}, whose items are not plain numbers, texts or times"
    return order_refusal(array, "numpy")


def order_refusal(array: Any, library: str) -> str:
    """The refusal of an array, numpy's or one that looks like it, whose strides no view of items can have."""
    steps = [stride for size, stride in zip(array.shape, array.strides, strict=True) if size > 1]
    if array.size and any(step < 0 or step % array.dtype.itemsize for step in steps):
        return f"runs backwards or between items through its memory: use {library}.ascontiguousarray() in load"
    return ""


def form(array: Any) -> Form:
    """Dtype (``dtype.str``), item size, shape and strides in items."""
    item_bytes = array.dtype.itemsize
    strides = tuple(max(stride, 0) // item_bytes for stride in array.strides)
    return Form(array.dtype.str, item_bytes, tuple(array.shape), strides)


def extent(array: Any, length_bytes: int) -> Extent:
    """The memory that an array with elements uses."""
    base = array
    while type(base.base) is type(array):
        base = base.base
    address, start = (held.__array_interface__["data"][0] for held in (array, base))
    return Extent(address, length_bytes, min(address, start), ("numpy", start), 1, array)


def view(leaf: Leaf, buffer: Any) -> Any:
    """The array that ``leaf`` describes, over the bytes of ``buffer`` (uint8; None for an array without elements).

    Raises ManifestError where the leaf is not one that a capture writes, or reaches past the end.
    """
    import numpy as np

    dtype = _dtype(leaf)
    steps = tuple(stride * leaf.item_bytes for stride in leaf.strides)
    try:
        if buffer is None:
            return np.empty(leaf.shape, dtype)
        return np.ndarray(leaf.shape, dtype, buffer, leaf.offset_bytes, steps)
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise ManifestError(f"leaf {leaf.path!r} cannot be laid over its buffer: {error}") from error


def zeros(dtype: str, shape: tuple[int, ...]) -> Any:
    """An array of zeros, each page of it written to. Raises ManifestError for a dtype that is none, MemoryError."""
    import numpy as np

    if not _DTYPE.match(dtype):
        raise ManifestError(f"{dtype!r} is a dtype that no array of numpy can have here")
    try:
        made = np.empty(shape, dtype)
    except (TypeError, ValueError) as error:
        raise ManifestError(f"an array of {shape} items of {dtype!r} cannot be made: {error}") from error
    made[...] = np.zeros((), dtype)
    return made


def _dtype(leaf: Leaf) -> Any:
    import numpy as np

    if not _DTYPE.match(leaf.dtype):
        raise ManifestError(f"leaf {leaf.path!r} has the dtype {leaf.dtype!r}, which no array of numpy can have here")
    try:
        dtype = np.dtype(leaf.dtype)
    except (TypeError, ValueError) as error:
        raise ManifestError(f"leaf {leaf.path!r} has an unknown dtype: {error}") from error
    if not dtype.itemsize or dtype.itemsize != leaf.item_bytes:
        raise ManifestError(f"leaf {leaf.path!r} has items of {leaf.item_bytes} bytes, its dtype {dtype.itemsize}")
    return dtype
