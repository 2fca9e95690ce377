"""Flat files of segments: what is mapped, what never is, who writes them, and that no trouble of theirs is a start's."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstart import segments
from coldstart.devices.base import Device
from coldstart.devices.cpu import CpuDevice
from coldstart.errors import DeviceError
from coldstart.frameworks import arrays, rebuild
from coldstart.repository import Repository
from coldstart.segments import MINIMUM_BYTES, keep_segments, map_segments, segment_names
from coldstart.stores import cache_folder
from coldstart.stores.cache_folder import CacheFolder
from coldstart.stores.cached import CachedStore
from coldstart.stores.local import FLAT_FILES, LocalStore
from coldstart.stores.memory import MemoryStore
from tests.generations import assert_same, blobs_of, capture_of, fetched, sources, write

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.manifest import Manifest
    from coldstart.stores.base import Store

PATIENCE_SECONDS = 60.0
ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's, and no other system's are known")
pytestmark = linux


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small states have flat files too."""
    monkeypatch.setattr(segments, "MINIMUM_BYTES", 0)


def state(value: int = 1) -> dict[str, Any]:
    """A state of two segments, the second of which is the same whatever the value; three chunks in the first."""
    weights = np.full(3 << 20, value, np.float32)
    weights[::1000] = np.arange(len(weights[::1000]))
    return {"w": weights, "same": np.arange(1000, dtype=np.int64), "none": np.empty((0, 3), np.float16)}


class Host:
    """A store, the generations in it, and what its workers keep and map."""

    def __init__(self, store: Store, flat: Path) -> None:
        self.store = store
        self.flat = flat
        self.reports: list[str] = []

    def write(self, value: Any = 1, *, codec: str = "raw", **options: Any) -> Manifest:
        given_state = state(value) if isinstance(value, int) else value
        return write(capture_of(given_state, **options), Repository(self.store), codec=codec).manifest

    def keep(
        self, manifest: Manifest, *, pace: Callable[[], None] = lambda: None, stop: Any = None, arena: Any = None
    ) -> int:
        arena = arena or fetched(manifest, self.store)
        arena.seal()
        return keep_segments(manifest, self.store, arena, pace=pace, stop=stop, degraded=self.reports.append)

    def map(self, manifest: Manifest, *, device: Device | None = None, threads: int = 2, stop: Any = None) -> Any:
        device = device or CpuDevice()
        return map_segments(manifest, self.store, device, threads=threads, stop=stop, degraded=self.reports.append)

    def files(self) -> dict[str, Path]:
        """Every flat file, by name."""
        with suppress(FileNotFoundError):
            return {path.name: path for path in self.flat.iterdir()}
        return {}

    def file(self, manifest: Manifest, segment: int = 0) -> Path:
        """The flat file of a segment."""
        return self.flat / segment_names(manifest)[segment]


def local(folder: Path) -> Host:
    """A host with a store in a folder."""
    return Host(LocalStore(folder / "store"), folder / "store" / FLAT_FILES / "v1" / "segments")


