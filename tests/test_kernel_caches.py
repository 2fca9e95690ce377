"""Kernel caches, piece by piece: what is kept, where it may be put, how platforms live side by side in one manifest."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldstart.config import load as load_settings
from coldstart.devices import nvml, pick
from coldstart.devices.cpu import CpuDevice
from coldstart.errors import ManifestError
from coldstart.kernel_caches import compiler, home, packing, placing
from coldstart.kernel_caches.ahead import compiles
from coldstart.kernel_caches.home import Kernels
from coldstart.kernel_caches.kinds import KINDS, SWITCHES, names_in, novel
from coldstart.kernel_caches.merging import MOST_PLATFORMS
from coldstart.kernel_caches.packing import MOST_ROUNDS, additions, packed
from coldstart.kernel_caches.placing import NOTHING, place_kernels, with_places, without_places
from coldstart.kernel_caches.platform import compile_settings, difference, library_versions, platform_of, root_of
from coldstart.kernel_caches.record import Record, record_of, roots_of, to_text
from coldstart.kernel_caches.use import use_of
from coldstart.manifest import FileEntry, Segment, manifest_from_json, manifest_to_json
from coldstart.plan import needed
from coldstart.repository import Repository
from coldstart.stores.memory import MemoryStore
from tests.generations import capture_of, file_bytes, manifest_of, restored, write

if TYPE_CHECKING:
    from coldstart.capture import Written
    from coldstart.manifest import Manifest

STATE = {"w": np.arange(300, dtype=np.float32)}


def kernels_at(folder: Path, platform: str = "p1", **options: Any) -> Kernels:
    """The caches of a platform in a folder, all kinds."""
    facts = {"gpu": platform}
    fields = {
        "folder": str(folder),
        "root": root_of(facts),
        "facts": facts,
        "kinds": tuple(kind.name for kind in KINDS),
        "obstacle": "",
        "distrust": "",
        "capture_distrust": str,
        "late": "",
        "before": frozenset(),
    }
    return Kernels(**{**fields, **options})


def fill(folder: Path, *names: str) -> None:
    """Write files below ``folder``, each with its own name as its bytes."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_names(tmp_path: Path) -> None:
    """Locks, drafts, precompiled headers, links and what lies beside the caches are not kept; an empty file is."""
    kept = ["inductor/ab/cabc.so", "inductor/ab/cabc.main.cpp", "triton/KEY/k.cubin", "cupy/0a_2.cubin"]
    passing = [
        "inductor/locks/cabc.lock",
        "inductor/ab/.17.9.tmp",
        "inductor/h.h.gch",
        "inductor/__pycache__/x.pyc",
        "triton/KEY/lock",
        "triton/KEY/tmp.pid_7_uuid/k.cubin",
        "cupy/tmpab12_9zq",
        "other/file",
    ]
    fill(tmp_path, *kept, *passing)
    (tmp_path / "cupy" / "empty.cubin").touch()
    (tmp_path / "cupy" / "link.cubin").symlink_to("/etc/passwd")
    (tmp_path / "cupy" / "folder").symlink_to("/etc")
    assert sorted(names_in(str(tmp_path), ["inductor", "triton", "cupy"])) == sorted([*kept, "cupy/empty.cubin"])


def test_entries() -> None:
    """Novel is what belongs to no known entry: another pickle of a known graph, or file of a known kernel, is not."""
    known = ["inductor/fxgraph/ab/fabc/one", "triton/KEY/k.cubin", "inductor/ab/cabc.so", "driver/01/index"]
    same = ["inductor/fxgraph/ab/fabc/two", "triton/KEY/k.ptx", "inductor/ab/cabc.so", "driver/01/a/b"]
    other = [
        "inductor/fxgraph/ab/fabd/one",
        "triton/KEZ/k.cubin",
        "inductor/ab/cabd.so",
        "driver/02/index",
        "cupy/1_2.cubin",
    ]
    assert novel([*same, *other], known) == sorted(other)


