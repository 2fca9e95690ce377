"""Starts in real processes: what is restored, when, and why not. Damage has a file of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.starts import RUN_SECONDS, SCALED, Project

if TYPE_CHECKING:
    from pathlib import Path

    from tests.starts import Start


def restores(project: Project, *arguments: str, rung: str = "arrays", **options: Any) -> Start:
    """Start twice: cold with a snapshot, then restored from it with an equal answer. The second start."""
    cold = project.run(*arguments, **options)
    assert (cold.kind, cold.capture["reason"]) == ("cold", "")
    assert cold.capture["published"]
    restored = project.run(*arguments, **options)
    assert (restored.kind, restored.reason) == ("restored", "")
    assert restored.output == cold.output
    assert (restored.record["rung"], restored.record["generation"]) == (rung, 1)
    return restored


def restored(project: Project) -> None:
    """Start once, restored."""
    start = project.run()
    assert (start.kind, start.reason) == ("restored", "")


# --- the two starts ----------------------------------------------------------------------------------------------------------


def test_cold_then_restored(scales: Project) -> None:
    """The first process loads and publishes, the next ones restore and answer equally; each leaves a record."""
    for _ in range(2):
        start = scales.run()
        assert (start.kind, start.reason, start.output) == ("restored", "", SCALED)
        assert (start.record["rung"], start.record["generation"], start.record["recovered_by"]) == ("arrays", 1, "none")
        assert start.record["bytes"]["raw"] == 2 * 64 * 4
        assert start.document["metrics"]["restores"]["count"] == 1
        assert start.capture == {"published": False, "reason": ""}
    records = [json.loads(path.read_text()) for path in scales.objects("starts/scales")]
    assert sorted(record["kind"] for record in records) == ["cold", "restored", "restored"]


def test_what_the_first_start_tells(project: Project) -> None:
    """The first start tells what it published, and counts it as a save."""
    project.write(SCALES_TWICE)
    start = project.run("--repeat", "3")
    assert start.document["answers_equal"]
    assert start.capture["written_bytes"] == start.capture["stored_bytes"] > 0
    assert start.document["metrics"]["saves"]["count"] == 1
    assert start.document["metrics"]["saves"]["bytes"] == start.capture["written_bytes"]
    assert start.document["metrics"]["warm"]["count"] == 4
    names = [span["name"] for span in start.record["spans"]]
    assert {"key from source", "look up", "import handler", "key from functions", "load", "survey"} <= set(names)


SCALES_TWICE = """
import numpy as np
from coldstart import coldstart

@coldstart("twice", load=lambda: {"a": np.arange(1000.0)}, warmup=[1])
def handler(event, model):
    return model["a"][:3].tolist()
