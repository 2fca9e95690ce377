"""Serving on Modal: a handler becomes a Modal class, and Modal's memory snapshots become a part of its start.

``service(app, handler)`` makes the class: a real one, in the handler's own module, whose ``run`` method answers inputs.
``modal_snapshot`` says what happens before Modal's snapshot of the process and what after:

- ``off``: the class asks for no snapshot; ``enter`` is an ordinary start.
- ``cpu``: before, imports and the fetch of the snapshot into memory, without looking at a device; after, the rest of the start.
- ``gpu``: before, the whole start with its warm-up, then ``before_snapshot``; after, ``after_restore``.

At the moment of Modal's snapshot no thread, socket or client of ours is left. After it the clock, random state, settings
and credentials are those of the new container. Modal may start a container without a snapshot at any time: then both
halves run one after the other and it is an ordinary start.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import modal

from coldstart.adapters.modal_web import web_function
from coldstart.config import environment_now, load, read_variable
from coldstart.definition import CLASS_METHODS, code_of, definition_of, kind_of_code
from coldstart.errors import HandlerError
from coldstart.registry import begin_early, enter_serving, worker_for
from coldstart.terms import MODAL_SNAPSHOTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from coldstart.worker import Worker

EXIT_SECONDS = 15.0
"""How long the end of a container waits for a capture: half of the 30 s that Modal gives its exit hooks."""

GAP_SECONDS = 10.0
"""A process that stood still this long between its two halves was restored, although Modal has not told it so."""

_OWN_NAMES = ("run", "web")
_made: list[tuple[str, str, Any]] = []
"""The classes of this process: module, name, class. ``misplaced`` looks whether Modal will find them."""


def service(
    app: Any,
    handler: Any = None,
    *,
    name: str = "",
    modal_snapshot: str = "off",
    web: str = "",
    **cls_options: Any,
) -> Any:
    """Make a class of ``app`` from ``handler``, a decorated function or class, and return it, a ``modal.Cls``.

    Assign it to a variable of the handler's module called ``name`` (``Model = service(app, handler, name="Model")``), or
    write ``@service(app, ...)`` above ``@coldstart(...)``: the class then has the decorated function's name.

    Its method ``run(input)`` answers one input (``.remote``, ``.spawn``; ``.remote_gen`` where the handler streams); further
    public methods of a decorated class are methods too. ``web``: "POST" or "GET" adds a web endpoint that takes
    ``{"input": ...}`` (GET: ``?input=JSON``) and answers ``{"output": ...}``; it needs fastapi in the image.
    ``cls_options`` are those of ``app.cls``.

    Raises HandlerError for what Modal would refuse only in the container.
    """
    if handler is None:
        return lambda decorated: service(
            app, decorated, name=decorated.__name__, modal_snapshot=modal_snapshot, web=web, **cls_options
        )
    definition = definition_of(handler)
    module = handler.__module__
    shape = Shape(definition.name, definition.kind, _methods_of(handler), definition.concurrency)
    made = _make(app, shape, lambda: handler, module, name or "Model", modal_snapshot, web, cls_options)
    # Other processes look for the handler in its module (a proof does), and the class may have taken its name.
    setattr(sys.modules[module], f"_coldstart_{name or 'Model'}", handler)
    return made


def misplaced(module: ModuleType) -> list[str]:
    """Why Modal would not find classes that the module made with ``service``: one text each, none if all is well."""
    return [
        f"{module.__name__} has no variable {name!r} with the class that service(..., name={name!r}) made: assign it to one"
        " of that name at the top level of the file, since that is where the container looks"
        for where, name, made in _made
        if where == module.__name__ and getattr(module, name, None) is not made
    ]


class Shape(NamedTuple):
    """What a class needs to know of a handler that may not be imported yet: its kind, and its further methods' kinds."""

    name: str
    kind: str
    methods: Mapping[str, str]
    concurrency: int


def _methods_of(handler: Any) -> dict[str, str]:
    owner = definition_of(handler).owner
    if owner is None:
        return {}
    public = [name for name in dir(owner) if not name.startswith("_") and name not in CLASS_METHODS]
    functions = {name: code_of(getattr(owner, name)) for name in public if callable(getattr(owner, name))}
    return {name: kind_of_code(code) if code is not None else "sync" for name, code in functions.items()}


def _make(
    app: Any,
    shape: Shape,
    get_handler: Callable[[], Any],
    module: str,
    name: str,
    mode: str,
    web: str,
    options: dict[str, Any],
) -> Any:
    _check(shape, name, mode, web, options)
    body = _hooks(_Container(get_handler, mode), shape.kind, mode)
    body["run"] = modal.method()(_run(get_handler, shape.kind))
    for method, kind in shape.methods.items():
        body[method] = modal.method()(_further(get_handler, method, kind))
    if web:
        body["web"] = modal.fastapi_endpoint(method=web)(web_function(get_handler, shape.kind, web))
    made: Any = type(name, (), {**body, "__module__": module, "__qualname__": name})
    concurrency = load().concurrency or shape.concurrency
    if concurrency > 1:
        made = modal.concurrent(max_inputs=concurrency)(made)
    registered = app.cls(**_with_snapshot(mode, options))(made)
    _made.append((module, name, registered))
    return registered


