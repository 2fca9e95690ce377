"""Where restored files are put: whole or not at all, never outside, and beside others who do the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coldstart import caches
from coldstart.caches import place_files
from coldstart.errors import ManifestError, StoreSetupError
from coldstart.manifest import manifest_from_json, manifest_to_json
from coldstart.repository import Repository
from tests.cache_files import manifest_and_arena, snapshot, tree
from tests.generations import capture_of, sources, write

# --- putting restored files in place ---------------------------------------------------------------------------------


FILES = {"config.json": b"{}", "sub/weights.bin": os.urandom(70_000), "sub/deeper/empty": b"", "same": b"{}"}


def test_files_are_placed(tmp_path):
    """Every file is at its root and name, with its bytes, readable by this user alone, and nothing else is there."""
    manifest, arena = manifest_and_arena(tmp_path, FILES)
    folder = place_files(manifest, arena, tmp_path / "base")
    assert folder == caches.folder_of(manifest, tmp_path / "base")
    assert tree(folder) == {f"kept/{name}": data for name, data in FILES.items()}
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_executable_files_stay_executable(tmp_path):
    """A program among the files can be run, by this user."""
    (tmp_path / "run").write_bytes(b"#!/bin/sh\nexit 3\n")
    (tmp_path / "run").chmod(0o755)
    manifest, arena = snapshot(sources({"run": tmp_path / "run"}))
    placed = place_files(manifest, arena, tmp_path / "base") / "kept" / "run"
    assert placed.stat().st_mode & 0o777 == 0o700
    assert subprocess.run([placed], check=False).returncode == 3


def test_a_complete_folder_is_used_as_it_is(tmp_path):
    """A second start of the same files writes nothing."""
    manifest, arena = manifest_and_arena(tmp_path, FILES)
    folder = place_files(manifest, arena, tmp_path / "base")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert place_files(manifest, arena, tmp_path / "base") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "folder gone", "link to nothing"])
def test_a_damaged_folder_is_mended(tmp_path, damage):
    """Files that are gone or have another size are put back; those that are whole are not touched."""
    manifest, arena = manifest_and_arena(tmp_path, FILES)
    folder = place_files(manifest, arena, tmp_path / "base")
    victim, whole = folder / "kept/sub/weights.bin", folder / "kept/config.json"
    number = whole.stat().st_ino
    if damage == "missing":
        victim.unlink()
    elif damage == "shorter":
        os.truncate(victim, 10)
    elif damage == "longer":
        os.truncate(victim, 80_000)
    elif damage == "folder gone":
        subprocess.run(["rm", "-r", victim.parent], check=True)
    else:
        victim.unlink()
        victim.symlink_to(tmp_path / "nothing")
    assert place_files(manifest, arena, tmp_path / "base") == folder
    assert tree(folder) == {f"kept/{name}": data for name, data in FILES.items()}
    assert whole.stat().st_ino == number
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_others_added_to_the_folder_stays(tmp_path):
    """A hub may have written beside the restored files: mending them removes nothing."""
    manifest, arena = manifest_and_arena(tmp_path, FILES)
    folder = place_files(manifest, arena, tmp_path / "base")
    (folder / "kept/added").write_text("added")
    (folder / "kept/same").unlink()
    place_files(manifest, arena, tmp_path / "base")
    assert tree(folder) == {**{f"kept/{name}": data for name, data in FILES.items()}, "kept/added": b"added"}


@pytest.mark.parametrize("name", ["config.json", "sub/deeper/empty"])
def test_a_file_that_cannot_be_put_back_is_an_error(tmp_path, name):
    """A folder where a file should be is not removed: the start is told, and loads."""
    manifest, arena = manifest_and_arena(tmp_path, FILES)
    folder = place_files(manifest, arena, tmp_path / "base")
    (folder / "kept" / name).unlink()
    (folder / "kept" / name).mkdir()
    with pytest.raises(StoreSetupError, match="COLDSTART_FILES_FOLDER"):
        place_files(manifest, arena, tmp_path / "base")


def test_a_folder_is_never_taken_for_a_file(tmp_path):
    """A folder that has, by chance, the size of the file that should be there is no file."""
    (tmp_path / "some").mkdir()
    size = (tmp_path / "some").stat().st_size
    manifest, arena = manifest_and_arena(tmp_path, {"a": bytes(size)})
    folder = place_files(manifest, arena, tmp_path / "base")
    (folder / "kept/a").unlink()
    (folder / "kept/a").mkdir()
    with pytest.raises(StoreSetupError):
        place_files(manifest, arena, tmp_path / "base")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    """Where the base is no folder, the message names it and the setting, and nothing is left behind."""
    manifest, arena = manifest_and_arena(tmp_path, FILES)
    (tmp_path / "base").write_text("a file")
    with pytest.raises(StoreSetupError, match="base"):
        place_files(manifest, arena, tmp_path / "base")
    assert (tmp_path / "base").read_text() == "a file"


def test_a_write_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    """When the disk is full there is no half folder, and no draft."""
    manifest, arena = manifest_and_arena(tmp_path, FILES)
    writes = []

    def full(path, data):
        writes.append(path)
        if len(writes) == 3:
            raise OSError(28, "No space left on device")
        return len(data)

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "chmod", lambda path, mode: None)
    with pytest.raises(StoreSetupError, match="No space left"):
        place_files(manifest, arena, tmp_path / "base")
    assert list((tmp_path / "base" / "model").iterdir()) == []


def test_the_folder_is_named_by_what_is_in_it(tmp_path):
    """Equal files share a folder whatever their generation; other bytes, names, modes or lengths have another."""
    base = manifest_and_arena(tmp_path, FILES)[0]
    again = manifest_and_arena(tmp_path, FILES)[0]._replace(generation=9)
    others = [
        manifest_and_arena(tmp_path, files)[0]
        for files in (
            {**FILES, "same": b"[]"},
            {**FILES, "same": b"{}\0"},
            {**{name: data for name, data in FILES.items() if name != "same"}, "renamed": b"{}"},
            {name: data for name, data in FILES.items() if name != "same"},
        )
    ]
    others.append(base._replace(files=tuple(entry._replace(mode=0o755) for entry in base.files)))
    folders = [caches.folder_of(manifest, tmp_path) for manifest in (base, *others)]
    assert len(set(folders)) == 6
    assert caches.folder_of(again, tmp_path) == folders[0]


_PLACE = """
import os, sys
from pathlib import Path
from coldstart.caches import place_files
from coldstart.manifest import manifest_from_json
from tests.generations import fetched
from coldstart.stores.local import LocalStore
root = Path(sys.argv[1])
manifest = manifest_from_json((root / "manifest.json").read_bytes())
arena = fetched(manifest, LocalStore(root / "store"))
print("ready", flush=True)
sys.stdin.readline()
for round in range(20):
    folder = place_files(manifest, arena, root / f"base{round}")
    for entry in manifest.files:
        size = (folder / entry.root / entry.name).stat().st_size
        assert size == entry.length_bytes, (entry, size)
