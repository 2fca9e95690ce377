"""Filling tensors that have no bytes: nothing to do, and it must cost nothing.

The first ``normal_`` on a meta tensor in a process makes torch import its compiler for it: 822 modules, about a second
(torch 2.13), which every restored start of a model with an ``nn.Embedding`` would pay.
"""

from __future__ import annotations

from typing import Any

FILLS = frozenset(
    (
        *("normal_", "uniform_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_", "bernoulli_"),
        *("fill_", "zero_", "erfinv_", "clamp_", "mul_", "add_", "sub_", "div_", "copy_"),
    )
)
"""What initialisers do to a tensor in place."""


def leaving_meta_alone() -> Any:
    """A torch function mode in which filling a meta tensor, by a method or by ``torch.nn.init``, does nothing."""
    import torch
    from torch.overrides import TorchFunctionMode

    init = {value for name, value in vars(torch.nn.init).items() if name.endswith("_") and callable(value)}

    class LeavingMetaAlone(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function in init or getattr(function, "__name__", "") in FILLS:
                target = args[0] if args else kwargs.get("tensor")
                if isinstance(target, torch.Tensor) and target.is_meta:
                    return target
            return function(*args, **kwargs)

    return LeavingMetaAlone()
