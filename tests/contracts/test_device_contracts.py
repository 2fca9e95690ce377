"""The devices of coldstart, each under the contract of all devices and the tests of its own."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest

from coldstart.devices import pick
from coldstart.devices.base import MappedFile
from coldstart.devices.cpu import MARGIN_BYTES, CpuDevice
from coldstart.devices.cuda_driver import open_gpu
from coldstart.devices.visible import is_visible
from coldstart.errors import ConfigError, DeviceError
from coldstart.testing.devices import PATTERNS, SEGMENTS, ArenaContract, DeviceContract, fill

if TYPE_CHECKING:
    from pathlib import Path

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")
GIB = 1 << 30


class TestCpu(DeviceContract):
    def make(self):
        return CpuDevice()


class TestCpuWithoutMemoryFiles(DeviceContract):
    @pytest.fixture(autouse=True)
    def no_memory_files(self, monkeypatch):
        monkeypatch.delattr(os, "memfd_create", raising=False)

    def make(self):
        return CpuDevice()

    def test_there_is_no_descriptor_to_hand_over(self):
        """Without a memory file only this process can fill the arena, and it says so."""
        assert self.make().allocate(SEGMENTS).fileno is None


class TestMappedFiles(ArenaContract):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path):
        self.place = tmp_path

    def files(self, contents) -> list[Path]:
        """A file for each content, nobody's to write; the same contents are in the same files."""
        paths = [self.place / f"{len(contents)}-{number}" for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            if not path.exists():
                path.write_bytes(content)
                path.chmod(0o400)
        return paths

    def filled(self, contents):
        with ExitStack() as opened:
            files = [opened.enter_context(path.open("rb")) for path in self.files(contents)]
            return CpuDevice().map_files(
                [MappedFile(file.fileno(), len(content)) for file, content in zip(files, contents, strict=True)]
            )

    def test_a_users_writes_do_not_reach_the_file(self):
        """What one worker changes is its own, in the file and in every other worker's mapping."""
        other = self.sealed().array(3, 0, SEGMENTS[3])
        self.sealed().array(3, 0, SEGMENTS[3])[:] = 0
        assert self.files(PATTERNS)[3].read_bytes() == other.tobytes() == PATTERNS[3]

    def test_arrays_outlive_the_files_name(self):
        """A file that is removed while it is mapped is whole for who has it mapped."""
        array = self.sealed().array(3, 0, SEGMENTS[3])
        for path in self.files(PATTERNS):
            path.unlink()
        assert array.tobytes() == PATTERNS[3]

    def test_nothing_is_handed_to_a_fetcher(self):
        """There is no descriptor to fill and no promise for after the seal."""
        arena = self.sealed()
        assert (arena.fileno, arena.stays_clean) == (None, False)

    def test_no_descriptor_is_left(self):
        """A forgotten arena whose arrays are gone leaves no descriptor behind."""
        before = len(os.listdir("/proc/self/fd"))
        self.sealed()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_file_that_is_too_short_is_an_error(self):
        """A mapping beyond a file's end, which would kill its reader, is not made."""
        path = self.place / "short"
        path.write_bytes(b"123")
        with path.open("rb") as file, pytest.raises(DeviceError, match="could not be mapped"):
            CpuDevice().map_files([MappedFile(file.fileno(), 5000)])


def machine(files: dict[str, str]) -> CpuDevice:
    """A device on a machine that has exactly these files."""

    def read_text(path: str) -> str:
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    return CpuDevice(read_text=read_text)


def meminfo(total: int, available: int) -> str:
    """The kernel's /proc/meminfo of a machine with so many bytes."""
    return f"MemTotal:  {total >> 10} kB\nMemFree:   17 kB\nMemAvailable:  {available >> 10} kB\nHugePages_Total:  0\n"


def stat(prefix: str, inactive: int, active: int) -> str:
    """A control group's memory.stat with so many bytes of cached files."""
    return f"anon 1\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n"


V2 = {
    "/proc/self/cgroup": "0::/pod/worker\n",
    "/sys/fs/cgroup/pod/worker/memory.max": "max\n",
    "/sys/fs/cgroup/pod/memory.max": f"{8 * GIB}\n",
    "/sys/fs/cgroup/pod/memory.current": f"{5 * GIB}\n",
    "/sys/fs/cgroup/pod/memory.stat": stat("", GIB, 2 * GIB),
}
V1 = {
    "/proc/self/cgroup": "12:cpu,cpuacct:/x\n4:memory:/host/path/that/is/not/here\n0::/\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
    "/sys/fs/cgroup/memory/memory.stat": stat("total_", GIB // 2, 0),
}
HOST = {"/proc/meminfo": meminfo(64 * GIB, 48 * GIB)}


@pytest.mark.parametrize(
    ("expected", "files"),
    [
        ((64 * GIB, 48 * GIB), HOST),
        ((8 * GIB, 6 * GIB), HOST | V2),
        ((4 * GIB, 3 * GIB // 2), HOST | V1),
        (
            (16 * GIB, 2 * GIB),
            {"/proc/meminfo": meminfo(16 * GIB, 2 * GIB)} | {**V2, "/sys/fs/cgroup/pod/memory.max": "max"},
        ),
        ((8 * GIB, GIB), {"/proc/meminfo": meminfo(64 * GIB, GIB)} | V2),
        ((64 * GIB, 48 * GIB), HOST | {"/proc/self/cgroup": "nonsense\n0::/../..\n:\n"}),
        ((0, 0), {"/proc/meminfo": "MemTotal: lots\n"}),
        ((0, 0), {}),
    ],
    ids=[
        "machine",
        "v2, an ancestor's limit",
        "v1, mounted at the top",
        "v2, no limit",
        "full host",
        "odd",
        "broken",
        "none",
    ],
)
def test_cpu_memory_is_the_tightest_limit(expected, files):
    """Memory is what the machine or the tightest control group leaves; files it caches count as free."""
    info = machine(files).info()
    assert (info.memory_bytes, info.free_bytes) == expected


def test_cpu_refuses_more_than_is_free():
    """The error says what was asked and what is free, and a margin stays for the rest of the process."""
    device = machine({"/proc/meminfo": meminfo(GIB, 100 << 20)})
    with pytest.raises(DeviceError, match=rf"needs {100 << 20} bytes of memory and {100 << 20} are free"):
        device.allocate([60 << 20, 40 << 20])
    assert sum(device.allocate([(100 << 20) - MARGIN_BYTES]).segment_bytes) == (100 << 20) - MARGIN_BYTES


def test_cpu_allocates_where_nothing_is_known():
    """A platform without /proc is not refused."""
    assert machine({}).allocate([10]).segment_bytes == (10,)


@pytest.mark.parametrize("size", [1 << 60, 1 << 70])
def test_cpu_maps_a_refusal_of_the_system(size):
    """What the kernel will not give becomes DeviceError, whatever the reader of free memory said."""
    with pytest.raises(DeviceError, match="which were refused"):
        machine({}).allocate([size])


def test_cpu_is_named_after_its_processor():
    """The name is the processor's model, or the machine's kind where the kernel does not tell."""
    model = {"/proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast One 3000\n\nmodel name\t: other\n"}
    assert machine(model).info().name == "Fast One 3000"
    assert machine({}).info().name == os.uname().machine


@linux
def test_cpu_arena_is_one_descriptor_for_another_process():
    """Through the descriptor, whoever has it fills segments at their offsets, each on a page of its own."""
    arena = CpuDevice().allocate(SEGMENTS)
    early = arena.array(3, 0, SEGMENTS[3])
    with mmap.mmap(arena.fileno, 0) as other:
        for segment, offset in enumerate(arena.segment_offsets):
            assert offset % mmap.PAGESIZE == 0
            other[offset : offset + SEGMENTS[segment]] = bytes([65 + segment]) * SEGMENTS[segment]
    arena.seal()
    assert early.tobytes() == b"D" * SEGMENTS[3]
    assert arena.array(0, 0, 5).tobytes() == b"AAAAA"


@linux
def test_cpu_arena_is_private_to_the_user():
    """What the user writes stays out of the memory file, and so out of every other process."""
    arena = CpuDevice().allocate(SEGMENTS)
    pattern = fill(arena, 2)
    arena.seal()
    arena.array(2, 0, 4096)[:] = 0
    with mmap.mmap(arena.fileno, 0, access=mmap.ACCESS_READ) as other:
        start = arena.segment_offsets[2]
        assert other[start : start + 4096] == pattern


@linux
def test_cpu_arrays_follow_the_fill_until_they_are_written_to():
    """The trap of the private mapping: reading a page early is harmless, writing to it early cuts it off for good."""
    arena = CpuDevice().allocate([2 * mmap.PAGESIZE])
    array = arena.array(0, 0, 2 * mmap.PAGESIZE)
    written, read = array[: mmap.PAGESIZE], array[mmap.PAGESIZE :]
    assert not read.any()
    written[0] = 1
    arena.writable(0)[:] = b"\x07" * (2 * mmap.PAGESIZE)
    assert (read == 7).all()
    assert written.tolist() == [1] + [0] * (mmap.PAGESIZE - 1)


@linux
def test_cpu_arena_cannot_be_cut_off_under_its_readers():
    """Nobody with the descriptor can resize it, which would kill readers with SIGBUS; a child that execs has none."""
    arena = CpuDevice().allocate(SEGMENTS)
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fileno, size)
    assert fcntl.fcntl(arena.fileno, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    assert not os.get_inheritable(arena.fileno)


@linux
def test_cpu_arena_closes_its_descriptors():
    """A forgotten arena leaves no descriptor behind once its arrays are gone too."""
    before = len(os.listdir("/proc/self/fd"))
    arena = CpuDevice().allocate(SEGMENTS)
    array = arena.array(3, 0, 10)
    arena.seal()
    del arena
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert array.sum() == 0
    del array
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@linux
def test_cpu_arena_cannot_be_written_to_by_its_descriptor_after_the_seal():
    """What was fetched stays as it was in the memory file: no further mapping and no write reaches it."""
    arena = CpuDevice().allocate(SEGMENTS)
    pattern = fill(arena, 2)
    arena.seal()
    with pytest.raises(PermissionError):
        mmap.mmap(arena.fileno, 0)
    with pytest.raises(PermissionError):
        os.pwrite(arena.fileno, b"x", arena.segment_offsets[2])
    assert arena.stays_clean
    assert arena.readable(2) == pattern


@linux
def test_cpu_arena_seals_on_a_kernel_without_that_seal(monkeypatch):
    """An older kernel refuses the seal against writing, and the arena is used without it."""
    monkeypatch.setattr("coldstart.devices.cpu._F_SEAL_FUTURE_WRITE", 1 << 30)
    arena = CpuDevice().allocate(SEGMENTS)
    pattern = fill(arena, 2)
    arena.seal()
    assert arena.readable(2) == pattern


def test_cpu_arrays_are_writable_numpy_views():
    """What a framework gets is memory that it may write to, with no copy behind it."""
    arena = CpuDevice().allocate([1024])
    arena.seal()
    array = arena.array(0, 256, 512)
    assert isinstance(array, np.ndarray)
    assert array.flags.writeable
    assert not array.flags.owndata


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
@pytest.mark.parametrize("call", ["os.memfd_create", "fcntl.fcntl"])
@linux
def test_cpu_does_without_memory_files_where_they_are_forbidden(monkeypatch, call, code):
    """A sandbox that forbids memory files, or sealing them, costs the fetcher process and not the restore."""

    def refuse(*_):
        raise OSError(code, "refused")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(call, refuse)
    arena = CpuDevice().allocate(SEGMENTS)
    assert arena.fileno is None
    assert len(os.listdir("/proc/self/fd")) == before
    pattern = fill(arena, 3)
    assert arena.array(3, 0, SEGMENTS[3]).tobytes() == pattern


@linux
def test_cpu_out_of_descriptors_is_an_error(monkeypatch):
    """A refusal that is not about memory files is reported and not worked around."""

    def refuse(*_):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(DeviceError, match="too many open files"):
        CpuDevice().allocate(SEGMENTS)


@pytest.mark.parametrize(
    ("setting", "visible", "expected"),
    [
        ("cpu", True, ("cpu", -1)),
        ("auto", False, ("cpu", -1)),
        ("auto", True, ("cuda", 0)),
        ("cuda", False, ("cuda", 0)),
        ("cuda:3", True, ("cuda", 3)),
    ],
)
def test_pick_what_is_asked_for(setting, visible, expected, monkeypatch):
    """``auto`` is the first GPU where there seems to be one, else the CPU; nothing is opened to find out."""
    monkeypatch.setattr("coldstart.devices.visible.is_visible", lambda _: visible)
    device = pick(setting)
    assert (device.type, device.ordinal) == expected


@pytest.mark.parametrize(
    ("visible_devices", "driver", "expected"),
    [(None, True, True), (None, False, False), ("0,1", True, True), ("", True, False), ("-1", True, False)],
)
def test_a_gpu_is_visible_where_a_driver_is_and_nobody_hides_it(
    visible_devices, driver, expected, tmp_path, monkeypatch
):
    """A driver's device file says that there is a GPU, unless CUDA_VISIBLE_DEVICES hides all of them."""
    control = tmp_path / "nvidiactl"
    if driver:
        control.touch()
    monkeypatch.setattr("coldstart.devices.visible._CONTROL_FILES", (str(control),))
    assert is_visible(visible_devices) is expected


def test_pick_nothing_else():
    """A word that is no device names those that are."""
    for setting in ("tpu", "cuda:x", "cpu:1"):
        with pytest.raises(ConfigError, match="auto, cpu, cuda"):
            pick(setting)


def test_a_gpu_that_is_missing_is_told_when_it_is_used(fake_gpu_folder):
    """A driver that cannot be loaded, and a GPU that is not there, are errors with their remedies."""
    with pytest.raises(DeviceError, match="COLDSTART_DEVICE=cpu"):
        open_gpu(0, "libcuda-that-is-not-there.so.1")
    with pytest.raises(DeviceError, match="no GPU 5"):
        open_gpu(5, str(fake_gpu_folder / "libcuda.so.1"))
