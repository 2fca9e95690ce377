"""Serving over HTTP: answers, streams, health, limits, and an end that finishes what runs."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart import coldstart
from coldstart.adapters.http import Address, HttpService, address_of
from coldstart.cli import main
from coldstart.errors import ConfigError, UsageError
from coldstart.registry import worker_for
from tests.starts import SCALED, SCALES, Project

END_SECONDS = 60.0


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Workers of these tests keep no snapshots and write no log lines."""
    monkeypatch.setenv("COLDSTART_STORE", "off")
    monkeypatch.setenv("COLDSTART_LOG", "off")


class Server:
    """A service of this process with its handler, and requests to it."""

    def __init__(self, handler, **options):
        self.service = HttpService(Address("127.0.0.1", 0), **options)
        self.handler = handler
        self.thread = threading.Thread(target=self._serve)
        self.worker = worker_for(handler.__coldstart__)

    def _serve(self):
        self.service.serve(self.handler.__coldstart__, self.handler)

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=END_SECONDS)

    def get(self, path):
        return self.request("GET", path)

    def post(self, document, path="/run"):
        body = document if isinstance(document, bytes) else json.dumps(document)
        return self.request("POST", path, body)

    def request(self, *arguments, **options):
        """Status, headers and document (or text) of one answer."""
        connection = self.connect()
        try:
            connection.request(*arguments, **options)
            return read(connection.getresponse())
        finally:
            connection.close()

    def raw(self, data):
        """All that comes back for raw bytes, until the server closes the connection."""
        with socket.create_connection(("127.0.0.1", self.service.port), timeout=END_SECONDS) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while piece := connection.recv(65536):
                received += piece
        return received

    def ready(self):
        self.worker.wait()
        return self

    def end(self):
        self.service.stop()
        self.thread.join(END_SECONDS)
        assert not self.thread.is_alive()


def read(answer):
    """Status, headers and document of an answer; of a stream the list of its lines."""
    text = answer.read().decode()
    lines = [json.loads(line) for line in text.splitlines()] if text else [None]
    stream = answer.headers["Content-Type"] == "application/x-ndjson"
    return answer.status, answer.headers, lines if stream else lines[0]


@contextmanager
def serving(function, *, options=None, **decorator):
    """A server of the function as a handler whose state is the number 10."""
    handler = coldstart("served", **{"load": lambda: 10, **decorator})(function)
    server = Server(handler, **(options or {}))
    server.thread.start()
    try:
        yield server
    finally:
        server.end()


def add(event, model):
    """A handler."""
    return event["input"] + model


async def add_async(event, model):
    """A handler on the loop."""
    await asyncio.sleep(0)
    return event["input"] + model


def count(event, model):
    """A stream."""
    for number in range(event["input"]):
        yield number + model


async def count_async(event, model):
    """A stream on the loop."""
    for number in range(event["input"]):
        await asyncio.sleep(0)
        yield number + model


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [add, add_async])
def test_an_event_is_answered_with_its_id(function):
    """The answer carries the event's own id; one connection serves several events."""
    with serving(function) as server:
        connection = server.connect()
        for number in (1, 2):
            connection.request("POST", "/run", json.dumps({"id": f"e{number}", "input": number}))
            status, headers, document = read(connection.getresponse())
            assert (status, headers["Content-Type"]) == (200, "application/json")
            assert document == {"id": f"e{number}", "output": 10 + number}
        connection.close()


def test_an_event_without_an_id_gets_one():
    """The handler sees the id that the answer carries, as on a platform that makes ids."""
    with serving(lambda event, model: event["id"]) as server:
        first, second = (server.post({"input": 1})[2] for _ in range(2))
    assert first["id"] == first["output"]
    assert first["id"] != second["id"]


@pytest.mark.parametrize("function", [count, count_async])
def test_a_stream_is_chunked_lines(function):
    """Pieces are lines, the answer is the last; nothing at all is one line too."""
    with serving(function) as server:
        status, headers, lines = server.post({"id": 7, "input": 2})
        assert (status, headers["Transfer-Encoding"]) == (200, "chunked")
        assert lines == [{"id": 7, "piece": 10}, {"id": 7, "piece": 11}, {"id": 7, "output": [10, 11]}]
        assert server.post({"id": 7, "input": 0})[2] == [{"id": 7, "output": []}]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_pieces_come_as_they_are_made(kind):
    """The first piece is there while the generator still works on the second."""
    go_on = threading.Event()

    def pieces(event, model):
        yield 1
        assert go_on.wait(END_SECONDS)
        yield 2

    async def pieces_async(event, model):
        yield 1
        await asyncio.to_thread(go_on.wait, END_SECONDS)
        yield 2

    with serving(pieces if kind == "sync" else pieces_async) as server:
        connection = server.connect()
        connection.request("POST", "/run", '{"id": 1, "input": 0}')
        answer = connection.getresponse()
        assert json.loads(answer.readline()) == {"id": 1, "piece": 1}
        go_on.set()
        assert [json.loads(line) for line in answer] == [{"id": 1, "piece": 2}, {"id": 1, "output": [1, 2]}]
        connection.close()


