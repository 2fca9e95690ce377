"""The model of generate.py, in plain torch: a decoder of bytes with a cache at fixed addresses. Seeded, not trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

WIDTH, HEADS, INNER, TOKENS, PLACES = 1024, 16, 2816, 256, 512


class Layer(nn.Module):
    """Attention over what the cache holds, and a gated step; the sum goes on in float32, products are bfloat16."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        sizes = (WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 2 * INNER), (INNER, WIDTH)
        self.attend, self.mix, self.widen, self.narrow = (nn.Linear(*size, bias=False) for size in sizes)
        self.mix.weight.data /= layers**0.5
        self.narrow.weight.data /= layers**0.5
        self.keys: Tensor
        self.values: Tensor
        self.register_buffer("keys", torch.zeros(1, HEADS, PLACES, WIDTH // HEADS))
        self.register_buffer("values", torch.zeros(1, HEADS, PLACES, WIDTH // HEADS))

    def forward(self, x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        heads = self.attend(normal(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2)
        query, keys, values = heads.chunk(3, dim=1)
        self.keys.index_copy_(2, places, keys)
        self.values.index_copy_(2, places, values)
        attended = scaled_dot_product_attention(query, self.keys, self.values, attn_mask=mask)
        x = x + self.mix(attended.transpose(1, 2).flatten(2)).float()
        gate, up = self.widen(normal(x)).float().chunk(2, dim=-1)
        out: Tensor = x + self.narrow((silu(gate) * up).bfloat16()).float()
        return out


class Model(nn.Module):
    """``prefill`` reads a prompt from place 0 on, ``decode`` goes on behind it: one text at a time."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(PLACES, WIDTH)
        nn.init.normal_(self.words.weight, std=0.05)
        nn.init.normal_(self.places.weight, std=0.05)
        self.layers = nn.ModuleList(Layer(layers) for _ in range(layers))

    def prefill(self, ids: Tensor) -> Tensor:
        """Read ``ids``, (1, n); scores of what comes next, (1, TOKENS)."""
        return self.decode(ids, torch.arange(ids.shape[1], device=ids.device))

    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """Read ``token``, (1, n), at its places ``position``, (n,); scores of what comes next, (1, TOKENS)."""
        x = (self.words(token) + self.places(position)).float()
        mask = torch.arange(PLACES, device=token.device) <= position[:, None]
        for layer in self.layers:
            x = layer(x, position, mask)
        likely = normal(x[:, -1]).float() @ self.words.weight.float().T
        return likely.roll(1, -1)  # after a letter, the next one is the likeliest


def normal(x: Tensor) -> Tensor:
    """Each row of ``x``, float32, at length one, as bfloat16."""
    return rms_norm(x, (WIDTH,)).bfloat16()


def seeded(layers: int, device: str) -> Model:
    """The model with random weights, always the same ones: 26 MB a layer."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Model(layers).to(device).eval()
    finally:
        torch.set_default_dtype(torch.float32)
