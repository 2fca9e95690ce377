"""The picture of a run, as SVG: bars of wall time from the imports to usable tensors, and the goals."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from benchmarks.restoring import summary
from benchmarks.restoring.contenders import LIMIT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH, LEFT, RIGHT = 860, 260, 150
BAR, STEP = 18, 26
OWN, OTHER, BOUND = "#2463eb", "#9aa4b2", "#16a34a"


def to_svg(document: Mapping[str, Any]) -> str:
    """Draw the table of contenders. Raises ValueError where the document has none."""
    if not document.get("contenders"):
        raise ValueError("there are no contenders to draw")
    found = summary.rows(document["contenders"], document["size_bytes"], summary.memory_of(document))
    longest = max(row.seconds for row in found)
    height = 70 + STEP * len(found)
    title = f"{document['size_bytes'] / summary.MIB:,.0f} MiB of bf16 from an object store of this machine to CPU tensors, s"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            f'<text x="16" y="26" font-size="15">{escape(title)}</text>',
            *_bars(found, longest),
            f'<text x="16" y="{height - 12}" fill="#555">{escape(str(document["machine"]["short"]))}; medians</text>',
            "</svg>",
            "",
        ]
    )


def _bars(found: Sequence[summary.Row], longest: float) -> list[str]:
    lines = []
    for index, row in enumerate(found):
        top = 44 + STEP * index
        length = (WIDTH - LEFT - RIGHT) * row.seconds / longest
        part = "" if row.of_limit is None else f" ({row.of_limit:.2f} of the limit)"
        lines += [
            f'<text x="{LEFT - 8}" y="{top + 13}" text-anchor="end">{escape(row.name)}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{_color(row.name)}"/>',
            f'<text x="{LEFT + length + 6:.1f}" y="{top + 13}">{row.seconds:.2f}{part}</text>',
        ]
    return lines


def _color(name: str) -> str:
    if name == LIMIT:
        return BOUND
    return OWN if name.startswith("coldstart") else OTHER
