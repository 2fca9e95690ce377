"""What a backend of programs is given, and what it gives.

A program is the computation behind one or more *entry points* of a state (its call, a method, a module inside it),
exported and compiled when the snapshot was made. For a backend an entry point is a function of flat arrays: which
arguments they come from, and which structure the results have, is ``programs.signature``'s business, and no call that
does not fit the signature reaches the backend.

There are two halves. ``Backend`` is on the path to the first answer: it imports its runtime when it is told to, and
nothing else. ``make`` of ``onnx_make`` and ``aoti_make`` runs in a process of its own when a snapshot is made.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path


_BITS = re.compile(r"\d+")


def item_bytes(dtype: str) -> int:
    """The item size that a dtype's name tells: float32, bfloat16, float8_e4m3fn, bool."""
    bits = _BITS.search(dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


class Array(NamedTuple):
    """An array that goes into an entry point or comes out of it.

    ``name`` is how a person finds it in the call (``input_ids``, ``past[0]``). ``dtype`` is torch's name of it
    (``int64``, ``bfloat16``). A size in ``shape`` is a number, or the name of a symbol that has a range.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Constant(NamedTuple):
    """A constant of a program with its bytes: ``name`` is the runtime's, ``data`` a flat uint8 array in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Any


class Runner(NamedTuple):
    """A loaded entry point. ``run`` takes and gives flat C-contiguous arrays of ``framework`` (``numpy``, ``torch``).

    It keeps alive what it needs: its constants are used where they are, never copied.
    """

    framework: str
    run: Callable[[Sequence[Any]], Sequence[Any]]


class Backend(ABC):
    """A runtime for programs, on the path to the first answer. It has no state: ``load`` gives what has."""

    name: str

    @abstractmethod
    def platform(self, device_type: str) -> Mapping[str, str]:
        """What its programs depend on besides the key (versions, instruction set, GPU), without importing the runtime.

        Raises ProgramRuntimeError where the runtime is missing or too old.
        """

    @abstractmethod
    def import_runtime(self) -> None:
        """Import what ``load`` needs. Raises ProgramRuntimeError."""

    @abstractmethod
    def load(
        self, file: memoryview, constants: Sequence[Constant], inputs: Sequence[Array], outputs: Sequence[Array]
    ) -> Runner:
        """Load one entry point from its ``file``'s bytes, its constants used where they are. Raises ProgramError."""


class Made(NamedTuple):
    """An entry point's program as it was made: its one file, and its constants, which are not in the file.

    ``mutated``: names of the constants that calls write to (a cache): no two calls may run at a time, and every worker
    starts from the bytes given here.
    """

    file: Path
    constants: tuple[Constant, ...]
    mutated: frozenset[str]