print("done", flush=True)
"""


def test_two_processes_place_the_same_files_at_once(tmp_path):
    """Whoever comes first writes, the other finds it whole, and neither ever sees a half folder or leaves a draft."""
    from coldstart.stores.local import LocalStore

    paths = {}
    for number in range(20):
        path = tmp_path / f"file{number}"
        path.write_bytes(bytes([number]) * 9000)
        paths[f"folder{number % 3}/file{number}"] = path
    written = write(capture_of(files=sources(paths)), Repository(LocalStore(tmp_path / "store")))
    (tmp_path / "manifest.json").write_bytes(manifest_to_json(written.manifest))
    damaged = caches.folder_of(written.manifest, tmp_path / "base7")  # one of the rounds is a repair
    (damaged / "kept/folder1").mkdir(parents=True)
    (damaged / "kept/folder1/file1").write_bytes(b"short")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", _PLACE, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=120)[0] == "done\n"
        assert process.returncode == 0
    expected = {f"kept/{name}": path.read_bytes() for name, path in paths.items()}
    for number in range(20):
        (folder,) = (tmp_path / f"base{number}" / "model").iterdir()
        assert tree(folder) == expected


# --- names that want to escape ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../../evil", "/etc/evil", "", ".", "..", "a//b", "a/", "a\0b", "a\nb", "..\\evil", "\ud800"],
)
def test_a_hostile_name_is_refused_before_anything_is_placed(tmp_path, name):
    """No stored manifest gets a file out of its folder: the one reader of manifests refuses such a name."""
    manifest, _ = manifest_and_arena(tmp_path, {"victim": b"data"})
    hostile = manifest._replace(files=(manifest.files[0]._replace(name=name),))
    with pytest.raises(ManifestError):
        manifest_from_json(manifest_to_json(hostile))


@pytest.mark.parametrize("root", ["..", ".", "", "/etc", "a/b", "HF HOME"])
def test_a_hostile_root_is_refused_before_anything_is_placed(tmp_path, root):
    """A root is one plain word, so it cannot lead out of the folder, or be given to the environment as another name."""
    manifest, _ = manifest_and_arena(tmp_path, {"victim": b"data"})
    hostile = manifest._replace(files=(manifest.files[0]._replace(root=root),))
    with pytest.raises(ManifestError):
        manifest_from_json(manifest_to_json(hostile))


@pytest.mark.parametrize("name", ["...", " ", "-rf", "~", "$HOME", "a b", "日本", ".hidden", "C:", "x" * 255])
def test_odd_names_are_only_names(tmp_path, name):
    """What merely looks odd is placed under that name, inside the folder."""
    manifest, arena = manifest_and_arena(tmp_path, {f"folder/{name}": b"data"})
    folder = place_files(manifest, arena, tmp_path / "base")
    assert tree(folder) == {f"kept/folder/{name}": b"data"}
