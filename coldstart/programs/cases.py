"""The proof of a program: calls of its entry points, in order, and what the state's own code answered to them.

First the calls that the warm-up made, then sequences of the same entry points with other values and sizes, each of them
twice. A program that dropped a write to its cache, or that has an example's values or sizes baked in, answers the
recorded calls rightly and these wrongly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import ExportError, ProofError
from coldstart.programs.calls import as_numpy
from coldstart.programs.folder import CASES, ArrayReader, read_document, stored_of, write_document
from coldstart.programs.signature import UNBOUNDED, called_with, put_together, taken_apart
from coldstart.programs.tolerance import array_difference, limit_of
from coldstart.programs.tracing import SMALLEST_TRACED, resized

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from random import Random

    from coldstart.programs.folder import ArrayWriter
    from coldstart.programs.record import Program
    from coldstart.programs.recording import Call
    from coldstart.programs.signature import Signature
    from coldstart.programs.tracing import Traced

SEQUENCES = 3
LONGEST_SEQUENCE = 24
LARGEST_TRIED = 64
"""Sizes of a free dimension are tried up to this, or four times the largest that was seen."""


class _Asked(NamedTuple):
    """A call that the program will have to answer: arrays that are tensors."""

    path: str
    arrays: tuple[Any, ...]


class CaseWriter:
    """Asks the state's own code, and writes the cases. ``modules``: entry point -> its flat module."""

    def __init__(
        self, modules: Mapping[str, Any], traced: Mapping[str, Traced], arrays: ArrayWriter, random: Random
    ) -> None:
        self._modules = modules
        self._signatures = {path: each.signature for path, each in traced.items()}
        self._arrays = arrays
        self._random = random
        self.cases: list[dict[str, Any]] = []

    def narrowed(self, path: str, calls: Sequence[Call]) -> Signature:
        """The signature with no size that the state's own code refuses: each limit is tried by a call of it."""
        signature = self._signatures[path]
        for symbol, (least, most) in signature.ranges.items():
            seen = _seen(signature, calls, symbol)
            if not seen:
                continue
            limits = [least, most]
            if least < min(seen) and self._fails(path, calls, {symbol: least}):
                limits[0] = min(seen)
            tried = min(most, max(LARGEST_TRIED, 4 * max(seen)))
            if tried > max(seen) and self._fails(path, calls, {symbol: tried}):
                limits[1] = max(seen)
            signature = signature._replace(ranges={**signature.ranges, symbol: (limits[0], limits[1])})
        self._signatures[path] = signature
        return signature

    def write(self, calls: Sequence[Call], folder: Path) -> int:
        """Ask everything and write ``cases.json``; returns how many cases there are. Raises ExportError if there is none."""
        recorded = [_Asked(call.path, call.arrays) for call in calls[:LONGEST_SEQUENCE]]
        self._ask_all(recorded)
        pools = _pools(calls)
        for symbol, path in self._below_traced():
            self._ask_all(
                [self._varied(call, pools, {symbol: 1}) for call in calls[:LONGEST_SEQUENCE] if call.path == path]
            )
        for _ in range(SEQUENCES):
            sequence = [self._varied(call, pools) for call in calls[:LONGEST_SEQUENCE]]
            if self._ask_all(sequence):
                self._ask_all(sequence)
        if not self.cases:
            raise ExportError("the state's own code answered none of the recorded calls a second time")
        write_document(folder, CASES, self.cases)
        return len(self.cases)

    def _below_traced(self) -> list[tuple[str, str]]:
        """Symbols that may be 1, each with its entry point. Exports see no code that only a size of 1 takes."""
        return [
            (symbol, path)
            for path, signature in self._signatures.items()
            for symbol in _symbols(signature)
            if signature.ranges[symbol][0] < SMALLEST_TRACED
        ]

    def _ask_all(self, sequence: Sequence[_Asked]) -> bool:
        """Ask a sequence and note its cases; one that the state's own code refuses at some call is left out from there."""
        for asked in sequence:
            answered = self._answer(asked)
            if answered is None:
                return False
            arrays = [list(self._arrays.add_tensor(array)) for array in asked.arrays]
            expected = [list(self._arrays.add_tensor(array)) for array in answered]
            self.cases.append({"path": asked.path, "arrays": arrays, "expected": expected})
        return True

    def _answer(self, asked: _Asked) -> Sequence[Any] | None:
        import torch

        try:
            with torch.inference_mode():
                answer: Sequence[Any] = self._modules[asked.path](*(array.clone() for array in asked.arrays))
        except Exception:  # noqa: BLE001  the user's code says that it does not take these values: no case
            return None
        return answer

    def _fails(self, path: str, calls: Sequence[Call], sizes: Mapping[str, int]) -> bool:
        return self._answer(_Asked(path, self._sized(path, calls[0].arrays, sizes))) is None

    def _sized(self, path: str, arrays: Sequence[Any], sizes: Mapping[str, int]) -> tuple[Any, ...]:
        inputs = self._signatures[path].inputs
        return tuple(
            resized(
                array,
                {axis: sizes[size] for axis, size in enumerate(each.shape) if isinstance(size, str) and size in sizes},
            )
            for array, each in zip(arrays, inputs, strict=True)
        )

    def _varied(
        self, call: Call, pools: Mapping[tuple[str, int], Any], fixed: Mapping[str, int] | None = None
    ) -> _Asked:
        """The call with other sizes where they are free, and other values: drawn from all that were seen there.

        ``fixed``: sizes that are not for chance to choose, by their symbols.
        """
        import torch

        signature = self._signatures[call.path]
        sizes = {symbol: self._size(symbol, signature, call) for symbol in _symbols(signature)}
        sizes |= fixed or {}
        arrays = []
        for place, array in enumerate(self._sized(call.path, call.arrays, sizes)):
            pool = pools[call.path, place]
            picks = torch.tensor(
                [self._random.randrange(max(1, pool.numel())) for _ in range(array.numel())], dtype=torch.int64
            )
            arrays.append(pool[picks].reshape(array.shape) if array.numel() else array)
        return _Asked(call.path, tuple(arrays))

    def _size(self, symbol: str, signature: Signature, call: Call) -> int:
        seen = _seen(signature, [call], symbol)
        least, most = signature.ranges[symbol]
        highest = min(most, LARGEST_TRIED if most >= UNBOUNDED else most, max(8, 2 * max(seen, default=1)))
        return self._random.randint(least, max(least, highest))


