"""The kernels of the GPU path: their own sources run by the CPU, and the text that is shipped for GPUs."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from coldstart.codecs.planes import BLOCK_BYTES
from coldstart.devices import kernels
from coldstart.devices.kernels import build
from tests.fake_gpu.build import CHECKED, emulation
from tests.fake_gpu.emulated import Emulation, interleaved, planes_of, random_bytes, shifted

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("ptxas") is None, reason="no nvcc and ptxas on the path"
)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """The kernels as g++ compiles them, which programs are compiled with too."""
    return Emulation(emulation(tmp_path_factory.mktemp("emulation")))


@pytest.mark.parametrize("item_bytes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("target_shift", range(9))
def test_planes_are_merged_wherever_they_and_their_target_begin(
    emulated: Emulation, item_bytes: int, target_shift: int
) -> None:
    """A byte of every plane lands in its place at any address, for sizes of items that have a fast way and others."""
    planes = planes_of(item_bytes, 250)
    for block_shift in range(16):
        merged = emulated.merged(planes, 96, target_shift=target_shift, block_shift=block_shift)
        assert merged == interleaved(planes)


@given(
    item_bytes=st.sampled_from([1, 2, 4, 8]),
    count=st.integers(0, 700),
    block_bytes=st.integers(1, 300),
    shifts=st.tuples(st.integers(0, 15), st.integers(0, 15)),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    threads=st.integers(1, 256),
)
def test_any_shape_and_any_grid_merge_the_same(
    emulated: Emulation,
    item_bytes: int,
    count: int,
    block_bytes: int,
    shifts: tuple[int, int],
    grid: tuple[int, int],
    threads: int,
) -> None:
    """Planes come out whole for any number of items, size of blocks and grid, be it too small or too large."""
    planes = planes_of(item_bytes, count)
    launch = kernels.Launch("coldstart_merge_planes", grid, threads)
    merged = emulated.merged(planes, block_bytes, target_shift=shifts[0], block_shift=shifts[1], launch=launch)
    assert merged == interleaved(planes)


@pytest.mark.parametrize("item_bytes", [2, 4])
def test_a_chunk_of_the_codecs_own_blocks_is_merged(emulated: Emulation, item_bytes: int) -> None:
    """Planes of several blocks of the codec's size, the last one short, are merged by the launch that starts use."""
    planes = planes_of(item_bytes, 4 * BLOCK_BYTES + 12345)
    assert emulated.merged(planes, BLOCK_BYTES) == interleaved(planes)


EDGES = (0, 1, 63, 64, 65, 127, 128, 1023, 1024, 1025, 1087, 1088, 2047, 2048, 2049, 3072, 3073, 4096, 5120, 7168)
LEAVES = tuple(leaves + more for leaves in (8, 16, 128, 256, 512, 1024, 2048) for more in (-1, 0, 1))


@pytest.mark.parametrize("length", [*EDGES, *(1024 * leaves for leaves in LEAVES), 1 << 20, (5 << 20) + 3])
def test_the_hash_is_that_of_the_package_for_every_length(emulated: Emulation, length: int) -> None:
    """A chunk hashed on a GPU has the name that a host gives it."""
    data = shifted(random_bytes(length), 0)
    assert emulated.digest(data) == blake3(data).digest()


@pytest.mark.parametrize("shift", range(1, 16))
def test_bytes_at_any_address_are_hashed(emulated: Emulation, shift: int) -> None:
    """Data that does not begin at a multiple of 16 has the same hash."""
    data = shifted(random_bytes(20_000), shift)
    assert emulated.digest(data) == blake3(data).digest()


@given(length=st.integers(0, 80_000), threads=st.integers(1, 512))
def test_any_block_reduces_the_tree(emulated: Emulation, length: int, threads: int) -> None:
    """The tree comes out the same with any number of threads, so levels may be larger or smaller than a block."""
    data = random_bytes(length)
    tree = kernels.tree()._replace(threads=threads)
    assert emulated.digest(data, tree=tree) == blake3(data).digest()


def test_the_emulation_refuses_what_a_driver_would(emulated: Emulation) -> None:
    """A kernel that is not there, a block larger than the kernel allows and a grid of nothing are the driver's errors."""
    assert emulated.launch(kernels.Launch("no_such_kernel", (1, 1), 32)) == 500
    for launch in (kernels.leaves(0)._replace(threads=256), kernels.tree()._replace(grid=(0, 1))):
        assert emulated.launch(launch, *(ctypes.c_uint64() for _ in range(3))) == 1


@needs_nvcc
@pytest.mark.parametrize("name", [kernels.PLANES, kernels.BLAKE3])
def test_the_shipped_text_is_what_the_sources_give(name: str) -> None:
    """A change of a source that is not compiled again does not go unseen."""
    shipped = kernels.module(name).decode()
    if build.compiler_release() not in shipped.splitlines()[0]:
        pytest.skip(f"made by another nvcc than {build.compiler_release()}: {shipped.splitlines()[0]}")
    assert build.compiled(name) == shipped


@needs_nvcc
@pytest.mark.parametrize("gpu", build.GPUS)
@pytest.mark.parametrize("name", [kernels.PLANES, kernels.BLAKE3])
def test_every_gpu_takes_the_shipped_text_without_spilling(name: str, gpu: str, tmp_path: Path) -> None:
    """The text assembles for every GPU from Turing on, and no kernel keeps its registers in memory."""
    said = build.assemble(name, gpu, str(tmp_path / "code"))
    assert (tmp_path / "code").stat().st_size > 0
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == said.count("Used ") > 0


def test_the_shipped_text_has_the_kernels_and_is_for_old_drivers() -> None:
    """Drivers from CUDA 11.8 on and GPUs from Volta on are promised, and every launch names a kernel of a module."""
    planes, blake3_text = kernels.module("planes").decode(), kernels.module("blake3").decode()
    for text in (planes, blake3_text):
        assert ".version 7.8\n.target sm_70\n" in text
        assert text.isascii()
    assert f".entry {kernels.merge(plane_bytes=1, block_bytes=1, block_count=1).kernel}(" in planes
    assert f".entry {kernels.leaves(1).kernel}(" in blake3_text
    assert f".entry {kernels.tree().kernel}(" in blake3_text


def test_kernels_touch_no_memory_but_what_they_are_given(tmp_path: Path) -> None:
    """With every access checked for bounds and alignment, nothing is found."""
    sanitizer = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout
    if not os.path.isabs(sanitizer.strip()):
        pytest.skip("this g++ comes without its address sanitizer")
    library = emulation(tmp_path, *CHECKED)
    environment = {**os.environ, "LD_PRELOAD": sanitizer.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "tests.fake_gpu.checked", str(library)]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "checked\n"), done.stderr
