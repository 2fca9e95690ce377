"""Modal's real client and container entrypoint on the plane of the tests: a plain app of Modal's own kind, nothing of ours."""

from __future__ import annotations

import json
import re
import socket
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("modal", reason="needs the modal extra")

from tests.modal_containers import Container, Deployment, deploy
from tests.modal_plane import Plane

if TYPE_CHECKING:
    from collections.abc import Iterator

RAW = """
import os
import socket

import modal

app = modal.App("raw")
image = modal.Image.debian_slim().env({"SHAPE": "a 'b' c"}).pip_install("numpy")

@app.cls(
    image=image,
    gpu="L4",
    secrets=[modal.Secret.from_dict({"OWN": "own"}), modal.Secret.from_name("stored")],
    volumes={"/vol": modal.Volume.from_name("shelf", create_if_missing=True)},
    enable_memory_snapshot=True,
    experimental_options={"enable_gpu_snapshot": True},
    min_containers=1,
    scaledown_window=77,
    timeout=123,
    startup_timeout=456,
)
@modal.concurrent(max_inputs=4, target_inputs=2)
class Model:
    @modal.enter(snap=True)
    def before(self):
        self.seen = [("before", os.environ["MODAL_TASK_ID"], os.environ.get("STORED"))]
        if os.environ.get("LEAK"):
            self.leak = socket.create_connection(("127.0.0.1", int(os.environ["LEAK"])))

    @modal.enter(snap=False)
    def after(self):
        self.seen.append(("after", os.environ["MODAL_TASK_ID"], os.environ.get("STORED")))

    @modal.method()
    def run(self, x):
        if x < 0:
            raise ValueError("too small")
        if x == 99:
            os._exit(3)
        return {"x": 2 * x, "seen": self.seen, "own": os.environ["OWN"] + os.environ["SHAPE"]}

    @modal.method()
    def count(self, n):
        yield from range(n)

    @modal.fastapi_endpoint(method="POST")
    def web(self, body: dict):
        return {"got": body}

    @modal.exit()
    def leave(self):
        print("left", flush=True)

@app.function(image=image, gpu=["H100", "A100:2"])
def plain(x):
    return x + 1
"""


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """The plane, with one stored secret. Whatever it could not answer fails the tests by name."""
    with Plane(tmp_path_factory.mktemp("plane")) as plane:
        plane.rpcs.secrets["stored"] = {"STORED": "first"}
        yield plane
    assert plane.troubles == []


@pytest.fixture(scope="module")
def raw(plane: Plane) -> Deployment:
    """The app, deployed by Modal's own command."""
    folder = plane.folder / "raw"
    folder.mkdir()
    (folder / "raw_app.py").write_text(RAW)
    return deploy(plane, folder / "raw_app.py")


def model(client: Any, raw: Deployment) -> Any:
    """The deployed class, as a caller gets it."""
    import modal

    return modal.Cls.from_name(raw.name, "Model", client=client)()


def test_what_a_deploy_sends(plane: Plane, raw: Deployment) -> None:
    """Everything that was written in the file reaches the plane: where the class is, its hardware, scaling and snapshots."""
    sent = raw.function("Model")
    assert (sent.module_name, sent.implementation_name, sent.function_name) == ("raw_app", "Model.*", "Model.*")
    assert (sent.is_class, sorted(sent.method_definitions)) == (True, ["count", "run", "web"])
    assert sent.method_definitions["web"].webhook_config.method == "POST"
    assert (sent.checkpointing_enabled, dict(sent.experimental_options)) == (True, {"enable_gpu_snapshot": "True"})
    assert (sent.resources.gpu_config.gpu_type, sent.resources.gpu_config.count) == ("L4", 1)
    assert (sent.max_concurrent_inputs, sent.target_concurrent_inputs) == (4, 2)
    assert (sent.autoscaler_settings.min_containers, sent.autoscaler_settings.scaledown_window) == (1, 77)
    assert (sent.timeout_secs, sent.startup_timeout_secs) == (123, 456)
    assert [mount.mount_path for mount in sent.volume_mounts] == ["/vol"]
    assert [plane.rpcs.secrets[identity] for identity in sent.secret_ids] == [{"OWN": "own"}, {"STORED": "first"}]
    (ranked,) = [request for request in raw.app.requests if request.HasField("function_data")]
    hardware = [each.function.resources.gpu_config for each in ranked.function_data.ranked_functions]
    assert [(each.gpu_type, each.count) for each in hardware] == [("H100", 1), ("A100", 2)]


