r"""The worker: one handler's state machine in one process, and the one place where the order of a start is written.

::

    new -> starting -> ready -> closing -> closed
                 \-> failed

A start runs in a thread of its own. Whoever asks first begins it (``coldstart run|serve``, ``prefetch``, an adapter, an
event); everybody else waits for the same one. ``Worker._start`` reads from top to bottom like the timeline of a cold start.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from coldstart import events
from coldstart.after import STOP_SECONDS, AfterReady
from coldstart.answering import Answering
from coldstart.config import load as load_settings
from coldstart.definition import accepts
from coldstart.early import early_of
from coldstart.errors import ColdstartError, ForkError, StartError
from coldstart.loops import Loops
from coldstart.metrics import Span, Timeline, WorkerMetrics, process_clock
from coldstart.parts import Parts
from coldstart.planning import plan_captures
from coldstart.record import Thaw, start_record, thawed_record
from coldstart.thaw import reseed, run_hook
from coldstart.warmup import DIGESTED_ITERATIONS, Phases, WarmupReport, warm_up

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from coldstart.definition import Definition
    from coldstart.early import Early, Services
    from coldstart.generation_plan import Outcome


def place_of(definition: Definition) -> tuple[str, int]:
    """Where a handler is defined: two of one name at one place are the same handler, imported twice."""
    return (os.path.realpath(definition.file), definition.code.co_firstlineno)


class Worker(Answering):
    """One handler in one process. See the module's docstring; ``model`` is the handler's second argument once ready."""

    def __init__(self, definition: Definition, services: Services, early: Early | None) -> None:
        super().__init__(definition)
        self.place = place_of(definition)
        self.state = "new"
        self.kind = "cold"
        self.record: dict[str, Any] = {}
        self.warmup = WarmupReport((), 0, 0)
        self.timeline = early.timeline if early else Timeline(process_clock())
        self.last_thaw: Thaw | None = None
        """What the platform's last freeze of this process was, if there was one."""
        self.capture_reason = ""
        """Why this worker makes no snapshot, "" if it does."""
        self._held = False
        self._keeps_answers = False
        self._told_to_stop = threading.Event()
        self._parts: Parts | None = None
        self._services = services
        self._early = early
        self._loops = Loops(needs_serving_loop=definition.kind in ("async", "async_generator"))
        self._ended = threading.Event()
        self._waiters: list[Callable[[], None]] = []
        self._error: BaseException | None = None
        self._error_trace: TracebackType | None = None
        self._start_thread = 0
        self._starter: threading.Thread | None = None
        self._after: AfterReady | None = None

    # --- the gate ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin the start, unless it is under way or over."""
        if not self._become("starting", only_from=("new",)):
            return
        name = f"coldstart-start-{self.definition.name}"
        self._starter = threading.Thread(target=self._run_start, name=name, daemon=True)
        self._starter.start()

    def wait(self) -> Worker:
        """Begin if need be, and wait until the worker is ready. Raises what made the start fail, StartError once closed."""
        if threading.get_ident() == self._start_thread and not self._ended.is_set():
            raise StartError(
                f"{self.definition.name!r} was called by its own load, init or warm-up, which its start waits for; call"
                " handler.run(event, model) there",
                snapshot=self.definition.name,
            )
        self.begin()
        self._ended.wait()
        if self._error is not None:
            raise self._error.with_traceback(
                self._error_trace
            )  # raising one error again and again would grow its traceback
        return self

    async def wait_async(self) -> Worker:
        """``wait`` for a coroutine: other tasks of its loop go on, and the user's async hooks run on that loop."""
        import asyncio

        loop = asyncio.get_running_loop()
        self._loops.attach(loop)
        future: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not future.done():
                future.set_result(None)

        def tell() -> None:
            with suppress(RuntimeError):  # a loop that was closed meanwhile has nobody waiting
                loop.call_soon_threadsafe(settle)

        with self._lock:
            if not self._ended.is_set():
                self._waiters.append(tell)
        self.begin()
        if not self._ended.is_set():
            await future
        return self.wait()

    def forked(self) -> None:
        """In a forked child: a ready worker serves on without making snapshots, a starting one has failed."""
        self._lock, self._ended, self._answered = threading.Lock(), threading.Event(), threading.Event()
        self._after, self._waiters = None, []
        self.metrics = WorkerMetrics()
        if self._early is not None:
            self._early.forget()
        if self.state == "starting":
            self._error = ForkError(
                f"the process forked while {self.definition.name!r} was starting; fork after it is ready, or start in the child",
                snapshot=self.definition.name,
            )
            self._become("failed")
        if self.state != "new":
            self._ended.set()

    def wait_idle(self, seconds: float) -> None:
        """Wait until no event has been served for ``seconds``; with 0, give way for at most 50 ms while one is."""
        if seconds == 0.0:
            deadline = time.monotonic() + 0.05
            while self._in_flight and time.monotonic() < deadline:
                time.sleep(0.002)
            return
        while self.state == "ready":
            rest = seconds if self._in_flight else self._idle_since + seconds - time.monotonic()
            if rest <= 0:
                return
            time.sleep(rest)

    # --- the start ---------------------------------------------------------------------------------------------------

    def _run_start(self) -> None:
        self._start_thread = threading.get_ident()
        try:
            self._start()
        except BaseException as error:  # noqa: BLE001  the start's edge: every waiter gets the error
            self._fail(error)
            return
        self._idle_since = time.monotonic()
        if not self._become("ready", only_from=("starting",)):
            self._end(made=True)  # closed meanwhile
            return
        if not self._held and self._after is not None:
            self._after.begin(self.record)
        self._release()

    def _start(self) -> None:
        """The order of a start. Every line of the timeline is begun here."""
        definition, name = self.definition, self.definition.name
        phases = Phases(
            name,
            self.timeline,
            events.bus,
            skip=(*definition.warmup.skip, *self._services.settings.skip_phases),
            target_seconds=definition.warmup.target_seconds,
        )
        parts = Parts(definition, self._services, self.timeline, self._early, self._loops)
        events.bus.publish(events.StartBegan(name, parts.key_digest, self.timeline.clock()))
        try:
            report = self._make_model(phases, parts)
        except ColdstartError as error:
            if not (parts.leave_program(error) or parts.leave_kernels(error)):
                raise
            report = self._make_model(phases, parts)
        self._parts = parts
        parts.note_kernels()
        plans, reason = plan_captures(parts, definition, report, events.bus)
        self.capture_reason = "" if plans else reason
        for fetched in parts.restored:
            seconds = fetched.ended_monotonic_seconds - fetched.began_monotonic_seconds
            self.metrics.restores.add(transferred_bytes=fetched.fetched_bytes, seconds=seconds)
        self.metrics.cold.add(self.timeline.clock())
        self.record = start_record(definition, parts, phases.records, self.timeline, report, self.last_thaw)
        self._after = AfterReady(
            parts,
            plans,
            settings=self._services.settings,
            policy=definition.policy,
            answered=self._answered,
            stopping=self._told_to_stop,
            idle=self.wait_idle,
            served=lambda: self._served,
            saves=self.metrics.saves,
        )
        events.bus.publish(events.WorkerReady(name, self.kind, parts.reason, self.timeline.clock()))

    def _make_model(self, phases: Phases, parts: Parts) -> WarmupReport:
        """The phases, in their order: afterwards ``model`` is what the handler gets. What the warm-up did."""
        definition, pools = self.definition, parts.pools
        if not phases.is_switched_off("pool_alloc"):
            pools.begin(parts.pool_plan)
        state = phases.run("weight_load", parts.load_state)
        self._keeps_answers = bool(self._services.pinned) or any(map(parts.wants_program, parts.parts))
        self.kind = self.last_thaw.kind if self.last_thaw else parts.kind
        phases.run("pool_alloc", pools.settle if pools.has_plan() else None, reason="no snapshot lists pools")
        compiled = phases.run(
            "kernel_compile", self._hook(definition.compile, parts.context, state), reason="no compile="
        )
        state = state if compiled is None else compiled
        made = phases.run(
            "custom_init", self._hook(definition.init, parts.context, state), reason="no init=", otherwise=state
        )
        self.model = state if definition.owner is not None else made
        pools.let_go()
        pools.watch_workspace()
        inputs = definition.warmup.inputs
        warmed = phases.run("warmup_inference", self._warmup if inputs else None, reason="no warmup= inputs")
        self.warmup = warmed or WarmupReport((), 0, 0)
        return self.warmup

    def _hook(self, hook: Callable[..., Any] | None, context: Any, state: Any) -> Callable[[], Any] | None:
        """A user's ``compile``, ``init`` or ``after_restore`` as work to do; in class form ``state`` is the instance itself."""
        if hook is None:
            return None
        if self.definition.owner is not None:
            return lambda: self._loops.finish(hook(state, context) if accepts(hook, 2) else hook(state))
        return lambda: self._loops.finish(hook(context, state))

    def _warmup(self) -> WarmupReport:
        warmup = self.definition.warmup
        iterations = max(warmup.iterations, DIGESTED_ITERATIONS) if self._services.pinned else warmup.iterations
        keep: Callable[[Any], Any] | None = None
        if self.definition.program is not None and self._keeps_answers:
            from coldstart.programs.tolerance import plain  # only where a program is made or proven

            keep = plain
        return warm_up(
            warmup.inputs,
            self._answer_once,
            iterations=iterations,
            maximum_seconds=warmup.maximum_seconds,
            keep=keep,
        )

    def _answer_once(self, event: Any) -> Any:
        """Answer a warm-up event in full: a stream's pieces come as a list. Not counted."""
        return self._loops.finish(self._function(event, self.model), collect=True)

    def note_import(self, began_monotonic_seconds: float, ended_monotonic_seconds: float) -> None:
        """Put the import of the handler's file, which whoever imported it has timed, on the timeline."""
        offset = self.timeline.clock() - time.monotonic()
        self.timeline.record(
            Span("import handler", "main", began_monotonic_seconds + offset, ended_monotonic_seconds + offset)
        )

    # --- a platform that freezes this process -------------------------------------------------------------------------

    def hold_after_ready(self) -> None:
        """Before ``begin``: go no further than ready (no log lines, record, capture) until ``release_after_ready``."""
        self._held = True

    def serve_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop that serves, for async hooks that run before anything is awaited on it."""
        self._loops.attach(loop)

    def fetch_only(self) -> None:
        """Before ``begin``: bring the snapshot into memory. When this returns, the fetch has left no thread and no connection."""
        self._early = self._early or early_of(self.definition, self._services)
        if self._early is not None:
            self._early.settle()
            self.timeline = self._early.timeline

    def prepare_freeze(self) -> None:
        """Before the platform freezes this process: run ``before_snapshot``, leave no thread and no connection of ours."""
        hook = self.definition.before_snapshot
        if self.state == "ready" and hook is not None:
            self._run_hook("before_snapshot", lambda: self._loops.finish(hook(self.model)))
        self._loops.close(STOP_SECONDS)
        if self._parts is not None:
            self._parts.open_repository.let_go()
        if self._starter is not None:
            self._starter.join(STOP_SECONDS)

    def thaw(self, kind: str, reason: str, changed: Mapping[str, str | None] | None = None) -> None:
        """After a freeze: new random state, clock, settings and connections, then the user's ``after_restore``.

        ``kind``: ``thawed``, or ``platform`` for the platform's own snapshot. ``changed``: variables that the platform
        has set (None: removed) meanwhile. A worker that has not started yet starts with what it has fetched.
        """
        before = self.timeline.restart()
        reseed()
        self._services = self._services._replace(settings=load_settings())
        if self.state == "ready":
            assert self._parts is not None
            self._parts.renew(self._services)
            self.last_thaw = Thaw(kind, reason, self.record, before)
            self.run_after_restore()
            self.kind, self.record = kind, thawed_record(self.record, self.last_thaw, self.timeline)
        else:
            self.last_thaw = Thaw(kind, reason, {}, before)
            if self._early is not None:
                self._early.thaw(self._services.settings, changed or {})
        events.bus.publish(events.WorkerThawed(self.definition.name, kind, reason, self.timeline.clock()))

    def run_after_restore(self) -> None:
        """Run ``after_restore``: the user's connections, ids and clocks are made anew."""
        hook = self.definition.after_restore
        if hook is not None and self._parts is not None:
            with self.timeline.span("after_restore", "phase"):
                run = self._hook(hook, self._parts.context, self.model)
                assert run is not None
                self._run_hook("after_restore", run)

    def _run_hook(self, hook: str, work: Callable[[], Any]) -> None:
        run_hook(self.definition.name, hook, work, self._services.settings.hook_seconds)

    def release_after_ready(self) -> None:
        """After ``hold_after_ready``: do what is left to do after ready."""
        if self._held and self.state == "ready" and self._after is not None:
            self._held = False
            self._after.begin(self.record)

    def write_record(self) -> None:
        """Store the record as it is now, best effort, in the background."""
        if self._after is not None:
            self._after.write_record(self.record)

    # --- after ready -------------------------------------------------------------------------------------------------

    def keep_segments(self) -> None:
        """Write flat files of what was restored, for the next worker of this host."""
        if self._after is not None:
            self._after.keep_segments()

    @property
    def is_capturing(self) -> bool:
        """Whether what was due at once is still being made."""
        return self._after is not None and self._after.is_capturing

    def capture_outcomes(self, seconds: float) -> list[Outcome]:
        """Wait up to ``seconds`` for the snapshots that this worker is making, and return what became of them."""
        return self._after.outcomes(seconds) if self._after is not None else []

    def stop_capture(self) -> None:
        """Begin no capture, and end the one under way: what it has stored is found by the next. Requests go on."""
        self._told_to_stop.set()
        if self._after is not None:
            self._after.stop()

    # --- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the worker: stop a capture, run the user's ``close``. Safe to call twice.

        Whoever waits for the start, or calls afterwards, gets a StartError. A start under way is not waited for: its own
        thread runs ``close`` once it has something to close.
        """
        ready = self._become("closing", only_from=("ready",))
        starting = not ready and self._become("closing", only_from=("starting",))
        if not (ready or starting or self._become("closing", only_from=("new", "failed"))):
            return
        self._error = self._error or StartError(f"{self.definition.name!r} is closed", snapshot=self.definition.name)
        self._answered.set()
        self._release()
        if ready and self._after is not None:
            self._after.join()
        self.stop_capture()
        if not starting:
            self._end(made=ready)

    def _end(self, *, made: bool) -> None:
        try:
            if made and self.definition.close is not None:
                self._loops.finish(self.definition.close(self.model))
        finally:
            self._loops.close()
            self._become("closed")

    def _fail(self, error: BaseException) -> None:
        name = self.definition.name
        if not isinstance(error, ColdstartError):
            wrapped = StartError(f"the start of {name!r} failed: {type(error).__name__}: {error}", snapshot=name)
            wrapped.__cause__ = error
            error = wrapped
        self._error, self._error_trace = self._error or error, error.__traceback__
        self.metrics.failures += 1
        events.bus.publish(events.WorkerFailed(name, f"{type(error).__name__}: {error}"))
        if not self._become("failed", only_from=("starting",)):
            self._end(made=False)  # closed meanwhile
        self._release()
        from coldstart.sinks import attach_once  # a failed start: nothing is waited for any more

        attach_once(self._services.settings)

    def _release(self) -> None:
        with self._lock:
            self._ended.set()
            waiters, self._waiters = self._waiters, []
        for tell in waiters:
            tell()

    def _become(self, state: str, *, only_from: tuple[str, ...] = ()) -> bool:
        """Change the state, unless ``only_from`` says that this one does not lead there; True if it was changed.

        Published outside the lock: a subscriber may call the worker.
        """
        with self._lock:
            old = self.state
            if only_from and old not in only_from:
                return False
            self.state = state
            self.definition.ready_worker = self if state == "ready" else None
        events.bus.publish(events.StateChanged(self.definition.name, old, state))
        return True
