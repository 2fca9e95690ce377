"""Makes programs for ONNX Runtime: exports, has the runtime optimise the graph, and takes the weights out of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from coldstart.errors import ExportError
from coldstart.programs.base import Constant, Made
from coldstart.programs.onnx import runtime_module
from coldstart.programs.tracing import mutated_names, obstacle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INSIDE_BYTES = 1024
"""Constants up to this size stay in the graph: shapes, scalars, what the runtime computes with when it loads."""
_WEIGHTS = "weights"
_EXTRA = "pip install 'coldstart-gpu[onnx-export]' where snapshots are made"


def make(exported: Any, *, file: Path, scratch: Path) -> Made:
    """Make the program of one entry point and write its graph to ``file``.

    The constants are mapped from a file beside it, which has to stay until they have been used. Raises ExportError.
    """
    _refuse_mutation(exported)
    _refuse_narrow(exported)
    plain = scratch / f"{file.name}.plain"
    _export(exported, plain)
    weights = f"{file.name}.{_WEIGHTS}"
    _optimise(plain, file, weights)
    for left in (plain, plain.with_name(f"{plain.name}.data")):
        left.unlink(missing_ok=True)
    return Made(file, tuple(_constants(file, weights)), frozenset())


def _refuse_mutation(exported: Any) -> None:
    changed = mutated_names(exported)
    if changed:
        raise ExportError(
            f"it writes to {changed[0]!r}; ONNX would drop that silently: export(backend='aoti') keeps it"
        )


def _refuse_narrow(exported: Any) -> None:
    for name, tensor in (*exported.state_dict.items(), *exported.constants.items()):
        if str(getattr(tensor, "dtype", "")) == "torch.bfloat16":
            raise ExportError(
                f"it computes in bfloat16 ({name}), for which ONNX Runtime has no kernels on a CPU:"
                " export(backend='aoti') has them, or convert the model to float32 in load"
            )


def _export(exported: Any, target: Path) -> None:
    import torch

    try:
        program = torch.onnx.export(exported, dynamo=True, verbose=False)
        assert program is not None
        program.save(str(target), external_data=True)
    except ModuleNotFoundError as error:
        raise ExportError(f"making ONNX programs needs {error.name}: {_EXTRA}") from error
    except Exception as error:  # whatever the exporter raises for an operator that it does not have
        raise ExportError(f"it cannot be exported to ONNX: {obstacle(error)}") from error


def _optimise(plain: Path, target: Path, weights: str) -> None:
    """Have the runtime write the graph as it would run it here."""
    runtime = runtime_module()

    options = runtime.SessionOptions()
    options.log_severity_level = (
        3  # one level down is a warning that the graph fits this processor: the platform says so
    )
    options.optimized_model_filepath = str(target)
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(INSIDE_BYTES)
    )
    try:
        runtime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions have no common class
        raise ExportError(f"ONNX Runtime refuses its graph: {obstacle(error)}") from error


def _constants(file: Path, weights: str) -> Iterator[Constant]:
    """The weights that the graph refers to, as the runtime laid them out."""
    import numpy as np
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    data = file.with_name(weights)
    if not data.exists() or not os.stat(data).st_size:
        return
    mapped = np.memmap(data, dtype=np.uint8, mode="r")
    for tensor in graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        begin, length_bytes = int(place.get("offset", 0)), int(place["length"])
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).name
        yield Constant(tensor.name, dtype, tuple(tensor.dims), mapped[begin : begin + length_bytes])
