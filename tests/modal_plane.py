"""A control plane of Modal on this machine: what its real client deploys to, and what its real container process serves for.

Built from what the ``modal`` package brings along: the service's own gRPC interface and its messages. It holds apps,
hands inputs to containers and outputs to callers, and plays a memory snapshot's checkpoint and restore. It builds no
image and freezes no process. Every call is kept, in order; a call that it does not know fails with the call's name.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import pickle
import shlex
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from google.protobuf.empty_pb2 import Empty
from grpclib.const import Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server
from modal_proto import api_pb2 as api
from modal_proto.api_grpc import ModalClientBase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import modal

ROOT = Path(__file__).parent.parent
WAIT_SECONDS = 60.0
_POLL_SECONDS = 20.0
_DONE = api.GenericResult(status=api.GenericResult.GENERIC_STATUS_SUCCESS)
_ACKNOWLEDGED = {
    "ClientHello": api.ClientHelloResponse(),
    "AppHeartbeat": Empty(),
    "AppClientDisconnect": Empty(),
    "ContainerHello": Empty(),
    "ContainerHeartbeat": api.ContainerHeartbeatResponse(),
    "TaskResult": Empty(),
    "VolumeCommit": api.VolumeCommitResponse(),
}
"""Calls that are only told that they came."""


class Call(NamedTuple):
    """One call that reached the plane."""

    name: str
    request: Any


class Response(NamedTuple):
    """What a web endpoint answered."""

    status: int
    headers: dict[str, str]
    body: bytes


class FunctionCall:
    """One call of a function: what went in, what came out."""

    def __init__(self, identity: str, function_id: str) -> None:
        self.id = identity
        self.function_id = function_id
        self.outputs: list[api.FunctionGetOutputsItem] = []
        self.data_in: list[api.DataChunk] = []
        self.data_out: list[api.DataChunk] = []
        self.changed = asyncio.Condition()

    async def wait(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until ``ready``, for at most ``seconds``."""
        async with self.changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait_for(ready), seconds)

    async def answer(self, output: api.FunctionGetOutputsItem) -> None:
        """The call's result has come."""
        async with self.changed:
            self.outputs.append(output)
            self.changed.notify_all()


class App:
    """What was deployed under one name."""

    def __init__(self, identity: str) -> None:
        self.id = identity
        self.functions: dict[str, api.Function] = {}
        self.layout = api.AppLayout()
        self.requests: list[api.FunctionCreateRequest] = []

    def function_id(self, tag: str) -> str:
        """The id of a function, or of the function that serves a class. Raises NOT_FOUND as the platform does."""
        for name in (tag, f"{tag}.*"):
            if name in self.layout.function_ids:
                return self.layout.function_ids[name]
        raise GRPCError(Status.NOT_FOUND, f"no function {tag!r}")