def test_an_old_client_gets_a_stream_without_chunks():
    """HTTP/1.0 knows no chunks: the lines come as they are, and the connection's end is the stream's."""
    with serving(count) as server:
        body = b'{"id": 1, "input": 1}'
        received = server.raw(b"POST /run HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    head, _, lines = received.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert [json.loads(line) for line in lines.splitlines()] == [{"id": 1, "piece": 10}, {"id": 1, "output": [10]}]


def test_async_answers_and_hooks_share_one_loop_and_thread():
    """load, init, handler and close of an async handler run on one loop, whichever connection asks."""
    seen = []

    async def hook(*_arguments):
        seen.append((asyncio.get_running_loop(), threading.get_ident()))
        return 10

    async def handler(event, model):
        return await hook()

    with serving(handler, load=hook, init=hook, close=hook) as server:
        for _ in range(2):
            assert server.post({"input": 0})[2]["output"] == 10
    assert len(seen) == 5
    assert len(set(seen)) == 1


@pytest.mark.parametrize("function", [add, add_async])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_events_at_a_time(function, concurrency):
    """As many events are answered at a time as the handler declares, and no more."""
    lock, active, peak = threading.Lock(), 0, 0
    full = threading.Event()

    def enter():
        nonlocal active, peak
        with lock:
            active += 1
            peak = max(peak, active)
            if active == concurrency:
                full.set()

    def leave():
        nonlocal active
        with lock:
            active -= 1

    def handler(event, model):
        enter()
        assert full.wait(END_SECONDS)
        leave()

    async def handler_async(event, model):
        enter()
        await asyncio.to_thread(full.wait, END_SECONDS)
        leave()

    with serving(handler if function is add else handler_async, concurrency=concurrency) as server:
        threads = [threading.Thread(target=server.post, args=({"input": 1},)) for _ in range(2 * concurrency)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(END_SECONDS)
    assert peak == concurrency


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "identity", "told"),
    [
        (b"{nonsense", None, "the body is not JSON: "),
        (b'{"id": 1, "input": "\xff"}', None, "the body is not JSON: "),
        (b"[" * 100_000, None, "the body is not JSON: "),
        (b"[1]", None, 'an event is an object with an input, such as {"input": ...}, not a list'),
        (b'{"id": 7, "inputs": 1}', 7, "the event has no input (it has id, inputs)"),
        (b'{"id": NaN, "inputs": 1}', None, "the event has no input (it has id, inputs)"),
    ],
)
def test_what_is_no_event_is_400(body, identity, told):
    """A bad body is answered with an EventError, and the connection serves on."""
    with serving(add) as server:
        connection = server.connect()
        connection.request("POST", "/run", body)
        status, _, document = read(connection.getresponse())
        assert (status, document["id"], document["error"]["type"]) == (400, identity, "EventError")
        assert told in document["error"]["message"]
        connection.request("POST", "/run", '{"input": 1}')
        assert read(connection.getresponse())[2]["output"] == 11
        connection.close()


def leave(event, model):
    """A handler that means to end the process."""
    raise SystemExit(3)


async def leave_async(event, model):
    """The same on the loop."""
    raise SystemExit(3)


class Panic(BaseException):
    """As libraries written in Rust raise it: no Exception."""


def panic(event, model):
    """Panics."""
    raise Panic


async def panic_async(event, model):
    """Panics on the loop."""
    raise Panic


