# /// script
# dependencies = ["torch>=2.6", "numpy>=2"]
# [tool.coldstart]
# gpu = "L4"
# ///
"""A language model in bfloat16 with ``torch.compile`` and a static KV cache: tokens in, the likeliest next tokens out.

No snapshot holds the cache: it is a pool, which later starts allocate while the weights land. Compiling is phase
kernel_compile; TRANSFORMER_SIZE says how large the model is: tiny, 500m (1 GB), 1b (2 GB), 2b (4 GB) or 4b (8 GB).

TRANSFORMER_SIZE=tiny coldstart run handlers/transformer.py --input '{"tokens": [1, 2, 3], "count": 8}'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from coldstart import coldstart

if TYPE_CHECKING:
    from transformer_model import Transformer

    from coldstart import Context

PROMPT = 128


def load(ctx: Context) -> Transformer:
    """Stands in for the download: a real one reads files, by ``ctx.download`` or a hub, into what ``build`` makes."""
    from transformer_model import seed

    return seed(build(ctx), ctx.device)


def build(ctx: Context) -> Transformer:
    from transformer_model import SHAPES, Transformer

    with ctx.meta():
        return Transformer(SHAPES[ctx.env("TRANSFORMER_SIZE") or "tiny"]).bfloat16().eval()


def compile(ctx: Context, model: Transformer) -> tuple[Any, torch.Tensor]:  # noqa: A001  the phase's own name
    """Compile for both forms of the call, the prompt and one token more: here, and not in the first event."""
    cache = ctx.pool("cache", model.cache_shape, torch.bfloat16)
    step = torch.compile(model, dynamic=False)
    generate(step, cache, [0], 2)
    return step, cache


@torch.no_grad()
def generate(step: Any, cache: torch.Tensor, prompt: list[int], count: int) -> list[int]:
    """The likeliest ``count`` tokens behind ``prompt``. Read padded: what is behind it is overwritten before it is seen."""
    found: list[int] = []
    ids, begin, last = pad(torch.tensor(prompt), (0, PROMPT - len(prompt))), 0, len(prompt) - 1
    while len(found) < count:
        places = torch.arange(begin, begin + len(ids))
        inputs = (each.to(cache.device) for each in (ids[None], places, torch.tensor([last])))
        found.append(int(step(*inputs, cache).argmax()))
        ids, begin, last = torch.tensor(found[-1:]), len(prompt) + len(found) - 1, 0
    return found


@coldstart(
    "transformer",
    load=load,
    build=build,
    compile=compile,
    env=["TRANSFORMER_SIZE"],
    warmup=[{"tokens": [1, 2, 3], "count": 8}],
)
def handler(event: dict[str, Any], model: tuple[Any, torch.Tensor]) -> dict[str, list[int]]:
    tokens, count = event["input"]["tokens"], event["input"].get("count", 16)
    step, cache = model
    if not 0 < len(tokens) <= PROMPT or len(tokens) + count > cache.shape[3]:
        raise ValueError(f"give 1 to {PROMPT} tokens, and ask for no more than {cache.shape[3]} with them")
    return {"tokens": generate(step, cache, tokens, count)}


if __name__ == "__main__":
    coldstart.serve(handler)
