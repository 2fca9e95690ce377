"""tensorizer: its own format through curl; ``verify``: whether it checks the hash of each tensor (off by default)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from benchmarks.restoring.reading import Reading, Task, run

if TYPE_CHECKING:
    from collections.abc import Callable


def prepare(task: Task) -> Callable[[], Reading]:
    """Import torch and tensorizer."""
    from tensorizer import TensorDeserializer
    from tensorizer.stream_io import open_stream

    def read() -> Reading:
        stream = open_stream(
            f"s3://{task.bucket}/{task.object_key}",
            "rb",
            s3_access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
            s3_secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
            s3_endpoint=f"{task.host}:{task.port}",
            force_http=True,
        )
        with TensorDeserializer(stream, device="cpu", verify_hash=task.option("verify", False)) as found:
            return Reading({name: tensor.data for name, tensor in found.items()})

    return read


if __name__ == "__main__":
    run(prepare)