def _symbols(signature: Signature) -> list[str]:
    return list(dict.fromkeys(size for array in signature.inputs for size in array.shape if isinstance(size, str)))


def _seen(signature: Signature, calls: Sequence[Call], symbol: str) -> list[int]:
    return [
        int(call.arrays[place].shape[axis])
        for call in calls
        for place, array in enumerate(signature.inputs)
        for axis, size in enumerate(array.shape)
        if size == symbol
    ]


def _pools(calls: Sequence[Call]) -> dict[tuple[str, int], Any]:
    """All values that were seen at each place of each entry point, flat."""
    import torch

    found: dict[tuple[str, int], list[Any]] = {}
    for call in calls:
        for place, array in enumerate(call.arrays):
            found.setdefault((call.path, place), []).append(array.reshape(-1))
    return {at: torch.cat(arrays) for at, arrays in found.items()}


def check_cases(folder: Path, calls: Mapping[str, Any], program: Program) -> int:
    """Have the loaded program answer every case; returns how many there were. Raises ProofError for the first difference."""
    arrays = ArrayReader(folder)
    cases = read_document(folder, CASES)
    entries = {entry.path: entry for entry in program.entries}
    limits = {path: limit_of([entry], program.tolerance) for path, entry in entries.items()}
    for number, case in enumerate(cases):
        path, signature = case["path"], entries[case["path"]].signature
        given = [arrays.array(stored_of(row)) for row in case["arrays"]]
        result = called_with(calls[path], put_together(signature.arguments, given))
        _, got = taken_apart(result, "", entry=path)
        for place, (row, (_, array)) in enumerate(zip(case["expected"], got, strict=True)):
            expected = as_numpy(arrays.array(stored_of(row)))
            difference = array_difference(expected, as_numpy(array), limits[path])
            if difference:
                shapes = ", ".join(str(tuple(each.shape)) for each in given)
                raise ProofError(
                    f"the program is not the state's own code: result {place} of entry point {path!r} {difference}, in"
                    f" case {number} of {len(cases)} (inputs {shapes}); export(tolerance=...) sets what is allowed"
                )
    return len(cases)
