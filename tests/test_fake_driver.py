"""The fake driver keeps the driver's contract, is strict where a driver may be lenient, and matches NVIDIA's header."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.contracts.driver import BYTES, SIZE, DriverContract
from tests.contracts.kernels import KernelsContract
from tests.fake_gpu.calls import (
    ADD_TO_BYTES,
    CONTEXT_IS_DESTROYED,
    ILLEGAL_ADDRESS,
    INVALID_HANDLE,
    INVALID_VALUE,
    LAUNCH_FAILED,
    NO_BINARY,
    NO_DEVICE,
    NOT_INITIALIZED,
    NOT_PERMITTED,
    OUT_OF_MEMORY,
    SUCCESS,
    UNSUPPORTED_PTX,
    Driver,
)
from tests.fake_gpu.libraries import DRIVER, SOURCES, build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CUDA_HEADERS = Path("/usr/local/cuda/include")

EMULATION = """
#include <string.h>
int coldstart_emulate(const char *name, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void **a) {
    unsigned char *bytes = *(unsigned char **)a[0];
    if (strcmp(name, "add_to_bytes") != 0) return 1;
    for (unsigned n = 0; n < *(unsigned *)a[1] && n < gx * bx; n++) bytes[n] += *(unsigned *)a[2];
    return 0;
}
"""


def real_driver() -> str | None:
    """Why NVIDIA's own driver cannot be used here, or None where it can."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no NVIDIA driver: {error}"
    if hasattr(library, "fakecu_report"):
        return "libcuda.so.1 is the fake one"
    code = library.cuInit(0)
    return f"cuInit says {code}" if code else None


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that does what the tests' own kernel does."""
    folder = tmp_path_factory.mktemp("emulation")
    (folder / "emulation.c").write_text(EMULATION)
    build(folder / "libemulation.so", (str(folder / "emulation.c"),))
    return folder / "libemulation.so"


@pytest.fixture
def start(own_gpu_folder: Path, emulation: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Driver]]:
    """Makes the fake driver as it is in a new process with these settings."""
    monkeypatch.setenv("FAKE_CUDA_EMULATION", str(emulation))
    driver = Driver(str(own_gpu_folder / "libcuda.so.1"))

    def begin(**settings: str) -> Driver:
        for name, value in settings.items():
            monkeypatch.setenv(f"FAKE_CUDA_{name}", value)
        driver.library.fakecu_reset()
        return driver

    yield begin
    monkeypatch.undo()
    driver.library.fakecu_reset()


class TestFakeDriver(DriverContract):
    @pytest.fixture(params=["", "7"], ids=["prompt", "hesitant"])
    def driver(self, start: Callable[..., Driver], request: pytest.FixtureRequest) -> Driver:
        made = start(JITTER=request.param)
        made.open()
        return made


class TestEmulatedKernels(KernelsContract):
    @pytest.fixture
    def driver(self, start: Callable[..., Driver]) -> Driver:
        made = start(EMULATION="", DRIVER_VERSION="11080")
        made.open()
        return made


@pytest.fixture(scope="module")
def real() -> Iterator[Driver]:
    """NVIDIA's own driver, open."""
    if reason := real_driver():
        pytest.skip(reason)
    made = Driver("libcuda.so.1")
    made.open()
    yield made
    made.do("cuCtxSynchronize")
    made.do("cuDevicePrimaryCtxRelease_v2", 0)


@pytest.mark.gpu
class TestRealDriver(DriverContract):
    @pytest.fixture
    def driver(self, real: Driver) -> Driver:
        return real


@pytest.mark.gpu
class TestRealKernels(KernelsContract):
    @pytest.fixture
    def driver(self, real: Driver) -> Driver:
        return real


@pytest.fixture
def driver(start: Callable[..., Driver]) -> Driver:
    """The fake driver, open."""
    made = start()
    made.open()
    return made


@pytest.mark.skipif(not (CUDA_HEADERS / "cuda.h").exists(), reason="no cuda.h of NVIDIA's toolkit here")
def test_the_fake_is_what_nvidias_header_declares():
    """Every function that the fake exports has the prototype of the real header, and every code its value."""
    command = ["gcc", "-DWITH_CUDA_H", f"-I{CUDA_HEADERS}", "-Wall", "-Werror", "-Wmissing-prototypes", "-fsyntax-only"]
    subprocess.run([*command, *(str(SOURCES / name) for name in DRIVER)], check=True, timeout=60)


def test_nothing_works_before_init(start):
    """A driver that was not initialised says so; its version it tells anyway."""
    driver = start(DRIVER_VERSION="12040")
    assert driver.call("cuDeviceGetCount", ctypes.byref(ctypes.c_int())) == NOT_INITIALIZED
    assert driver.call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 1) == NOT_INITIALIZED
    assert driver.make("cuDriverGetVersion") == 12040


