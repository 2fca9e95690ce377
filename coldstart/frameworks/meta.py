"""``ctx.meta()``: modules made without the bytes of their parameters."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from coldstart.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class _Active(threading.local):
    """How deep in ``with`` blocks a thread is, and what they moved: id of a parameter -> it (weakly), its twin."""

    depth = 0
    moved: dict[int, tuple[weakref.ref[Any], Any]]


class _Patch:
    """torch.nn.Module.register_parameter as it was, while any thread is inside a block."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks = 0
        self.original: Callable[..., None] | None = None


_active = _Active()
_patch = _Patch()


class meta:  # noqa: N801  reads as a function: with meta(): ...
    """Context manager: parameters that modules register are moved to the meta device, where initialising costs nothing.

    Only parameters: buffers stay real, because many are computed once and are part of what ``build`` makes. A parameter
    that is registered twice stays one object. It works by replacing ``torch.nn.Module.register_parameter`` while a
    block is open; other threads keep getting real parameters. Blocks nest. Each parameter is still allocated for a
    moment, but not written. Subclasses of Parameter stay real.

    Raises UsageError where torch is not installed.
    """

    def __enter__(self) -> None:
        torch = _torch()
        with _patch.lock:
            _patch.blocks += 1
            if _patch.blocks == 1:
                _patch.original = torch.nn.Module.register_parameter
                torch.nn.Module.register_parameter = _registering(_patch.original)
        if not _active.depth:
            _active.moved = {}
        _active.depth += 1
        self._fills = _leaving_meta_alone()
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
                _torch().nn.Module.register_parameter = _patch.original


FILLS = (
    *("normal_", "uniform_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_", "bernoulli_"),
    *("fill_", "zero_", "erfinv_", "clamp_", "mul_", "add_", "sub_", "div_", "copy_"),
)
"""What initialisers do to a tensor in place. On one without bytes it has no effect, yet the first ``normal_`` of a process
imports torch's compiler for it: 822 modules, about a second of every restored start."""


def _leaving_meta_alone() -> Any:
    """A torch function mode in which filling a tensor without bytes, by a method or by ``torch.nn.init``, does nothing."""
    torch = _torch()
    from torch.overrides import TorchFunctionMode

    init = {value for name, value in vars(torch.nn.init).items() if name.endswith("_") and callable(value)}

    class LeavingMetaAlone(TorchFunctionMode):  # type: ignore[misc]  # torch's classes are untyped here
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function in init or getattr(function, "__name__", "") in FILLS:
                target = args[0] if args else kwargs.get("tensor")
                if isinstance(target, torch.Tensor) and target.is_meta:
                    return target
            return function(*args, **kwargs)

    return LeavingMetaAlone()


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
