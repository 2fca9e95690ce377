"""nvCOMP's binding: against the real library's header and host functions, and in batches against the fake one."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zstandard

import coldstart.codecs.nvcomp as binding
from coldstart.codecs.nvcomp import CANNOT_DECOMPRESS, STATUS_NAMES, SUCCESS, DecodeBatch, Nvcomp, status_name
from coldstart.errors import CodecError
from tests.contracts.nvcomp import NOISE, TEXT, Bench, NvcompContract, bf16_weights
from tests.fake_gpu.calls import ILLEGAL_ADDRESS, Driver
from tests.fake_gpu.libraries import SOURCES
from tests.test_fake_driver import real_driver

if TYPE_CHECKING:
    from collections.abc import Iterator

ALIGNMENT, INVALID_VALUE = 17, 10


def packaged() -> str | None:
    """Where NVIDIA's package has the library, or None where it is not installed."""
    try:
        return binding._find_in_package()
    except CodecError:
        return None


LIBRARY = packaged()
real = pytest.mark.skipif(LIBRARY is None, reason="nvCOMP 6 is not installed: pip install nvidia-libnvcomp-cu12")


@pytest.fixture
def fake_driver(own_gpu_folder: Path) -> Iterator[Driver]:
    """The fake driver, open."""
    driver = Driver(str(own_gpu_folder / "libcuda.so.1"))
    driver.library.fakecu_reset()
    driver.open()
    yield driver
    driver.library.fakecu_reset()


@pytest.fixture
def fake(fake_driver: Driver, own_gpu_folder: Path) -> Bench:
    """The fake nvCOMP on it."""
    nvcomp = Nvcomp.load(str(own_gpu_folder / "libnvcomp.so.6"))
    return Bench(fake_driver, nvcomp, fake_driver.stream())


class TestFakeNvcomp(NvcompContract):
    @pytest.fixture
    def bench(self, fake: Bench) -> Bench:
        return fake


@pytest.fixture(scope="module")
def real_bench() -> Iterator[Bench]:
    """The real nvCOMP on the real driver."""
    if reason := real_driver():
        pytest.skip(reason)
    driver = Driver("libcuda.so.1")
    driver.open()
    yield Bench(driver, Nvcomp.load(LIBRARY), driver.stream())
    driver.do("cuCtxSynchronize")
    driver.do("cuDevicePrimaryCtxRelease_v2", 0)


@pytest.mark.gpu
@real
class TestRealNvcomp(NvcompContract):
    @pytest.fixture
    def bench(self, real_bench: Bench) -> Bench:
        return real_bench


# --- the real library, which needs no GPU to be looked at ---

STRUCTURES = {
    "nvcompProperties_t": binding.Properties,
    "nvcompAlignmentRequirements_t": binding.AlignmentRequirements,
    "nvcompBatchedZstdDecompressOpts_t": binding.ZstdDecompressOptions,
    "nvcompBatchedANSCompressOpts_t": binding.AnsCompressOptions,
    "nvcompBatchedANSDecompressOpts_t": binding.AnsDecompressOptions,
}
CONSTANTS = {
    "NVCOMP_VER_MAJOR": binding.MAJOR,
    "NVCOMP_TYPE_UCHAR": binding.TYPE_UCHAR,
    "NVCOMP_TYPE_FLOAT16": binding.TYPE_FLOAT16,
    "NVCOMP_DECOMPRESS_BACKEND_DEFAULT": binding.BACKEND_DEFAULT,
    "nvcomp_rANS": binding._RANS,
    "nvcompANSCompressionMaxAllowedChunkSize": binding.ANS_MAX_RAW_BYTES,
    **{name: value for value, name in STATUS_NAMES.items()},
}


