"""Handlers on Modal: its real client deploys them and its real container process serves them, on a plane of this machine."""

from __future__ import annotations

import json
import random
import re
import shutil
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("modal", reason="needs the modal extra")

import modal

from coldstart.stores import StoreOptions, open_store
from tests.keeping_front import keeping_front
from tests.modal_containers import Container, Deployment, deploy, deployed_by
from tests.modal_plane import ROOT, Plane
from tests.starts import Project

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from coldstart.stores.base import Store

    Serve = Callable[..., AbstractContextManager["Served"]]

KINDS = """
import asyncio
import os
import random
import threading

import modal
import numpy as np

from coldstart import coldstart
from coldstart.adapters.modal import service

app = modal.App("kinds", image=modal.Image.debian_slim(), secrets=[modal.Secret.from_name("store")])
NOTES = []
MEETING = threading.Barrier(2)
random.seed(7)
np.random.seed(7)

def note(step, ctx=None):
    NOTES.append([step, ctx and ctx.kind, ctx and ctx.secret("TOKEN"), os.environ.get("MODAL_TASK_ID")])

def load():
    if os.environ.get("FAIL"):
        raise RuntimeError("no weights here")
    return {"scale": np.arange(64, dtype=np.float32)}

async def init(ctx, state):  # of plain functions: it needs a loop of its own, and that a thread
    note("init", ctx)
    return state

def before(model):
    note("before_snapshot")

def after(ctx, model):
    if os.environ.get("FAIL"):
        raise OSError("cannot wake")
    note("after_restore", ctx)

def close(model):
    print("closed", flush=True)

def answer(event, model):
    if event["input"] == "probe":
        return {"notes": NOTES, "random": random.random(), "numpy": float(np.random.random()), "id": event["id"]}
    if event["input"] == "meet":
        return MEETING.wait(30) in (0, 1)
    x = event["input"]["x"]
    if x < 0:
        raise ValueError("too small")
    return {"sum": float((model["scale"] * x).sum())}

@coldstart("plain", load=load, init=init, close=close, before_snapshot=before, after_restore=after,
           secrets=["TOKEN"], warmup=[{"x": 1}], concurrency=4)
def plain(event, model):
    return answer(event, model)

Plain = service(app, plain, name="Plain", gpu="L4", web="POST", scaledown_window=77, timeout=123)
Cpu = service(app, plain, name="Cpu", modal_snapshot="cpu", gpu=["H100", "A100"])
Gpu = service(app, plain, name="Gpu", modal_snapshot="gpu", gpu="L4", startup_timeout=456, min_containers=1)

@coldstart("stream", load=load, close=close)
def stream(event, model):
    for number in range(event["input"]["n"]):
        yield float(model["scale"][number])

Stream = service(app, stream, name="Stream", web="POST")

async def load_later():
    await asyncio.sleep(0)
    return load()

async def close_later(model):
    await asyncio.sleep(0)
    close(model)

async def after_later(ctx, model):
    await asyncio.sleep(0)
    note("after_restore", ctx)

@coldstart("later", load=load_later, close=close_later, after_restore=after_later, secrets=["TOKEN"])
async def later(event, model):
    await asyncio.to_thread(answer, {"input": {"x": 1}}, model)
    return answer(event, model)

Later = service(app, later, name="Later", web="GET")
LaterCpu = service(app, later, name="LaterCpu", modal_snapshot="cpu")
LaterGpu = service(app, later, name="LaterGpu", modal_snapshot="gpu")

@coldstart("pieces", load=load, close=close)
async def pieces(event, model):
    for number in range(event["input"]["n"]):
        yield float(model["scale"][number])

Pieces = service(app, pieces, name="Pieces", web="POST")

@service(app, gpu="T4")
@coldstart("form")
class Form:
    def load(self):
        self.scale = load()["scale"]

    def handle(self, event):
        return float((self.scale * event["input"]["x"]).sum())

    def describe(self, unit):
        return f"{self.scale.size} {unit}"

    def close(self):
        print("closed", flush=True)

@service(app)
@coldstart("decorated", load=load)
def decorated(event, model):
    return answer(event, model)

@app.cls(enable_memory_snapshot=True)
class Bare:
    @modal.enter(snap=True)
    def before(self):
        pass

    @modal.method()
    def run(self):
        return os.getpid()
"""

