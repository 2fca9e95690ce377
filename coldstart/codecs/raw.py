"""Chunks stored as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.codecs.base import Codec
from coldstart.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping


class RawCodec(Codec):
    """The stored bytes are the raw bytes.

    A fetch reads such a chunk straight into its place; ``decode`` is for callers that hold the stored bytes already,
    and it copies with the interpreter lock held (1 to 3 ms for 16 MiB), because what would release it is an import.
    """

    id = "raw"

    def encode(self, raw: memoryview, *, item_bytes: int) -> tuple[memoryview, Mapping[str, int | str]]:  # noqa: ARG002
        """Return ``raw`` itself: nothing is copied, so it must not change until it is stored."""
        return raw, {}

    def decode(
        self,
        stored: memoryview,
        target: memoryview,
        *,
        item_bytes: int,  # noqa: ARG002
        parameters: Mapping[str, int | str],  # noqa: ARG002
    ) -> None:
        """Copy ``stored`` to ``target``. Raises CodecError when their lengths differ."""
        if len(stored) != len(target):
            raise CodecError(
                f"a raw chunk of {len(target)} bytes is stored in {len(stored)} bytes: the blob is damaged"
            )
        target[:] = stored
