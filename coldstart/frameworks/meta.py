"""``ctx.meta()``: modules made without the bytes of their parameters."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from coldstart.errors import UsageError
from coldstart.frameworks.fills import leaving_meta_alone

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType


class _Active(threading.local):
    """How deep in blocks a thread is, and what it moved there: id of a parameter -> it (weakly), its twin."""

    depth = 0
    moved: dict[int, tuple[weakref.ref[Any], Any]]


class _Patch:
    """The methods of torch.nn.Module that are replaced while any thread is inside a block."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks = 0
        self.originals: Mapping[str, Any] = {}


_active = _Active()
_patch = _Patch()


class meta:  # noqa: N801  reads as a function: with meta(): ...
    """Context manager: parameters that modules register go to the meta device, where initialising costs nothing.

    Only parameters: buffers stay real, because many are computed once and are part of what ``build`` makes. A parameter
    that is registered twice stays one object. Subclasses of Parameter stay real. Each parameter is still allocated for
    a moment, but not written. Inside a block, ``module.to(device)`` and its like move the buffers and convert dtypes,
    and leave parameters without bytes where they are; behind it torch raises for them.

    It works by replacing two methods of ``torch.nn.Module`` (``register_parameter``, ``_apply``) while a block is open;
    in other threads they do what they always do. Blocks nest. Raises UsageError where torch is not installed.
    """

    def __enter__(self) -> None:
        module_class = _torch().nn.Module
        with _patch.lock:
            _patch.blocks += 1
            if _patch.blocks == 1:
                _patch.originals = {name: getattr(module_class, name) for name in _REPLACEMENTS}
                for name, replacement in _REPLACEMENTS.items():
                    setattr(module_class, name, replacement(_patch.originals[name]))
        if not _active.depth:
            _active.moved = {}
        _active.depth += 1
        self._fills = leaving_meta_alone()
        self._fills.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fills.__exit__(kind, error, trace)
        _active.depth -= 1
        if not _active.depth:
            _active.moved = {}
        with _patch.lock:
            _patch.blocks -= 1
            if not _patch.blocks:
                for name, original in _patch.originals.items():
                    setattr(_torch().nn.Module, name, original)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            "ctx.meta() makes torch modules, and torch is not installed: pip install 'coldstart-gpu[torch]'"
        ) from error
    return torch


def _registering(original: Callable[..., None]) -> Callable[..., None]:
    def register_parameter(module: Any, name: str, param: Any) -> None:
        original(module, name, param)
        held = vars(module)["_parameters"]
        if _active.depth and held.get(name) is not None:
            held[name] = _without_bytes(held[name])

    return register_parameter


def _without_bytes(parameter: Any) -> Any:
    torch = _torch()
    if parameter.is_meta or not (type(parameter) is torch.nn.Parameter or hasattr(parameter, "__tensor_flatten__")):
        return parameter
    known, twin = _active.moved.get(id(parameter), (None, None))
    if known is None or known() is not parameter:
        twin = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        vars(twin).update(vars(parameter))
        _active.moved[id(parameter)] = (weakref.ref(parameter), twin)
    return twin


class _StayingOnMeta:
    """What ``module.to(...)`` does to each tensor; of it, a tensor without bytes takes the dtype alone."""

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self.convert = convert

    def __call__(self, tensor: Any) -> Any:
        if not tensor.is_meta:
            return self.convert(tensor)
        probe = _torch().empty(0, dtype=tensor.dtype)
        return tensor.to(self.convert(probe).dtype)


def _applying(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(module: Any, fn: Any, *arguments: Any, **options: Any) -> Any:
        if _active.depth and not isinstance(fn, _StayingOnMeta):
            fn = _StayingOnMeta(fn)
        return original(module, fn, *arguments, **options)

    return apply


_REPLACEMENTS: Mapping[str, Callable[[Any], Any]] = {"register_parameter": _registering, "_apply": _applying}