class _Rpcs:
    """The calls, by their names on the wire; ``_Service`` finds them there. All run on the loop of the plane's thread."""

    def __init__(self) -> None:
        self.apps: dict[str, App] = {}
        self.named: dict[str, str] = {}
        """Deployed name -> app id."""
        self.secrets: dict[str, dict[str, str]] = {}
        """What the secrets hold: by name before a deploy, by id after it."""
        self.files: dict[str, bytes] = {}
        """Uploaded files, by digest."""
        self.mounts: dict[str, dict[str, bytes]] = {}
        """Mount id -> path in a container -> file."""
        self.image_variables: dict[str, dict[str, str]] = {}
        """Image id -> its environment."""
        self.queues: dict[str, asyncio.Queue[api.FunctionGetInputsItem]] = {}
        self.function_calls: dict[str, FunctionCall] = {}
        self.of_input: dict[str, FunctionCall] = {}
        self.checkpoints: dict[str, threading.Event] = {}
        self.refuse_checkpoints = False
        self._numbers = itertools.count(1)

    def new(self, prefix: str) -> str:
        return f"{prefix}-{next(self._numbers)}"

    # --- hello -----------------------------------------------------------------------------------------------------------

    async def AuthTokenGet(self, _: Any) -> Any:
        claims = base64.urlsafe_b64encode(json.dumps({"exp": time.time() + 3600}).encode()).decode().rstrip("=")
        return api.AuthTokenGetResponse(token=f"header.{claims}.signature")

    async def EnvironmentGetOrCreate(self, request: Any) -> Any:
        settings = api.EnvironmentSettings(image_builder_version="2025.06")
        metadata = api.EnvironmentMetadata(name=request.deployment_name, settings=settings)
        return api.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)

    # --- deploy ----------------------------------------------------------------------------------------------------------

    async def AppGetByDeploymentName(self, request: Any) -> Any:
        return api.AppGetByDeploymentNameResponse(app_id=self.named.get(request.name, ""))

    async def AppCreate(self, _: Any) -> Any:
        app = App(self.new("ap"))
        self.apps[app.id] = app
        return api.AppCreateResponse(app_id=app.id, app_page_url="http://127.0.0.1/app")

    async def AppGetLayout(self, request: Any) -> Any:
        return api.AppGetLayoutResponse(app_layout=self.apps[request.app_id].layout)

    async def AppPublish(self, request: Any) -> Any:
        app = self.apps[request.app_id]
        self.named[request.name] = app.id
        app.layout = _layout(app, request)
        return api.AppPublishResponse(url="http://127.0.0.1/deployed", deployed_at=time.time())

    async def ImageGetOrCreate(self, request: Any) -> Any:
        identity = self.new("im")
        below = [self.image_variables[base.image_id] for base in request.image.base_images]
        set_here = (line for line in request.image.dockerfile_commands if line.startswith("ENV "))
        pairs = (word.split("=", 1) for line in set_here for word in shlex.split(line)[1:])
        self.image_variables[identity] = {
            **{name: text for each in below for name, text in each.items()},
            **dict(pairs),
        }
        metadata = api.ImageMetadata(image_builder_version="2025.06")
        return api.ImageGetOrCreateResponse(image_id=identity, result=_DONE, metadata=metadata)

    async def MountBatchedCheckExistence(self, request: Any) -> Any:
        missing = [digest for digest in request.sha256_hex_hashes if digest not in self.files]
        return api.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def MountPutFile(self, request: Any) -> Any:
        self.files[request.sha256_hex] = request.data
        return api.MountPutFileResponse(exists=True)

    async def MountGetOrCreate(self, request: Any) -> Any:
        identity = self.new("mo")
        self.mounts[identity] = {file.filename: self.files[file.sha256_hex] for file in request.files}
        return api.MountGetOrCreateResponse(mount_id=identity, handle_metadata=api.MountHandleMetadata())

    async def VolumeGetOrCreate(self, request: Any) -> Any:
        return api.VolumeGetOrCreateResponse(
            volume_id=self.new("vo"), metadata=_volume_metadata(request.deployment_name)
        )

    async def SecretGetOrCreate(self, request: Any) -> Any:
        name = request.deployment_name
        if name and name not in self.secrets:
            raise GRPCError(Status.NOT_FOUND, f"no secret {name!r}")
        identity = self.new("st")
        self.secrets[identity] = dict(request.env_dict) or dict(self.secrets.get(name, {}))
        return api.SecretGetOrCreateResponse(secret_id=identity)

    async def FunctionPrecreate(self, request: Any) -> Any:
        function = api.Function(function_name=request.function_name, function_type=request.function_type)
        for name, method in request.method_definitions.items():
            function.method_definitions[name].CopyFrom(method)
        identity = request.existing_function_id or self.new("fu")
        return api.FunctionPrecreateResponse(function_id=identity, handle_metadata=_handle(function, identity))

    async def FunctionCreate(self, request: Any) -> Any:
        app = self.apps[request.app_id]
        app.requests.append(request)
        by_rank = request.HasField("function_data")  # several GPU types, in the order of preference
        function = request.function_data.ranked_functions[0].function if by_rank else request.function
        identity = request.existing_function_id or self.new("fu")
        app.functions[identity] = function
        self.queues.setdefault(identity, asyncio.Queue())
        answer = api.FunctionCreateResponse(
            function_id=identity, function=function, handle_metadata=_handle(function, identity)
        )
        if "function_data" in api.FunctionCreateResponse.DESCRIPTOR.fields_by_name:
            answer.function_data.CopyFrom(_data(function))
        return answer

    async def ClassCreate(self, request: Any) -> Any:
        return api.ClassCreateResponse(
            class_id=request.existing_class_id or self.new("cs"), handle_metadata=api.ClassHandleMetadata()
        )

    # --- callers ---------------------------------------------------------------------------------------------------------

    def app_named(self, name: str) -> App:
        if name not in self.named:
            raise GRPCError(Status.NOT_FOUND, f"no app {name!r}")
        return self.apps[self.named[name]]

    async def ClassGet(self, request: Any) -> Any:
        app = self.app_named(request.app_name)
        if request.object_tag not in app.layout.class_ids:
            raise GRPCError(Status.NOT_FOUND, f"no class {request.object_tag!r}")
        return api.ClassGetResponse(
            class_id=app.layout.class_ids[request.object_tag], handle_metadata=api.ClassHandleMetadata()
        )

    async def FunctionGet(self, request: Any) -> Any:
        app = self.app_named(request.app_name)
        identity = app.function_id(request.object_tag)
        function = app.functions[identity]
        answer = api.FunctionGetResponse(function_id=identity, handle_metadata=_handle(function, identity))
        if "function" in api.FunctionGetResponse.DESCRIPTOR.fields_by_name:
            answer.function.CopyFrom(_data(function))
        return answer

    async def FunctionUpdateSchedulingParams(self, request: Any) -> Any:
        return api.FunctionUpdateSchedulingParamsResponse(current_settings=request.settings)

    def new_call(self, identity: str, function_id: str) -> FunctionCall:
        call = self.function_calls[identity] = FunctionCall(identity, function_id)
        return call

    async def container_ended(self, function_id: str, message: str) -> None:
        """Whoever still waits for a container that has ended is told so: they would wait for ever."""
        result = api.GenericResult(status=api.GenericResult.GENERIC_STATUS_FAILURE, exception=message)
        for call in self.function_calls.values():
            if call.function_id == function_id and not call.outputs:
                await call.answer(api.FunctionGetOutputsItem(result=result, data_format=api.DATA_FORMAT_PICKLE))

    async def FunctionMap(self, request: Any) -> Any:
        answer = api.FunctionMapResponse(function_call_id=self.new("fc"), function_call_jwt="jwt")
        call = self.new_call(answer.function_call_id, request.function_id)
        for item in request.pipelined_inputs:
            identity = self.put(request.function_id, call, item.input, request.function_call_invocation_type)
            answer.pipelined_inputs.add(idx=item.idx, input_id=identity, input_jwt="jwt")
        return answer

    def put(self, function_id: str, call: FunctionCall, value: api.FunctionInput, invocation_type: Any) -> str:
        """Queue an input of a call for the function's container."""
        identity = self.new("in")
        self.of_input[identity] = call
        item = api.FunctionGetInputsItem(
            input_id=identity,
            function_call_id=call.id,
            input=value,
            function_call_invocation_type=invocation_type,
        )
        self.queues[function_id].put_nowait(item)
        return identity

    async def FunctionGetOutputs(self, request: Any) -> Any:
        call = self.function_calls[request.function_call_id]
        await call.wait(lambda: bool(call.outputs), min(request.timeout, 55.0))
        return api.FunctionGetOutputsResponse(outputs=call.outputs, num_unfinished_inputs=int(not call.outputs))

    async def FunctionCallGetDataOut(self, request: Any) -> Any:
        call = self.function_calls[request.function_call_id]
        await call.wait(lambda: len(call.data_out) > request.last_index or bool(call.outputs), _POLL_SECONDS)
        for chunk in call.data_out[request.last_index :]:
            yield chunk  # whoever wants more asks again

    # --- containers ------------------------------------------------------------------------------------------------------

    async def ContainerCheckpoint(self, request: Any) -> Any:
        if self.refuse_checkpoints:
            raise GRPCError(Status.FAILED_PRECONDITION, "no snapshots today")
        self.checkpoints[request.checkpoint_id].set()
        return Empty()

    async def FunctionGetInputs(self, request: Any) -> Any:
        with contextlib.suppress(TimeoutError):
            item = await asyncio.wait_for(self.queues[request.function_id].get(), _POLL_SECONDS)
            return api.FunctionGetInputsResponse(inputs=[item])
        return api.FunctionGetInputsResponse()

    async def FunctionGetDynamicConcurrency(self, request: Any) -> Any:
        return api.FunctionGetDynamicConcurrencyResponse(concurrency=request.target_concurrency)

    async def FunctionPutOutputs(self, request: Any) -> Any:
        for item in request.outputs:
            call = self.of_input[item.input_id]
            output = api.FunctionGetOutputsItem(
                result=item.result, idx=0, input_id=item.input_id, data_format=item.data_format
            )
            await call.answer(output)
        return Empty()

    async def FunctionCallGetDataIn(self, request: Any) -> Any:
        call = self.function_calls[request.function_call_id]
        for chunk in call.data_in[request.last_index :]:
            yield chunk
        await call.wait(lambda: bool(call.outputs), _POLL_SECONDS)

    async def FunctionCallPutDataOut(self, request: Any) -> Any:
        call = self.function_calls[request.function_call_id]
        async with call.changed:
            call.data_out.extend(request.data_chunks)
            call.changed.notify_all()
        return Empty()


