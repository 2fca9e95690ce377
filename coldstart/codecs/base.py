"""The contract of a codec: raw bytes of one chunk to stored bytes and back.

- ``decode`` writes into memory of exactly the raw length, which the caller takes from the manifest, never from the
  frame; a frame that would give more, fewer or other bytes raises CodecError and nothing is allocated from its claims.
- Stored bytes were verified (their BLAKE3 is the blob's name) before ``decode`` sees them.
- Both directions release the interpreter lock while they work, and are safe from several threads at once.
- ``item_bytes`` is the item size of the segment that the chunk is from (1, 2, 4, 8 ...), for codecs that split planes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping


class Codec(ABC):
    """One way to store a chunk. Stateless; instances are shared between threads."""

    id: ClassVar[str]
    """The name in the manifest. A change of the stored form is a new id."""

    @abstractmethod
    def encode(self, raw: memoryview, *, item_bytes: int) -> tuple[bytes | memoryview, Mapping[str, int | str]]:
        """Return the stored form and the parameters that ``decode`` needs (written to the manifest)."""

    @abstractmethod
    def decode(
        self, stored: memoryview, target: memoryview, *, item_bytes: int, parameters: Mapping[str, int | str]
    ) -> None:
        """Fill ``target`` (contiguous writable bytes, ``len(target)`` = raw length) from ``stored``.

        Raises CodecError when the frame is malformed or does not give exactly ``len(target)`` bytes.
        """

    def check(
        self, stored: memoryview, raw_bytes: int, *, item_bytes: int, parameters: Mapping[str, int | str]
    ) -> None:
        """Raise CodecError where the stored form claims another size than ``raw_bytes``: for who decodes on a device.

        Only codecs that a device decodes have something to say here.
        """
        del stored, raw_bytes, item_bytes, parameters
