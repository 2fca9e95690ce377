"""Whole starts on a GPU, in real processes: the driver, nvCOMP, the kernels and cupy are fakes, all of coldstart is real."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.starts import ROOT, Project, flip

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="rings are memory files of Linux")

HANDLER = """
import numpy as np
from coldstart import coldstart

def load(ctx):
    import cupy
    assert ctx.device == "cuda", ctx.device
    random = np.random.default_rng(3)
    weights = (random.normal(0, 0.02, (2500, 2000)).astype("f4").view("u4") >> 16).astype("u2")
    table = cupy.asarray(random.normal(size=400_000).astype("f4"))
    return {
        "weights": cupy.asarray(weights),
        "table": table,
        "rows": table[1000:2000],
        "norms": [cupy.asarray(np.arange(number, dtype="f4")) for number in range(1, 40)],
        "words": np.arange(5000.0),
        "name": "gpu",
    }

@coldstart("gpu", load=load, warmup=[{"row": 1}], version="1")
def handler(event, model):
    import cupy
    from blake3 import blake3
    assert isinstance(model["weights"], cupy.ndarray) and isinstance(model["words"], np.ndarray)
    digest = blake3(model["weights"].get().tobytes() + model["table"].get().tobytes()).hexdigest()
    norms = [float(norm.sum().get()) for norm in model["norms"]]
    model["rows"][0] = 0.0
    shares = float(model["table"][1000:1001].get()[0]) == 0.0
    return [digest if event["input"]["row"] == 2 else "", norms, float(model["words"].sum()), shares]