def _volume_metadata(name: str) -> api.VolumeMetadata:
    return api.VolumeMetadata(version=api.VOLUME_FS_VERSION_V1, name=name)


def _data(function: api.Function) -> api.FunctionData:
    """A function as newer clients read it back."""
    ranked = api.FunctionData.RankedFunction(rank=0, function=function)
    return api.FunctionData(
        module_name=function.module_name,
        function_name=function.function_name,
        is_class=function.is_class,
        autoscaler_settings=function.autoscaler_settings,
        timeout_secs=function.timeout_secs,
        ranked_functions=[ranked],
    )


def _handle(function: api.Function, identity: str) -> api.FunctionHandleMetadata:
    """What a caller has to know of a function, and of the methods of a class."""
    found = api.FunctionHandleMetadata(
        function_name=function.function_name,
        function_type=function.function_type,
        definition_id=f"de-{identity}",
        class_parameter_info=function.class_parameter_info,
        function_schema=function.function_schema,
        supported_input_formats=function.supported_input_formats,
        supported_output_formats=function.supported_output_formats,
    )
    for name, method in function.method_definitions.items():
        found.method_handle_metadata[name].CopyFrom(
            api.FunctionHandleMetadata(
                function_name=method.function_name,
                function_type=method.function_type,
                is_method=True,
                use_method_name=name,
                definition_id=f"de-{identity}",
                class_parameter_info=function.class_parameter_info,
                function_schema=method.function_schema,
                supported_input_formats=method.supported_input_formats,
                supported_output_formats=method.supported_output_formats,
                web_url=f"https://{name}.modal.invalid" if method.webhook_config.type else "",
            )
        )
    return found


