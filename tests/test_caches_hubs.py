"""How hub libraries are led to restored files, whether they were imported before or not."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from coldstart.caches import cache_roots, place_files, point_back, point_to, recorder
from coldstart.config import read_variable
from coldstart.errors import StoreSetupError
from coldstart.manifest import manifest_to_json
from tests.cache_files import COMMIT, hub_home, manifest_and_arena

CONSTANTS = "huggingface_hub.constants"


@pytest.fixture(autouse=True)
def hubs_as_before(monkeypatch):
    """No hub's library is imported as far as a test can see, and none leaves hubs pointed or a recording open."""
    monkeypatch.delitem(sys.modules, CONSTANTS, raising=False)
    yield
    point_back()
    recorder.end()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's hub cache."""
    return hub_home(tmp_path, monkeypatch)


# --- pointing hubs ---------------------------------------------------------------------------------------------------


VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def variables() -> dict[str, str | None]:
    """What the hubs of this process would read now."""
    return {name: read_variable(name) for name in VARIABLES}


def test_hubs_are_pointed_to_the_files_and_back(tmp_path, home):
    """While pointed, the roots' variables name the restored folder and the hub is offline; then all is as it was."""
    manifest, _ = manifest_and_arena(tmp_path, {"hub/models--a/refs/main": b"x"}, root="HF_HOME")
    before = variables()
    assert point_to(tmp_path / "files", manifest) == ""
    assert variables() == {
        "HF_HOME": str(tmp_path / "files/HF_HOME"),
        "HF_HUB_CACHE": str(tmp_path / "files/HF_HOME/hub"),
        "TORCH_HOME": str(tmp_path / "torch"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    assert cache_roots()["HF_HOME"] == tmp_path / "files/HF_HOME"
    point_back()
    assert variables() == before
    point_back()
    assert variables() == before


def test_only_the_roots_that_have_files_are_pointed(tmp_path, home):
    """Files of torch's cache alone leave the other hub where it is, and online; kept files point nothing."""
    before = variables()
    manifest, _ = manifest_and_arena(tmp_path, {"hub/checkpoints/a.pth": b"x"}, root="TORCH_HOME")
    assert point_to(tmp_path / "files", manifest) == ""
    assert variables() == {**before, "TORCH_HOME": str(tmp_path / "files/TORCH_HOME")}
    point_back()
    kept, _ = manifest_and_arena(tmp_path, {"a": b"x"})
    assert point_to(tmp_path / "files", kept) == ""
    assert variables() == before


def test_a_hub_cache_of_its_own_is_pointed(tmp_path, home):
    """Files of a hub cache outside HF_HOME are found where they are placed."""
    manifest, _ = manifest_and_arena(tmp_path, {"models--a/refs/main": b"x"}, root="HF_HUB_CACHE")
    point_to(tmp_path / "files", manifest)
    assert read_variable("HF_HUB_CACHE") == str(tmp_path / "files/HF_HUB_CACHE")
    assert read_variable("HF_HOME") == str(home)
    assert read_variable("HF_HUB_OFFLINE") == "1"


def test_pointing_twice_remembers_what_was_first(tmp_path, home):
    """After the files of two parts were pointed to, pointing back leads to the user's own caches, not to the first part's."""
    before = variables()
    first, _ = manifest_and_arena(tmp_path, {"hub/models--a/refs/main": b"x"}, root="HF_HOME")
    second, _ = manifest_and_arena(tmp_path, {"hub/models--b/refs/main": b"y"}, root="HF_HOME")
    point_to(tmp_path / "one", first)
    point_to(tmp_path / "two", second)
    assert read_variable("HF_HOME") == str(tmp_path / "two/HF_HOME")
    point_back()
    assert variables() == before


def test_pointing_to_the_same_folder_again_changes_nothing(tmp_path, home, monkeypatch):
    """The early start and the start itself both point to the folder, the second time with the hub imported from there."""
    manifest, arena = manifest_and_arena(tmp_path, {"hub/models--a/refs/main": b"x"}, root="HF_HOME")
    folder = place_files(manifest, arena, tmp_path / "base")
    before = variables()
    point_to(folder, manifest)
    pointed = types.SimpleNamespace(HF_HOME=str(folder / "HF_HOME"), HF_HUB_CACHE=str(folder / "HF_HOME/hub"))
    monkeypatch.setitem(sys.modules, CONSTANTS, pointed)
    assert point_to(folder, manifest) == ""
    point_back()
    assert variables() == before


def test_pointing_elsewhere_while_pointed_does_not_make_offline_the_users_wish(tmp_path, home, monkeypatch):
    """That hubs are offline because of the first pointing is not taken for what the user had set."""
    first, _ = manifest_and_arena(tmp_path, {"hub/models--a/refs/main": b"x"}, root="HF_HOME")
    second, _ = manifest_and_arena(tmp_path, {"hub/models--b/refs/main": b"y"}, root="HF_HOME")
    point_to(tmp_path / "one", first)
    point_to(tmp_path / "two", second)
    constants = types.SimpleNamespace(HF_HUB_OFFLINE=True)
    monkeypatch.setitem(sys.modules, CONSTANTS, constants)
    point_back()
    assert not constants.HF_HUB_OFFLINE


@pytest.fixture
def imported(home, monkeypatch):
    """The constants of a hub's library that was imported with the user's caches."""
    constants = types.SimpleNamespace(HF_HOME=str(home), HF_HUB_CACHE=str(home / "hub"), HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, CONSTANTS, constants)
    return constants


LATE = {
    "hub/models--org--new/refs/main": b"d" * 40,
    "hub/models--org--new/snapshots/dd/config.json": b"{}",
    "hub/models--org--name/refs/main": b"d" * 40,
}


def test_a_hub_that_was_imported_gets_links_in_its_live_cache(tmp_path, home, imported):
    """A library that has read its variables finds the restored files in its own cache, offline; nothing there is replaced."""
    manifest, arena = manifest_and_arena(tmp_path, LATE, root="HF_HOME")
    before = variables()
    folder = place_files(manifest, arena, tmp_path / "base")
    assert "linked" in point_to(folder, manifest)
    new = home / "hub/models--org--new"
    assert (
        new / "snapshots/dd/config.json"
    ).resolve() == folder / "HF_HOME/hub/models--org--new/snapshots/dd/config.json"
    assert (new / "refs/main").read_bytes() == b"d" * 40
    assert (home / "hub/models--org--name/refs/main").read_text() == COMMIT
    assert imported.HF_HUB_OFFLINE
    assert variables() == before
    point_back()
    assert not imported.HF_HUB_OFFLINE


def test_a_ref_in_the_live_cache_is_a_copy(tmp_path, home, imported):
    """A hub writes a ref in place, and must not write through a link into the restored folder."""
    manifest, arena = manifest_and_arena(tmp_path, LATE, root="HF_HOME")
    folder = place_files(manifest, arena, tmp_path / "base")
    point_to(folder, manifest)
    (home / "hub/models--org--new/refs/main").write_text("e" * 40)
    assert (folder / "HF_HOME/hub/models--org--new/refs/main").read_text() == "d" * 40


def test_a_dangling_link_in_the_live_cache_is_replaced(tmp_path, home, imported):
    """A link that an earlier start left, and whose target is gone, stands in nobody's way."""
    pointer = home / "hub/models--org--new/snapshots/dd/config.json"
    pointer.parent.mkdir(parents=True)
    pointer.symlink_to(tmp_path / "gone")
    manifest, arena = manifest_and_arena(tmp_path, LATE, root="HF_HOME")
    folder = place_files(manifest, arena, tmp_path / "base")
    point_to(folder, manifest)
    assert pointer.read_bytes() == b"{}"
    assert {path.name for path in pointer.parent.iterdir()} == {"config.json"}


def test_the_live_hub_cache_may_be_elsewhere(tmp_path, home, imported):
    """Files of HF_HOME/hub are linked to where the library's hub cache is, and those of torch to torch's."""
    imported.HF_HUB_CACHE = str(tmp_path / "volume")
    manifest, arena = manifest_and_arena(tmp_path, LATE, root="HF_HOME")
    point_to(place_files(manifest, arena, tmp_path / "base"), manifest)
    assert (tmp_path / "volume/models--org--new/snapshots/dd/config.json").read_bytes() == b"{}"


def test_a_hub_cache_root_is_linked_where_the_library_looks(tmp_path, home, imported):
    """Files captured from a hub cache of its own are found by a library whose hub cache is in HF_HOME."""
    files = {name.removeprefix("hub/"): data for name, data in LATE.items()}
    manifest, arena = manifest_and_arena(tmp_path, files, root="HF_HUB_CACHE")
    point_to(place_files(manifest, arena, tmp_path / "base"), manifest)
    assert (home / "hub/models--org--new/snapshots/dd/config.json").read_bytes() == b"{}"


def test_a_live_cache_that_cannot_be_written_is_an_error(tmp_path, home, imported):
    """The error names the place and the remedy, and is one of coldstart's."""
    imported.HF_HUB_CACHE = str(home / "token")
    manifest, arena = manifest_and_arena(tmp_path, LATE, root="HF_HOME")
    folder = place_files(manifest, arena, tmp_path / "base")
    with pytest.raises(StoreSetupError, match="token"):
        point_to(folder, manifest)


def test_who_was_offline_stays_offline(tmp_path, home, imported, monkeypatch):
    """Pointing back restores what the user had set, and does not send an offline process online."""
    imported.HF_HUB_OFFLINE = True
    manifest, arena = manifest_and_arena(tmp_path, LATE, root="HF_HOME")
    point_to(place_files(manifest, arena, tmp_path / "base"), manifest)
    point_back()
    assert imported.HF_HUB_OFFLINE


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("1", True), ("yes", True)])
def test_a_hub_imported_while_pointed_gets_the_users_setting_back(tmp_path, home, monkeypatch, value, expected):
    """A library that read "offline" from our variable is told what the user's variable says when all is undone."""
    if value is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
    manifest, _ = manifest_and_arena(tmp_path, LATE, root="HF_HOME")
    point_to(tmp_path / "files", manifest)
    constants = types.SimpleNamespace(HF_HUB_OFFLINE=True)
    monkeypatch.setitem(sys.modules, CONSTANTS, constants)
    point_back()
    assert constants.HF_HUB_OFFLINE is expected


