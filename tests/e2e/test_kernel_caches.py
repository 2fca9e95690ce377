"""Kernel caches in real processes: restored before they are looked for, kept per platform, merged, and never in the way."""

from __future__ import annotations

import json
import os
import stat
import sys
from typing import TYPE_CHECKING, Any

import pytest

from coldstart.signing import new_keys
from tests.starts import ROOT, Project, flip

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.stores import StoreOptions
    from tests.starts import Start

KERNELS = """
import os
import numpy as np
from coldstart import coldstart
from tests.kernel_libraries import compile_all

SEEN = {name: os.environ.get(name) for name in ("CUPY_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR")}
HITS = []

def load():
    return {"w": np.ones(1000, np.float32)}

def compile_(ctx, state):
    here = os.path.dirname(__file__)
    for name in open(os.path.join(here, "kernels.txt")).read().split():
        HITS.append(compile_all(name))

@coldstart("kernels", load=load, compile=compile_, warmup=[1.0])
def handler(event, model):
    answer = {"sum": float(model["w"].sum()) * event["input"]}
    return {**answer, "hits": HITS, "seen": SEEN} if "run" in event["id"] else answer
"""
"""Its compile step has the libraries' kernels of all names in kernels.txt; the answer to a real event tells which were cached."""

OTHER_PLATFORM = {"TRITON_OTHER": "1"}
"""A compile setting: what was compiled under another one is another platform's."""
SEEN = ("CUPY_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR")
HIT, MISS = [True] * 4, [False] * 4


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Start]:
    """A project whose first start compiled one kernel of each library and published its generation, and that start."""
    project = Project(tmp_path_factory.mktemp("kernels"))
    project.write(KERNELS)
    write_kernels(project, "a")
    start = project.run()
    assert start.capture["published"], start.capture
    return project, start


@pytest.fixture
def kernels(published: tuple[Project, Start], tmp_path: Path) -> Project:
    """The published project on another machine: its store and its code, and no folder of restored files."""
    copy = published[0].copy(tmp_path / "elsewhere")
    copy.environment["COLDSTART_FILES_FOLDER"] = str(tmp_path / "fresh")
    return copy


def write_kernels(project: Project, *names: str) -> None:
    """Say which kernels the handler has at its next start."""
    (project.folder / "kernels.txt").write_text(" ".join(names))


def moved(project: Project, number: int) -> None:
    """The next start finds no folder of restored files."""
    project.environment["COLDSTART_FILES_FOLDER"] = str(project.folder / f"fresh-{number}")


def roots(project: Project) -> dict[str, int]:
    """The platforms in the current manifest, with the number of their files."""
    key = json.loads(project.ref("kernels").read_bytes())["manifest"]
    manifest = json.loads((project.store / key).read_bytes())
    found: dict[str, int] = {}
    for root in manifest["files"]["root"]:
        found[root] = found.get(root, 0) + root.startswith("kernels_")
    return found


def use(start: Start) -> dict[str, Any]:
    """What the start's record says of kernel caches."""
    found: dict[str, Any] = start.record["kernel_caches"]
    return found


def test_first_start(published: tuple[Project, Start]) -> None:
    """The first start compiles in a private folder, set before the module was imported, and its generation has the files."""
    project, start = published
    folders = {os.path.dirname(path) for path in start.output["seen"].values()}
    (folder,) = folders
    assert folder.startswith(f"{project.folder}/files/kernels/kernels/")
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert start.output["hits"] == [MISS]
    assert (use(start)["restored_files"], use(start)["new_files"]) == (0, 8)  # one of CuPy, four of Triton, two, one
    assert list(roots(project).values()) == [8]
    assert not list(project.folder.glob("files/kernels/kernels/*.proof-*")), "what the proof compiled was left"


def test_restored(kernels: Project) -> None:
    """A start on another machine finds every library's kernel, compiles none, and no further generation is made."""
    start = kernels.run()
    assert (start.kind, start.reason, start.output["hits"]) == ("restored", "", [HIT])
    assert (use(start)["restored_files"], use(start)["new_files"], use(start)["obstacle"]) == (8, 0, "")
    assert start.capture == {"published": False, "reason": ""}


def test_more_kernels(kernels: Project) -> None:
    """A start that compiles one more adds it: the next generation is the last one with both, and weights are not sent again."""
    before = set(kernels.objects("blobs"))
    write_kernels(kernels, "a", "b")
    start = kernels.run()
    assert start.output["hits"] == [HIT, [False, False, False, False]]
    assert (start.capture["published"], start.capture["generation"]) == (True, 2)
    assert sum(path.stat().st_size for path in set(kernels.objects("blobs")) - before) < 4000
    moved(kernels, 1)
    again = kernels.run()
    assert (again.kind, again.output["hits"], again.output["sum"]) == ("restored", [HIT, HIT], 1000.0)
    assert again.capture == {"published": False, "reason": ""}


