"""The encoder of all-MiniLM-L6-v2 in plain torch. Only a start without a program imports this file, and so torch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, scaled_dot_product_attention

WIDTH, HEADS, LAYERS, INNER, WORDS, PLACES = 384, 12, 6, 1536, 30522, 512
NAMES_IN_FILE = {
    "words": "embeddings.word_embeddings", "places": "embeddings.position_embeddings", "norm": "embeddings.LayerNorm",
    "kinds": "embeddings.token_type_embeddings", "query": "attention.self.query", "key": "attention.self.key",
    "value": "attention.self.value", "mix": "attention.output.dense", "mix_norm": "attention.output.LayerNorm",
    "widen": "intermediate.dense", "narrow": "output.dense", "narrow_norm": "output.LayerNorm",
}  # fmt: skip


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.widen, self.narrow = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.mix_norm, self.narrow_norm = (nn.LayerNorm(WIDTH, eps=1e-12) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.mix_norm(x + self.mix(attended))
        out: Tensor = self.narrow_norm(x + self.narrow(gelu(self.widen(x))))
        return out


class Encoder(nn.Module):
    """Token ids and their mask, both (batch, tokens), to unit vectors (batch, 384): the mean without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(count, WIDTH) for count in (WORDS, PLACES, 2))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places.weight[: ids.shape[1]] + self.kinds.weight[0])
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :].bool())
        return normalize((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
