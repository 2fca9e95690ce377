"""Chunks as blocks that nvCOMP's ANS encodes: what a GPU decodes fastest, and nothing else decodes at all.

The form of a chunk is::

    table: one little-endian uint32 for each block: its stored length
    blocks: each begins at a multiple of 16 bytes of the chunk, zeros before it where that leaves a gap; nothing follows the last

A block is ``block_bytes`` of the chunk, the last one may be shorter. One whose stored length is its raw length is stored as
it is, any other is what nvCOMP made of it: of items of two bytes (bf16, fp16) exponents apart from the rest (its data type
``<f2``), of all others byte by byte. nvCOMP reads blocks where they lie, since it wants them at multiples of 16. Blocks are
large enough for its tables to cost little (1.487 at 256 KiB against 1.502 at 1 MiB, of weights in bf16), and short enough
that a few chunks keep a GPU busy.

The bytes of a block are nvCOMP's own, and change with its major version, which is part of the codec's id; ``nvcomp`` of the
parameters says which version wrote them. So this form is never the only one of a chunk (``manifest.Form``): the chunk itself
is stored in a form that every machine reads, for machines without a GPU, without nvCOMP or with a later one.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from coldstart.codecs.base import Codec
from coldstart.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BLOCK_BYTES = 512 << 10
"""Raw bytes of a block."""
ALIGNMENT_BYTES = 16
"""Where blocks begin."""
SMALLEST_BLOCK_BYTES = 4096
LARGEST_BLOCK_BYTES = 16 << 20
"""What nvCOMP takes at most."""

_LENGTH_BYTES = 4


class AnsBlock(NamedTuple):
    """A block: where it begins in the stored form, its stored length, and its raw length."""

    offset_bytes: int
    stored_bytes: int
    raw_bytes: int

    @property
    def is_encoded(self) -> bool:
        """Whether nvCOMP has to decode it: it is not stored as it is."""
        return self.stored_bytes != self.raw_bytes


def raw_sizes(raw_bytes: int, block_bytes: int) -> list[int]:
    """The raw lengths of a chunk's blocks."""
    return [min(block_bytes, raw_bytes - begin) for begin in range(0, raw_bytes, block_bytes)]


def places(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Where blocks of these stored lengths begin in the stored form, and where the last one ends."""
    begins, end = [], len(lengths) * _LENGTH_BYTES
    for length in lengths:
        begins.append(-(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        end = begins[-1] + length
    return begins, end


def table(lengths: Sequence[int]) -> bytes:
    """The table of blocks of these stored lengths."""
    return struct.pack(f"<{len(lengths)}I", *lengths)


def blocks_of(
    stored: memoryview, raw_bytes: int, *, item_bytes: int, parameters: Mapping[str, int | str]
) -> tuple[AnsBlock, ...]:
    """Read the table of a stored chunk. Raises CodecError unless its blocks are all of it and give ``raw_bytes``."""
    block_bytes = parameters.get("block_bytes")
    if type(block_bytes) is not int or not SMALLEST_BLOCK_BYTES <= block_bytes <= LARGEST_BLOCK_BYTES:
        raise CodecError(f"a chunk of ANS says its blocks have {block_bytes!r} bytes")
    if block_bytes % ALIGNMENT_BYTES:
        raise CodecError(f"a chunk of ANS has blocks of {block_bytes} bytes, which leaves them unaligned")
    sizes = raw_sizes(raw_bytes, block_bytes)
    if len(stored) < len(sizes) * _LENGTH_BYTES:
        raise CodecError("a chunk of ANS is cut off in its table")
    lengths = struct.unpack_from(f"<{len(sizes)}I", stored)
    begins, end = places(lengths)
    if end != len(stored):
        raise CodecError(f"a chunk of ANS of {end} bytes is stored in {len(stored)}")
    blocks = tuple(map(AnsBlock, begins, lengths, sizes))
    for block in blocks:
        _check(block, item_bytes)
    return blocks


def _check(block: AnsBlock, item_bytes: int) -> None:
    if not 0 < block.stored_bytes <= block.raw_bytes:
        raise CodecError(f"a block of ANS has {block.stored_bytes} bytes for {block.raw_bytes}")
    if block.is_encoded and not is_whole(block.raw_bytes, item_bytes):
        raise CodecError(f"a block of ANS gives {block.raw_bytes} bytes, which are no whole items of {item_bytes}")


def is_whole(raw_bytes: int, item_bytes: int) -> bool:
    """Whether a block can be encoded: nvCOMP takes whole halves only."""
    return item_bytes != 2 or raw_bytes % 2 == 0  # noqa: PLR2004  halves


class AnsCodec(Codec):
    """What every machine can do with such chunks, which is to check their claims. ``ans_gpu`` encodes and decodes them."""

    id = "nvcomp-ans/6"

    def encode(self, raw: memoryview, *, item_bytes: int) -> NoReturn:  # noqa: ARG002
        """Raise CodecError: nvCOMP has no encoder for processors."""
        raise CodecError(f"only a GPU encodes {self.id}: capture there, with COLDSTART_CODEC=nvcomp-ans")

    def decode(
        self,
        stored: memoryview,  # noqa: ARG002
        target: memoryview,  # noqa: ARG002
        *,
        item_bytes: int,  # noqa: ARG002
        parameters: Mapping[str, int | str],  # noqa: ARG002
    ) -> NoReturn:
        """Raise CodecError: nvCOMP has no decoder for processors."""
        raise CodecError(f"only a GPU decodes {self.id}: read the chunk in its own form")

    def check(
        self, stored: memoryview, raw_bytes: int, *, item_bytes: int, parameters: Mapping[str, int | str]
    ) -> None:
        """Raise CodecError unless the table's blocks are all that is stored and give ``raw_bytes``."""
        blocks_of(stored, raw_bytes, item_bytes=item_bytes, parameters=parameters)
