"""Files of a snapshot: what a load is seen to use, and where a restore puts it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from coldstart import caches
from coldstart.caches import FileSource, cache_roots, place_files, point_back, point_to, recorder, used_files
from coldstart.config import read_variable
from coldstart.errors import ManifestError, StoreSetupError
from coldstart.manifest import manifest_from_json, manifest_to_json
from coldstart.repository import Repository
from coldstart.stores.memory import MemoryStore
from tests.generations import capture_of, fetched, sources, write

COMMIT = "c" * 40
CONSTANTS = "huggingface_hub.constants"


@pytest.fixture(autouse=True)
def hubs_as_before():
    """No test leaves the hubs of this process pointed anywhere, or a recording open."""
    yield
    point_back()
    recorder.end()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A hub cache of a user: HF_HOME, with a repository as the hub lays it out, a token, and torch's."""
    folder = tmp_path / "hf"
    monkeypatch.setenv("HF_HOME", str(folder))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    repository = folder / "hub" / "models--org--name"
    for name, data in (("config.json", b"{}"), ("sub/model.safetensors", b"weights"), ("uv.lock", b"lock")):
        blob = repository / "blobs" / f"{len(data)}-{name.replace('/', '-')}"
        pointer = repository / "snapshots" / COMMIT / name
        for path in (blob, pointer):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    (repository / "blobs" / "half.incomplete").write_bytes(b"half")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (folder / "hub" / ".locks" / "models--org--name").mkdir(parents=True)
    (folder / "hub" / ".locks" / "models--org--name" / "x.lock").touch()
    (folder / "token").write_text("hf_secret")
    return folder


def manifest_and_arena(tmp_path, files: dict[str, bytes], root: str = "kept"):
    """A stored generation of these files, in memory."""
    folder = tmp_path / f"originals-{len(list(tmp_path.iterdir()))}"
    paths = {}
    for number, (name, data) in enumerate(files.items()):
        paths[name] = folder / str(number)
        folder.mkdir(exist_ok=True)
        paths[name].write_bytes(data)
    return snapshot(sources(paths, root=root))


def snapshot(files: tuple[FileSource, ...]):
    """A generation of these files as it was captured, and its arena."""
    store = MemoryStore()
    manifest = write(capture_of(files=files), Repository(store)).manifest
    return manifest, fetched(manifest, store)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: relative name -> bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- where the caches are --------------------------------------------------------------------------------------------


def test_roots_are_where_the_libraries_look(tmp_path, monkeypatch):
    """Without variables the caches lie in the user's cache folder; a variable moves its own."""
    cache = tmp_path / "cache"
    assert cache_roots() == {"HF_HOME": cache / "huggingface", "TORCH_HOME": cache / "torch"}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "t"))
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert cache_roots() == {"HF_HOME": tmp_path / "home" / "hf", "TORCH_HOME": tmp_path / "t"}
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HF_HOME")
    assert cache_roots()["HF_HOME"] == tmp_path / "home" / ".cache" / "huggingface"


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_a_hub_cache_elsewhere_is_a_root_of_its_own(tmp_path, monkeypatch, variable):
    """Where the hub's cache is not in HF_HOME it is looked at too; where it is, HF_HOME has it."""
    monkeypatch.setenv(variable, str(tmp_path / "volume"))
    assert cache_roots()["HF_HUB_CACHE"] == tmp_path / "volume"
    monkeypatch.setenv(variable, str(tmp_path / "cache" / "huggingface" / "hub"))
    assert "HF_HUB_CACHE" not in cache_roots()


def test_what_the_hub_has_read_counts_more_than_its_variables(tmp_path, monkeypatch):
    """A library that was imported before a variable changed goes on using the old folder."""
    constants = types.SimpleNamespace(HF_HOME=str(tmp_path / "old"), HF_HUB_CACHE=str(tmp_path / "old" / "hub"))
    monkeypatch.setitem(sys.modules, CONSTANTS, constants)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "new"))
    assert cache_roots() == {"HF_HOME": tmp_path / "old", "TORCH_HOME": tmp_path / "cache" / "torch"}


# --- what a load used ------------------------------------------------------------------------------------------------


