"""Saving: the chunks of a state into a store, hashed and encoded; one seam, so that the work can be done elsewhere.

A capture opens a saver (``open_saver``), gives it all chunks (``save``), has them looked at again (``hashes``), writes the
manifest and, once the generation is proven, the ref through its ``repository``, and ends it (``base.Saver``). Two engines:
``here`` does the work in the thread that captures, ``process`` gives it to a ``child``; what either does to one chunk is
in ``stage``. ``priority`` and ``turns`` keep a process out of the way of those who are served.

A worker that was restored captures nothing before its first answer: this module imports no engine until one is wanted.
"""

from __future__ import annotations

from coldstart.save.base import AUTO, ENGINES, IN_THREAD, PROCESS, THREADS, Saved, Saver, Saving, Task, Terms

__all__ = [
    "AUTO",
    "ENGINES",
    "IN_THREAD",
    "PROCESS",
    "THREADS",
    "Saved",
    "Saver",
    "Saving",
    "Task",
    "Terms",
    "open_saver",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading

    from coldstart.repository import Repository

PROCESS_MINIMUM_BYTES = 8 << 20
"""Raw bytes below which a saver process costs more than it spares in a folder: its start takes 0.1 s of a core."""


def open_saver(saving: Saving, terms: Terms, repository: Repository, stopping: threading.Event) -> Saver:
    """What saves chunks under ``terms``: the engine that ``saving`` names; ``auto`` takes the process where it pays.

    A store that is reached over a network is always worth it: its client is then not imported here. Where there is no
    process to be had, this one does the work, and the saver's ``engine`` says why. Once ``stopping`` is set, nothing
    further is begun.
    """
    is_small = terms.raw_bytes < PROCESS_MINIMUM_BYTES and repository.store.url.startswith("file:")
    if saving.engine == THREADS or saving.address is None or (saving.engine == AUTO and is_small):
        from coldstart.save.here import save_here

        return save_here(repository, terms, saving.bytes_per_second, stopping)
    from coldstart.save.process import save_in_process

    return save_in_process(saving, terms, repository, stopping)