def test_driver_set(tmp_path: Path) -> None:
    """The driver's files go together under the name of their set, which another file makes another one."""
    fill(tmp_path, "driver/index", "driver/a/1/x")
    (first,) = {name.split("/")[1] for name in names_in(str(tmp_path), ["driver"])}
    fill(tmp_path, "driver/a/1/y")
    (second,) = {name.split("/")[1] for name in names_in(str(tmp_path), ["driver"])}
    assert first != second


# --- the platform ----------------------------------------------------------------------------------------------------


def test_platform() -> None:
    """The platform names the device, the processor, Python and the installed libraries; nothing is imported for it."""
    before = set(sys.modules)
    facts = platform_of(pick("cpu"), {"torch": "2.13"})
    assert {"device", "processor", "python", "torch", "compile settings"} == set(facts)
    assert root_of(facts) != root_of({**facts, "torch": "2.14"})
    assert not {"torch", "triton", "cupy"} & (set(sys.modules) - before)


def test_library_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are read from the packages' files, wherever a library keeps its own; a missing one is not named."""
    fill(tmp_path, "torch/__init__.py", "triton/__init__.py")
    (tmp_path / "torch/version.py").write_text("__version__ = '9.1'\ncuda: str = '14.0'\ngit_version = 'abc'\n")
    (tmp_path / "triton/__init__.py").write_text("'''isolated'''\n__version__ = '7.2'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    others = {name: module for name, module in sys.modules.items() if name not in ("torch", "triton", "cupy")}
    monkeypatch.setattr(sys, "modules", others)
    assert library_versions() == {"torch": "9.1", "torch git_version": "abc", "torch cuda": "14.0", "triton": "7.2"}


NVML = """
#include <string.h>
static int open_;
int nvmlInit_v2(void) { open_++; return FAILS; }
int nvmlShutdown(void) { return --open_; }
int nvmlSystemGetDriverVersion(char *text, unsigned room) { strncpy(text, "580.65.06", room); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)(0x7f0000000000UL + index); return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned room) {
    strncpy(text, handle == (void *)0x7f0000000002UL ? "NVIDIA L4" : "NVIDIA H100", room);
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    int is_l4 = handle == (void *)0x7f0000000002UL;
    *major = is_l4 ? 8 : 9;
    *minor = is_l4 ? 9 : 0;
    return 0;
}
"""


@pytest.mark.parametrize(
    ("fails", "expected"), [(0, {"gpu": "NVIDIA H100 (9.0), NVIDIA L4 (8.9)", "driver": "580.65.06"}), (9, {})]
)
def test_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int, expected: dict[str, str]) -> None:
    """NVML, by its C interface, names each kind of GPU with its capability once, and the driver; one that fails is no error."""
    (tmp_path / "nvml.c").write_text(NVML)
    library = str(tmp_path / "nvml.so")
    subprocess.run(["gcc", "-shared", "-fPIC", f"-DFAILS={fails}", "-o", library, tmp_path / "nvml.c"], check=True)
    monkeypatch.setattr(nvml, "_LIBRARY", library)
    monkeypatch.setattr(nvml, "_PROC", str(tmp_path / "proc"))
    assert nvml.gpu_facts() == expected


def test_driver_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NVML the driver's own record is read, as it lies in /proc."""
    fill(tmp_path, "gpus/0000:00:1e.0/information", "version")
    (tmp_path / "gpus/0000:00:1e.0/information").write_text("Model: \t\t NVIDIA A10G\nIRQ:   \t 10\n")
    (tmp_path / "version").write_text("NVRM version: 550.54.15\nGCC version: 11\n")
    monkeypatch.setattr(nvml, "_LIBRARY", "no-such-library.so")
    monkeypatch.setattr(nvml, "_PROC", str(tmp_path))
    assert nvml.gpu_facts() == {"gpu": "NVIDIA A10G", "driver": "NVRM version: 550.54.15"}


def test_compile_settings() -> None:
    """Variables that change what is compiled count; where caches lie, how many threads, and what coldstart sets do not."""
    ours = {name: value for name, (_, value) in SWITCHES.items()}
    plain = {kind.variable: "/x" for kind in KINDS} | ours | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "HOME": "/y"}
    assert compile_settings(plain) == compile_settings({}) == ""
    tuned = compile_settings({**plain, "TORCHINDUCTOR_MAX_AUTOTUNE": "1"})
    assert tuned not in ("", compile_settings({**plain, "TORCHINDUCTOR_MAX_AUTOTUNE": "0"}))


