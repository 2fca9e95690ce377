"""The calls that a warm-up made of the entry points, as examples for exporting them. Runs where a program is made."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import ExportError
from coldstart.programs.calls import as_torch, device_of
from coldstart.programs.signature import named_arguments, same_structure, taken_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from coldstart.programs.entries import EntryPoint

MOST_CALLS = 256
"""Calls that are kept: a warm-up that streams makes hundreds, and each holds copies of its arrays."""


class Call(NamedTuple):
    """A call of an entry point: its structure, and names and copies of its arrays (tensors)."""

    path: str
    structure: Any
    names: tuple[str, ...]
    arrays: tuple[Any, ...]


class Recorder:
    """Notes calls in the order in which they are made, by whichever thread. ``points`` are where they go.

    ``before``: address of a module's buffer -> a copy of it as it was before the first call.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.points: dict[str, EntryPoint] = {}
        self.before: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._ended = False

    def at(self, point: EntryPoint) -> Callable[[Any, Sequence[tuple[str, Any]]], None]:
        """What ``EagerCall`` tells the calls of this entry point to."""
        self.points[point.path] = point
        for buffer in _buffers(point):
            self.before.setdefault(buffer.data_ptr(), buffer.detach().clone())

        def note(structure: Any, arrays: Sequence[tuple[str, Any]]) -> None:
            with self._lock:
                if not self._ended and len(self.calls) < MOST_CALLS:
                    self.calls.append(_call(point, structure, arrays))

        return note

    def end(self) -> None:
        """Note no more calls: an entry point that is traced may call another one, with tensors that only tracing knows."""
        with self._lock:
            self._ended = True

    def of(self, path: str) -> list[Call]:
        """The calls of one entry point. Raises ExportError where there is none, or they differ in more than arrays."""
        calls = [call for call in self.calls if call.path == path]
        if not calls:
            raise ExportError(
                f"the warm-up made no call of entry point {path or 'the state itself'!r}: give warmup= inputs that do, or"
                " export(example=...)"
            )
        for call in calls[1:]:
            if not same_structure(call.structure, calls[0].structure):
                raise ExportError(
                    f"entry point {path!r} is called in two ways ({_shown(calls[0].structure)} and"
                    f" {_shown(call.structure)}): let each be an entry point of its own"
                )
        return calls


def _buffers(point: EntryPoint) -> list[Any]:
    """The buffers of the module that is called, or that the method is a method of."""
    import torch

    owner = getattr(point.function, "__self__", point.function)
    return list(owner.buffers()) if isinstance(owner, torch.nn.Module) else []


def given_call(point: EntryPoint, values: Mapping[str, Any]) -> Call:
    """A call that ``export(example=...)`` names. Raises ProgramCallError for values that no call could pass."""
    named = named_arguments(point.parameters, (), values, entry=point.path)
    structure, arrays = taken_apart(named, "", entry=point.path)
    return _call(point, structure, arrays)


def _call(point: EntryPoint, structure: Any, arrays: Sequence[tuple[str, Any]]) -> Call:
    names, device = tuple(name for name, _ in arrays), device_of(point)
    return Call(point.path, structure, names, tuple(as_torch(array, device).clone() for _, array in arrays))


def _shown(structure: Any) -> str:
    return ", ".join(
        f"{name}={node[1]!r}" if node[0] == "plain" else f"{name}=({node[0]})" for name, node in structure[1]
    )[:200]
