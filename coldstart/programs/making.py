"""Making a program: from a started state and the calls of its warm-up to a folder that a capture can store.

Runs in a process of its own (``coldstart make-program``), at the lowest priority, on one thread of the processor.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from coldstart.errors import ExportError
from coldstart.programs import AOTI, ONNX, backend_of
from coldstart.programs.cases import CaseWriter
from coldstart.programs.folder import RECORD, ArrayWriter, write_document
from coldstart.programs.record import options_digest, signature_to_json
from coldstart.programs.recording import given_call
from coldstart.programs.tracing import flat_module, mutated_names, trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from coldstart.exports import Export
    from coldstart.programs.base import Constant, Made
    from coldstart.programs.folder import Stored
    from coldstart.programs.recording import Call, Recorder
    from coldstart.programs.tracing import Traced


ENDINGS = {ONNX: ".onnx", AOTI: ".pt2"}


def make_program(
    export: Export, recorder: Recorder, backend: str, folder: Path, *, device_type: str, concurrency: int = 1
) -> int:
    """Make the program that ``export`` asks for into ``folder``; returns the number of cases that prove it.

    Raises ExportError, HandlerError and ProgramRuntimeError, each with the remedy.
    """
    recorder.end()
    platform = backend_of(backend).platform(device_type)
    calls = {path: _calls(export, recorder, path) for path in export.entry}
    traced = {path: trace(recorder.points[path], calls[path], export.dynamic.get(path, {})) for path in export.entry}
    initial = _Initial(traced, recorder)
    initial.put_back()
    made = {
        path: _make(backend, traced[path], folder / f"{number}{ENDINGS[backend]}", path)
        for number, path in enumerate(export.entry)
    }
    _refuse_concurrency(made, concurrency)
    arrays = ArrayWriter(folder)
    modules = {path: flat_module(recorder.points[path], calls[path][0].structure) for path in export.entry}
    writer = CaseWriter(modules, traced, arrays, Random(0))  # noqa: S311  the same cases each time
    signatures = {path: writer.narrowed(path, calls[path]) for path in export.entry}
    written = {_memory(traced[path], name) for path, each in made.items() for name in each.mutated}
    entries = [
        {
            "path": path,
            "signature": signature_to_json(signatures[path]),
            "file": made[path].file.name,
            "constants": [
                [each.name, list(stored)] for each, stored in _stored(made[path], traced[path], written, arrays)
            ],
            "mutated": sorted(made[path].mutated),
        }
        for path in export.entry
    ]
    initial.put_back()
    count = writer.write(recorder.calls, folder)
    arrays.close()
    document = {
        "backend": backend,
        "platform": dict(platform),
        "options": options_digest(export),
        "tolerance": dict(export.tolerance),
        "entries": entries,
    }
    write_document(folder, RECORD, document)
    return count


def _calls(export: Export, recorder: Recorder, path: str) -> list[Call]:
    """The recorded calls of an entry point, and those that ``export(example=...)`` adds."""
    point = recorder.points[path]
    examples = [given_call(point, values) for values in export.example.get(path, ())]
    recorder.calls += examples
    return recorder.of(path)


def _make(backend: str, traced: Traced, file: Path, path: str) -> Made:
    if backend == AOTI:
        from coldstart.programs.aoti_make import make
    else:
        from coldstart.programs.onnx_make import make
    try:
        return make(traced.exported, file=file, scratch=file.parent)
    except ExportError as error:
        raise ExportError(f"entry point {path or '(the state itself)'!r} cannot be a program: {error}") from error


def _stored(made: Made, traced: Traced, written: set[str], arrays: ArrayWriter) -> Iterator[tuple[Constant, Stored]]:
    """The constants in the folder. What is written to is one memory wherever it is the same, and two where it only looks so."""
    for each in made.constants:
        memory = _memory(traced, each.name)
        yield each, arrays.add(each.data, each.dtype, each.shape, identity=memory if memory in written else "")


def _memory(traced: Traced, name: str) -> str:
    """Which memory of the state a constant is: compilers copy what is written to, so not by the constant's own address."""
    tensor = _tensor(traced, name)
    return f"at {tensor.data_ptr()}" if tensor is not None else f"of {name}"


def _tensor(traced: Traced, name: str) -> Any:
    return traced.exported.state_dict.get(name, traced.exported.constants.get(name))


def _refuse_concurrency(made: Mapping[str, Made], concurrency: int) -> None:
    for path, each in made.items():
        if each.mutated and concurrency > 1:
            raise ExportError(
                f"entry point {path!r} writes to {min(each.mutated)}, so one sequence of calls runs at a time, and the handler"
                f" has concurrency={concurrency}: set it to 1, or pass the cache as an argument and a result"
            )


def _written(name: str, traced: Traced) -> str:
    """What a call writes to that no program may write to, with the remedy."""
    inputs = traced.exported.graph_signature.user_inputs
    if name in inputs:
        argument = traced.signature.inputs[inputs.index(name)].name
        return f"its argument {argument!r}: let it work on a copy ({argument}.clone())"
    return f"{name}, which is not a buffer of a module of the state"


class _Initial:
    """What the arrays that calls write to were before the first call."""

    def __init__(self, traced: Mapping[str, Traced], recorder: Recorder) -> None:
        self._pairs = []
        for path, each in traced.items():
            for name in mutated_names(each.exported):
                tensor = _tensor(each, name)
                before = recorder.before.get(tensor.data_ptr()) if tensor is not None else None
                if before is None:
                    raise ExportError(f"entry point {path!r} writes to {_written(name, each)}")
                self._pairs.append((tensor, before))

    def put_back(self) -> None:
        """Let them be that again."""
        import torch

        with torch.no_grad():
            for tensor, before in self._pairs:
                tensor.copy_(before)