def _layout(app: App, request: api.AppPublishRequest) -> api.AppLayout:
    """What containers are told of the app: its functions and classes, and what those need."""
    layout = api.AppLayout(function_ids=request.function_ids, class_ids=request.class_ids)
    for identity in request.function_ids.values():
        function = app.functions[identity]
        layout.objects.add(object_id=identity, function_handle_metadata=_handle(function, identity))
        for needed in function.object_dependencies:
            if needed.object_id.startswith("vo-"):
                layout.objects.add(object_id=needed.object_id, volume_metadata=_volume_metadata(""))
            elif needed.object_id.startswith("mo-"):
                layout.objects.add(object_id=needed.object_id, mount_handle_metadata=api.MountHandleMetadata())
            else:
                layout.objects.add(object_id=needed.object_id)
    for identity in request.class_ids.values():
        layout.objects.add(object_id=identity, class_handle_metadata=api.ClassHandleMetadata())
    return layout


async def _send(stream: Any, name: str, found: Any) -> None:
    """Send what a call's work comes to: one message, or several."""
    if hasattr(found, "__aiter__"):
        async for message in found:
            await stream.send_message(message)
    elif found is not None:
        await stream.send_message(await found)
    elif name in _ACKNOWLEDGED:
        await stream.send_message(_ACKNOWLEDGED[name])
    else:
        raise GRPCError(Status.UNIMPLEMENTED, name)


class _Service(ModalClientBase):
    """All calls of the interface: those of ``_Rpcs`` are answered, the others refused by name. Each is kept."""

    def __init__(self, rpcs: _Rpcs) -> None:
        self.rpcs = rpcs
        self.calls: list[Call] = []
        self.troubles: list[str] = []

    def __mapping__(self) -> dict[str, Handler]:
        return {
            path: handler._replace(func=self._answering(path.rsplit("/", 1)[-1]))
            for path, handler in super().__mapping__().items()
        }

    def _answering(self, name: str) -> Callable[[Any], Any]:
        work = getattr(self.rpcs, name, None)

        async def answer(stream: Any) -> None:
            request = await stream.recv_message()
            self.calls.append(Call(name, request))
            try:
                await _send(stream, name, work and work(request))
            except GRPCError as error:
                if error.status is Status.UNIMPLEMENTED:
                    self.troubles.append(f"the plane does not know the call {name}")
                raise
            except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
                self.troubles.append(f"{name} failed: {error!r}")
                raise

        return answer