def test_calls_of_a_deploy_in_order(plane: Plane, raw: Deployment) -> None:
    """The plane keeps the calls in their order: an app is made, its functions and classes, and only then published."""
    names = plane.names()
    order = ["AppGetByDeploymentName", "AppCreate", "FunctionPrecreate", "FunctionCreate", "ClassCreate", "AppPublish"]
    assert [names.index(name) for name in order] == sorted(names.index(name) for name in order)


def test_checkpoint_and_restore(plane: Plane, raw: Deployment) -> None:
    """Hooks run around the checkpoint; the thawed process has a new task and new secrets, answers in every way and ends well."""
    since = len(plane.calls)
    with Container(plane, raw, "Model", checkpoint=True) as container, plane.client() as client:
        first = container.task_id
        seen = container.wait_checkpoint()
        assert (seen.connections, seen.children, seen.libcuda) == ((), 0, False)
        assert seen.threads >= 2
        second = container.restore(stored="second")
        deployed = model(client, raw)
        answer = deployed.run.remote(3)
        assert answer == {
            "x": 6,
            "seen": [("before", first, "first"), ("after", second, "second")],
            "own": "owna 'b' c",
        }
        assert deployed.run.spawn(4).get(timeout=30)["x"] == 8
        assert list(deployed.count.remote_gen(3)) == [0, 1, 2]
        with pytest.raises(ValueError, match="too small"):
            deployed.run.remote(-1)
        response = plane.request(raw.app, "Model", "web", verb="POST", body=b'{"a": 1}')
        assert (response.status, json.loads(response.body)) == (200, {"got": {"a": 1}})
        assert response.headers["content-type"] == "application/json"
        assert container.stop() == 0
        assert re.search("^left$", container.log, re.MULTILINE)
    names = plane.names(since)
    assert names.index("ContainerHello") < names.index("ContainerCheckpoint") < names.index("FunctionGetInputs")
    assert names[-1] == "VolumeCommit"


def test_boot_without_a_snapshot(plane: Plane, raw: Deployment) -> None:
    """A class that allows snapshots boots without one as well: both hooks run back to back, in one task."""
    with Container(plane, raw, "Model") as container, plane.client() as client:
        seen = model(client, raw).run.remote(1)["seen"]
        assert seen == [("before", container.task_id, "first"), ("after", container.task_id, "first")]
        assert container.stop() == 0


def test_container_that_dies(plane: Plane, raw: Deployment) -> None:
    """Who waits for a container that dies is told so, with what it wrote, instead of waiting for ever."""
    import modal

    with Container(plane, raw, "Model") as container, plane.client() as client:
        with pytest.raises(modal.exception.RemoteError, match="ended with 3"):
            model(client, raw).run.remote(99)
        assert container.wait_end() == 3


def test_connection_that_a_hook_left_open(plane: Plane, raw: Deployment) -> None:
    """A connection that is open at the checkpoint is seen: the check of a clean snapshot can fail."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with Container(plane, raw, "Model", environment={"LEAK": str(port)}, checkpoint=True) as container:
            assert container.wait_checkpoint().connections == (f"127.0.0.1:{port}",)


def test_refused_checkpoint(plane: Plane, raw: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container whose checkpoint is refused ends with a failure, as the platform sees it."""
    monkeypatch.setattr(plane.rpcs, "refuse_checkpoints", True)
    with Container(plane, raw, "Model", checkpoint=True) as container:
        assert container.wait_end() != 0
        assert "no snapshots today" in container.log


def test_autoscaler(plane: Plane, raw: Deployment) -> None:
    """A change of the autoscaler through a method's handle reaches the function that serves the class."""
    with plane.client() as client:
        model(client, raw).run.autoscaler.update(min_containers=3)
    (request,) = plane.requests("FunctionUpdateSchedulingParams")
    assert request.function_id == raw.app.function_id("Model")
    assert request.settings.min_containers == 3


def test_function(plane: Plane, raw: Deployment) -> None:
    """A plain function is served too."""
    import modal

    with Container(plane, raw, "plain") as container, plane.client() as client:
        assert modal.Function.from_name("raw", "plain", client=client).remote(1) == 2
        assert container.stop() == 0


def test_unknown_call(tmp_path: Any) -> None:
    """A call that the plane does not know fails with its name, and is kept as trouble."""
    import modal

    with Plane(tmp_path) as plane:
        with plane.client() as client, pytest.raises(modal.exception.Error, match="QueueGetOrCreate"):
            modal.Queue.from_name("line", client=client).hydrate()
        assert plane.troubles == ["the plane does not know the call QueueGetOrCreate"]
