"""The public face: ``coldstart`` the decorator, which also carries ``serve``, ``prefetch`` and ``subscribe``."""

from __future__ import annotations

from coldstart.decorator import decorate
from coldstart.definition import check_name, definition_of
from coldstart.errors import HandlerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, TypeVar, overload

    from coldstart.decorator import ClassHandler, Handler
    from coldstart.definition import Policy, Warmup
    from coldstart.exports import Export

    E = TypeVar("E")
    M = TypeVar("M")
    R = TypeVar("R")


class _Coldstart:
    """The decorator; ``serve``, ``prefetch`` and ``subscribe`` hang on it, so one import is enough."""

    __slots__ = ()

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            name: str,
            *,
            load: Callable[..., Any] | Mapping[str, Callable[..., Any]],
            build: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
            init: Callable[..., Any] | None = None,
            compile: Callable[..., Any] | None = None,
            close: Callable[[Any], Any] | None = None,
            before_snapshot: Callable[[Any], Any] | None = None,
            after_restore: Callable[..., Any] | None = None,
            warmup: Warmup | Sequence[Any] = (),
            files: Mapping[str, str] | None = None,
            env: Sequence[str] = (),
            secrets: Sequence[str] = (),
            kinds: Mapping[str, str] | None = None,
            version: str | None = None,
            concurrency: int = 1,
            policy: Policy | None = None,
            program: Export | None = None,
        ) -> Callable[[Callable[[E, M], R]], Handler[E, R]]: ...
        @overload
        def __call__(
            self,
            name: str,
            *,
            warmup: Warmup | Sequence[Any] = (),
            files: Mapping[str, str] | None = None,
            env: Sequence[str] = (),
            secrets: Sequence[str] = (),
            kinds: Mapping[str, str] | None = None,
            version: str | None = None,
            concurrency: int = 1,
            policy: Policy | None = None,
            program: Export | None = None,
        ) -> Callable[[type], ClassHandler]: ...

    def __call__(
        self,
        name: Any = None,
        *surplus: Any,
        load: Any = None,
        build: Any = None,
        init: Callable[..., Any] | None = None,
        compile: Callable[..., Any] | None = None,  # noqa: A002  the phase's own name
        close: Callable[[Any], Any] | None = None,
        before_snapshot: Callable[[Any], Any] | None = None,
        after_restore: Callable[..., Any] | None = None,
        warmup: Any = (),
        files: Mapping[str, str] | None = None,
        env: Sequence[str] = (),
        secrets: Sequence[str] = (),
        kinds: Mapping[str, str] | None = None,
        version: str | None = None,
        concurrency: int = 1,
        policy: Policy | None = None,
        program: Export | None = None,
        **unknown: Any,
    ) -> Any:
        """Decorate a handler function ``(event, model)`` or a class with ``load`` and ``handle``.

        ``name`` names the snapshot. ``load(ctx)`` makes the state once; ``build(ctx)`` makes it without its bytes;
        ``compile(ctx, state)`` and ``init(ctx, state)`` run at every start, and what ``init`` returns is the handler's
        second argument; ``close(model)`` runs at the end. ``before_snapshot(model)`` and ``after_restore(ctx, model)`` are
        for a freeze of the whole process by its platform (Modal's memory snapshots, RunPod's FlashBoot, which gives no
        notice before), not for coldstart's own snapshots: let go of connections there and make them anew. All may be
        async. ``load`` (with ``build``) may be a mapping
        of named parts, each with a key and a snapshot of its own. ``warmup``: inputs for the handler before the first
        event. ``files``: name -> path of files that the snapshot carries. ``env`` and ``secrets``: variables that
        ``ctx.env`` and ``ctx.secret`` may read; only the values of ``env`` belong to the snapshot's key. ``kinds``:
        path prefix -> kind of buffers that events change on purpose. ``version`` replaces the code in the key.
        ``concurrency``: events at a time, for the platforms. ``policy``: when to make a new generation.
        ``program``: ``coldstart.export(...)``, to have the computation compiled into the snapshot.

        Raises HandlerError for arguments that cannot work; nothing is started.
        """
        options = {
            "load": load,
            "build": build,
            "init": init,
            "compile": compile,
            "close": close,
            "before_snapshot": before_snapshot,
            "after_restore": after_restore,
            "warmup": warmup,
            "files": files,
            "env": env,
            "secrets": secrets,
            "kinds": kinds,
            "version": version,
            "concurrency": concurrency,
            "policy": policy,
            "program": program,
        }
        check_name(name)
        _check_arguments(surplus, unknown, options)
        return lambda target: decorate(name, target, options)

    @staticmethod
    def serve(handler: Handler[Any, Any] | type) -> None:
        """Serve events with ``handler`` on the platform that this process finds itself on, until it ends."""
        serve(handler)

    @staticmethod
    def prefetch(name: str) -> None:
        """Begin the start of handler ``name`` now. See ``coldstart.prefetch``."""
        _prefetch(name, depth=2)

    @staticmethod
    def subscribe(subscriber: Callable[[Any], None]) -> Callable[[], None]:
        """Have ``subscriber`` called with every lifecycle event; returns the function that ends it."""
        return subscribe(subscriber)


def _check_arguments(surplus: Sequence[Any], unknown: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    if surplus:
        raise HandlerError("@coldstart takes one argument without a keyword, the name: write load=... for the loader")
    if unknown:
        from coldstart.config import nearest

        wrong = next(iter(unknown))
        near = nearest(wrong, options)
        hint = f"did you mean {near}=?" if near else f"there are {', '.join(options)}"
        raise HandlerError(f"@coldstart has no option {wrong!r}: {hint}")


coldstart = _Coldstart()


def serve(handler: Handler[Any, Any] | type) -> None:
    """Serve events with ``handler`` on the platform that this process finds itself on, until it ends.

    On RunPod this is the worker loop; locally, events are read from standard input, one JSON object a line. (``type`` is
    what mypy takes a decorated class for: it does not see what a class decorator returns.)
    """
    from coldstart.adapters import serve as serve_on_platform

    serve_on_platform(definition_of(handler), handler)


def prefetch(name: str) -> None:
    """Begin the start of handler ``name``, which the calling file defines further down, before its heavy imports.

    Under ``coldstart run|serve`` the start is already under way and this does nothing.
    """
    _prefetch(name, depth=2)


def _prefetch(name: str, *, depth: int) -> None:
    import os
    import sys

    from coldstart.registry import begin_early

    caller = sys._getframe(depth)  # noqa: SLF001  the one way to know the caller's file
    if caller.f_globals.get("__name__") == "__mp_main__":
        return  # multiprocessing imports the main file again in each process that it spawns: none of them starts by that
    path = caller.f_code.co_filename
    if os.path.isfile(path):  # else typed at a prompt: there is no source to look ahead in
        begin_early(path, name)


def subscribe(subscriber: Callable[[Any], None]) -> Callable[[], None]:
    """Have ``subscriber`` called with every lifecycle event (``coldstart.events``), past ones first.

    Returns the function that ends the subscription. An error in a subscriber never reaches the worker.
    """
    from coldstart.events import bus

    return bus.subscribe(subscriber, replay=True)
