"""Making a program, the worker's half: an errand to ``coldstart make-program``.

The child starts the handler from the generation that there is (or by ``load``), sends the warm-up events through it, and
exports what they called. It works at the lowest priority on one thread, between events.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from coldstart.errand import Errand
from coldstart.errors import ExportError, StoreSetupError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from coldstart.errand import Origin

MAKING_SECONDS = 3600.0
"""How long making a program may take: minutes of compiling, beside a worker that serves."""

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")


_PREFIX = "coldstart-program-"
_LEFT_SECONDS = 60.0
"""A folder without an owner is one that a killed worker left, unless it was made a moment ago."""


@contextmanager
def making_folder() -> Iterator[str]:
    """A folder for one program, as large as its weights. What killed workers left of theirs is removed first."""
    import fcntl
    import tempfile

    _remove_left(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        lock = os.open(folder, os.O_RDONLY)  # held until this process ends, however that comes
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(lock)


def _remove_left(parent: str) -> None:
    """Remove the folders of this user's that nobody holds."""
    import fcntl
    import shutil

    for name in os.listdir(parent):
        path = os.path.join(parent, name)
        with suppress(OSError):  # somebody else's, or held, or gone meanwhile
            status = os.lstat(path)
            old = time.time() - status.st_mtime > _LEFT_SECONDS
            if not (name.startswith(_PREFIX) and old and status.st_uid == os.geteuid()):
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)


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
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        variables = {**dict.fromkeys(_THREADS, "1"), **caches}
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
        """Make it; returns how many cases there are to prove it by. Raises ExportError.

        Raises StoreSetupError where it is this machine that lacks the room, and another may make it.
        """
        result = self._errand.run(MAKING_SECONDS)
        if result.get("room"):
            raise StoreSetupError(
                f"this machine has no room to make the program: {result['room']}; set TMPDIR to a folder with room"
            )
        if "error" in result:
            raise ExportError(result["error"])
        return int(result["cases"])

    @property
    def was_killed(self) -> bool:
        """Whether the child was ended by somebody else."""
        return self._errand.was_killed

    def stop(self) -> None:
        """End the child, if it runs."""
        self._errand.stop()
