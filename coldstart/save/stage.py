"""What happens to one chunk: is it known, how is it stored, is it there already. The same wherever it is done."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from coldstart.codecs import DEVICE_BLOCK_BYTES, choose, encoder
from coldstart.errors import CaptureError
from coldstart.save.base import STOPPED, Saved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coldstart.repository import Repository
    from coldstart.save.base import StoredAs, Terms


class Rate:
    """Bytes that may be sent in a second, on average from the first on; 0 for any. Shared by threads."""

    def __init__(
        self, bytes_per_second: int, stopping: threading.Event, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bytes_per_second = bytes_per_second
        self._stopping = stopping
        self._clock = clock
        self._free_seconds = 0.0
        self._lock = threading.Lock()

    def wait(self, amount_bytes: int) -> None:
        """Wait until ``amount_bytes`` may be sent. Raises CaptureError where that is not before the end."""
        if self._bytes_per_second and self._stopping.wait(self._wait_seconds(amount_bytes)):
            raise CaptureError(STOPPED)

    def _wait_seconds(self, amount_bytes: int) -> float:
        with self._lock:
            now = self._clock()
            begin = max(now, self._free_seconds)
            self._free_seconds = begin + amount_bytes / self._bytes_per_second
        return min(begin - now, threading.TIMEOUT_MAX)


class Stage:
    """Saves chunks of which somebody has made a copy. All but ``codec_of`` may run in several threads."""

    def __init__(self, repository: Repository, terms: Terms, rate: Rate) -> None:
        self._repository = repository
        self._terms = terms
        self._rate = rate
        self._codecs: dict[int, str] = {}
        self._begun: set[str] = set()
        self._lock = threading.Lock()

    def is_known(self, raw_hash: str, item_bytes: int, length_bytes: int) -> bool:
        """Whether the parent has such a chunk."""
        return (raw_hash, item_bytes, length_bytes) in self._terms.known

    def reused(self, raw_hash: str, item_bytes: int, length_bytes: int) -> Saved | None:
        """The parent's chunk of these bytes, if it may be relied on.

        The blobs of the generation that is replaced live until then; any other may be the collector's next.
        """
        known = self._terms.known.get((raw_hash, item_bytes, length_bytes))
        if known is None:
            return None
        saved = Saved(raw_hash, known.codec, known.parameters, known.blob, known.stored_bytes, is_written=False)
        if self._terms.known_stays:
            return saved
        age_seconds = self._repository.blob_age_seconds(known.blob, known.stored_bytes)
        if not self._repository.is_young(age_seconds):
            return None
        return saved._replace(is_settled=self._repository.is_settled(age_seconds))

    def codec_of(self, segment: int, item_bytes: int, raw: memoryview) -> str:
        """The segment's codec: chosen once, from a sample of the first chunk that this is asked for."""
        with self._lock:
            if segment not in self._codecs:
                self._codecs[segment] = choose(raw, item_bytes=item_bytes, setting=self._terms.codec)
            return self._codecs[segment]

    def stored(self, raw: memoryview, raw_hash: str, segment: int, item_bytes: int, codec: str) -> Saved:
        """Encode and store ``raw``, which must not change meanwhile."""
        block_bytes = DEVICE_BLOCK_BYTES if segment in self._terms.device_segments else None
        encoding = encoder(codec, level=self._terms.level, block_bytes=block_bytes)
        stored, parameters = encoding.encode(raw, item_bytes=item_bytes)
        if len(stored) >= len(raw):
            codec, stored, parameters = "raw", raw, {}
        return self._put(stored, raw_hash, codec, parameters)

    def kept(self, stored: memoryview, stored_as: StoredAs) -> Saved:
        """Store what somebody has encoded; it must not change meanwhile."""
        return self._put(stored, "", *stored_as)

    def _put(self, stored: bytes | memoryview, raw_hash: str, codec: str, parameters: Mapping[str, int | str]) -> Saved:
        blob = hash_of(stored)
        if not self._is_first(blob):
            return Saved(raw_hash, codec, parameters, blob, len(stored), is_written=False)
        age_seconds = self._repository.blob_age_seconds(blob, len(stored))
        is_written = not (self._terms.relies_on_stored and self._repository.is_young(age_seconds))
        if is_written:
            self._rate.wait(len(stored))
            self._repository.put_blob(blob, stored, rely_on_stored=False)
        is_settled = self._repository.is_settled(age_seconds)
        return Saved(raw_hash, codec, parameters, blob, len(stored), is_written=is_written, is_settled=is_settled)

    def _is_first(self, blob: str) -> bool:
        """Whether no other chunk of this generation is stored as these bytes. If storing that one fails, all of it does."""
        with self._lock:
            is_first = blob not in self._begun
            self._begun.add(blob)
            return is_first


def hash_of(data: bytes | memoryview) -> str:
    """What names bytes."""
    from blake3 import blake3

    return str(blake3(data).hexdigest())