_Service.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]  # what is not in _Rpcs is refused by name


class Plane:
    """The control plane, running in a thread. ``calls`` are what reached it, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rpcs = _Rpcs()
        self._service = _Service(self.rpcs)
        self.calls = self._service.calls
        self.troubles = self._service.troubles
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="modal-plane", daemon=True)
        self._server: Server | None = None
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()

        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        async def start() -> None:
            self._server = Server([self._service])
            await self._server.start(sock=listener)

        self.on_loop(start())
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            assert self._server is not None
            self._server.close()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
            await self._loop.shutdown_asyncgens()

        self.on_loop(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_SECONDS)
        self._loop.close()

    def on_loop(self, work: Any) -> Any:
        """The result of a coroutine on the plane's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_SECONDS)

    def names(self, since: int = 0) -> list[str]:
        """The names of the calls, from one on."""
        return [call.name for call in self.calls[since:]]

    def requests(self, name: str) -> list[Any]:
        """The requests of all calls of that name."""
        return [call.request for call in self.calls if call.name == name]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a client's process: nothing of Modal's but the way to this plane."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("MODAL_")
            and not name.lower().endswith("_proxy")
            and name != "PYTHONDONTWRITEBYTECODE"
        }
        own = {
            "MODAL_SERVER_URL": self.url,
            "MODAL_TOKEN_ID": "ak-1",
            "MODAL_TOKEN_SECRET": "as-1",
            "MODAL_ENVIRONMENT": "main",
            "MODAL_CONFIG_PATH": str(self.folder / "no-modal.toml"),
            "PYTHONPATH": str(ROOT),
        }
        return {**kept, **own, **(extra or {})}

    @contextlib.contextmanager
    def client(self) -> Iterator[modal.Client]:
        """The real client of a caller, in this process."""
        import modal

        before = dict(os.environ)
        try:
            os.environ.update({name: value for name, value in self.environment().items() if name.startswith("MODAL_")})
            client = modal.Client.from_credentials("ak-1", "as-1")
            try:
                yield client
            finally:
                client.close()
        finally:
            for name in set(os.environ) - set(before):
                del os.environ[name]

    def request(self, app: App, name: str, method: str, *, verb: str, **parts: bytes) -> Response:
        """An HTTP request to a web endpoint, as Modal's front end hands it to a container."""
        call = self.rpcs.new_call(self.rpcs.new("fc"), app.function_id(name))
        body = api.Asgi(http_request=api.Asgi.HttpRequest(body=parts.get("body", b"")))
        call.data_in = [api.DataChunk(data_format=api.DATA_FORMAT_ASGI, data=body.SerializeToString(), index=1)]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": verb,
            "scheme": "https",
            "path": "/",
            "raw_path": b"/",
            "query_string": parts.get("query", b""),
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"web.modal.invalid")],
            "client": ("127.0.0.1", 1),
            "server": ("web.modal.invalid", 443),
        }
        value = api.FunctionInput(
            args=pickle.dumps(((scope,), {}), 4), data_format=api.DATA_FORMAT_PICKLE, method_name=method
        )

        async def ask() -> list[Any]:
            self.rpcs.put(call.function_id, call, value, api.FUNCTION_CALL_INVOCATION_TYPE_SYNC)
            await call.wait(lambda: bool(call.outputs), WAIT_SECONDS)
            return [api.Asgi.FromString(chunk.data) for chunk in call.data_out]

        return _response(self.on_loop(ask()))


def _response(messages: list[Any]) -> Response:
    start = next((message.http_response_start for message in messages if message.HasField("http_response_start")), None)
    assert start is not None, "the web endpoint did not answer"
    flat = [text.decode() if isinstance(text, bytes) else text for text in start.headers]
    headers = dict(zip(flat[::2], flat[1::2], strict=True))
    body = b"".join(message.http_response_body.body for message in messages)
    return Response(start.status, headers, body)
