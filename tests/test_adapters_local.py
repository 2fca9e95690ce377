"""Serving on this machine: lines in, answers out, in order; and an end that finishes what is in progress."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from coldstart import coldstart
from coldstart.adapters import serve as serve_somewhere
from coldstart.adapters.local import serve
from coldstart.errors import PhaseError, UsageError
from coldstart.registry import worker_for
from tests.starts import Project

END_SECONDS = 60.0


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Workers of these tests keep no snapshots and write no log lines."""
    monkeypatch.setenv("COLDSTART_STORE", "off")
    monkeypatch.setenv("COLDSTART_LOG", "off")


def served(handler, *lines, source=None):
    """The documents that come out for lines: events, or raw bytes."""
    raw = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    sink = io.StringIO()
    serve(handler.__coldstart__, handler, source=source or io.BytesIO(raw), sink=sink)
    return [json.loads(line) for line in sink.getvalue().splitlines()]


def handler_of(function, **options):
    """The function as a handler whose state is the number 10."""
    return coldstart("served", **{"load": lambda: 10, **options})(function)


def add(event, model):
    """A handler."""
    return event["input"] + model


def events(*inputs):
    """Events with ids of their own."""
    return [{"id": f"event-{number}", "input": value} for number, value in enumerate(inputs)]


# --- answers ---------------------------------------------------------------------------------------------------------


def count(event, model):
    """A stream."""
    for number in range(event["input"]):
        yield number + model


async def add_async(event, model):
    """A handler on the loop."""
    await asyncio.sleep(0)
    return event["input"] + model


async def count_async(event, model):
    """A stream on the loop."""
    for number in range(event["input"]):
        await asyncio.sleep(0)
        yield number + model


@pytest.mark.parametrize("function", [add, add_async])
def test_events_are_answered_in_order_with_their_ids(function):
    """Each line is answered by one line with the event's own id, in the order of the lines."""
    assert served(handler_of(function), *events(1, 2, 3)) == [
        {"id": "event-0", "output": 11},
        {"id": "event-1", "output": 12},
        {"id": "event-2", "output": 13},
    ]


@pytest.mark.parametrize("function", [count, count_async])
def test_streams_are_answered_piece_by_piece(function):
    """Each piece is a line with the event's id, and the answer is the list of them."""
    assert served(handler_of(function), *events(2, 0)) == [
        {"id": "event-0", "piece": 10},
        {"id": "event-0", "piece": 11},
        {"id": "event-0", "output": [10, 11]},
        {"id": "event-1", "output": []},
    ]


def test_a_class_serves():
    """A decorated class answers lines with ``handle``."""

    class Model:
        def load(self, ctx):
            self.number = 5

        def handle(self, event):
            return self.number * event["input"]

    assert served(coldstart("served")(Model), {"id": 1, "input": 3}) == [{"id": 1, "output": 15}]


def test_an_event_may_lack_an_id_and_lines_may_be_blank():
    """Without an id the answer has none; blank lines are no events; the last line needs no end."""
    assert served(handler_of(add), b'\n  \n{"input": 1}\n{"input": 2}') == [
        {"id": None, "output": 11},
        {"id": None, "output": 12},
    ]


def test_no_input_is_no_event():
    """An empty input ends the worker, ready or not, without an answer."""
    closed = []
    assert served(handler_of(add, close=closed.append)) == []
    assert closed == [10]


def test_async_hooks_share_the_loop_that_serves():
    """``load``, ``init``, the handler and ``close`` of an async handler run on one loop, so clients may be kept."""
    loops = []

    async def hook(*_arguments):
        loops.append(asyncio.get_running_loop())
        return 10

    async def handler(event, model):
        return await hook()

    assert served(handler_of(handler, load=hook, init=hook, close=hook), *events(1, 2)) == [
        {"id": "event-0", "output": 10},
        {"id": "event-1", "output": 10},
    ]
    assert len(loops) == 5
    assert len(set(loops)) == 1


