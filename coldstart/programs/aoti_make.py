"""Makes programs for torch's package loader: an exported program, compiled by AOTInductor without its constants.

Runs in a process of its own when a snapshot is made: it imports Inductor and starts a C++ compiler (tens of seconds).
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import ExportError
from coldstart.programs.aoti import MODEL, SETTINGS
from coldstart.programs.base import Constant, Made

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

_COMPILER_REMEDY = 'install g++ in the image that captures (starts need none), or use backend="onnx"'
_OPERATOR = re.compile(r"target: (\S+)|((?:aten|prims)[:.]+\w+(?:\.\w+)?)")
_LINE = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(.+)')
_COMPILE_ERROR = re.compile(r"\berror: (.+)")


def make(exported: ExportedProgram, *, file: Path, scratch: Path) -> Made:
    """Compile ``exported``, whose arguments and results are flat tensors, into the package ``file`` (ending: .pt2).

    ``scratch``: a folder on disk for what the compiler needs while it works; nothing stays there or anywhere else.
    One compiler works at a time. Raises ExportError.
    """
    _check_arrays(exported)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its own code
            return _made(exported, file, scratch)
    except ExportError:
        raise
    except Exception as error:  # what a compiler raises has no common class
        raise ExportError(_obstacle(error)) from error


def _made(exported: ExportedProgram, file: Path, scratch: Path) -> Made:
    module = exported.module(check_guards=False)
    memory = _in_c_order(module)
    mutated = _mutated(exported, memory)
    kept = _compiled(module, exported.example_inputs, file, scratch)
    constants = tuple(_constant(name, tensor) for name, (tensor, _) in kept.items())
    return Made(file, constants, frozenset(_kept_name(name, memory, kept) for name in mutated))


# --- what can be made ------------------------------------------------------------------------------------------------


def _check_arrays(exported: ExportedProgram) -> None:
    from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

    signature = exported.graph_signature
    arguments = [each.arg for each in signature.input_specs if each.kind is InputKind.USER_INPUT]
    results = [each.arg for each in signature.output_specs if each.kind is OutputKind.USER_OUTPUT]
    for word, values in (("argument", arguments), ("result", results)):
        for place, value in enumerate(values):
            if not isinstance(value, TensorArgument):
                raise ExportError(
                    f"{word} {place} of the entry point is a {type(value).__name__.removesuffix('Argument')} and no"
                    " array: make it an array"
                )


def _mutated(exported: ExportedProgram, memory: Mapping[str, tuple[Any, ...]]) -> set[str]:
    """Names of the buffers that a call writes to.

    Only the functional form of the program tells: as it was exported, a write is one operator among others.
    """
    try:
        signature = exported.run_decompositions({}).graph_signature
    except AssertionError:  # torch's own word for a write to memory that has two names
        for name in memory:
            _check_memory(name, memory)
        raise
    if signature.user_inputs_to_mutate:
        written = ", ".join(sorted(set(signature.user_inputs_to_mutate.values())))
        raise ExportError(
            f"the entry point writes to its argument {written}, and the caller's array would not show it: return it as"
            " a result, or keep it in a buffer (register_buffer)"
        )
    mutated = set(signature.buffers_to_mutate.values())
    for name in mutated:
        _check_memory(name, memory)
    return mutated


# --- constants -------------------------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """A tensor of a module: its name, and the dictionary and the key that it is held by."""

    name: str
    holder: dict[str, Any]
    key: str
    value: Any


def _tensors(module: Any) -> Iterator[_Tensor]:
    import torch

    for path, part in module.named_modules(remove_duplicate=False):
        for holder in (vars(part)["_parameters"], vars(part)["_buffers"], vars(part)):
            for key, value in holder.items():
                if isinstance(value, torch.Tensor):
                    yield _Tensor(f"{path}.{key}" if path else key, holder, key, value)


def _in_c_order(module: Any) -> dict[str, tuple[Any, ...]]:
    """Lay the module's tensors out as they will be stored, in C order: compiled code knows the strides of each.

    Gives where each name's memory is: storage first. Tied tensors are at one place, and the compiler keeps one of them.
    """
    import torch

    laid_out: dict[tuple[Any, ...], Any] = {}
    memory: dict[str, tuple[Any, ...]] = {}
    for name, holder, key, value in list(_tensors(module)):
        place = (value.untyped_storage().data_ptr(), value.data_ptr(), value.dtype, value.shape, value.stride())
        if not value.is_contiguous() and place not in laid_out:
            plain = value.detach().contiguous()
            laid_out[place] = torch.nn.Parameter(plain, False) if isinstance(value, torch.nn.Parameter) else plain
        holder[key] = laid_out.get(place, value)
        memory[name] = place
    return memory


def _sharing(name: str, memory: Mapping[str, tuple[Any, ...]]) -> list[str]:
    storage = memory[name][0]  # 0: there are no elements
    return sorted(other for other, place in memory.items() if storage and place[0] == storage)


def _check_memory(name: str, memory: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ExportError where other constants are views of the same memory, which calls write to: each would be a copy."""
    others = [other for other in _sharing(name, memory) if memory[other] != memory[name]]
    if others:
        raise ExportError(
            f"the entry point writes to memory that {name} shares with {', '.join(others)}: a program would have two"
            " copies; give each memory of its own (clone()), or keep one and take views of it in the call"
        )


