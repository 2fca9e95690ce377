"""benchmarks/gpu.sh without a GPU: rehearsed on the fakes, end to end, and what it says of what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import capture_latency, gpu
from benchmarks.on_gpu import starts, suite, table
from benchmarks.on_gpu.timing import REHEARSAL, WHOLE

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parent.parent
LIGHT = ("copies", "path", "zstd", "ans", "kernels", "restores", "compile", "latency")
"""Stages that take no more than seconds on fakes; the tests that ``tests`` runs are run as themselves."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="rings are memory files of Linux")


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, with this interpreter."""
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The document of a rehearsal, and what was printed."""
    folder = tmp_path_factory.mktemp("out")
    done = command("--rehearse", "--stages", ",".join(LIGHT), OUT=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.json")
    assert path.name.startswith("gpu-rehearsal-")
    return json.loads(path.read_text()), done.stdout


def test_the_command_is_known_to_work(rehearsed):
    """Every stage that fakes can run is measured, what needs torch on a GPU is left out with a reason, and tables are printed."""
    document, printed = rehearsed
    outcomes = {name: stage["outcome"] for name, stage in document["stages"].items()}
    assert outcomes == {**dict.fromkeys(LIGHT, "measured"), "latency": "left out"}
    assert document["rehearsal"]
    assert document["machine"]["gpu"]["name"].startswith("Fake")
    assert "the numbers mean nothing" in printed
    for name in LIGHT[:-1]:
        assert f"\n## {name}\n" in printed


def test_what_a_rehearsal_finds_is_whole(rehearsed):
    """All sides and rows are there, each with a rate; restores read what was stored; starts answer alike."""
    found = {name: stage.get("result") for name, stage in rehearsed[0]["stages"].items()}
    assert set(found["path"]["of_the_copy"]) == {"landing", "memory", "folder", "folder, threads"}
    assert [found["zstd"]["rows"][0]["plane"]["samples"], len(found["ans"]["rows"])] == [REHEARSAL.repeats, 1]
    places = {(row["codec"], row["place"], row["decoded_by"]) for row in found["restores"]["rows"]}
    assert ("raw", "loopback, 1 GB/s", "gpu") in places
    assert {row["engine"] for row in found["restores"]["rows"]} == {"process"}
    assert all(row["raw_bytes"] == 1 << 20 and row["raw_gb_per_second"] >= 0 for row in found["restores"]["rows"])
    assert all(row["degraded"] == [] for row in found["restores"]["rows"])
    on_gpu = [row for row in found["restores"]["rows"] if row["codec"] != "raw" and row["decoded_by"] == "gpu"]
    assert {row["codec"] for row in on_gpu} == {"planes+zstd", "nvcomp-ans/6"}
    assert all(row["device_bytes_beyond_state"] > 0 for row in on_gpu)  # scratch: the GPU has decoded
    planes = [row["stored_bytes"] for row in found["restores"]["rows"] if row["codec"] == "planes+zstd"]
    assert max(planes) < 0.75 * (1 << 20)
    kinds = [(run["scenario"], run["kind"]) for run in found["compile"]["runs"]]
    assert kinds[:3] == [("naive", "cold"), ("first", "cold"), ("restored", "restored")]
    assert found["compile"]["outputs_equal"]


def fake_environment(folder: Path, **more: str) -> Mapping[str, str]:
    """An environment in which the fakes of a folder are the real ones."""
    return {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT), **more}


def test_a_stage_that_fails_is_written_down_and_the_next_goes_on(tmp_path, fake_gpu_folder):
    """Its own words are in the document, and the status of the command says that not all went well."""
    environment = fake_environment(fake_gpu_folder, FAKE_CUDA_FAIL="cuMemHostRegister_v2:*=801")
    options = gpu.parsed(["--rehearse", "--stages", "copies,zstd", "--output", str(tmp_path / "found")])
    document = gpu.measured(options, environment, tmp_path)
    assert [stage["outcome"] for stage in document["stages"].values()] == ["failed", "measured"]
    assert "cuMemHostRegister_v2" in document["stages"]["copies"]["error"]
    assert json.loads((tmp_path / "found.json").read_text()) == document
    assert "copies | " in table.to_markdown(document)


