"""Damaged snapshots, in real processes: every start answers rightly, says what was wrong, and leaves a good snapshot behind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.starts import SCALED, Project, flip

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WHOLE = """
from pathlib import Path
import numpy as np
from coldstart import coldstart

HERE = Path(__file__).parent

def load(ctx):
    words = ctx.keep(HERE / "words.txt")
    weights = np.frombuffer((HERE / "weights.txt").read_bytes(), np.uint8).astype(np.float32)
    return {"weights": weights, "steps": np.arange(50), "words": len(words.read_text().split())}

def init(ctx, state):
    return {**state, "text": Path(ctx.files["words.txt"]).read_text()}

@coldstart("whole", load=load, init=init, warmup=[{"x": 2}])
def handler(event, model):
    return [float(model["weights"].sum()), int(model["steps"].sum()), model["words"], model["text"]]
"""
"""A snapshot with blobs of every sort: two item sizes, and a kept file."""

WORDS = "three small words"
OLD = [float(sum(b"old" * 40)), 1225, 3, WORDS]
NEW = [float(sum(b"newer" * 30)), 1225, 3, WORDS]
BLOBS = 4
"""Two generations of WHOLE share the steps and the file, and have weights of their own."""


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """WHOLE with two generations: the second was made when its weights had changed. Not to be changed."""
    project = Project(tmp_path_factory.mktemp("whole"))
    project.write(WHOLE)
    project.write(WORDS, "words.txt")
    project.write("old" * 40, "weights.txt")
    assert project.run().output == OLD
    project.write("newer" * 30, "weights.txt")
    assert project.run("--fresh").output == NEW
    assert len(project.objects("blobs")) == BLOBS
    return project


@pytest.fixture
def whole(generations: Project, tmp_path: Path) -> Project:
    """WHOLE with two generations, which start afresh: no restored files are there yet."""
    project = generations.copy(tmp_path / "whole")
    for path in project.objects("../files"):
        path.unlink()
    return project


def manifests(project: Project) -> list[dict[str, Any]]:
    """The manifests of the two generations, the older one first."""
    return [json.loads(path.read_text()) for path in project.objects("manifests")]


def recovers(project: Project, output: Any, *, generation: int = 3) -> None:
    """The next start is restored from a new generation, with nothing to recover from."""
    start = project.run()
    assert (start.kind, start.reason, start.record["recovered_by"]) == ("restored", "", "none")
    assert (start.record["generation"], start.output) == (generation, output)


@pytest.mark.parametrize("number", range(BLOBS))
@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
def test_altered_blob(whole: Project, number: int, position: int) -> None:
    """One altered byte of any blob is noticed: the start names it, answers rightly, and a good generation follows."""
    blob = whole.objects("blobs")[number]
    flip(blob, position)
    old, new = (set(manifest["chunks"]["blob"]) for manifest in manifests(whole))
    start = whole.run()
    if blob.name not in new:
        assert (start.kind, start.reason, start.output) == ("restored", "", NEW)
        return
    assert blob.name in start.reason
    assert "BlobCorruptError" in start.reason
    if blob.name in old:
        assert (start.kind, start.output) == ("fallback", NEW)
    else:
        assert (start.kind, start.record["recovered_by"]) == ("restored", "previous_generation")
        assert (start.record["generation"], start.output) == (1, OLD)
    assert start.capture["published"]
    recovers(whole, start.output)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _delete(path: Path) -> None:
    path.unlink()


def _replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def shared_blob(project: Project) -> Path:
    """A blob that both generations need."""
    old, new = (set(manifest["chunks"]["blob"]) for manifest in manifests(project))
    return next(path for path in project.objects("blobs") if path.name in old & new)


@pytest.mark.parametrize("damage", [_truncate, _empty, _delete])
def test_blob_that_is_not_whole(whole: Project, damage: Callable[[Path], None]) -> None:
    """A blob that is cut off or gone is a labelled fallback with the right answer, and is stored again."""
    blob = shared_blob(whole)
    damage(blob)
    start = whole.run()
    assert (start.kind, start.output) == ("fallback", NEW)
    assert blob.name in start.reason
    assert start.capture["published"]
    recovers(whole, NEW)


def test_blob_that_cannot_be_stored_again(whole: Project) -> None:
    """Where a damaged blob cannot be replaced, every start falls back, answers rightly, and says why nothing was stored."""
    _replace_by_a_folder(shared_blob(whole))
    for _ in range(2):
        start = whole.run()
        assert (start.kind, start.output) == ("fallback", NEW)
        assert not start.capture["published"]
        assert "a folder" in start.capture["reason"]


@pytest.mark.parametrize("damage", [_truncate, _empty, _delete, flip])
def test_current_manifest(whole: Project, damage: Callable[[Path], None]) -> None:
    """A current manifest that cannot be read is recovered from by the generation before it."""
    manifest = whole.store / json.loads(whole.ref("whole").read_text())["manifest"]
    damage(manifest)
    start = whole.run()
    assert (start.kind, start.record["recovered_by"]) == ("restored", "previous_generation")
    assert (start.record["generation"], start.output) == (1, OLD)
    assert start.reason
    assert start.capture["published"]
    recovers(whole, OLD)


def test_no_manifest_left(whole: Project) -> None:
    """Without any manifest the start falls back, and the next generation follows the ref's count."""
    for manifest in whole.objects("manifests"):
        manifest.unlink()
    start = whole.run()
    assert (start.kind, start.output) == ("fallback", NEW)
    assert start.reason.count("ObjectMissingError") == 2
    recovers(whole, NEW)


def _newer(path: Path) -> None:
    document = json.loads(path.read_text())
    document["format"]["major"] += 1
    path.write_text(json.dumps(document))