async def interrupt_async(event, model):
    """What would end the loop."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("function", "value", "told"),
    [
        (add, "text", "TypeError"),
        (add_async, "text", "TypeError"),
        (count, "text", "TypeError"),
        (count_async, "text", "TypeError"),
        (leave, 0, "SystemExit"),
        (leave_async, 0, "SystemExit"),
        (panic, 0, "Panic"),
        (panic_async, 0, "Panic"),
        (interrupt_async, 0, "KeyboardInterrupt"),
        (lambda event, model: {1}, 0, "HandlerError"),
        (lambda event, model: float("nan"), 0, "HandlerError"),
    ],
)
def test_a_failing_handler_is_500(function, value, told):
    """What the handler raises is the answer, under the event's id; the next event is served all the same."""
    with serving(function) as server:
        for _ in range(2):
            status, headers, document = server.post({"id": "e", "input": value})
            assert (status, document["id"], document["error"]["type"]) == (500, "e", told)
            assert headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("last", [lambda: {1}, lambda: {}["lost"]])
def test_an_error_amid_a_stream_is_its_last_line(last):
    """Pieces that were sent stay sent; the connection stays in step."""

    def pieces(event, model):
        yield 1
        yield last()

    with serving(pieces) as server:
        connection = server.connect()
        for _ in range(2):
            connection.request("POST", "/run", '{"id": 1, "input": 0}')
            status, _, lines = read(connection.getresponse())
            assert (status, lines[0]) == (200, {"id": 1, "piece": 1})
            assert [set(line) for line in lines[1:]] == [{"id", "error"}]
        connection.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_reader_that_leaves_ends_the_stream(kind):
    """The user's generator is ended, its place is free, and nothing is counted as failed."""
    closed = threading.Event()

    def pieces(event, model):
        try:
            while event["input"]:
                yield "x" * 65536
        finally:
            closed.set()

    async def pieces_async(event, model):
        try:
            while event["input"]:
                yield "x" * 65536
                await asyncio.sleep(0)
        finally:
            closed.set()

    with serving(pieces if kind == "sync" else pieces_async) as server:
        connection = server.connect()
        connection.request("POST", "/run", '{"input": 1}')
        answer = connection.getresponse()
        answer.readline()
        answer.close()
        connection.close()
        assert closed.wait(END_SECONDS)
        assert server.post({"input": 0})[0] == 200
        assert server.worker.stats.failed == 0


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Content-Length: 101", 413),
        ("Content-Length: " + "9" * 5000, 413),
        ("Content-Length: -1", 400),
        ("Content-Length: 1e3", 400),
        ("Content-Length: \u0661", 400),
        ("Content-Length: 90", 400),
        ("Transfer-Encoding: chunked", 411),
        ("Transfer-Encoding: chunked\r\nContent-Length: 5", 411),
        ("X-Nothing: 1", 411),
    ],
)
def test_a_body_that_cannot_be_taken_is_refused(headers, status):
    """Too long, of unknown or false length, cut off: refused without reading on, and the connection is closed."""
    with serving(add, options={"most_body_bytes": 100}) as server:
        received = server.raw(f"POST /run HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\nhello".encode())
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"Connection: close" in head
    assert received.count(b"HTTP/1.1") == 1
    assert json.loads(body)["error"]["type"] == "Refused"


def test_too_many_that_wait_are_told_to_come_again():
    """With every place taken, so many events wait; the next gets 503 with Retry-After, and the others their answers."""
    go_on, working = threading.Event(), threading.Event()

    def handler(event, model):
        working.set()
        assert go_on.wait(END_SECONDS)
        return event["input"]

    answers = []
    with serving(handler, options={"most_waiting": 2}) as server:
        threads = [threading.Thread(target=lambda: answers.append(server.post({"input": 1})[::2])) for _ in range(3)]
        threads[0].start()
        assert working.wait(END_SECONDS)
        for thread in threads[1:]:
            thread.start()
        wait_for(lambda: server.service.admission.waiting == 2)
        status, headers, document = server.post({"id": "late", "input": 1})
        go_on.set()
        for thread in threads:
            thread.join(END_SECONDS)
    assert (status, headers["Retry-After"], document["id"]) == (503, "2", "late")
    assert [(status, document["output"]) for status, document in answers] == [(200, 1)] * 3


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("GET", "/", 404, "there are POST /run, GET /ping and GET /metrics.json"),
        ("POST", "/other", 404, "there are POST /run"),
        ("GET", "/run", 405, "/run takes POST"),
        ("POST", "/ping", 405, "/ping takes GET"),
        ("POST", "/metrics.json?x=1", 405, "/metrics.json takes GET"),
    ],
)
def test_other_paths_and_methods_are_told(method, path, status, told):
    """Whoever errs hears what there is."""
    with serving(add) as server:
        found, _, document = server.request(method, path, b"{}" if method == "POST" else None)
    assert found == status
    assert told in document["error"]["message"]


# --- the start -------------------------------------------------------------------------------------------------------