def remote(folder: Path) -> Host:
    """A host with a cache before a store elsewhere."""
    store = CachedStore(MemoryStore("elsewhere"), str(folder / "cache"), limit_bytes=1 << 30)
    return Host(store, folder / "cache" / "v1" / "segments")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with a store in a folder."""
    return local(tmp_path)


@pytest.fixture(params=[local, remote], ids=["folder", "cache"])
def any_host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    """A host of either kind."""
    made: Host = request.param(tmp_path)
    return made


def tree_of(manifest: Manifest, arena: Any) -> Any:
    """The state in a sealed arena."""
    arena.seal()

    def buffer_array(index: int) -> Any:
        buffer = manifest.buffers[index]
        return arena.array(buffer.segment, buffer.offset_bytes, buffer.length_bytes)

    return rebuild(manifest.tree, arrays(manifest.leaves, buffer_array))


# --- what is kept and mapped -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["raw", "zstd", "planes+zstd"])
def test_the_next_worker_maps_what_the_first_fetched(any_host: Host, codec: str):
    """Nothing is there to map at first; after one worker kept it, the state is there bit for bit, and nothing is fetched."""
    manifest = any_host.write(codec=codec)
    assert any_host.map(manifest) is None
    assert any_host.keep(manifest) == manifest.raw_bytes
    mapped = any_host.map(manifest)
    assert_same(tree_of(manifest, mapped.arena), state())
    report = mapped.report
    assert (report.engine, report.fetched_bytes, report.retried_chunks, report.degraded) == ("mapped", 0, 0, ())
    assert report.began_monotonic_seconds <= report.ended_monotonic_seconds
    assert any_host.reports == []


def test_mapping_reads_no_blob(host: Host):
    """Without its blobs a generation is still mapped."""
    manifest = host.write()
    host.keep(manifest)
    shutil.rmtree(host.flat.parent.parent.parent / "blobs")
    assert_same(tree_of(manifest, host.map(manifest).arena), state())


def test_files_of_a_snapshot_are_read_from_the_mapping(host: Host, tmp_path: Path):
    """A segment of files has a flat file as well, and they are read from it before the arena is sealed."""
    paths = {"a/one.json": b"{}", "two.bin": os.urandom(5000)}
    for number, data in enumerate(paths.values()):
        (tmp_path / str(number)).write_bytes(data)
    files = sources({name: tmp_path / str(number) for number, name in enumerate(paths)})
    manifest = host.write(files=files)
    host.keep(manifest)
    arena = host.map(manifest).arena
    found = {
        entry.name: bytes(arena.readable(entry.segment)[entry.offset_bytes :][: entry.length_bytes])
        for entry in manifest.files
    }
    assert found == paths


def test_a_state_without_bytes_is_left_to_the_fetch(host: Host):
    """Where no segment has bytes there is no file, and nothing to map."""
    manifest = host.write({"none": np.empty(0, np.float32)})
    assert host.keep(manifest) == 0
    mapped = host.map(manifest)
    assert mapped is None or sum(mapped.arena.segment_bytes) == 0
    assert host.files() == {}


def test_what_users_write_is_not_kept(host: Host):
    """A worker that changed its weights after its start keeps them as they were fetched."""
    manifest = host.write()
    arena = fetched(manifest, host.store)
    tree_of(manifest, arena)["w"][:] = 0
    host.keep(manifest, arena=arena)
    assert_same(tree_of(manifest, host.map(manifest).arena), state())


def test_workers_share_pages_and_not_writes(host: Host):
    """Reading a mapping costs no memory of the process' own; a write costs its page, and no other worker sees it."""
    manifest = host.write()
    host.keep(manifest)
    one, other = (tree_of(manifest, host.map(manifest).arena) for _ in range(2))
    assert one["w"].sum() == other["w"].sum()
    assert _copied_bytes(host.file(manifest)) == 0
    one["w"][10] = 99
    assert _copied_bytes(host.file(manifest)) == mmap.PAGESIZE
    assert other["w"][10] == state()["w"][10]
    assert_same(tree_of(manifest, host.map(manifest).arena), state())


def _copied_bytes(path: Path) -> int:
    """What the mappings of a file in this process have copied of it, because it was written to."""
    total_bytes, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Anonymous:"):
            total_bytes += int(line.split()[1]) << 10
    return total_bytes


def test_a_file_is_named_by_its_bytes(host: Host):
    """Generations share the file of a segment that did not change, however it is stored; other bytes are another name."""
    first, second, again = host.write(1), host.write(2), host.write(1, codec="zstd")
    assert host.keep(first) == first.raw_bytes
    assert host.keep(second) == second.segments[0].length_bytes
    assert host.keep(again) == 0
    assert segment_names(first) == segment_names(again)
    assert segment_names(first)[1:] == segment_names(second)[1:]
    assert segment_names(first)[0] != segment_names(second)[0]
    for manifest, value in ((first, 1), (second, 2), (again, 1)):
        assert_same(tree_of(manifest, host.map(manifest).arena), state(value))


