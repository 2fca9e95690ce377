"""Arrays of cupy: what can be captured of them, and arrays that are views of device memory.

cupy is imported inside the functions: when one of them runs, the state, or a leaf of the manifest, has an array of it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from coldstart.errors import ManifestError, StateMismatchError
from coldstart.frameworks.memory import Extent
from coldstart.frameworks.numpy import form, order_refusal

if TYPE_CHECKING:
    from coldstart.manifest import Leaf

__all__ = ["extent", "form", "is_array", "refusal", "view", "zeros"]

_KINDS = "biufc"
_DTYPE = re.compile(rf"[<>|][{_KINDS}]\d{{1,2}}\Z")


def is_array(names: set[tuple[str, str]]) -> bool:
    """Whether a class, by the modules and names of it and its bases, is cupy's array."""
    return ("cupy", "ndarray") in names or ("cupy._core.core", "ndarray") in names


def refusal(array: Any) -> str:
    """Why this array cannot be captured, as the rest of a sentence about it; "" if it can."""
    cls = type(array)
    if cls.__qualname__ != "ndarray" or cls.__module__.partition(".")[0] != "cupy":
        return f"is a {cls.__name__}, a subclass of cupy's array that views of plain memory cannot replace"
    if array.dtype.kind not in _KINDS:
        return f"is an array of the dtype {array.dtype}, whose items are not plain numbers"
    return order_refusal(array, "cupy")


def extent(array: Any, length_bytes: int) -> Extent:
    """The memory that an array with elements uses."""
    base = int(array.data.mem.ptr)
    return Extent(int(array.data.ptr), length_bytes, base, ("cupy", base), 1, array, int(array.device.id))


def view(leaf: Leaf, buffer: Any) -> Any:
    """The array that ``leaf`` describes, over device memory (``DeviceBytes``; None for an array without elements).

    Raises ManifestError where the leaf is not one that a capture writes, or reaches past the end.
    """
    cupy = _installed()
    if not _DTYPE.match(leaf.dtype):
        raise ManifestError(f"leaf {leaf.path!r} has the dtype {leaf.dtype!r}, which no array of cupy can have here")
    try:
        dtype = cupy.dtype(leaf.dtype)
    except (TypeError, ValueError) as error:
        raise ManifestError(f"leaf {leaf.path!r} has an unknown dtype: {error}") from error
    if dtype.itemsize != leaf.item_bytes:
        raise ManifestError(f"leaf {leaf.path!r} has items of {leaf.item_bytes} bytes, its dtype {dtype.itemsize}")
    if buffer is None:
        return cupy.empty(leaf.shape, dtype)
    if not hasattr(buffer, "__cuda_array_interface__"):
        raise ManifestError(f"leaf {leaf.path!r} is an array of cupy, and its bytes are not in a GPU's memory")
    span_bytes = leaf.item_bytes * (
        1 + sum((size - 1) * step for size, step in zip(leaf.shape, leaf.strides, strict=True))
    )
    if leaf.offset_bytes + span_bytes > buffer.length_bytes:
        raise ManifestError(f"leaf {leaf.path!r} reaches past the end of its buffer")
    memory = cupy.cuda.UnownedMemory(buffer.address, buffer.length_bytes, buffer, buffer.ordinal)
    place = cupy.cuda.MemoryPointer(memory, leaf.offset_bytes)
    return cupy.ndarray(leaf.shape, dtype, place, tuple(step * leaf.item_bytes for step in leaf.strides))


def zeros(dtype: str, shape: tuple[int, ...], ordinal: int) -> Any:
    """Zeros on that GPU. Raises ManifestError for a dtype that is none, MemoryError, StateMismatchError without cupy."""
    cupy = _installed()
    if not _DTYPE.match(dtype):
        raise ManifestError(f"{dtype!r} is a dtype that no array of cupy can have here")
    with cupy.cuda.Device(ordinal):
        return cupy.zeros(shape, dtype)


def _installed() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise StateMismatchError(
            "the snapshot holds arrays of cupy, which cannot be imported here: pip install 'coldstart-gpu[gpu]'"
        ) from error
    return cupy
