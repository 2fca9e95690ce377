"""Serving on RunPod Serverless: the worker's start runs while the SDK is imported, and jobs wait for it.

The order: the start is under way, ``import runpod`` (2 s in 1.12) happens in its shadow, the SDK begins to take jobs, and
each job waits until the worker is ready. With SDK 2.x a prestart hook waits too, so that a failed start is reported by
the SDK itself. What the SDK does not do is done here: results that JSON cannot say become an error of their job (the SDK
would never answer it), ``sys.exit`` in a handler ends its job and not the worker, a process that FlashBoot froze is
noticed, and on SIGTERM the capture stops at once and the polls that would hold the process for up to 90 s are cut short.

Works with SDK 1.10.1 to 2.0; what differs is looked for, not derived from version numbers.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from coldstart.adapters.answers import unsayable
from coldstart.adapters.signals import hear_sigterm
from coldstart.config import load, read_variable, set_variables
from coldstart.errors import ColdstartError, HandlerError, UsageError
from coldstart.thaw import FreezeWatch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    from coldstart.definition import Definition
    from coldstart.script import RunpodOptions
    from coldstart.worker import Worker

FAILED_START_SECONDS = 10.0
"""How long a worker whose start failed waits for a job that it can tell why."""

_RUNS_JOBS = "JobScaler.run_jobs"
_POLLS = ("JobScaler.get_jobs", "JobScaler.monitor_stop_signals")
"""Coroutines of the SDK, by qualified name. Where they are called otherwise, the process ends when its polls do."""


def serve(definition: Definition, handler: Any) -> None:
    """Serve jobs until the platform ends this worker. Raises SystemExit with status 1 after a start that failed."""
    from coldstart.registry import enter_serving, worker_for
    from coldstart.script import read_script

    enter_serving()
    worker = worker_for(definition)
    worker.begin()
    options = read_script(definition.file).runpod
    _leave_out_covered_checks(definition)
    sdk = _imported_sdk()
    service = _Service(worker, handler, sdk, options)
    try:
        sdk.start(service.config())
    except asyncio.CancelledError:
        if not service.cut_short:
            raise
    finally:
        service.end()
    if worker.state == "failed" or service.gave_up:
        raise SystemExit(1)


class _Service:
    """One worker's service of jobs. Its coroutines run on the SDK's loop, in the main thread."""

    def __init__(self, worker: Worker, handler: Any, sdk: Any, options: RunpodOptions) -> None:
        settings = load()
        self.cut_short = False
        self.gave_up = False
        self._worker = worker
        self._handler = handler
        self._sdk = sdk
        self._options = options
        self._concurrency = settings.concurrency or worker.definition.concurrency
        self._capture_wait_seconds = settings.capture_wait_seconds
        self._watch = FreezeWatch(settings.thaw_seconds) if settings.thaw_seconds else None
        self._thawing: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._has_hook = False
        self._sdk_reports = False
        self._over = False
        self._threads: ThreadPoolExecutor | None = None
        self._inside = False

    def config(self) -> dict[str, Any]:
        """What the SDK is given; registers the prestart hook where the SDK has one."""
        register = getattr(self._sdk, "register_prestart_hook", None)
        if register is not None and not read_variable("RUNPOD_REALTIME_PORT"):  # a mode that refuses hooks
            self._has_hook = True
            register(self._prestart)
        if self._watch is not None:
            self._watch.start()
        streams = self._worker.definition.kind in ("generator", "async_generator")
        return {
            "handler": self._stream if streams else self._answer,
            "concurrency_modifier": self._concurrency_now,
            "return_aggregate_stream": self._options.return_aggregate_stream,
            "refresh_worker": self._options.refresh_worker,
        }

    # --- jobs --------------------------------------------------------------------------------------------------------

    async def _answer(self, job: dict[str, Any]) -> Any:
        await self._gate()
        event = {**job}  # the user's to change: without its id the SDK could not answer, and would take no more jobs
        with _contained():
            if self._worker.definition.kind == "async":
                result = await self._handler(event)
            elif self._concurrency > 1:
                result = await self._in_thread(self._handler, event)
            else:
                result = self._handler(event)  # in the main thread, as the SDK itself would
        return _checked(result)

    async def _stream(self, job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        await self._gate()
        pieces = self._handler({**job})
        with _contained():
            if self._worker.definition.kind == "async_generator":
                try:
                    async for piece in pieces:
                        yield _checked(piece)
                finally:
                    await pieces.aclose()
            else:
                try:
                    async for piece in self._stepped(pieces):
                        yield _checked(piece)
                finally:
                    with suppress(ValueError):  # a cancelled job's thread may be making the next piece: it ends there
                        pieces.close()

    async def _stepped(self, pieces: Any) -> AsyncIterator[Any]:
        """The pieces of a plain generator, each made in a thread where several jobs are served at a time."""
        end = object()
        while True:
            if self._concurrency > 1:
                piece = await self._in_thread(next, pieces, end)
            else:
                piece = next(pieces, end)
            if piece is end:
                return
            yield piece

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call on a thread of our own pool: the loop's has fewer threads than jobs may be served at a time."""

        def call() -> Any:
            try:
                with _contained():  # here: through the thread's future SystemExit would end the loop
                    return function(*arguments)
            except StopIteration as error:  # a future that cannot take it would never be done
                raise HandlerError("the handler raised StopIteration, as next() does at an end") from error

        self._threads = self._threads or ThreadPoolExecutor(self._concurrency, "coldstart-job")
        return await asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, call)

    async def _gate(self) -> None:
        """Wait until the worker is ready and, after a freeze, thawed."""
        await self._wait_ready()
        frozen_seconds = self._watch.frozen_seconds() if self._watch is not None else 0.0
        if frozen_seconds:
            self._thawing = asyncio.create_task(asyncio.to_thread(self._thaw, frozen_seconds))
        if self._thawing is not None:
            await asyncio.shield(self._thawing)

    async def _prestart(self) -> None:
        """What SDK 2.x waits for before it runs jobs. It reports a failure itself, to the jobs that it holds, and leaves.

        A failure waits for a job: the SDK drops the poll under way then, and with it a job that is just being sent.
        """
        try:
            await self._worker.wait_async()
        except ColdstartError:
            if self._over:
                return  # told to end before it was ready: no failure
            self.gave_up = self._sdk_reports = True
            await _job_held(FAILED_START_SECONDS)
            raise

    async def _leave_if_failed(self) -> None:
        """Where the SDK has no hook: a start that failed ends the worker, also if no job comes that could be told."""
        try:
            await self._worker.wait_async()
        except ColdstartError:
            await _job_held(FAILED_START_SECONDS)
            self._give_up()

    async def _wait_ready(self) -> None:
        if self._worker.state == "ready":
            return
        try:
            await self._worker.wait_async()
        except ColdstartError:
            self._give_up()
            raise

    def _thaw(self, frozen_seconds: float) -> None:
        try:
            self._worker.thaw("thawed", f"the platform froze this process for {frozen_seconds:.0f} s")
        except Exception:
            self._give_up()
            raise
        self._worker.write_record()

    def _give_up(self) -> None:
        """This worker cannot serve: answer the jobs it has with the reason, then end, so that the platform replaces it."""
        if not self.gave_up:
            self.gave_up = True
            signal.raise_signal(signal.SIGTERM)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _concurrency_now(self, _current: int) -> int:
        """What the SDK asks before each take of jobs: the first time is the first moment inside its loop."""
        if not self._inside:
            self._inside = True
            self._enter_loop()
        return self._concurrency

    def _enter_loop(self) -> None:
        runner = next((task for task in asyncio.all_tasks() if _name_of(task) == _RUNS_JOBS), None)
        if runner is not None:
            self._ending = asyncio.create_task(self._end_with(runner))
        if not self._has_hook:
            self._starting = asyncio.create_task(self._leave_if_failed())
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGTERM)

            def on_term(number: int, frame: Any) -> None:
                if callable(before):
                    before(number, frame)  # the SDK's own: take no more jobs, finish those in progress
                threading.Thread(target=self._worker.stop_capture, name="coldstart-stop", daemon=True).start()

            hear_sigterm(on_term)

    async def _end_with(self, runner: asyncio.Task[Any]) -> None:
        """Once the SDK runs no more jobs: end the worker, and the polls, whose jobs nobody would answer."""
        await asyncio.wait({runner})
        if self._sdk_reports:
            _end_heartbeat()
            return
        self._over = True
        await asyncio.to_thread(self._close)
        for task in asyncio.all_tasks():
            if _name_of(task) in _POLLS:
                self.cut_short = True
                task.cancel()

    def _close(self) -> None:
        """Wait for a capture, which SIGTERM ends, then close the worker: its async ``close`` still has the loop."""
        self._worker.capture_outcomes(self._capture_wait_seconds)
        self._worker.close()

    def end(self) -> None:
        """After the SDK's loop, however it ended."""
        if self._watch is not None:
            self._watch.stop()
        self._worker.close()


