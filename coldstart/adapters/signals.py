"""SIGTERM, with which platforms end a worker."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM call ``act``. Only a process' main thread hears signals: elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = hear_sigterm(lambda _number, _frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def hear_sigterm(handler: Callable[[int, Any], None]) -> Any:
    """Make ``handler`` this process' handler of SIGTERM, and return the one before. Call it in the main thread.

    It is this process' alone: a child that a user's handler forks dies of SIGTERM as ever. One that heard it as we do
    would live on, and ``multiprocessing.Pool`` waits for those that it has terminated.
    """
    if not _Heard.forks_are_watched:
        os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_forget)
        _Heard.forks_are_watched = True
    before = signal.signal(signal.SIGTERM, handler)
    _Heard.handler = handler
    return before


class _Heard:
    """Of this process: the handler of SIGTERM that is ours."""

    handler: Callable[[int, Any], None] | None = None
    forks_are_watched = False


_forking = threading.local()


def _hold_back() -> None:
    """A SIGTERM that comes while a child has our handler still would be lost: it waits until the child has none."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _forget() -> None:
    if _Heard.handler is not None and signal.getsignal(signal.SIGTERM) is _Heard.handler:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_through()