def test_ping_follows_the_start():
    """204 before there is a handler and while it starts, 200 when it is ready; events that came early are answered."""
    go_on, loading = threading.Event(), threading.Event()

    def load():
        loading.set()
        assert go_on.wait(END_SECONDS)
        return 10

    server = Server(coldstart("served", load=load)(add))
    answers = []
    early = threading.Thread(target=lambda: answers.append(server.post({"id": 1, "input": 1})[::2]))
    early.start()
    wait_for(lambda: server.service.admission.waiting == 1)
    assert server.get("/ping")[::2] == (204, None)
    assert server.get("/metrics.json")[2] == {"state": "new", "waiting": 1}
    server.thread.start()
    assert loading.wait(END_SECONDS)
    status, headers, document = server.get("/ping")
    assert (status, document, headers["Content-Length"]) == (204, None, None)
    go_on.set()
    early.join(END_SECONDS)
    assert answers == [(200, {"id": 1, "output": 11})]
    assert server.get("/ping")[::2] == (200, {"state": "ready"})
    server.end()


def test_a_failed_start_is_503_and_its_events_500():
    """A worker that cannot start says so to whoever asks for its health, and tells each event why."""

    def load():
        raise OSError("no disk")

    with serving(add, load=load) as server:
        status, _, document = server.post({"input": 1})
        assert (status, document["error"]["type"]) == (500, "PhaseError")
        assert "no disk" in document["error"]["message"]
        assert server.get("/ping")[::2] == (503, {"state": "failed"})


def test_metrics_show_the_start_and_the_counts():
    """How the worker started, how many events it served and failed, and its durations."""
    with serving(add) as server:
        server.post({"input": 1})
        server.post({"input": "x"})
        status, _, document = server.get("/metrics.json")
    assert status == 200
    assert document["stats"] == {"served": 2, "failed": 1, "in_flight": 0}
    assert (document["name"], document["state"], document["waiting"]) == ("served", "ready", 0)
    assert document["start"]["kind"] == "cold"
    assert document["metrics"]["warm"]["count"] == 2


def test_the_health_check_may_have_a_port_and_a_path_of_its_own(monkeypatch):
    """A load balancer that asks elsewhere for health is answered there."""
    monkeypatch.setenv("HEALTH_CHECK_PATH", "/healthy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = HttpService(Address("127.0.0.1", 0, port))
    try:
        for path in ("/healthy", "/ping"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=END_SECONDS)
            connection.request("GET", path)
            assert connection.getresponse().status == 204
            connection.close()
    finally:
        service.close()


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "async", "generator"])
def test_the_end_finishes_what_runs_and_refuses_what_waits(kind):
    """The event in progress is answered in full, one that waits gets 503, new connections none; then all is closed."""
    go_on, working, closed = threading.Event(), threading.Event(), []

    def handler(event, model):
        working.set()
        assert go_on.wait(END_SECONDS)
        return "done"

    async def handler_async(event, model):
        working.set()
        await asyncio.to_thread(go_on.wait, END_SECONDS)
        return "done"

    def stream(event, model):
        yield handler(event, model)

    function = {"sync": handler, "async": handler_async, "generator": stream}[kind]
    server = Server(coldstart("served", load=lambda: 10, close=closed.append)(function))
    server.thread.start()
    answers = {}

    def post(name):
        answers[name] = server.post({"id": name, "input": 1})

    running, waiting = (threading.Thread(target=post, args=(name,)) for name in ("running", "waiting"))
    running.start()
    assert working.wait(END_SECONDS)
    waiting.start()
    wait_for(lambda: server.service.admission.waiting == 1)
    idle = server.connect()
    idle.request("GET", "/ping")
    assert read(idle.getresponse())[0] == 200
    server.service.stop()
    waiting.join(END_SECONDS)
    idle.request("GET", "/ping")
    assert read(idle.getresponse())[::2] == (503, {"state": "closing"})
    idle.request("POST", "/run", '{"input": 1}')
    assert read(idle.getresponse())[0] == 503
    idle.close()
    with pytest.raises(OSError):
        server.get("/ping")
    assert not closed
    go_on.set()
    running.join(END_SECONDS)
    server.thread.join(END_SECONDS)
    status, _, document = answers["running"]
    assert (status, document[-1] if kind == "generator" else document) == (
        200,
        {"id": "running", "output": ["done"] if kind == "generator" else "done"},
    )
    status, headers, document = answers["waiting"]
    assert (status, headers["Retry-After"], headers["Connection"], document["id"]) == (503, "2", "close", "waiting")
    assert closed == [10]
    assert server.worker.state == "closed"