SUM = {"sum": 2016.0}
"""What KINDS' handlers answer to ``{"x": 1}``."""


class Arena:
    """A plane, a store on an S3 server, a folder with handler files, and what was deployed of it."""

    def __init__(self, folder: Any, plane: Plane, endpoint: str, bucket: str) -> None:
        self.plane = plane
        self.variables = {
            "COLDSTART_STORE": f"s3://{bucket}/snapshots",
            "COLDSTART_ENDPOINT_URL": endpoint,
            "COLDSTART_REGION": "us-east-1",
            "COLDSTART_ACCESS_KEY_ID": "id",
            "COLDSTART_SECRET_ACCESS_KEY": "secret",
            "COLDSTART_FILES_FOLDER": str(folder / "files"),
            "COLDSTART_CAPTURE_IDLE_SECONDS": "0",
            "TOKEN": "first",
        }
        self.project = Project(folder / "project")
        self.project.environment = self.variables
        plane.rpcs.secrets["store"] = self.variables

    @property
    def elsewhere(self) -> str:
        """The address of a store that holds no snapshot."""
        return self.variables["COLDSTART_STORE"] + "-elsewhere"

    def store(self, address: str = "") -> Store:
        """The store, or the one at another address."""
        own = self.variables
        keys = own["COLDSTART_ACCESS_KEY_ID"], own["COLDSTART_SECRET_ACCESS_KEY"]
        options = StoreOptions(own["COLDSTART_ENDPOINT_URL"], own["COLDSTART_REGION"], *keys)
        return open_store(address or own["COLDSTART_STORE"], options)

    def published(self, name: str) -> int:
        """How many keys a snapshot is published for."""
        return sum(not info.key.endswith("/newest") for info in self.store().list(f"refs/{name}/"))

    def record(self, name: str, container: Container, address: str = "") -> dict[str, Any]:
        """The start record that a container has written."""
        store = self.store(address)
        found = [json.loads(store.get(info.key).data) for info in store.list(f"starts/{name}/")]
        (record,) = [record for record in found if record["pid"] == container.pid]
        return record


@pytest.fixture(scope="module")
def arena(
    tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str, new_s3_bucket: Callable[[], str]
) -> Iterator[Arena]:
    """The plane and the store of this file's tests; the snapshot of "plain" was made by ``coldstart run``."""
    folder = tmp_path_factory.mktemp("modal")
    with keeping_front(s3_endpoint) as endpoint, Plane(folder) as plane:
        arena = Arena(folder, plane, endpoint, new_s3_bucket())
        arena.project.write(KINDS, "kinds.py")
        start = arena.project.run("--input", '{"x": 1}', target="kinds.py:plain")
        assert (start.kind, start.output, start.capture["published"]) == ("cold", SUM, True)
        yield arena
    assert plane.troubles == []


@pytest.fixture(scope="module")
def kinds(arena: Arena) -> Deployment:
    """The app of KINDS, deployed by Modal's own command."""
    return deploy(arena.plane, arena.project.folder / "kinds.py")


class Served:
    """A container that serves a class, and a caller of it."""

    def __init__(self, plane: Plane, deployment: Deployment, name: str, container: Container, client: Any) -> None:
        self.container = container
        self.model = modal.Cls.from_name(deployment.name, name, client=client)()
        self._request = partial(plane.request, deployment.app, name, "web")

    def post(self, body: Any) -> tuple[int, list[Any]]:
        """The status, and the lines of JSON, that the web endpoint answers to ``body``."""
        return self._ask("POST", body=json.dumps(body).encode())

    def get(self, query: str) -> tuple[int, list[Any]]:
        """The same, to a query."""
        return self._ask("GET", query=query.encode())

    def _ask(self, verb: str, **parts: bytes) -> tuple[int, list[Any]]:
        response = self._request(verb=verb, **parts)
        return response.status, [json.loads(line) for line in response.body.splitlines()]

    def ends_well(self) -> None:
        """Told to end, the container runs ``close`` and ends with 0."""
        assert self.container.stop() == 0, self.container.log
        assert len(re.findall("^closed$", self.container.log, re.MULTILINE)) == 1, self.container.log