def test_what_a_handler_prints_is_no_answer(capsys):
    """Standard output is for answers alone: whatever the handler prints goes to standard error."""

    def handler(event, model):
        print("thinking")
        return 1

    handler = handler_of(handler)
    serve(handler.__coldstart__, handler, source=io.BytesIO(b'{"input": 1}'))
    out, err = capsys.readouterr()
    assert json.loads(out) == {"id": None, "output": 1}
    assert err == "thinking\n"


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "identity", "told"),
    [
        (b"{nonsense\n", None, "the line is not JSON: "),
        (b'{"id": 1, "input": "\xff"}\n', None, "the line is not JSON: "),
        (b"[1]\n", None, 'an event is an object with an input, such as {"input": ...}, not a list'),
        (b'{"id": 7, "inputs": 1}\n', 7, "the event has no input (it has id, inputs)"),
        (b'{"id": NaN, "inputs": 1}\n', None, "the event has no input (it has id, inputs)"),
    ],
)
def test_a_line_that_is_no_event_is_answered_with_the_reason(line, identity, told):
    """A bad line is answered with an EventError, under its id where it has one, and the next line is served."""
    wrong, right = served(handler_of(add), line, *events(1))
    assert (wrong["id"], wrong["error"]["type"]) == (identity, "EventError")
    assert told in wrong["error"]["message"]
    assert right == {"id": "event-0", "output": 11}


@pytest.mark.parametrize("function", [add, add_async])
def test_an_error_of_the_handler_is_its_answer(function):
    """What the handler raises is told by type and text, and the next event is served."""
    wrong, right = served(handler_of(function), *events("text", 1))
    assert wrong["id"] == "event-0"
    assert wrong["error"] == {"type": "TypeError", "message": 'can only concatenate str (not "int") to str'}
    assert right == {"id": "event-1", "output": 11}


def test_a_panic_is_an_answer_too():
    """What a library written in Rust raises is no Exception: it is told all the same, and the next event is served."""

    class Panic(BaseException):
        pass

    def handler(event, model):
        if event["input"] == 0:
            raise Panic("index out of bounds")
        return add(event, model)

    wrong, right = served(handler_of(handler), *events(0, 1))
    assert wrong["error"] == {"type": "Panic", "message": "index out of bounds"}
    assert right == {"id": "event-1", "output": 11}


@pytest.mark.parametrize("function", [count, count_async])
def test_an_error_amid_a_stream_ends_it(function):
    """Pieces that were sent stay sent; then the error is the event's answer."""

    def numbers(event, model):
        yield from function(event, model)
        raise KeyError("lost")

    async def numbers_async(event, model):
        async for number in function(event, model):
            yield number
        raise KeyError("lost")

    documents = served(handler_of(numbers if function is count else numbers_async), *events(1, 1))
    assert documents[:2] == [
        {"id": "event-0", "piece": 10},
        {"id": "event-0", "error": {"type": "KeyError", "message": "'lost'"}},
    ]
    assert [document["id"] for document in documents[2:]] == ["event-1"] * 2


@pytest.mark.parametrize("value", [{1, 2}, object(), float("nan"), {(1, 2): 3}, b"bytes"])
def test_an_answer_that_is_not_json_is_told(value):
    """Sets, NaN, tuples as keys and the like cannot be sent, and the answer says what can."""
    wrong, right = served(handler_of(lambda event, model: value if event["input"] else 1), *events(1, 0))
    assert (wrong["id"], wrong["error"]["type"]) == ("event-0", "HandlerError")
    assert wrong["error"]["message"].startswith("the answer is not JSON (")
    assert wrong["error"]["message"].endswith("return plain values, such as array.tolist(), and no NaN")
    assert right == {"id": "event-1", "output": 1}


def test_a_piece_that_is_not_json_is_told():
    """The same holds for a stream's pieces."""

    def handler(event, model):
        yield 1
        yield {1}
        yield 2

    documents = served(handler_of(handler), *events(0))
    assert [set(document) - {"id"} for document in documents] == [{"piece"}, {"error"}]
    assert "the answer is not JSON" in documents[1]["error"]["message"]


def test_a_start_that_fails_ends_the_serving():
    """Without a model there is nothing to serve: the error is the caller's, and no line is read."""

    def load():
        raise OSError("no disk")

    source = io.BytesIO(b'{"input": 1}\n')
    with pytest.raises(PhaseError, match="no disk"):
        served(handler_of(add, load=load), source=source)
    assert source.tell() == 0


def test_another_platform_is_told(monkeypatch):
    """In a container of Modal, which runs no loop of ours, serving says so instead of reading standard input."""
    monkeypatch.setenv("MODAL_IS_REMOTE", "1")
    handler = handler_of(add)
    with pytest.raises(UsageError, match="a container of Modal runs no worker loop"):
        serve_somewhere(handler.__coldstart__, handler)


# --- the end ---------------------------------------------------------------------------------------------------------


