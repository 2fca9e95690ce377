"""Digits from 3x5 pixels by the nearest centroid: a state that is nothing but a tree of arrays needs no build.

coldstart run handlers/digits.py --input '{"pixels": [1,1,1, 0,0,1, 0,1,1, 0,0,1, 1,1,1]}'
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coldstart import coldstart

GLYPHS = ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71122", "75757", "75717")  # rows in octal


def load() -> dict[str, Any]:
    """Train: 200 noisy drawings of every digit, from a fixed seed, and their mean."""
    random = np.random.default_rng(7)
    ink = np.array([[int(bit) for row in glyph for bit in f"{int(row):03b}"] for glyph in GLYPHS], np.float32)
    drawings = ink + random.normal(0.0, 0.3, (200, *ink.shape)).astype(np.float32)
    return {"centroids": drawings.mean(axis=0), "labels": [str(digit) for digit in range(10)]}


@coldstart("digits", load=load, warmup=[{"pixels": [0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1]}])
def handler(event: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    distances = np.linalg.norm(model["centroids"] - np.asarray(event["input"]["pixels"], np.float32), axis=1)
    nearest = int(distances.argmin())
    return {"digit": model["labels"][nearest], "distance": float(distances[nearest])}


if __name__ == "__main__":
    coldstart.serve(handler)