def test_other_platform(kernels: Project) -> None:
    """Another platform keeps the weights, is told why it goes without, and adds its own; the first platform's are carried along."""
    start = kernels.run(**OTHER_PLATFORM)
    assert (start.kind, start.output["hits"]) == ("restored", [MISS])
    assert use(start)["obstacle"] == "they are of another platform (another compile settings)"
    assert start.capture["published"]
    assert sorted(roots(kernels).values()) == [8, 8]
    moved(kernels, 1)
    assert kernels.run().output["hits"] == [HIT]
    assert kernels.run(**OTHER_PLATFORM).output["hits"] == [HIT]


def test_new_weights_keep_kernels(kernels: Project) -> None:
    """A fresh generation, made of the state anew, keeps the kernels of its parent."""
    start = kernels.run("--fresh", **OTHER_PLATFORM)
    assert (start.kind, start.capture["generation"]) == ("cold", 2)
    assert sorted(roots(kernels).values()) == [8, 8]


def test_untrusted_store(kernels: Project) -> None:
    """Kernels of a store that others may change are ignored, and the reason is told; the weights are restored."""
    kernels.store.chmod(0o777)
    start = kernels.run()
    assert (start.kind, start.output["hits"], start.output["sum"]) == ("restored", [MISS], 1000.0)
    assert "is not trusted to give code: others may write to" in use(start)["obstacle"]
    assert start.capture == {"published": False, "reason": ""}
    moved(kernels, 1)
    assert kernels.run(COLDSTART_TRUST_STORE="on").output["hits"] == [HIT]


def test_users_own_folders(kernels: Project) -> None:
    """A cache whose variable the user has set is left alone: nothing is put there, and nothing taken from it."""
    own = kernels.folder / "mine"
    start = kernels.run(CUPY_CACHE_DIR=str(own))
    assert start.output["seen"]["CUPY_CACHE_DIR"] == str(own)
    assert start.output["hits"] == [[False, True, True, True]]
    assert start.capture == {"published": False, "reason": ""}


def test_switched_off(kernels: Project) -> None:
    """COLDSTART_KERNEL_CACHES=off sets no variable."""
    start = kernels.run(COLDSTART_KERNEL_CACHES="off", COLDSTART_CAPTURE="off", **dict.fromkeys(SEEN, "/nonexistent"))
    assert start.kind == "restored"
    assert set(start.output["seen"].values()) == {"/nonexistent"}


def test_damaged_cache(kernels: Project) -> None:
    """A damaged blob that only kernels need costs the kernels and nothing else."""
    manifest = json.loads(max(kernels.objects("manifests")).read_bytes())
    consumers = manifest["segments"]["consumer"]
    chunks = zip(manifest["chunks"]["segment"], manifest["chunks"]["blob"], strict=True)
    (blob,) = (blob for segment, blob in chunks if consumers[segment].startswith("kernels_"))
    flip(kernels.store / "blobs" / blob[:2] / blob)
    start = kernels.run()
    assert (start.kind, start.output["hits"], start.record["recovered_by"]) == ("restored", [MISS], "none")
    assert use(start)["restored_files"] == 0
    assert use(start)["obstacle"].startswith("BlobCorruptError: ")


def test_start_fails_with_them(kernels: Project) -> None:
    """A start that fails with cached kernels is tried again without any: a bad cache costs time and not the worker."""
    kernels.run()
    (cubin,) = (kernels.folder.parent / "fresh").rglob("*_2.cubin")
    cubin.write_text("rubbish")
    start = kernels.run()
    assert (start.kind, start.output["sum"], start.output["hits"][-1]) == ("restored", 1000.0, MISS)
    assert "device kernel image is invalid" in use(start)["obstacle"]
    assert start.capture == {"published": False, "reason": ""}
    assert kernels.run().output["hits"] == [HIT]


def test_proof_fails_with_them(tmp_path: Path) -> None:
    """Where a fresh process cannot go on with the kernels, the generation is published without, and adding them is given up."""
    project = Project(tmp_path)
    guard = '        if HITS[-1][0] and ".proof-" in SEEN["CUPY_CACHE_DIR"]:\n            raise RuntimeError("no such image")\n'
    project.write(KERNELS.replace("HITS.append(compile_all(name))\n", "HITS.append(compile_all(name))\n" + guard))
    write_kernels(project, "a")
    first = project.run()
    assert first.capture["published"], first.capture
    assert list(roots(project)) == []
    moved(project, 1)
    second = project.run()
    assert (second.kind, second.output["hits"], second.capture["published"]) == ("restored", [MISS], False)
    assert "no such image" in second.capture["reason"]
    moved(project, 2)
    third = project.run()
    assert third.capture["reason"].startswith("kernel caches were tried before: ")
    assert third.output["sum"] == 1000.0


