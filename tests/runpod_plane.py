"""RunPod's control plane on this machine: what a queue worker's process talks to, as a server of the standard library.

It gives out jobs by long polls, takes results, stream pieces, progress and pings, and passes on cancellations. It is
strict: whatever a request has that the real plane would not understand is kept in ``violations``, which ``with Plane()``
wants to be empty at its end. Everything that happens is kept in order, with its time, and can be waited for.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import threading
import time
import uuid
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

LIMIT_SECONDS = 60.0
"""How long anything is waited for."""
TICK_SECONDS = 0.05
ENDPOINT = "endpoint-1"
API_KEY = "key-of-the-worker"
GPU = "NVIDIA+GeForce+RTX+4090"
RESULT_FIELDS = {"output", "error", "stopPod", "status"}


class Happening(NamedTuple):
    """Something that a worker did (``take``, ``stop``, ``ping``, ``result``, ``piece``, ``progress``) or was told.

    What it was told: ``give`` a job, ``signal`` a cancellation, ``status`` an answer by script. ``job`` is "" where none is
    meant; times are of ``time.monotonic``.
    """

    kind: str
    seconds: float
    job: str
    data: Any


class Plane:
    """The plane of one endpoint. Its workers come one after another; a job is given to one of them once.

    ``hold_seconds``: how long a poll is held open while there is nothing to tell.
    """

    def __init__(self, *, hold_seconds: float = 1.0) -> None:
        self.hold_seconds = hold_seconds
        self.violations: list[str] = []
        self.obituary: Callable[[], str] = str
        """Says how the worker process ended, "" while it runs: then there is nothing more to wait for."""
        self._changed = threading.Condition()
        self._happenings: list[Happening] = []
        self._waiting: deque[dict[str, Any]] = deque()
        self._taken: set[str] = set()
        self._done: set[str] = set()
        self._signals: list[str] = []
        self._take_statuses: deque[int] = deque()
        self._refused_results = 0
        self._closing = False
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(TICK_SECONDS,), daemon=True)

    # --- its life ------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(LIMIT_SECONDS)
        if kind is None:
            assert self.violations == [], self.violations

    def environment(self) -> dict[str, str]:
        """What the platform sets for a worker of this endpoint. The worker's name, ``RUNPOD_POD_ID``, is not among it."""
        base = f"http://127.0.0.1:{self._server.server_address[1]}/v2/{ENDPOINT}"
        return {
            "RUNPOD_ENDPOINT_ID": ENDPOINT,
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu={GPU}",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu={GPU}",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu={GPU}",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu={GPU}",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_AI_API_KEY": API_KEY,
            "RUNPOD_POD_HOSTNAME": "pod-fake-64410000",
            "RUNPOD_GPU_COUNT": "1",
        }

    # --- what a test tells it --------------------------------------------------------------------------------------------------

    def queue(self, *inputs: Any) -> list[str]:
        """Queue a job for each input, all at once, and return their ids."""
        jobs = [{"id": f"{uuid.uuid4()}-u1", "input": each} for each in inputs]
        with self._changed:
            self._waiting.extend(jobs)
            self._changed.notify_all()
        return [str(job["id"]) for job in jobs]

    def cancel(self, job: str) -> None:
        """Cancel a job: one that waits is dropped, one that was taken is named to the worker's stop poll."""
        with self._changed:
            kept = [each for each in self._waiting if each["id"] != job]
            if len(kept) == len(self._waiting):
                self._signals.append(job)
            self._waiting = deque(kept)
            self._changed.notify_all()

    def script_takes(self, statuses: Sequence[int]) -> None:
        """Answer the next polls for jobs with these statuses, at once."""
        with self._changed:
            self._take_statuses.extend(statuses)
            self._changed.notify_all()

    def refuse_results(self, times: int) -> None:
        """Answer the next results with status 500; they count as not delivered."""
        with self._changed:
            self._refused_results += times

    # --- what a test asks it ---------------------------------------------------------------------------------------------------

    def happenings(self, kind: str, job: str | None = None) -> list[Happening]:
        """All of a kind so far, in order; with ``job`` those of that job."""
        with self._changed:
            return [each for each in self._happenings if each.kind == kind and job in (None, each.job)]

    def wait_for(
        self, kind: str, job: str | None = None, *, count: int = 1, seconds: float = LIMIT_SECONDS
    ) -> Happening:
        """Wait for the ``count``-th happening of a kind, and return it."""
        deadline = time.monotonic() + seconds
        while True:
            obituary = self.obituary()  # before the look: what came last was there when it ended
            found = self.happenings(kind, job)
            if len(found) >= count:
                return found[count - 1]
            assert not obituary, f"no {kind} came ({self.violations or 'no violations'}): {obituary}"
            assert time.monotonic() < deadline, (
                f"no {kind} of {job} in {seconds} s ({self.violations or 'no violations'})"
            )
            with self._changed:
                self._changed.wait(TICK_SECONDS)

    def wait_more(self, kind: str, more: int = 1) -> Happening:
        """Wait for so many happenings of a kind beyond those that were there."""
        return self.wait_for(kind, count=len(self.happenings(kind)) + more)

    def result(self, job: str, *, seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
        """Wait for a job's result: the body of job-done."""
        found: dict[str, Any] = self.wait_for("result", job, seconds=seconds).data["body"]
        return found

    def output(self, job: str, *, seconds: float = LIMIT_SECONDS) -> Any:
        """Wait for a job's output; that it succeeded is asserted."""
        body = self.result(job, seconds=seconds)
        assert set(body) == {"output"}, body
        return body["output"]

    def error(self, job: str, *, seconds: float = LIMIT_SECONDS) -> str:
        """Wait for a job's error, as text."""
        body = self.result(job, seconds=seconds)
        assert "error" in body, body
        return str(body["error"])

    def pieces(self, job: str) -> list[Any]:
        """What a job has streamed so far, in order."""
        return [each.data["output"] for each in self.happenings("piece", job)]

    # --- what a worker asks it -------------------------------------------------------------------------------------------------

    def note(self, kind: str, job: str = "", data: Any = None) -> None:
        """Keep a happening."""
        with self._changed:
            self._happenings.append(Happening(kind, time.monotonic(), job, data))
            self._changed.notify_all()

    def complain(self, what: str) -> None:
        """Keep a violation."""
        with self._changed:
            self.violations.append(what)

    def next_jobs(self, most: int, gone: Callable[[], bool]) -> int | list[dict[str, Any]]:
        """Hold a poll until there are jobs, at most ``most`` of them, or a status to answer with. Nobody who left gets one."""

        def found() -> int | list[dict[str, Any]] | None:
            if self._take_statuses:
                return self._take_statuses.popleft()
            if not self._waiting:
                return None
            jobs = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            self._taken.update(job["id"] for job in jobs)
            return jobs

        answer = self._hold(found, gone)
        for job in answer if isinstance(answer, list) else ():
            self.note("give", job["id"], job)
        if isinstance(answer, int):
            self.note("status", data=answer)
        return 204 if answer is None else answer

    def next_signals(self, gone: Callable[[], bool]) -> list[str]:
        """Hold a stop poll until there are jobs to stop, and return their ids."""

        def found() -> list[str] | None:
            signals, self._signals = self._signals, []
            return signals or None

        signals = self._hold(found, gone) or []
        for job in signals:
            self.note("signal", job)
        return signals

    def _hold(self, found: Callable[[], Any], gone: Callable[[], bool]) -> Any:
        deadline = time.monotonic() + self.hold_seconds
        with self._changed:
            while not (self._closing or gone()):
                answer = found()
                if answer is not None or time.monotonic() >= deadline:
                    return answer
                self._changed.wait(TICK_SECONDS)
        return None

    def take_result(self, job: str, body: dict[str, Any], *, stream: bool) -> int:
        """Take a result or progress. The status to answer with."""
        if body.get("status") == "IN_PROGRESS":
            self.note("progress", job, body.get("output"))
            return 200
        with self._changed:
            if self._refused_results:
                self._refused_results -= 1
                return 500
            again, self._done = job in self._done, self._done | {job}
        if again:
            self.complain(f"a second result of {job}: {body}")
        self.note("result", job, {"body": body, "stream": stream})
        return 200

    def check_job(self, job: str, what: str) -> None:
        """Complain unless ``job`` was given to a worker, and is not done when a piece comes."""
        with self._changed:
            unknown, late = job not in self._taken, what == "piece" and job in self._done
        if unknown:
            self.complain(f"a {what} of job {job!r}, which nobody was given")
        if late:
            self.complain(f"a piece of {job} came after its result")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        super().__init__(("127.0.0.1", 0), _Requests)

    def handle_error(self, request: Any, address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError):  # a worker that ends drops its polls
            self.plane.complain(f"the plane failed: {error!r}")


class _Requests(BaseHTTPRequestHandler):
    """The worker's side of the contract; every method answers exactly once."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  the base class' name
        """Nothing: what happened is kept by the plane."""

    def do_GET(self) -> None:
        """Polls and pings."""
        route, ids, query = self._taken_apart()
        polls = {"job-take": self._take, "job-take-batch": self._take, "job-stop": self._stop, "ping": self._ping}
        if route not in polls or len(ids) != 1:
            self._unknown()
            return
        polls[route](query)

    def do_POST(self) -> None:
        """Results and pieces."""
        route, ids, query = self._taken_apart()
        text = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if route not in ("job-done", "job-stream") or len(ids) != 2:
            self._unknown()
            return
        what, job = "piece" if route == "job-stream" else "result", ids[1]
        self._check(self.headers.get("Content-Type") == "application/x-www-form-urlencoded", "Content-Type")
        self._check(self.headers.get("X-Request-ID") == job, "X-Request-ID")
        self._check(query.get("isStream") in ("true", "false"), "isStream")
        self.server.plane.check_job(job, what)
        try:
            body = strictly_parsed(text)
        except ValueError as error:
            self.server.plane.complain(f"the body of {self.path} is not JSON ({error}): {text[:200]!r}")
            self._answer(400)
            return
        self._check(isinstance(body, dict) and set(body) <= RESULT_FIELDS and bool(body) | (what == "result"), "body")
        if what == "piece":
            self.server.plane.note("piece", job, body)
            self._answer(200, {})
        else:
            status = self.server.plane.take_result(job, body, stream=query.get("isStream") == "true")
            self._answer(status, {} if status == 200 else None)

    def _take(self, query: dict[str, str]) -> None:
        batch = "/job-take-batch/" in self.path
        self._check(query.get("job_in_progress") in ("0", "1"), "job_in_progress")
        self._check(not batch or query.get("batch_size", "").isdigit(), "batch_size")
        self.server.plane.note("take", data=dict(query))
        answer = self.server.plane.next_jobs(int(query.get("batch_size", "1")), self._gone)
        if isinstance(answer, int):
            self._answer(answer)
        else:
            self._answer(200, answer if batch else answer[0])

    def _stop(self, _query: dict[str, str]) -> None:
        self.server.plane.note("stop")
        signals = self.server.plane.next_signals(self._gone)
        self._answer(*(200, {"jobsToStop": signals}) if signals else (204,))

    def _ping(self, query: dict[str, str]) -> None:
        self._check("runpod_version" in query, "runpod_version")
        self.server.plane.note("ping", data=dict(query))
        self._answer(200, {})

    def _taken_apart(self) -> tuple[str, list[str], dict[str, str]]:
        """The route, the ids after it, the query. What every request must have is checked here."""
        parts = urlsplit(self.path)
        version, endpoint, route, *ids = [*parts.path.strip("/").split("/"), "", "", ""][
            : max(3, parts.path.count("/"))
        ]
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self._check((version, endpoint) == ("v2", ENDPOINT) and "$" not in self.path, "path")
        self._check(query.get("gpu") == GPU.replace("+", " "), "gpu")  # lost where a `?` became a second one
        self._check(self.headers.get("Authorization") == API_KEY, "Authorization")
        if route != "ping":
            self._check(self.headers.get("User-Agent", "").startswith("RunPod-Python-SDK/"), "User-Agent")
        return route, ids, query

    def _check(self, right: bool, what: str) -> None:
        if not right:
            self.server.plane.complain(f"{self.command} {self.path}: wrong {what} ({dict(self.headers)})")

    def _unknown(self) -> None:
        self.server.plane.complain(f"{self.command} {self.path} is no path of the plane")
        self._answer(404)

    def _answer(self, status: int, document: Any = None) -> None:
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        if body:
            self.send_header("Content-Type", "application/json")
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _gone(self) -> bool:
        """Whether the worker has closed its end, as it does when it drops a poll."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""


def strictly_parsed(text: bytes) -> Any:
    """JSON as its standard has it: no NaN or infinity, no name twice, UTF-8. Raises ValueError."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name twice in one object")
        return dict(pairs)

    return json.loads(text.decode("utf-8", "strict"), parse_constant=refuse, object_pairs_hook=pairs_once)
