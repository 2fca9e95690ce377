"""The proof of a generation: a fresh process restores it and must answer the warm-up inputs like the worker that made it.

This is the worker's half: an errand to ``coldstart prove``, and the judgement of what comes back. The child does a real
start with nothing to fall back on (``coldstart.cli.errand``). Digests of answers have to be equal; the answers of a
program, which computes in another order than the state's own code, have to be near, and its entry points have to
answer the cases that were made with it (``coldstart.programs.cases``).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errand import Errand, Origin
from coldstart.errors import ProofError
from coldstart.programs.tolerance import answer_difference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

PROOF_SECONDS = 900.0
"""How long a proof may take: a whole start, and the warm-up twice, on a machine that serves at the same time."""


class ProgramProof(NamedTuple):
    """What a program has to answer: the cases in the folder, and the warm-up's ``answers``, with numbers up to ``limit`` off."""

    folder: str
    answers: Sequence[Any]
    limit: float


class Proof:
    """One proof. ``run`` blocks; ``stop`` from another thread ends the child.

    ``pinned``: snapshot -> key of the manifest to prove. ``beside`` is entered with the child's process group while the
    child works. ``program``: the generation is to be started from with its program.
    """

    def __init__(
        self,
        origin: Origin,
        pinned: Mapping[str, str],
        store_url: str,
        *,
        beside: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
        program: ProgramProof | None = None,
    ) -> None:
        self._program = program
        self._errand = Errand(
            "prove",
            origin,
            pinned,
            store_url,
            what="proof",
            failure=ProofError,
            task={"cases": "" if program is None else program.folder},
            beside=beside,
        )

    def run(self, expected: tuple[str, ...]) -> bool:
        """Prove, and return whether answers could be compared (False: the handler answers differently each time).

        Raises ProofError when the fresh process fails or answers differently from ``expected``.
        """
        result = self._errand.run(PROOF_SECONDS)
        if "error" in result:
            raise ProofError(f"a fresh process could not start from the new generation: {result['error']}")
        first, second = result["digests"][0], result["digests"][-1]  # but one, if the warm-up ran out of its time
        comparable = [index for index, digest in enumerate(expected) if digest]
        differing = [index for index in comparable if first[index] != expected[index]]
        if self._program is not None:
            differing = [index for index in differing if self._is_far(index, result["answers"][index])]
        if not differing:
            return bool(comparable)
        if all(first[index] != second[index] for index in differing):
            return False
        raise ProofError(
            f"a fresh process, started from the new generation, answered warm-up input {differing[0]} differently; does load"
            " leave something in the state that build, init or the arrays do not bring back?"
        )

    def _is_far(self, index: int, answer: Any) -> bool:
        assert self._program is not None
        return bool(answer_difference(self._program.answers[index], answer, self._program.limit))

    @property
    def was_killed(self) -> bool:
        """Whether the child was ended by somebody else."""
        return self._errand.was_killed

    def stop(self) -> None:
        """End the child, if it runs."""
        self._errand.stop()
