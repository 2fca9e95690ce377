"""The phases of a start: each timed, switchable, and failing by name; and the warm-up events with their answers' digests."""

from __future__ import annotations

import time
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import events
from coldstart.errors import ColdstartError, PhaseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coldstart.metrics import Timeline


class PhaseRecord(NamedTuple):
    """How one phase went, in seconds since the process began. ``skipped``: why it was left out, or ""."""

    name: str
    began_seconds: float
    ended_seconds: float
    skipped: str


class Phases:
    """Runs the phases of one start, in the order in which they are asked for."""

    def __init__(
        self, name: str, timeline: Timeline, bus: events.EventBus, *, skip: tuple[str, ...], target_seconds: float
    ) -> None:
        self.records: list[PhaseRecord] = []
        self._name = name
        self._timeline = timeline
        self._bus = bus
        self._skip = skip
        self._target_seconds = target_seconds

    def run(self, phase: str, work: Callable[[], Any] | None, *, reason: str = "", otherwise: Any = None) -> Any:
        """Run ``work`` as ``phase`` and return its result; without work (for ``reason``) or skipped, return ``otherwise``.

        Raises PhaseError for any error of the user's code, with it as the cause; ColdstartErrors pass as they are.
        """
        if work is None or self.is_switched_off(phase):
            self._skipped(phase, reason if work is None else "switched off")
            return otherwise
        self._bus.publish(events.PhaseBegan(self._name, phase))
        try:
            with self._timed(phase):
                return work()
        except ColdstartError as error:
            error.phase = error.phase or phase
            raise
        except Exception as error:  # the user's own code: whatever it raises fails the start under the phase's name
            raise PhaseError(
                f"phase {phase} of {self._name!r} failed: {type(error).__name__}: {error}",
                snapshot=self._name,
                phase=phase,
            ) from error

    def is_switched_off(self, phase: str) -> bool:
        """Whether ``phase`` is to be left out."""
        return phase in self._skip

    def _skipped(self, phase: str, reason: str) -> None:
        now = self._timeline.clock()
        self.records.append(PhaseRecord(phase, now, now, reason))
        self._bus.publish(events.PhaseEnded(self._name, phase, 0.0, reason))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = self._timeline.clock()
        try:
            yield
        finally:
            ended = self._timeline.clock()
            self.records.append(PhaseRecord(phase, began, ended, ""))
            self._bus.publish(events.PhaseEnded(self._name, phase, ended - began, ""))
            if ended - began > self._target_seconds:
                self._bus.publish(events.PhaseSlow(self._name, phase, ended - began, self._target_seconds))


DIGESTED_ITERATIONS = 2
"""A proof compares the first answers with the first worker's, and two iterations to see whether answers repeat at all."""


class WarmupReport(NamedTuple):
    """What the warm-up did: digests of the answers of its first two iterations, iterations run, resident memory after.

    ``answers``: those of the first iteration as JSON values, where they are wanted.
    """

    digests: tuple[tuple[str, ...], ...]
    iterations: int
    memory_bytes: int
    answers: tuple[Any, ...] = ()


def warm_up(
    inputs: tuple[Any, ...],
    answer: Callable[[Any], Any],
    *,
    iterations: int,
    maximum_seconds: float,
    keep: Callable[[Any], Any] | None = None,
) -> WarmupReport:
    """Send every input through ``answer`` as an event, ``iterations`` times unless ``maximum_seconds`` have passed.

    ``keep`` makes of an answer what the report holds of it; without it the report holds none.
    """
    deadline = time.monotonic() + maximum_seconds
    digests: list[tuple[str, ...]] = []
    kept: tuple[Any, ...] = ()
    done = 0
    while done < iterations and (done == 0 or time.monotonic() < deadline):
        answers = [answer({"id": f"warmup-{index}", "input": deepcopy(value)}) for index, value in enumerate(inputs)]
        if done < DIGESTED_ITERATIONS:
            digests.append(tuple(map(digest, answers)))
        if done == 0 and keep is not None:
            kept = tuple(map(keep, answers))
        done += 1
    return WarmupReport(tuple(digests), done, resident_bytes(), kept)


def resident_bytes() -> int:
    """Memory of this process that is resident, by the kernel's account; 0 where there is no /proc."""
    import os

    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def digest(value: Any) -> str:
    """A digest of an answer, equal only for answers that are equal bit for bit; "" for one that cannot be compared.

    Plain values, containers (a tuple counts as a list) and arrays (numpy, or torch through numpy) are compared; other
    objects are not, since their text may hold an address. Never raises: no answer is wrong because it has no digest.
    """
    from blake3 import blake3

    hasher = blake3()
    try:
        _feed(hasher, value)
    except (_Incomparable, RuntimeError, ValueError):  # a sparse tensor, a container that holds itself, a huge integer
        return ""
    return str(hasher.hexdigest(length=16))


class _Incomparable(Exception):  # noqa: N818  a signal between the functions here, never seen outside
    pass


def _feed(hasher: Any, value: Any) -> None:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        hasher.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, dict):
        hasher.update(f"dict{len(value)}".encode())
        for key, item in value.items():
            _feed(hasher, key)
            _feed(hasher, item)
    elif isinstance(value, (list, tuple)):
        hasher.update(f"list{len(value)}".encode())
        for item in value:
            _feed(hasher, item)
    else:
        _feed_array(hasher, value)


def _feed_array(hasher: Any, value: Any) -> None:
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        hasher.update(f"torch:{value.dtype}:{tuple(value.shape)};".encode())
        plain = value.detach().cpu().resolve_conj().resolve_neg().flatten()
        value = plain.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(value, cupy.ndarray):
        hasher.update(b"cupy:")
        value = value.get()
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)) or value.dtype.hasobject:
        raise _Incomparable
    hasher.update(f"array:{value.dtype.str}:{value.shape};".encode())
    hasher.update(value.tobytes())