def test_what_a_stage_found_before_it_failed_is_kept(tmp_path, fake_gpu_folder):
    """The first restore is a row of the document; the second, for which there is no memory, is its error."""
    environment = fake_environment(fake_gpu_folder, FAKE_CUDA_FAIL="cuMemAlloc_v2:2=2")
    found = gpu.child_says(("--stage", "restores"), environment, tmp_path, 60.0, rehearse=True)
    assert found["outcome"] == "failed"
    assert "was asked for" in found["error"]
    assert [row["place"] for row in found["result"]["rows"]] == ["folder, page cache"]


def test_a_stage_ends_with_its_time(tmp_path, fake_gpu_folder):
    """One that hangs is ended with all its processes; one for which no time is left is not begun."""
    environment = fake_environment(fake_gpu_folder, FAKE_CUDA_INIT_SECONDS="60")
    hung = gpu.child_says(("--stage", "copies"), environment, tmp_path, 1.0, rehearse=True)
    assert (hung["outcome"], hung["error"]) == ("failed", "it was ended after 1 s")
    late = gpu.one("zstd", gpu.LEAST_SECONDS - 1, environment, tmp_path, rehearse=True)
    assert late == {"outcome": "left out", "seconds": 0.0, "reason": "no time was left (--seconds)"}


def test_without_a_gpu_nothing_is_measured(tmp_path):
    """The command says why at once, writes nothing, and its status tells."""
    done = command("--stages", "copies", OUT=str(tmp_path), LD_LIBRARY_PATH=broken_driver(tmp_path / "broken"))
    assert done.returncode == 2
    assert "nothing was measured" in done.stderr
    assert "libcuda.so.1" in done.stderr
    assert not list(tmp_path.glob("*.json"))


def broken_driver(folder: Path) -> str:
    """A folder in which libcuda.so.1 is no library, wherever a real one may be."""
    folder.mkdir()
    (folder / "libcuda.so.1").write_text("nothing")
    return str(folder)


def test_a_rehearsal_is_never_a_result():
    """Without OUT and --output it goes to the screen alone; what is measured has the GPU's name."""
    fake, real = {"name": "Fake H100 0"}, {"name": "NVIDIA H100 80GB HBM3"}
    assert gpu.stem_of(gpu.parsed(["--rehearse"]), fake) is None
    assert gpu.stem_of(gpu.parsed([]), real) == gpu.RESULTS / "gpu-nvidia-h100-80gb-hbm3"


def test_stages_are_named():
    """All of them but the long one by default; a name that is none is refused with those that there are."""
    assert gpu.parsed([]).stages == tuple(name for name in gpu.STAGES if name != "bench")
    with pytest.raises(SystemExit):
        gpu.parsed(["--stages", "copies,pastries"])
    assert sum(size == 16 << 30 for size in WHOLE.restores) == 1


def test_the_suites_outcomes_are_counted(tmp_path):
    """From pytest's own report: failures by name, and why tests were skipped."""
    path = tmp_path / "report.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="fine"/><testcase classname="a" name="wrong"><failure/>'
        '</testcase><testcase classname="b" name="out"><skipped message="no moto"/></testcase></testsuite></testsuites>'
    )
    assert suite.outcomes(path) == {"passed": 1, "failed": ["a.wrong"], "skipped": 1, "skip_reasons": ["no moto"]}


def test_the_capture_benchmark_takes_what_it_is_called_with(monkeypatch):
    """Its options are read as they are given, and its handler for a GPU is Python."""

    class Reached(Exception):
        pass

    def round_of(options: Any, *_: Any) -> None:
        seen.append(options)
        raise Reached

    seen: list[Any] = []
    monkeypatch.setattr(capture_latency, "run_round", round_of)
    monkeypatch.setattr(capture_latency.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [*starts.CAPTURE_LATENCY, "--output", "latency.json"])
    with pytest.raises(Reached):
        capture_latency.main()
    assert (seen[0].device, seen[0].rounds, seen[0].streams) == ("cuda", 1, "back-to-back")
    source = capture_latency.HANDLER.format(megabytes=8, depth=2, threads=0, device="cuda")
    assert "torch.randn(4096, WIDTH)" in source
    compile(source, "served.py", "exec")


def test_a_handler_that_is_not_there_is_left_out(monkeypatch, tmp_path):
    """The stage says so, and is no failure."""
    monkeypatch.setattr(starts, "HANDLER", starts.ROOT / "handlers" / "none.py")
    assert starts.compile_starts(WHOLE) == {"left_out": "there is no handlers/none.py"}
    assert starts.bench(WHOLE) == {"left_out": "there is no handlers/none.py"}