@contextmanager
def serving(plane: Plane, deployment: Deployment, name: str, **options: Any) -> Iterator[Served]:
    """A container of a class, while the block runs."""
    with Container(plane, deployment, name, **options) as container, plane.client() as client:
        yield Served(plane, deployment, name, container, client)


@pytest.fixture
def serve(arena: Arena, kinds: Deployment) -> Serve:
    """Begins a container of a class of KINDS."""

    def begin(
        name: str, *, capture: str = "off", checkpoint: bool = False, **environment: str
    ) -> AbstractContextManager[Served]:
        variables = {"COLDSTART_CAPTURE": capture, **environment}
        return serving(arena.plane, kinds, name, environment=variables, checkpoint=checkpoint)

    return begin


def drawn_from_seed(probe: dict[str, float]) -> bool:
    """Whether a random number of the answer is what the seed of KINDS gives, which is the same in every container."""
    return probe["random"] == random.Random(7).random() or probe["numpy"] == float(np.random.RandomState(7).random())


# --- what a deploy sends -----------------------------------------------------------------------------------------------------


def test_plain_service(kinds: Deployment) -> None:
    """Options of the class reach the platform, with the handler's concurrency, its methods and where to find them."""
    sent = kinds.function("Plain")
    assert (sent.module_name, sent.implementation_name) == ("kinds", "Plain.*")
    assert sorted(sent.method_definitions) == ["run", "web"]
    assert sent.method_definitions["web"].webhook_config.method == "POST"
    assert (sent.checkpointing_enabled, dict(sent.experimental_options)) == (False, {})
    assert (sent.resources.gpu_config.gpu_type, sent.autoscaler_settings.scaledown_window) == ("L4", 77)
    assert (sent.max_concurrent_inputs, sent.timeout_secs) == (4, 123)


def test_services_with_snapshots(kinds: Deployment) -> None:
    """The platform's snapshots are asked for by the mode: of the processor's memory, or of the GPU's too."""
    cpu, gpu = kinds.function("Cpu"), kinds.function("Gpu")
    assert (cpu.checkpointing_enabled, dict(cpu.experimental_options)) == (True, {})
    assert (gpu.checkpointing_enabled, dict(gpu.experimental_options)) == (True, {"enable_gpu_snapshot": "True"})
    assert (gpu.startup_timeout_secs, gpu.autoscaler_settings.min_containers) == (456, 1)
    (ranked,) = [each.function_data for each in kinds.app.requests if each.HasField("function_data")]
    hardware = [each.function.resources.gpu_config.gpu_type for each in ranked.ranked_functions]
    assert hardware == ["H100", "A100"]


def test_decorated_services(kinds: Deployment) -> None:
    """Used as a decorator, the class has the name of what it decorates; further methods of a class are methods there."""
    form = kinds.function("Form")
    assert (form.implementation_name, form.resources.gpu_config.gpu_type) == ("Form.*", "T4")
    assert sorted(form.method_definitions) == ["describe", "run"]
    assert sorted(kinds.function("decorated").method_definitions) == ["run"]


# --- without the platform's snapshots ------------------------------------------------------------------------------------------


def test_restored_from_the_store(arena: Arena, serve: Serve) -> None:
    """A container restores what ``coldstart run`` has published, answers in every way, and ends well."""
    with serve("Plain") as served:
        run = served.model.run
        assert run.remote({"x": 1}) == SUM
        assert run.spawn({"x": 2}).get(timeout=30) == {"sum": 2 * SUM["sum"]}
        with pytest.raises(ValueError, match="too small"):
            run.remote({"x": -1})
        assert served.post({"input": {"x": 1}}) == (200, [{"output": SUM}])
        told = {"error": {"type": "ValueError", "message": "too small"}}
        assert served.post({"input": {"x": -1}}) == (500, [told])
        together = [run.spawn("meet"), run.spawn("meet")]
        assert [call.get(timeout=30) for call in together] == [True, True]
        probe = run.remote("probe")
        assert probe["notes"] == [["init", "restored", "first", served.container.task_id]]
        assert probe["id"]
        served.ends_well()
    record = arena.record("plain", served.container)
    assert (record["kind"], record["rung"], record["amortised"]) == ("restored", "arrays", None)