def as_c(tmp_path: Path, headers: Path) -> dict[str, int]:
    """Every size, offset and constant, as the real header has them."""
    asked = {name: f"(long)({name})" for name in CONSTANTS}
    for name, structure in STRUCTURES.items():
        asked[name] = f"(long)sizeof({name})"
        for field, *_ in structure._fields_:
            asked[f"{name}.{field}"] = f"(long)offsetof({name}, {field})"
    lines = [
        f'printf("%s\\"{name}\\": %ld", {n} ? ", " : "{{", {value});' for n, (name, value) in enumerate(asked.items())
    ]
    source = tmp_path / "abi.c"
    source.write_text(
        "\n".join(["#include <stdio.h>", "#include <nvcomp.h>", "int main(void) {", *lines, 'puts("}"); }'])
    )
    subprocess.run(["gcc", f"-I{headers}", "-o", str(tmp_path / "abi"), str(source)], check=True, timeout=60)
    printed: dict[str, int] = json.loads(subprocess.check_output([str(tmp_path / "abi")], timeout=60))
    return printed


@real
def test_structures_and_numbers_are_those_of_the_header(tmp_path):
    """Every structure that is passed has the header's size and offsets, every number its value."""
    ours = dict(CONSTANTS)
    for name, structure in STRUCTURES.items():
        ours[name] = ctypes.sizeof(structure)
        ours |= {f"{name}.{field}": getattr(structure, field).offset for field, *_ in structure._fields_}
    assert ours == as_c(tmp_path, Path(LIBRARY).parent.parent / "include")


@real
def test_the_fake_is_what_the_header_declares():
    """Every function that the fake exports has the prototype of the real header, and every status its value."""
    headers = Path(LIBRARY).parent.parent / "include"
    command = ["gcc", "-DWITH_NVCOMP_H", f"-I{headers}", "-Wall", "-Werror", "-Wmissing-prototypes", "-fsyntax-only"]
    subprocess.run([*command, str(SOURCES / "libnvcomp.c")], check=True, timeout=60)


@real
def test_the_real_library_answers_without_a_gpu(own_gpu_folder):
    """Sizes and alignments are computed on the host; the fake's are the same where a caller could tell."""
    nvcomp, fake = Nvcomp.load(LIBRARY), Nvcomp.load(str(own_gpu_folder / "libnvcomp.so.6"))
    assert nvcomp.version.startswith("6.")
    assert nvcomp.zstd_alignments() == fake.zstd_alignments() == (1, 1, 8)
    assert nvcomp.ans_encode_alignments(item_bytes=2) == fake.ans_encode_alignments(item_bytes=2) == (16, 16, 1)
    assert nvcomp.ans_decode_alignments(item_bytes=1) == fake.ans_decode_alignments(item_bytes=1) == (16, 16, 1)
    for count, size in ((1, 1), (7, 65_536), (64, 262_144)):
        sizes = {"largest_raw_bytes": size, "total_raw_bytes": count * size}
        assert nvcomp.zstd_temp_bytes(count, **sizes) == fake.zstd_temp_bytes(count, **sizes)
        for item_bytes in (1, 2):
            asked = {**sizes, "item_bytes": item_bytes}
            assert nvcomp.ans_encode_temp_bytes(count, **asked) == fake.ans_encode_temp_bytes(count, **asked)
            assert nvcomp.ans_decode_temp_bytes(count, **asked) == fake.ans_decode_temp_bytes(count, **asked)
            most, room = (each.ans_max_stored_bytes(size, item_bytes=item_bytes) for each in (nvcomp, fake))
            assert size < most <= room


@real
def test_the_real_library_refuses_work_without_a_gpu():
    """A batch that cannot be queued is an error that says what is missing, in every function; nothing crashes."""
    if real_driver() is None:
        pytest.skip("there is a GPU: calls without one cannot be tried")
    nvcomp, room = Nvcomp.load(LIBRARY), (ctypes.c_uint64 * 64)()
    place = ctypes.addressof(room) + 15 & ~15
    decode = DecodeBatch(1, place, place, place, place, place, place, place, 128)
    encode = binding.EncodeBatch(1, place, place, 16, place, place, place, place, 128)
    for queue in (
        lambda: nvcomp.zstd_decode(decode, stream=0),
        lambda: nvcomp.ans_decode(decode, item_bytes=2, stream=0),
        lambda: nvcomp.ans_encode(encode, item_bytes=2, stream=0),
    ):
        with pytest.raises(CodecError, match=r"Async of nvCOMP 6.*nvcompErrorCudaError \(1000\).*nvidia-smi"):
            queue()