_HUB = """
import sys, json
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from coldstart.caches import before_import, point_back, point_to
from coldstart.manifest import manifest_from_json
folder = Path(sys.argv[2])
manifest = manifest_from_json((folder / "manifest.json").read_bytes())
if sys.argv[3] == "early":
    before_import("huggingface_hub", lambda: point_to(folder, manifest))
    assert "huggingface_hub" not in sys.modules
from huggingface_hub import constants, hf_hub_download
if sys.argv[3] == "late":
    point_to(folder, manifest)
path = Path(hf_hub_download("org/new", "config.json"))
assert constants.HF_HUB_OFFLINE
point_back()
assert not constants.HF_HUB_OFFLINE
print(json.dumps({"text": path.read_text(), "path": str(path)}))
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_the_real_hub_finds_restored_files(tmp_path, home, when):
    """huggingface_hub itself finds a restored repository without a network, imported before or after the pointing."""
    pytest.importorskip("huggingface_hub")
    commit = "d" * 40
    base = "hub/models--org--new"
    files = {f"{base}/refs/main": commit.encode(), f"{base}/snapshots/{commit}/config.json": b'{"restored": true}'}
    manifest, arena = manifest_and_arena(tmp_path, files, root="HF_HOME")
    folder = place_files(manifest, arena, tmp_path / "base")
    (folder / "manifest.json").write_bytes(manifest_to_json(manifest))
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", _HUB, root, str(folder), when], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert answer["text"] == '{"restored": true}'
    assert answer["path"].startswith(str(folder / "HF_HOME" if when == "early" else home))
