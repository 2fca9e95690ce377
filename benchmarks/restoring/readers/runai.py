"""Run:ai Model Streamer: safetensors to CPU tensors by its C++ client. Its settings come from the environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.restoring.reading import Reading, Task, run

if TYPE_CHECKING:
    from collections.abc import Callable


def prepare(task: Task) -> Callable[[], Reading]:
    """Import torch and the streamer."""
    import torch  # noqa: F401
    from runai_model_streamer import SafetensorsStreamer

    def read() -> Reading:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(f"s3://{task.bucket}/{task.object_key}", device="cpu")
            return Reading(dict(streamer.get_tensors()))

    return read


if __name__ == "__main__":
    run(prepare)
