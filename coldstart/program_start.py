"""Programs in a start: which ones it accepts, loading the one that was restored, and entry points in their places."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import ProgramError, ProgramRuntimeError
from coldstart.programs import BACKENDS, backend_of, default_backend
from coldstart.programs.base import Constant, item_bytes
from coldstart.programs.calls import EagerCall, ProgramCall
from coldstart.programs.entries import entry_point, put_in, standing_alone
from coldstart.programs.record import consumer_of, options_digest, program_id
from coldstart.signing import are_required
from coldstart.trust import distrust

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coldstart.config import Settings
    from coldstart.definition import Definition
    from coldstart.exports import Export
    from coldstart.programs.record import ConstantPlace, Entry, Program
    from coldstart.programs.recording import Recorder
    from coldstart.restore import Restored


class Accepted(NamedTuple):
    """The programs that a start can run and may: their ids, the preferred backend's first; and why others are not."""

    identities: tuple[str, ...]
    obstacle: str


NONE = Accepted((), "")


def accepted(settings: Settings, device_type: str, snapshot: str, *, backend: str = "") -> Accepted:
    """What a start accepts. ``backend``: only programs of this one, "" for any."""
    if not settings.programs:
        return Accepted((), "programs are switched off (COLDSTART_PROGRAMS)")
    reason = distrust(
        settings.store, trust_store=settings.trust_store, is_signed=are_required(settings), snapshot=snapshot
    )
    if reason:
        return Accepted((), reason)
    preferred = backend or default_backend(device_type)
    names = [preferred] if backend else sorted(BACKENDS, key=lambda name: name != preferred)
    found, obstacles = [], []
    for name in names:
        try:
            found.append(program_id(name, backend_of(name).platform(device_type)))
        except ProgramRuntimeError as error:
            obstacles.append(str(error))
    return Accepted(tuple(found), obstacles[0] if obstacles else "")


def unsuitable(program: Program, export: Export | None) -> str:
    """Why the handler does not want this program, "" if it does."""
    if export is None:
        return "the handler has no program= any more"
    return "" if program.options == options_digest(export) else "export(...) was changed since the program was made"


def stands_alone(definition: Definition) -> bool:
    """Whether the program is all that the handler gets of the state, in a start that has one."""
    assert definition.program is not None
    return definition.owner is None and (definition.program.entry == ("",) or "" not in definition.build)


def eager_entries(definition: Definition, state: Any, recorder: Recorder | None) -> Any:
    """The state with its entry points behind the calls that a program has too: what the handler gets without one.

    Raises HandlerError for an entry point that is not there.
    """
    assert definition.program is not None
    alone = stands_alone(definition)
    points = [entry_point(state, path, alone=alone) for path in definition.program.entry]
    calls = {point.path: EagerCall(point, recorder.at(point) if recorder is not None else None) for point in points}
    if alone:
        return standing_alone(calls)
    for point in points:
        put_in(point, calls[point.path])
    return state


def in_place(definition: Definition, skeleton: Any, calls: Mapping[str, Any]) -> Any:
    """The calls of a loaded program as the handler gets them: in what ``build`` made, or alone."""
    if stands_alone(definition):
        return standing_alone(calls)
    if skeleton is None:  # class form without build: an instance that has its entry points and nothing else
        assert definition.owner is not None
        skeleton = object.__new__(definition.owner)
        found = standing_alone(calls)
        vars(skeleton).update({str(name): getattr(found, str(name)) for name in found.names()})
        return skeleton
    for path, call in calls.items():
        put_in(entry_point(skeleton, path, alone=False), call)
    return skeleton


def owners(definition: Definition, state: Any) -> tuple[str, ...]:
    """Paths of the objects whose arrays a program makes superfluous; () where nothing around them is kept anyway."""
    assert definition.program is not None
    found = tuple(entry_point(state, path, alone=False).owner for path in definition.program.entry)
    return found if definition.owner is None else tuple(map(_of_self, found))


def _of_self(path: str) -> str:
    """A path from an instance as one from the mapping of what is set on it, which is the state in class form."""
    name = re.split(r"[.[]", path, maxsplit=1)[0]
    return f'["{name}"]{path[len(name) :]}' if path else ""


def is_below(path: str, owner: str) -> bool:
    """Whether the array at ``path`` is in the object at ``owner`` ("" is the whole state)."""
    return not owner or path == owner or path.startswith((f"{owner}.", f"{owner}["))


def load_calls(program: Program, restored: Restored, allocate: Callable[[str, int], Any]) -> dict[str, ProgramCall]:
    """Load every entry point of a restored program. The arena is sealed by it. Raises ProgramError.

    ``allocate(name, length_bytes)`` gives the zeroed bytes of a pool.
    """
    backend = backend_of(program.backend)
    files = {entry.file: _file(entry, program, restored) for entry in program.entries}
    restored.arena.seal()
    memory = _Memory(restored, allocate)
    calls = {}
    for entry in program.entries:
        signature = entry.signature
        constants = [memory.constant(place) for place in entry.constants]
        runner = backend.load(files[entry.file], constants, signature.inputs, signature.outputs)
        calls[entry.path] = ProgramCall(entry, runner)
    return calls


class _Memory:
    """Where a program's constants are: in the arena, or in memory that the allocation plan lists."""

    def __init__(self, restored: Restored, allocate: Callable[[str, int], Any]) -> None:
        self._restored = restored
        self._allocate = allocate
        self._buffers = {buffer.name: buffer for buffer in restored.manifest.buffers}
        self._pools = {pool.name: pool.length_bytes for pool in restored.manifest.pools}

    def constant(self, place: ConstantPlace) -> Constant:
        """The constant with its bytes. Raises ProgramError where they are not there."""
        length_bytes = math.prod(place.shape) * item_bytes(place.dtype)
        memory = self._memory(place.buffer)
        if memory is None or place.offset_bytes + length_bytes > len(memory):
            raise ProgramError(f"constant {place.name!r} of the program lies outside the snapshot's buffers")
        return Constant(
            place.name, place.dtype, place.shape, memory[place.offset_bytes : place.offset_bytes + length_bytes]
        )

    def _memory(self, name: str) -> Any:
        if name in self._buffers:
            buffer = self._buffers[name]
            return self._restored.arena.array(buffer.segment, buffer.offset_bytes, buffer.length_bytes)
        if name in self._pools:
            return self._allocate(name, self._pools[name])
        return None


def _file(entry: Entry, program: Program, restored: Restored) -> memoryview:
    """The bytes of an entry point's file: a copy, since an arena is read like this only until it is sealed."""
    root = consumer_of(program.id)
    for each in restored.manifest.files:
        if (each.root, each.name) == (root, entry.file):
            end = each.offset_bytes + each.length_bytes
            return memoryview(bytes(restored.arena.readable(each.segment)[each.offset_bytes : end]))
    raise ProgramError(f"the program's file {entry.file!r} is not in the snapshot")
