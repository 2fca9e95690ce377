"""What coldstart relies on in NVIDIA's driver, for the fake and the real one alike."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time

import pytest

from tests.fake_gpu.calls import (
    ALREADY_REGISTERED,
    INVALID_CONTEXT,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_IMAGE,
    INVALID_VALUE,
    NON_BLOCKING,
    NOT_FOUND,
    NOT_READY,
    NOT_REGISTERED,
    OUT_OF_MEMORY,
    SUCCESS,
    Driver,
)

SIZE = 1 << 16
BYTES = bytes(range(256)) * (SIZE // 256)
DISABLE_TIMING = 2


def in_a_thread(function):
    """What ``function`` returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def still_waits(driver: Driver, event: int) -> bool:
    """Whether the event has not happened, after a moment in which it might have, wrongly."""
    time.sleep(0.02)
    return driver.call("cuEventQuery", event) == NOT_READY


class DriverContract:
    """Give a fixture ``driver``: a ``Driver`` that is open, and afterwards as it was."""

    def test_a_thread_without_a_context_may_not_allocate(self, driver: Driver):
        """The current context is each thread's own: a new thread has none until it sets one."""

        def with_and_without():
            address = ctypes.c_uint64()
            without = driver.call("cuMemAlloc_v2", ctypes.byref(address), SIZE)
            driver.do("cuCtxSetCurrent", driver.context)
            return without, driver.call("cuMemFree_v2", driver.make("cuMemAlloc_v2", SIZE))

        assert in_a_thread(with_and_without) == (INVALID_CONTEXT, SUCCESS)
        assert in_a_thread(lambda: driver.make("cuCtxGetCurrent")) == 0
        assert driver.make("cuCtxGetCurrent") == driver.context

    def test_the_primary_context_is_one(self, driver: Driver):
        """Whoever retains a device's context gets the same, and it lives until the last one releases it."""
        assert driver.make("cuDevicePrimaryCtxRetain", 0) == driver.context
        driver.do("cuDevicePrimaryCtxRelease_v2", 0)
        driver.do("cuCtxSynchronize")

    def test_devices_are_described(self, driver: Driver):
        """A device has a name, a capability, memory and an identity; one that is not there is an error."""
        name, identity = ctypes.create_string_buffer(100), ctypes.create_string_buffer(16)
        driver.do("cuDeviceGetName", name, 100, 0)
        driver.do("cuDeviceGetUuid_v2", identity, 0)
        assert name.value
        assert identity.raw != bytes(16)
        assert driver.make("cuDeviceGetAttribute", 75, 0) >= 7
        assert driver.make("cuDeviceGetAttribute", 16, 0) > 0
        assert driver.make("cuDeviceTotalMem_v2", 0) > SIZE
        assert driver.make("cuDriverGetVersion") >= 11080
        count = driver.make("cuDeviceGetCount")
        assert driver.make("cuDeviceGet", count - 1) == count - 1
        assert driver.call("cuDeviceGet", ctypes.byref(ctypes.c_int()), count) == INVALID_DEVICE

    def test_bytes_come_back(self, driver: Driver):
        """What is copied to the device, within it and back is what was sent; a fill fills."""
        first, second = driver.memory(BYTES), driver.make("cuMemAlloc_v2", SIZE)
        driver.do("cuMemcpyDtoDAsync_v2", second, first, SIZE, 0)
        driver.do("cuMemsetD8Async", second + 100, 7, 10, 0)
        assert driver.content(second, SIZE) == BYTES[:100] + b"\7" * 10 + BYTES[110:]

    def test_a_copy_reads_when_its_stream_gets_there(self, driver: Driver):
        """A pinned source that is changed before its copy's turn is copied as changed: slots wait for events."""
        stream, source, target = driver.stream(), driver.pinned(bytes(SIZE)), driver.make("cuMemAlloc_v2", SIZE)
        with driver.held(stream):
            driver.do("cuMemcpyHtoDAsync_v2", target, source, SIZE, stream)
            source[:] = BYTES
        assert driver.content(target, SIZE) == BYTES

    def test_an_event_happens_when_its_stream_gets_there(self, driver: Driver):
        """It is not ready before, and ready after; one that was never recorded keeps nobody waiting."""
        stream, event = driver.stream(), driver.make("cuEventCreate", DISABLE_TIMING)
        driver.do("cuEventQuery", event)
        driver.do("cuEventSynchronize", event)
        with driver.held(stream):
            driver.do("cuEventRecord", event, stream)
            assert still_waits(driver, event)
            assert driver.call("cuStreamQuery", stream) == NOT_READY
        driver.do("cuEventSynchronize", event)
        driver.do("cuEventQuery", event)
        driver.do("cuStreamSynchronize", stream)
        driver.do("cuStreamQuery", stream)
        driver.do("cuEventDestroy_v2", event)

    def test_streams_do_not_wait_for_each_other(self, driver: Driver):
        """What is queued to another stream goes on while one is held."""
        held, free, event = driver.stream(), driver.stream(), driver.make("cuEventCreate", 0)
        with driver.held(held):
            driver.do("cuEventRecord", event, free)
            driver.do("cuEventSynchronize", event)

    def test_a_stream_waits_for_an_event_of_another(self, driver: Driver):
        """It waits for the record that was made last before the wait, and not for one that is made afterwards."""
        first, second = driver.stream(), driver.stream()
        event, after = (driver.make("cuEventCreate", DISABLE_TIMING) for _ in range(2))
        source, target = driver.pinned(BYTES), driver.memory(bytes(SIZE))
        back = driver.pinned(bytes(SIZE))
        with driver.held(first) as begin:
            driver.do("cuMemcpyHtoDAsync_v2", target, source, SIZE, first)
            driver.do("cuEventRecord", event, first)
            driver.do("cuStreamWaitEvent", second, event, 0)
            driver.do("cuMemcpyDtoHAsync_v2", back, target, SIZE, second)
            driver.do("cuEventRecord", after, second)
            with driver.held(
                first
            ):  # the driver may run host functions one after another: these two are in order anyway
                driver.do("cuEventRecord", event, first)
                assert still_waits(driver, after)
                begin.set()
                driver.do("cuStreamSynchronize", second)
                assert still_waits(driver, event)
        assert bytes(back) == BYTES

    def test_the_default_stream_takes_turns(self, driver: Driver):
        """A blocking stream waits for what the default stream was given before, a non-blocking one does not."""
        blocking, free = driver.stream(flags=0), driver.stream(flags=NON_BLOCKING)
        marks = [driver.make("cuEventCreate", DISABLE_TIMING) for _ in range(2)]
        with driver.held(0):
            for mark, stream in zip(marks, (blocking, free), strict=True):
                driver.do("cuEventRecord", mark, stream)
            driver.do("cuEventSynchronize", marks[1])
            assert still_waits(driver, marks[0])
        driver.do("cuEventSynchronize", marks[0])

    def test_the_default_stream_waits_for_blocking_ones(self, driver: Driver):
        """What it is given runs after what they were given before."""
        blocking, mark = driver.stream(flags=0), driver.make("cuEventCreate", DISABLE_TIMING)
        with driver.held(blocking):
            driver.do("cuEventRecord", mark, 0)
            assert still_waits(driver, mark)
        driver.do("cuEventSynchronize", mark)

    def test_a_destroyed_stream_does_what_it_was_given(self, driver: Driver):
        """Its queue is not dropped."""
        stream, source, target = driver.stream(), driver.pinned(BYTES), driver.memory(bytes(SIZE))
        with driver.held(stream):
            driver.do("cuMemcpyHtoDAsync_v2", target, source, SIZE, stream)
            driver.do("cuStreamDestroy_v2", stream)
        assert driver.content(target, SIZE) == BYTES

    def test_time_between_events(self, driver: Driver):
        """Milliseconds between two events that happened; events made without time have none."""
        events = [driver.make("cuEventCreate", 0) for _ in range(2)]
        untimed = driver.make("cuEventCreate", DISABLE_TIMING)
        for event in (*events, untimed):
            driver.do("cuEventRecord", event, 0)
        driver.do("cuStreamSynchronize", 0)
        milliseconds = ctypes.c_float(-1)
        driver.do("cuEventElapsedTime", ctypes.byref(milliseconds), *events)
        assert milliseconds.value >= 0
        assert driver.call("cuEventElapsedTime", ctypes.byref(milliseconds), events[0], untimed) == INVALID_HANDLE

    def test_memory_is_limited_and_counted(self, driver: Driver):
        """What is asked for beyond what there is, is refused; what is taken is not free."""
        free, total = driver.pair("cuMemGetInfo_v2")
        address = driver.make("cuMemAlloc_v2", 64 << 20)
        assert driver.pair("cuMemGetInfo_v2")[0] <= free - (64 << 20)
        assert driver.call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), total + 1) == OUT_OF_MEMORY
        assert driver.call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 0) == INVALID_VALUE
        driver.do("cuMemFree_v2", address)

    def test_allocations_are_known_by_any_of_their_addresses(self, driver: Driver):
        """The base and the size of the allocation are told, aligned to 256 bytes; a stranger's address is not found."""
        address = driver.make("cuMemAlloc_v2", 1000)
        base, length_bytes = driver.pair("cuMemGetAddressRange_v2", address + 999)
        assert address % 256 == 0
        assert base == address
        assert length_bytes >= 1000
        driver.do("cuMemFree_v2", address)
        assert driver.call("cuMemGetAddressRange_v2", None, None, address) in (NOT_FOUND, INVALID_VALUE)

    def test_memory_is_freed_once(self, driver: Driver):
        """Freeing it again is an error, and so is an address inside it."""
        address = driver.make("cuMemAlloc_v2", SIZE)
        assert driver.call("cuMemFree_v2", address + 256) == INVALID_VALUE
        driver.do("cuMemFree_v2", address)
        assert driver.call("cuMemFree_v2", address) == INVALID_VALUE
        driver.do("cuMemFree_v2", 0)

    def test_host_memory_is_registered_once(self, driver: Driver):
        """A memory file's mapping becomes pinned; twice, or undone twice, is an error."""
        file = os.memfd_create("ring")
        os.ftruncate(file, 4 * SIZE)
        ring = mmap.mmap(file, 4 * SIZE)
        os.close(file)
        base = ctypes.addressof(ctypes.c_ubyte.from_buffer(ring))
        driver.do("cuMemHostRegister_v2", base, 4 * SIZE, 0)
        assert driver.call("cuMemHostRegister_v2", base, 4 * SIZE, 0) == ALREADY_REGISTERED
        ring[SIZE : 2 * SIZE] = BYTES
        stream, target = driver.stream(), driver.make("cuMemAlloc_v2", SIZE)
        with driver.held(stream):
            driver.do("cuMemcpyHtoDAsync_v2", target, base + SIZE, SIZE, stream)
            driver.do("cuMemcpyDtoHAsync_v2", base, target, SIZE, stream)
        driver.do("cuStreamSynchronize", stream)
        assert ring[:SIZE] == BYTES
        driver.do("cuMemHostUnregister", base)
        assert driver.call("cuMemHostUnregister", base) == NOT_REGISTERED

    def test_host_memory_of_the_driver_is_freed_once(self, driver: Driver):
        """What the driver gave, it takes back; nothing else."""
        base = driver.make("cuMemHostAlloc", SIZE, 0)
        driver.do("cuMemFreeHost", base)
        assert driver.call("cuMemFreeHost", base) == INVALID_VALUE

    def test_streams_have_priorities(self, driver: Driver):
        """Lower numbers come first; one beyond the range is taken for its end."""
        least, greatest = (ctypes.c_int32(number).value for number in driver.pair("cuCtxGetStreamPriorityRange"))
        assert greatest <= least == 0
        driver.do("cuStreamDestroy_v2", driver.stream(priority=greatest - 100))

    def test_a_kernel_runs_in_its_stream(self, driver: Driver):
        """It sees what was copied before it, and its arguments are those of the call, whatever became of them since."""
        (module, function), stream = driver.kernel(), driver.stream()
        target, source = driver.memory(bytes(SIZE)), driver.pinned(b"\5" * SIZE)
        with driver.held(stream):
            driver.do("cuMemcpyHtoDAsync_v2", target, source, SIZE, stream)
            assert driver.launch(function, stream, target, SIZE - 1, 3) == SUCCESS
            assert driver.launch(function, stream, target, 1, 1) == SUCCESS
        assert driver.content(target, SIZE) == b"\x09" + b"\x08" * (SIZE - 2) + b"\5"
        driver.do("cuModuleUnload", module)

    def test_modules_say_what_they_lack(self, driver: Driver):
        """A function that is not there is not found; bytes that are no module are refused."""
        module, _ = driver.kernel()
        handle = ctypes.c_uint64()
        assert driver.call("cuModuleGetFunction", ctypes.byref(handle), module, b"subtract") == NOT_FOUND
        assert driver.call("cuModuleLoadData", ctypes.byref(handle), b"no module") == INVALID_IMAGE

    def test_a_launch_beyond_the_device_is_refused(self, driver: Driver):
        """More threads a block than there can be, or none, are errors of the call."""
        _, function = driver.kernel()
        pointers = (ctypes.c_void_p * 3)(*[ctypes.addressof(ctypes.c_uint64())] * 3)
        for threads in (0, 2048):
            code = driver.call("cuLaunchKernel", function, 1, 1, 1, threads, 1, 1, 0, 0, pointers, None)
            assert code == INVALID_VALUE

    def test_host_functions_run_in_their_turn(self, driver: Driver):
        """After what was queued before them in their stream."""
        stream, source, target = driver.stream(), driver.pinned(BYTES), driver.memory(bytes(SIZE))
        back, seen = driver.pinned(bytes(SIZE)), []
        driver.do("cuMemcpyHtoDAsync_v2", target, source, SIZE, stream)
        driver.do("cuMemcpyDtoHAsync_v2", back, target, SIZE, stream)
        driver.host_function(stream, lambda: seen.append(bytes(back)))
        driver.do("cuStreamSynchronize", stream)
        assert seen == [BYTES]

    @pytest.mark.parametrize(
        ("code", "name"),
        [(0, b"CUDA_SUCCESS"), (2, b"CUDA_ERROR_OUT_OF_MEMORY"), (700, b"CUDA_ERROR_ILLEGAL_ADDRESS")],
    )
    def test_codes_have_names(self, driver: Driver, code: int, name: bytes):
        """Every code has a name and a sentence; a number that is none has neither."""
        text = ctypes.c_char_p()
        driver.do("cuGetErrorName", code, ctypes.byref(text))
        assert text.value == name
        driver.do("cuGetErrorString", code, ctypes.byref(text))
        assert text.value
        assert driver.call("cuGetErrorName", 12345, ctypes.byref(text)) == INVALID_VALUE


__all__ = ["BYTES", "SIZE", "DriverContract", "in_a_thread"]
