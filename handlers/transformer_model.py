"""The model of transformer.py, in plain torch: a decoder as Llama's is, in bfloat16. Seeded, not trained."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

WORDS, PLACES = 32768, 4096


class Shape(NamedTuple):
    """``heads`` ask; ``shared`` have the keys and values for them; ``inner`` is the width of the gated step."""

    width: int
    layers: int
    heads: int
    shared: int
    inner: int


SHAPES = {
    "tiny": Shape(32, 2, 4, 2, 96),  # 4 MB
    "500m": Shape(1536, 16, 12, 4, 4096),  # 1.0 GB
    "1b": Shape(2048, 20, 16, 8, 5632),  # 2.2 GB
    "2b": Shape(2560, 26, 20, 4, 6912),  # 4.0 GB
    "4b": Shape(3072, 39, 24, 8, 8192),  # 8.3 GB
}


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.counts, self.side = (shape.heads, shape.shared, shape.shared), shape.width // shape.heads
        self.norm, self.step_norm = (nn.RMSNorm(shape.width, eps=1e-5) for _ in range(2))
        self.ask = nn.Linear(shape.width, sum(self.counts) * self.side, bias=False)
        self.mix = nn.Linear(shape.width, shape.width, bias=False)
        self.widen = nn.Linear(shape.width, 2 * shape.inner, bias=False)
        self.narrow = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor, places: Tensor, mask: Tensor, cache: Tensor) -> Tensor:
        """``x``, (1, n, width), at ``places``, (n,); ``cache``, (2, shared, PLACES, side), gets their keys and values."""
        heads = self.ask(self.norm(x)).unflatten(-1, (sum(self.counts), -1)).transpose(1, 2)
        query, keys, values = heads.split(self.counts, dim=1)
        cache[0].index_copy_(1, places, turned(keys, turn)[0])
        cache[1].index_copy_(1, places, values[0])
        # Heads that share keys stand one below another, as more rows that ask: nothing is repeated.
        rows = turned(query, turn).reshape(1, self.counts[1], -1, self.side)
        mask = mask.repeat(self.counts[0] // self.counts[1], 1)
        seen = scaled_dot_product_attention(rows, cache[:1], cache[1:], attn_mask=mask).reshape(query.shape)
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        gate, up = self.widen(self.step_norm(x)).chunk(2, dim=-1)
        out: Tensor = x + self.narrow(silu(gate) * up)
        return out


class Transformer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.side = shape.width // shape.heads
        self.cache_shape = shape.layers, 2, shape.shared, PLACES, self.side
        self.words, self.head = nn.Embedding(WORDS, shape.width), nn.Linear(shape.width, WORDS, bias=False)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)

    def forward(self, ids: Tensor, places: Tensor, last: Tensor, cache: Tensor) -> Tensor:
        """Read ``ids``, (1, n), at ``places``, (n,): scores, (WORDS,), of what comes after number ``last``, (1,)."""
        x = self.words(ids)
        pace = 10000.0 ** (-torch.arange(0, self.side, 2, device=ids.device) / self.side)
        angles = (places[:, None] * pace).repeat(1, 2)
        turn = torch.stack((angles.cos(), angles.sin())).to(x.dtype)
        mask = torch.arange(PLACES, device=ids.device) <= places[:, None]
        for number, layer in enumerate(self.layers):
            x = layer(x, turn, places, mask, cache[number])
        scores: Tensor = self.head(self.norm(x[0, last]))[0].float()
        return scores


def turned(heads: Tensor, turn: Tensor) -> Tensor:
    """Rotary places: each pair of numbers, half a head apart, turned by its angle."""
    left, right = heads.chunk(2, dim=-1)
    return heads * turn[0] + torch.cat((-right, left), dim=-1) * turn[1]


def seed(model: Transformer, device: str) -> Transformer:
    """Give a model without bytes random ones, on the device itself: always the same on one kind of GPU, or on CPUs."""
    model.to_empty(device=device)
    random = torch.Generator(device).manual_seed(0)
    for weight in model.parameters():
        nn.init.ones_(weight) if weight.ndim == 1 else nn.init.normal_(weight, 0, weight.shape[1] ** -0.5, random)
    return model