def test_opens_below_the_roots_are_seen_while_recording(home, tmp_path):
    """What is opened below a root is seen, by any way of opening, and nothing before, after or elsewhere."""
    for name in ("a", "b", "c", "d", "e"):
        (home / name).touch()
    (tmp_path / "hf-other").mkdir()
    (tmp_path / "hf-other" / "x").touch()
    (home / "a").read_bytes()
    recorder.begin([home])
    (home / "b").read_bytes()
    os.close(os.open(bytes(home / "c"), os.O_RDONLY))
    with open(home / "d", "w") as file, open(os.dup(file.fileno()), "w"):  # a descriptor is no path
        pass
    (tmp_path / "hf-other" / "x").read_bytes()
    paths = recorder.end()
    (home / "e").read_bytes()
    assert paths == {str(home / name) for name in ("b", "c", "d")}
    assert recorder.end() == set()


def test_opens_by_a_relative_path_are_seen(home, monkeypatch):
    """A path that is relative to the working folder is the file that it names."""
    monkeypatch.chdir(home.parent)
    recorder.begin([home])
    Path("hf/token").read_bytes()
    open("./hf/../hf/hub/models--org--name/refs/main").close()
    assert recorder.end() == {str(home / "token"), str(home / "hub/models--org--name/refs/main")}


def test_opens_through_a_link_to_the_root_are_seen(home, tmp_path, monkeypatch):
    """Where the cache is a link, paths through it and paths with it resolved are both the cache's."""
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "link"))
    recorder.begin(cache_roots().values())
    (tmp_path / "link/hub/models--org--name/refs/main").read_bytes()
    (home / "modules").mkdir()
    (home / "modules" / "code.py").touch()
    (home / "modules" / "code.py").read_bytes()
    names = {source.name for source in used_files(recorder.end(), cache_roots())}
    assert {"modules/code.py", "hub/models--org--name/refs/main"} <= names


def test_opens_of_other_threads_are_seen(home):
    """A load that reads with threads of its own is seen whole."""
    recorder.begin([home])
    thread = threading.Thread(target=(home / "token").read_bytes)
    thread.start()
    thread.join()
    assert recorder.end() == {str(home / "token")}


def test_recordings_do_not_take_from_each_other(home):
    """Of two starts at a time in one process each gets all that was opened during its own, whichever ends first."""
    begun, ended = threading.Event(), threading.Event()
    other: list[set[str]] = []

    def other_start() -> None:
        recorder.begin([home])
        begun.set()
        assert ended.wait(60)
        (home / "hub/models--org--name/refs/main").read_bytes()
        other.append(recorder.end())

    recorder.begin([home])
    (home / "token").read_bytes()
    thread = threading.Thread(target=other_start)
    thread.start()
    assert begun.wait(60)
    (home / "hub/.locks/models--org--name/x.lock").read_bytes()
    assert recorder.end() == {str(home / "token"), str(home / "hub/.locks/models--org--name/x.lock")}
    ended.set()
    thread.join()
    assert other == [{str(home / "hub/.locks/models--org--name/x.lock"), str(home / "hub/models--org--name/refs/main")}]


def test_a_recording_never_makes_an_open_fail(home, tmp_path, monkeypatch):
    """An open that works without a recording works with one, even in a working folder that is gone."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    recorder.begin([home])
    (tmp_path / "gone").rmdir()
    os.close(os.open(".", os.O_RDONLY))
    assert (home / "token").read_text() == "hf_secret"
    assert recorder.end() == {str(home / "token")}


def test_one_file_of_a_repository_stands_for_all_of_it(home):
    """Native readers open unseen, so a repository is stored whole: snapshots and refs, not blobs, locks and halves."""
    opened = {str(home / "hub/models--org--name/snapshots" / COMMIT / "config.json")}
    found = used_files(opened, cache_roots())
    base = "hub/models--org--name"
    assert {(source.root, source.name) for source in found} == {
        ("HF_HOME", f"{base}/refs/main"),
        ("HF_HOME", f"{base}/snapshots/{COMMIT}/config.json"),
        ("HF_HOME", f"{base}/snapshots/{COMMIT}/sub/model.safetensors"),
        ("HF_HOME", f"{base}/snapshots/{COMMIT}/uv.lock"),
    }
    assert all(Path(source.path).is_file() for source in found)


@pytest.mark.parametrize(
    "opened",
    [
        "hub/models--org--name/blobs/2-config.json",
        "hub/models--org--name/blobs/half.incomplete",
        "hub/models--org--name/snapshots/gone",
    ],
)
def test_any_path_in_a_repository_means_the_repository(home, opened):
    """A blob that was opened behind its link, or a file that is gone since, means the repository that it is in."""
    names = [source.name for source in used_files({str(home / opened)}, cache_roots())]
    assert len(names) == 4
    assert not any("/blobs/" in name for name in names)


@pytest.mark.parametrize(
    "opened", ["token", "stored_tokens", "auth/token", "version.txt", "hub/.locks/models--org--name/x.lock"]
)
def test_tokens_and_locks_are_never_stored(home, opened):
    """Access tokens lie in the hub's home itself: what lies there, and what is named like them, goes into no snapshot."""
    (home / opened).parent.mkdir(exist_ok=True)
    (home / opened).write_text("hf_secret")
    assert used_files({str(home / opened)}, cache_roots()) == []


