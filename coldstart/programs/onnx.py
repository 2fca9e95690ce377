"""Programs that ONNX Runtime runs: a graph that was optimised when it was made, and weights that stay where they are.

The graph has no weights: each constant is given to the session as an OrtValue over the arena's own bytes, by both
``add_external_initializers`` and ``add_initializer``. The first alone copies (measured); the second alone is refused.
Prepacking is off: it would copy most weights into another layout at every start.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from coldstart.config import read_variable, set_variables
from coldstart.errors import ProgramError, ProgramRuntimeError
from coldstart.programs.base import Backend, Runner
from coldstart.programs.cpu import instruction_set

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.programs.base import Array, Constant

OLDEST = (1, 20)
_REPORTING = "ORT_DISABLE_TELEMETRY"
_REMEDY = "pip install 'coldstart-gpu[onnx]'"


class Onnx(Backend):
    """ONNX Runtime."""

    name = "onnx"

    def platform(self, device_type: str) -> Mapping[str, str]:
        """Runtime version and instruction set: the stored graph is one that was optimised for them."""
        version = installed_version()
        if not version:
            raise ProgramRuntimeError(f"the snapshot's program needs ONNX Runtime, which is not installed: {_REMEDY}")
        if tuple(map(int, version.split(".")[:2])) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise ProgramRuntimeError(f"ONNX Runtime {version} is too old, {oldest} is needed: {_REMEDY}")
        if device_type != "cpu":
            raise ProgramRuntimeError(
                f"programs of ONNX Runtime are run on the cpu here, and this start is on {device_type}: leave backend out,"
                " or set COLDSTART_DEVICE=cpu"
            )
        return {"device": device_type, "onnxruntime": version, "processor": instruction_set()}

    def import_runtime(self) -> None:
        """Import onnxruntime (0.12 to 0.2 s)."""
        runtime_module()

    def load(
        self, file: memoryview, constants: Sequence[Constant], inputs: Sequence[Array], outputs: Sequence[Array]
    ) -> Runner:
        """Make a session of the graph around the constants."""
        runtime = runtime_module()
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors: they are raised as well
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        held = [(constant.name, _value(runtime, constant)) for constant in constants]
        try:
            options.add_external_initializers([name for name, _ in held], [value for _, value in held])
            for name, value in held:
                options.add_initializer(name, value)
            session = runtime.InferenceSession(bytes(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own exceptions have no common class
            raise ProgramError(f"ONNX Runtime refused the program: {type(error).__name__}: {error}") from error
        return Runner("numpy", _Session(session, held, inputs, outputs).run)


class _Session:
    """A session with what it stands on: ONNX Runtime keeps the addresses of the values, not the values."""

    def __init__(self, session: Any, held: list[Any], inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        self._session = session
        self._held = held
        self._names = [each.name for each in session.get_inputs()]
        self._results = [each.name for each in session.get_outputs()]
        if len(self._names) != len(inputs) or len(self._results) != len(outputs):
            raise ProgramError("the program's graph has another number of inputs or results than its record says")

    def run(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """One inference."""
        results: Sequence[Any] = self._session.run(self._results, dict(zip(self._names, arrays, strict=True)))
        return results


def installed_version() -> str:
    """The version of the ONNX Runtime that an import would find, "" for none; nothing is imported."""
    from importlib.util import find_spec

    spec = find_spec("onnxruntime")
    if spec is None or not spec.origin:
        return ""
    try:
        with open(os.path.join(os.path.dirname(spec.origin), "__init__.py"), encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("__version__")]
    except OSError:
        return ""
    return lines[0].partition("=")[2].strip().strip("\"'") if lines else ""


def runtime_module() -> Any:
    """ONNX Runtime, imported. Builds of it report to its makers unless this variable says otherwise when they are imported."""
    if read_variable(_REPORTING) is None:
        set_variables({_REPORTING: "1"})
    try:
        import onnxruntime
    except ImportError as error:
        raise ProgramRuntimeError(f"ONNX Runtime cannot be imported: {error}; {_REMEDY}") from error
    return onnxruntime


def _value(runtime: Any, constant: Constant) -> Any:
    """The constant as a value of the runtime over the same bytes."""
    import numpy as np

    try:
        array = constant.data.view(np.dtype(constant.dtype)).reshape(constant.shape)
    except (TypeError, ValueError) as error:
        raise ProgramError(f"constant {constant.name!r} of the program has impossible bytes: {error}") from error
    return runtime.OrtValue.ortvalue_from_numpy(array)