def test_the_end_does_not_wait_for_a_start():
    """An event that waits for a start under way is told to come again, and the start is left."""
    go_on, loading = threading.Event(), threading.Event()

    def load():
        loading.set()
        go_on.wait(END_SECONDS)
        return 10

    server = Server(coldstart("served", load=load)(add))
    server.thread.start()
    answers = []
    early = threading.Thread(target=lambda: answers.append(server.post({"id": 1, "input": 1})))
    early.start()
    assert loading.wait(END_SECONDS)
    wait_for(lambda: server.service.admission._present == 1)
    server.end()
    early.join(END_SECONDS)
    go_on.set()
    assert [(status, headers["Retry-After"]) for status, headers, _ in answers] == [(503, "2")]


def test_a_worker_process_serves_and_ends_with_sigterm(tmp_path):
    """``coldstart serve FILE --http`` answers at PORT, makes its snapshot, finishes what runs at SIGTERM and exits 0."""
    project = Project(tmp_path)
    project.write(
        SCALES.replace("    value =", "    import time; time.sleep(event['input'].get('seconds', 0))\n    value =")
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ("-m", "coldstart", "serve", "handler.py", "--http")
    environment = {"PORT": port, "COLDSTART_STORE": f"file://{project.store}"}
    process = project.popen(*words, environment=environment, start_new_session=True)
    try:
        assert process.stderr.readline() == f"coldstart: serving at http://0.0.0.0:{port}\n"
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=END_SECONDS)
        connection.request("POST", "/run", '{"id": 1, "input": {"x": 2}}')
        assert read(connection.getresponse())[2] == {"id": 1, "output": SCALED}
        wait_for(lambda: project.objects("refs/scales"))
        connection.request("POST", "/run", '{"id": 2, "input": {"x": 2, "seconds": 1}}')
        wait_for(lambda: in_flight(port) == 1)
        process.send_signal(signal.SIGTERM)
        assert read(connection.getresponse())[2] == {"id": 2, "output": SCALED}
        connection.close()
        assert process.wait(END_SECONDS) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def in_flight(port):
    """How many events the worker at ``port`` is answering."""
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=END_SECONDS)
    connection.request("GET", "/metrics.json")
    document = read(connection.getresponse())[2]
    connection.close()
    return document["stats"]["in_flight"]


def wait_for(condition):
    """Wait until something holds."""
    deadline = time.monotonic() + END_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "variables", "address"),
    [
        ("127.0.0.1:8000", {"PORT": "9"}, ("127.0.0.1", 8000, 0)),
        (":80", {}, ("0.0.0.0", 80, 0)),
        ("8080", {}, ("0.0.0.0", 8080, 0)),
        ("[::1]:8000", {}, ("::1", 8000, 0)),
        ("", {}, ("0.0.0.0", 8000, 0)),
        ("", {"PORT": " 5000 "}, ("0.0.0.0", 5000, 0)),
        ("", {"PORT": "5000", "PORT_HEALTH": "5000"}, ("0.0.0.0", 5000, 0)),
        ("", {"PORT": "5000", "PORT_HEALTH": "5001"}, ("0.0.0.0", 5000, 5001)),
    ],
)
def test_addresses_are_read(text, variables, address, monkeypatch):
    """A given address wins; without one the platform's variables do, then port 8000 on every interface."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert address_of(text) == address


@given(st.text(max_size=8).filter(lambda text: not text.rpartition(":")[2].isdigit() and text))
def test_other_addresses_are_refused(text):
    """Whatever has no port is refused by name."""
    with pytest.raises(UsageError, match="give HOST:PORT"):
        address_of(text)


@pytest.mark.parametrize("text", ["http", "0", "65536", "-1", "٣"])
def test_a_port_that_is_none_is_told(text, monkeypatch):
    """A PORT that cannot be one is an error with its name and value."""
    monkeypatch.setenv("PORT", text)
    with pytest.raises(ConfigError, match=f"PORT='{text}' cannot be used"):
        address_of("")


def test_a_port_that_is_taken_is_told(tmp_path, capsys):
    """Before anything is imported: one line, and status 1."""
    (tmp_path / "handler.py").write_text("raise AssertionError")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status = main(["serve", str(tmp_path / "handler.py"), "--http", f"127.0.0.1:{taken.getsockname()[1]}"])
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith("coldstart: UsageError: cannot listen at 127.0.0.1:")