"""


def test_fresh(scales: Project) -> None:
    """--fresh loads although there is a snapshot, and publishes the next generation, of which nothing is written anew."""
    start = scales.run("--fresh")
    assert (start.kind, start.reason, start.output) == ("cold", "a fresh start was asked for", SCALED)
    assert (start.capture["generation"], start.capture["written_bytes"]) == (2, 0)
    assert scales.run().record["generation"] == 2


def test_capture_switched_off(project: Project) -> None:
    """With captures off a start loads, publishes nothing, and says so."""
    project.write(SCALES_TWICE)
    start = project.run(COLDSTART_CAPTURE="off")
    assert (start.kind, start.reason) == ("cold", "no snapshot yet")
    assert not start.capture["published"]
    assert start.capture["reason"]
    assert project.objects("manifests") == project.objects("refs") == []


def test_store_switched_off(scales: Project) -> None:
    """Without a store a start loads, and the snapshots that there are stay as they are."""
    start = scales.run(COLDSTART_STORE="off")
    assert (start.kind, start.reason, start.output) == ("cold", "no store", SCALED)
    assert start.capture == {"published": False, "reason": "no store"}


# --- what a snapshot depends on ------------------------------------------------------------------------------------------------


def test_constant_that_load_reads(scales: Project) -> None:
    """Editing a constant that load reads makes the snapshot unusable; the start says what changed."""
    scales.edit("FACTOR = 3.0", "FACTOR = 4.0")
    start = scales.run()
    assert (start.kind, start.reason) == ("cold", "code changed: load")
    assert start.output["sum"] != SCALED["sum"]
    restored(scales)


def test_body_of_the_handler(scales: Project) -> None:
    """Editing the handler itself keeps the snapshot; the new code answers."""
    scales.edit("float(value.sum())", "-float(value.sum())")
    start = scales.run()
    assert (start.kind, start.reason) == ("restored", "")
    assert start.output["sum"] == -SCALED["sum"]


def test_declared_environment(scales: Project) -> None:
    """Another value of a declared variable makes the snapshot unusable, of an undeclared one it does not."""
    scales.edit("load=load", 'load=load, env=["SIZE"]')
    assert scales.run(SIZE="small").reason == "environment changed: SIZE"
    assert scales.run(SIZE="small", OTHER="1").kind == "restored"
    start = scales.run(SIZE="large")
    assert (start.kind, start.reason) == ("cold", "environment changed: SIZE")
    assert scales.run(SIZE="small").kind == "restored"


def test_version_instead_of_the_code(scales: Project) -> None:
    """With a version the code no longer counts, until the version changes."""
    scales.edit("load=load", 'load=load, version="1"')
    assert scales.run().reason == "version changed: none -> 1"
    scales.edit("FACTOR = 3.0", "FACTOR = 4.0")
    start = scales.run()
    assert (start.kind, start.output) == ("restored", SCALED)
    scales.edit('version="1"', 'version="2"')
    assert scales.run().reason == "version changed: 1 -> 2"


def test_two_versions_side_by_side(scales: Project) -> None:
    """Two versions that run alternately, as in a rolling deployment, make one generation each and evict nobody."""
    kinds = []
    for _ in range(5):
        scales.edit("FACTOR = 3.0", "FACTOR = 4.0")
        kinds.append(scales.run().kind)
        scales.edit("FACTOR = 4.0", "FACTOR = 3.0")
        kinds.append(scales.run().kind)
    assert kinds == ["cold"] + ["restored"] * 9
    assert len(scales.objects("manifests")) == 2


# --- forms of a handler --------------------------------------------------------------------------------------------------------

OBJECT = """
import numpy as np
from coldstart import coldstart

class Net:
    def __init__(self, weights):
        self.weights = weights
        self.apply = lambda x: self.weights * x

"""
BUILT = """
def load(ctx):
    return Net(np.arange(8.0))

def build(ctx):
    return Net(np.empty(8))

@coldstart("net", load=load, build=build, warmup=[2])
def handler(event, model):
    return model.apply(event["input"]).tolist()
"""
KEPT = """
from pathlib import Path

def load(ctx):
    with open("loads", "a") as file:
        file.write(f"{ctx.kind}\\n")
    return Net(np.fromfile(ctx.keep(Path(__file__).parent / "weights.bin")))

@coldstart("net", load=load, warmup=[2])
def handler(event, model):
    return model.apply(event["input"]).tolist()
"""
BARE = """
@coldstart("net", load=lambda: Net(np.arange(8.0)), warmup=[2])
def handler(event, model):
    return model.apply(event["input"]).tolist()
"""
FILES = """
import numpy as np
from coldstart import coldstart

def init(ctx, state):
    return state["a"], ctx.files["words"], ctx.files["folder/b.txt"]

@coldstart("f", load=lambda: {"a": np.arange(3.0)}, init=init, files={"words": "words.txt", "folder": "more"}, warmup=[1])
def handler(event, model):
    array, *paths = model
    return [array.tolist(), *[open(path).read() for path in paths]]
"""


def test_tree_without_build(project: Project) -> None:
    """A state that is a tree of arrays and plain values needs no build: aliases, strides and types come back."""
    project.write("""
        import numpy as np
        from coldstart import coldstart

        def load():
            base = np.arange(24.0).reshape(4, 6)
            return {"base": base, "column": base[:, 1], "turned": np.asfortranarray(base), "deep": [(1, None, {"x": base})],
                    "empty": np.zeros((0, 3)), "flag": np.array([True]), "text": "é"}

        @coldstart("tree", load=load, warmup=[1])
        def handler(event, model):
            model["base"][0, 1] += 0.0
            return [[str(type(model[name])), np.asarray(model[name]).tolist()] for name in sorted(set(model) - {"deep"})] + [
                np.shares_memory(model["base"], model["column"]), model["deep"][0][2]["x"] is model["base"],
                model["turned"].strides, str(type(model["deep"][0]))]
    """)
    assert restores(project).output[-4:-2] == [True, True]


def test_object_with_build(project: Project) -> None:
    """An object of the user's own class is made by build and gets its arrays back."""
    project.write(OBJECT + BUILT)
    assert restores(project).output == [2.0 * number for number in range(8)]
    project.edit("np.empty(8)", "np.empty(8) * 1")
    assert project.run().reason == "code changed: build"