async def _job_held(seconds: float) -> None:
    """Wait until the SDK holds a job, for at most ``seconds``."""
    from runpod.serverless.modules.worker_state import JobsProgress

    jobs: Any = JobsProgress
    deadline = time.monotonic() + seconds
    while not jobs().get_job_count() and time.monotonic() < deadline:  # noqa: ASYNC110  the SDK has no event for it
        await asyncio.sleep(0.05)


def _end_heartbeat() -> None:
    """The SDK leaves by ``os._exit`` after a failed start, and its heartbeat's process would ping for ever."""
    import multiprocessing

    for child in multiprocessing.active_children():
        if child.daemon:
            child.terminate()


def _name_of(task: asyncio.Task[Any]) -> str:
    return str(getattr(task.get_coro(), "__qualname__", ""))


@contextmanager
def _contained() -> Iterator[None]:
    """What a handler raises that would end the worker, or that the SDK would never answer, becomes its job's error."""
    try:
        yield
    except SystemExit as error:
        raise HandlerError(
            f"the handler called sys.exit({error.code!r}) (SystemExit); to have this worker replaced after the job, return"
            ' {"refresh_worker": True}'
        ) from error
    except asyncio.CancelledError as error:
        task = _current_task()
        if task is not None and task.cancelling():
            raise  # the job itself is cancelled
        raise HandlerError("the handler raised CancelledError: something that it waited for was cancelled") from error
    except (Exception, GeneratorExit, KeyboardInterrupt):
        raise  # errors like any other, a stream that is left, the end of this process
    except BaseException as error:  # such as the panic of a library written in Rust
        raise HandlerError(f"the handler raised {type(error).__name__}: {error}") from error


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # a thread without a loop
        return None


