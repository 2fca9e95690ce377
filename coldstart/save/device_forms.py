"""Chunks of a state in a GPU's memory in a form that GPUs decode fastest: encoded there by nvCOMP, and copied out so.

What a chunk becomes is decoded and hashed on the GPU before it is offered: a form that would not give the bytes that were
captured is none. All work goes on the stream of ``DeviceChunks``, behind the user's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from coldstart.codecs.ans import AnsCodec
from coldstart.codecs.ans_gpu import AnsEncoder
from coldstart.errors import CodecError, StateChangedError
from coldstart.save.base import StoredAs, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coldstart.codecs.ans_gpu import BlockEncoder, Stored
    from coldstart.save.device import DeviceChunks, Part

_LARGEST_WORTHWHILE_PART = 0.95
"""Stored over raw bytes above which a form is not worth its bytes in the store."""


class DeviceForms:
    """Encodes the chunks of one capture, one at a time. For one thread, the one that uses ``chunks``."""

    def __init__(self, chunks: DeviceChunks, largest_bytes: int, *, library: BlockEncoder | None = None) -> None:
        """Raises CodecError where nvCOMP cannot be used, DeviceError where the GPU has no room for the scratch."""
        self._chunks = chunks
        self._encoder = AnsEncoder(chunks.gpu, library or _nvcomp(), largest_bytes)

    def task(self, parts: Sequence[Part], of: Task, *, raw_hash: str) -> Task | None:
        """What there is to save of a chunk in this form; None where that is not worth it.

        ``of`` is the chunk's own task, ``raw_hash`` what it was saved with. What the task gives is good
        until the next chunk is encoded; after that it is encoded again. Raises StateChangedError for a lasting chunk that
        has changed since, CodecError, DeviceError.
        """
        most_bytes = int(_LARGEST_WORTHWHILE_PART * of.length_bytes)
        encode = partial(self._encode, parts, of, raw_hash, most_bytes)
        stored = encode()
        if stored is None:
            return None
        as_ = StoredAs(AnsCodec.id, stored.parameters)
        pieces = _Pieces(stored, encode)
        return Task(of.segment, of.item_bytes, len(stored.data), settled=True, pieces=pieces.give, stored_as=as_)

    def _encode(self, parts: Sequence[Part], of: Task, raw_hash: str, most_bytes: int) -> Stored | None:
        chunks = self._chunks
        stored = self._encoder.encode(
            chunks.aligned(parts, of.length_bytes),
            of.length_bytes,
            item_bytes=of.item_bytes,
            most_bytes=most_bytes,
            stream=chunks.stream,
        )
        if stored is None or stored.raw_hash == raw_hash:
            return stored
        if chunks.raw_hash(parts, of.length_bytes) == raw_hash:
            raise CodecError(
                f"what nvCOMP {stored.parameters['nvcomp']} encoded does not decode to the same bytes: use COLDSTART_CODEC=auto"
            )
        if of.settled:
            raise StateChangedError("bytes of the state changed while they were copied")
        return None


class _Pieces:
    """The bytes of an encoded chunk: those at hand the first time, encoded anew when a saver died with them."""

    def __init__(self, stored: Stored, again: Callable[[], Stored | None]) -> None:
        self._stored: Stored | None = stored
        self._again = again
        self._length = len(stored.data)

    def give(self) -> Iterator[memoryview]:
        """The bytes. Raises StateChangedError where encoding them anew gives another length."""
        stored, self._stored = self._stored or self._again(), None
        if stored is None or len(stored.data) != self._length:
            raise StateChangedError("a chunk of the state was encoded again, and to another length")
        yield stored.data


def _nvcomp() -> BlockEncoder:
    from coldstart.codecs.nvcomp import Nvcomp

    return Nvcomp.load()