def test_build_that_fails(project: Project) -> None:
    """A build that raises in a restored start is answered by load, and the start says so."""
    project.write(OBJECT + BUILT.replace("np.empty(8)", "np.empty(int(__import__('os').environ.get('SIZE', 8)))"))
    project.edit("warmup", 'version="1", warmup')
    cold = project.run()
    for size, reason in (("nine", "ValueError: "), ("9", "StateMismatchError: ")):
        start = project.run(SIZE=size)
        assert (start.kind, start.output) == ("fallback", cold.output)
        assert start.reason.startswith(reason)
        assert not start.capture["published"]
    restored(project)


def test_files_rung(project: Project) -> None:
    """A state that no snapshot can hold is loaded again, from the restored copies of the files that load keeps."""
    project.write(OBJECT + KEPT)
    (project.folder / "weights.bin").write_bytes(b"".join(map(_double, range(8))))
    cold = project.run()
    (project.folder / "weights.bin").unlink()  # what is restored comes from the snapshot
    start = project.run()
    assert (start.kind, start.record["rung"], start.output) == ("restored", "files", cold.output)
    assert (project.folder / "loads").read_text().split() == ["cold", "restored", "restored"]  # the proof's is between


def _double(number: int) -> bytes:
    import struct

    return struct.pack("<d", number)


def test_nothing_to_store(project: Project) -> None:
    """A state that takes no rung gets no snapshot; the start says which rung is next and how to get there."""
    project.write(OBJECT + BARE)
    start = project.run()
    assert start.output == [2.0 * number for number in range(8)]
    assert not start.capture["published"]
    assert "give build=" in start.capture["reason"]
    assert project.objects("blobs") == []


def test_declared_files(project: Project) -> None:
    """Files of files= are in ctx.files of every start, also where only the snapshot has them."""
    project.write(FILES)
    project.write("some words", "words.txt")
    project.write("a", "more/a.txt")
    project.write("b", "more/b.txt")
    assert restores(project).output == [[0.0, 1.0, 2.0], "some words", "b"]
    (project.folder / "words.txt").unlink()
    (project.folder / "more" / "b.txt").unlink()
    assert project.run().output == [[0.0, 1.0, 2.0], "some words", "b"]


CLASS = """
import numpy as np
from coldstart import coldstart
from base import Base

@coldstart("model", warmup=[2])
class Model(Base):
    def load(self, ctx):
        self.weights = np.arange(8.0)
        self.unit = "m"

    def init(self, ctx):
        self.kind = "initialised"
"""
BASE = """
class Base:
    def handle(self, event):
        return [float(self.weights.sum()) * event["input"], self.unit, self.kind]
"""
CLASS_BUILT = """
    def build(self, ctx):
        self.weights = np.empty(8)
        self.unit = "m"
        self.apply = lambda x: x
"""


@pytest.mark.parametrize("build", ["", CLASS_BUILT], ids=["tree", "build"])
def test_class_form(project: Project, build: str) -> None:
    """What load sets on self is the state: it is restored onto a fresh instance, which init completes."""
    project.write(BASE, "base.py")
    project.write(CLASS + build)
    assert restores(project).output == [56.0, "m", "initialised"]


PARTS = """
import os
from pathlib import Path
import numpy as np
from coldstart import coldstart

HERE = Path(__file__).parent

def note(name):
    with open(HERE / f"loads-{os.getpid()}", "a") as file:
        file.write(name)

def first(ctx):
    note("a")
    return {"w": np.fromfile(ctx.keep(HERE / "first.bin", name="weights.bin"), np.uint8)}

def second(ctx):
    note("b")
    return {"w": np.fromfile(ctx.keep(HERE / "second.bin"), np.uint8) * 1}

def init(ctx, state):
    return {**state, "files": sorted(ctx.files)}

@coldstart("parts", load={"one": first, "two": second}, init=init, warmup=[1])
def handler(event, model):
    return [int(model["one"]["w"].sum()), int(model["two"]["w"].sum()), model["files"]]
"""