@real
def test_a_chunk_that_ans_cannot_take_is_refused():
    """The error names the function, the status and what to do."""
    with pytest.raises(CodecError, match=r"GetMaxOutputChunkSize of nvCOMP 6\S+ failed: nvcompError.* chunks"):
        Nvcomp.load(LIBRARY).ans_max_stored_bytes((1 << 24) + 1, item_bytes=2)


# --- finding the library ---


def test_a_missing_package_is_an_error_with_its_remedy(monkeypatch):
    """Where nothing of NVIDIA's is installed, the command that helps is named."""
    monkeypatch.setattr(binding, "_package_folders", list)
    monkeypatch.setattr(binding, "LIBRARY", "libnvcomp-of-nobody.so.6")
    with pytest.raises(CodecError, match=r"nvCOMP is not installed.*pip install 'nvidia-libnvcomp-cu12>=6,<7'"):
        Nvcomp.load()


def test_a_package_of_another_major_is_named(monkeypatch, tmp_path):
    """Where only nvCOMP 5 is installed, the error says which and which is needed."""
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libnvcomp.so.5").touch()
    monkeypatch.setattr(binding, "_package_folders", lambda: [str(tmp_path)])
    monkeypatch.setattr(binding, "LIBRARY", "libnvcomp-of-nobody.so.6")
    with pytest.raises(CodecError, match=r"nvCOMP 5 is installed and version 6 is needed: pip install"):
        Nvcomp.load()


def test_a_library_of_another_version_is_named(monkeypatch, own_gpu_folder):
    """The version that the library itself tells decides, whatever its file is called."""
    monkeypatch.setenv("FAKE_NVCOMP_VERSION", "5301")
    with pytest.raises(CodecError, match=r"is nvCOMP 5\.3\.1 and version 6 is needed: pip install"):
        Nvcomp.load(str(own_gpu_folder / "libnvcomp.so.6"))


def test_a_file_that_is_no_library_is_an_error(tmp_path, own_gpu_folder):
    """Neither a text nor another library passes for nvCOMP."""
    (tmp_path / "libnvcomp.so.6").write_text("no library")
    for path in (tmp_path / "libnvcomp.so.6", own_gpu_folder / "libcuda.so.1"):
        with pytest.raises(CodecError, match=f"{path}.*pip install"):
            Nvcomp.load(str(path))


def test_the_package_is_found_without_being_imported(tmp_path, own_gpu_folder):
    """A process whose path has the package loads its library; nothing of NVIDIA's is run, and numpy is not loaded."""
    package = tmp_path / "nvidia" / "libnvcomp"
    (package / "lib64").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(own_gpu_folder / "libnvcomp.so.6", package / "lib64")
    program = (
        "import sys; from coldstart.codecs.nvcomp import Nvcomp; print(Nvcomp.load().path, 'numpy' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCES.parent.parent)])}
    command = [sys.executable, "-c", program]
    printed = subprocess.check_output(command, env=environment, timeout=60, text=True).split()
    assert printed == [str(package / "lib64" / "libnvcomp.so.6"), "False"]


def test_the_loaders_path_comes_first(own_gpu_folder):
    """A process that is told where the library is takes that one."""
    program = "from coldstart.codecs.nvcomp import Nvcomp; print(Nvcomp.load().path)"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(own_gpu_folder), "PYTHONPATH": str(SOURCES.parent.parent)}
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, env=environment, timeout=60, text=True).strip() == "libnvcomp.so.6"


def test_what_is_installed_is_seen_without_loading_it(monkeypatch, tmp_path):
    """A library in the package or on the loader's path counts; a package of another major does not."""
    monkeypatch.setattr(binding, "_package_folders", lambda: [str(tmp_path)])
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    folder = tmp_path / "lib64"
    folder.mkdir()
    (folder / "libnvcomp.so.5").touch()
    assert not binding.is_installed()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}/elsewhere")
    assert not binding.is_installed()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "libnvcomp.so.6").touch()
    assert binding.is_installed()
    monkeypatch.delenv("LD_LIBRARY_PATH")
    (folder / "libnvcomp.so.6").touch()
    assert binding.is_installed()