def _checked(result: Any) -> Any:
    """``result``, if JSON can say it: else the SDK would log an error and never answer the job.

    A dict is copied: the SDK takes keys out of what it is given, and a handler may keep and return it again.
    """
    try:
        json.dumps(result, allow_nan=False, ensure_ascii=False).encode()  # as the SDK does: half a surrogate pair fails
    except (TypeError, ValueError, RecursionError) as error:
        raise unsayable(error) from error
    return {**result} if isinstance(result, dict) else result


def _imported_sdk() -> Any:
    try:
        with _no_processor_probe():
            import runpod.serverless
    except ModuleNotFoundError as error:
        if error.name != "runpod":
            raise
        raise UsageError(
            'this is a worker of RunPod, and its SDK is missing: pip install "coldstart-gpu[runpod]"'
        ) from error
    return runpod.serverless


def _leave_out_covered_checks(definition: Definition) -> None:
    """A warm-up proves the GPU through the real handler, so the SDK's own test of it is left out, unless set otherwise."""
    if definition.warmup.inputs and read_variable("RUNPOD_SKIP_GPU_CHECK") is None:
        set_variables({"RUNPOD_SKIP_GPU_CHECK": "true"})


@contextmanager
def _no_processor_probe() -> Iterator[None]:
    """SDK 1.x asks py-cpuinfo for the processor's name while it is imported, for a debugging aid, which takes 1.2 s."""
    if "cpuinfo" in sys.modules:
        yield
        return
    from types import ModuleType

    probe: Any = ModuleType("cpuinfo")
    probe.get_cpu_info = lambda: {"brand_raw": "not looked up"}
    sys.modules["cpuinfo"] = probe
    try:
        yield
    finally:
        del sys.modules["cpuinfo"]  # whoever imports it from now on gets the real one
