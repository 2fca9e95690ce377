"""What a manifest says of a program: which platform it runs on, its entry points, and where their constants lie.

::

    {"id": "0f3a...", "backend": "onnx", "platform": {...}, "options": "...", "tolerance": {"float32": 1e-05},
     "entries": [{"path": "", "signature": {...}, "file": "0.onnx", "constants": [[name, dtype, shape, buffer, offset], ...],
                  "mutated": []}]}

A manifest may hold several programs, one a platform: workers of a mixed fleet do not take each other's away. The bytes
lie in segments whose consumer is ``program_<id>``, but for constants that are arrays of the state too. This is read
before the first answer, and by the fetcher, to know which segments are wanted: the standard library alone, and strict.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import ProgramError
from coldstart.programs.base import Array
from coldstart.programs.signature import Signature, check_structure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.exports import Export

MAX_ENTRIES = 64
MAX_ARRAYS = 4096
MAX_CONSTANTS = 200_000
MOST_PROGRAMS = 8
"""Programs of one manifest: when a platform more comes, the oldest goes."""


class ConstantPlace(NamedTuple):
    """Where a constant lies: bytes in C order, from ``offset_bytes`` of the buffer of this name on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    buffer: str
    offset_bytes: int


class Entry(NamedTuple):
    """One entry point. ``file``: its file's name below the root ``program_<id>``. ``mutated``: constants that calls write to."""

    path: str
    signature: Signature
    file: str
    constants: tuple[ConstantPlace, ...]
    mutated: tuple[str, ...]


class Program(NamedTuple):
    """A program for one platform. ``options`` is a digest of what the handler asked for; ``tolerance`` by dtype, as proven."""

    id: str
    backend: str
    platform: Mapping[str, str]
    options: str
    tolerance: Mapping[str, float]
    entries: tuple[Entry, ...]


def program_id(backend: str, platform: Mapping[str, str]) -> str:
    """The same for the same backend on the same platform, 16 hexadecimal digits."""
    from blake3 import blake3

    text = json.dumps([backend, sorted(platform.items())])
    return str(blake3(text.encode(), derive_key_context="coldstart program 1").hexdigest(length=8))


def options_digest(export: Export) -> str:
    """The same for the same wishes of a handler: a program that was made for others is made anew."""
    from blake3 import blake3

    dynamic = {
        path: {name: sorted(sizes.items()) for name, sizes in ranges.items()} for path, ranges in export.dynamic.items()
    }
    text = json.dumps([export.entry, dynamic, export.backend, sorted(export.tolerance.items())], sort_keys=True)
    return str(blake3(text.encode(), derive_key_context="coldstart program options 1").hexdigest(length=8))


def consumer_of(identity: str) -> str:
    """The consumer of the segments that only this program needs; also the root of its files."""
    return f"program_{identity}"


def to_json(program: Program) -> dict[str, Any]:
    """The program as an object of a manifest's ``programs``."""
    entries = [
        {
            **entry._asdict(),
            "signature": signature_to_json(entry.signature),
            "constants": [list(place) for place in entry.constants],
        }
        for entry in program.entries
    ]
    return {
        **program._asdict(),
        "platform": dict(program.platform),
        "tolerance": dict(program.tolerance),
        "entries": entries,
    }


def signature_to_json(signature: Signature) -> dict[str, Any]:
    """A signature as an object of JSON."""
    return {
        **signature._asdict(),
        "inputs": [list(array) for array in signature.inputs],
        "outputs": [list(array) for array in signature.outputs],
        "ranges": {name: list(limits) for name, limits in signature.ranges.items()},
    }


def programs_of(documents: Sequence[Mapping[str, Any]]) -> list[Program]:
    """The programs of a manifest that this coldstart can read; others are left alone. See ``program_from_json``."""
    found = []
    for document in documents:
        try:
            found.append(program_from_json(document))
        except ProgramError:  # of a newer coldstart, or damaged: a start goes on without it
            continue
    return found


def chosen(documents: Sequence[Mapping[str, Any]], accepted: Sequence[str]) -> Program | None:
    """The program that a start which accepts these takes, the first accepted before others; None: there is none.

    The fetcher and the start choose alike, so that what is fetched is what is used.
    """
    found = {program.id: program for program in programs_of(documents)} if accepted else {}
    return next((found[identity] for identity in accepted if identity in found), None)


def program_from_json(document: Mapping[str, Any]) -> Program:
    """Read and check a program's record. Raises ProgramError, nothing else."""
    try:
        return _program(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProgramError(f"a program's record is malformed: {type(error).__name__}: {error}") from error


def _program(document: Mapping[str, Any]) -> Program:
    entries = document["entries"]
    _require(type(entries) is list and 0 < len(entries) <= MAX_ENTRIES)
    platform = {_text(name): _text(value) for name, value in document["platform"].items()}
    program = Program(
        id=_text(document["id"]),
        backend=_text(document["backend"]),
        platform=platform,
        options=_text(document["options"]),
        tolerance={_text(dtype): float(value) for dtype, value in document["tolerance"].items()},
        entries=tuple(map(_entry, entries)),
    )
    _require(program.id == program_id(program.backend, platform))
    return program


def _entry(document: Mapping[str, Any]) -> Entry:
    constants = document["constants"]
    _require(type(constants) is list and len(constants) <= MAX_CONSTANTS)
    return Entry(
        path=_text(document["path"]),
        signature=signature_from_json(document["signature"]),
        file=_text(document["file"]),
        constants=tuple(_constant(*row) for row in constants),
        mutated=tuple(map(_text, document["mutated"])),
    )


def _constant(name: Any, dtype: Any, shape: Any, buffer: Any, offset_bytes: Any) -> ConstantPlace:
    return ConstantPlace(_text(name), _text(dtype), tuple(map(_count, shape)), _text(buffer), _count(offset_bytes))


def signature_from_json(document: Mapping[str, Any]) -> Signature:
    """Read and check a signature. Raises ProgramError, and what ``program_from_json`` catches."""
    ranges = {_text(name): (_count(least), _count(most)) for name, (least, most) in document["ranges"].items()}
    inputs, outputs = (tuple(_array(row, ranges) for row in document[field]) for field in ("inputs", "outputs"))
    _require(max(len(inputs), len(outputs)) <= MAX_ARRAYS)
    check_structure(document["arguments"], len(inputs))
    check_structure(document["results"], len(outputs))
    return Signature(
        tuple(map(_text, document["parameters"])), document["arguments"], inputs, document["results"], outputs, ranges
    )


def _array(row: Any, ranges: Mapping[str, tuple[int, int]]) -> Array:
    name, dtype, shape = row
    _require(all(size in ranges if type(size) is str else type(size) is int and size >= 0 for size in shape))
    return Array(_text(name), _text(dtype), tuple(shape))


def _text(value: Any) -> str:
    _require(type(value) is str and len(value) <= 4096)  # noqa: PLR2004  the format's limit of a text
    return str(value)


def _count(value: Any) -> int:
    _require(type(value) is int and 0 <= value < 1 << 53)
    return int(value)


def _require(holds: bool) -> None:  # noqa: FBT001
    if not holds:
        raise ProgramError("a program's record holds a value of the wrong type or out of range")
