"""A start as bars of text: one line a phase or span, to scale. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.bench.summary import ScenarioSummary, Stretch

WIDTH = 48
_SHOWN_OVERLAPS = 2


def draw(summary: ScenarioSummary) -> str:
    """The timeline of the scenario's median trial.

    A bar is as long as its stretch took, to scale with the longer of the last stretch's end and the median time to the
    first response; the shortest is one character. What ran beside a span on other tracks stands behind it.
    """
    answered = summary.first_response.median
    heading = (
        f"{summary.scenario}: {answered:.3f} s to the first response (median; timeline of round {summary.median_round})"
    )
    if not summary.timeline:
        return f"{heading}\n  no phases or spans were recorded"
    end = max(answered, *(item.ended_seconds for item in summary.timeline))
    labels = [f"{item.track}: {item.name}" for item in summary.timeline]
    width = max(map(len, labels))
    rows = [
        f"  {label:{width}}  |{_bar(item, end)}|  {item.seconds:7.3f} s{_beside(item.beside)}"
        for label, item in zip(labels, summary.timeline, strict=True)
    ]
    return "\n".join([heading, *rows])


def _bar(item: Stretch, end_seconds: float) -> str:
    begin = min(WIDTH - 1, max(0, round(WIDTH * item.began_seconds / end_seconds)))
    until = min(WIDTH, max(begin + 1, round(WIDTH * item.ended_seconds / end_seconds)))
    return " " * begin + "#" * (until - begin) + " " * (WIDTH - until)


def _beside(overlaps: Sequence[tuple[str, float]]) -> str:
    shown = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in overlaps[:_SHOWN_OVERLAPS])
    return f"  beside {shown}" if shown else ""
