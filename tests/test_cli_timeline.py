"""A start as text: the headline, bars to scale, and what became of the snapshot."""

from __future__ import annotations

import pytest

from coldstart.cli.timeline import WIDTH, report


def phase(name, began, ended, skipped=""):
    """A phase as start records have it."""
    return {"name": name, "began_seconds": began, "ended_seconds": ended, "skipped": skipped}


def document(*, start=None, **changes):
    """What ``coldstart run --json`` prints, as far as the report looks at it."""
    whole_start = {
        "name": "minilm",
        "kind": "restored",
        "reason": "",
        "recovered_by": "none",
        "generation": 3,
        "bytes": {"raw": 0, "stored": 0},
        "phases": [phase("weight_load", 0.5, 1.0)],
        "spans": [{"track": "fetch", "name": "look up", "began_seconds": 0.0, "ended_seconds": 0.25}],
    }
    capture = {"published": False, "reason": ""}
    whole = {"first_answer_seconds": 1.0, "warm_seconds": [], "capture": capture}
    return {**whole, **changes, "start": {**whole_start, **(start or {})}}


@pytest.mark.parametrize(
    ("start", "headline"),
    [
        ({}, "minilm restored (generation 3); first answer 1.000 s after the process began"),
        (
            {"kind": "fallback", "generation": 0, "reason": "the store is gone"},
            "minilm fallback: the store is gone; first answer 1.000 s after the process began",
        ),
        (
            {"recovered_by": "previous_generation"},
            "minilm restored (generation 3), recovered by previous_generation; first answer 1.000 s after the process began",
        ),
    ],
)
def test_the_headline_says_how_the_start_went(start, headline):
    """Kind, generation, reason and recovery are told where there are any."""
    assert report(document(start=start)).splitlines()[0] == headline


def test_bars_are_to_scale_and_in_order():
    """Rows come in the order of their beginnings; a bar begins and ends in proportion to the whole."""
    rows = report(document()).splitlines()[1:]
    quarter, half = WIDTH // 4, WIDTH // 2
    assert rows == [
        f"  fetch: look up      |{'#' * quarter}{' ' * (WIDTH - quarter)}|    0.250 s",
        f"  phase: weight_load  |{' ' * half}{'#' * half}|    0.500 s",
    ]


@pytest.mark.parametrize("began", [-1.0, 0.0, 0.999999, 1.0, 2.0])
def test_a_bar_is_never_empty_nor_too_wide(began):
    """A step of no length is one mark within the frame, wherever it lies, even beyond the first answer."""
    spans = [{"track": "main", "name": "x", "began_seconds": began, "ended_seconds": began}]
    (row,) = report(document(start={"spans": spans, "phases": []})).splitlines()[1:]
    bar = row.split("|")[1]
    assert (len(bar), bar.count("#")) == (WIDTH, 1)


def test_skipped_phases_are_told_with_their_reason():
    """A phase that was left out has no bar but a line with why."""
    phases = [phase("kernel_compile", 1.0, 1.0, "no compile=")]
    assert report(document(start={"phases": phases, "spans": []})).splitlines()[1:] == [
        "  skipped kernel_compile: no compile="
    ]


def test_restored_bytes_and_warm_answers_are_told():
    """Sizes are in units of a thousand, and the warm answers come as their median."""
    text = report(document(start={"bytes": {"raw": 90_868_376, "stored": 2_500}}, warm_seconds=[0.003, 0.001, 0.002]))
    assert "  restored 90.9 MB from 2.5 kB stored\n" in text
    assert text.endswith("  warm: median 2.000 ms of 3")


@pytest.mark.parametrize(
    ("restored", "new", "obstacle", "told"),
    [
        (23, 0, "", "kernel caches: 23 files, 2.5 kB, restored"),
        (0, 7, "of another platform", "kernel caches: 7 files compiled anew, of another platform"),
        (0, 0, "switched off", ""),
    ],
)
def test_kernel_caches_are_told(restored, new, obstacle, told):
    """Kernels that came with the snapshot or were compiled are told, with what stood in the way; else there is nothing to tell."""
    use = {"restored_files": restored, "restored_bytes": 2500, "new_files": new, "lacking": 0, "obstacle": obstacle}
    lines = [line.strip() for line in report(document(start={"kernel_caches": use})).splitlines()]
    assert [line for line in lines if line.startswith("kernel")] == ([told] if told else [])


def test_what_became_of_the_snapshot_is_told():
    """A published generation comes with its cost, and what stood in the way of one with its reason."""
    sizes = {"raw_bytes": 3_000_000_000, "stored_bytes": 999, "written_bytes": 12_345}
    published = {"published": True, "generation": 4, "seconds": 1.5, **sizes}
    assert report(document(capture=published)).endswith(
        "  snapshot: generation 4 published in 1.50 s, 999 bytes stored of 3.0 GB, 12.3 kB written;"
        " the next start restores it"
    )
    none = {"published": False, "reason": "captures are switched off"}
    assert report(document(capture=none)).endswith("\n  no snapshot was made: captures are switched off")