def _check(shape: Shape, name: str, mode: str, web: str, options: Mapping[str, Any]) -> None:
    if not name.isidentifier():
        raise HandlerError(f"name={name!r} cannot name a class: use letters, digits and '_', such as name='Model'")
    if mode not in MODAL_SNAPSHOTS:
        raise HandlerError(f"modal_snapshot={mode!r} has to be one of {', '.join(MODAL_SNAPSHOTS)}")
    if web not in ("", "GET", "POST"):
        raise HandlerError(f"web={web!r} has to be 'GET', 'POST' or '' for no web endpoint")
    clash = sorted({*_OWN_NAMES, *dir(object)} & set(shape.methods))
    if clash:
        raise HandlerError(f"a method of {shape.name!r} is called {clash[0]!r}, which its Modal class has of its own")
    if "enable_memory_snapshot" in options:
        raise HandlerError("enable_memory_snapshot= is set by modal_snapshot='off', 'cpu' or 'gpu': write that instead")


def _with_snapshot(mode: str, options: dict[str, Any]) -> dict[str, Any]:
    if mode == "off":
        return options
    chosen = {**options, "enable_memory_snapshot": True}
    if mode == "gpu":
        chosen["experimental_options"] = {**options.get("experimental_options", {}), "enable_gpu_snapshot": True}
    return chosen


# --- the class' functions --------------------------------------------------------------------------------------------


def _hooks(container: _Container, kind: str, mode: str) -> dict[str, Any]:
    """The enter and exit hooks. Those of an async handler run on the loop that serves it."""
    on_loop = kind in ("async", "async_generator")

    def before(_self: Any) -> None:
        container.before()

    def after(_self: Any) -> None:
        container.after()

    def leave(_self: Any) -> None:
        container.leave()

    async def before_async(_self: Any) -> None:
        await container.on_loop(container.before)

    async def after_async(_self: Any) -> None:
        await container.on_loop(container.after)

    async def leave_async(_self: Any) -> None:
        await container.on_loop(container.leave)

    hooks = {
        "_coldstart_after": modal.enter()(after_async if on_loop else after),
        "_coldstart_leave": modal.exit()(leave_async if on_loop else leave),
    }
    if mode != "off":
        hooks["_coldstart_before"] = modal.enter(snap=True)(before_async if on_loop else before)
    return hooks


def _event(value: Any) -> dict[str, Any]:
    return {"id": modal.current_input_id() or "", "input": value}


def _run(get_handler: Callable[[], Any], kind: str) -> Callable[..., Any]:
    def run(self: Any, input: Any) -> Any:  # noqa: A002, ARG001  the event's own word, and what callers see
        return get_handler()(_event(input))

    def run_generator(self: Any, input: Any) -> Any:  # noqa: A002, ARG001
        yield from get_handler()(_event(input))

    async def run_async(self: Any, input: Any) -> Any:  # noqa: A002, ARG001
        return await get_handler()(_event(input))

    async def run_async_generator(self: Any, input: Any) -> Any:  # noqa: A002, ARG001
        async for piece in get_handler()(_event(input)):
            yield piece

    of_kind: dict[str, Callable[..., Any]] = {
        "sync": run,
        "generator": run_generator,
        "async": run_async,
        "async_generator": run_async_generator,
    }
    return of_kind[kind]