def test_manifest_of_a_newer_format(scales: Project) -> None:
    """A manifest that a newer coldstart wrote is not guessed at: a fallback that says so."""
    _newer(*scales.objects("manifests"))
    start = scales.run()
    assert (start.kind, start.output) == ("fallback", SCALED)
    assert "FormatVersionError" in start.reason


@pytest.mark.parametrize("damage", [_truncate, _empty, flip, _newer, _replace_by_a_folder])
def test_ref(scales: Project, damage: Callable[[Path], None]) -> None:
    """A ref that is malformed, or of a newer format, is a labelled fallback with the right answer."""
    damage(scales.ref("scales"))
    start = scales.run()
    assert (start.kind, start.output) == ("fallback", SCALED)
    assert "Error: " in start.reason
    assert start.capture["reason"] == start.reason


@pytest.mark.parametrize("damage", [_truncate, _empty, flip, _newer, _delete])
def test_newest_ref(scales: Project, damage: Callable[[Path], None]) -> None:
    """The ref of the newest key only explains: damaged, it costs the explanation and nothing else."""
    damage(scales.store / "refs" / "scales" / "newest")
    assert scales.run().kind == "restored"
    scales.edit("FACTOR = 3.0", "FACTOR = 4.0")
    start = scales.run()
    assert (start.kind, start.reason) == ("cold", "no snapshot yet")
    assert start.capture["published"]


def test_ref_of_another_snapshot(scales: Project) -> None:
    """A ref that was copied to another name does not give that name's handler these weights."""
    ref = scales.ref("scales")
    scales.edit('"scales"', '"scales-b"')
    copied = scales.store / "refs" / "scales-b" / ref.name
    copied.parent.mkdir()
    copied.write_bytes(ref.read_bytes())
    start = scales.run()
    assert (start.kind, start.output) == ("fallback", SCALED)
    assert "another snapshot" in start.reason


# --- restored files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(whole: Project) -> Path:
    """The restored copy of the kept file, put in place by one start."""
    assert whole.run().kind == "restored"
    (path,) = (path for path in (whole.folder / "files").rglob("words.txt"))
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("damage", [_truncate, _empty, _lengthen, _delete, flip])
def test_restored_file(whole: Project, kept: Path, damage: Callable[[Path], None]) -> None:
    """A restored file that was spoilt since is put in place again."""
    damage(kept)
    for _ in range(2):
        start = whole.run()
        assert (start.kind, start.reason, start.output) == ("restored", "", NEW)


def test_restored_file_with_a_folder_in_its_place(whole: Project, kept: Path) -> None:
    """A restored file that cannot be put in place again is a labelled fallback with the right answer."""
    _replace_by_a_folder(kept)
    start = whole.run()
    assert (start.kind, start.output) == ("fallback", NEW)
    assert "COLDSTART_FILES_FOLDER" in start.reason


def test_restored_files_that_cannot_be_placed(whole: Project) -> None:
    """Where restored files cannot be written the start falls back, and says which setting helps."""
    (whole.folder / "no-folder").write_text("a file")
    start = whole.run(COLDSTART_FILES_FOLDER=str(whole.folder / "no-folder"))
    assert (start.kind, start.output) == ("fallback", NEW)
    assert "COLDSTART_FILES_FOLDER" in start.reason


def test_load_that_fails_on_restored_files(project: Project) -> None:
    """On rung files, a load that fails with the restored files runs again without them."""
    project.write("""
        import numpy as np
        from pathlib import Path
        from coldstart import coldstart

        class Opaque:
            def __init__(self, text):
                self.text = text
                self.call = lambda: text

        def load(ctx):
            path = ctx.keep(Path(__file__).parent / "words.txt")
            if "files" in path.parts and (Path(__file__).parent / "refuse").exists():
                raise OSError(f"cannot use {path}")
            return Opaque(path.read_text())

        @coldstart("opaque", load=load, warmup=[1])
        def handler(event, model):
            return model.call()
    """)
    project.write(WORDS, "words.txt")
    assert project.run().capture["published"]
    project.write("", "refuse")
    start = project.run()
    assert (start.kind, start.output) == ("fallback", WORDS)
    assert start.reason.startswith("OSError: cannot use ")
    (project.folder / "refuse").unlink()
    assert project.run().record["rung"] == "files"


HUB = """
import os
from pathlib import Path
import huggingface_hub  # as if: what counts is the import, at which hubs are told where their files are
import numpy as np
from coldstart import coldstart

def load(ctx):
    if os.environ.get("HF_HUB_OFFLINE"):
        raise OSError("the hub cannot be reached")
    home = Path(os.environ["HF_HOME"])
    return {"w": np.frombuffer((home / "hub" / "models--a--b" / "config.json").read_bytes(), np.uint8) * 1}

@coldstart("hub", load=load, warmup=[1], version="1")
def handler(event, model):
    return int(model["w"].sum())
"""


@pytest.mark.parametrize("damage", [flip, _delete])
def test_hub_is_online_again(project: Project, damage: Callable[[Path], None]) -> None:
    """Hubs that were told to use restored files find their own ones again when the files cannot be restored."""
    project.write("", "huggingface_hub.py")
    project.write("{}", "hf/hub/models--a--b/config.json")
    project.write(HUB)
    project.environment = {"HF_HOME": str(project.folder / "hf")}
    cold = project.run()
    assert cold.capture["published"]
    assert project.run().kind == "restored"
    for blob in project.objects("blobs"):
        damage(blob)
    start = project.run()
    assert (start.kind, start.output) == ("fallback", cold.output)
    assert start.capture["published"]
    assert project.run().kind == "restored"
