"""Percentiles, durations, the age of the process, spans, and what a worker counts."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart import metrics
from coldstart.metrics import Durations, ProcessStart, Span, Timeline, WorkerMetrics, percentile

SECONDS = st.floats(0, 1e6, allow_subnormal=False)
FRACTIONS = st.floats(0, 1)


class Clock:
    """A clock that is set by hand."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


# --- percentiles and durations ---------------------------------------------------------------------------------------


@given(st.lists(SECONDS, min_size=1, max_size=60), FRACTIONS)
def test_percentile_is_that_of_numpy(samples, fraction):
    """For any samples and fraction the result is numpy's default quantile, up to rounding."""
    expected = float(np.quantile(samples, fraction, method="linear"))
    assert math.isclose(percentile(samples, fraction), expected, rel_tol=1e-9, abs_tol=1e-9)


@given(st.lists(SECONDS, min_size=1, max_size=60), FRACTIONS, FRACTIONS)
def test_percentiles_are_ordered_and_within_the_samples(samples, one, other):
    """A larger fraction never gives less, and nothing lies outside the samples."""
    low, high = sorted([one, other])
    tolerance = 1e-9 * max(samples)
    assert percentile(samples, low) <= percentile(samples, high) + tolerance
    assert min(samples) - tolerance <= percentile(samples, low) <= max(samples) + tolerance


def test_percentile_interpolates_between_neighbours():
    """The median of two is between them, the ends are the extremes, and the input need not be sorted."""
    assert percentile([3.0, 1.0], 0.5) == 2.0
    assert (percentile(iter([5.0, 1.0, 3.0]), 0.0), percentile([5.0, 1.0, 3.0], 1.0)) == (1.0, 5.0)
    assert percentile([0.0, 10.0], 0.95) == 9.5


@pytest.mark.parametrize(("samples", "fraction"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1), ([1.0], math.nan)])
def test_a_percentile_of_nothing_is_an_error(samples, fraction):
    """No samples, or a fraction that is not from 0 to 1, is a ValueError."""
    with pytest.raises(ValueError, match="a percentile needs samples"):
        percentile(samples, fraction)


@given(st.lists(SECONDS, min_size=1, max_size=60))
def test_a_summary_agrees_with_numpy(samples):
    """Count, mean, percentiles and maximum of what was added."""
    durations = Durations()
    for seconds in samples:
        durations.add(seconds)
    summary = durations.summary()
    assert summary.count == durations.count == len(samples)
    assert summary.max_seconds == durations.max_seconds == max(samples)
    assert durations.min_seconds == min(samples)
    assert math.isclose(summary.mean_seconds, float(np.mean(samples)), rel_tol=1e-9, abs_tol=1e-9)
    assert durations.mean_seconds == summary.mean_seconds
    expected = np.quantile(samples, [0.5, 0.95, 0.99])
    assert np.allclose([summary.p50_seconds, summary.p95_seconds, summary.p99_seconds], expected)


def test_durations_without_any_have_no_summary():
    """Nothing measured gives None and not zeros."""
    durations = Durations()
    assert durations.summary() is None
    assert (durations.count, durations.mean_seconds, durations.min_seconds) == (0, 0.0, math.inf)


def test_durations_are_bounded_and_their_totals_exact():
    """Percentiles are of the last samples only; count, sum, minimum and maximum are of all."""
    durations = Durations()
    for _ in range(5):
        durations.add(1000.0)
    for _ in range(metrics.KEPT_SAMPLES):
        durations.add(1.0)
    summary = durations.summary()
    assert (summary.count, summary.p99_seconds, summary.max_seconds) == (metrics.KEPT_SAMPLES + 5, 1.0, 1000.0)
    assert (durations.total_seconds, durations.min_seconds) == (metrics.KEPT_SAMPLES + 5000.0, 1.0)
    assert durations.samples() == [1.0] * metrics.KEPT_SAMPLES


def test_durations_are_safe_from_several_threads():
    """Four threads that add while one summarises lose nothing, and the reader never fails."""
    durations, done = Durations(), threading.Event()
    failures = []

    def read():
        while not done.is_set():
            try:
                durations.summary()
                durations.samples()
            except RuntimeError as error:
                failures.append(error)

    threads = [threading.Thread(target=lambda: [durations.add(1.0) for _ in range(5000)]) for _ in range(4)]
    reader = threading.Thread(target=read)
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in (reader, *threads):
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        done.set()
        reader.join()
        sys.setswitchinterval(old)
    assert (durations.count, durations.total_seconds, failures) == (20_000, 20_000.0, [])


# --- the process' start ----------------------------------------------------------------------------------------------

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's record is read from /proc")


@needs_linux
def test_the_age_of_the_process_is_the_kernels():
    """A child's age lies between what its parent saw of its life and its own, within the resolution that it reports."""
    code = "from coldstart.metrics import process_start_seconds as s; print(*s())"
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    lived_seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - before
    age, resolution, source = output.split()
    assert source == "kernel"
    assert float(resolution) == 1 / os.sysconf("SC_CLK_TCK")
    assert 0 < float(age) <= lived_seconds + float(resolution)


