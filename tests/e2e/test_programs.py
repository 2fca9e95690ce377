"""Programs in real processes: made by the first start, run by the next, and passed over with a reason where they cannot be."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coldstart.manifest import blob_key
from coldstart.programs.record import consumer_of, programs_of, to_json
from coldstart.repository import Repository
from coldstart.stores import open_store
from tests.programs import ASK, HANDLER, TELL, far, made, manifests, write_net
from tests.starts import RUN_SECONDS, Project, Start, flip

if TYPE_CHECKING:
    from coldstart.stores import StoreOptions

# An export alone takes ten seconds of a processor that nobody else wants.
pytestmark = [pytest.mark.demo, pytest.mark.timeout(1200)]

NO_CAPTURE = {"COLDSTART_CAPTURE": "off"}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Start]:
    """The handler with its state's generation and its program's, and the start that made both. Not to be changed."""
    project = Project(tmp_path_factory.mktemp("programs") / "project")
    write_net(project)
    return project, made(project, "--input", ASK)


@pytest.fixture
def net(first: tuple[Project, Start], tmp_path: Path) -> Project:
    """The handler with both generations."""
    return first[0].copy(tmp_path / "net")


@pytest.fixture(scope="module")
def answer(first: tuple[Project, Start]) -> Any:
    """What the state's own code answers to ASK."""
    return first[1].output


def eager(start: Start, why: str) -> None:
    """The start restored the state and not the program, and says why."""
    assert (start.kind, start.record["program"]) == ("restored", "")
    assert why in start.record["program_obstacle"]


# --- the two starts --------------------------------------------------------------------------------------------------


def test_first_start(first: tuple[Project, Start]) -> None:
    """The first start computes eagerly, publishes its state, and then a generation with the program, which shares its bytes."""
    project, start = first
    assert (start.kind, start.record["program"]) == ("cold", "")
    state, program = start.document["captures"]
    assert (state["published"], state["generation"], state["program"], state["reason"]) == (True, 1, "", "")
    assert (program["published"], program["generation"], program["program"], program["reason"]) == (True, 2, "onnx", "")
    assert start.capture == state
    base, whole = manifests(project)
    assert (base.programs, len(whole.programs)) == ((), 1)
    (made_program,) = programs_of(whole.programs)
    assert made_program.backend == "onnx"
    assert list(made_program.entries[0].signature.ranges.values()) == [(1, 16)]
    consumers = {segment.consumer for segment in whole.segments}
    assert consumer_of(made_program.id) in consumers
    assert {buffer.name for buffer in base.buffers} <= {buffer.name for buffer in whole.buffers}
    assert [leaf.path for leaf in whole.leaves] == [leaf.path for leaf in base.leaves]


def test_second_start(net: Project, answer: Any) -> None:
    """The second start runs the program, never imports torch, and answers like the state's own code; so do all later ones."""
    start = net.run("--input", ASK)
    assert (start.kind, start.reason, start.record["program"], start.record["generation"]) == (
        "restored",
        "",
        "onnx",
        2,
    )
    assert far(start.output, answer) < 1e-5
    assert start.capture == {"published": False, "reason": ""}
    told = net.run("--input", TELL)
    assert told.output == {"torch": False, "onnxruntime": True}
    assert len(net.objects("manifests")) == 2


def test_handler_that_calls_in_another_way(net: Project, answer: Any) -> None:
    """The handler is no part of the key: one that calls what its program does not take is started without the program."""
    net.edit("model(x)", "model(x, scale=2.0)")
    start = net.run("--input", ASK, **NO_CAPTURE)
    eager(start, "got the argument 'scale', which no recorded call had")
    assert far(start.output, {**answer, "y": [[2 * value for value in row] for row in answer["y"]]}) < 1e-5


@pytest.mark.slow
def test_program_for_the_new_way_of_calling(net: Project) -> None:
    """That start replaces the program by one that takes the new calls, and the next start runs it."""
    net.edit("model(x)", "model(x, scale=2.0)")
    start = made(net, "--input", ASK)
    (capture,) = start.document["captures"]
    assert (capture["published"], capture["generation"], capture["program"]) == (True, 3, "onnx")
    again = net.run("--input", ASK)
    assert (again.kind, again.record["program"]) == ("restored", "onnx")
    assert far(again.output, start.output) < 1e-5


