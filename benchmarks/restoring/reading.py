"""What every reader does: import, read by the clock, and prove afterwards that it has the right bytes.

A reader's module has ``prepare(task)``, which imports all it needs and returns the function that reads. The clock runs from its
return until the tensors are usable. What comes after is not in the times: a look at every page of the tensors (which
shows whether reading was put off, as a memory map does), and the hash of each tensor.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PAGE_BYTES = 4096


class Task(NamedTuple):
    """What to read. ``object_key`` is the file of this reader's format, or the prefix of a store, in ``bucket``.

    ``pause_seconds``: how long to stand still before and after reading, so that memory can be looked at.
    """

    url: str
    bucket: str
    object_key: str
    object_bytes: int
    folder: str
    certificate: str
    pause_seconds: float
    options: dict[str, Any]

    @property
    def host(self) -> str:
        """Of the endpoint."""
        return str(urlsplit(self.url).hostname)

    @property
    def port(self) -> int:
        """Of the endpoint."""
        return int(urlsplit(self.url).port or 0)

    def option(self, name: str, default: Any) -> Any:
        """An option of this reader alone."""
        return self.options.get(name, default)


class Reading(NamedTuple):
    """What a reader read: tensors (or arrays, or plain bytes) by name, and whatever else it has to tell.

    ``reads``: False for one that is only there to be compared with.
    """

    tensors: Mapping[str, Any]
    details: Mapping[str, Any] = {}
    reads: bool = True


def run(prepare: Callable[[Task], Callable[[], Reading]]) -> None:
    """Do the task of the command line, and print one JSON document."""
    task = Task(**json.loads(sys.argv[1]))
    read = prepare(task)
    time.sleep(task.pause_seconds)
    used, began = processor_seconds(), time.monotonic()
    reading = read()
    ended, used_then = time.monotonic(), processor_seconds()
    time.sleep(task.pause_seconds)
    document = {
        "imported_monotonic_seconds": began,
        "usable_monotonic_seconds": ended,
        "processor_seconds": used_then - used,
        "touch_seconds": _touch(reading.tensors),
        "details": dict(reading.details),
        "reads": reading.reads,
        "digests": digests(reading.tensors),
    }
    print(json.dumps(document), flush=True)


def processor_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def digests(tensors: Mapping[str, Any]) -> dict[str, str]:
    """The hash of each tensor's bytes."""
    from blake3 import blake3

    return {name: blake3(bytes_of(tensor)).hexdigest() for name, tensor in tensors.items()}


def bytes_of(tensor: Any) -> memoryview:
    """A tensor's bytes in order, without a copy where they lie so."""
    if hasattr(tensor, "detach"):
        import torch

        flat = tensor.detach().contiguous().reshape(-1)
        return memoryview(flat.view(torch.uint8).numpy())
    return memoryview(tensor).cast("B")


def _touch(tensors: Mapping[str, Any]) -> float:
    """Seconds to look at a byte of every page."""
    import numpy as np

    began = time.monotonic()
    for tensor in tensors.values():
        np.frombuffer(bytes_of(tensor), np.uint8)[::PAGE_BYTES].max(initial=0)
    return time.monotonic() - began
