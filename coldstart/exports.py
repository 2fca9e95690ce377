"""What ``export(...)`` was given: which computations of a state a snapshot shall hold as a compiled program.

On the path of ``from coldstart import coldstart, export``: it imports nothing, like ``coldstart.definition``.
"""

from __future__ import annotations

from coldstart.definition import Frozen, assign, is_number, is_sequence
from coldstart.errors import HandlerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from coldstart.definition import Definition


class Export(Frozen):
    """A computation of the state that snapshots shall hold as a compiled program. See ``export``."""

    __slots__ = ("backend", "dynamic", "entry", "example", "tolerance")
    entry: tuple[str, ...]
    example: Mapping[str, Sequence[Mapping[str, Any]]]
    """Entry point -> further calls that stand for all, each by the names of its arguments."""
    dynamic: Mapping[str, Mapping[str, Mapping[int, tuple[int, int]]]]
    """Entry point -> argument -> dimension -> least and largest size."""
    backend: str
    tolerance: Mapping[str, float]

    def __init__(self, entry: Any, example: Any, dynamic: Any, backend: Any, tolerance: Any) -> None:
        entries = (entry,) if isinstance(entry, str) else tuple(entry) if is_sequence(entry) else ()
        if not entries or not all(isinstance(each, str) for each in entries) or len(set(entries)) != len(entries):
            raise HandlerError(
                f"export(entry={entry!r}) takes the path of what is called, such as 'encoder', or several of them;"
                " without it the state itself is called"
            )
        if backend not in (None, *PROGRAM_BACKENDS):
            raise HandlerError(f"export(backend={backend!r}): there are {', '.join(PROGRAM_BACKENDS)}")
        assign(self, entry=entries, backend=backend or "", dynamic=_by_entry(entries, dynamic, "dynamic"))
        assign(self, example=_examples(entries, example), tolerance=_tolerance(tolerance))
        for ranges in self.dynamic.values():
            _check_ranges(ranges)


PROGRAM_BACKENDS = ("onnx", "aoti")


def export(
    entry: str | Sequence[str] = "",
    *,
    example: Any = None,
    dynamic: Any = None,
    backend: str | None = None,
    tolerance: Mapping[str, float] | None = None,
) -> Export:
    """Have the state's computation exported, compiled and kept in the snapshot: ``@coldstart(..., program=export())``.

    ``entry``: what the handler calls: the path of a module or method in the state, or several (``("prefill",
    "decode")``); by default the state itself. Its arguments and results are arrays: numpy, or torch where torch was
    passed. ``dynamic``: argument -> dimension -> (least, largest) size; by default dimensions that differ between the
    calls of the warm-up are free. ``example``: a further call, as a mapping of argument names. With several entry points
    both are mappings by entry point. ``backend``: ``onnx`` (the default on a CPU) or ``aoti`` (on a GPU, and for what
    changes a cache). ``tolerance``: dtype -> how far results may be from the eager ones, relative to the largest.

    Raises HandlerError for values that cannot be meant.
    """
    return Export(entry, example, dynamic, backend, tolerance)


def _by_entry(entries: tuple[str, ...], given: Any, what: str) -> Mapping[str, Any]:
    """What was given for each entry point; for a single one it may be given alone."""
    if given is None:
        return {}
    if not hasattr(given, "items"):
        raise HandlerError(f"export({what}={given!r}) takes a mapping")
    if len(entries) == 1 and not set(given) <= set(entries):
        return {entries[0]: given}
    strange = sorted(map(str, set(given) - set(entries)))
    if strange:
        raise HandlerError(f"export({what}=...) names {strange[0]!r}; the entry points are {', '.join(entries)}")
    return dict(given)


def _examples(entries: tuple[str, ...], given: Any) -> Mapping[str, Any]:
    found = {
        entry: tuple(calls) if is_sequence(calls) else (calls,)
        for entry, calls in _by_entry(entries, given, "example").items()
    }
    if not all(hasattr(call, "items") for calls in found.values() for call in calls):
        raise HandlerError("export(example=...) takes a call as a mapping of argument names, such as {'ids': array}")
    return found


def _check_ranges(ranges: Any) -> None:
    for name, dimensions in ranges.items() if hasattr(ranges, "items") else (("dynamic", ranges),):
        if not (hasattr(dimensions, "items") and all(map(_is_range, dimensions.items()))):
            raise HandlerError(
                f"export(dynamic=...): {name!r} needs a mapping of dimension -> (least, largest), such as"
                f" {{0: (1, 64)}}, not {dimensions!r}"
            )


def _is_range(item: tuple[Any, Any]) -> bool:
    dimension, limits = item
    if not is_number(dimension, whole=True) or type(limits) not in (tuple, list) or len(limits) != 2:  # noqa: PLR2004
        return False
    return all(is_number(size, least=1, whole=True) for size in limits) and bool(limits[0] <= limits[1])


def _tolerance(given: Any) -> Mapping[str, float]:
    if given is None:
        return {}
    if not hasattr(given, "items") or not all(
        isinstance(dtype, str) and is_number(value) and value < float("inf") for dtype, value in given.items()
    ):
        raise HandlerError(f"export(tolerance={given!r}) takes dtype -> number, such as {{'float32': 1e-4}}")
    return {str(dtype): float(value) for dtype, value in given.items()}


def check_program(definition: Definition) -> None:
    """Raise HandlerError for a ``program=`` that cannot work with the rest of the decorator."""
    if definition.program is None:
        return
    if not isinstance(definition.program, Export):
        raise HandlerError(f"program= takes coldstart.export(...), not {definition.program!r}")
    if list(definition.load) != [""]:
        raise HandlerError("program= needs an undivided state, and load= has named parts: export one handler a part")
    if "" in definition.program.entry and (definition.owner is not None or len(definition.program.entry) > 1):
        raise HandlerError(
            "program=export() is the state's own call: in class form, and beside other entry points, name what is"
            " called, such as export(entry='encoder')"
        )