CALLS = """
import json
from handler import handler

def said(rows):
    try:
        return handler({"id": "1", "input": {"rows": rows}})
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps([said(rows) for rows in (16, 17, 1)]))
"""

OUTSIDE = r"x is float32 \(17, 8\), the program takes float32 \((\w+), 8\) with \1 1 to 16"


def test_call_outside_the_ranges(net: Project) -> None:
    """A call that the program was not made for fails its event with a clear error, and the worker serves on."""
    largest, outside, smallest = net.python("-", source=CALLS).document
    assert re.fullmatch(f"ProgramCallError: the program's call: {OUTSIDE}; the calls of .*", outside)
    assert (len(largest["y"]), len(smallest["y"])) == (16, 1)
    document = net.try_run("--input", '{"rows": 17}')
    assert document.code == 1
    assert re.search(OUTSIDE, document.errors)


# --- passed over -----------------------------------------------------------------------------------------------------


def test_switched_off(net: Project, answer: Any) -> None:
    """COLDSTART_PROGRAMS=off restores the state, bit for bit, and makes no program."""
    start = net.run("--input", ASK, COLDSTART_PROGRAMS="off")
    eager(start, "programs are switched off (COLDSTART_PROGRAMS)")
    assert start.output == answer
    assert len(net.objects("manifests")) == 2


def test_other_wishes(net: Project, answer: Any) -> None:
    """With another export(...) the state is restored, and the start says that its program is not the one that is asked for."""
    net.edit("(1, 16)", "(1, 12)")
    start = net.run("--input", ASK, **NO_CAPTURE)
    eager(start, "export(...) was changed since the program was made")
    assert start.output == answer


def test_no_wishes(net: Project) -> None:
    """A handler that has no program= any more gets its state, without a word about programs."""
    net.edit('program=export(dynamic={"x": {0: (1, 16)}}), ', "")
    net.edit("    x = np.linspace", "    import torch\n    x = np.linspace")
    net.edit("model(x)", "model(torch.from_numpy(x))")
    start = net.run("--input", ASK)
    assert (start.kind, start.record["program"], start.record["program_obstacle"]) == ("restored", "", "")


HIDDEN = """
from importlib.machinery import PathFinder
real = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name.startswith("onnxruntime") else real(name, *rest))
"""
"""Makes a package look as if it was not installed."""


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"sitecustomize.py": HIDDEN}, "needs ONNX Runtime, which is not installed: pip install 'coldstart-gpu[onnx]'"),
        ({"onnxruntime/__init__.py": '__version__ = "1.17.3"\n'}, "ONNX Runtime 1.17.3 is too old, 1.20 is needed"),
    ],
    ids=["missing", "too old"],
)
def test_runtime(net: Project, answer: Any, files: dict[str, str], said: str) -> None:
    """An image without the runtime, or with one that is too old, restores the state, says so, and ``doctor`` does."""
    for name, text in files.items():
        net.write(text, f"image/{name}")
    net.environment["PYTHONPATH"] = os.pathsep.join([str(net.folder / "image"), net.variables()["PYTHONPATH"]])
    start = net.run("--input", ASK)
    eager(start, said)
    assert start.output == answer
    assert said in start.capture["reason"]
    found = net.python("-m", "coldstart", "doctor", "--json")
    assert [finding["state"] for finding in found.document if said in finding["text"]] == ["note"]  # type: ignore[index]


def test_runtime_that_cannot_be_imported(net: Project, answer: Any) -> None:
    """A runtime of the right version that fails to import is told in its own words, and the state is restored."""
    net.write(
        f'__version__ = "{version("onnxruntime")}"\nraise ImportError("no libgomp here")\n',
        "image/onnxruntime/__init__.py",
    )
    net.environment["PYTHONPATH"] = os.pathsep.join([str(net.folder / "image"), net.variables()["PYTHONPATH"]])
    start = net.run("--input", ASK, **NO_CAPTURE)
    eager(start, "ONNX Runtime cannot be imported: no libgomp here")
    assert start.output == answer


