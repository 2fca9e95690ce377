"""The same text the way it is served today: torch is imported and the model made when the file is.

The companion that `coldstart bench handlers/generate.py` measures against; it knows nothing of coldstart.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from generate_model import seeded

if TYPE_CHECKING:
    from collections.abc import Iterator

model = seeded(int(os.environ.get("GENERATE_LAYERS") or 20), "cpu")


@torch.inference_mode()
def handler(event: dict[str, Any]) -> Iterator[dict[str, str]]:
    request = event["input"]
    prompt = list(request.get("text", "").encode()[-256:] or b" ")
    random = np.random.default_rng(request["seed"]) if "seed" in request else None
    scores = model.prefill(torch.tensor([prompt])).numpy()
    for place in range(len(prompt), len(prompt) + min(request.get("tokens", 16), 256)):
        noise = random.gumbel(size=scores.shape[1]) if random else 0.0
        token = int(np.argmax(scores[0] + noise * request.get("temperature", 1.0)))
        yield {"text": chr(token)}
        scores = model.decode(torch.tensor([[token]]), torch.tensor([place])).numpy()
