"""Programs: a state's computation, exported and compiled at capture time, run by later starts instead of the state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.errors import ProgramError

if TYPE_CHECKING:
    from coldstart.programs.base import Backend

ONNX, AOTI = BACKENDS = ("onnx", "aoti")


def backend_of(name: str) -> Backend:
    """The backend of this name. Its runtime is not imported yet. Raises ProgramError for a name that is none."""
    if name == ONNX:
        from coldstart.programs.onnx import Onnx

        return Onnx()
    if name == AOTI:
        from coldstart.programs.aoti import Aoti

        return Aoti()
    raise ProgramError(f"a program of the unknown backend {name!r}: this coldstart has {', '.join(BACKENDS)}")


def default_backend(device_type: str) -> str:
    """The backend that is used where the handler names none: on a GPU the one that carries its kernels."""
    return ONNX if device_type == "cpu" else AOTI