def test_damaged_program(net: Project, answer: Any) -> None:
    """One altered byte of a program's blob: the generation before it serves, labelled, with the right answer."""
    whole = manifests(net)[1]
    (program,) = programs_of(whole.programs)
    own = {index for index, segment in enumerate(whole.segments) if segment.consumer == consumer_of(program.id)}
    blobs = {blob_key(chunk.blob) for chunk in whole.chunks if chunk.segment in own}
    flip(net.store / min(blobs), -1)
    start = net.run("--input", ASK, **NO_CAPTURE)
    eager(start, "")
    assert (start.record["recovered_by"], start.record["generation"]) == ("previous_generation", 1)
    assert start.reason
    assert start.output == answer


def test_program_of_the_generation_before(net: Project, answer: Any) -> None:
    """Where the newest generation cannot be read the program of the one before it runs, by its own record."""
    repository = Repository(open_store(f"file://{net.store}"))
    whole = manifests(net)[1]
    replaces = repository.look_up("net", whole.key)
    assert replaces.ref is not None
    (program,) = programs_of(whole.programs)
    renamed = to_json(program._replace(entries=(program.entries[0]._replace(file="9.onnx"),)))
    lost = whole._replace(
        generation=3,
        parent=replaces.ref.manifest,
        programs=(renamed,),
        files=tuple(entry._replace(name="9.onnx") for entry in whole.files),
        chunks=tuple(chunk._replace(blob=f"{index:064x}") for index, chunk in enumerate(whole.chunks)),
    )
    repository.publish(lost, repository.put_manifest(lost), replaces=replaces)
    start = net.run("--input", ASK, **NO_CAPTURE)
    assert (start.record["program"], start.record["generation"], start.record["recovered_by"]) == (
        "onnx",
        2,
        "previous_generation",
    )
    assert far(start.output, answer) < 1e-5


def test_damaged_record(net: Project, answer: Any) -> None:
    """A manifest whose program cannot be read, as by a newer coldstart's, is restored without it."""
    newest = net.objects("manifests")[1]
    text = newest.read_text()
    assert text.count('"backend":"onnx"') == 1
    newest.write_text(text.replace('"backend":"onnx"', '"backend":"from-the-future"'))
    start = net.run("--input", ASK, **NO_CAPTURE)
    assert (start.kind, start.record["program"], start.output) == ("restored", "", answer)


def test_store_of_somebody_else(net: Project, answer: Any, s3_options: StoreOptions, s3_bucket: str) -> None:
    """A bucket's program is not executed unless the bucket is said to be trusted; its state is restored all the same."""
    url = f"s3://{s3_bucket}/snapshots"
    store = open_store(url, s3_options)
    for kind in ("blobs", "manifests", "refs"):
        for path in net.objects(kind):
            store.put(str(path.relative_to(net.store)), path.read_bytes())
    store.close()
    net.environment |= {
        "COLDSTART_STORE": url,
        "COLDSTART_ENDPOINT_URL": str(s3_options.endpoint_url),
        "COLDSTART_REGION": "us-east-1",
        "COLDSTART_ACCESS_KEY_ID": "id",
        "COLDSTART_SECRET_ACCESS_KEY": "secret",
    }
    start = net.run("--input", ASK)
    eager(start, f"{url} is not trusted to give code")
    assert "COLDSTART_TRUST_STORE=on" in start.record["program_obstacle"]
    assert start.output == answer
    assert "is not trusted to give code" in start.capture["reason"]
    trusted = net.run("--input", ASK, COLDSTART_TRUST_STORE="on")
    assert (trusted.kind, trusted.record["program"]) == ("restored", "onnx")
    assert far(trusted.output, answer) < 1e-5


# --- programs that cannot be made --------------------------------------------------------------------------------------

BRANCH = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, x):
        if x.sum() > 0:
            return x * self.weight
        return x, self.weight