@pytest.mark.parametrize("name", ["Stream", "Pieces"])
def test_streams(serve: Serve, name: str) -> None:
    """Generators of both kinds stream their pieces, to callers and as lines of a web answer."""
    with serve(name) as served:
        assert list(served.model.run.remote_gen({"n": 3})) == [0.0, 1.0, 2.0]
        assert served.post({"input": {"n": 2}}) == (200, [{"piece": 0.0}, {"piece": 1.0}])
        status, lines = served.post({"input": {"n": 65}})  # one more than there are
        assert (status, len(lines), lines[-1]["error"]["type"]) == (200, 65, "IndexError")
        served.ends_well()


def test_web_requests_without_an_event(serve: Serve) -> None:
    """A request that holds no event is answered with status 400 and what is wrong with it; the next one is served."""
    with serve("Stream") as served:
        status, (answer,) = served.post({"n": 2})
        assert (status, "no input" in answer["detail"]) == (400, True)
        assert served.post({"input": {"n": 1}}) == (200, [{"piece": 0.0}])
    with serve("Later") as served:
        status, (answer,) = served.get("input=nonsense")
        assert (status, "not JSON" in answer["detail"]) == (400, True)


def test_async_handler(serve: Serve) -> None:
    """A coroutine function answers, and its async hooks run."""
    with serve("Later") as served:
        assert served.model.run.remote({"x": 1}) == SUM
        assert served.get("input=%7B%22x%22%3A1%7D") == (200, [{"output": SUM}])
        served.ends_well()


def test_class_form(serve: Serve) -> None:
    """A handler of the class form answers, and so does its further method."""
    with serve("Form") as served:
        assert served.model.run.remote({"x": 1}) == SUM["sum"]
        assert served.model.describe.remote("words") == "64 words"
        served.ends_well()


@pytest.mark.parametrize("name", ["stream", "decorated"])
def test_first_container_publishes(arena: Arena, serve: Serve, name: str) -> None:
    """Where there is no snapshot, the container loads, and publishes one by its end; the next container restores it."""
    for kind in ("cold", "restored"):
        with serve({"stream": "Stream"}.get(name, name), capture="on") as served:
            if name == "stream":
                assert list(served.model.run.remote_gen({"n": 2})) == [0.0, 1.0]
            else:
                assert served.model.run.remote({"x": 1}) == SUM
            assert served.container.stop() == 0
        assert arena.record(name, served.container)["kind"] == kind
        assert arena.published(name) == 1, served.container.log


def test_start_that_fails(arena: Arena, serve: Serve) -> None:
    """A start that fails is told to the platform as the task's failure, with the reason."""
    with serve("Later", FAIL="1") as served:
        served.container.wait_end()
    result = arena.plane.requests("TaskResult")[-1].result
    assert "no weights here" in result.exception


# --- with the platform's snapshots ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_threads(arena: Arena, kinds: Deployment) -> int:
    """How many threads a container has at its checkpoint where the class does nothing."""
    with Container(arena.plane, kinds, "Bare", checkpoint=True) as container:
        return container.wait_checkpoint().threads


def test_cpu_snapshot(arena: Arena, serve: Serve, bare_threads: int) -> None:
    """The snapshot holds the fetched weights, no connection, no thread and no child of ours; the start goes on after it."""
    with serve("Cpu", checkpoint=True) as served:
        seen = served.container.wait_checkpoint()
        assert (seen.connections, seen.children, seen.libcuda) == ((), 0, False)
        assert seen.threads <= bare_threads
        task = served.container.restore(token="second", coldstart_store=arena.elsewhere)
        assert served.model.run.remote({"x": 1}) == SUM
        probe = served.model.run.remote("probe")
        assert probe["notes"] == [["init", "restored", "second", task]]
        assert not drawn_from_seed(probe)
        served.ends_well()
    record = arena.record("plain", served.container, arena.elsewhere)
    assert (record["kind"], record["own_kind"]) == ("platform", "restored")
    before = {span["name"] for span in record["amortised"]["spans"]}
    assert {"look up", "fetch"} <= before
    assert not {"look up", "fetch"} & {span["name"] for span in record["spans"]}