def test_names_tell_how_chunks_lie():
    """The same chunks in another order, or of another segment length, are another file."""
    store = MemoryStore()
    manifest = write(capture_of(state()), Repository(store)).manifest
    chunks = [chunk for chunk in manifest.chunks if chunk.segment == 0]
    assert len(chunks) > 1
    swapped = (chunks[0]._replace(raw_hash=chunks[1].raw_hash), chunks[1]._replace(raw_hash=chunks[0].raw_hash))
    longer = manifest.segments[0]._replace(length_bytes=manifest.segments[0].length_bytes + 256)
    for other in (
        manifest._replace(chunks=(*swapped, *manifest.chunks[2:])),
        manifest._replace(segments=(longer, *manifest.segments[1:])),
    ):
        assert segment_names(other)[0] != segment_names(manifest)[0]
        assert segment_names(other)[1:] == segment_names(manifest)[1:]


def test_small_snapshots_have_no_flat_files(host: Host, monkeypatch: pytest.MonkeyPatch):
    """Below the minimum nothing is written, and nothing looked for; at the minimum it is."""
    monkeypatch.setattr(segments, "MINIMUM_BYTES", MINIMUM_BYTES)
    small = host.write({"w": np.zeros(MINIMUM_BYTES - 256, np.uint8)})
    large = host.write({"w": np.zeros(MINIMUM_BYTES, np.uint8)})
    assert (host.keep(small), host.map(small), host.files()) == (0, None, {})
    assert host.keep(large) == MINIMUM_BYTES
    assert host.map(large) is not None


def test_a_store_without_a_folder_of_this_host_has_none():
    """What is in the memory of a process, or behind a store that knows no flat files, is fetched."""
    host = Host(MemoryStore(), Path("/nowhere"))
    manifest = host.write()
    assert (host.keep(manifest), host.map(manifest), host.reports) == (0, None, [])


def test_a_device_that_cannot_map_fetches(host: Host):
    """A device may have nothing to map files to."""

    class Other(CpuDevice):
        map_files = Device.map_files  # type: ignore[assignment]

    manifest = host.write()
    host.keep(manifest)
    assert host.map(manifest, device=Other()) is None
    assert host.reports == []


def test_listings_and_collection_do_not_see_them(host: Host):
    """A store with flat files lists the objects that it has, and no more."""
    manifest = host.write()
    before = {info.key for info in host.store.list("")}
    host.keep(manifest)
    assert len(host.files()) == 2
    assert {info.key for info in host.store.list("")} == before


def test_files_are_nobody_elses(host: Host):
    """A flat file cannot be written to, in a folder that is this user's alone."""
    host.keep(host.write())
    assert {stat.S_IMODE(path.stat().st_mode) for path in host.files().values()} == {0o400}
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (host.flat, host.flat.parent)} == {0o700}


# --- what is never mapped --------------------------------------------------------------------------------------------


def altered(path: Path, data: bytes) -> None:
    """Put other bytes in a file's place, as a failing disk might."""
    path.unlink()
    path.write_bytes(data)
    path.chmod(0o400)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "altered": lambda path: altered(path, path.read_bytes()[:-1] + b"\xff"),
    "cut off": lambda path: altered(path, path.read_bytes()[:-1]),
    "longer": lambda path: altered(path, path.read_bytes() + b"x"),
    "empty": lambda path: altered(path, b""),
    "gone": lambda path: path.unlink(),
    "others may write": lambda path: path.chmod(0o620),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("segment", [0, 1])
def test_a_wrong_file_is_never_used_and_is_replaced(host: Host, damage: str, segment: int):
    """One file that is not as it was written means a fetch; the worker that fetched writes it anew."""
    manifest = host.write()
    host.keep(manifest)
    DAMAGE[damage](host.file(manifest, segment))
    assert host.map(manifest) is None
    assert (host.reports != []) == (damage == "altered")
    assert host.keep(manifest) > 0
    assert_same(tree_of(manifest, host.map(manifest).arena), state())