def test_other_files_stand_for_themselves(home, tmp_path):
    """Outside repositories a file is stored alone, if it is there and not a lock or a half."""
    checkpoints = tmp_path / "torch/hub/checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("net.pth", "other.pth", "net.pth.lock", "net.pth.incomplete"):
        (checkpoints / name).touch()
    opened = {str(checkpoints / name) for name in ("net.pth", "net.pth.lock", "net.pth.incomplete", "gone.pth")}
    found = used_files(opened, cache_roots())
    assert found == [FileSource("TORCH_HOME", "hub/checkpoints/net.pth", str(checkpoints / "net.pth"))]


def test_torchs_repositories_are_stored_whole(home, tmp_path):
    """A repository that torch.hub fetched holds code and data that native readers open: it is stored as a whole."""
    repository = tmp_path / "torch/hub/owner_repo_main"
    (repository / "data").mkdir(parents=True)
    for name in ("hubconf.py", "data/model.jit"):
        (repository / name).touch()
    found = used_files({str(repository / "hubconf.py")}, cache_roots())
    assert {source.name for source in found} == {
        "hub/owner_repo_main/hubconf.py",
        "hub/owner_repo_main/data/model.jit",
    }


def test_paths_outside_the_roots_are_no_cache_files(home, tmp_path):
    """A neighbour whose name begins like a root is not below it."""
    (tmp_path / "hf2").mkdir()
    (tmp_path / "hf2" / "a").mkdir()
    (tmp_path / "hf2" / "a" / "x").touch()
    assert used_files({str(tmp_path / "hf2/a/x"), "/etc/passwd"}, cache_roots()) == []


def test_a_kept_folder_is_kept_whole(tmp_path):
    """A folder that the user keeps loses nothing: folders named like a hub's, locks, and links to folders and files."""
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (folder / "blobs").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (folder / "blobs" / "x", folder / "uv.lock", elsewhere / "linked"):
        path.write_text(path.name)
    (folder / "to-folder").symlink_to(elsewhere)
    (folder / "to-file").symlink_to(elsewhere / "linked")
    (folder / "to-itself").symlink_to(folder)
    (folder / "to-nothing").symlink_to(tmp_path / "nothing")
    found = {source.name: Path(source.path).read_text() for source in caches.folder_files("kept", folder, folder)}
    assert found == {"blobs/x": "x", "uv.lock": "uv.lock", "to-folder/linked": "linked", "to-file": "linked"}


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
    arena.seal()  # whoever writes now fails
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


# --- pointing hubs ---------------------------------------------------------------------------------------------------


VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def variables() -> dict[str, str | None]:
    """What the hubs of this process would read now."""
    return {name: read_variable(name) for name in VARIABLES}


@pytest.fixture
def no_hub(monkeypatch):
    """A process that has not imported the hub's library."""
    monkeypatch.delitem(sys.modules, CONSTANTS, raising=False)


def test_hubs_are_pointed_to_the_files_and_back(tmp_path, home, no_hub):
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


def test_only_the_roots_that_have_files_are_pointed(tmp_path, home, no_hub):
    """Files of torch's cache alone leave the other hub where it is, and online; kept files point nothing."""
    before = variables()
    manifest, _ = manifest_and_arena(tmp_path, {"hub/checkpoints/a.pth": b"x"}, root="TORCH_HOME")
    assert point_to(tmp_path / "files", manifest) == ""
    assert variables() == {**before, "TORCH_HOME": str(tmp_path / "files/TORCH_HOME")}
    point_back()
    kept, _ = manifest_and_arena(tmp_path, {"a": b"x"})
    assert point_to(tmp_path / "files", kept) == ""
    assert variables() == before


def test_a_hub_cache_of_its_own_is_pointed(tmp_path, home, no_hub):
    """Files of a hub cache outside HF_HOME are found where they are placed."""
    manifest, _ = manifest_and_arena(tmp_path, {"models--a/refs/main": b"x"}, root="HF_HUB_CACHE")
    point_to(tmp_path / "files", manifest)
    assert read_variable("HF_HUB_CACHE") == str(tmp_path / "files/HF_HUB_CACHE")
    assert read_variable("HF_HOME") == str(home)
    assert read_variable("HF_HUB_OFFLINE") == "1"


