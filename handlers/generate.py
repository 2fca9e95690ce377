# /// script
# dependencies = ["torch>=2.13", "numpy>=2"]
# ///
"""A transformer that goes on with a text, byte by byte, and streams what it says.

The first worker runs the model in torch. Later ones have two compiled programs in its place, which share the weights and
the cache: ``prefill`` reads the prompt, ``decode`` one token more. The loop around them is the handler's own.

coldstart run handlers/generate.py --input '{"text": "abc", "tokens": 16}'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from coldstart import coldstart, export

if TYPE_CHECKING:
    from collections.abc import Iterator

    from generate_model import Model

    from coldstart import Context

PROMPT, MOST_TOKENS = 256, 256
LAYERS = "20"  # 0.52 GB of weights in bfloat16; the variable GENERATE_LAYERS says otherwise


def load(ctx: Context) -> Model:
    from generate_model import seeded

    return seeded(int(ctx.env("GENERATE_LAYERS") or LAYERS), ctx.device)


@coldstart(
    "generate",
    load=load,
    env=["GENERATE_LAYERS"],
    program=export(entry=("prefill", "decode"), dynamic={"prefill": {"ids": {1: (1, PROMPT)}}}, backend="aoti"),
    warmup=[{"text": "abc", "tokens": 2}, {"text": "hello", "tokens": 3}],
)
def handler(event: dict[str, Any], model: Any) -> Iterator[dict[str, str]]:
    """Yield ``{"text": ...}``, a byte at a time: the likeliest, or with a ``seed`` one drawn at ``temperature``."""
    request = event["input"]
    prompt = list(request.get("text", "").encode()[-PROMPT:] or b" ")
    random = np.random.default_rng(request["seed"]) if "seed" in request else None
    scores = model.prefill(np.array([prompt]))
    for place in range(len(prompt), len(prompt) + min(request.get("tokens", 16), MOST_TOKENS)):
        noise = random.gumbel(size=scores.shape[1]) if random else 0.0
        token = int(np.argmax(scores[0] + noise * request.get("temperature", 1.0)))
        yield {"text": chr(token)}
        scores = model.decode(np.array([[token]]), np.array([place]))


if __name__ == "__main__":
    coldstart.serve(handler)
