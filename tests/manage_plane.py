"""A stand-in for RunPod's REST v2 on loopback: templates, serverless endpoints and pods, as its reference describes them.

Bodies are checked strictly (an unknown field is a 422), every request is recorded, and the next answers can be told to
fail. Nothing here knows coldstart.
"""

from __future__ import annotations

import json
import re
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self

API_KEY = "rpa_0123456789TESTKEY"
POD_STATUSES = ("PROVISIONING", "STARTING", "RUNNING")
"""A pod is one further with each time that it is asked for."""


class Seen(NamedTuple):
    """A request that arrived."""

    method: str
    path: str
    body: Any
    authorization: str


class Fault(NamedTuple):
    """An answer that a request gets instead of its own. Status 0 hangs up without one."""

    status: int
    body: Any
    headers: dict[str, str]


class Refusal(Exception):
    """A request that the API answers with a problem."""

    def __init__(self, status: int, detail: str, errors: list[str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors


# --- what bodies may be: each check returns what is wrong, "" for nothing --------------------------------------------


def text(value: Any) -> str:
    """A text that is not empty."""
    return "" if isinstance(value, str) and value else "must be a string that is not empty"


def any_text(value: Any) -> str:
    """A text."""
    return "" if isinstance(value, str) else "must be a string"


def nullable(value: Any) -> str:
    """A text or null."""
    return "" if value is None or isinstance(value, str) else "must be a string or null"


def flag(value: Any) -> str:
    """A boolean."""
    return "" if isinstance(value, bool) else "must be a boolean"


def whole(least: int, most: int = 1 << 31) -> Any:
    """A whole number in a range."""

    def check(value: Any) -> str:
        good = type(value) is int and least <= value <= most
        return "" if good else f"must be an integer from {least} to {most}"

    return check


def number(least: float) -> Any:
    """A number of at least ``least``."""
    return lambda value: (
        "" if type(value) in (int, float) and value >= least else f"must be a number of at least {least}"
    )


def one_of(*words: str) -> Any:
    """One of some words."""
    return lambda value: "" if value in words else f"must be one of {', '.join(words)}"


def variables(value: Any) -> str:
    """An environment."""
    good = isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
    return "" if good else "must be an object of strings"


def list_of(item: Any, least: int = 0) -> Any:
    """A list of things that ``item`` checks."""

    def check(value: Any) -> str:
        if not isinstance(value, list) or len(value) < least:
            return f"must be an array of at least {least}"
        return next((problem for problem in map(item, value) if problem), "")

    return check


def record(fields: dict[str, Any], required: tuple[str, ...] = ()) -> Any:
    """An object of known fields."""

    def check(value: Any) -> str:
        if not isinstance(value, dict):
            return "must be an object"
        problems = [f"{key}: unknown property" for key in value if key not in fields]
        problems += [f"{key}: required" for key in required if key not in value]
        problems += [
            f"{key}: {fields[key](each)}" for key, each in value.items() if key in fields and fields[key](each)
        ]
        return "; ".join(problems)

    return check


CUDA = {"allowedCudaVersions": list_of(any_text), "minCudaVersion": any_text}
CONTAINER = {
    "image": text, "args": any_text, "disk": whole(1), "ports": list_of(text), "env": variables, "registry": nullable,
    "entrypoint": list_of(any_text), "cmd": list_of(any_text),
}  # fmt: skip
PERSISTENT = record({"size": whole(10), "path": text}, ("size", "path"))
TEMPLATE = {
    **CONTAINER, "name": text, "serverless": flag, "public": flag, "category": one_of("CPU", "NVIDIA", "AMD"),
    "mounts": record({"persistent": PERSISTENT}), "allowedCudaVersions": list_of(text), "startSsh": flag,
    "startJupyter": flag,
}  # fmt: skip
CPU = record({"id": text, "vcpuCount": whole(2)}, ("id", "vcpuCount"))
ENDPOINT = {
    **CONTAINER, "name": text, "templateId": text, "cpu": list_of(CPU, 1),
    "gpu": record({"pools": list_of(text, 1), "excludedTypes": list_of(text), "count": whole(1), **CUDA}),
    "workers": record({"min": whole(0), "max": whole(0), "idleTimeout": whole(1, 3600)}),
    "scaling": record(
        {"type": one_of("QUEUE_DELAY", "REQUEST_COUNT"), "queueDelay": number(0.5), "requestCount": whole(1)}, ("type",)
    ),
    "dataCenterIds": list_of(text), "networkVolumes": list_of(text), "timeout": whole(1),
    "flashboot": one_of("OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"),
}  # fmt: skip
NETWORK = record({"volumeId": text, "path": text}, ("volumeId", "path"))
POD = {
    **CONTAINER, "name": text, "templateId": text, "cpu": CPU, "cloud": one_of("SECURE", "COMMUNITY"),
    "gpu": record({"id": text, "count": whole(1), **CUDA}, ("id",)), "dataCenterIds": list_of(text),
    "mounts": record({"network": list_of(NETWORK), "persistent": PERSISTENT}), "startSsh": flag, "startJupyter": flag,
}  # fmt: skip

SCHEMAS = {
    ("POST", "templates"): record(TEMPLATE, ("name",)),
    ("PATCH", "templates"): record(TEMPLATE),
    ("POST", "serverless"): record({**ENDPOINT, "type": one_of("QUEUE", "LOAD_BALANCER")}, ("name", "type", "scaling")),
    ("PATCH", "serverless"): record(ENDPOINT),
    ("POST", "pods"): record(POD, ("name",)),
    ("POST", "action"): record({"action": one_of("start", "stop", "restart", "terminate")}, ("action",)),
}
LIST_KEYS = {"templates": "templates", "serverless": "endpoints", "pods": "pods"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "templates": {"args": "", "disk": 10, "ports": [], "env": {}, "registry": None, "serverless": False, "public": False,
                  "category": "NVIDIA", "mounts": {}, "startSsh": True, "startJupyter": True, "allowedCudaVersions": []},
    "serverless": {"args": "", "disk": 10, "ports": [], "env": {}, "registry": None, "dataCenterIds": [],
                   "networkVolumes": [], "timeout": 300000, "flashboot": "OFF"},
    "pods": {"args": "", "disk": 10, "ports": [], "env": {}, "registry": None, "cloud": "SECURE", "mounts": {}},
}  # fmt: skip
ACTIONS = {
    "stop": (("PROVISIONING", "STARTING", "RUNNING"), "EXITED"),
    "start": (("EXITED",), "STARTING"),
    "restart": (("RUNNING",), "STARTING"),
    "terminate": (("PROVISIONING", "STARTING", "RUNNING", "EXITED", "ERROR"), "TERMINATED"),
}
"""Action -> the statuses that it is possible in, and the one that it leads to."""


# --- the server ------------------------------------------------------------------------------------------------------


class ManagePlane:
    """The API. Use as a context manager: ``url`` is its address then.

    ``seen`` are the requests in order; ``templates``, ``endpoints`` and ``pods`` are what is there, by id, and may be
    changed by tests. ``pod_statuses`` is what a new pod goes through.
    """

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.templates: dict[str, dict[str, Any]] = {}
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.pod_statuses: tuple[str, ...] = POD_STATUSES
        self._faults: deque[Fault] = deque()
        self._made = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail_next(self, count: int, status: int, body: Any = None, **headers: str) -> None:
        """Answer the next requests with this instead. Status 0: hang up. ``Retry_After="1"`` is a header."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        problem = {"title": "Told To Fail", "status": status, "detail": "the test said so"} if body is None else body
        self._faults.extend([Fault(status, problem, named)] * count)

    @property
    def writes(self) -> list[Seen]:
        """The requests that are not reads."""
        return [each for each in self.seen if each.method != "GET"]

    # --- answering ---------------------------------------------------------------------------------------------------

    def answer(self, seen: Seen) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers."""
        with self._lock:
            self.seen.append(seen)
            if self._faults:
                return self._faults.popleft()
            try:
                return *self._route(seen), {}
            except Refusal as refusal:
                problem: dict[str, Any] = {"title": f"Status {refusal.status}", "status": refusal.status}
                problem["detail"] = refusal.detail
                if refusal.errors:
                    problem["errors"] = refusal.errors
                return refusal.status, problem, {}

    def _route(self, seen: Seen) -> tuple[int, Any]:
        if not seen.authorization.startswith("Bearer "):
            raise Refusal(401, "missing bearer token")
        if seen.authorization != f"Bearer {API_KEY}":
            raise Refusal(401, "invalid api key")
        match = re.fullmatch(r"/v2/(templates|serverless|pods)(?:/([^/?]+))?(/action)?(?:\?.*)?", seen.path)
        if match is None or (match[3] and match[1] != "pods"):
            raise Refusal(404, "no such route")
        kind, identity, action = match.groups()
        self._check_body(seen, "action" if action else kind)
        if identity is None:
            return self._list(kind) if seen.method == "GET" else self._create(kind, seen)
        there = self._there(kind)
        if identity not in there:
            raise Refusal(404, "resource not found")
        if action:
            return self._act(there[identity], seen.body["action"])
        if seen.method == "DELETE":
            del there[identity]
            return 204, None
        if seen.method == "PATCH":
            self._patch(kind, there[identity], seen.body)
        elif kind == "pods":
            self._progress(there[identity])
        return 200, _public(there[identity])

    def _there(self, kind: str) -> dict[str, dict[str, Any]]:
        return {"templates": self.templates, "serverless": self.endpoints, "pods": self.pods}[kind]

    def _check_body(self, seen: Seen, kind: str) -> None:
        if seen.method in ("GET", "DELETE"):
            return
        schema = SCHEMAS.get((seen.method, kind))
        if schema is None:
            raise Refusal(405, "The requested method is not allowed for this path.")
        problem = schema(seen.body)
        if problem:
            raise Refusal(422, "Request validation failed.", problem.split("; "))

    def _list(self, kind: str) -> tuple[int, Any]:
        return 200, {LIST_KEYS[kind]: [_public(each) for each in self._there(kind).values()]}

    def _create(self, kind: str, seen: Seen) -> tuple[int, Any]:
        if seen.method != "POST":
            raise Refusal(405, "The requested method is not allowed for this path.")
        body = dict(seen.body)
        template = self._template_of(kind, body)
        if kind != "templates":
            if ("gpu" in body) == ("cpu" in body):
                raise Refusal(400, "exactly one of gpu or cpu is required")
            if "image" not in body and not template:
                raise Refusal(400, "image is required unless templateId is set")
        elif any(each["name"] == body["name"] for each in self.templates.values()):
            raise Refusal(409, "a template of this name exists")
        self._made += 1
        identity = f"{kind[:3]}{self._made}"
        made = {**DEFAULTS[kind], **template, **body, "env": {**template.get("env", {}), **body.get("env", {})}}
        made["id"] = identity
        if kind == "serverless":
            self._complete_endpoint(made)
        if kind == "pods":
            made |= {"status": self.pod_statuses[0], "_ahead": list(self.pod_statuses[1:])}
        self._there(kind)[identity] = made
        return 201, _public(made)

    def _template_of(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """What a resource copies from the template that it names."""
        if "templateId" not in body:
            return {}
        template = self.templates.get(body.pop("templateId"))
        if template is None:
            raise Refusal(404, "template not found")
        if kind == "serverless" and not template["serverless"]:
            raise Refusal(422, "Request validation failed.", ["templateId: not a serverless template"])
        return {key: template[key] for key in CONTAINER if key in template}

    @staticmethod
    def _complete_endpoint(made: dict[str, Any]) -> None:
        made["workers"] = {"min": 0, "max": 3, "idleTimeout": 10, **made.get("workers", {})}
        if "gpu" in made:
            made["gpu"] = {"count": 1, "allowedCudaVersions": [], "minCudaVersion": None, **made["gpu"]}
        else:
            made["cpu"] = [{**each, "memory": 2 * each["vcpuCount"]} for each in made["cpu"]]

    def _patch(self, kind: str, there: dict[str, Any], body: dict[str, Any]) -> None:
        for family, other in (("gpu", "cpu"), ("cpu", "gpu")):
            if kind == "serverless" and family in body and there.get(other):
                raise Refusal(400, "compute family is immutable")
        for key, value in body.items():
            partial = key in ("gpu", "workers")
            there[key] = {**there[key], **value} if partial else value

    @staticmethod
    def _act(pod: dict[str, Any], action: str) -> tuple[int, Any]:
        possible, leads_to = ACTIONS[action]
        if pod["status"] not in possible:
            raise Refusal(409, f"a pod that is {pod['status']} cannot {action}")
        pod["status"] = leads_to
        pod["_ahead"] = ["RUNNING"] if leads_to == "STARTING" else []
        return 200, _public(pod)

    @staticmethod
    def _progress(pod: dict[str, Any]) -> None:
        if pod["_ahead"]:
            pod["status"] = pod["_ahead"].pop(0)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        plane = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                data = self.rfile.read(length)
                body = json.loads(data) if data else None
                seen = Seen(self.command, self.path, body, self.headers.get("Authorization", ""))
                status, answer, headers = plane.answer(seen)
                if not status:
                    self.close_connection = True
                    return
                text = (
                    b""
                    if answer is None
                    else answer.encode()
                    if isinstance(answer, str)
                    else json.dumps(answer).encode()
                )
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json" if status < 400 else "application/problem+json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _serve

            def log_message(self, *_: object) -> None:
                """Nothing: ``seen`` has it all."""

        return Handler


def _public(resource: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in resource.items() if not key.startswith("_")}
