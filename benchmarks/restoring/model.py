"""The model that all read: seeded, normally distributed bf16 weights in the shapes of a transformer.

    python -m benchmarks.restoring.model FOLDER SIZE_BYTES SEED

writes ``model.safetensors``, ``model.tensors`` (where tensorizer is installed) and ``digests.json``, the hash of each tensor
and, under "", of the whole safetensors file. It needs torch and safetensors.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.restoring.reading import digests

ITEM_BYTES = 2
LARGEST_ROWS = 32_000
WIDTHS = ((256 << 20, 1280), (32 << 20, 512), (0, 64))
"""Model size in bytes from which on -> width, so that there are some layers whatever the size."""

SAFETENSORS, TENSORIZER, DIGESTS = "model.safetensors", "model.tensors", "digests.json"


def shapes(size_bytes: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape: an embedding, as many layers as fit, and a last matrix that fills up to ``size_bytes``.

    At most one row of the last matrix is missing to ``size_bytes``. Raises ValueError below 1 MiB.
    """
    if size_bytes < 1 << 20:
        raise ValueError("a model has at least 1 MiB")
    width = next(width for least_bytes, width in WIDTHS if size_bytes >= least_bytes)
    layer = _layer(width)
    room = size_bytes // ITEM_BYTES
    rows = min(LARGEST_ROWS, room // (8 * width))
    count = (room - (rows + 1) * width) // sum(map(_items, layer.values()))
    found: dict[str, tuple[int, ...]] = {"embed.weight": (rows, width)}
    for number in range(count):
        found.update({f"layers.{number}.{name}": shape for name, shape in layer.items()})
    found["norm.weight"] = (width,)
    rest = room - sum(map(_items, found.values()))
    if rest >= width:
        found["output.weight"] = (rest // width, width)
    return found


def _layer(width: int) -> dict[str, tuple[int, ...]]:
    inner = width * 8 // 3 // 64 * 64
    square = {f"attention.{name}.weight": (width, width) for name in ("q", "k", "v", "o")}
    biases = {f"attention.{name}.bias": (width,) for name in ("q", "k", "v")}
    up = {f"mlp.{name}.weight": (inner, width) for name in ("gate", "up")}
    norms = {f"{name}.weight": (width,) for name in ("attention_norm", "mlp_norm")}
    return {**square, **biases, **up, "mlp.down.weight": (width, inner), **norms}


def _items(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def tensors(size_bytes: int, seed: int) -> dict[str, Any]:
    """The model as torch tensors: matrices of the spread that trained ones have, norms around one, small biases."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes(size_bytes).items():
        values = torch.empty(shape, dtype=torch.float32).normal_(0.0, _spread(name, shape), generator=generator)
        made[name] = (values + ("norm" in name)).to(torch.bfloat16)
    return made


def _spread(name: str, shape: tuple[int, ...]) -> float:
    if "norm" in name or "bias" in name:
        return 0.1
    return 0.02 if name == "embed.weight" else float(shape[-1] ** -0.5)


def write(folder: Path, size_bytes: int, seed: int) -> None:
    """Write all files of the model; ``digests.json`` last, so that its being there says that all are."""
    from safetensors.torch import save_file

    made = tensors(size_bytes, seed)
    save_file(made, folder / SAFETENSORS)
    if find_spec("tensorizer"):
        from tensorizer import TensorSerializer

        serializer = TensorSerializer(str(folder / TENSORIZER))
        serializer.write_state_dict(made)
        serializer.close()
    found = {**digests(made), **digests({"": _mapped(folder / SAFETENSORS)})}
    (folder / DIGESTS).write_text(json.dumps(found))


def _mapped(path: Path) -> Any:
    import numpy as np

    return np.memmap(path, np.uint8, mode="r")


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
