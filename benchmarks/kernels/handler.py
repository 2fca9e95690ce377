"""A transformer's block stack behind ``torch.compile``: the handler of ``benchmarks/kernel_cache.py``."""

from __future__ import annotations

import os
from typing import Any

import torch

from coldstart import coldstart

LAYERS, WIDTH, HEADS, TOKENS = 4, 128, 4, 32


class Block(torch.nn.Module):
    """Attention and a gated feed-forward, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.before = torch.nn.RMSNorm(WIDTH)
        self.between = torch.nn.RMSNorm(WIDTH)
        self.mix = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = torch.nn.Linear(WIDTH, 8 * WIDTH, bias=False)
        self.down = torch.nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Any) -> Any:
        """Both, added to ``x`` of shape (batch, tokens, width)."""
        batch, tokens, width = x.shape
        parts = self.mix(self.before(x)).view(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        gate, value = self.up(self.between(x)).chunk(2, -1)
        return x + self.down(torch.nn.functional.silu(gate) * value)


def _model() -> Any:
    return torch.nn.Sequential(*(Block() for _ in range(LAYERS))).eval()


def load() -> Any:
    """The model with seeded weights."""
    torch.manual_seed(0)
    return _model()


def build(ctx: Any) -> Any:
    """The model without its bytes."""
    with ctx.meta():
        return _model()


def compile_(_ctx: Any, model: Any) -> Any:
    """Compile by the first call; with COMPILE_PROFILE set, under a profiler whose figures go there."""
    compiled = torch.compile(model)
    target = os.environ.get("COMPILE_PROFILE")
    if not target:
        _call(compiled)
        return compiled
    import cProfile

    profile = cProfile.Profile()
    profile.runcall(_call, compiled)
    profile.dump_stats(target)
    return compiled


def _call(model: Any, value: float = 1.0) -> Any:
    with torch.inference_mode():
        return model(torch.full((1, TOKENS, WIDTH), value))


@coldstart("kernel-cache", load=load, build=build, compile=compile_, warmup=[1.0])
def handler(event: Any, model: Any) -> Any:
    """The sum of what comes out, and what torch's compiler counted."""
    from torch._dynamo.utils import counters

    total = _call(model, float(event["input"])).sum().item()
    return {"sum": total, "inductor": dict(counters["inductor"])} if "run" in event["id"] else total
