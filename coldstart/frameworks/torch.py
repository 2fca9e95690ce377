"""Tensors of torch: what can be captured of them, and tensors that are views of a buffer.

torch is imported inside the functions: when one of them runs, the state, or a leaf of the manifest, has a tensor.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from coldstart.errors import ManifestError, StateMismatchError
from coldstart.frameworks.memory import HOST, Extent, Form

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coldstart.manifest import Leaf

MODULE_FIELDS = (("_parameters", ""), ("_buffers", "buffer"), ("_modules", ""))
"""Where a module keeps what it registers, and the role of a plain tensor there."""

_DTYPE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
_PROCESS_BOUND = ("torch.distributed", "torch.nested", "torch._subclasses", "torch.masked")
"""Packages whose tensor subclasses flatten too, but mean something only in the process that made them."""


@functools.cache
def module_internals() -> frozenset[str]:
    """Names of the attributes that torch.nn.Module itself sets: hooks, flags and registries, which build() makes."""
    import torch

    return frozenset(vars(torch.nn.Module()))


def role(tensor: Any, held_as: str) -> str:
    """``parameter``, ``buffer`` or ``tensor``; ``held_as`` is the role that its holder gives to a plain tensor."""
    import torch

    return "parameter" if isinstance(tensor, torch.nn.Parameter) else held_as or "tensor"


def parts(tensor: Any) -> dict[str, Any] | None:
    """The inner tensors of a subclass that can be taken apart, by attribute; None for any other tensor."""
    import torch

    cls = type(tensor)
    if cls in (torch.Tensor, torch.nn.Parameter) or not hasattr(cls, "__tensor_unflatten__"):
        return None
    if cls.__module__.startswith(_PROCESS_BOUND):
        return None
    try:
        names, _ = tensor.__tensor_flatten__()
    except (NotImplementedError, AttributeError):
        return None
    inner = {name: getattr(tensor, name, None) for name in names}
    return inner if inner and all(isinstance(part, torch.Tensor) for part in inner.values()) else None


def wrap(original: Any, inner: Mapping[str, Any], *, requires_grad: bool) -> Any:
    """An instance like ``original`` around other inner tensors. Raises StateMismatchError if its class objects."""
    import torch

    _, context = original.__tensor_flatten__()
    try:
        made = type(original).__tensor_unflatten__(dict(inner), context, original.size(), original.stride())
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise StateMismatchError(
            f"a {type(original).__name__} could not be made again around its restored tensors: {error}"
        ) from error
    if isinstance(original, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=requires_grad)
    return made.requires_grad_() if requires_grad else made


def refusal(tensor: Any, *, meta: bool = False) -> str:
    """Why this tensor cannot be captured, as the rest of a sentence about it; "" if it can.

    ``meta``: tensors without bytes are welcome (a skeleton is made of them).
    """
    import torch

    cls = type(tensor)
    if cls not in (torch.Tensor, torch.nn.Parameter):
        return _subclass_refusal(tensor)
    if tensor.is_nested:
        return "is a nested tensor"
    if tensor.is_quantized:
        return f"is a quantized tensor ({tensor.qscheme()})"
    if tensor.layout is not torch.strided:
        return f"is a sparse or packed tensor ({tensor.layout})"
    if tensor.is_meta and not meta:
        return "is on the meta device, so it has no bytes (accelerate leaves offloaded weights there)"
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        return f"is on the device {tensor.device}, which coldstart does not know"
    if tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor():  # noqa: SLF001  torch has no other name for it
        return "is a lazy conjugate, negative or zero: call resolve_conj(), resolve_neg() or clone() in load"
    return graph_refusal(tensor)


def graph_refusal(tensor: Any) -> str:
    """The refusal of a tensor that was computed from parameters and would carry their graph; "" for any other."""
    if tensor.requires_grad and not tensor.is_leaf:
        return "is the result of a computation that gradients flow through: detach() it in load"
    return ""


def _subclass_refusal(tensor: Any) -> str:
    import torch

    cls = type(tensor)
    if isinstance(tensor, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
        return "is a lazy parameter without a shape: call the module once in load"
    if hasattr(tensor, "quant_state") or cls.__module__.startswith("bitsandbytes"):
        return f"is a {cls.__name__} of bitsandbytes, which keeps its scales outside the tensor"
    return f"is a {cls.__module__}.{cls.__qualname__}, a kind of tensor that cannot be taken apart"


def has_no_version(tensor: Any) -> bool:
    """Whether the tensor was made in inference mode, where torch counts no writes."""
    return bool(tensor.is_inference())


def version(tensor: Any) -> int:
    """How often the tensor was written in place."""
    return int(tensor._version)  # noqa: SLF001  torch documents it under this name


def form(tensor: Any) -> Form:
    """Dtype (without ``torch.``), item size, shape and strides in items."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Form(dtype, tensor.element_size(), tuple(tensor.shape), tuple(tensor.stride()))


