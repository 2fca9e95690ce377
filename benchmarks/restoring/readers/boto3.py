"""boto3 to a file, which safetensors maps."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from benchmarks.restoring.reading import Reading, Task, run

if TYPE_CHECKING:
    from collections.abc import Callable

THREADS = 8
PART_BYTES = 16 << 20


def prepare(task: Task) -> Callable[[], Reading]:
    """Import torch, safetensors and boto3."""
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config
    from safetensors.torch import load_file

    path = f"{task.folder}/boto3.safetensors"
    settings = Config(s3={"addressing_style": "path"}, max_pool_connections=THREADS)
    transfer = TransferConfig(max_concurrency=THREADS, multipart_chunksize=PART_BYTES, multipart_threshold=PART_BYTES)

    def read() -> Reading:
        client = boto3.client("s3", endpoint_url=task.url, config=settings)
        client.download_file(task.bucket, task.object_key, path, Config=transfer)
        tensors = load_file(path)
        os.unlink(path)
        return Reading(tensors)

    return read


if __name__ == "__main__":
    run(prepare)
