"""Files of a snapshot: where hub caches are, and what a load is seen to use of them."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import threading
import types
from pathlib import Path

import pytest

from coldstart import caches
from coldstart.caches import FileSource, cache_roots, point_back, recorder, used_files
from tests.cache_files import COMMIT, hub_home

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


def test_a_module_that_is_made_twice_has_one_import(module):
    """Whoever makes the module from specs of his own, twice, sets it off once."""
    caches.before_import(module, lambda: sys.late_log.append("before"))
    specs = [importlib.util.find_spec(module) for _ in range(2)]
    for spec in specs:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert sys.late_log == ["before", "imported", "imported"]


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