def _further(get_handler: Callable[[], Any], name: str, kind: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ARG001
        return getattr(get_handler(), name)(*arguments, **options)

    def method_generator(self: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ARG001
        yield from getattr(get_handler(), name)(*arguments, **options)

    async def method_async(self: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ARG001
        return await getattr(get_handler(), name)(*arguments, **options)

    async def method_async_generator(self: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ARG001
        async for piece in getattr(get_handler(), name)(*arguments, **options):
            yield piece

    of_kind: dict[str, Callable[..., Any]] = {
        "sync": method,
        "generator": method_generator,
        "async": method_async,
        "async_generator": method_async_generator,
    }
    chosen = of_kind[kind]
    chosen.__name__ = name
    return chosen


# --- a container's life ----------------------------------------------------------------------------------------------


class _Mark(NamedTuple):
    """What this process was when its first half ended."""

    task: str | None
    unix_seconds: float
    worked_seconds: float
    environment: Mapping[str, str]

    @classmethod
    def now(cls) -> _Mark:
        return cls(read_variable("MODAL_TASK_ID"), time.time(), time.process_time(), environment_now())


class _Container:
    """The worker of one class in one container: ``before`` and ``after`` Modal's snapshot, and ``leave``."""

    def __init__(self, get_handler: Callable[[], Any], mode: str) -> None:
        self._get_handler = get_handler
        self._mode = mode
        self._mark: _Mark | None = None

    def _worker(self) -> Worker:
        enter_serving()
        return worker_for(definition_of(self._get_handler()))

    async def on_loop(self, work: Callable[[], None]) -> None:
        """Run ``work`` beside the loop, which the worker's async hooks use meanwhile."""
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        loop = asyncio.get_running_loop()
        self._worker().serve_on(loop)
        with ThreadPoolExecutor(1) as own:  # its thread ends with the block: none may be there at the snapshot
            await loop.run_in_executor(own, work)

    def before(self) -> None:
        """The half before Modal's snapshot."""
        worker = self._worker()
        if self._mode == "cpu":
            worker.fetch_only()
        else:
            worker.hold_after_ready()
            worker.wait()
        worker.prepare_freeze()
        self._mark = _Mark.now()

    def after(self) -> None:
        """The half after it, or the whole start where there is no snapshot."""
        worker = self._worker()
        ready = worker.state == "ready"
        if self._mark is not None:
            changed = _crossed(self._mark, _Mark.now())
            if changed is not None:
                worker.thaw("platform", f"Modal restored its {self._mode} snapshot of this process", changed)
            elif ready:
                worker.run_after_restore()
        worker.wait()
        worker.release_after_ready()

    def leave(self) -> None:
        """Give a capture its time, then end the worker."""
        worker = self._worker()
        worker.capture_outcomes(EXIT_SECONDS)
        worker.close()


def _crossed(before: _Mark, now: _Mark) -> dict[str, str | None] | None:
    """The variables that changed if Modal restored this process between the two marks, None if it did not.

    A restored container is another task. The container that made the snapshot may go on as the same one: then a time in
    which no work was done tells.
    """
    stood_seconds = now.unix_seconds - before.unix_seconds - (now.worked_seconds - before.worked_seconds)
    if before.task == now.task and stood_seconds < GAP_SECONDS:
        return None
    names = {*before.environment, *now.environment}
    return {
        name: now.environment.get(name) for name in names if now.environment.get(name) != before.environment.get(name)
    }


# --- what `coldstart deploy modal` generates -------------------------------------------------------------------------


def deployed(module: str, plan: Mapping[str, Any]) -> tuple[Any, Any]:
    """The app and the class of a generated file, from its plan: see ``coldstart.deploy.modal``.

    Where the file is deployed from, the handler's own file is not imported: what it imports may not be installed there.
    In the container it is, at once, and where no snapshot of Modal's follows, its restore begins first.
    """
    from coldstart.loading import Target, choose_handler, import_file, prepare_path

    app = modal.App(plan["app"])
    loaded: list[Any] = []

    def get_handler() -> Any:
        if not loaded:
            target = Target(f"{plan['remote_folder']}/{plan['handler']['file']}", plan["handler"]["name"])
            prepare_path(target.path)
            enter_serving()
            if plan["modal_snapshot"] == "off":
                begin_early(target.path, target.name)
            began = time.monotonic()
            loaded.append(choose_handler(import_file(target.path), target))
            worker_for(definition_of(loaded[0])).note_import(began, time.monotonic())
        return loaded[0]

    said = plan["handler"]
    shape = Shape(said["name"], said["kind"], said["methods"], plan["concurrency"])
    if not modal.is_local():
        get_handler()
    options = {**plan["options"], "image": _image(plan), "secrets": _secrets(plan)}
    if plan["volume"]:
        volume = modal.Volume.from_name(plan["volume"], create_if_missing=True)
        options["volumes"] = {plan["volume_folder"]: volume}
    made = _make(app, shape, get_handler, module, plan["class"], plan["modal_snapshot"], plan["web"], options)
    return app, made


def _image(plan: Mapping[str, Any]) -> Any:
    """The image: the block's packages, coldstart as it is here, and the handler's files."""
    image = modal.Image.debian_slim(python_version=plan["python"])
    if plan["apt"]:
        image = image.apt_install(*plan["apt"])
    image = image.uv_pip_install(*plan["pip"]).env(plan["env"]).add_local_python_source("coldstart")
    for local, name in plan["files"]:
        # In the container the file is not where it was deployed from, and is not looked at either.
        source = local if os.path.exists(local) else __file__
        image = image.add_local_file(source, f"{plan['remote_folder']}/{name}")
    return image


def _secrets(plan: Mapping[str, Any]) -> list[Any]:
    named = [modal.Secret.from_name(name) for name in plan["secrets"]]
    return [*named, modal.Secret.from_local_environ(list(plan["variables"]))] if plan["variables"] else named