def tell_to_end():
    """What a platform does before it takes a worker away."""
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def default_on_sigterm():
    """SIGTERM's handler as it was, which has to be back after serving."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("default_on_sigterm")
@pytest.mark.parametrize("kind", ["sync", "generator", "async", "async_generator"])
def test_sigterm_lets_the_event_in_progress_finish(kind):
    """The event is answered in full, then the loop ends: the lines behind it are left, and the worker is closed."""
    closed = []

    def work():
        tell_to_end()
        return 1

    async def work_async():
        tell_to_end()
        await asyncio.sleep(0.01)
        return 1

    def stream():
        yield work()

    async def stream_async():
        yield await work_async()

    def sync(event, model):
        return work()

    def generator(event, model):
        yield from stream()

    async def asynchronous(event, model):
        return await work_async()

    async def async_generator(event, model):
        async for piece in stream_async():
            yield piece

    functions = {"sync": sync, "generator": generator, "async": asynchronous, "async_generator": async_generator}
    documents = served(handler_of(functions[kind], close=closed.append), *events(1, 2, 3))
    assert documents[-1] == {"id": "event-0", "output": [1] if kind.endswith("generator") else 1}
    assert {document["id"] for document in documents} == {"event-0"}
    assert closed == [10]


class TellingSource(io.BytesIO):
    """Lines, and SIGTERM while the one after the last is waited for."""

    def readline(self, size=-1):
        line = super().readline(size)
        if not line:
            tell_to_end()
            time.sleep(END_SECONDS)  # interrupted by the signal
        return line


@pytest.mark.usefixtures("default_on_sigterm")
def test_sigterm_ends_the_wait_for_a_line():
    """Between events the loop ends at once."""
    closed = []
    handler = handler_of(add, close=closed.append)
    assert served(handler, source=TellingSource(b'{"input": 1}\n')) == [{"id": None, "output": 11}]
    assert closed == [10]


@pytest.mark.usefixtures("default_on_sigterm")
def test_sigterm_ends_the_wait_for_a_snapshot(monkeypatch):
    """At the end of the input a snapshot is waited for, but not against the platform's will."""
    handler = handler_of(add)
    worker = worker_for(handler.__coldstart__).wait()
    monkeypatch.setattr(worker, "capture_outcomes", lambda _seconds: (tell_to_end(), time.sleep(END_SECONDS)))
    assert served(handler, *events(1)) == [{"id": "event-0", "output": 11}]
    assert worker.state == "closed"


def test_serving_in_a_thread_leaves_signals_alone():
    """Only the main thread can hear signals; elsewhere serving does without."""
    documents = []
    thread = threading.Thread(target=lambda: documents.extend(served(handler_of(add), *events(1))))
    thread.start()
    thread.join()
    assert documents == [{"id": "event-0", "output": 11}]


SLOW_PROOF = """
import os, sys, time
from pathlib import Path
from coldstart import coldstart

if "prove" in sys.argv:
    Path("proving").write_text(f"{os.getpid()}.")
    time.sleep(600)

def load():
    return {"number": 10}

@coldstart("slow", load=load)
def handler(event, model):
    return event["input"] + model["number"]
"""


def wait_for(condition):
    """Wait until something holds."""
    deadline = time.monotonic() + END_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_ended(process_id):
    """Whether a process is gone, or but a line in the table that nobody has read."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


def test_sigterm_leaves_nothing_running(tmp_path):
    """Told to end while it proves a snapshot, ``coldstart serve`` exits 0, and the proving process ends with it."""
    project = Project(tmp_path)
    project.write(SLOW_PROOF)
    command = ("-m", "coldstart", "serve", "handler.py")
    with project.popen(*command, stdin=subprocess.PIPE, environment={"COLDSTART_LOG": "off"}) as process:
        process.stdin.write('{"id": 1, "input": 2}\n')
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"id": 1, "output": 12}
        proving = tmp_path / "proving"
        wait_for(lambda: proving.exists() and proving.read_text().endswith("."))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=END_SECONDS)
    assert (process.returncode, out, err) == (0, "", "")
    wait_for(lambda: has_ended(proving.read_text().rstrip(".")))


def test_a_file_that_serves_itself_waits_for_its_snapshot(tmp_path):
    """``python handler.py`` with ``coldstart.serve`` answers its lines, and at their end the snapshot is there."""
    project = Project(tmp_path)
    project.write(
        SLOW_PROOF.replace("time.sleep(600)", "pass") + "\nif __name__ == '__main__': coldstart.serve(handler)\n"
    )
    with project.popen("handler.py", stdin=subprocess.PIPE, environment={"COLDSTART_LOG": "off"}) as process:
        out, err = process.communicate('{"id": 1, "input": 2}\n', timeout=END_SECONDS)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out) == {"id": 1, "output": 12}
    assert project.ref("slow").is_file()