"""


def test_code_that_cannot_be_exported(project: Project) -> None:
    """The snapshot of the state stays, the reason is told with the line and the remedy, and no other worker tries again."""
    project.write(BRANCH, "net.py")
    project.write(HANDLER.replace("y, total = model(x)", "y = total = model(x + 2)"))
    start = made(project, "--input", ASK)
    state, program = start.document["captures"]
    assert (state["published"], program["published"], program["program"]) == (True, False, "onnx")
    reason = program["reason"]
    assert "entry point" in reason
    assert "cannot be exported" in reason
    assert "net.py:10" in reason
    assert "starts stay eager" in reason
    assert len(project.objects("refusals")) == 1
    second = project.run("--input", ASK)
    eager(second, "")
    assert second.output == start.output
    (program,) = second.document["captures"]
    assert program["reason"] == f"it was tried before: {reason} (COLDSTART_FRESH=on tries again)"
    assert len(project.objects("manifests")) == 1
    third = made(project, "--fresh", "--input", ASK)
    state, program = third.document["captures"]
    assert (state["published"], state["generation"], program["published"]) == (True, 2, False)
    assert program["reason"] == reason


STUCK = """
import os, time
from coldstart import coldstart, export

def load():
    folder = os.path.dirname(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    if os.path.basename(folder).startswith("coldstart-program-"):  # the process that makes the program
        with open("stuck", "w") as file:
            file.write(f"{os.getpid()} {folder}")
        os.rename("stuck", "making")
        time.sleep(3600)
    return lambda x: x

@coldstart("stuck", load=load, program=export(), warmup=[1])
def handler(event, model):
    return event["input"]
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_killed_worker(project: Project, tmp_path: Path) -> None:
    """A worker that is killed while its program is made leaves no process; its folder goes when the next one makes one."""
    project.write(STUCK)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    project.environment["TMPDIR"] = str(temporary)
    left = []
    for number in range(2):
        store = {"COLDSTART_STORE": f"file://{tmp_path}/store{number}"}  # the first one's lease is nobody's for a while
        with project.popen("-m", "coldstart", "run", "handler.py", environment=store) as worker:
            pid, folder = _making(project)
            for path in left:
                assert not path.exists()
            worker.send_signal(signal.SIGKILL)
        _wait(lambda pid=pid: not Path(f"/proc/{pid}").exists() or _is_zombie(pid))
        os.utime(folder, (1, 1))
        left.append(folder)
    assert [path.name for path in temporary.iterdir()] == [left[1].name]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_killed_making(project: Project) -> None:
    """A process that makes a program and is killed, as for want of memory, says nothing about the program: others may try."""
    project.write(STUCK)
    with project.popen("-m", "coldstart", "run", "handler.py", "--json") as worker:
        pid, _ = _making(project)
        os.kill(pid, signal.SIGKILL)
        output, errors = worker.communicate(timeout=RUN_SECONDS)
    assert worker.returncode == 0, errors
    (capture,) = json.loads(output.splitlines()[-1])["captures"]
    assert (capture["published"], capture["program"]) == (False, "onnx")
    assert "the process of the export ended with status -9 and no answer" in capture["reason"]
    assert project.objects("refusals") == []


def _making(project: Project) -> tuple[int, Path]:
    """Process and folder of a program that is being made."""
    marker = project.folder / "making"
    _wait(marker.exists)
    pid, folder = marker.read_text().split()
    marker.unlink()
    return int(pid), Path(folder)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _wait(holds: Any) -> None:
    until = time.monotonic() + RUN_SECONDS
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


# --- another export -----------------------------------------------------------------------


@pytest.mark.slow
def test_other_wishes_are_made_anew(net: Project, answer: Any) -> None:
    """A changed export(...) makes a new program, which takes the old one's place and serves the next start."""
    net.edit("(1, 16)", "(1, 12)")
    start = made(net, "--input", ASK)
    eager(start, "export(...) was changed")
    (capture,) = start.document["captures"]
    assert (capture["published"], capture["generation"], capture["program"]) == (True, 3, "onnx")
    again = net.run("--input", ASK)
    assert (again.record["program"], again.record["generation"]) == ("onnx", 3)
    assert far(again.output, answer) < 1e-5
    (program,) = programs_of(manifests(net)[2].programs)
    assert list(program.entries[0].signature.ranges.values()) == [(1, 12)]
    assert net.try_run("--input", '{"rows": 13}').code == 1