"""
"""Weights of bf16, a view of another array, many small arrays, one of numpy. It writes to one number, as events must not."""

QUIET = HANDLER.replace('    model["rows"][0] = 0.0\n', "").replace("== 0.0", "== float(model['rows'][0:1].get()[0])")


@pytest.fixture
def project(tmp_path: Path, fake_gpu_folder: Path) -> Project:
    """A project whose processes see one fake GPU, and write down what its driver counted."""
    made = Project(tmp_path / "project")
    made.environment = {
        "LD_LIBRARY_PATH": str(fake_gpu_folder),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fake_gpu'}",
        "COLDSTART_DEVICE": "cuda",
        "FAKE_CUDA_REPORT": str(tmp_path / "report"),
    }
    made.write(QUIET)
    return made


def reports(project: Project) -> list[dict[str, Any]]:
    """What the driver of each process counted, in the order of their ends."""
    return [json.loads(line) for line in (project.folder.parent / "report").read_text().splitlines()]


def last_report(project: Project) -> dict[str, Any]:
    """What the driver of the process that ended last counted."""
    return reports(project)[-1]


def test_a_state_on_a_gpu_is_captured_and_restored(project):
    """The second start copies the stored bytes through pinned memory, decodes them on the device, and answers bit for bit the same."""
    first = project.run("--input", '{"row": 2}')
    assert first.kind == "cold"
    assert first.capture["published"], first.errors
    assert first.capture["stored_bytes"] < 0.8 * first.capture["raw_bytes"]
    second = project.run("--input", '{"row": 2}')
    assert (second.kind, second.output) == ("restored", first.output)
    counted = last_report(project)
    assert counted["launches"].get("coldstart_merge_planes")
    assert counted["pageable_host_to_device_copies"] == 0
    assert counted["host_to_device_bytes"] < 0.8 * first.capture["raw_bytes"]
    assert second.record["device"]["type"] == "cuda"
    assert second.record["device"]["name"] == "Fake H100 0"


def test_a_further_generation_copies_only_what_changed(project):
    """What the parent generation has is recognised by hashes that the device computes, and not copied from there."""
    first = project.run("--input", '{"row": 2}')
    (project.folder.parent / "report").unlink()
    further = project.run("--fresh", "--input", '{"row": 2}')
    assert further.capture["generation"] == 2, further.errors
    assert further.capture["written_bytes"] == 0
    worker = max(reports(project), key=lambda counted: counted["launches"].get("coldstart_blake3_tree", 0))
    assert worker["device_to_host_bytes"] < 0.1 * first.capture["raw_bytes"]


def test_another_gpu_may_be_named(project):
    """With ``cuda:1`` the state lives on the second GPU; a GPU that is not there is named in the reason."""
    project.environment["FAKE_CUDA_DEVICES"] = "2"
    project.write(QUIET.replace('ctx.device == "cuda"', 'ctx.device in ("cuda", "cuda:1", "cuda:7")'))
    first = project.run("--input", '{"row": 2}')
    second = project.run("--input", '{"row": 2}', COLDSTART_DEVICE="cuda:1")
    assert (second.kind, second.output) == ("restored", first.output)
    assert second.record["device"]["name"] == "Fake H100 1"
    third = project.run("--input", '{"row": 2}', COLDSTART_DEVICE="cuda:7")
    assert (third.kind, third.output) == ("fallback", first.output)
    assert "there is no GPU 7 for this process, which may use 2" in third.reason


def test_a_damaged_blob_is_answered_by_load(project):
    """Stored bytes that are not what they were never reach the device: the start falls back to load, and says why."""
    first = project.run("--input", '{"row": 2}')
    for path in project.objects("blobs"):
        path.chmod(0o600)
        flip(path, 100)
    again = project.run("--input", '{"row": 2}')
    assert (again.kind, again.output) == ("fallback", first.output)
    assert "BlobCorruptError" in again.reason


def test_without_a_driver_the_start_says_so(project):
    """Where the device is asked for and no driver is there, load runs, and the reason names the remedy."""
    project.run("--input", '{"row": 2}')
    broken = project.try_run("--input", '{"row": 2}', LD_LIBRARY_PATH="")
    assert "libcuda.so.1" in broken.errors
    assert "COLDSTART_DEVICE=cpu" in broken.errors


def test_states_of_the_host_start_as_ever(project):
    """A handler whose state is numpy's alone is captured and restored on a machine with a GPU: its arrays stay the host's."""
    project.write(
        """
        import numpy as np
        from coldstart import coldstart

        def load():
            return {"table": np.arange(3_000_000, dtype="f4")}

        @coldstart("host", load=load, warmup=[1])
        def handler(event, model):
            return float(model["table"].sum())
        """
    )
    project.environment["COLDSTART_KERNEL_CACHES"] = (
        "off"  # without NVML only the driver can tell which GPU kernels are for
    )
    first = project.run("--input", "1")
    second = project.run("--input", "1")
    assert (second.kind, second.output) == ("restored", first.output)
    assert not (project.folder.parent / "report").exists()  # nobody has even loaded the driver


def test_from_a_bucket_a_fetcher_begins_before_the_device_is_open(project, s3_options, s3_bucket):
    """The fetcher looks ref and manifest up and fills a ring of its own making, which the start then takes over."""
    project.environment |= {
        "COLDSTART_STORE": f"s3://{s3_bucket}/prefix",
        "COLDSTART_ENDPOINT_URL": str(s3_options.endpoint_url),
        "COLDSTART_REGION": "us-east-1",
        "COLDSTART_ACCESS_KEY_ID": "id",
        "COLDSTART_SECRET_ACCESS_KEY": "secret",
    }
    first = project.run("--input", '{"row": 2}')
    assert first.capture["published"], first.errors
    second = project.run("--input", '{"row": 2}', FAKE_CUDA_INIT_SECONDS="1")
    assert (second.kind, second.output) == ("restored", first.output)
    assert second.record["engines"] == ["process"]
    assert last_report(project)["pageable_host_to_device_copies"] == 0


def test_a_state_stored_as_ans_is_decoded_from_that(project):
    """With COLDSTART_CODEC=nvcomp-ans weights are stored in two forms: the GPU starts from one, and without nvCOMP from the other."""
    project.environment["COLDSTART_CODEC"] = "nvcomp-ans"
    first = project.run("--input", '{"row": 2}')
    assert first.capture["published"], first.errors
    shown = project.python("-m", "coldstart", "snapshot", "show", "gpu", "--json").document
    assert {form["codec"] for form in shown["forms"]} == {"nvcomp-ans/6"}
    second = project.run("--input", '{"row": 2}')
    assert (second.kind, second.output) == ("restored", first.output)
    newer = project.run("--input", '{"row": 2}', FAKE_NVCOMP_VERSION="7000", COLDSTART_LOG="json")
    assert (newer.kind, newer.output) == ("restored", first.output)
    assert "decoded by the processor" in newer.errors
    own = {shown["chunks"][form["chunk"]]["blob"] for form in shown["forms"]}
    for path in project.objects("blobs"):
        if path.name in own:
            path.unlink()
    third = project.run("--input", '{"row": 2}')
    assert (third.kind, third.output) == ("restored", first.output)
    assert last_report(project)["pageable_host_to_device_copies"] == 0


def test_ans_without_a_gpu_is_refused(project):
    """On a CPU the setting is an error that says what to use, before anything is loaded."""
    refused = project.try_run("--input", '{"row": 2}', COLDSTART_CODEC="nvcomp-ans", COLDSTART_DEVICE="cpu")
    assert "COLDSTART_CODEC=nvcomp-ans" in refused.errors
    assert "use auto" in refused.errors
