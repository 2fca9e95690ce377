"""The workers of this process: one for each handler name, whoever asks first; and early starts that wait for theirs."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from coldstart import events
from coldstart.config import load
from coldstart.early import Services, early_restorations
from coldstart.errors import HandlerError
from coldstart.kernel_caches import home
from coldstart.progress import show_progress
from coldstart.worker import Worker, place_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coldstart.definition import Definition
    from coldstart.early import Early
    from coldstart.programs.recording import Recorder


class _Registry:
    """The workers and early starts of this process. A forked child keeps ready workers and loses those that were starting."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.workers: dict[str, Worker] = {}
        self.early: dict[str, Early] = {}
        self.serving = False
        self.pinned: Mapping[str, str] = {}
        self.recorder: Recorder | None = None
        self.cases = ""
        self.fork_watched = False
        self.shows_progress = False

    def watch_forks(self) -> None:
        if not self.fork_watched:
            os.register_at_fork(after_in_child=self._forked)
            self.fork_watched = True

    def _forked(self) -> None:
        self.lock = threading.Lock()
        for early in self.early.values():
            early.forget()
        self.early.clear()
        for worker in self.workers.values():
            worker.forked()


_registry = _Registry()


def enter_serving(
    *, pinned: Mapping[str, str] | None = None, recorder: Recorder | None = None, cases: str = ""
) -> None:
    """Say that this process serves (a command, an adapter): starts use the configured store even if it is the default one.

    ``pinned``: snapshot name -> manifest key that a proof restores, with nothing to fall back on. ``recorder``: notes the
    calls of entry points, for a program. ``cases``: the folder with what a program is proven by.
    """
    _registry.serving = True
    _registry.pinned, _registry.recorder, _registry.cases = pinned or {}, recorder, cases


def begin_early(path: str, name: str | None = None) -> str:
    """Begin to restore what handler ``name`` of the file ``path`` will need, before the file is imported.

    What is needed is read from the file's source. Returns why that could not be done (the start then begins with the
    import), else "". The outcome is used only if the imported module has the same key.
    """
    with _registry.lock:
        _registry.watch_forks()
        if name is not None and (name in _registry.early or name in _registry.workers):
            return ""
        early, reason = early_restorations(path, name, _services())
        if early is not None and early.name not in _registry.early and early.name not in _registry.workers:
            _registry.early[early.name] = early
        return reason


def worker_for(definition: Definition) -> Worker:
    """The one worker of this process for a handler. Its start has not necessarily begun.

    Raises HandlerError when another handler of the same name has a worker already.
    """
    with _registry.lock:
        worker = _registry.workers.get(definition.name)
        if worker is None:
            _registry.watch_forks()
            services = _services()
            early = _registry.early.pop(definition.name, None)
            worker = _registry.workers[definition.name] = Worker(definition, services, early)
        elif worker.place != place_of(definition):
            raise HandlerError(
                f"two handlers are named {definition.name!r}: {worker.place} and {place_of(definition)};"
                " a name stands for one snapshot"
            )
        return worker


def forget_workers() -> None:
    """Close all workers of this process and forget them. For tests, which start many in one process."""
    with _registry.lock:
        workers, _registry.workers, _registry.early = list(_registry.workers.values()), {}, {}
        _registry.serving, _registry.pinned, _registry.recorder, _registry.cases = False, {}, None, ""
    for worker in workers:
        worker.close()
    home.forget()


def _services() -> Services:
    settings = load()
    if not _registry.shows_progress:
        _registry.shows_progress = True
        show_progress(events.bus, settings)
    here = _registry
    return Services(settings, here.serving, here.pinned, events.bus, here.recorder, here.cases)
