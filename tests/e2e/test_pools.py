"""Pools in real processes: listed by the first start, allocated ahead by the next, and stored by none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coldstart.manifest import Pool, manifest_from_json
from tests.starts import ROOT, Project, Start

if TYPE_CHECKING:
    from pathlib import Path

CACHED = """
import numpy as np
from coldstart import coldstart

def load(ctx):
    return {"w": np.arange(64, dtype=np.float32), "seen": ctx.pool("seen", (64,), "float32"), "unit": "m"}

def init(ctx, state):
    kept = ctx.pool("kept", (1 << 22,), "float64", kind="activations")
    return {"dirty": bool(kept.any() or state["seen"].any()), "kept": kept, **state}

@coldstart("cached", load=load, init=init, warmup=[1.0, 2.0])
def handler(event, model):
    model["seen"] += event["input"]
    model["kept"][:64] += model["w"] * model["seen"]
    return {"sum": float(model["kept"].sum()), "dirty": model["dirty"]}
"""


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Start]:
    """The handler with its snapshot, and the start that made it. Not to be changed."""
    project = Project(tmp_path_factory.mktemp("pools") / "project")
    project.write(CACHED)
    return project, project.run("--input", "3")


def test_pools_of_a_plain_tree(cached: tuple[Project, Start]) -> None:
    """A tree with a pool in it is restored without the pool's bytes; both pools are zeros, and made beside the fetch."""
    project, first = cached
    (stored,) = project.objects("manifests")
    manifest = manifest_from_json(stored.read_bytes())
    assert manifest.raw_bytes == 256
    assert manifest.pools == (Pool("seen", "kv_cache", 256), Pool("kept", "activations", 1 << 25))
    second = project.run("--input", "3")
    assert (first.kind, second.kind) == ("cold", "restored")
    assert first.output == second.output == {"sum": 2016.0 * (1 + 3 + 6), "dirty": False}
    phases = [{phase["name"]: phase for phase in start.record["phases"]} for start in (first, second)]
    assert [each["pool_alloc"]["skipped"] for each in phases] == ["no snapshot lists pools", ""]
    (span,) = (span for span in second.record["spans"] if span["track"] == "pools")
    assert span["began_seconds"] < phases[1]["weight_load"]["ended_seconds"]
    assert span["ended_seconds"] <= phases[1]["pool_alloc"]["ended_seconds"]


def test_phase_switched_off(cached: tuple[Project, Start]) -> None:
    """Without the phase nothing is allocated ahead, and the answers are the same."""
    project, first = cached
    second = project.run("--input", "3", COLDSTART_SKIP_PHASES="pool_alloc", COLDSTART_CAPTURE="off")
    assert (second.kind, second.output) == ("restored", first.output)
    assert [span for span in second.record["spans"] if span["track"] == "pools"] == []


def test_handler_that_asks_for_more(cached: tuple[Project, Start], tmp_path: Path) -> None:
    """``init`` is no part of the key: one that asks for a larger pool than its snapshot lists gets that."""
    project, first = cached[0].copy(tmp_path / "more"), cached[1]
    project.edit("1 << 22", "1 << 23")
    second = project.run("--input", "3", COLDSTART_CAPTURE="off")
    assert (second.kind, second.output) == ("restored", first.output)


ON_A_GPU = """
import cupy
from coldstart import coldstart

def load(ctx):
    return {"w": cupy.asarray([[1.0, 2.0], [3.0, 4.0]], "float32"), "cache": ctx.pool("cache", (64, 2, 2), "float32")}

def init(ctx, state):
    return {"dirty": float(ctx.pool("cache", (64, 2, 2), "float32").sum().get()), **state}

@coldstart("cached", load=load, init=init, warmup=[1])
def handler(event, model):
    model["cache"][event["input"]] = model["w"] @ model["w"]
    return {"sum": float(model["cache"].sum().get()), "dirty": model["dirty"]}
"""


def test_pools_on_a_gpu(tmp_path: Path, fake_gpu_folder: Path) -> None:
    """On a GPU (the fake driver's) a pool is device memory: not captured from there, and there again in the next start."""
    project = Project(tmp_path)
    project.environment = {
        "COLDSTART_DEVICE": "cuda",
        "LD_LIBRARY_PATH": str(fake_gpu_folder),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fake_gpu'}",
    }
    project.write(ON_A_GPU)
    first = project.run("--input", "3")
    second = project.run("--input", "3")
    (stored,) = project.objects("manifests")
    manifest = manifest_from_json(stored.read_bytes())
    assert (manifest.device_type, manifest.raw_bytes) == ("cuda", 256)
    assert [(row.framework, row.paths) for row in manifest.pool_arrays] == [("cupy", ('["cache"]',))]
    assert (first.kind, second.kind) == ("cold", "restored")
    assert first.output == second.output == {"sum": 2 * 54.0, "dirty": 0.0}
    assert [span["name"] for span in second.record["spans"] if span["track"] == "pools"] == ["allocate pools"]


RAW = """
import json, time
from coldstart import events
from coldstart.devices import pick
from coldstart.metrics import Timeline
from coldstart.pools import Pools

memory = Pools("net", pick("cuda"), Timeline(time.monotonic), events.bus).raw("program/64", 5000)
print(json.dumps([type(memory).__name__, len(memory), sum(memory.read(0, 5000))]))
"""


def test_bytes_of_a_program_on_a_gpu(tmp_path: Path, fake_gpu_folder: Path) -> None:
    """What a program writes to is device memory as the arena's is, zeroed."""
    project = Project(tmp_path)
    found = project.python("-c", RAW, environment={"LD_LIBRARY_PATH": str(fake_gpu_folder)})
    assert found.document == ["DeviceBytes", 5000, 0], found.errors


BUILT = """
import numpy as np
from coldstart import coldstart

class Net:
    pass

def load(ctx):
    net = build(ctx)
    for layer in net.layers:
        layer.w = np.ones(8)
    return net

def build(ctx):
    keys = ctx.pool("keys", (2, 16, 8), "float64")
    net = Net()
    net.layers = [Net() for _ in keys]
    for layer, own in zip(net.layers, keys):
        layer.w, layer.keys = np.empty(8), own
    return net

@coldstart("built", load=load, build=build, warmup=[1, 2])
def handler(event, net):
    for place, layer in enumerate(net.layers):
        layer.keys[event["input"]] = layer.w * (place + 1)
    return [float(layer.keys[event["input"]].sum()) for layer in net.layers]
"""


def test_views_of_a_pool_in_what_build_makes(tmp_path: Path) -> None:
    """Layers whose caches are parts of one pool are restored with ``build``, which asks for it: only weights are stored."""
    project = Project(tmp_path)
    project.write(BUILT)
    first = project.run("--input", "3")
    second = project.run("--input", "3")
    (stored,) = project.objects("manifests")
    manifest = manifest_from_json(stored.read_bytes())
    assert [leaf.path for leaf in manifest.leaves] == ["layers[0].w", "layers[1].w"]
    assert manifest.pool_arrays[0].paths == ("layers[0].keys", "layers[1].keys")
    assert (second.kind, second.record["rung"]) == ("restored", "arrays")
    assert first.output == second.output == [8.0, 16.0]
    assert [span["name"] for span in second.record["spans"] if span["track"] == "pools"] == ["allocate pools"]
