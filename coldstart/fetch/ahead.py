"""Looking a snapshot up in the fetcher: it is on its way before this process knows what it wants.

The fetcher is spawned first of all. It reads the ref of the name and key that it is told and the manifest that the ref
names, sends both as they are stored, and begins to fetch at once, into a memory file that it lays out as the device
would and sends along. So nothing of the fetch waits for this process, which is importing and may hold the interpreter
lock for a third of a second in one go; when it has time, it reads what was sent as it would read its own store's
answer (``LookAhead.read``), and adopts the memory.

Whatever the fetcher cannot do (read an object, have the memory), this process does for itself: what stands in the way is
told once, in the usual words. But a store that has not answered the fetcher, however often it asked, is not waited for
a second time. Where the host may have the bytes in flat files, the fetcher waits to be told.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from coldstart.children import can_spawn, error_of
from coldstart.errors import SnapshotError, StoreTransientError
from coldstart.fetch.process import Fetcher, can_share, start_with
from coldstart.fetch.ring import Ring, RingFiles
from coldstart.stores.base import StoredObject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.children import Message
    from coldstart.fetch.base import Address, Fetch, FetchRequest, RingWay
    from coldstart.fetch.crew import Bounds


class Filling(NamedTuple):
    """What a fetcher is filling already: the arena's memory file or a ring of some shape, and the queue of its chunks.

    ``files`` are empty once somebody has taken the ring over.
    """

    files: tuple[int, ...]
    queue_fd: int
    ring_shape: tuple[int, int] | None
    """The bytes of a slot and the number of slots; None: the arena itself is filled."""


def begin(
    address: Address,
    ref_key: str,
    bounds: Bounds,
    programs: Sequence[str] = (),
    kernels: str = "",
    way: RingWay | None = None,
) -> LookAhead | None:
    """Spawn a fetcher for what the ref stored at ``ref_key`` names; None where there is no fetcher to be had.

    ``programs`` are the ids that this start accepts, ``kernels`` the consumer of its kernel caches: what only others need is
    not fetched. ``way``: to a device of its own.
    """
    if not can_spawn():
        return None
    try:
        fetcher = Fetcher()
    except OSError:
        return None  # whoever fetches will see it again, and say so
    wanted: dict[str, object] = {
        "ref_key": ref_key,
        "bounds": list(bounds),
        "programs": list(programs),
        "kernels": kernels,
    }
    if way is not None:
        wanted |= {"ring_bytes": way.ring_bytes, "device_codecs": list(way.device_codecs)}
    fetcher.tell({"url": address.url, "options": address.options._asdict(), **wanted})
    return LookAhead(fetcher)


class LookAhead:
    """A fetcher that looks a snapshot up: what it finds, and its fetch. Used by one thread, but for ``cancel``."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher: Fetcher | None = fetcher
        self._found: dict[str, StoredObject] = {}
        self._manifest_key = ""
        self._filling: Filling | None = None
        self._found_monotonic_seconds = 0.0

    def read(self, key: str) -> StoredObject | None:
        """The object as the fetcher found it; None where it did not, or was not asked to.

        Raises StoreTransientError where the store has not answered it.
        """
        while key not in self._found and self._hear():
            pass
        return self._found.get(key)

    def found_monotonic_seconds(self, manifest_key: str) -> float:
        """When the fetcher had this manifest, which may be long before this process hears of it; 0.0: it has not."""
        return self._found_monotonic_seconds if manifest_key == self._manifest_key else 0.0

    def arena_fd(self, manifest_key: str) -> int | None:
        """The memory file that is being filled with this manifest, for the caller to keep or close; None: none is."""
        filling = self._filling
        if filling is None or manifest_key != self._manifest_key or filling.ring_shape is not None:
            return None
        return os.dup(filling.files[0])

    def ring(self, manifest_key: str) -> Ring | None:
        """The ring that is being filled with this manifest, the caller's from now on; None: none is. Raises DeviceError."""
        filling = self._filling
        if filling is None or manifest_key != self._manifest_key or filling.ring_shape is None or not filling.files:
            return None
        self._filling = filling._replace(files=())  # with a writer left open here, the fetcher would not hear of a stop
        return Ring(RingFiles(*filling.files), *filling.ring_shape)

    def fetch(self, request: FetchRequest, manifest_key: str) -> Fetch | None:
        """Have it fetch, or go on fetching, the manifest that it has found into the request's arena.

        None if that is another manifest, or the arena cannot be shared.
        """
        if self._fetcher is None or manifest_key != self._manifest_key or not can_share(request):
            return None
        fetcher, self._fetcher = self._fetcher, None
        return start_with(fetcher, request, None if self._filling is None else os.dup(self._filling.queue_fd))

    def cancel(self) -> None:
        """It is not needed any more, and whoever waits for it need not. From any thread."""
        fetcher = self._fetcher
        if fetcher is not None:
            fetcher.hang_up()

    def end(self) -> None:
        """Let go of all, and end the fetcher unless a fetch has taken it over."""
        fetcher, self._fetcher = self._fetcher, None
        if fetcher is not None:
            fetcher.end()
        filling, self._filling = self._filling, None
        if filling is not None:
            for descriptor in (*filling.files, filling.queue_fd):
                os.close(descriptor)

    def _hear(self) -> bool:
        """Take its next message; False where none will come."""
        if self._fetcher is None or self._manifest_key:
            return False
        message = self._fetcher.hear()
        if message is None or "error" in message.document:
            self.end()
            _raise_if_unanswered(message)
            return False
        found = message.document
        self._found[found["key"]] = StoredObject(message.data, found["etag"])
        if found["is_manifest"]:
            self._manifest_key, self._found_monotonic_seconds = found["key"], found["found_monotonic_seconds"]
            if message.descriptors:
                *files, queue_fd = message.descriptors
                shape = tuple(found["ring"]) if "ring" in found else None
                self._filling = Filling(tuple(files), queue_fd, shape)
        return True


def _raise_if_unanswered(message: Message | None) -> None:
    """Any other failure this process will find, and name, by itself."""
    error = None if message is None else error_of(message.document, SnapshotError)
    if isinstance(error, StoreTransientError):
        raise error
