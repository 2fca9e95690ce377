"""Proofs in real processes: what is refused, what is not, and that no child outlives its proof."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coldstart import proof
from coldstart.errand import Origin
from coldstart.errors import ProofError
from coldstart.manifest import ref_from_json
from coldstart.proof import Proof
from coldstart.repository import Repository
from coldstart.stores import open_store
from tests.starts import ROOT, RUN_SECONDS, SCALES, Project, flip

if TYPE_CHECKING:
    from coldstart.manifest import Manifest

IN_PROOF = """
import os, subprocess, sys, time

def init(ctx, state):
    if os.environ["COLDSTART_CAPTURE"] == "off":  # so it is in a proof
        {body}
    return state
"""
"""An init that does something in a proving process only."""

LEAVES_ANOTHER = """
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open("pids.part", "w") as file:
            file.write(f"{os.getpid()} {other.pid}")
        os.rename("pids.part", "pids")
"""
HANGS = LEAVES_ANOTHER + "        time.sleep(600)"


@pytest.fixture(scope="module")
def scales(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A handler with a generation, made and proven by a worker of its own. Not to be changed."""
    project = Project(tmp_path_factory.mktemp("scales"))
    project.write(SCALES.replace("[{", '[{"x": 0}, {'))
    assert project.run().capture["published"]
    return project


@pytest.fixture
def project(scales: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of the handler with its store, and an environment in which this process starts proofs of it."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return scales.copy(tmp_path / "copy")


def current(project: Project) -> tuple[str, Manifest]:
    """The key and the content of the current manifest."""
    key = ref_from_json(project.ref("scales").read_bytes()).manifest
    return key, Repository(open_store(f"file://{project.store}")).manifest(key, name="scales")


def proof_of(project: Project) -> Proof:
    """A proof of the current generation."""
    origin = Origin(str(project.folder / "handler.py"), "handler", "scales")
    return Proof(origin, {"scales": current(project)[0]}, f"file://{project.store}")


def in_proof(project: Project, body: str) -> None:
    """Let the handler's init do something in a proving process."""
    text = (project.folder / "handler.py").read_text().replace("load=load", "load=load, init=init")
    project.write(IN_PROOF.format(body=body.strip()) + text)


def is_gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for yet has ended too)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: object, what: str) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + RUN_SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# --- the verdict -----------------------------------------------------------------------------------------------------------


def test_same_answers(project: Project) -> None:
    """A fresh process that answers like the first worker proves the generation, and writes nothing anywhere."""
    before = {path: path.read_bytes() for path in project.store.rglob("*") if path.is_file()}
    assert proof_of(project).run(current(project)[1].warmup_digests) is True
    assert {path: path.read_bytes() for path in project.store.rglob("*") if path.is_file()} == before


def test_other_answers(project: Project) -> None:
    """An answer that differs from the first worker's refuses the generation, and the input is named."""
    first, _ = current(project)[1].warmup_digests
    with pytest.raises(ProofError, match="warm-up input 1 differently"):
        proof_of(project).run((first, "0" * 32))


@pytest.mark.parametrize("expected", [(), ("", "")], ids=["no inputs", "incomparable"])
def test_nothing_to_compare(project: Project, expected: tuple[str, ...]) -> None:
    """Where no answer of the first worker can be compared, a start that succeeds is the proof, and it says so."""
    assert proof_of(project).run(expected) is False


def test_answers_that_never_repeat(project: Project) -> None:
    """Answers that differ each time in the fresh process itself say nothing about the generation."""
    project.edit('"unit": model["unit"]}', '"unit": __import__("os").urandom(8)}')
    assert proof_of(project).run(("0" * 32, "1" * 32)) is False


def test_warm_up_that_ran_out_of_time(project: Project) -> None:
    """A fresh process whose warm-up had time for one iteration only is judged by that one."""
    project.edit(
        'warmup=[{"x": 0}, {"x": 2}]', 'warmup=__import__("coldstart").Warmup([{"x": 2}], maximum_seconds=0.0)'
    )
    _, digest = current(project)[1].warmup_digests
    assert proof_of(project).run((digest,)) is True
    with pytest.raises(ProofError, match="warm-up input 0 differently"):
        proof_of(project).run(("0" * 32,))


def test_nothing_to_fall_back_on(project: Project) -> None:
    """A generation that cannot be restored is refused: the fresh process does not run load instead."""
    project.edit("def load():\n", "def load():\n    open('loaded', 'w').close()\n")
    blob, *_ = project.objects("blobs")
    flip(blob)
    with pytest.raises(ProofError, match=r"could not start from the new generation: .*BlobCorruptError"):
        proof_of(project).run(current(project)[1].warmup_digests)
    assert not Path("loaded").exists()


def test_handler_that_fails(project: Project) -> None:
    """A handler that fails in the fresh process refuses the generation, with its error as the reason."""
    in_proof(project, "raise RuntimeError('no tokenizer here')")
    with pytest.raises(ProofError, match=r"phase custom_init .*no tokenizer here"):
        proof_of(project).run(current(project)[1].warmup_digests)


