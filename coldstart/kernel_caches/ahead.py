"""Importing torch's compiler while the fetch goes on: a start whose snapshot has kernels of Inductor's will compile."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from coldstart.kernel_caches.kinds import INDUCTOR

if TYPE_CHECKING:
    from coldstart.kernel_caches.home import Kernels
    from coldstart.manifest import Manifest

COMPILER = ("torch._dynamo", "torch._inductor.compile_fx", "torch.utils.cpp_extension")
"""What ``torch.compile`` imports on its first use: 2 s, over half of a compilation that finds everything cached."""


def compiles(kernels: Kernels | None, manifest: Manifest | None) -> bool:
    """Whether what is being restored has kernels that torch's compiler will look for, and torch is there already."""
    if kernels is None or manifest is None or "torch" not in sys.modules:
        return False
    prefix = f"{INDUCTOR.name}/"
    return any(entry.root == kernels.wanted and entry.name.startswith(prefix) for entry in manifest.files)


def import_compiler() -> None:
    """Import it. What is wrong with it the user's own use of it will say."""
    try:
        for module in COMPILER:
            importlib.import_module(module)
    except ImportError:
        return
