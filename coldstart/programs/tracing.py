"""From recorded calls to an exported program: which dimensions are free, how large they may be, and torch.export.

Runs where a program is made, in a process of its own.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import ExportError
from coldstart.programs.base import Array
from coldstart.programs.signature import UNBOUNDED, Signature, called_with, put_together, taken_apart

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from coldstart.programs.entries import EntryPoint
    from coldstart.programs.recording import Call

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
SMALLEST_TRACED = 2
"""Exporting takes a size of 0 or 1 for a fixed one."""

_Place = tuple[int, int]
"""An array of the call and one of its dimensions."""
_Ranges = dict[_Place, tuple[int, int] | None]
"""The free dimensions: their limits if they are given, None where they are what differs between the calls."""


class Traced(NamedTuple):
    """An entry point as torch.export saw it: ``exported`` takes and gives flat tensors."""

    exported: Any
    signature: Signature


def trace(point: EntryPoint, calls: Sequence[Call], given: Mapping[str, Mapping[int, tuple[int, int]]]) -> Traced:
    """Export an entry point. ``given``: argument -> dimension -> (least, most).

    Raises ExportError, with the operator or line that stands in the way and the remedy.
    """
    _refuse_training(point)
    free = _free_dimensions(calls, given, point.path)
    example = _enlarged(max(calls, key=lambda call: sum(array.numel() for array in call.arrays)), calls, free)
    module = flat_module(point, calls[0].structure)
    exported = _exported(module, example, free, point.path)
    results = _results_structure(point, calls[0].structure, example)
    return Traced(exported, _signature(point, calls, free, exported, results))


def flat_module(point: EntryPoint, structure: Any) -> Any:
    """The entry point as a module of flat tensors, in and out, in the mode (training or not) that the state is in."""
    import torch

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            owner = _owner(point)
            if owner is not None:
                self.owner = owner
                self.training = owner.training

        def forward(self, *leaves: Any) -> Any:
            _, arrays = taken_apart(_called(point, structure, leaves), "", entry=point.path)
            return tuple(array for _, array in arrays)

    return Flat()


def _owner(point: EntryPoint) -> Any:
    """The module that is called, or that the method is a method of; None where there is none."""
    import torch

    owner = getattr(point.function, "__self__", point.function)
    return owner if isinstance(owner, torch.nn.Module) else None


def _refuse_training(point: EntryPoint) -> None:
    """What a layer in training mode answers depends on chance or on the other rows of the batch, and is never meant."""
    import torch

    kinds = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._BatchNorm)  # noqa: SLF001  their only common classes
    owner = _owner(point)
    for name, module in owner.named_modules() if owner is not None else ():
        if module.training and isinstance(module, kinds):
            raise ExportError(
                f"entry point {point.path!r}: {name or 'it'} ({type(module).__name__}) is in training mode, in which it"
                " answers otherwise: have load call .eval() on the model"
            )


def _called(point: EntryPoint, structure: Any, leaves: Sequence[Any]) -> Any:
    return called_with(point.function, put_together(structure, leaves))


def _results_structure(point: EntryPoint, structure: Any, example: Sequence[Any]) -> Any:
    """The structure of what the entry point gives. Not noted while it is traced: torch undoes what happens meanwhile."""
    import torch

    with torch.no_grad():
        found, _ = taken_apart(_called(point, structure, example), "", entry=point.path)
    return found


def _free_dimensions(calls: Sequence[Call], given: Mapping[str, Mapping[int, tuple[int, int]]], path: str) -> _Ranges:
    names = calls[0].names
    free: _Ranges = {}
    for place, name in enumerate(names):
        shapes = [tuple(call.arrays[place].shape) for call in calls]
        if len(set(map(len, shapes))) > 1:
            raise ExportError(
                f"entry point {path!r}: {name} has {len(shapes[0])} dimensions in one call and another number in the next"
            )
        if len({call.arrays[place].dtype for call in calls}) > 1:
            raise ExportError(
                f"entry point {path!r}: {name} has different dtypes in different calls: convert it before"
            )
        free |= {(place, axis): None for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1}
    for name, dimensions in given.items():
        if name not in names:
            raise ExportError(
                f"export(dynamic=...): no recorded call has the array {name!r}; there are {', '.join(names)}"
            )
        place = names.index(name)
        rank = calls[0].arrays[place].dim()
        for axis, limits in dimensions.items():
            if axis >= rank:
                raise ExportError(f"export(dynamic=...): {name} has {rank} dimensions, and no dimension {axis}")
            free[place, axis] = (limits[0], limits[1])
    return free


def _ties(calls: Sequence[Call], free: _Ranges) -> dict[_Place, Any]:
    """What dimensions that belong together share: the same size in every call, and the same limits."""
    return {
        (place, axis): (tuple(int(call.arrays[place].shape[axis]) for call in calls), limits)
        for (place, axis), limits in free.items()
    }


def _enlarged(call: Call, calls: Sequence[Call], free: _Ranges) -> tuple[Any, ...]:
    """The arrays of a call, with every free dimension at least 2 and no two the same unless they belong together."""
    ties = _ties(calls, free)
    taken: set[int] = set()
    sizes: dict[Any, int] = {}
    for (place, axis), tie in ties.items():
        if tie not in sizes:
            least, most = free[place, axis] or (SMALLEST_TRACED, UNBOUNDED)
            size = max(SMALLEST_TRACED, least, int(call.arrays[place].shape[axis]))
            while size in taken and size < most:
                size += 1
            sizes[tie] = min(size, most)
            taken.add(sizes[tie])
    return tuple(
        resized(array, {axis: sizes[tie] for (at, axis), tie in ties.items() if at == place})
        for place, array in enumerate(call.arrays)
    )


def resized(array: Any, sizes: Mapping[int, int]) -> Any:
    """The array with other sizes along some axes: cut off, or repeated from its beginning."""
    import torch

    for axis, size in sizes.items():
        places = torch.arange(size) % max(1, array.shape[axis])
        array = array.index_select(axis, places)
    return array.contiguous()


def _exported(module: Any, example: tuple[Any, ...], free: _Ranges, path: str) -> Any:
    """Export with the given limits as they are, else with limits that torch infers. Raises ExportError."""
    import torch

    failures = []
    for shapes in _attempts(example, free):
        try:
            with torch.no_grad():
                return torch.export.export(module, example, dynamic_shapes={"leaves": shapes})
        except Exception as error:  # noqa: BLE001  whatever torch or the user's code raises while it is traced; raised below
            failures.append(error)
    raise ExportError(
        f"entry point {path or '(the state itself)'!r} cannot be exported: {obstacle(failures[-1])}"
    ) from failures[-1]


def _attempts(example: tuple[Any, ...], free: _Ranges) -> Iterator[tuple[Any, ...]]:
    from torch.export import Dim

    limits = {tie for tie in free.values() if tie is not None}
    if limits:
        named = {pair: Dim(f"size_{number}", min=pair[0], max=pair[1]) for number, pair in enumerate(sorted(limits))}
        yield tuple(
            {axis: named[pair] if pair else Dim.AUTO for (at, axis), pair in free.items() if at == place}
            for place in range(len(example))
        )
    yield tuple({axis: Dim.AUTO for at, axis in free if at == place} for place in range(len(example)))


def mutated_names(exported: Any) -> list[str]:
    """Names of the buffers and arguments that a call writes to. Only the functional form of an export tells."""
    signature = exported.run_decompositions({}).graph_signature
    return sorted({*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()})


def obstacle(error: BaseException) -> str:
    """What stands in the way of an export, in one line, with the user's line where torch names one, and the remedy."""
    text = " ".join(_COLOURS.sub("", str(error)).split())
    line = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    inside = [
        f"{file}:{number}"
        for file, number in line
        if "site-packages" not in file and "/coldstart/programs/" not in file
    ]
    where = f" (at {inside[-1]})" if inside else ""
    return (
        f"{type(error).__name__}: {text[:400]}{where}; export another entry point, change that line, or leave program= out:"
        " starts stay eager"
    )