def test_difference() -> None:
    """People are told in what two platforms differ."""
    assert difference({"torch": "2"}, {"torch": "1", "processor": "x"}) == "another processor; torch 1 there, 2 here"


@pytest.mark.parametrize(
    ("name", "processor", "expected"),
    [
        ("x86_64-linux-gnu-g++-12", "avx512f", True),
        ("x86_64-linux-gnu-g++-12", "avx512f amx_tile", False),
        ("x86_64-linux-gnu-g++-13", "avx512f amx_tile", True),
        ("g++-9", "avx512f", False),
        ("clang++", "avx512f", False),
        ("", "avx512f", True),
    ],
)
def test_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, processor: str, expected: bool) -> None:
    """A compiler known to take every instruction, by its file's name, need not be tried out; nor one that is not there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if name:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / name).touch(mode=0o755)
        (tmp_path / "g++").symlink_to(tmp_path / "real" / name)
    assert compiler.takes_all_instructions(processor) is expected


# --- where the libraries are pointed to ------------------------------------------------------------------------------


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process in which nothing is set up, with a store and a folder of its own."""
    for name in (*(kind.variable for kind in KINDS), *SWITCHES):
        monkeypatch.delenv(name, raising=False)
    home.forget()
    monkeypatch.setenv("COLDSTART_STORE", f"file://{tmp_path}/store")
    monkeypatch.setenv("COLDSTART_FILES_FOLDER", str(tmp_path / "files"))
    return tmp_path


def set_up(name: str = "net") -> Kernels:
    """Set up a start of handler ``name``."""
    found = home.set_up(load_settings(), pick("cpu"), name, "a" * 32, proves=False)
    assert found is not None
    return found


def test_one_folder_a_process(clean: Path) -> None:
    """A second handler of the process shares the folder of the first; ``forget`` takes all variables back."""
    before = dict(os.environ)
    first, second = set_up(), set_up("other")
    assert first.folder == second.folder == os.path.dirname(os.environ["CUPY_CACHE_DIR"])
    assert first.folder.startswith(f"{clean}/files/net/kernels/")
    assert stat.S_IMODE(os.stat(first.folder).st_mode) == 0o700
    home.forget()
    assert dict(os.environ) == before


