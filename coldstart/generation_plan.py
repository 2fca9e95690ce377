"""Generations that are to be made, and what became of them: what planning, making and reporting them have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coldstart.capture import Capture
    from coldstart.errand import Origin
    from coldstart.kernel_caches.home import Kernels
    from coldstart.program_start import Accepted
    from coldstart.repository import Lookup


class Plan(NamedTuple):
    """A generation that is to be made. ``marks``: what the weights looked like before anyone could change them.

    ``capture`` lacks its parent and number, which are settled when it is due. ``due_at_once``: there is no usable
    generation for the key; else the handler's policy says when, counted from ``created_seconds`` (Unix time).
    ``program``: one that this platform lacks, to be made once there is a generation without it, or at once if none can be.
    ``kernels``: where to look for compiled kernels whenever a generation is made; ``adds_kernels``: one is to be made of the
    current generation and those that it lacks.
    """

    capture: Capture
    replaces: Lookup
    marks: Mapping[str, Any]
    origin: Origin
    due_at_once: bool
    created_seconds: float
    program: ProgramWish | None = None
    kernels: Kernels | None = None
    adds_kernels: bool = False


class ProgramWish(NamedTuple):
    """A program that is to be made. ``options``: a digest of what the handler asks for.

    ``accepted`` tells, when it is due, whether this platform can run it and the store may give it. ``is_fresh``: try even
    if it failed before. ``answers``: those of the first warm-up, as JSON values. ``tolerance``: by dtype, where it is not the
    default. ``outside``: whether the array at a path is needed beside the program; None: none is.
    ``unfit_generation``: one whose program is not called like that any more, 0 for none.
    """

    backend: str
    options: str
    accepted: Callable[[], Accepted]
    is_fresh: bool
    answers: tuple[Any, ...]
    tolerance: Mapping[str, float]
    outside: Callable[[str], bool] | None
    unfit_generation: int = 0


class Outcome(NamedTuple):
    """What became of a plan: a published generation, or the reason why there is none.

    ``engine``: who hashed, encoded and stored, and why if a process of its own was wanted; "" if nobody had to.
    """

    published: bool
    generation: int
    raw_bytes: int
    stored_bytes: int
    written_bytes: int
    reused_bytes: int
    seconds: float
    reason: str
    engine: str = ""
    program: str = ""
    """The backend of the program that it has and this outcome is about, "" for a generation of the state alone."""

    @classmethod
    def none(cls, reason: str, engine: str = "") -> Outcome:
        """No generation, for ``reason``."""
        return cls(False, 0, 0, 0, 0, 0, 0.0, reason, engine)
