"""obstore with glue: safetensors by ranges into one buffer, torch views of it."""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from benchmarks.restoring.reading import Reading, Task, run

if TYPE_CHECKING:
    from collections.abc import Callable

THREADS = 8
PART_BYTES = 16 << 20


def prepare(task: Task) -> Callable[[], Reading]:
    """Import torch, numpy and obstore."""
    import numpy as np
    import torch
    from obstore import get_range
    from obstore.store import S3Store

    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

    def read() -> Reading:
        options = {"allow_http": True}
        store = S3Store(task.bucket, endpoint=task.url, virtual_hosted_style_request=False, client_options=options)
        (length,) = struct.unpack("<Q", get_range(store, task.object_key, start=0, length=8))
        header = json.loads(bytes(get_range(store, task.object_key, start=8, length=length)))
        begin = 8 + length
        data = np.empty(task.object_bytes - begin, np.uint8)

        def fetch(offset: int) -> None:
            end = min(offset + PART_BYTES, len(data))
            part = get_range(store, task.object_key, start=begin + offset, end=begin + end)
            data[offset:end] = np.frombuffer(part, np.uint8)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fetch, range(0, len(data), PART_BYTES)))
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                view = torch.from_numpy(data[slice(*entry["data_offsets"])])
                tensors[name] = view.view(types[entry["dtype"]]).reshape(entry["shape"])
        return Reading(tensors)

    return read


if __name__ == "__main__":
    run(prepare)
