"""The control plane of the tests, held against RunPod's own SDK: raw handlers, nothing of coldstart in the process."""

from __future__ import annotations

import http.client
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.runpod_plane import Plane, strictly_parsed
from tests.runpod_workers import Line, Worker, lines

if TYPE_CHECKING:
    from pathlib import Path

RAW = """
import asyncio
import runpod

async def handler(job):
    order = job["input"]
    if order == "raise":
        raise ValueError("as asked")
    if order == "bytes":
        return b"no JSON"
    if order == "nan":
        return float("nan")
    if order == "forever":
        await asyncio.sleep(3600)
    if order == "progress":
        runpod.serverless.progress_update(job, {"done": 1})
        await asyncio.sleep(1.5)
    if isinstance(order, dict):
        return dict(order)
    return {"echo": order}

if __name__ == "__main__":
    runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda _: 8})
    print("start returned", flush=True)
"""
RAW_STREAM = """
import runpod

def handler(job):
    for number in range(job["input"]):
        yield {"number": number}

if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
"""


@pytest.fixture(params=lines(), ids=lambda line: line.name)
def line(request: pytest.FixtureRequest) -> Line:
    """Each line of the SDK that is there."""
    found: Line = request.param
    if found.lack:
        pytest.skip(found.lack)
    return found


def worker_of(plane: Plane, folder: Path, text: str, line: Line) -> Worker:
    """A worker process of a raw handler."""
    path = folder / "raw.py"
    path.write_text(text)
    return Worker(plane, str(path), line=line, folder=folder)


def test_raw_handler(line: Line, tmp_path: Path) -> None:
    """A raw SDK worker gets jobs in a batch, answers, fails, reports progress and is cancelled; SIGTERM ends it."""
    orders: list[Any] = [
        1,
        {},
        {"error": "told", "rest": 1},
        {"refresh_worker": True, "rest": 1},
        "raise",
        "progress",
        "forever",
    ]
    with Plane(hold_seconds=0.5) as plane, worker_of(plane, tmp_path, RAW, line) as worker:
        jobs = plane.queue(*orders)
        one, empty, told, refresh, raising, progress, forever = jobs
        assert plane.output(one) == {"echo": 1}
        assert plane.result(empty) == {}
        assert plane.result(told) == {"error": "told", "output": {"rest": 1}}
        assert plane.result(refresh) == {"stopPod": True, "output": {"rest": 1}}
        error = json.loads(plane.error(raising))
        assert (error["error_type"], error["error_message"]) == ("<class 'ValueError'>", "as asked")
        assert error["worker_id"].startswith("worker-")
        assert plane.output(progress) == {"echo": "progress"}
        assert plane.wait_for("progress", progress).data == {"done": 1}
        plane.cancel(forever)
        plane.wait_for("signal", forever)
        (hung,) = plane.queue("bytes")
        (last,) = plane.queue("last")
        assert plane.output(last) == {"echo": "last"}
        assert plane.happenings("result", hung) == plane.happenings("result", forever) == []
        versions = {ping.data["runpod_version"][:2] for ping in plane.happenings("ping")}
        assert versions == {"1." if line.name == "runpod-1" else "2."}
        assert plane.happenings("take")[0].data["batch_size"] == "8"
        assert worker.terminate() == 0
        assert "start returned" in worker.output


def test_raw_stream(line: Line, tmp_path: Path) -> None:
    """A raw generator streams in order; polls that fail and a result that is refused twice lose nothing."""
    with Plane(hold_seconds=0.5) as plane, worker_of(plane, tmp_path, RAW_STREAM, line) as worker:
        plane.script_takes([400, 500, 204])
        plane.refuse_results(2)
        (job,) = plane.queue(3)
        assert plane.result(job) == {"output": []}
        assert plane.pieces(job) == [{"number": 0}, {"number": 1}, {"number": 2}]
        assert plane.wait_for("result", job).data["stream"]
        assert [each.data for each in plane.happenings("status")] == [400, 500, 204]
        assert worker.terminate() == 0


def test_violations_are_found(tmp_path: Path) -> None:
    """A NaN in a result, which a strict JSON parser does not take, fails the test that got it."""
    line = lines()[0]
    if line.lack:
        pytest.skip(line.lack)
    plane = Plane(hold_seconds=0.5)
    with pytest.raises(AssertionError, match="NaN is not JSON"), plane, worker_of(plane, tmp_path, RAW, line):
        plane.queue("nan")
        plane.wait_more("take", 3)


@pytest.mark.parametrize(
    ("method", "path", "violation"),
    [
        ("GET", "/v2/endpoint-1/job-take/worker-1?gpu=NVIDIA+GeForce+RTX+4090?job_in_progress=0", "wrong gpu"),
        ("GET", "/v2/endpoint-1/job-take/$ID?gpu=NVIDIA+GeForce+RTX+4090&job_in_progress=0", "wrong path"),
        ("GET", "/v2/endpoint-1/nowhere/worker-1", "no path of the plane"),
        ("POST", "/v2/endpoint-1/job-done/worker-1/job-1?isStream=false", "nobody was given"),
    ],
)
def test_requests_that_the_platform_would_refuse(method: str, path: str, violation: str) -> None:
    """A request that the real plane would not understand is kept as a violation."""
    plane = Plane(hold_seconds=0.0)
    with pytest.raises(AssertionError, match=violation), plane:
        address = urlsplit(plane.environment()["RUNPOD_WEBHOOK_PING"])
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=10)
        connection.request(method, path, body=b"{}" if method == "POST" else None)
        connection.getresponse().read()
        connection.close()


@pytest.mark.parametrize("text", [b'{"a": NaN}', b'{"a": 1, "a": 2}', b"-Infinity", b'"\xff"', b"{'a': 1}", b""])
def test_strict_parser(text: bytes) -> None:
    """What only lenient parsers take is refused."""
    with pytest.raises(ValueError):
        strictly_parsed(text)
