"""How far a program's results may be from the eager ones, and where they are further."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coldstart.programs.signature import framework_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coldstart.programs.record import Entry

DEFAULTS: Mapping[str, float] = {
    "float64": 1e-9,
    "float32": 2e-5,
    "float16": 5e-3,
    "bfloat16": 2e-2,
}
"""Largest difference by dtype, relative to the largest value of the array (at least 1). Everything else has to be equal."""


def limit_of(entries: Iterable[Entry], tolerance: Mapping[str, float]) -> float:
    """How far numbers may be that these entry points compute: as the coarsest dtype among their arrays and constants allows.

    A result in float32 that was computed in bfloat16 is as exact as bfloat16.
    """
    limits = {**DEFAULTS, **tolerance}
    dtypes: set[str] = set()
    for entry in entries:
        dtypes |= {constant.dtype for constant in entry.constants}
        dtypes |= {array.dtype for array in (*entry.signature.inputs, *entry.signature.outputs)}
    return max((limits[dtype] for dtype in dtypes if dtype in limits), default=0.0)


def array_difference(expected: Any, got: Any, limit: float) -> str:
    """How two numpy arrays differ; "" if they agree. NaN agrees with NaN, and an infinity with itself."""
    import numpy as np

    if expected.dtype != got.dtype or expected.shape != got.shape:
        return f"is {got.dtype} {got.shape} instead of {expected.dtype} {expected.shape}"
    if expected.dtype.kind not in "fc":
        count = int(np.count_nonzero(expected != got))
        return f"differs in {count} of {expected.size} values" if count else ""
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], got[~finite], equal_nan=True):
        return "differs in its infinities or NaNs"
    if not finite.any():
        return ""
    largest = float(np.abs(expected[finite]).max())
    distance = float(np.abs(expected[finite] - got[finite]).max())
    if distance <= limit * max(1.0, largest):
        return ""
    return f"is off by {distance:.3g} (largest value {largest:.3g}, allowed {limit * max(1.0, largest):.3g})"


def plain(value: Any) -> Any:
    """An answer as JSON values; what has no such form becomes its type's name, and is compared by that."""
    from coldstart.programs.calls import as_numpy

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if framework_of(value):
        return plain(as_numpy(value).tolist())
    return value.hex() if isinstance(value, bytes) else type(value).__name__


def answer_difference(expected: Any, got: Any, limit: float, place: str = "answer") -> str:
    """The same for a handler's answers, as JSON values: texts and whole numbers equal, other numbers within ``limit``."""
    if isinstance(expected, float) and isinstance(got, (int, float)) and not isinstance(got, bool):
        near = expected == got or abs(expected - got) <= limit * max(1.0, abs(expected))
        return "" if near or (expected != expected and got != got) else f"{place} is {got!r} instead of {expected!r}"  # noqa: PLR0124  NaN
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        pairs = enumerate(zip(expected, got, strict=True))
        return next(filter(None, (answer_difference(*pair, limit, f"{place}[{at}]") for at, pair in pairs)), "")
    if isinstance(expected, dict) and isinstance(got, dict) and expected.keys() == got.keys():
        found = (answer_difference(value, got[key], limit, f"{place}.{key}") for key, value in expected.items())
        return next(filter(None, found), "")
    return (
        "" if type(expected) is type(got) and expected == got else f"{place} is {got!r:.60} instead of {expected!r:.60}"
    )