def _kept_name(name: str, memory: Mapping[str, tuple[Any, ...]], kept: Iterable[str]) -> str:
    """The program's name of the buffer ``name``, or of one that is tied to it. Raises ExportError if it has none."""
    for other in (name, *_sharing(name, memory)):
        if other in kept:
            return other
    raise ExportError(f"the entry point writes to {name}, which the compiled program does not hold: register_buffer it")


def _constant(name: str, tensor: Any) -> Constant:
    import torch

    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    dtype = str(plain.dtype).removeprefix("torch.")
    return Constant(name, dtype, tuple(plain.shape), plain.reshape(-1).view(torch.uint8).numpy())


# --- compiling -------------------------------------------------------------------------------------------------------


def _compiled(
    module: Any, example: tuple[tuple[Any, ...], dict[str, Any]], file: Path, scratch: Path
) -> Mapping[str, Any]:
    """Compile into ``file``. Gives the program's constants as they were before, by its names of them."""
    import torch._inductor
    from torch._inductor.package.package import package_aoti
    from torch._inductor.utils import fresh_cache

    options = {**SETTINGS, "compile_threads": 1}
    with tempfile.TemporaryDirectory(dir=scratch) as folder, fresh_cache(dir=folder, delete=False):
        made: Any = torch._inductor.aot_compile(module, *example, options=options)  # noqa: SLF001  documented as public
        package_aoti(os.fspath(file), {MODEL: [each for each in made if isinstance(each, str)]})
    kept: Mapping[str, Any] = next(each for each in made if not isinstance(each, str))
    return kept


def _obstacle(error: BaseException) -> str:
    """One sentence about what stands in the way: a missing compiler, an operator with its line, or what was said."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    error = getattr(error, "inner_exception", error)
    if isinstance(error, (InvalidCxxCompiler, FileNotFoundError)):
        return f"AOTInductor needs a C++ compiler and found none: {_COMPILER_REMEDY}"
    text = str(error)
    if isinstance(error, CppCompileError):
        said = _COMPILE_ERROR.search(error.output)
        what = said[1] if said else error.output.strip().partition("\n")[0]
        return f"the C++ compiler refused the program ({what[:300]}): {_COMPILER_REMEDY}"
    operator, lines = _OPERATOR.search(text), _LINE.findall(text)
    named = next(filter(None, operator.groups()), "") if operator else ""
    at = " at {}:{}: {}".format(*lines[-1]) if lines else ""
    what = f"the operator {named}{at}" if named or at else "an operator"
    said_first = text.strip().partition("\n")[0][:200]
    return (
        f"AOTInductor cannot compile {what} ({type(error).__name__}: {said_first}): leave it out of the entry point"
        ' (build, another entry=), or use backend="onnx"'
    )