# --- what only the fake promises ---


def test_a_damaged_frame_is_reported_and_touches_no_other(fake):
    """Cut off, changed, and no frame at all: each says so, and its neighbours are decoded."""
    good = zstandard.ZstdCompressor(write_checksum=True).compress(TEXT)
    bad = [good[:-10], good[:50] + bytes([good[50] ^ 255]) + good[51:], NOISE[:100]]
    stored = [good, bad[0], good, bad[1], bad[2], good]
    statuses = [status for status, _ in fake.zstd(stored, [len(TEXT)] * 6)]
    assert statuses == [SUCCESS, CANNOT_DECOMPRESS, SUCCESS, CANNOT_DECOMPRESS, CANNOT_DECOMPRESS, SUCCESS]


def test_ans_of_another_kind_is_refused(fake):
    """Bytes that no ANS encoder wrote, and chunks of another item size, are reported."""
    raw = bf16_weights(1_000)
    ((_, halves),) = fake.ans_encoded([raw], item_bytes=2)
    results = fake.ans([halves, NOISE[:1_000]], [len(raw)] * 2, item_bytes=1)
    assert [status for status, _ in results] == [CANNOT_DECOMPRESS] * 2


def test_scratch_that_is_too_small_is_reported(fake):
    """A byte less than what was asked for is an error of every item."""
    batch = fake.batch([zstandard.compress(TEXT)] * 2, [len(TEXT)] * 2)
    fake.nvcomp.zstd_decode(batch._replace(scratch_bytes=batch.scratch_bytes - 1), stream=fake.stream)
    assert fake.decoded(batch) == [(INVALID_VALUE, b"")] * 2


def test_stored_ans_that_is_not_aligned_is_reported(fake):
    """Chunks of ANS begin at multiples of 16 bytes."""
    raw = bf16_weights(1_000)
    ((_, stored),) = fake.ans_encoded([raw], item_bytes=2)
    batch = fake.batch([stored], [len(raw)])
    batch = batch._replace(stored=fake.addresses([fake.driver.memory(b"\0" + stored) + 1]))
    fake.nvcomp.ans_decode(batch, item_bytes=2, stream=fake.stream)
    assert fake.decoded(batch) == [(ALIGNMENT, b"")]


def test_memory_that_is_not_the_devices_is_an_illegal_access(fake):
    """An item's address in host memory shows at the next synchronisation."""
    host = (ctypes.c_ubyte * len(TEXT))()
    batch = fake.batch([zstandard.compress(TEXT)], [len(TEXT)])
    batch = batch._replace(targets=fake.addresses([ctypes.addressof(host)]))
    fake.nvcomp.zstd_decode(batch, stream=fake.stream)
    assert fake.driver.call("cuStreamSynchronize", fake.stream) == ILLEGAL_ADDRESS


def test_memory_freed_under_a_queued_batch_is_an_illegal_access(fake):
    """Scratch, targets and arrays have to stay until the batch is done; the process goes on, the context does not."""
    batch = fake.batch([zstandard.compress(TEXT)] * 50, [len(TEXT)] * 50)
    with fake.driver.held(fake.stream):
        fake.nvcomp.zstd_decode(batch, stream=fake.stream)
        fake.driver.do("cuMemFree_v2", batch.scratch)
    assert fake.driver.call("cuStreamSynchronize", fake.stream) == ILLEGAL_ADDRESS


def test_work_without_a_current_context_is_refused(fake):
    """As the real library says it: an error of CUDA."""
    batch = fake.batch([zstandard.compress(TEXT)], [len(TEXT)])
    fake.driver.do("cuCtxSetCurrent", 0)
    with pytest.raises(CodecError, match="nvcompErrorCudaError"):
        fake.nvcomp.zstd_decode(batch, stream=fake.stream)
    fake.driver.do("cuCtxSetCurrent", fake.driver.context)


def test_statuses_have_names():
    """A status that is not known is told by its number."""
    assert status_name(12) == "nvcompErrorCannotDecompress"
    assert status_name(77) == "nvCOMP's status 77"
