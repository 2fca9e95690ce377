"""Calling an entry point: the state's own code, or the loaded program, with the same arguments and the same results.

Arguments are arrays of numpy or torch, in any structure; results are arrays of numpy, or of torch where an argument was
one. So a handler sees no difference between a start that loaded its model and one that has only the program.
bfloat16, which numpy lacks, comes as float32.
"""

from __future__ import annotations

import threading
from itertools import chain
from typing import TYPE_CHECKING, Any

from coldstart.errors import ProgramError
from coldstart.programs.signature import (
    called_with,
    check_call,
    framework_of,
    named_arguments,
    put_together,
    taken_apart,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coldstart.programs.base import Runner
    from coldstart.programs.entries import EntryPoint
    from coldstart.programs.record import Entry

    _NamedArrays = Sequence[tuple[str, Any]]

_NARROW = ("bfloat16", "float8")
"""Beginnings of dtypes that numpy does not have."""


class _Alone:
    """A call that stands for the whole state."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"{name!r}: with program=export() the state is its call alone, in every start; give build= and"
            " export(entry=...) for an object with a part of it replaced, or keep what init needs with ctx.keep"
        )


class EagerCall(_Alone):
    """An entry point as the state's own code computes it, without gradients.

    ``note``, if given, is told of every call: its structure and its arrays.
    """

    def __init__(self, point: EntryPoint, note: Callable[[Any, _NamedArrays], None] | None = None) -> None:
        self._point = point
        self._note = note
        self._device = device_of(point)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call it. Raises ProgramCallError for arguments that no program could take, and what the user's code raises."""
        import torch

        point = self._point
        named = named_arguments(point.parameters, arguments, options, entry=point.path)
        structure, arrays = taken_apart(named, "", entry=point.path)
        given = put_together(structure, [as_torch(array, self._device) for _, array in arrays])
        with torch.inference_mode():
            result = called_with(point.function, given)
        shape, results = taken_apart(result, "", entry=point.path)
        if self._note is not None:
            self._note(structure, arrays)
        return put_together(shape, delivered([array for _, array in results], arrays))


class ProgramCall(_Alone):
    """An entry point as a loaded program computes it. Raises ProgramCallError for a call that it was not made for."""

    def __init__(self, entry: Entry, runner: Runner) -> None:
        self._entry = entry
        self._runner = runner
        self._turn = threading.Lock()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call it. Raises ProgramCallError."""
        entry, runner = self._entry, self._runner
        named = named_arguments(entry.signature.parameters, arguments, options, entry=entry.path)
        structure, arrays = taken_apart(named, "", entry=entry.path)
        check_call(entry.signature, structure, arrays, entry=entry.path)
        convert = as_torch if runner.framework == "torch" else as_numpy
        given = [convert(array) for _, array in arrays]
        if entry.mutated:
            with self._turn:
                results = runner.run(given)
        else:
            results = runner.run(given)
        if len(results) != len(entry.signature.outputs):
            raise ProgramError(
                f"entry point {entry.path!r} gave {len(results)} results instead of {len(entry.signature.outputs)}"
            )
        return put_together(entry.signature.results, delivered(results, arrays))


def delivered(results: Sequence[Any], arguments: _NamedArrays) -> list[Any]:
    """The results for a caller that passed ``arguments``: of torch if any of them was, else of numpy."""
    if any(framework_of(array) == "torch" for _, array in arguments):
        return [as_torch(result) for result in results]
    return [as_numpy(result) for result in results]


def device_of(point: EntryPoint) -> Any:
    """The torch device that an entry point computes on: its module's; None where that cannot be told."""
    import torch

    owner = getattr(point.function, "__self__", point.function)
    if not isinstance(owner, torch.nn.Module):
        return None
    return next((tensor.device for tensor in chain(owner.parameters(), owner.buffers())), None)


def as_torch(array: Any, device: Any = None) -> Any:
    """The array as a tensor, C-contiguous, on ``device`` if one is given; it shares memory where it can."""
    import torch

    if framework_of(array) == "torch":
        tensor = array.detach().contiguous()
    else:
        import numpy as np

        plain = np.asarray(array, order="C")
        tensor = torch.from_numpy(plain if plain.flags.writeable else plain.copy())  # of a read-only one torch warns
    return tensor if device is None or tensor.device == device else tensor.to(device)


def as_numpy(array: Any) -> Any:
    """The array as numpy's, C-contiguous; it shares memory where it can."""
    if framework_of(array) == "numpy":
        import numpy as np

        return np.asarray(array, order="C")
    tensor = array.detach().cpu()
    if str(tensor.dtype).removeprefix("torch.").startswith(_NARROW):
        tensor = tensor.float()
    return tensor.contiguous().numpy()
