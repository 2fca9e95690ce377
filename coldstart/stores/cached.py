"""Copies of a remote store's immutable objects in a folder of this host, so that its next worker need not fetch them.

What is kept: blobs that ``read_into`` reads whole, manifests that ``get`` reads, and what ``put`` writes of both. All
else goes to the store each time: refs, leases, start records, listings, heads, parts of blobs. So a start always asks
the store which generation is current, and without the store there is no start from a snapshot, whatever is kept here.
``get`` of a blob goes to the store too: no start reads blobs that way, and ``verify``, which does, is to find out what
the store holds.

**Who verifies.** A blob's reader hashes it anyway (``Store.read_into``), so a copy is handed out unhashed the first time.
A reader that found it wrong reads again; from the second read of a blob through one ``CachedStore`` on, a copy is hashed
and dropped if it is not what its name says, and what the store gives instead is kept only if it is right. So an altered
copy costs one more read of that blob, and the engine's ordinary repetition heals it. A manifest is small and has no name
that tells its content: its copy begins with a hash over store, key, etag and bytes, and is checked each time.

**One fetch a host.** Who misses a blob takes its lock, looks again, fetches, keeps, lets go; the others wait and read
the copy. One that has waited ``WAIT_SECONDS`` in vain fetches by itself and waits for nobody any more.

**Keeping takes its share of the time and no more.** A copy is written before its read returns, which costs little while
the disk's cache takes it, and much on a disk slower than the link. So the time is kept: what would make copies take
more than ``KEEPING_SHARE`` of the time of the fetches (and ``KEEPING_SECONDS``, summed over threads) is not kept, and
``degraded`` is told once. Its next reader fetches it, or finds it in its segment's file, which is written after the
start is ready. Nothing is left to a thread of the store's own: a copy that is written later would have to be held in
memory beyond the budget of the fetch, and its turn with it, and a fetcher process ends with its last answer.

**What is written is kept**, after the store has it: the bytes of a capture are what the next worker of this host starts
from, they are in memory, and capturing is off the request path. A proof is run without the cache, because it is to
read what the store holds.

**The cache is an optimisation**: whatever the folder does (full, read-only, without flock, gone), the answer comes from
the store, and ``degraded`` is told, once for each, that the host does without locks, without new copies, or without any.

It stands outside the retrying wrapper: retries repeat requests, and a copy is none; and while one worker repeats its
requests to a store in trouble it keeps its turn, so that the others of the host do not add theirs.
"""

from __future__ import annotations

import errno
import re
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from coldstart.stores.base import Store, StoredObject, StoreWrapper
from coldstart.stores.cache_folder import CacheFolder
from coldstart.stores.retrying import Clock, SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coldstart.stores.cache_folder import Kind

WAIT_SECONDS = 10.0
"""How long to wait for another process of this host that is fetching the same blob."""
KEEPING_SHARE = 0.5
KEEPING_SECONDS = 2.0
"""How long all copies of fetched blobs may take: this, and that share of the seconds of the fetches."""