def test_inductor_is_the_users(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Inductor's folder is the user's, Triton's, which lies in it, and Inductor's settings are too."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    assert set_up().kinds == ("cupy", "driver")
    assert "TRITON_CACHE_DIR" not in os.environ
    assert "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS" not in os.environ


def test_all_are_the_users(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every variable is the user's, nothing is restored or captured, and the record says why."""
    for kind in KINDS:
        monkeypatch.setenv(kind.variable, "/mine")
    kernels = set_up()
    assert not kernels.wanted
    assert "are set, so these caches are left to who set them" in use_of(kernels).obstacle


def test_too_late(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a library has read before the start is told, not passed over in silence."""
    monkeypatch.setitem(sys.modules, "torch._inductor.config", ModuleType("config"))
    assert "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS comes too late" in set_up().late


def test_folder_of_others(clean: Path) -> None:
    """A private folder that others may write to is not used."""
    folder = Path(set_up().folder)
    home.forget()
    folder.parent.chmod(0o777)
    assert "others may write to" in set_up().obstacle
    assert "CUPY_CACHE_DIR" not in os.environ


def test_no_folder(clean: Path) -> None:
    """A folder that cannot be made costs the caches and not the start."""
    (clean / "files").write_text("a file")
    kernels = set_up()
    assert "cannot be made" in kernels.obstacle
    assert "CUPY_CACHE_DIR" not in os.environ


# --- putting them in place -------------------------------------------------------------------------------------------


def stored(kernels: Kernels, files: dict[str, bytes]) -> tuple[Manifest, Any]:
    """A manifest with these files of the platform, and an arena that holds them."""
    data, entries = b"", []
    for name, content in files.items():
        entries.append(FileEntry(kernels.root, name, 0o644, 0, len(data), len(content)))
        data += content
    segment = Segment(1, "other", kernels.root, len(data))
    arena = CpuDevice().allocate([len(data)])
    arena.writable(0)[:] = data
    platform = {kernels.root: to_text(Record(kernels.facts, 1, 1))}
    return manifest_of(segments=())._replace(segments=(segment,), files=tuple(entries), platform=platform), arena


def place(kernels: Kernels, files: dict[str, bytes]) -> placing.Placed:
    """Place these files of a snapshot."""
    manifest, arena = stored(kernels, files)
    return place_kernels(kernels, manifest, manifest, arena)


def test_existing_files_stay(tmp_path: Path) -> None:
    """A file that is there is kept as it is; the others are put beside it, for this user alone."""
    fill(tmp_path, "cupy/a_2.cubin")
    placed = place(kernels_at(tmp_path), {"cupy/a_2.cubin": b"older", "cupy/b_2.cubin": b"new"})
    assert (placed.files, placed.obstacle) == (2, "")
    assert (tmp_path / "cupy/a_2.cubin").read_text() == "cupy/a_2.cubin"
    assert (tmp_path / "cupy/b_2.cubin").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "cupy/b_2.cubin").stat().st_mode) == 0o600
    assert sorted(path.name for path in (tmp_path / "cupy").iterdir()) == ["a_2.cubin", "b_2.cubin"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A link below the private folder leads nothing out of it; the other files are placed, and the reason is told."""
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "private"
    (folder / "triton").mkdir(parents=True)
    (folder / "triton" / "KEY").symlink_to(outside)
    (folder / "cupy").symlink_to(outside)
    (folder / "inductor").mkdir()
    (folder / "inductor" / "a.so").symlink_to(outside / "a.so")
    files = {"triton/KEY/k.cubin": b"1", "cupy/a": b"2", "inductor/a.so": b"3", "inductor/b.so": b"4"}
    placed = place(kernels_at(folder), files)
    assert list(outside.iterdir()) == []
    assert (folder / "inductor/b.so").read_bytes() == b"4"
    assert "could not be put in place" in placed.obstacle


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1]",
        b"{",
        b'{"child_paths": {"a": "/etc/passwd"}}',
        b'{"child_paths": {"a": "../../x"}}',
        b'{"child_paths": {"a": 5}}',
        b"[" * 100_000,
    ],
)
def test_hostile_lists(tmp_path: Path, content: bytes) -> None:
    """A list of Triton's that cannot be read, or leads out of the folder, is left out."""
    placed = place(kernels_at(tmp_path), {"triton/KEY/__grp__k.json": content, "triton/KEY/k.cubin": b"c"})
    assert [path.name for path in (tmp_path / "triton/KEY").iterdir()] == ["k.cubin"]
    assert placed.files == 1
    assert placed.obstacle


def test_lists_move() -> None:
    """A list says nothing of the machine that it was made on, and names the files of the one that it is restored on."""
    listed = json.dumps({"child_paths": {"k.ptx": "/a/triton/KEY/k.ptx"}}).encode()
    packed_list = without_places(listed, "/a/")
    assert b"/a/" not in packed_list
    assert json.loads(with_places(packed_list, "/b/c/")) == {"child_paths": {"k.ptx": "/b/c/triton/KEY/k.ptx"}}
    with pytest.raises(ManifestError, match="is not below"):
        without_places(listed, "/elsewhere/")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without room leaves no half file, and no error."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(placing.os, "rename", full)
    placed = place(kernels_at(tmp_path), {"cupy/a": b"1"})
    assert (placed.files, list((tmp_path / "cupy").iterdir())) == (0, [])
    assert "No space left on device" in placed.obstacle


def test_driver_sets_are_whole(tmp_path: Path) -> None:
    """Of several sets of the driver's the first is placed; none beside files that the driver has written already."""
    files = {"driver/02/index": b"new", "driver/02/a/1/y": b"y", "driver/01/index": b"old", "driver/01/a/1/x": b"x"}
    (tmp_path / "one").mkdir()
    place(kernels_at(tmp_path / "one"), files)
    assert (tmp_path / "one/driver/index").read_bytes() == b"new"
    assert not (tmp_path / "one/driver/a/1/x").exists()
    (tmp_path / "two").mkdir()
    used = kernels_at(tmp_path / "two", before=frozenset({"driver/03/index"}))
    place(used, files)
    assert not (tmp_path / "two/driver").exists()