def test_a_link_or_a_pipe_is_not_followed(host: Host, tmp_path: Path):
    """What is no file is not opened through, not waited for and not removed."""
    manifest = host.write()
    host.keep(manifest)
    path, elsewhere = host.file(manifest), tmp_path / "elsewhere"
    path.rename(elsewhere)
    for put in (path.mkdir, lambda: path.symlink_to(elsewhere), lambda: os.mkfifo(path)):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        put()
        assert host.map(manifest) is None
        assert host.keep(manifest) == 0
        assert os.path.lexists(path)
    assert elsewhere.exists()


@settings(max_examples=40)
@given(place=st.integers(0, (1 << 24) - 1), flip=st.integers(1, 255))
def test_no_altered_byte_is_ever_mapped(tmp_path_factory, place: int, flip: int):
    """Whatever byte of whichever chunk differs, the files are dropped."""
    host = local(tmp_path_factory.mktemp("host"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "MINIMUM_BYTES", 0)
        manifest = host.write({"w": np.arange(1 << 18, dtype=np.float64), "v": np.arange(999, dtype=np.int16)})
        host.keep(manifest)
        path = host.file(manifest, place % 2)
        data = bytearray(path.read_bytes())
        data[place % len(data)] ^= flip
        altered(path, bytes(data))
        assert host.map(manifest) is None
        assert len(host.reports) == 1
        assert host.files() == {}


def test_a_manifest_with_other_hashes_finds_nothing(host: Host):
    """Who says that a segment is made of other bytes is not given these."""
    manifest = host.write()
    host.keep(manifest)
    chunk = manifest.chunks[0]._replace(raw_hash="0" * 64)
    assert host.map(manifest._replace(chunks=(chunk, *manifest.chunks[1:]))) is None
    assert len(host.files()) == 2


def test_bytes_that_are_not_what_was_captured_are_not_kept(host: Host):
    """Memory that does not hash to what the manifest says leaves no file, and it is told."""
    manifest = host.write()
    arena = fetched(manifest, host.store)
    arena.writable(0)[5] ^= 1
    assert host.keep(manifest, arena=arena) == 0
    assert host.files() == {}
    assert host.reports == ["segment 0 in memory is not what was captured, so it is not kept as a flat file"]


@pytest.mark.parametrize(("code", "used"), [(errno.EIO, False), (errno.EINVAL, True), (errno.ENOSYS, True)])
def test_a_sector_that_cannot_be_read_is_no_end_of_the_process(
    host: Host, monkeypatch: pytest.MonkeyPatch, code: int, used: bool
):
    """The kernel is asked for every page before one is touched; where it has no such call, pages are just touched."""
    manifest = host.write()
    host.keep(manifest)

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "sendfile", fail)
    assert (host.map(manifest) is not None) == used
    assert (host.files() == {}) == (not used)
    assert len(host.reports) == (not used)


def test_a_file_that_is_cut_off_while_it_is_mapped_is_found(host: Host, monkeypatch: pytest.MonkeyPatch):
    """Pages behind a file's end, which would kill who touches them, are found by asking the kernel first."""
    manifest = host.write()
    host.keep(manifest)
    check = os.sendfile

    def cut_first(*arguments):
        os.truncate(host.file(manifest), 0)
        return check(*arguments)

    monkeypatch.setattr(os, "sendfile", cut_first)
    assert host.map(manifest, threads=1) is None
    assert "ends early" in host.reports[0]


def test_a_refused_mapping_is_a_fetch(host: Host):
    """What the system refuses is told and not raised."""

    class Full(CpuDevice):
        def map_files(self, files):
            raise DeviceError("no room for mappings")

    manifest = host.write()
    host.keep(manifest)
    assert host.map(manifest, device=Full()) is None
    assert host.reports == ["no room for mappings"]


def test_a_start_that_is_not_wanted_any_more_maps_nothing(host: Host):
    """Once it is told to stop, no arena is handed out."""
    manifest = host.write()
    host.keep(manifest)
    stop = threading.Event()
    stop.set()
    assert host.map(manifest, stop=stop) is None
    assert len(host.files()) == 2


