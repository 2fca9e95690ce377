"""What runs against the plane: ``modal deploy`` in a process, and containers, which are Modal's own entrypoint in one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from modal_proto import api_pb2 as api

from tests.modal_plane import ROOT, WAIT_SECONDS, App, Plane

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Deployment(NamedTuple):
    """One app as it was deployed, and what the command has written."""

    app: App
    name: str
    output: str

    def function(self, name: str) -> api.Function:
        """What was sent about a function or a class."""
        return self.app.functions[self.app.function_id(name)]


class Ended(NamedTuple):
    """A process that has ended."""

    code: int
    output: str


def run_to_end(command: list[str], folder: Path, environment: Mapping[str, str]) -> Ended:
    """Run a Python process to its end; whatever it started ends with it."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=WAIT_SECONDS * 2)
        finally:
            _end_group(process.pid)
    return Ended(process.returncode, output)


def _end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def deploy(plane: Plane, file: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Deployment:
    """``modal deploy FILE`` in a process of its own, which must succeed."""
    return deployed_by(plane, ["-m", "modal", "deploy", str(file), *arguments], file.parent, environment=environment)


def deployed_by(
    plane: Plane, command: list[str], folder: Path, *, environment: Mapping[str, str] | None = None
) -> Deployment:
    """The app that a Python process deploys from ``folder``; it must succeed, and deploy one."""
    since = len(plane.calls)
    done = run_to_end(command, folder, plane.environment(environment))
    assert not plane.troubles, (plane.troubles, done.output)
    assert done.code == 0, done.output
    (published,) = [call.request for call in plane.calls[since:] if call.name == "AppPublish"]
    return Deployment(plane.rpcs.apps[published.app_id], published.name, done.output)


class Sight(NamedTuple):
    """What can be seen of a container's process from outside."""

    connections: tuple[str, ...]
    """The far ends of its established TCP connections, ``address:port``."""
    threads: int
    children: int
    libcuda: bool


class Container:
    """One container of a function or class: Modal's real entrypoint in a process, which ends with the block.

    It has the files that were uploaded at the deploy, the image's variables and the secrets, and ``environment``.
    ``checkpoint``: it is to be snapshotted, then restored.
    """

    def __init__(
        self,
        plane: Plane,
        deployment: Deployment,
        name: str,
        *,
        environment: Mapping[str, str] | None = None,
        checkpoint: bool = False,
    ) -> None:
        self._plane = plane
        self._deployment = deployment
        self._environment = environment or {}
        self._checkpoint = checkpoint
        self.function_id = deployment.app.function_id(name)
        self.task_id = plane.rpcs.new("ta")
        self.checkpoint_id = plane.rpcs.new("ch") if checkpoint else ""
        self.folder = plane.folder / self.task_id
        self.root = self.folder / "image"
        self.home = self.root / "root"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        function = self._deployment.app.functions[self.function_id]
        self._lay_out(function)
        (self.folder / "arguments").write_bytes(self._arguments(function))
        if self._checkpoint:
            self._plane.rpcs.checkpoints[self.checkpoint_id] = threading.Event()
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "modal._container_entrypoint"],
                cwd=self.home,
                env=self._variables(function),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._watcher = threading.Thread(target=self._watch, name=f"watch-{self.task_id}", daemon=True)
        self._watcher.start()
        return self

    def _lay_out(self, function: api.Function) -> None:
        """Put the files that the client has uploaded for the image where the container finds them.

        Its root is a folder here, so the paths of the image that the app's own file may name are moved below it.
        """
        self.home.mkdir(parents=True)
        for mount in function.mount_ids:
            for name, data in self._plane.rpcs.mounts[mount].items():
                path = self.root / name.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        own = self.home / f"{function.module_name}.py"
        own.write_text(own.read_text().replace("'/root/", f"'{self.home}/"))

    def _watch(self) -> None:
        """Tell those who wait for an answer when the process ends."""
        assert self._process is not None
        message = f"its container ended with {self._process.wait()}:\n{self.log}"
        self._plane.on_loop(self._plane.rpcs.container_ended(self.function_id, message))

    def _arguments(self, function: api.Function) -> bytes:
        definition = api.Function()
        definition.CopyFrom(function)
        definition.is_checkpointing_function = function.checkpointing_enabled
        return api.ContainerArguments(
            task_id=self.task_id,
            function_id=self.function_id,
            app_id=self._deployment.app.id,
            function_def=definition,
            environment_name="main",
            checkpoint_id=self.checkpoint_id,
            app_layout=self._deployment.app.layout,
        ).SerializeToString()

    def _variables(self, function: api.Function) -> dict[str, str]:
        rpcs = self._plane.rpcs
        clients = self._plane.environment()
        kept = {name: value for name, value in clients.items() if not name.startswith("MODAL_TOKEN")}
        own = {
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(self.folder / "arguments"),
            "MODAL_TASK_ID": self.task_id,
            "MODAL_IS_REMOTE": "1",
            "PYTHONPATH": f"{self.home}{os.pathsep}{ROOT}",  # an image has coldstart installed, or uploaded to its home
        }
        if self._checkpoint:
            own |= {
                "MODAL_ENABLE_SNAP_RESTORE": "1",
                "MODAL_RESTORE_STATE_PATH": str(self.folder / "restore-state.json"),
            }
        given = [rpcs.image_variables[function.image_id], *(rpcs.secrets[identity] for identity in function.secret_ids)]
        return {**kept, **own, **{name: text for each in given for name, text in each.items()}, **self._environment}

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        _end_group(self._process.pid)
        self._watcher.join(WAIT_SECONDS)

    @property
    def log(self) -> str:
        """What the process has written so far."""
        return (self.folder / "log").read_text()

    @property
    def pid(self) -> int:
        """The process' id, and its group's."""
        assert self._process is not None
        return self._process.pid

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until ``ready``; fails with the log when the process ends first, or never gets there."""
        assert self._process is not None
        deadline = time.monotonic() + WAIT_SECONDS
        while not ready():
            assert self._process.poll() is None, f"ended with {self._process.returncode} before {what}:\n{self.log}"
            assert not self._plane.troubles, (self._plane.troubles, self.log)
            assert time.monotonic() < deadline, f"never came to {what}:\n{self.log}"
            time.sleep(0.01)

    def wait_checkpoint(self) -> Sight:
        """Wait until the process may be frozen: it has asked for it, and left the plane. What is seen of it then."""
        self.wait(self._plane.rpcs.checkpoints[self.checkpoint_id].is_set, "its checkpoint")
        plane = self._plane.url.rsplit("/", 1)[-1]
        self.wait(lambda: plane not in self.sight().connections, "leaving the plane")
        return self.sight()

    def restore(self, *, same_task: bool = False, **changed: str) -> str:
        """Thaw the process under a new task id (or its own), with ``changed`` variables, named in lower case; the task id."""
        self.task_id = self.task_id if same_task else self._plane.rpcs.new("ta")
        draft = self.folder / "restore-state.draft"
        draft.write_text(json.dumps({"task_id": self.task_id, **changed}))
        draft.rename(self.folder / "restore-state.json")
        return self.task_id

    def sight(self) -> Sight:
        """What is seen of the process now."""
        folder = Path(f"/proc/{self.pid}")
        sockets = set()
        for number in list((folder / "fd").iterdir()):
            with contextlib.suppress(OSError):  # closed meanwhile
                sockets.add(os.readlink(number))
        connections = [
            _address(fields[2])
            for table in ("tcp", "tcp6")
            for fields in map(str.split, (folder / "net" / table).read_text().splitlines()[1:])
            if fields[3] == "01" and f"socket:[{fields[9]}]" in sockets
        ]
        tasks = list((folder / "task").iterdir())
        children = sum(len((task / "children").read_text().split()) for task in tasks)
        return Sight(tuple(connections), len(tasks), children, "libcuda.so" in (folder / "maps").read_text())

    def stop(self) -> int:
        """Tell the container to end, as the platform does when it scales down; its exit status."""
        item = api.FunctionGetInputsItem(kill_switch=True)
        self._plane.on_loop(self._plane.rpcs.queues[self.function_id].put(item))
        return self.wait_end()

    def wait_end(self) -> int:
        """Wait for the process to end by itself; its exit status."""
        assert self._process is not None
        try:
            return self._process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the container did not end:\n{self.log}") from None


def _address(text: str) -> str:
    """``0100007F:1F90`` as ``127.0.0.1:8080``; of an IPv6 address the last four bytes."""
    address, port = text.split(":")
    quad = bytes.fromhex(address[-8:])[::-1]
    return f"{'.'.join(map(str, quad))}:{int(port, 16)}"
