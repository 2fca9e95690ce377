"""Whole starts on a GPU, in real processes: the first loads and captures, the next restores and answers the same."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.test_gpu import QUIET
from tests.gpu.conftest import packages_of_this_process
from tests.starts import ROOT, Project, flip

if TYPE_CHECKING:
    from pathlib import Path

    from tests.gpu.conftest import RealMachine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

OF_TORCH = """
import torch
from coldstart import coldstart

def network(device, seed=None):
    with torch.device(device):
        if seed is not None:
            torch.manual_seed(seed)
        layers = [torch.nn.Linear(1024, 1024, dtype=torch.bfloat16) for _ in range(8)]
        return torch.nn.Sequential(*layers).eval().requires_grad_(False)

def load(ctx):
    return network(ctx.device, seed=4)

def build(ctx):
    return network("meta")

@coldstart("gpu-torch", load=load, build=build, warmup=[{"x": 1}], version="1")
def handler(event, model):
    with torch.inference_mode():
        x = torch.linspace(-1, 1, 1024, device=next(model.parameters()).device, dtype=torch.bfloat16)
        answer = model(x * event["input"]["x"])
    sums = [float(parameter.double().sum()) for parameter in model.parameters()]
    return [answer.float().tolist()[:16], sums, str(answer.device)]
"""
"""16 MB of bf16 weights; the answer has bits of all of them."""


@pytest.fixture
def project(machine: RealMachine, tmp_path: Path) -> Project:
    """A project whose processes use the GPU."""
    made = Project(tmp_path / "project")
    made.environment = {
        "COLDSTART_DEVICE": "cuda",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), packages_of_this_process()])),
    }
    return made


def restored_as_loaded(project: Project, source: str, value: Any, **environment: str) -> dict[str, Any]:
    """The record of a second start, which has to be restored and to answer as the first one did."""
    project.write(source)
    first = project.run("--input", json.dumps(value), **environment)
    assert first.kind == "cold"
    assert first.capture["published"], first.errors
    second = project.run("--input", json.dumps(value), **environment)
    assert (second.kind, second.output) == ("restored", first.output), second.errors
    assert second.record["device"]["type"] == "cuda"
    return second.record


def test_a_state_of_torch_is_restored(project, torch):
    """Weights of a module, bit for bit: the answers and sums of both starts are equal. A damaged blob never reaches nvCOMP."""
    record = restored_as_loaded(project, OF_TORCH, {"x": 2}, COLDSTART_CODEC="planes+zstd")
    assert record["bytes"]["stored"] < 0.8 * record["bytes"]["raw"]
    for path in project.objects("blobs"):
        path.chmod(0o600)
        flip(path, 100)
    again = project.run("--input", '{"x": 2}', "--no-wait")
    assert again.kind == "fallback"
    assert "BlobCorruptError" in again.reason


def test_a_state_of_cupy_is_restored(project, cupy):
    """The handler that is started on the fakes, on cupy itself."""
    restored_as_loaded(project, QUIET, {"row": 2})


def test_a_state_in_a_bucket_is_restored(project, torch, request):
    """From an S3 server, by a fetcher process that began before the device was open."""
    pytest.importorskip("moto", reason="moto, the S3 server of the tests, is not installed")
    pytest.importorskip("boto3", reason="boto3, which writes to S3, is not installed")
    bucket = request.getfixturevalue("s3_bucket")
    project.environment |= {
        "COLDSTART_STORE": f"s3://{bucket}/prefix",
        "COLDSTART_ENDPOINT_URL": request.getfixturevalue("s3_endpoint"),
        "COLDSTART_REGION": "us-east-1",
        "COLDSTART_ACCESS_KEY_ID": "id",
        "COLDSTART_SECRET_ACCESS_KEY": "secret",
    }
    record = restored_as_loaded(project, OF_TORCH, {"x": 2})
    assert record["engines"] == ["process"]