def extent(tensor: Any, length_bytes: int) -> Extent:
    """The memory that a tensor with elements uses."""
    storage = tensor.untyped_storage()
    base = storage.data_ptr()
    gpu = tensor.device.index if tensor.is_cuda else HOST
    return Extent(tensor.data_ptr(), length_bytes, base, ("torch", base), tensor.element_size(), storage, gpu)


def storage_of(buffer: Any) -> Any:
    """The torch storage that is ``buffer``, a uint8 array of numpy or ``DeviceBytes``. It keeps that alive and cannot be resized.

    Raises StateMismatchError where this torch has no CUDA and the bytes are a GPU's.
    """
    return flat_bytes(buffer).untyped_storage()


def flat_bytes(buffer: Any) -> Any:
    """A tensor of uint8 that is ``buffer``: see ``storage_of``."""
    torch = _installed()
    if not hasattr(buffer, "__cuda_array_interface__"):
        return torch.from_numpy(buffer)
    try:
        torch.cuda.init()  # nothing may have needed it yet: the bytes came by the driver
        return torch.as_tensor(buffer, device=f"cuda:{buffer.ordinal}")
    except (RuntimeError, AssertionError) as error:
        raise StateMismatchError(
            f"the snapshot holds tensors on a GPU, which this torch cannot use ({error}): install a build for CUDA, or set"
            " COLDSTART_DEVICE=cpu"
        ) from error


def view(leaf: Leaf, storage: Any) -> Any:
    """The plain tensor that ``leaf`` describes, over the bytes of ``storage`` (None for a tensor without elements).

    ``set_`` and not a chain of views: every tensor gets a version counter of its own, as it had before.
    Raises ManifestError where the leaf is not one that a capture writes, or reaches past the end.
    """
    dtype = _dtype(leaf)
    import torch

    try:
        if storage is None:
            return torch.empty_strided(leaf.shape, leaf.strides, dtype=dtype)
        offset, rest = divmod(leaf.offset_bytes, leaf.item_bytes)
        if rest:
            raise ManifestError(f"leaf {leaf.path!r} starts at byte {leaf.offset_bytes}, inside an item")
        return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, leaf.shape, leaf.strides)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ManifestError(f"leaf {leaf.path!r} cannot be laid over its buffer: {error}") from error


def zeros(dtype: str, shape: tuple[int, ...], device: str) -> Any:
    """A plain tensor of zeros. Raises ManifestError for a dtype that this torch does not have, RuntimeError as torch does."""
    found = _dtype_named(dtype)
    if found is None:
        raise ManifestError(f"{dtype!r} is a dtype that this torch does not have")
    import torch

    return torch.zeros(shape, dtype=found, device=device)


def finish(leaf: Leaf, tensor: Any) -> Any:
    """``tensor`` as what the leaf was: a Parameter, or a plain tensor, that requires a gradient or does not."""
    import torch

    if leaf.requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
        raise ManifestError(f"leaf {leaf.path!r} requires a gradient and is of {leaf.dtype}")
    if leaf.role == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=leaf.requires_grad)
    return tensor.requires_grad_() if leaf.requires_grad else tensor


def keep_attributes(old: Any, new: Any) -> None:
    """Carry over what Python code has attached to the tensor that is replaced (a weight loader, a tag)."""
    attached = vars(old)
    if attached:
        vars(new).update(attached)


def _dtype(leaf: Leaf) -> Any:
    dtype = _dtype_named(leaf.dtype)
    if dtype is None:
        raise ManifestError(f"leaf {leaf.path!r} has the dtype {leaf.dtype!r}, which this torch does not have")
    if dtype.itemsize != leaf.item_bytes:
        raise ManifestError(f"leaf {leaf.path!r} has items of {leaf.item_bytes} bytes, its dtype {dtype.itemsize}")
    return dtype


@functools.lru_cache(maxsize=256)
def _dtype_named(name: str) -> Any:
    """The dtype of this name, None if there is none or it is one of torch's own quantized ones."""
    torch = _installed()
    dtype = getattr(torch, name, None) if _DTYPE_NAME.match(name) else None
    return dtype if isinstance(dtype, torch.dtype) and not name.startswith("q") else None


def _installed() -> Any:
    try:
        import torch
    except ImportError as error:
        raise StateMismatchError(
            "the snapshot holds tensors of torch, which cannot be imported here: pip install 'coldstart-gpu[torch]'"
        ) from error
    return torch
