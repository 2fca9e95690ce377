"""A handler that streams: the words of a small Markov model of a text, one by one.

coldstart run handlers/stream.py --input '{"prompt": "the", "words": 12, "seed": 1}'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from coldstart import coldstart

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXT = """
the worker wakes and the model is already there . the bytes came while the worker was waking .
the model answers and the worker sleeps . the next event wakes a worker and the bytes come again .
a snapshot is what the model was . a worker that wakes from a snapshot answers at once .
"""


def load() -> dict[str, Any]:
    """Count which word follows which, once; ``following`` holds cumulative probabilities, (words, words)."""
    text = TEXT.split()
    words = sorted(set(text))
    counts = np.zeros((len(words), len(words)), np.float64)
    for before, after in zip(text, [*text[1:], text[0]], strict=True):
        counts[words.index(before), words.index(after)] += 1
    return {"words": words, "following": np.cumsum(counts / counts.sum(axis=1, keepdims=True), axis=1)}


@coldstart("stream", load=load, warmup=[{"prompt": "the", "words": 8}])
def handler(event: dict[str, Any], model: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield ``{"word": ...}`` as they are drawn. The same seed gives the same words, whatever kind of start it was."""
    request, words = event["input"], model["words"]
    random = np.random.default_rng(request.get("seed", 0))
    prompt = request.get("prompt", ".")
    word = words.index(prompt) if prompt in words else words.index(".")
    for _ in range(request.get("words", 16)):
        word = int(np.searchsorted(model["following"][word], random.random(), side="right"))
        word = min(word, len(words) - 1)
        yield {"word": words[word]}


if __name__ == "__main__":
    coldstart.serve(handler)
