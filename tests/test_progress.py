"""What people see of a fetch that takes long."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import struct
import sys
import termios

import pytest

from coldstart import config, progress, sinks
from coldstart.events import EventBus, FellBack, FetchEnded, FetchProgress, SnapshotPassedOver, WorkerReady
from coldstart.progress import line_of, show_progress


class Terminal(io.StringIO):
    """A terminal that remembers what was written to it."""

    def isatty(self) -> bool:
        """It is one."""
        return True


@pytest.fixture
def attached(monkeypatch):
    """The settings with which log lines were asked for."""
    calls = []
    monkeypatch.setattr(sinks, "attach_once", calls.append)
    return calls


def test_a_line_says_how_far_how_fast_and_how_long():
    """Bytes, rate and the time left at that rate, as a bar to scale."""
    line = line_of(FetchProgress("llama", 4_000_000_000, 16_000_000_000, 8.0))
    assert line == "llama [######..................] 4.0 of 16.0 GB, 500 MB/s, 0:24 left"


@pytest.mark.parametrize(
    ("event", "end"),
    [
        (FetchProgress("m", 0, 10, 1.0), "0 MB/s, stalled"),
        (FetchProgress("m", 10, 10, 0.0), "0 MB/s, stalled"),
        (FetchProgress("m", 0, 0, 0.0), "0 MB/s, stalled"),
        (FetchProgress("m", 12_000_000, 10_000_000, 1.0), "12 MB/s, 0:00 left"),
        (FetchProgress("m", 1_000_000, 4_000_000_000, 1.0), "1 MB/s, 66:39 left"),
    ],
)
def test_odd_numbers_make_a_line_too(event, end):
    """Nothing fetched yet, no time passed, more than was announced, over an hour: a line, and no error."""
    assert line_of(event).endswith(end)


@pytest.mark.parametrize(
    "end",
    [
        FetchEnded("m", 10, 1.0, "process"),
        FellBack("m", "generation", "gone"),
        SnapshotPassedOver("m", "another key"),
        WorkerReady("m", "cold", "", 1.0),
    ],
)
def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch, attached, end):
    """Each step replaces the line before it, and the end of the fetch leaves the line empty."""
    terminal, bus = Terminal(), EventBus()
    monkeypatch.setattr("sys.stderr", terminal)
    show_progress(bus, config.load(log="off"))
    steps = [FetchProgress("m", bytes_, 10, 6.0) for bytes_ in (3, 6)]
    for event in (*steps, end, end):
        bus.publish(event)
    assert terminal.getvalue() == "".join(f"\r\x1b[K{line_of(step)}" for step in steps) + "\r\x1b[K"
    assert attached == []


def test_without_a_terminal_a_long_fetch_brings_the_log_lines(monkeypatch, attached):
    """Log lines wait for the first answer, unless a fetch lasts five seconds."""
    bus, settings = EventBus(), config.load()
    monkeypatch.setattr("sys.stderr", io.StringIO())
    show_progress(bus, settings)
    bus.publish(FetchProgress("m", 1, 10, 4.9))
    assert attached == []
    bus.publish(FetchProgress("m", 2, 10, 5.0))
    assert attached == [settings]


@pytest.mark.parametrize("options", [{"log": "off"}, {"log": "off", "progress": False}])
def test_what_is_off_stays_off(monkeypatch, attached, options):
    """Without log lines and without a bar nothing is shown."""
    stream = io.StringIO() if options.get("progress", True) else Terminal()
    bus = EventBus()
    monkeypatch.setattr("sys.stderr", stream)
    show_progress(bus, config.load(**options))
    bus.publish(FetchProgress("m", 1, 10, 60.0))
    assert (stream.getvalue(), attached) == ("", [])


def test_a_closed_terminal_harms_nobody():
    """A terminal that cannot be written to any more ends no fetch."""
    terminal = Terminal()
    terminal.close()
    progress.Bar(terminal)(FetchProgress("m", 1, 10, 1.0))


@pytest.mark.parametrize("form", ["json", "console"])
def test_log_lines_come_every_five_seconds(form):
    """Of many steps those at least five seconds apart are logged, each name for itself, with rate and time left."""
    now, stream = [100.0], io.StringIO()
    bus = EventBus(clock=lambda: now[0])
    sinks.attach_structlog(bus, config.load(log=form), stream=stream)
    for second in range(11):
        now[0] = 100.0 + second
        bus.publish(FetchProgress("m", 10 * second, 1000, float(second)))
    bus.publish(FetchProgress("other", 1, 10, 1.0))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert all("fetch_progress" in line for line in lines)
    if form == "json":
        assert json.loads(lines[1]) == {
            "event": "fetch_progress",
            "level": "info",
            "timestamp": "1970-01-01T00:01:45.000Z",
            "name": "m",
            "fetched_bytes": 50,
            "total_bytes": 1000,
            "seconds": 5.0,
            "bytes_per_second": 10,
            "left_seconds": 95.0,
        }


class Silent:
    """What programs put in place of standard error: all that ``print`` needs."""

    def write(self, text):
        """Forget it."""

    def flush(self):
        """Nothing is kept."""


def closed():
    """A terminal that is closed."""
    terminal = Terminal()
    terminal.close()
    terminal.isatty = lambda: io.StringIO.isatty(terminal)
    return terminal


@pytest.mark.parametrize("make", [Silent, closed, lambda: None])
def test_whatever_stands_for_standard_error(monkeypatch, attached, make):
    """A stream without ``isatty``, a closed one and none are no terminals, and no reason for a start to fail."""
    monkeypatch.setattr("sys.stderr", make())
    bus, settings = EventBus(), config.load()
    show_progress(bus, settings)
    bus.publish(FetchProgress("m", 2, 10, 5.0))
    assert attached == [settings]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("columns", [20, 50, 200])
def test_a_line_is_no_longer_than_the_terminal_is_wide(monkeypatch, attached, columns):
    """What goes on in a second row would stay there: the line is cut off before it does."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    step = FetchProgress("m", 3, 10, 6.0)
    with open(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        bus = EventBus()
        show_progress(bus, config.load(log="off"))
        bus.publish(step)
        written = os.read(ours, 1000).decode()
    os.close(ours)
    assert written == f"\r\x1b[K{line_of(step)[: columns - 1]}"