def test_a_machine_can_have_any_number_of_devices(start):
    """None is an error of cuInit; several have their own names and memory."""
    assert start(DEVICES="0").call("cuInit", 0) == NO_DEVICE
    driver = start(DEVICES="2", MEMORY_BYTES="1000000")
    driver.open()
    name = ctypes.create_string_buffer(100)
    driver.do("cuDeviceGetName", name, 100, 1)
    assert name.value == b"Fake H100 1"
    driver.make("cuMemAlloc_v2", 1_000_000)
    assert driver.call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 1) == OUT_OF_MEMORY
    driver.do("cuCtxSetCurrent", driver.make("cuDevicePrimaryCtxRetain", 1))
    assert driver.pair("cuMemGetInfo_v2") == (1_000_000, 1_000_000)
    driver.make("cuMemAlloc_v2", 1_000_000)


def test_a_call_fails_when_it_is_told_to(start):
    """The second allocation fails with the code that was asked for, the third does not; another call fails always."""
    driver = start(FAIL="cuMemAlloc_v2:2=2,cuMemHostRegister_v2:*=304")
    driver.open()
    codes = [driver.call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 10) for _ in range(3)]
    assert codes == [SUCCESS, OUT_OF_MEMORY, SUCCESS]
    assert [driver.call("cuMemHostRegister_v2", 4096, 10, 0) for _ in range(2)] == [304, 304]


def test_an_error_of_the_device_stays(start):
    """A call that is told to fail as a broken device does, breaks the context for all that follow."""
    driver = start(FAIL="cuEventQuery:1=700,cuMemFree_v2:1=2")
    driver.open()
    event, address = driver.make("cuEventCreate", 0), driver.make("cuMemAlloc_v2", 10)
    assert [driver.call("cuMemFree_v2", address) for _ in range(2)] == [OUT_OF_MEMORY, SUCCESS]
    assert driver.call("cuEventQuery", event) == driver.call("cuCtxSynchronize") == ILLEGAL_ADDRESS


def test_init_takes_the_time_it_is_told_to(start):
    """As the real one takes half a second and more."""
    begin = time.monotonic()
    start(INIT_SECONDS="0.05").open()
    assert time.monotonic() - begin >= 0.05


def test_fresh_memory_is_not_zero(driver):
    """Nobody may take fresh memory for cleared memory."""
    assert driver.content(driver.make("cuMemAlloc_v2", 1000), 1000) == b"\xa5" * 1000


def test_memory_freed_under_a_queued_copy_is_an_illegal_access(driver):
    """The next synchronisation tells, and from then on everything in that context does, until it is made anew."""
    stream, source, target = driver.stream(), driver.pinned(BYTES), driver.make("cuMemAlloc_v2", SIZE)
    with driver.held(stream):
        driver.do("cuMemcpyHtoDAsync_v2", target, source, SIZE, stream)
        driver.do("cuMemFree_v2", target)
    assert driver.call("cuStreamSynchronize", stream) == ILLEGAL_ADDRESS
    assert driver.call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 1) == ILLEGAL_ADDRESS
    assert driver.report()["sticky_error"] == ILLEGAL_ADDRESS
    driver.do("cuDevicePrimaryCtxRelease_v2", 0)
    assert driver.call("cuCtxSynchronize") == CONTEXT_IS_DESTROYED
    driver.do("cuDevicePrimaryCtxRetain", ctypes.byref(ctypes.c_uint64()), 0)
    driver.do("cuCtxSynchronize")


def test_memory_freed_under_a_queued_kernel_is_an_illegal_access(driver):
    """The fake knows which arguments are addresses of its memory."""
    (_, function), stream, target = driver.kernel(), driver.stream(), driver.memory(BYTES)
    with driver.held(stream):
        driver.launch(function, stream, target, 10, 1)
        driver.do("cuMemFree_v2", target)
    assert driver.call("cuStreamSynchronize", stream) == ILLEGAL_ADDRESS


def test_a_slot_unregistered_under_a_queued_copy_is_an_illegal_access(driver):
    """Pinned memory has to stay pinned until its copies are done."""
    stream, target = driver.stream(), driver.memory(BYTES)
    source = (ctypes.c_ubyte * SIZE)()
    driver.do("cuMemHostRegister_v2", source, SIZE, 0)
    with driver.held(stream):
        driver.do("cuMemcpyHtoDAsync_v2", target, source, SIZE, stream)
        driver.do("cuMemHostUnregister", source)
    assert driver.call("cuStreamSynchronize", stream) == ILLEGAL_ADDRESS