@pytest.mark.parametrize("path", ["keep", "map"])
def test_a_file_system_of_several_hosts_has_none(host: Host, monkeypatch: pytest.MonkeyPatch, path: str):
    """Where another host could remove what is mapped, nothing is written and nothing mapped."""
    manifest = host.write()
    if path == "map":
        host.keep(manifest)
    monkeypatch.setattr(cache_folder, "HOST_FILE_SYSTEMS", frozenset())
    assert (host.keep(manifest), host.map(manifest), host.reports) == (0, None, [])
    assert (host.files() == {}) == (path == "keep")


MOUNTS = """
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /mnt/shared rw - nfs4 server:/x rw
31 30 0:41 / /mnt/shared/own\\040disk rw shared:7 master:3 - xfs /dev/vdb rw
32 22 0:42 / /over rw - ext4 /dev/vdc rw
33 22 0:43 / /over rw - fuse.volume volume rw
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home", "ext4"),
        ("/mnt/shared", "nfs4"),
        ("/mnt/shared/x/y", "nfs4"),
        ("/mnt/sharedish", "ext4"),
        ("/mnt/shared/own disk/x", "xfs"),
        ("/over/x", "fuse.volume"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, expected: str
):
    """The mount nearest above a path tells, the last one where one hides another; names with spaces included."""
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS.strip() + "\n")
    monkeypatch.setattr(cache_folder, "open", lambda _, **options: table.open(**options), raising=False)
    assert cache_folder._file_system(path) == expected
    table.unlink()
    assert cache_folder._file_system(path) == ""


# --- trouble of the folder -------------------------------------------------------------------------------------------


def failing(patch: pytest.MonkeyPatch, name: str, code: int, when=lambda *arguments: True) -> None:
    """Have a call of ``os`` fail for the arguments that ``when`` picks."""
    real = getattr(os, name)

    def call(*arguments, **options):
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    patch.setattr(os, name, call)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_no_more_is_told_and_nothing_else(any_host: Host, monkeypatch: pytest.MonkeyPatch, code: int):
    """Nothing is raised, no half file is left, and once there is room it is kept."""
    manifest = any_host.write()
    arena = fetched(manifest, any_host.store)
    with monkeypatch.context() as patch:
        failing(patch, "write", code)
        assert any_host.keep(manifest, arena=arena) == 0
    assert any_host.files() == {}
    assert [report.startswith("segments are not kept as flat files: ") for report in any_host.reports] == [True]
    assert any_host.map(manifest) is None
    assert any_host.keep(manifest, arena=arena) == manifest.raw_bytes


def test_a_disk_is_not_filled_to_the_brim(host: Host, monkeypatch: pytest.MonkeyPatch):
    """Flat files leave room for what somebody needs."""
    monkeypatch.setattr(cache_folder, "SPARE_BYTES", 1 << 60)
    assert host.keep(host.write()) == 0
    assert host.files() == {}
    assert "would leave less than" in host.reports[0]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_store_that_is_read_only_has_none_and_says_nothing(host: Host, monkeypatch: pytest.MonkeyPatch, code: int):
    """A folder in which nothing can be made is a way to set up a store, and no trouble."""
    manifest = host.write()
    arena = fetched(manifest, host.store)
    failing(monkeypatch, "mkdir", code)
    assert (host.keep(manifest, arena=arena), host.map(manifest), host.reports) == (0, None, [])


def test_flat_files_of_a_read_only_store_are_used(host: Host, monkeypatch: pytest.MonkeyPatch):
    """What was kept while the store could be written to is mapped when it no longer can, without a note of its use."""
    manifest = host.write()
    host.keep(manifest)
    for name in ("mkdir", "utime", "rename", "unlink"):
        failing(monkeypatch, name, errno.EROFS)
    assert_same(tree_of(manifest, host.map(manifest).arena), state())


def test_a_folder_that_others_can_write_to_is_left_alone(host: Host):
    """Nothing is mapped from it, written to it, or removed."""
    manifest = host.write()
    host.keep(manifest)
    host.flat.parent.chmod(0o777)
    assert (host.keep(manifest), host.map(manifest)) == (0, None)
    assert len(host.files()) == 2


def test_an_arena_without_a_memory_file_is_not_kept(host: Host, monkeypatch: pytest.MonkeyPatch):
    """Where the fetched bytes are in the very memory that users write to, there is nothing to trust."""
    manifest = host.write()
    monkeypatch.delattr(os, "memfd_create")
    assert (host.keep(manifest), host.files()) == (0, {})


# --- room ------------------------------------------------------------------------------------------------------------


def test_a_snapshot_larger_than_the_folder_is_not_begun(tmp_path: Path):
    """Files that would drive out each other are not written at all."""
    host = local(tmp_path)
    manifest = host.write()
    host.store = LocalStore(tmp_path / "store", flat_files_bytes=manifest.raw_bytes)
    assert (host.keep(manifest), host.files(), host.reports) == (0, {}, [])


def test_the_generation_used_longest_ago_goes(tmp_path: Path):
    """Beyond the limit the file whose last use is oldest is removed; who has it mapped reads on."""
    host = local(tmp_path)
    manifests = [host.write(value) for value in range(3)]
    length_bytes = manifests[0].segments[0].length_bytes
    host.store = LocalStore(tmp_path / "store", flat_files_bytes=int(2.5 * length_bytes))
    for manifest in manifests[:2]:
        host.keep(manifest)
    for number, manifest in enumerate(manifests[:2]):
        os.utime(host.file(manifest), (1_700_000_000 + number, 1_700_000_000 + number))
    first = host.map(manifests[0]).arena
    second = host.map(manifests[1]).arena
    os.utime(host.file(manifests[1]), (1_700_000_000, 1_700_000_000))
    host.keep(manifests[2])
    assert host.file(manifests[0]).exists()
    assert not host.file(manifests[1]).exists()
    assert_same(tree_of(manifests[1], second), state(1))
    assert_same(tree_of(manifests[0], first), state(0))
    assert host.map(manifests[1]) is None


def test_in_a_cache_they_count_with_the_other_copies(tmp_path: Path):
    """Blobs that nobody reads any more make room for the segments that are made of them, within one limit."""
    host = remote(tmp_path)
    manifest = host.write(codec="raw")
    limit_bytes = int(1.5 * manifest.raw_bytes)
    host.store = CachedStore(host.store._store, str(tmp_path / "cache"), limit_bytes=limit_bytes)
    host.keep(manifest)
    assert host.map(manifest) is not None
    assert CacheFolder(str(tmp_path / "cache"), limit_bytes=0).usage().total_bytes <= limit_bytes
    assert len(blobs_of(host.store)) == len({chunk.blob for chunk in manifest.chunks})


# --- several workers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_work_that_is_stopped_leaves_nothing_half(host: Host, chunk: int):
    """No chunk is begun after the stop; a file that was whole by then stays, and the next worker writes the rest."""
    manifest = host.write()
    assert [piece.segment for piece in manifest.chunks] == [0, 0, 0, 1]
    stop, calls = threading.Event(), []

    def pace() -> None:
        if len(calls) == chunk:
            stop.set()
        calls.append(1)

    whole_bytes = manifest.segments[0].length_bytes if chunk == 3 else 0
    assert host.keep(manifest, pace=pace, stop=stop) == whole_bytes
    assert len(calls) == chunk + 1
    assert len(host.files()) == (1 if whole_bytes else 0)
    assert host.keep(manifest) == manifest.raw_bytes - whole_bytes
    assert host.reports == []


def test_what_pace_raises_is_raised(host: Host):
    """An error of whoever paces is theirs, and leaves no file and no lock."""
    manifest = host.write()

    def pace() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.keep(manifest, pace=pace)
    assert host.files() == {}
    assert host.keep(manifest) == manifest.raw_bytes


def test_one_worker_writes_while_others_leave_it_to_that_one(host: Host):
    """A worker that comes while another is at it does not wait and does not write; after it there is nothing to do."""
    manifest = host.write()
    arena = fetched(manifest, host.store)
    written: list[int] = []

    def pace() -> None:
        if not written:
            written.append(host.keep(manifest, arena=arena, pace=lambda: None))

    assert host.keep(manifest, pace=pace) + written[0] == manifest.raw_bytes
    assert written[0] < manifest.raw_bytes
    assert host.keep(manifest) == 0


_WORKER = """
import sys
from blake3 import blake3
from coldstart import segments
from coldstart.devices.cpu import CpuDevice
from coldstart.fetch import FetchRequest, start_threads
from coldstart.manifest import manifest_from_json
from coldstart.stores.local import LocalStore
store_folder, manifest_path, rounds, expected = sys.argv[1:]
segments.MINIMUM_BYTES = 0
manifest = manifest_from_json(open(manifest_path, "rb").read())
store, device = LocalStore(store_folder), CpuDevice()
print("ready", flush=True)
sys.stdin.readline()
reports, written, mapped = [], 0, 0
for turn in range(int(rounds)):
    found = segments.map_segments(manifest, store, device, threads=2, degraded=reports.append)
    if found is None:
        arena = device.allocate([segment.length_bytes for segment in manifest.segments])
        start_threads(FetchRequest(manifest, store, arena, 2, 1 << 26)).wait()
        arena.seal()
        written += segments.keep_segments(manifest, store, arena, pace=lambda: None, degraded=reports.append)
    else:
        mapped += 1
        arena = found.arena
        arena.seal()
    state = blake3()
    for segment, length in enumerate(arena.segment_bytes):
        state.update(arena.array(segment, 0, length))
    assert state.hexdigest() == expected
