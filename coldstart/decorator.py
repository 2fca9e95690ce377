"""Wrapping: a checked definition becomes a real function of the handler's kind with the signature ``(event)``.

Decorating does no I/O and starts nothing. The start begins with ``coldstart run|serve``, an adapter, ``prefetch(name)``
or the first event; ``coldstart.worker`` is imported then and not before. This module is on the path of ``from coldstart
import coldstart``, so it imports nothing, not even ``typing``.
"""

from __future__ import annotations

from coldstart.definition import CLASS_METHODS, code_of, define, kind_of_code

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Generic, Protocol, TypeVar

    from coldstart.definition import Definition
    from coldstart.worker import Worker

    E_contra = TypeVar("E_contra", contravariant=True)
    R_co = TypeVar("R_co", covariant=True)

    class Handler(Protocol, Generic[E_contra, R_co]):
        """A decorated handler: a real function of one argument, the event."""

        __name__: str
        __coldstart__: Definition
        run: Callable[..., Any]
        """The user's own function ``(event, model)``: no start and no store. What a unit test calls."""

        def __call__(self, event: E_contra) -> R_co:
            """Answer one event; the first one starts the worker and waits for it."""

    class ClassHandler(Handler[Any, Any], Protocol):
        """A decorated class: answers events with ``handle``; its other public methods hang on it, gated too."""

        def __getattr__(self, name: str) -> Callable[..., Any]:
            """A further public method of the class, gated on ready."""

else:

    class Handler:
        """Only a name for annotations at run time: a handler is a plain function with ``run`` and ``__coldstart__``."""

        def __class_getitem__(cls, _types: Any) -> type:
            return cls


def decorate(name: Any, target: Any, options: Mapping[str, Any]) -> Any:
    """Make a handler of ``target``, a function or a class. Raises HandlerError for anything that cannot work."""
    definition = define(name, target, options)
    if definition.program is not None:
        from coldstart.exports import check_program

        check_program(definition)
    wrapper = _WRAPPERS[definition.kind](definition)
    _dress(wrapper, target, definition)
    return wrapper


def _wrap_sync(definition: Definition) -> Any:
    def handler(event: Any) -> Any:
        worker = definition.ready_worker
        if worker is None:
            worker = _start(definition)
        return worker.answer(event)

    return handler


def _wrap_generator(definition: Definition) -> Any:
    def handler(event: Any) -> Any:
        worker = definition.ready_worker
        if worker is None:
            worker = _start(definition)
        return (yield from worker.stream(event))

    return handler


def _wrap_async(definition: Definition) -> Any:
    async def handler(event: Any) -> Any:
        worker = definition.ready_worker
        if worker is None:
            worker = await _start_async(definition)
        return await worker.answer_async(event)

    return handler


def _wrap_async_generator(definition: Definition) -> Any:
    async def handler(event: Any) -> Any:
        worker = definition.ready_worker
        if worker is None:
            worker = await _start_async(definition)
        pieces = worker.stream_async(event)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()  # a client that leaves ends the user's stream now, not when it is collected

    return handler


_WRAPPERS = {
    "sync": _wrap_sync,
    "generator": _wrap_generator,
    "async": _wrap_async,
    "async_generator": _wrap_async_generator,
}


def _start(definition: Definition) -> Worker:
    from coldstart.registry import worker_for

    return worker_for(definition).wait()


async def _start_async(definition: Definition) -> Worker:
    from coldstart.registry import worker_for

    return await worker_for(definition).wait_async()


def _dress(wrapper: Any, target: Any, definition: Definition) -> None:
    """Give the wrapper the user's name, doc and place. No ``__wrapped__``: its signature is its own, ``(event)``."""
    wrapper.__name__ = target.__name__
    wrapper.__qualname__ = target.__qualname__
    wrapper.__module__ = target.__module__
    wrapper.__doc__ = target.__doc__
    annotations = getattr(definition.function, "__annotations__", {})
    code, first = definition.code, 1 if definition.owner else 0
    event = code.co_varnames[first] if code.co_argcount > first else ""
    wrapper.__annotations__ = {
        new: annotations[old] for new, old in (("event", event), ("return", "return")) if old in annotations
    }
    wrapper.__coldstart__ = definition
    wrapper.run = definition.function
    if definition.owner is not None:
        wrapper.run = lambda event, instance: definition.function(instance, event)
        for name in dir(definition.owner):
            if not name.startswith("_") and name not in CLASS_METHODS and callable(getattr(definition.owner, name)):
                setattr(wrapper, name, _gated_method(definition, name))


def _gated_method(definition: Definition, name: str) -> Any:
    """A further public method of a class, run on the worker's instance once it is ready."""
    method = getattr(definition.owner, name)
    kind = kind_of_code(code_of(method)) if code_of(method) is not None else "sync"

    def bound_sync(*arguments: Any, **options: Any) -> Any:
        worker = definition.ready_worker or _start(definition)
        return getattr(worker.model, name)(*arguments, **options)

    def bound_generator(*arguments: Any, **options: Any) -> Any:
        worker = definition.ready_worker or _start(definition)
        return (yield from getattr(worker.model, name)(*arguments, **options))

    async def bound_async(*arguments: Any, **options: Any) -> Any:
        worker = definition.ready_worker or await _start_async(definition)
        return await getattr(worker.model, name)(*arguments, **options)

    async def bound_async_generator(*arguments: Any, **options: Any) -> Any:
        worker = definition.ready_worker or await _start_async(definition)
        pieces = getattr(worker.model, name)(*arguments, **options)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    of_kind = {"generator": bound_generator, "async": bound_async, "async_generator": bound_async_generator}
    bound: Any = of_kind.get(kind, bound_sync)
    bound.__name__, bound.__doc__ = name, method.__doc__
    return bound