def test_store_out_of_reach_before_the_snapshot(arena: Arena, serve: Serve) -> None:
    """A fetch that failed before the snapshot leaves nothing open, and is made good after it."""
    with serve("Cpu", checkpoint=True, COLDSTART_ENDPOINT_URL="http://127.0.0.1:1") as served:
        seen = served.container.wait_checkpoint()
        assert (seen.connections, seen.children) == ((), 0)
        served.container.restore(coldstart_endpoint_url=arena.variables["COLDSTART_ENDPOINT_URL"])
        assert served.model.run.remote({"x": 1}) == SUM
        served.ends_well()
    record = arena.record("plain", served.container)
    assert (record["kind"], record["own_kind"]) == ("platform", "restored")


@pytest.mark.parametrize("name", ["LaterCpu", "LaterGpu"])
def test_snapshot_of_an_async_handler(arena: Arena, serve: Serve, bare_threads: int, name: str) -> None:
    """Async hooks and a store without a snapshot make no difference: nothing of ours runs on at the checkpoint."""
    with serve(name, checkpoint=True) as served:
        seen = served.container.wait_checkpoint()
        assert (seen.connections, seen.children, seen.libcuda) == ((), 0, False)
        assert seen.threads <= bare_threads
        task = served.container.restore(token="second")
        assert served.model.run.remote({"x": 1}) == SUM
        probe = served.model.run.remote("probe")
        assert probe["notes"] == ([["after_restore", "cold", "second", task]] if name == "LaterGpu" else [])
        served.ends_well()
    record = arena.record("later", served.container)
    assert (record["kind"], record["own_kind"]) == ("platform", "cold")


def test_gpu_snapshot(arena: Arena, serve: Serve, bare_threads: int) -> None:
    """The snapshot holds a ready worker; after it the user's hook runs and random numbers are others than before."""
    with serve("Gpu", checkpoint=True) as served:
        first = served.container.task_id
        seen = served.container.wait_checkpoint()
        assert (seen.connections, seen.children, seen.libcuda) == ((), 0, False)
        assert seen.threads <= bare_threads
        second = served.container.restore(token="second")
        assert served.model.run.remote({"x": 1}) == SUM
        probe = served.model.run.remote("probe")
        assert probe["notes"] == [
            ["init", "restored", "first", first],
            ["before_snapshot", None, None, first],
            ["after_restore", "restored", "second", second],
        ]
        assert not drawn_from_seed(probe)
        served.ends_well()
    record = arena.record("plain", served.container)
    assert (record["kind"], record["own_kind"], record["phases"]) == ("platform", "restored", [])
    assert "weight_load" in {phase["name"] for phase in record["amortised"]["phases"]}


@pytest.mark.parametrize("name", ["Cpu", "Gpu"])
def test_boot_without_the_snapshot(arena: Arena, serve: Serve, name: str) -> None:
    """A class that asks for snapshots serves in a container that is not to be snapshotted as well."""
    with serve(name) as served:
        assert served.model.run.remote({"x": 1}) == SUM
        notes = served.model.run.remote("probe")["notes"]
        assert notes[0] == ["init", "restored", "first", served.container.task_id]
        served.ends_well()
    record = arena.record("plain", served.container)
    assert (record["kind"], record["own_kind"], record["amortised"]) == ("restored", "restored", None)


def test_snapshot_goes_on_in_its_own_task(serve: Serve) -> None:
    """The container that made the snapshot may go on as the same task: it serves like any other."""
    with serve("Gpu", checkpoint=True) as served:
        served.container.wait_checkpoint()
        served.container.restore(same_task=True)
        assert served.model.run.remote({"x": 1}) == SUM
        served.ends_well()


