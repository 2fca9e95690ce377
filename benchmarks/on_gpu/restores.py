"""Whole restores of bf16 weights into device memory: by size, codec, who decodes, and place.

Device memory over the state's own size is looked at when the fetch ends, while all scratch is there. Over the loopback the
server sends as fast as it can, or 1 GB/s as a store would.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.on_gpu import partial
from benchmarks.on_gpu.object_server import ObjectServer
from benchmarks.on_gpu.snapshots import folder_for, made_snapshot, restore
from coldstart.devices.cuda_driver import open_gpu
from coldstart.fetch import Address
from coldstart.fetch.decoding import ANS, PLANES
from coldstart.stores import StoreOptions, open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.on_gpu.snapshots import Made
    from benchmarks.on_gpu.timing import Sizes
    from coldstart.devices.cuda_driver import Gpu

CODECS = ("raw", PLANES, ANS)
STORE_BYTES_PER_SECOND = 1e9
LARGEST_LIMITED_BYTES = 4 << 30
MANY_BYTES = 8 << 30


def restores(sizes: Sizes) -> dict[str, Any]:
    """A row for each size, codec and place."""
    gpu = open_gpu(0)
    rows: list[dict[str, Any]] = []
    found = {"rows": rows, "unique_bytes": sizes.unique_bytes, "chunk_bytes": sizes.chunk_bytes}
    for length_bytes in sizes.restores:
        for codec in CODECS:
            made = made_snapshot(codec, length_bytes, sizes, folder_for(min(length_bytes, sizes.unique_bytes)))
            try:
                for row in _rows(made, gpu, sizes):
                    rows.append(row)
                    partial.keep(found)
            finally:
                made.forget()
    return found


def _rows(made: Made, gpu: Gpu, sizes: Sizes) -> Iterator[dict[str, Any]]:
    raw_bytes = made.manifest.raw_bytes
    times = 1 if sizes.is_rehearsal else 2 if raw_bytes >= MANY_BYTES else 4
    yield _row(made, gpu, "folder, page cache", times)
    if made.manifest.chunks[0].codec == PLANES:
        yield _row(made, gpu, "folder, page cache", times, on_gpu=False)
    if raw_bytes <= LARGEST_LIMITED_BYTES:
        yield _served(made, gpu, 0.0, times)
        yield _served(made, gpu, STORE_BYTES_PER_SECOND, 1)


def _served(made: Made, gpu: Gpu, bytes_per_second: float, times: int) -> dict[str, Any]:
    """The same from a server of this machine."""
    with ObjectServer(made.folder, bytes_per_second=bytes_per_second) as server:
        options = StoreOptions(
            endpoint_url=server.url, region="us-east-1", access_key_id="id", secret_access_key="secret"
        )
        url = "s3://bucket"
        remote = made._replace(store=open_store(url, options), address=Address(url, options))
        return _row(
            remote, gpu, f"loopback, {bytes_per_second / 1e9:g} GB/s" if bytes_per_second else "loopback", times
        )


def _row(made: Made, gpu: Gpu, place: str, times: int, *, on_gpu: bool = True) -> dict[str, Any]:
    warm_up = 1 if times > 1 else 0
    found = [restore(made, gpu, engine="process", on_gpu=on_gpu) for _ in range(times + warm_up)][warm_up:]
    seconds = [each["seconds"] for each in found]
    manifest = made.manifest
    stored_bytes = sum(
        chunk.stored_bytes for chunk in manifest.chunks
    )  # as they are read: again where one is named again
    return {
        "raw_bytes": manifest.raw_bytes,
        "stored_bytes": stored_bytes,
        "codec": manifest.chunks[0].codec,
        "place": place,
        "decoded_by": "gpu" if on_gpu else "processor",
        "seconds": [round(each, 4) for each in seconds],
        "raw_gb_per_second": round(manifest.raw_bytes / median(seconds) / 1e9, 3),
        "stored_gb_per_second": round(stored_bytes / median(seconds) / 1e9, 3),
        **{
            name: round(median(each[name] for each in found), 4)
            for name in ("allocate_seconds", "fetch_seconds", "landing_after_fetch_seconds")
        },
        "device_bytes_beyond_state": max(each["device_bytes_beyond_state"] for each in found),
        "engine": found[0]["engine"],
        "degraded": found[0]["degraded"],
    }