_BLOB = re.compile(r"blobs/([0-9a-f]{2})/(\1[0-9a-f]{62})\Z")
_MANIFEST = re.compile(r"manifests/[^/]+/[0-9]+-[0-9a-f]+\Z")
_HASH_LENGTH = 64
_NO_FLOCK = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""How ``flock`` fails on file systems that have none."""


class CachedStore(StoreWrapper):
    """``store`` with copies of its blobs and manifests in ``folder``, of at most ``limit_bytes`` together.

    The folder is made (mode 0700) by the first use; it may serve several stores. ``degraded`` is called, from whichever
    thread, with the reason when the cache or a part of it is given up; it must not raise. ``now`` gives Unix seconds.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        *,
        limit_bytes: int,
        degraded: Callable[[str], None] | None = None,
        clock: Clock | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(store)
        self._copies = CacheFolder(folder, limit_bytes=limit_bytes, now=now)
        self._folder = folder
        self._degraded = degraded
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._asked: set[str] = set()
        self._fetching_seconds = self._keeping_seconds = 0.0
        self._told_slow = False
        self._prepared = False
        self._serves = self._keeps = self._takes_turns = True

    def get(self, key: str) -> StoredObject:
        """A manifest from its copy if there is a good one; everything else from the store."""
        if not _MANIFEST.match(key):
            return self._store.get(key)
        copy = self._manifest_copy(key)
        if copy is None:
            copy = self._store.get(key)
            self._keep_manifest(key, copy.data, copy.etag)
        return copy

    def read_into(self, key: str, target: memoryview, *, offset_bytes: int = 0) -> None:
        """A whole blob from its copy, unhashed the first time; everything else from the store.

        A read from offset 0 counts as one of the whole blob: one of less is answered rightly too, and only costs a copy.
        """
        match = _BLOB.match(key)
        if match is None or offset_bytes or not len(target):
            self._store.read_into(key, target, offset_bytes=offset_bytes)
            return
        blob = match[2]
        again = self._asked_before(blob)
        if self._fill(blob, target, verify=again):
            return
        with self._turn(blob):
            if self._fill(blob, target, verify=again):  # somebody else has fetched it meanwhile
                return
            began = self._clock.monotonic()
            self._store.read_into(key, target)
            self._fetched(blob, target, self._clock.monotonic() - began, verify=again)

    def flat_files(self) -> CacheFolder | None:
        """The folder for segments that this host's workers map; None where the cache is not used."""
        return self._copies if self._is_ready() else None

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write to the store; when it has a blob or a manifest, a copy is kept."""
        etag = self._store.put(key, data, if_absent=if_absent, if_match=if_match)
        match = _BLOB.match(key)
        if match is not None:
            self._keep("blobs", match[2], (memoryview(data).cast("B"),))
        elif _MANIFEST.match(key):
            self._keep_manifest(key, data, etag)
        return etag

    def delete(self, key: str) -> None:
        """Remove an object from the store, then its copy here; copies of other hosts are removed by their age."""
        self._store.delete(key)
        match = _BLOB.match(key)
        if match is not None:
            self._drop("blobs", match[2])
        elif _MANIFEST.match(key):
            self._drop("manifests", self._manifest_name(key))

    # --- blobs --------------------------------------------------------------------------------------------------------

    def _asked_before(self, blob: str) -> bool:
        with self._lock:
            before = blob in self._asked
            self._asked.add(blob)
        return before

    def _fill(self, blob: str, target: memoryview, *, verify: bool) -> bool:
        """Fill ``target`` from the copy; False, with anything in ``target``, if there is none that may be used."""
        if not self._is_ready():
            return False
        try:
            found = self._copies.read_into("blobs", blob, target)
        except OSError as error:
            self._give_up(error)
            return False
        if found and verify and _hash(target) != blob:
            self._drop("blobs", blob)
            return False
        return found

    def _fetched(self, blob: str, target: memoryview, seconds: float, *, verify: bool) -> None:
        """Keep what was fetched in ``seconds``, while there is time for it."""
        with self._lock:
            self._fetching_seconds += seconds
            slow = self._keeping_seconds > KEEPING_SECONDS + KEEPING_SHARE * self._fetching_seconds
            told, self._told_slow = self._told_slow, self._told_slow or slow
        if slow:
            if not told:
                self._tell("takes longer than the store, so some copies are left out", None)
            return
        if verify and _hash(target) != blob:
            return
        began = self._clock.monotonic()
        self._keep("blobs", blob, (target,))
        with self._lock:
            self._keeping_seconds += self._clock.monotonic() - began

    @contextmanager
    def _turn(self, blob: str) -> Iterator[None]:
        """Hold the blob's lock, if that can be had in time."""
        with ExitStack() as turn:
            if self._takes_turns and self._keeps and self._is_ready():
                try:
                    held = turn.enter_context(self._copies.turn(blob, self._clock, WAIT_SECONDS))
                except OSError as error:
                    if error.errno in _NO_FLOCK:
                        self._give_up_turns(error)
                    else:  # where no lock file can be made, no copy can be
                        self._give_up_keeping(error)
                else:
                    if (
                        not held
                    ):  # once is enough: whoever is that slow, or stands still, is not waited for at every blob
                        self._takes_turns = False
            yield

    # --- manifests ----------------------------------------------------------------------------------------------------

    def _manifest_name(self, key: str) -> str:
        """Two stores may have other manifests under one key; blobs are the same everywhere."""
        return _hash(f"{self.url}\n{key}".encode())

    def _manifest_copy(self, key: str) -> StoredObject | None:
        if not self._is_ready():
            return None
        name = self._manifest_name(key)
        try:
            copy = self._copies.read("manifests", name)
        except OSError as error:
            self._give_up(error)
            return None
        if copy is None:
            return None
        seal, rest = copy[:_HASH_LENGTH], copy[_HASH_LENGTH:]
        etag, separator, data = rest.partition(b"\n")
        if not separator or seal != _seal(name, etag, data):
            self._drop("manifests", name)
            return None
        return StoredObject(bytes(data), etag.decode())

    def _keep_manifest(self, key: str, data: bytes | memoryview, etag: str) -> None:
        if "\n" in etag:  # no store has one; it would blur where the bytes begin
            return
        name, view, tag = self._manifest_name(key), memoryview(data).cast("B"), etag.encode()
        self._keep("manifests", name, (_seal(name, tag, view), tag, b"\n", view))

    # --- the folder, as far as it works -------------------------------------------------------------------------------

    def _is_ready(self) -> bool:
        with self._lock:
            if self._prepared or not self._serves:
                return self._serves
            self._prepared = True
            try:
                self._copies.prepare()
            except OSError as error:
                self._serves = self._keeps = False
                failure = error
            else:
                return True
        self._tell("is not used", failure)
        return False

    def _keep(self, kind: Kind, name: str, parts: Sequence[bytes | memoryview]) -> None:
        if not self._keeps or not self._is_ready():
            return
        try:
            self._copies.keep(kind, name, parts)
        except OSError as error:
            self._give_up_keeping(error)

    def _drop(self, kind: Kind, name: str) -> None:
        if not self._is_ready():
            return
        try:
            self._copies.drop(kind, name)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            told, self._serves, self._keeps = not self._serves, False, False
        if not told:
            self._tell("is not used any more", error)

    def _give_up_keeping(self, error: OSError) -> None:
        with self._lock:
            told, self._keeps = not self._keeps, False
        if not told:
            self._tell("takes no more copies, those that it has are used", error)

    def _give_up_turns(self, error: OSError) -> None:
        with self._lock:
            told, self._takes_turns = not self._takes_turns, False
        if not told:
            self._tell("has no locks, so that workers may fetch a blob twice", error)

    def _tell(self, what: str, error: OSError | None) -> None:
        if self._degraded is not None:
            place = f"{error.filename}: " if error and error.filename else ""
            why = f" ({place}{error.strerror or error})" if error else ""
            self._degraded(f"the cache {self._folder} {what}{why}")


def _hash(data: bytes | bytearray | memoryview) -> str:
    from blake3 import blake3  # 3 ms that opening a store does not need

    return str(blake3(data).hexdigest())


def _seal(name: str, etag: bytes | bytearray, data: bytes | bytearray | memoryview) -> bytes:
    from blake3 import blake3

    return str(blake3(b"%s\n%s\n" % (name.encode(), etag)).update(data).hexdigest()).encode()