def test_hook_that_fails_after_the_snapshot(arena: Arena, serve: Serve) -> None:
    """An ``after_restore`` that raises is told to the platform as the task's failure: no input is served half awake."""
    since = len(arena.plane.calls)
    with serve("Gpu", checkpoint=True) as served:
        served.container.wait_checkpoint()
        served.container.restore(fail="1")
        served.container.wait_end()
    assert "cannot wake" in arena.plane.requests("TaskResult")[-1].result.exception
    assert "FunctionGetInputs" not in arena.plane.names(since)


def test_refused_checkpoint(arena: Arena, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container whose checkpoint the platform refuses ends at once, leaving nothing behind that would keep it."""
    monkeypatch.setattr(arena.plane.rpcs, "refuse_checkpoints", True)
    with serve("Gpu", checkpoint=True) as served:
        assert served.container.wait_end() != 0


# --- deployed by coldstart -----------------------------------------------------------------------------------------------------

SMALL = """
# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy"]
# [tool.coldstart]
# gpu = ["L4", "T4"]
# max_workers = 2
# idle_seconds = 88
# timeout_seconds = 99
# env = {UNIT = "m"}
# ///
import asyncio
import os

import numpy as np

from coldstart import coldstart
from small_helper import doubled

def load():
    return {"scale": np.arange(4.0)}

def init(ctx, state):
    return {**state, "token": ctx.secret("TOKEN"), "unit": os.environ["UNIT"]}

def close(model):
    print("closed", flush=True)

@coldstart("small", load=load, init=init, close=close, secrets=["TOKEN"], concurrency=2)
def small(event, model):
    return [doubled(event["input"]), model["token"], model["unit"], os.environ["MODAL_TASK_ID"]]

@coldstart("small-later", load=load, init=init, close=close, secrets=["TOKEN"])
async def later(event, model):
    await asyncio.sleep(0)
    return [doubled(event["input"]), model["token"]]

@coldstart("small-pieces", load=load, close=close)
async def pieces(event, model):
    for value in model["scale"].tolist():
        yield value + event["input"]

@coldstart("small-form")
class Form:
    def load(self):
        self.scale = load()["scale"]

    def after_restore(self):
        self.woken = True

    def handle(self, event):
        return [float(self.scale.sum()) + event["input"], getattr(self, "woken", False)]

    def numbers(self, start):
        yield from (self.scale + start).tolist()

    def close(self):
        close(self)

if __name__ == "__main__":
    coldstart.serve(small)
"""


def deployed(arena: Arena, folder: str, *words: str) -> tuple[Deployment, str]:
    """What ``coldstart deploy modal`` makes of a file in a folder: the app, and the name of its class."""
    own = {name: text for name, text in arena.variables.items() if name != "COLDSTART_FILES_FOLDER"}
    command = ["-m", "coldstart", "deploy", "modal", *words]
    deployment = deployed_by(arena.plane, command, arena.plane.folder / folder, environment=own)
    (name,) = deployment.app.layout.class_ids
    return deployment, name


@pytest.fixture(scope="module")
def small_folder(arena: Arena) -> str:
    """The folder with SMALL and the module that it imports."""
    project = Project(arena.plane.folder / "small")
    project.write(SMALL, "small.py")
    project.write("def doubled(x):\n    return 2 * x\n", "small_helper.py")
    return "small"


CAPTURE_OFF = {"COLDSTART_CAPTURE": "off"}


def test_deployed_function(arena: Arena, small_folder: str) -> None:
    """The file's block reaches the platform; its modules, secrets and store reach the container, by the deploy alone."""
    deployment, name = deployed(arena, small_folder, "small.py:small", "--snapshot", "cpu", "--web", "POST")
    sent = deployment.function(name)
    assert (deployment.name, name, sorted(sent.method_definitions)) == ("small", "Small", ["run", "web"])
    assert (sent.checkpointing_enabled, sent.max_concurrent_inputs, sent.timeout_secs) == (True, 2, 99)
    assert (sent.autoscaler_settings.max_containers, sent.autoscaler_settings.scaledown_window) == (2, 88)
    (ranked,) = [each.function_data.ranked_functions for each in deployment.app.requests]
    assert [each.function.resources.gpu_config.gpu_type for each in ranked] == ["L4", "T4"]
    with serving(arena.plane, deployment, name, environment=CAPTURE_OFF, checkpoint=True) as served:
        assert served.container.wait_checkpoint().connections == ()
        task = served.container.restore(token="second")
        assert served.model.run.remote(3) == [6, "second", "m", task]
        assert served.post({"input": 4}) == (200, [{"output": [8, "second", "m", task]}])
        served.ends_well()
    assert arena.record("small", served.container)["kind"] == "platform"


def test_deployed_coroutine_function(arena: Arena, small_folder: str) -> None:
    """An async handler, without the platform's snapshots."""
    deployment, name = deployed(arena, small_folder, "small.py:later", "--web", "GET")
    assert (deployment.name, name) == ("small-later", "SmallLater")
    with serving(arena.plane, deployment, name, environment=CAPTURE_OFF) as served:
        assert served.model.run.remote(3) == [6, "first"]
        assert served.get("input=4") == (200, [{"output": [8, "first"]}])
        served.ends_well()
    assert arena.record("small-later", served.container)["kind"] == "cold"


def test_deployed_async_generator(arena: Arena, small_folder: str) -> None:
    """An async generator, with a snapshot of the ready worker."""
    deployment, name = deployed(arena, small_folder, "small.py:pieces", "--snapshot", "gpu")
    with serving(arena.plane, deployment, name, environment=CAPTURE_OFF, checkpoint=True) as served:
        assert served.container.wait_checkpoint().connections == ()
        served.container.restore()
        assert list(served.model.run.remote_gen(1.0)) == [1.0, 2.0, 3.0, 4.0]
        served.ends_well()
    assert arena.record("small-pieces", served.container)["kind"] == "platform"


def test_deployed_class(arena: Arena, small_folder: str) -> None:
    """A class with a further method, which streams; the first container publishes what the next one restores."""
    deployment, name = deployed(arena, small_folder, "small.py:Form", "--snapshot", "gpu")
    for kind in ("cold", "restored"):
        with serving(arena.plane, deployment, name, checkpoint=True) as served:
            served.container.wait_checkpoint()
            served.container.restore()
            assert served.model.run.remote(1.0) == [7.0, True]
            assert list(served.model.numbers.remote_gen(1)) == [1.0, 2.0, 3.0, 4.0]
            served.ends_well()
        record = arena.record("small-form", served.container)
        assert (record["kind"], record["own_kind"]) == ("platform", kind), served.container.log


def test_deployed_stream(arena: Arena) -> None:
    """``coldstart deploy modal handlers/stream.py``: the file as it is streams on Modal."""
    shutil.copytree(ROOT / "handlers", arena.plane.folder / "handlers")
    deployment, name = deployed(arena, "handlers", "stream.py")
    with serving(arena.plane, deployment, name, environment=CAPTURE_OFF) as served:
        words = [piece["word"] for piece in served.model.run.remote_gen({"prompt": "the", "words": 3, "seed": 1})]
        assert len(words) == 3
        assert served.container.stop() == 0


@pytest.mark.demo
def test_deployed_minilm(arena: Arena) -> None:
    """``coldstart deploy modal handlers/minilm.py``: restored from the store, it embeds like the file run by hand."""
    event = {"texts": ["a", "b c"]}
    start = arena.project.run("--input", json.dumps(event), target=str(ROOT / "handlers" / "minilm.py"))
    assert start.capture["published"]
    shutil.copytree(ROOT / "handlers", arena.plane.folder / "minilm")
    deployment, name = deployed(arena, "minilm", "minilm.py", "--snapshot", "cpu")
    with serving(arena.plane, deployment, name, environment=CAPTURE_OFF, checkpoint=True) as served:
        seen = served.container.wait_checkpoint()
        assert (seen.connections, seen.children, seen.libcuda) == ((), 0, False)
        served.container.restore()
        assert served.model.run.remote(event) == start.output
        assert served.container.stop() == 0
    record = arena.record("minilm", served.container)
    assert (record["kind"], record["own_kind"], record["bytes"]["raw"] > 50e6) == ("platform", "restored", True)
