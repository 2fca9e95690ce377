"""Making a program, the worker's half: an errand to ``coldstart make-program``.

The child starts the handler from the generation that there is (or by ``load``), sends the warm-up events through it, and
exports what they called. It works at the lowest priority on one thread, between events.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from coldstart.errand import Errand
from coldstart.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from coldstart.errand import Origin

MAKING_SECONDS = 3600.0
"""How long making a program may take: minutes of compiling, beside a worker that serves."""

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")


class ProgramMaking:
    """One program. ``run`` blocks; ``stop`` from another thread ends the child.

    ``pinned``: the manifest's key to start from, by snapshot; none: ``load`` runs. ``folder``: where the program goes.
    """

    def __init__(
        self,
        origin: Origin,
        pinned: Mapping[str, str],
        store_url: str,
        folder: str,
        backend: str,
        *,
        beside: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        variables = {**dict.fromkeys(_THREADS, "1"), "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        if not pinned:
            variables["COLDSTART_FRESH"] = "on"
        self._errand = Errand(
            "make-program",
            origin,
            pinned,
            store_url,
            what="export",
            failure=ExportError,
            task={"target": folder, "backend": backend},
            environment=variables,
            beside=beside,
        )

    def run(self) -> int:
        """Make it; returns how many cases there are to prove it by. Raises ExportError."""
        result = self._errand.run(MAKING_SECONDS)
        if "error" in result:
            raise ExportError(result["error"])
        return int(result["cases"])

    def stop(self) -> None:
        """End the child, if it runs."""
        self._errand.stop()