def test_a_kernel_that_runs_over_its_memory_is_an_illegal_access(driver):
    """It ends neither the process nor in the neighbour's memory."""
    (_, function), target = driver.kernel(), driver.memory(BYTES)
    driver.memory(BYTES)
    assert driver.launch(function, 0, target, SIZE + 10_000, 1) == SUCCESS
    assert driver.call("cuStreamSynchronize", 0) == ILLEGAL_ADDRESS


def test_a_kernel_that_nobody_emulates_fails(driver):
    """At the next synchronisation, as a launch that failed."""
    module = driver.make("cuModuleLoadData", ADD_TO_BYTES.replace(b"add_to_bytes", b"other_kernel"))
    function = driver.make("cuModuleGetFunction", module, b"other_kernel")
    assert driver.launch(function, 0, driver.memory(BYTES), 1, 1) == SUCCESS
    assert driver.call("cuStreamSynchronize", 0) == LAUNCH_FAILED


def test_copies_that_leave_their_memory_are_refused(driver):
    """Beyond an allocation's end, and from two pinned ranges at once."""
    target, source = driver.memory(BYTES), (ctypes.c_ubyte * (2 * SIZE))()
    assert driver.call("cuMemcpyHtoDAsync_v2", target + 1, source, SIZE, 0) == INVALID_VALUE
    assert driver.call("cuMemcpyDtoDAsync_v2", target, target + 1, SIZE, 0) == INVALID_VALUE
    assert driver.call("cuMemsetD8Async", target + SIZE, 0, 1, 0) == INVALID_VALUE
    driver.do("cuMemHostRegister_v2", source, SIZE, 0)
    begin = ctypes.addressof(source)
    assert driver.call("cuMemcpyHtoDAsync_v2", target, begin + SIZE // 2, SIZE, 0) == INVALID_VALUE
    assert driver.call("cuMemcpyHtoDAsync_v2", target, target, SIZE, 0) == INVALID_VALUE


def test_a_copy_to_freed_memory_is_refused(driver):
    """At the call, whatever a real driver makes of an address that it may have given to somebody else."""
    address, source = driver.memory(BYTES), driver.pinned(BYTES)
    driver.do("cuMemFree_v2", address)
    assert driver.call("cuMemcpyHtoDAsync_v2", address, source, SIZE, 0) == INVALID_VALUE
    assert driver.call("cuMemcpyDtoHAsync_v2", source, address, SIZE, 0) == INVALID_VALUE


def test_host_memory_that_is_not_mapped_cannot_be_pinned(driver):
    """Nor can none at all, nor the device's own."""
    assert driver.call("cuMemHostRegister_v2", 4096, 4096, 0) == INVALID_VALUE
    assert driver.call("cuMemHostRegister_v2", (ctypes.c_ubyte * 1)(), 0, 0) == INVALID_VALUE
    assert driver.call("cuMemHostRegister_v2", driver.memory(BYTES), SIZE, 0) == INVALID_VALUE


def test_pageable_memory_is_staged_at_the_call_and_counted(driver):
    """Its bytes are those of the call; that the copy was no asynchronous one shows in the report."""
    stream, target = driver.stream(), driver.make("cuMemAlloc_v2", SIZE)
    source = (ctypes.c_ubyte * SIZE)(*BYTES)
    with driver.held(stream):
        driver.do("cuMemcpyHtoDAsync_v2", target, source, SIZE, stream)
        source[:] = bytes(SIZE)
    driver.do("cuStreamSynchronize", stream)
    back = (ctypes.c_ubyte * SIZE)()
    driver.do("cuMemcpyDtoHAsync_v2", back, target, SIZE, stream)
    assert bytes(back) == BYTES
    counted = driver.report()
    assert counted["pageable_host_to_device_bytes"] == counted["pageable_device_to_host_bytes"] == SIZE
    assert counted["pageable_host_to_device_copies"] == counted["pageable_device_to_host_copies"] == 1


def test_events_order_streams_that_hesitate(start):
    """A hundred steps that alternate between two streams, each waiting for the one before, come out in order."""
    driver = start(JITTER="11")
    driver.open()
    _, function = driver.kernel()
    streams, event = [driver.stream(), driver.stream()], driver.make("cuEventCreate", 2)
    target = driver.memory(bytes(256))
    for step in range(100):
        stream = streams[step % 2]
        driver.do("cuStreamWaitEvent", stream, event, 0)
        if step % 2:
            driver.do("cuMemcpyDtoDAsync_v2", target + step // 2 + 1, target + step // 2, 1, stream)
        else:
            assert driver.launch(function, stream, target + step // 2, 1, 1) == SUCCESS
        driver.do("cuEventRecord", event, stream)
    assert driver.content(target, 51) == bytes([*range(1, 51), 50])


def test_handles_that_are_gone_are_known(driver):
    """Streams, events and modules that were destroyed, and numbers that never were handles, are refused."""
    stream, event, (module, function) = driver.stream(), driver.make("cuEventCreate", 0), driver.kernel()
    driver.do("cuStreamDestroy_v2", stream)
    driver.do("cuEventDestroy_v2", event)
    driver.do("cuModuleUnload", module)
    assert driver.call("cuStreamSynchronize", stream) == INVALID_HANDLE
    assert driver.call("cuEventRecord", event, 0) == INVALID_HANDLE
    assert driver.launch(function, 0, driver.memory(b"1"), 1, 1) == INVALID_HANDLE
    assert driver.call("cuStreamSynchronize", 12345) == INVALID_HANDLE


def test_kernels_newer_than_the_driver_are_refused(start):
    """PTX of a newer version, and for a newer device, does not load; an older driver reads only older PTX."""
    driver = start(DRIVER_VERSION="11080")
    driver.open()
    handle = ctypes.c_uint64()
    for change, code in (
        ((b".version 7.0", b".version 7.8"), SUCCESS),
        ((b".version 7.0", b".version 8.0"), UNSUPPORTED_PTX),
        ((b"sm_75", b"sm_100"), NO_BINARY),
    ):
        assert driver.call("cuModuleLoadData", ctypes.byref(handle), ADD_TO_BYTES.replace(*change)) == code


def test_a_host_function_may_not_call_the_driver(driver):
    """It is refused there: a real driver may hang."""
    codes = []
    driver.host_function(0, lambda: codes.append(driver.call("cuCtxSynchronize")))
    driver.do("cuStreamSynchronize", 0)
    assert codes == [NOT_PERMITTED]


def test_the_report_counts_what_happened(driver):
    """Bytes each way, launches by name, what is alive, and the priorities of streams that copied."""
    (_, function), stream = driver.kernel(), driver.stream(priority=-3)
    host, target = driver.pinned(BYTES), driver.make("cuMemAlloc_v2", SIZE)
    ring = (ctypes.c_ubyte * SIZE)()
    driver.do("cuMemHostRegister_v2", ring, SIZE, 0)
    driver.do("cuMemcpyHtoDAsync_v2", target, host, SIZE, stream)
    driver.launch(function, stream, target, 10, 1)
    driver.do("cuMemcpyDtoHAsync_v2", host, target, 100, stream)
    driver.do("cuStreamSynchronize", stream)
    driver.do("cuMemFree_v2", driver.make("cuMemAlloc_v2", 1000))
    counted = driver.report()
    expected = {
        "host_to_device_bytes": SIZE, "device_to_host_bytes": 100, "device_to_device_bytes": 0,
        "pageable_host_to_device_copies": 0, "launches": {"add_to_bytes": 1}, "live_allocations": 1, "live_bytes": SIZE,
        "peak_bytes": SIZE + 1000, "live_streams": 1, "live_events": 0, "live_modules": 1, "registered_ranges": 1,
        "registered_bytes": SIZE, "registrations": 1, "registered_bytes_total": SIZE,
        "copy_priorities": {"host_to_device": {"-3": 1}, "device_to_host": {"-3": 1}, "device_to_device": {}},
    }  # fmt: skip
    assert {name: counted[name] for name in expected} == expected
    assert counted["calls"]["cuStreamSynchronize"] == 1


PROGRAM = """
import ctypes, os, sys
driver = ctypes.CDLL("libcuda.so.1")
assert driver.cuInit(0) == 0
if sys.argv[1:]:
    child = os.fork()
    if not child:
        os._exit(driver.cuInit(0))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), driver.cuInit(0))
"""


def program(folder: Path, *arguments: str, **settings: str) -> str:
    """What a process prints that finds the fake driver as it would find the real one."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), **settings}
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True, text=True).stdout


def test_a_forked_child_has_no_driver(own_gpu_folder):
    """A process that forked after cuInit: the child's driver says that it is not initialised, the parent's works."""
    assert program(own_gpu_folder, "fork").split() == [str(NOT_INITIALIZED), str(SUCCESS)]


def test_each_process_adds_a_line_to_the_report(own_gpu_folder, tmp_path):
    """At its end, whoever it was."""
    path = tmp_path / "report"
    for _ in range(2):
        program(own_gpu_folder, FAKE_CUDA_REPORT=str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["calls"] for line in lines] == [{"cuInit": 1}] * 2
    assert len({line["process"] for line in lines}) == 2