@needs_linux
def test_the_age_counts_from_before_the_first_import():
    """By the kernel's record the process is older than this module, whose import came later."""
    start = metrics.process_start_seconds()
    assert start.age_seconds > time.monotonic() - metrics._IMPORTED_SECONDS


@pytest.mark.parametrize("name", ["python", "a b", "x) R 1 (y", ") ) )"])
def test_a_record_is_read_whatever_the_program_is_called(name):
    """Parentheses and spaces in the program's name do not shift the fields."""
    fields = " ".join(str(number) for number in range(4, 53))
    assert metrics.start_ticks(f"17 ({name}) S {fields}\n".encode()) == 22


@pytest.mark.parametrize("record", [b"", b"17 (python) S 1 2 3", b"17 python S", b"1 (x) " + b"z " * 40])
def test_a_record_of_another_form_is_refused(record):
    """What is no stat record is a ValueError and not a wrong number."""
    with pytest.raises(ValueError):
        metrics.start_ticks(record)


def broken_sysconf(name):
    """``os.sysconf`` of a system that knows no clock ticks."""
    raise OSError("no such name")


@pytest.mark.parametrize(
    ("target", "attribute", "replacement"),
    [(metrics.os, "sysconf", broken_sysconf), (metrics, "start_ticks", lambda record: 10**12)],
    ids=["no-record", "made-up-record"],
)
def test_without_a_usable_record_the_import_counts(monkeypatch, target, attribute, replacement):
    """Where the kernel's record is missing or cannot be true, the age counts from the import, and the source says so."""
    monkeypatch.setattr(target, attribute, replacement)
    start = metrics.process_start_seconds()
    assert start.source == "import"
    assert 0 <= start.age_seconds <= time.monotonic() - metrics._IMPORTED_SECONDS


def test_a_process_clock_starts_at_the_age(monkeypatch):
    """The clock's first reading is the age of the process, and it runs on from there."""
    monkeypatch.setattr(metrics, "process_start_seconds", lambda: ProcessStart(1000.0, 0.01, "kernel"))
    clock = metrics.process_clock()
    first = clock()
    assert 1000.0 <= first <= clock()


# --- spans -----------------------------------------------------------------------------------------------------------


def test_a_timeline_records_spans_by_its_clock():
    """Spans carry name, track, beginning and end, and come in the order of their beginning, the outer one first."""
    clock = Clock()
    timeline = Timeline(clock)
    clock.seconds = 1.0
    with timeline.span("start") as outer:
        with timeline.span("import", "python"):
            clock.seconds = 2.0
        clock.seconds = 3.0
    timeline.record(Span("fetch", "fetcher", 0.5, 2.5))
    assert timeline.spans() == (
        Span("fetch", "fetcher", 0.5, 2.5),
        Span("start", "main", 1.0, 3.0),
        Span("import", "python", 1.0, 2.0),
    )
    assert outer.seconds == timeline.spans()[1].seconds == 2.0


def test_a_span_that_fails_is_recorded_too():
    """An error passes through the context, and the time until then is on the timeline."""
    clock = Clock()
    timeline = Timeline(clock)
    with pytest.raises(KeyError), timeline.span("load"):
        clock.seconds = 2.0
        raise KeyError("x")
    assert timeline.spans() == (Span("load", "main", 0.0, 2.0),)


# --- a worker --------------------------------------------------------------------------------------------------------


def test_worker_metrics_as_json():
    """The dictionary holds summaries, the ratio of the means, transfers with averages, and failures."""
    worker = WorkerMetrics()
    worker.cold.add(4.0)
    worker.warm.add(0.5)
    worker.warm.add(1.5)
    worker.saves.add(transferred_bytes=100, seconds=2.0)
    worker.saves.add(transferred_bytes=300, seconds=2.0)
    worker.failures += 1
    report = json.loads(json.dumps(worker.to_dict(), allow_nan=False))
    assert report["cold"]["mean_seconds"] == 4.0
    assert report["warm"]["p50_seconds"] == 1.0
    assert report["cold_over_warm"] == 4.0
    assert report["saves"] == {
        "count": 2,
        "bytes": 400,
        "seconds": 4.0,
        "mean_bytes": 200.0,
        "mean_seconds": 2.0,
        "bytes_per_second": 100.0,
    }
    assert report["failures"] == 1


def test_worker_metrics_of_nothing_are_none():
    """Before the first request there are no summaries, ratios or averages, and the dictionary is still JSON."""
    report = json.loads(json.dumps(WorkerMetrics().to_dict(), allow_nan=False))
    assert (report["cold"], report["warm"], report["cold_over_warm"], report["failures"]) == (None, None, None, 0)
    assert (report["restores"]["count"], report["restores"]["mean_seconds"]) == (0, None)


def test_metrics_are_light_to_import():
    """Importing metrics loads nothing from outside the standard library, nor its heavy parts."""
    heavy = "{'numpy', 'dataclasses', 'inspect', 'logging', 'asyncio', 'statistics', 'random', 'pathlib'}"
    code = f"import sys; from coldstart import metrics; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