def test_kinds_of_others(tmp_path: Path) -> None:
    """Files of a cache that is the user's, or that this coldstart does not know, are not placed."""
    kernels = kernels_at(tmp_path, kinds=("cupy",))
    place(kernels, {"triton/KEY/k": b"1", "unknown/file": b"2", "cupy/a": b"3", "file": b"4"})
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == ["cupy/a"]


def test_distrusted_and_foreign(tmp_path: Path) -> None:
    """Nothing is placed from a distrusted store or of another platform, and the reason is given."""
    mine, theirs = kernels_at(tmp_path), kernels_at(tmp_path, "p2")
    manifest, arena = stored(theirs, {"cupy/a": b"1"})
    assert (
        place_kernels(mine, manifest, manifest, arena).obstacle
        == "they are of another platform (gpu p2 there, p1 here)"
    )
    distrusted = theirs._replace(distrust="not trusted")
    assert place_kernels(distrusted, manifest, manifest, arena) == NOTHING._replace(obstacle="not trusted")
    assert place_kernels(None, manifest, manifest, arena) == NOTHING
    assert list(tmp_path.iterdir()) == []


# --- the next generation ---------------------------------------------------------------------------------------------


class World:
    """A store, and generations with kernels of several platforms in it."""

    def __init__(self, folder: Path) -> None:
        self.repository = Repository(MemoryStore())
        self.latest: Written | None = None
        self._folder = folder

    def kernels(self, platform: str) -> Kernels:
        return kernels_at(self._folder / platform, platform)

    def add(self, platform: str, *names: str, alone: bool = False) -> Manifest | None:
        """The platform's worker has compiled these, and makes the next generation; None where there is nothing to add."""
        fill(self._folder / platform, *names)
        parent = self.latest.manifest if self.latest else None
        capture = capture_of(STATE, follows=self.latest)
        if alone:
            capture = capture._replace(survey=None)
        with packed(self.kernels(platform), parent, capture.generation, alone=alone) as found:
            if alone and found is None:
                return None
            self.latest = write(capture._replace(kernels=found), self.repository)
        manifest = self.latest.manifest
        assert manifest_from_json(manifest_to_json(manifest)) == manifest
        return manifest

    def files(self, platform: str) -> dict[str, bytes]:
        """What a start of the platform fetches of the current generation."""
        assert self.latest is not None
        return file_bytes(needed(self.latest.manifest, "", self.kernels(platform).root), self.repository.store)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """An empty store."""
    return World(tmp_path)


@pytest.mark.parametrize("alone", [False, True])
def test_platforms_side_by_side(world: World, alone: bool) -> None:
    """A generation keeps the kernels of all platforms, a start fetches its own, and the state is whole."""
    world.add("p1", "cupy/a")
    world.add("p2", "cupy/b", alone=alone)
    world.add("p1", "cupy/c", alone=alone)
    assert set(world.files("p1").values()) == {b"cupy/a", b"cupy/c"}
    assert set(world.files("p2").values()) == {b"cupy/b"}
    assert world.files("p3") == {}
    assert world.latest is not None
    manifest = world.latest.manifest
    assert [record_of(manifest, root).facts for root in roots_of(manifest)] == [{"gpu": "p1"}, {"gpu": "p2"}]
    assert record_of(manifest, world.kernels("p1").root) == Record({"gpu": "p1"}, 3, 2)
    state = restored(needed(manifest), world.repository.store)
    assert state["w"].tolist() == STATE["w"].tolist()