def test_handler_that_talks(project: Project) -> None:
    """What a handler prints, however much, does not get into the verdict's way."""
    in_proof(project, "os.write(1, b'{}' * 100_000); os.write(2, b'{}' * 100_000)")
    assert proof_of(project).run(current(project)[1].warmup_digests) is True


# --- the child ---------------------------------------------------------------------------------------------------------------


def test_child_without_an_answer(project: Project) -> None:
    """A fresh process that ends without an answer refuses the generation; its status and last words are told."""
    in_proof(project, "os.write(2, b'out of luck'); os._exit(7)")
    with pytest.raises(ProofError, match="status 7 and no answer: out of luck"):
        proof_of(project).run(current(project)[1].warmup_digests)


def test_child_that_never_listens(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ends before it has read what to prove is a refusal like any other."""
    deaf = project.folder / "deaf"
    deaf.write_text("#!/bin/sh\necho cannot run >&2\nexit 9\n")
    deaf.chmod(0o700)
    key = current(project)[0]
    question = Proof(Origin("x" * (1 << 20), "handler", "scales"), {"scales": key}, f"file://{project.store}")
    monkeypatch.setattr(sys, "executable", str(deaf))
    with pytest.raises(ProofError, match="status 9 and no answer: cannot run"):
        question.run(())


def test_hanging_child(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that takes too long is ended, and the generation refused."""
    monkeypatch.setattr(proof, "PROOF_SECONDS", 0.2)
    in_proof(project, HANGS)
    with pytest.raises(ProofError, match="no answer within"):
        proof_of(project).run(current(project)[1].warmup_digests)


def test_stop(project: Project) -> None:
    """Stopping a proof ends the child and what the child has started."""
    in_proof(project, HANGS)
    stopped, errors = proof_of(project), []

    def run() -> None:
        try:
            stopped.run(())
        except ProofError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    pids = _pids(Path("pids"))
    stopped.stop()
    thread.join(RUN_SECONDS)
    assert errors == ["the worker ended during the proof"]
    for pid in pids:
        wait_until(lambda pid=pid: is_gone(pid), f"process {pid} is still there")


def test_stopped_before_it_began(project: Project) -> None:
    """A proof that was stopped before it ran ends its child at once."""
    in_proof(project, HANGS)
    stopped = proof_of(project)
    stopped.stop()
    with pytest.raises(ProofError, match="the worker ended"):
        stopped.run(())


def test_what_a_child_leaves_behind(project: Project) -> None:
    """Processes that a handler leaves behind neither hold the proof up nor outlive it."""
    in_proof(project, LEAVES_ANOTHER)
    assert proof_of(project).run(current(project)[1].warmup_digests) is True
    _, left = _pids(Path("pids"))
    wait_until(lambda: is_gone(left), f"process {left} is still there")


def test_worker_that_is_killed(project: Project) -> None:
    """When the worker is killed the proving process ends with what it started, and the generation is not current."""
    in_proof(project, HANGS)
    before = project.ref("scales").read_bytes()
    with project.popen(
        "-m", "coldstart", "run", "handler.py", "--fresh", environment={"COLDSTART_CAPTURE": "on"}
    ) as worker:
        pids = _pids(project.folder / "pids")
        assert len(project.objects("manifests")) == 2
        os.kill(worker.pid, signal.SIGKILL)
    for pid in pids:
        wait_until(lambda pid=pid: is_gone(pid), f"process {pid} is still there")
    assert project.ref("scales").read_bytes() == before


def _pids(path: Path) -> list[int]:
    """What HANGS has written there, once it has."""
    wait_until(path.exists, "the proof never came to init")
    return [int(pid) for pid in path.read_text().split()]


# --- what it means for a worker ------------------------------------------------------------------------------------------------

GLOBAL = """
import numpy as np
from coldstart import coldstart

LABELS = []

class Net:
    def __init__(self, weights):
        self.weights = weights

def load(ctx):
    LABELS.append("left by load")
    return Net(np.arange(8.0))

def build(ctx):
    return Net(np.zeros(8))

@coldstart("labels", load=load, build=build, warmup=[1])
def handler(event, model):
    return {"sum": float(model.weights.sum()), "labels": list(LABELS)}
"""


def test_load_that_leaves_something_behind(tmp_path: Path) -> None:
    """Where load leaves a global that build does not bring back, nothing is published and every start loads."""
    project = Project(tmp_path)
    project.write(GLOBAL)
    for _ in range(2):
        start = project.run()
        assert (start.kind, start.reason) == ("cold", "no snapshot yet")
        assert start.output == {"sum": 28.0, "labels": ["left by load"]}
        assert not start.capture["published"]
        assert "answered warm-up input 0 differently" in start.capture["reason"]
    assert project.objects("refs") == []


def test_handler_that_answers_at_random(tmp_path: Path) -> None:
    """A handler whose answers never repeat gets its snapshot all the same."""
    project = Project(tmp_path)
    project.write(SCALES.replace('"unit": model["unit"]', '"unit": np.random.default_rng().random()'))
    assert project.run().capture["published"]
    assert project.run().kind == "restored"
