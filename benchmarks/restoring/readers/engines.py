"""A fetch by one engine or client, alone or beside a real ``import torch`` in this, the main, process.

``client``: coldstart (its own reader, by the engine of COLDSTART_FETCH_ENGINE) or obstore in its place.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from benchmarks.restoring.reading import Reading, Task, run

if TYPE_CHECKING:
    from collections.abc import Callable


def prepare(task: Task) -> Callable[[], Reading]:
    """Import coldstart, not torch, and give the raw bytes of the arena, for torch is not there to make tensors of them."""
    from benchmarks.restoring import ours

    snapshot = ours.snapshot_of(f"{task.folder}/handler.py")
    client = Client(task) if task.option("client", "coldstart") == "obstore" else None

    def read() -> Reading:
        wait = ours.begin(snapshot, client=client)
        details: dict[str, Any] = {}
        if task.option("beside_import", False):
            details["import_seconds"] = import_seconds()
        manifest, arena, report = wait()
        arena.seal()
        details["fetch_seconds"] = report.ended_monotonic_seconds - report.began_monotonic_seconds
        details["engine"] = report.engine
        return Reading(by_path(manifest, arena), details)

    return read


def import_seconds() -> float:
    """How long torch takes to import."""
    began = time.monotonic()
    import torch  # noqa: F401

    return time.monotonic() - began


def by_path(manifest: Any, arena: Any) -> dict[str, Any]:
    """The bytes of each tensor. A leaf of this state is the whole of its buffer."""
    found = {}
    for leaf in manifest.leaves:
        buffer = manifest.buffers[leaf.buffer]
        found[name_of(leaf.path)] = arena.array(buffer.segment, buffer.offset_bytes, buffer.length_bytes)
    return found


def name_of(path: str) -> str:
    """The key in the state's mapping, of a path as manifests have it: quoted, in brackets."""
    return str(json.loads(path.removeprefix("[").removesuffix("]")))


class Client:
    """As much of a store as a fetch needs, by obstore."""

    def __init__(self, task: Task) -> None:
        from obstore import get_range
        from obstore.store import S3Store

        options: dict[str, Any] = {"allow_http": True, "allow_invalid_certificates": task.url.startswith("https")}
        self._get = get_range
        self._store = S3Store(
            task.bucket,
            prefix=task.object_key,
            endpoint=task.url,
            virtual_hosted_style_request=False,
            client_options=options,
        )

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """One ranged GET, copied from the client's own memory into ``target``."""
        target[:] = memoryview(self._get(self._store, key, start=offset_bytes, length=len(target)))


if __name__ == "__main__":
    run(prepare)
