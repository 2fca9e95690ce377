"""A GPU for tests: the fake driver and nvCOMP of a folder, loaded into this process, and states restored by way of them."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from coldstart.codecs.nvcomp import LIBRARY, Nvcomp
from coldstart.config import PINNED_BYTES
from coldstart.devices.cuda import CudaArena
from coldstart.devices.cuda_driver import Gpu, open_gpu
from coldstart.devices.cuda_memory import copy_out
from coldstart.fetch import FetchRequest, start_fetch, start_threads
from coldstart.fetch.decoding import PLANES
from coldstart.fetch.landing import Landing
from coldstart.fetch.ring import Ring, shape_of
from tests.fake_gpu.libraries import report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstart.codecs.planes_gpu import FrameDecoder
    from coldstart.manifest import Manifest
    from coldstart.stores.base import Store


class FakeMachine:
    """One GPU of the fake driver in ``folder``, and what it has counted."""

    def __init__(self, folder: Path) -> None:
        self._driver = ctypes.CDLL(str(folder / "libcuda.so.1"))
        self._nvcomp = str(folder / LIBRARY)
        self.gpu: Gpu = open_gpu(0, str(folder / "libcuda.so.1"))

    def frames(self) -> Nvcomp:
        """The fake nvCOMP."""
        return Nvcomp.load(self._nvcomp)

    def report(self) -> dict[str, Any]:
        """The fake driver's counters."""
        return report(self._driver)

    def arena(self, manifest: Manifest) -> CudaArena:
        """Memory for all segments of a manifest."""
        return CudaArena(self.gpu, [each.length_bytes for each in manifest.segments], manifest.host_segments)

    def restored(
        self,
        manifest: Manifest,
        store: Store,
        *,
        ring_bytes: int = PINNED_BYTES,
        device_codecs: tuple[str, ...] = (PLANES,),
        open_frames: Callable[[], FrameDecoder] | None = None,
        engine: str = "threads",
        threads: int = 4,
        **request: Any,
    ) -> tuple[CudaArena, Landing]:
        """The arena, filled by way of a ring, and the landing that filled it."""
        arena = self.arena(manifest)
        ring = Ring.make(*shape_of(manifest, ring_bytes))
        wants_raw = bool(request.get("verify_raw"))
        landing = Landing(
            manifest, arena, ring, open_frames=open_frames or self.frames, verify_raw=wants_raw, store=store
        )
        wanted = FetchRequest(
            manifest, store, None, threads, 64 << 20, ring=ring, device_codecs=device_codecs, **request
        )
        try:
            fetch = start_threads(wanted) if engine == "threads" else start_fetch(wanted, engine=engine)
            fetch.wait()
            landing.wait()
        finally:
            landing.cancel()
            ring.close()
        return arena, landing


def content(manifest: Manifest, arena: CudaArena) -> list[bytes]:
    """The bytes of every segment, copied out of the device where they are there."""
    found = []
    for number, segment in enumerate(manifest.segments):
        if arena.is_on_device(number):
            found.append(copy_out(arena.gpu, arena.address(number, 0, segment.length_bytes), segment.length_bytes))
        else:
            found.append(bytes(arena.readable(number)))
    return found