print(written, mapped, reports, flush=True)
"""


def run_workers(host: Host, tmp_path: Path, manifest: Manifest, *, number: int, rounds: int, meanwhile=None) -> list:
    """What real processes that map, or fetch and keep, report: bytes written, times mapped, reports."""
    from coldstart.manifest import manifest_to_json

    path = tmp_path / "manifest.json"
    path.write_bytes(manifest_to_json(manifest))
    arena = fetched(manifest, host.store)
    expected = blake3(b"".join(arena.readable(segment) for segment in range(len(arena.segment_bytes)))).hexdigest()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, host.store.root, str(path), str(rounds), expected],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd=ROOT,
            text=True,
        )
        for _ in range(number)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        while meanwhile is not None and any(process.poll() is None for process in processes):
            meanwhile()
        answers = []
        for process in processes:
            output, errors = process.communicate(timeout=PATIENCE_SECONDS)
            assert (process.returncode, errors) == (0, "")
            written, mapped, reports = output.split(" ", 2)
            answers.append((int(written), int(mapped), reports.strip()))
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE_SECONDS)
            process.stdout.close()
            process.stderr.close()
            process.stdin.close()
    return answers


def test_processes_that_start_together_write_each_file_once(host: Host, tmp_path: Path):
    """Of four processes that fetched at once, all together write every file one time."""
    manifest = host.write()
    answers = run_workers(host, tmp_path, manifest, number=4, rounds=1)
    assert sum(written for written, _, _ in answers) == manifest.raw_bytes
    assert {reports for _, _, reports in answers} == {"[]"}
    assert len(host.files()) == 2


def test_processes_from_under_which_files_are_removed_are_right(host: Host, tmp_path: Path):
    """Three processes map, fetch and keep while files vanish, and are right each time and never end."""
    manifest = host.write({"w": np.arange(1 << 20, dtype=np.float32), "v": np.arange(999)})

    def remove() -> None:
        threading.Event().wait(0.003)
        for path in host.files().values():
            path.unlink(missing_ok=True)

    answers = run_workers(host, tmp_path, manifest, number=3, rounds=30, meanwhile=remove)
    assert {reports for _, _, reports in answers} == {"[]"}


_LIGHT = """
import sys
bare = set(sys.modules)
from coldstart.segments import map_segments
print(*sorted(set(sys.modules) - bare))
"""


def test_it_is_light_to_import():
    """It runs before a worker's first answer: standard library, and none of what is slow there."""
    output = subprocess.run(
        [sys.executable, "-c", _LIGHT], check=True, capture_output=True, text=True, timeout=60, cwd=ROOT
    ).stdout
    heavy = {"boto3", "numpy", "pydantic", "structlog", "blake3", "dataclasses", "inspect", "logging", "pathlib"}
    assert not heavy & set(output.split())