def test_remote_store(tmp_path: Path, s3_bucket: str, s3_options: StoreOptions) -> None:
    """Of a remote store kernels are kept where snapshots are signed, and not where they are not."""
    project = Project(tmp_path)
    project.write(KERNELS)
    write_kernels(project, "a")
    project.environment |= {
        "COLDSTART_STORE": f"s3://{s3_bucket}/kernels",
        "COLDSTART_ENDPOINT_URL": s3_options.endpoint_url,
        "COLDSTART_REGION": s3_options.region,
        "COLDSTART_ACCESS_KEY_ID": s3_options.access_key_id,
        "COLDSTART_SECRET_ACCESS_KEY": s3_options.secret_access_key,
    }
    unsigned = project.run()
    assert unsigned.capture["published"], unsigned.capture
    assert "only a folder of this user's own is trusted by itself" in use(unsigned)["obstacle"]
    moved(project, 1)
    assert project.run().output["hits"] == [MISS]
    moved(project, 2)
    signs = {"COLDSTART_SIGNING_KEY": new_keys().signing}
    signed = project.run("--fresh", **signs)
    assert signed.capture["published"], signed.capture
    moved(project, 3)
    start = project.run(**signs)
    assert (start.kind, start.output["hits"], start.record["engines"]) == ("restored", [HIT], ["process"])
    assert start.capture == {"published": False, "reason": ""}


ON_GPU = (
    KERNELS.replace("np.ones(1000, np.float32)", "cupy.asarray(np.ones(1000, np.float32))")
    .replace("import numpy as np", "import cupy\nimport numpy as np")
    .replace('model["w"].sum()', 'model["w"].get().sum()')
)
"""The same with its weights on the device; kernels are files, and stay the host's."""


@pytest.mark.skipif(sys.platform != "linux", reason="rings are memory files of Linux")
def test_on_a_gpu(tmp_path: Path, fake_gpu_folder: Path) -> None:
    """On a GPU the weights go to the device and the kernels beside it; a start that adds kernels changes neither."""
    project = Project(tmp_path / "project")
    project.environment = {
        "LD_LIBRARY_PATH": str(fake_gpu_folder),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fake_gpu'}",
        "COLDSTART_DEVICE": "cuda",
    }
    project.write(ON_GPU)
    write_kernels(project, "a")
    first = project.run()
    assert first.capture["published"], first.capture
    write_kernels(project, "a", "b")
    for number, hits in enumerate(([HIT, [False] * 4], [HIT, HIT])):
        moved(project, number)
        start = project.run()
        assert (start.kind, start.output["sum"], start.output["hits"]) == ("restored", 1000.0, hits)
        assert start.record["device"]["type"] == "cuda"
    manifest = json.loads(max(project.objects("manifests")).read_bytes())
    (record,) = manifest["platform"].values()
    assert json.loads(record)["facts"]["gpu"].startswith("Fake H100")
    assert json.loads(record)["rounds"] == 2


# --- torch.compile, for real -------------------------------------------------------------------------------------------

COMPILED = """
import torch
from coldstart import coldstart

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(16, 16)

    def forward(self, x):
        return torch.nn.functional.gelu(self.inner(x)).softmax(-1) * 2

def load():
    torch.manual_seed(0)
    return Block().eval()

def build(ctx):
    with ctx.meta():
        return Block().eval()

def compile_(ctx, model):
    return torch.compile(model)

@coldstart("compiled", load=load, build=build, compile=compile_, warmup=[1.0])
def handler(event, model):
    from torch._dynamo.utils import counters

    with torch.inference_mode():
        answer = model(torch.full((4, 16), float(event["input"]))).sum().item()
    if "run" not in event["id"]:
        return answer
    return {"answer": answer, "inductor": dict(counters["inductor"]), "autograd": dict(counters["aot_autograd"])}
"""


@pytest.mark.slow
@pytest.mark.demo
def test_torch_compile(tmp_path: Path) -> None:
    """A compiled torch module: the next machine's compiler finds its graphs and its kernels, and answers bit for bit."""
    project = Project(tmp_path)
    project.environment["TMPDIR"] = str(tmp_path)  # where torch keeps what this machine has compiled before
    project.write(COMPILED)
    first = project.run()
    assert first.output["inductor"]["fxgraph_cache_miss"] == 1
    assert first.capture["published"], first.capture
    moved(project, 1)
    second = project.run()
    assert (second.kind, second.reason, use(second)["obstacle"]) == ("restored", "", "")
    assert second.output["inductor"]["fxgraph_cache_hit"] == 1
    assert second.output["autograd"]["autograd_cache_hit"] == 1
    assert "fxgraph_cache_miss" not in second.output["inductor"]
    assert second.output["answer"] == first.output["answer"]
    assert use(second)["restored_files"] == use(first)["new_files"] > 0
    assert use(second)["new_files"] == 0
    assert second.capture == {"published": False, "reason": ""}
    moved(project, 2)
    other = project.run(TRITON_OTHER="1", COLDSTART_CAPTURE="off")
    assert (other.kind, other.output["inductor"]["fxgraph_cache_miss"]) == ("restored", 1)
    assert use(other)["obstacle"] == "they are of another platform (another compile settings)"