def _signature(point: EntryPoint, calls: Sequence[Call], free: _Ranges, exported: Any, results: Any) -> Signature:
    nodes = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    limits: dict[str, tuple[int, int]] = {}
    inputs = []
    for place, node in enumerate(exported.graph_signature.user_inputs):
        value, name = nodes[node], calls[0].names[place]
        shape = tuple(_size(size, limits, exported) for size in value.shape)
        for axis, size in enumerate(shape):
            _check_free(free, (place, axis), size, calls, point.path, name)
            if isinstance(size, str):
                limits[size] = _limits(limits[size], free[place, axis], calls, (place, axis))
        inputs.append(Array(name, str(value.dtype).removeprefix("torch."), shape))
    outputs = []
    for place, node in enumerate(exported.graph_signature.user_outputs):
        value = nodes[node]
        shape = tuple(_size(size, limits, exported) for size in value.shape)
        outputs.append(Array(f"result {place}", str(value.dtype).removeprefix("torch."), shape))
    return Signature(point.parameters, calls[0].structure, tuple(inputs), results, tuple(outputs), limits)


def _size(size: Any, limits: dict[str, tuple[int, int]], exported: Any) -> int | str:
    """A size as a number or the name of a symbol, whose limits by the export are noted."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if expression.is_number:  # a symbol at first, until the code turned out to fix it
        return int(expression)
    name = str(expression)
    if name not in limits:
        found = exported.range_constraints.get(expression)
        least, most = (1, UNBOUNDED) if found is None else (_bound(found.lower, 1), _bound(found.upper, UNBOUNDED))
        limits[name] = (1 if least <= SMALLEST_TRACED else least, min(most, UNBOUNDED))
    return name


def _bound(value: Any, otherwise: int) -> int:
    text = str(value)  # sympy's infinities take no int()
    return int(text) if text.isdigit() else otherwise


def _limits(
    exported: tuple[int, int], given: tuple[int, int] | None, calls: Sequence[Call], place: _Place
) -> tuple[int, int]:
    """What is allowed of what the export allows: what was given, else whatever is no smaller than 1."""
    if given is not None:
        return max(exported[0], given[0]), min(exported[1], given[1])
    seen = [int(call.arrays[place[0]].shape[place[1]]) for call in calls]
    return min(exported[0], *seen), exported[1]


def _check_free(free: _Ranges, place: _Place, size: int | str, calls: Sequence[Call], path: str, name: str) -> None:
    if isinstance(size, str):
        if place not in free:
            raise ExportError(f"entry point {path!r}: dimension {place[1]} of {name} became free by itself ({size})")
        if not size.isidentifier():
            raise ExportError(
                f"entry point {path!r}: dimension {place[1]} of {name} is tied to others as {size}, which is not supported"
            )
    elif place in free:
        seen = sorted({int(call.arrays[place[0]].shape[place[1]]) for call in calls})
        raise ExportError(
            f"entry point {path!r}: dimension {place[1]} of {name} should be free (it was {', '.join(map(str, seen))}), and the"
            f" export made it fixed at {size}: the code compares or computes with that size in a way that holds for it alone"
        )