def test_alone_keeps_all_else(world: World) -> None:
    """A generation that only adds kernels is its parent otherwise: no byte of the state is stored or read again."""
    first = world.add("p1", "cupy/a")
    second = world.add("p1", "cupy/b", alone=True)
    assert first is not None
    assert second is not None
    assert (second.rung, second.leaves, second.tree, second.warmup_digests) == (
        first.rung,
        first.leaves,
        first.tree,
        first.warmup_digests,
    )
    assert {chunk.blob for chunk in first.chunks} < {chunk.blob for chunk in second.chunks}
    assert (second.generation, second.parent != "") == (2, True)


def test_nothing_to_add(world: World) -> None:
    """What the current generation has already makes none."""
    world.add("p1", "inductor/fxgraph/ab/f1/one")
    assert world.add("p1", "inductor/fxgraph/ab/f1/two", alone=True) is None


def test_rounds_end(world: World) -> None:
    """Who compiles something else at every start makes a bounded number of generations, and is told."""
    for number in range(MOST_ROUNDS):
        assert world.add("p1", f"cupy/{number}", alone=number > 0) is not None
    assert world.add("p1", "cupy/more", alone=True) is None
    kernels = world.kernels("p1")
    placed = NOTHING._replace(names=frozenset({"cupy/0"}), rounds=MOST_ROUNDS)
    assert additions(kernels, placed.names, placed.rounds) == []
    assert "no more are added" in use_of(kernels, placed).obstacle


def test_oldest_platform_goes(world: World) -> None:
    """Beyond the bound the platform goes whose kernels were added to longest ago, with its bytes."""
    for number in range(MOST_PLATFORMS + 1):
        world.add(f"p{number}", "cupy/a", alone=number > 0)
    assert world.latest is not None
    assert len(roots_of(world.latest.manifest)) == MOST_PLATFORMS
    assert world.files("p0") == {}
    assert set(world.files("p1").values()) == {b"cupy/a"}
    assert sum(segment.consumer.startswith("kernels_") for segment in world.latest.manifest.segments) == MOST_PLATFORMS


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond the bounds of a platform is left out, and the rest is packed."""
    fill(tmp_path, "cupy/a", "cupy/b" * 10, "cupy/c", "cupy/d")
    monkeypatch.setattr(packing, "MOST_BYTES", 13)
    monkeypatch.setattr(packing, "MOST_FILES", 3)
    with packed(kernels_at(tmp_path), None, 1) as found:
        assert found is not None
        assert (sorted(found.files), found.left_out) == (["cupy/a", "cupy/c"], 2)


def test_libraries_that_are_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that another worker's compiler is writing at that moment is not packed; one that has settled is."""
    fill(tmp_path, "inductor/ab/done.so", "inductor/ab/growing.so")

    def meanwhile(_: float) -> None:
        fill(tmp_path, "inductor/ab/growing.so")
        (tmp_path / "inductor/ab/growing.so").write_text("more of it than before")

    monkeypatch.setattr(packing.time, "sleep", meanwhile)
    with packed(kernels_at(tmp_path), None, 1) as found:
        assert found is not None
        assert list(found.files) == ["inductor/ab/done.so"]


def test_distrusted_store_gets_none(tmp_path: Path) -> None:
    """Into a store whose code nobody would execute no kernels are captured."""
    fill(tmp_path, "cupy/a")
    with packed(kernels_at(tmp_path, capture_distrust=lambda: "not trusted"), None, 1) as found:
        assert found is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"facts": 1}', '{"facts": {}, "generation": Infinity, "rounds": 1}', "[" * 4000]
)
def test_damaged_record(text: str) -> None:
    """A record that cannot be read is an empty one."""
    assert record_of(manifest_of()._replace(platform={"kernels_1": text}), "kernels_1") == Record({}, 0, 0)


def test_compiler_is_imported_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's compiler is imported in the shadow of a fetch only where the snapshot has graphs for it, and torch is there."""
    kernels = kernels_at(tmp_path)
    manifest, _ = stored(kernels, {"inductor/fxgraph/ab/f1/one": b"1"})
    other, _ = stored(kernels, {"cupy/a": b"1"})
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert compiles(kernels, manifest)
    assert not compiles(kernels, other)
    assert not compiles(kernels._replace(distrust="not trusted"), manifest)
    monkeypatch.delitem(sys.modules, "torch")
    assert not compiles(kernels, manifest)