def test_named_parts(project: Project) -> None:
    """Only the part whose code changed is loaded again, from its own files; the others are restored."""
    project.write(PARTS)
    project.write("ab", "first.bin")
    project.write("cd", "second.bin")
    files = ["second.bin", "weights.bin"]
    start = project.run()
    assert start.reason == "one: no snapshot yet; two: no snapshot yet"
    assert start.output == [ord("a") + ord("b"), ord("c") + ord("d"), files]
    restored(project)
    project.edit(", np.uint8) * 1", ", np.uint8) * 2")
    project.write("z", "second.bin")
    project.write("never read", "first.bin")
    start = project.run()
    assert (start.kind, start.reason) == ("cold", "two: code changed: load")
    assert start.output == [ord("a") + ord("b"), 2 * ord("z"), files]
    assert (project.folder / f"loads-{start.record['pid']}").read_text() == "b"
    start = project.run()
    assert start.kind == "restored"
    assert not (project.folder / f"loads-{start.record['pid']}").exists()


@pytest.mark.parametrize(
    ("handler", "answer"),
    [
        ("async def handler(event, model):\n    return await model.sum_of(event)", 10.0),
        ("def handler(event, model):\n    yield event['input']\n    yield float(model.array.sum())", [1, 10.0]),
        ("async def handler(event, model):\n    yield 1\n    yield await model.sum_of(event)", [1, 10.0]),
    ],
    ids=["async", "generator", "async generator"],
)
def test_kinds_of_handlers(project: Project, handler: str, answer: Any) -> None:
    """Handlers of every kind, with async hooks, are restored and answer as when loaded."""
    project.write(f"""\
import asyncio
import numpy as np
from coldstart import coldstart

class Model:
    def __init__(self, array):
        self.array = array
        self.loop = asyncio.get_running_loop()

    async def sum_of(self, event):
        assert asyncio.get_running_loop() is self.loop
        return float(self.array.sum())

async def load(ctx):
    await asyncio.sleep(0)
    return {{"a": np.arange(5.0)}}

async def init(ctx, state):
    return Model(state["a"])

@coldstart("kinds", load=load, init=init, warmup=[1])
{handler}
""")
    assert restores(project).output == answer


PREFETCHED = """
from coldstart import coldstart
coldstart.prefetch("early")
import numpy as np

@coldstart("early", load=lambda: {"a": np.arange(5.0)}, warmup=[1])
def handler(event, model):
    return float(model["a"].sum())

if __name__ == "__main__":
    coldstart.serve(handler)
"""


def test_prefetch_in_a_script(project: Project) -> None:
    """A script that calls prefetch above its imports is restored while it imports, and serves."""
    project.write(PREFETCHED)
    event = '{"id": "a", "input": 1}\n'
    for _ in range(2):
        assert project.python("handler.py", source=event).document == {"id": "a", "output": 10.0}
    records = {record["kind"]: record for record in map(_json, project.objects("starts"))}
    spans = {span["name"]: span for span in records["restored"]["spans"]}
    assert spans["fetch"]["began_seconds"] < spans["key from functions"]["began_seconds"]
    assert records["cold"]["reason"] == "no snapshot yet"


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_environment_that_the_module_changes(project: Project) -> None:
    """A declared variable that the module sets while it is imported counts in the key as the process was given it."""
    project.write(PREFETCHED.replace("import numpy as np", "import numpy as np\nimport os\nos.environ['SIZE'] = '5'"))
    project.edit('"early", load=lambda: {"a": np.arange(5.0)}', '"early", load=load, env=["SIZE"]')
    project.edit("@coldstart", "def load(ctx):\n    return {'a': np.arange(float(ctx.env('SIZE')))}\n\n@coldstart")
    for size in ("7", "7", "8"):
        answer = project.python("handler.py", source='{"id": "a", "input": 1}\n', environment={"SIZE": size})
        assert answer.document["output"] == 10.0
    reasons = sorted(_json(path)["reason"] for path in project.objects("starts"))
    assert reasons == ["", "environment changed: SIZE", "no snapshot yet"]


def test_package_with_relative_imports(project: Project) -> None:
    """A handler inside a package, run as a module, is proven and restored with its relative imports."""
    project.write("", "package/__init__.py")
    project.write("def numbers(np):\n    return np.arange(5.0)\n", "package/helper.py")
    project.write(
        PREFETCHED.replace("np.arange(5.0)", "numbers(np)").replace(
            "import numpy as np", "import numpy as np\nfrom .helper import numbers"
        ),
        "package/worker.py",
    )
    event = '{"id": "a", "input": 1}\n'
    for _ in range(2):
        assert project.python("-m", "package.worker", source=event).document == {"id": "a", "output": 10.0}
    assert sorted(_json(path)["kind"] for path in project.objects("starts")) == ["cold", "restored"]
    project.edit("5.0", "4.0", "package/helper.py")
    assert project.python("-m", "package.worker", source=event).document["output"] == 6.0


