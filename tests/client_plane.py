"""A stand-in for the client plane of RunPod's queue endpoints on loopback: run, status, cancel and health.

Jobs are taken by workers as ``workers`` says, and end as ``ends`` says. Every request is recorded. Nothing here knows coldstart.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self


class Call(NamedTuple):
    """A request that arrived."""

    method: str
    path: str
    body: Any
    authorization: str


class ClientPlane:
    """The plane. Use as a context manager: ``url`` is its address then, as RUNPOD_ENDPOINT_BASE_URL has it.

    A job is IN_QUEUE when first asked for, IN_PROGRESS then, and after that what ``ends`` has for its number: a dict
    that is merged over a completed status. ``stuck`` jobs stay IN_QUEUE. ``health`` is what workers there are, one
    entry for each time that it is asked for; the last stays. ``refusals`` are statuses of the next /run requests.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.jobs: list[dict[str, Any]] = []
        self.ends: dict[int, dict[str, Any]] = {}
        self.stuck: set[int] = set()
        self.cancelled: list[str] = []
        self.health: list[dict[str, int]] = [{"idle": 9, "ready": 9}]
        self.refusals: list[int] = []
        self.arrived = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v2"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, call: Call) -> tuple[int, Any]:
        """Status and body."""
        with self._lock:
            self.calls.append(call)
            if not call.authorization.startswith("Bearer "):
                return 401, {"error": "no key"}
            match = re.fullmatch(r"/v2/([^/]+)/(run|status|cancel|health)(?:/([^/]+))?", call.path)
            if match is None or (match[2] in ("run", "cancel")) != (call.method == "POST"):
                return 404, {"error": "no such route"}
            verb, job = match[2], match[3]
            if verb == "run":
                return self._run(call)
            if verb == "health":
                return 200, {"workers": self.health.pop(0) if len(self.health) > 1 else self.health[0], "jobs": {}}
            if verb == "cancel":
                self.cancelled.append(job)
                return 200, {"id": job, "status": "CANCELLED"}
            return self._status(job)

    def _run(self, call: Call) -> tuple[int, Any]:
        if self.refusals:
            return self.refusals.pop(0), {"error": "told to refuse"}
        if not isinstance(call.body, dict) or "input" not in call.body:
            return 400, {"error": "input is required"}
        number = len(self.jobs)
        self.jobs.append({"id": f"job-{number}", "input": call.body["input"], "asked": 0})
        self.arrived.set()
        return 200, {"id": f"job-{number}", "status": "IN_QUEUE"}

    def _status(self, job: str) -> tuple[int, Any]:
        number = next((index for index, each in enumerate(self.jobs) if each["id"] == job), None)
        if number is None:
            return 404, {"error": "no such job"}
        self.jobs[number]["asked"] += 1
        asked = self.jobs[number]["asked"]
        if number in self.stuck or asked < 3:
            return 200, {"id": job, "status": "IN_PROGRESS" if asked == 2 and number not in self.stuck else "IN_QUEUE"}
        done = {"id": job, "status": "COMPLETED", "delayTime": 1500 + number, "executionTime": 250, "output": {}}
        return 200, {**done, "workerId": f"worker-{number}", **self.ends.get(number, {})}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        plane = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(data) if data else None
                status, answer = plane.answer(
                    Call(self.command, self.path, body, self.headers.get("Authorization", ""))
                )
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = _serve

            def log_message(self, *_: object) -> None:
                """Nothing: ``calls`` has it all."""

        return Handler
