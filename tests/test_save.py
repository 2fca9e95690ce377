"""What all ways of saving share: the rate limit, the settings, the lowest priority."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from coldstart import config
from coldstart.capture import Encoding, Writing
from coldstart.errors import CaptureError, ConfigError
from coldstart.repository import Repository
from coldstart.save import AUTO, ENGINES, THREADS, Saving
from coldstart.save.priority import NICENESS, give_way, hurry
from coldstart.save.stage import Rate
from coldstart.stores.memory import MemoryStore
from coldstart.testing import FakeClock
from tests.generations import capture_of
from tests.starts import ROOT

HOME = {"HOME": "/home/user"}
MIB = 1 << 20


class Waits(threading.Event):
    """An event that nobody sets, whose waits pass at once on a clock; or one that is set."""

    def __init__(self, clock, *, is_stopped=False):
        super().__init__()
        self._clock = clock
        self._is_stopped = is_stopped

    def wait(self, timeout=None):
        self._clock.sleep(timeout)
        return self._is_stopped


def test_a_rate_is_kept_on_average():
    """What is sent waits until what was sent before it has had its time, and no longer."""
    clock = FakeClock()
    rate = Rate(100, Waits(clock), clock=clock.monotonic)
    for amount in (50, 200, 30):
        rate.wait(amount)
    assert clock.slept == [0.0, 0.5, 2.0]
    clock.advance(10.0)
    rate.wait(70)
    assert clock.slept[-1] == 0.0, "time in which nothing was sent is not saved up, and not charged"
    rate.wait(10)
    assert clock.slept[-1] == pytest.approx(0.7)


def test_without_a_rate_nothing_waits():
    """0 means as fast as the store takes it."""
    clock = FakeClock()
    Rate(0, Waits(clock), clock=clock.monotonic).wait(1 << 40)
    assert clock.slept == []


def test_a_stopped_capture_does_not_wait_for_its_rate():
    """Whoever waits for the rate when the worker ends sends nothing."""
    clock = FakeClock()
    with pytest.raises(CaptureError, match="the worker ended"):
        Rate(1, Waits(clock, is_stopped=True), clock=clock.monotonic).wait(10)


def test_the_rate_counts_what_is_written():
    """Chunks that the store has already are not charged."""
    store = MemoryStore()
    state = {"w": np.arange(3 * MIB)}

    def written(bytes_per_second):
        saving = Saving(THREADS, None, 64 * MIB, bytes_per_second)
        return Writing(capture_of(state), Repository(store), encoding=Encoding("raw", 1), saving=saving).write(
            lambda: None
        )

    assert written(0).written_bytes == 24 * MIB
    assert written(1).reused_bytes == 24 * MIB, "at a byte a second this would take a year"


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("COLDSTART_CAPTURE_ENGINE", "Process", "capture_engine", "process"),
        ("COLDSTART_CAPTURE_BYTES_PER_SECOND", "50MB", "capture_bytes_per_second", 50_000_000),
        ("COLDSTART_CAPTURE_BYTES_PER_SECOND", "0", "capture_bytes_per_second", 0),
    ],
)
def test_settings_of_a_capture(variable, text, field, value):
    """Who saves and how fast can be set; by default coldstart chooses, and there is no limit."""
    assert getattr(config.load({**HOME, variable: text}), field) == value
    settings = config.load(HOME)
    assert (settings.capture_engine, settings.capture_bytes_per_second) == (AUTO, 0)


def test_every_engine_can_be_set():
    """The setting's words are the engines', and nothing else."""
    for engine in ENGINES:
        assert config.load({**HOME, "COLDSTART_CAPTURE_ENGINE": engine}).capture_engine == engine
    with pytest.raises(ConfigError, match="auto, process, threads"):
        config.load({**HOME, "COLDSTART_CAPTURE_ENGINE": "thread"})


def test_a_start_imports_nothing_of_a_capture():
    """What a worker has imported when it begins holds nothing that only a capture needs."""
    code = "import sys, coldstart.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "coldstart.restore" in loaded
    assert not loaded & {
        f"coldstart.{name}"
        for name in ("capture", "capture_sources", "generation_making", "marks", "proof", "resnapshot", "save")
    }


@pytest.mark.skipif(sys.platform != "linux", reason="the policy of the idle is Linux'")
@pytest.mark.parametrize("has_policy", [True, False])
def test_the_lowest_priority(monkeypatch, has_policy):
    """A child gets the policy of the idle, or the highest niceness where that policy is not to be had."""
    if not has_policy:

        def refuse(*_):
            raise PermissionError

        monkeypatch.setattr(os, "sched_setscheduler", refuse)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        give_way(child.pid)
        found = (os.sched_getscheduler(child.pid), os.getpriority(os.PRIO_PROCESS, child.pid))
    finally:
        child.communicate(b"\n")
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert found == ((os.SCHED_IDLE, own) if has_policy else (os.SCHED_OTHER, NICENESS))


def test_a_process_that_has_ended_is_no_error():
    """A child may end before it is given its priority."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    give_way(child.pid)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no such policy")
def test_a_group_that_is_waited_for_has_its_share_again():
    """Every thread of a process group that gave way is scheduled like any other once somebody waits for it."""
    program = (
        "import os, sys, threading, time\n"
        "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('there', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    )
    with child:
        try:
            assert child.stdout.readline() == b"there\n"
            threads = [int(name) for name in os.listdir(f"/proc/{child.pid}/task")]
            assert [os.sched_getscheduler(thread) for thread in threads] == [os.SCHED_IDLE] * 2
            hurry(child.pid)
            assert [os.sched_getscheduler(thread) for thread in threads] == [os.SCHED_OTHER] * 2
        finally:
            child.kill()