def test_decorator_of_another_module(project: Project) -> None:
    """A handler below a decorator of the user's own, which another file defines, is proven and restored."""
    project.write(
        """
        from functools import wraps

        def logged(function):
            @wraps(function)
            def wrapper(*arguments):
                return [function(*arguments)]
            return wrapper
    """,
        "tools.py",
    )
    project.write("""
        import numpy as np
        from coldstart import coldstart
        from tools import logged

        @coldstart("logged", load=lambda: {"a": np.arange(5.0)}, warmup=[1])
        @logged
        def handler(event, model):
            return float(model["a"].sum())
    """)
    assert restores(project).output == [10.0]


# --- captures that are cut off -------------------------------------------------------------------------------------------------

BLOCKED = """
import os, time
from coldstart.events import CaptureBegan

def block(event):
    if "BLOCK" in os.environ and isinstance(event, CaptureBegan):
        open("blocked", "w").close()
        time.sleep(600)

coldstart.subscribe(block)
"""


def test_killed_while_it_captures(scales: Project) -> None:
    """A worker that is killed in the middle of a capture leaves the previous generation, and later ones are made."""
    text = (scales.folder / "handler.py").read_text()
    scales.write(text + BLOCKED)
    with scales.popen("-m", "coldstart", "run", "handler.py", "--fresh", environment={"BLOCK": "1"}) as worker:
        deadline = time.monotonic() + RUN_SECONDS
        while not (scales.folder / "blocked").exists():
            assert worker.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(worker.pid, signal.SIGKILL)
    start = scales.run()
    assert (start.kind, start.record["generation"], start.output) == ("restored", 1, SCALED)
    assert scales.run("--fresh").capture["generation"] == 2


WITHOUT_OVERRIDE = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1);"
    "os.execv(sys.executable, [sys.executable, '-m', 'coldstart', 'run', 'handler.py', '--json'])"
)
"""Runs the handler without the capability to write where file modes forbid it, which root has (PR_CAPBSET_DROP 24, 1)."""


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_store_that_cannot_be_written(scales: Project) -> None:
    """From a read-only store snapshots are restored; what cannot be captured is reported, and requests are answered."""
    folders = [scales.store, *(path for path in scales.store.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    try:
        start = scales.python("-c", WITHOUT_OVERRIDE)
        assert (start.code, start.kind, start.output) == (0, "restored", SCALED)
        scales.edit("FACTOR = 3.0", "FACTOR = 3.5")
        start = scales.python("-c", WITHOUT_OVERRIDE)
        assert (start.code, start.kind, start.reason) == (0, "cold", "code changed: load")
        assert not start.capture["published"]
        assert "no permission" in start.capture["reason"]
    finally:
        for folder in folders:
            folder.chmod(0o700)
    assert scales.run().capture["published"]


# --- other stores ----------------------------------------------------------------------------------------------------------------


def test_store_in_a_bucket(project: Project, s3_endpoint: str, s3_bucket: str) -> None:
    """A bucket of an S3-compatible server, reached by settings alone, serves as the store."""
    project.environment = {
        "COLDSTART_STORE": f"s3://{s3_bucket}/some/prefix",
        "COLDSTART_ENDPOINT_URL": s3_endpoint,
        "COLDSTART_REGION": "auto",
        "COLDSTART_ACCESS_KEY_ID": "id",
        "COLDSTART_SECRET_ACCESS_KEY": "secret",
    }
    project.write(SCALES_TWICE)
    start = restores(project)
    assert start.output == [0.0, 1.0, 2.0]
    assert start.record["bytes"]["fetched"] > 0
    assert not project.store.exists()


def test_bucket_that_is_not_there(project: Project, s3_endpoint: str) -> None:
    """A store that cannot be reached is a labelled fallback with the right answer."""
    project.environment = {
        "COLDSTART_STORE": "s3://no-such-bucket/prefix",
        "COLDSTART_ENDPOINT_URL": s3_endpoint,
        "COLDSTART_ACCESS_KEY_ID": "id",
        "COLDSTART_SECRET_ACCESS_KEY": "secret",
    }
    project.write(SCALES_TWICE)
    start = project.run()
    assert (start.kind, start.output) == ("fallback", [0.0, 1.0, 2.0])
    assert "no-such-bucket" in start.reason
    assert not start.capture["published"]
