"""A process that stood still: when that is noticed, and what is made anew."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.thaw import BUSY_FRACTION, FreezeWatch, reseed

ROOT = Path(__file__).parent.parent


class Clocks:
    """Clocks that are set by hand: of the wall, monotonic, and of the work that the process did."""

    def __init__(self):
        self.wall = self.monotonic = self.worked = 0.0

    def watch(self, threshold_seconds=10.0):
        """A watch on them."""
        clocks = (lambda: self.wall, lambda: self.monotonic)
        return FreezeWatch(threshold_seconds, clocks=clocks, worked=lambda: self.worked)

    def pass_time(self, *, wall=0.0, monotonic=0.0, worked=0.0):
        """Let each go on by so many seconds."""
        self.wall += wall
        self.monotonic += monotonic
        self.worked += worked


def test_a_process_that_goes_on_was_not_frozen():
    """Time that passes in small steps is no freeze, however much of it."""
    clocks = Clocks()
    watch = clocks.watch()
    for _ in range(100):
        clocks.pass_time(wall=1, monotonic=1)
        watch.look()
    assert watch.frozen_seconds() == 0.0


@pytest.mark.parametrize("jump", [{"wall": 60, "monotonic": 60}, {"wall": 60}, {"monotonic": 60}])
def test_a_jump_without_work_is_a_freeze_once(jump):
    """A jump of either clock, in which no work was done, is told once to whoever asks first."""
    clocks = Clocks()
    watch = clocks.watch()
    clocks.pass_time(**jump, worked=0.1)
    assert watch.frozen_seconds() == 60.0
    assert watch.frozen_seconds() == 0.0


def test_a_freeze_that_the_thread_saw_first_is_kept():
    """The watch's own look does not use up what the next event has to be told."""
    clocks = Clocks()
    watch = clocks.watch()
    clocks.pass_time(wall=30, monotonic=30)
    watch.look()
    clocks.pass_time(wall=1, monotonic=1)
    watch.look()
    assert watch.frozen_seconds() == 30.0


def test_work_that_kept_the_watch_waiting_is_no_freeze():
    """A gap in which the process used the processor was a long call of an extension module."""
    clocks = Clocks()
    watch = clocks.watch()
    clocks.pass_time(wall=60, monotonic=60, worked=40)
    assert watch.frozen_seconds() == 0.0


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=30))
def test_only_long_idle_gaps_count(steps):
    """What is told is the sum of the gaps that are long enough and in which little work was done."""
    clocks = Clocks()
    watch = clocks.watch(10.0)
    expected = 0.0
    for gap, worked in steps:
        began, worked_before = clocks.wall, clocks.worked
        clocks.pass_time(wall=gap, worked=worked)
        watch.look()
        passed = clocks.wall - began
        if passed >= 10.0 and clocks.worked - worked_before <= passed * BUSY_FRACTION:
            expected += passed
    assert watch.frozen_seconds() == pytest.approx(expected, abs=1e-6)


STOOD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from coldstart.thaw import FreezeWatch
watch = FreezeWatch(1.0)
watch.start()
print("ready", flush=True)
sys.stdin.readline()
print(watch.frozen_seconds(), flush=True)
"""


def test_a_stopped_process_notices():
    """A real process that is stopped and continued knows afterwards how long it stood still."""
    with subprocess.Popen(
        [sys.executable, "-c", STOOD, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(1.6)
            os.kill(process.pid, signal.SIGCONT)
            output, _ = process.communicate("go on\n", timeout=60)
        finally:
            process.kill()
    assert float(output) >= 1.5


def test_shared_generators_get_a_new_state():
    """``random``, numpy's and torch's generators go on differently after each of two identical pasts."""
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    drawn = []
    for _ in range(2):
        random.seed(1)
        numpy.random.seed(1)
        torch.manual_seed(1)
        reseed()
        drawn.append((random.random(), numpy.random.random(), torch.rand(1).item()))
    assert all(first != second for first, second in zip(*drawn, strict=True))