def test_pointing_twice_remembers_what_was_first(tmp_path, home, no_hub):
    """After the files of two parts were pointed to, pointing back leads to the user's own caches, not to the first part's."""
    before = variables()
    first, _ = manifest_and_arena(tmp_path, {"hub/models--a/refs/main": b"x"}, root="HF_HOME")
    second, _ = manifest_and_arena(tmp_path, {"hub/models--b/refs/main": b"y"}, root="HF_HOME")
    point_to(tmp_path / "one", first)
    point_to(tmp_path / "two", second)
    assert read_variable("HF_HOME") == str(tmp_path / "two/HF_HOME")
    point_back()
    assert variables() == before


def test_pointing_to_the_same_folder_again_changes_nothing(tmp_path, home, no_hub):
    """The early start and the start itself may both point to the folder."""
    manifest, _ = manifest_and_arena(tmp_path, {"hub/models--a/refs/main": b"x"}, root="HF_HOME")
    before = variables()
    point_to(tmp_path / "files", manifest)
    assert point_to(tmp_path / "files", manifest) == ""
    point_back()
    assert variables() == before


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
def test_a_hub_imported_while_pointed_gets_the_users_setting_back(tmp_path, home, no_hub, monkeypatch, value, expected):
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


# --- just before an import -------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that nobody has imported, and that notes when it is."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "late_module_for_caches.py").write_text("import sys\nsys.late_log.append('imported')\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr(sys, "late_log", [], raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "late_module_for_caches"
    sys.modules.pop("late_module_for_caches", None)


def test_what_is_to_run_before_an_import_runs_once_just_before_it(module):
    """The function runs when the module is imported, before its first line, and never again."""
    finders = len(sys.meta_path)
    caches.before_import(module, lambda: sys.late_log.append("before"))
    assert sys.late_log == []
    __import__(module)
    assert sys.late_log == ["before", "imported"]
    assert len(sys.meta_path) == finders
    del sys.modules[module]
    __import__(module)
    assert sys.late_log == ["before", "imported", "imported"]


def test_nothing_runs_before_the_import_of_another_module(module):
    """Other imports do not set it off, and a module that is imported already never does."""
    caches.before_import("no_such_module_for_caches", lambda: sys.late_log.append("before"))
    __import__(module)
    finders = list(sys.meta_path)
    caches.before_import(module, lambda: sys.late_log.append("late"))
    __import__(module)
    assert sys.late_log == ["imported"]
    assert sys.meta_path == finders


def test_asking_whether_a_module_is_there_is_no_import(module):
    """Libraries ask for a module's spec to see what is installed; the function still runs at the import, once."""
    finders = len(sys.meta_path)
    caches.before_import(module, lambda: sys.late_log.append("before"))
    for _ in range(2):
        assert importlib.util.find_spec(module).origin.endswith(f"{module}.py")
    assert sys.late_log == []
    imported = importlib.import_module(module)
    assert sys.late_log == ["before", "imported"]
    assert len(sys.meta_path) == finders
    assert type(imported.__loader__) is type(imported.__spec__.loader) is importlib.machinery.SourceFileLoader


def test_what_runs_before_an_import_may_wait_for_a_thread_that_imports(module, tmp_path):
    """The function waits for a restore, whose thread imports codecs and stores: that must not be a deadlock."""
    (tmp_path / "modules" / "other_module_for_caches.py").write_text("import sys\nsys.late_log.append('other')\n")
    imported = threading.Event()

    def work() -> None:
        importlib.import_module("other_module_for_caches")
        imported.set()

    def wait() -> None:
        threading.Thread(target=work, daemon=True).start()
        assert imported.wait(20), "the thread cannot import while this import waits for it"

    caches.before_import(module, wait)
    importlib.import_module(module)
    sys.modules.pop("other_module_for_caches")
    assert sys.late_log == ["other", "imported"]


def test_a_module_that_does_not_exist_stays_missing(module):
    """A module that nobody finds is not found, and nothing runs before what does not happen."""
    caches.before_import("no_such_module_for_caches", lambda: sys.late_log.append("before"))
    with pytest.raises(ModuleNotFoundError):
        __import__("no_such_module_for_caches")
    assert importlib.util.find_spec("no_such_module_for_caches") is None
    assert sys.late_log == []
