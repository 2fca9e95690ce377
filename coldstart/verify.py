"""Verifying a stored generation: every blob there, of the right length and hash, decoding to the right bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from coldstart.codecs import codec
from coldstart.errors import BlobCorruptError, CodecError, ObjectMissingError
from coldstart.manifest import blob_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstart.manifest import Chunk, Manifest
    from coldstart.stores.base import Store


class Finding(NamedTuple):
    """Something wrong with a chunk: its index in the manifest, its blob, and what it is."""

    chunk: int
    blob: str
    problem: str


def verify(manifest: Manifest, store: Store) -> Iterator[Finding]:
    """Read, hash and decode every chunk of a generation; yields what is wrong, so nothing means all is well.

    Raises StoreError when the store itself fails.
    """
    for index, chunk in enumerate(manifest.chunks):
        try:
            _verify_chunk(manifest, chunk, store)
        except (BlobCorruptError, CodecError, ObjectMissingError) as error:
            yield Finding(index, chunk.blob, str(error))


def _verify_chunk(manifest: Manifest, chunk: Chunk, store: Store) -> None:
    from blake3 import blake3

    stored = memoryview(store.get(blob_key(chunk.blob)).data)
    if len(stored) != chunk.stored_bytes:
        raise BlobCorruptError(
            f"the blob has {len(stored)} bytes, the manifest says {chunk.stored_bytes}", key=chunk.blob
        )
    if blake3(stored).hexdigest() != chunk.blob:
        raise BlobCorruptError("the blob's bytes are not those that its name says", key=chunk.blob)
    raw = memoryview(bytearray(chunk.length_bytes))
    item_bytes = manifest.segments[chunk.segment].item_bytes
    codec(chunk.codec).decode(stored, raw, item_bytes=item_bytes, parameters=chunk.parameters)
    if blake3(raw).hexdigest() != chunk.raw_hash:
        raise BlobCorruptError("the blob decodes to other bytes than were captured", key=chunk.blob)
