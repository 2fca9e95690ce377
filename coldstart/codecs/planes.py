"""Chunks as byte planes, each in short zstd frames where that pays: for numbers of 2 and 4 bytes.

The bytes of one significance lie together in a plane: sign and exponent of trained weights, which a few values make up,
apart from their mantissa, which is noise. The form of a chunk is::

    table: one little-endian uint32 for each block, plane after plane: its stored length
    blocks: plane 0 (least significant byte) to plane item_bytes - 1, each in blocks of BLOCK_BYTES, the last one shorter
    tail: the last len(raw) % item_bytes bytes

A block whose stored length is its raw length is stored as it is, any other is one standard zstd frame that says its
content's size. Blocks are short, so that they can be decoded side by side (by nvCOMP on a GPU too).

The parameters of zstd are for planes of exponents: short matches are all spurious there, so it is told to look for next to
none and to leave the work to its entropy coder. They gave 2.65 bits a symbol against 2.91 at level 1, at twice its speed.
"""

from __future__ import annotations

import struct
import sys
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.codecs.base import Codec
from coldstart.codecs.zstd import check_frame, decode_frame, encode_frame
from coldstart.codecs.zstd import zstandard_package as zstandard
from coldstart.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BLOCK_BYTES = 256 << 10
"""Raw bytes of a plane in one block."""

_LENGTH_BYTES = 4
_LARGEST_WORTHWHILE_PART = 0.95
"""Stored over raw bytes above which a block is stored as it is: decoding it would cost more than it saves."""


class Block(NamedTuple):
    """A block of a plane: where it begins in the stored form, its stored length, and its raw length."""

    offset_bytes: int
    stored_bytes: int
    raw_bytes: int

    @property
    def is_frame(self) -> bool:
        """Whether it is a zstd frame, and not stored as it is."""
        return self.stored_bytes != self.raw_bytes


class Planes(NamedTuple):
    """How a chunk is stored: ``blocks`` plane after plane, ``block_count`` of each; ``tail_offset_bytes`` is their end."""

    block_bytes: int
    block_count: int
    blocks: tuple[Block, ...]
    tail_offset_bytes: int


def planes_of(stored: memoryview, raw_bytes: int, *, item_bytes: int, parameters: Mapping[str, int | str]) -> Planes:
    """Read the table of a stored chunk. Raises CodecError unless its blocks and tail are all of it and give ``raw_bytes``."""
    block_bytes = parameters.get("block_bytes")
    if type(block_bytes) is not int or block_bytes < 1:
        raise CodecError(f"a chunk of planes says its blocks have {block_bytes!r} bytes")
    plane_bytes = raw_bytes // item_bytes
    sizes = [min(block_bytes, plane_bytes - begin) for begin in range(0, plane_bytes, block_bytes)] * item_bytes
    lengths, position = _table(stored, len(sizes))
    ends = list(accumulate(lengths, initial=position))
    tail_bytes = raw_bytes - plane_bytes * item_bytes
    if len(stored) - ends[-1] != tail_bytes:
        raise CodecError(f"a chunk of planes of {ends[-1] + tail_bytes} bytes is stored in {len(stored)}")
    return Planes(block_bytes, len(sizes) // item_bytes, tuple(map(Block, ends, lengths, sizes)), ends[-1])


class PlanesCodec(Codec):
    """Byte planes, each block of which is a zstd frame or stored. For items of one byte there is but one plane."""

    id = "planes+zstd"

    def __init__(self, *, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        zstandard()

    def encode(self, raw: memoryview, *, item_bytes: int) -> tuple[bytes, Mapping[str, int | str]]:
        """Return the stored form and its block size."""
        import numpy as np

        compressor = _compressor()
        items = np.frombuffer(raw, np.uint8)
        whole = len(items) // item_bytes * item_bytes
        blocks = [
            block
            for plane in range(item_bytes)
            for block in _encoded_plane(
                np.ascontiguousarray(items[plane:whole:item_bytes]), self._block_bytes, compressor
            )
        ]
        table = struct.pack(f"<{len(blocks)}I", *map(len, blocks))
        return b"".join([table, *blocks, bytes(raw[whole:])]), {"block_bytes": self._block_bytes}

    def decode(
        self, stored: memoryview, target: memoryview, *, item_bytes: int, parameters: Mapping[str, int | str]
    ) -> None:
        """Fill ``target``, block by block. Raises CodecError unless every block gives exactly what it has to."""
        import numpy as np

        planes = planes_of(stored, len(target), item_bytes=item_bytes, parameters=parameters)
        plane_bytes = len(target) // item_bytes
        room_bytes = min(planes.block_bytes, plane_bytes)
        rooms = [memoryview(bytearray(room_bytes)) for _ in range(item_bytes)]
        scratch = np.empty(room_bytes, np.uint16)
        items = np.frombuffer(target, np.uint8)
        begin = 0
        for number in range(planes.block_count):
            blocks = planes.blocks[number :: planes.block_count]
            size_bytes = blocks[0].raw_bytes
            decoded = [_decoded(stored, block, room) for block, room in zip(blocks, rooms, strict=True)]
            place = items[begin * item_bytes : (begin + size_bytes) * item_bytes]
            _merge([np.frombuffer(each, np.uint8) for each in decoded], place, scratch[:size_bytes])
            begin += size_bytes
        target[plane_bytes * item_bytes :] = stored[planes.tail_offset_bytes :]

    def check(
        self, stored: memoryview, raw_bytes: int, *, item_bytes: int, parameters: Mapping[str, int | str]
    ) -> None:
        """Raise CodecError unless the table and every frame claim just what they have to give."""
        planes = planes_of(stored, raw_bytes, item_bytes=item_bytes, parameters=parameters)
        for block in planes.blocks:
            if block.is_frame:
                check_frame(_stored_block(stored, block), block.raw_bytes)


def _stored_block(stored: memoryview, block: Block) -> memoryview:
    return stored[block.offset_bytes : block.offset_bytes + block.stored_bytes]


def _decoded(stored: memoryview, block: Block, room: memoryview) -> memoryview:
    """The raw bytes of a block: the block itself if it is stored as it is, else decoded in ``room``."""
    if not block.is_frame:
        return _stored_block(stored, block)
    decode_frame(_stored_block(stored, block), room[: block.raw_bytes])
    return room[: block.raw_bytes]


def _merge(planes: list[Any], target: Any, scratch: Any) -> None:
    """Put the bytes of every plane in their places: arrays of uint8, ``target`` as long as all of them together.

    Items of two bytes are made whole, with the processor's vectors, which is faster than copies to every other byte;
    ``scratch`` has room for them (fresh memory would cost more than that saves).
    """
    import numpy as np

    if len(planes) == 2 and sys.byteorder == "little":  # noqa: PLR2004
        items = target.view(np.uint16)
        np.copyto(scratch, planes[1])
        np.left_shift(scratch, 8, out=scratch)
        np.copyto(items, planes[0])
        np.bitwise_or(items, scratch, out=items)
        return
    for plane, values in enumerate(planes):
        target[plane :: len(planes)] = values


def _compressor() -> Any:
    library = zstandard()
    parameters = library.ZstdCompressionParameters(
        window_log=18,
        hash_log=6,
        chain_log=6,
        search_log=1,
        min_match=7,
        target_length=0,  # any other number switches the entropy coder off
        strategy=library.STRATEGY_FAST,
    )
    return library.ZstdCompressor(compression_params=parameters)


def _encoded_plane(plane: Any, block_bytes: int, compressor: Any) -> Iterator[Any]:
    """The blocks of a plane. Where neither its first nor its middle one shrinks, no other is tried: it is noise."""
    blocks = [memoryview(plane[begin : begin + block_bytes]) for begin in range(0, len(plane), block_bytes)]
    probes = {index: _encoded(blocks[index], compressor) for index in {0, len(blocks) // 2} if blocks}
    shrinks = any(len(stored) < len(blocks[index]) for index, stored in probes.items())
    for index, block in enumerate(blocks):
        if index in probes:
            yield probes[index]
        else:
            yield _encoded(block, compressor) if shrinks else block


def _encoded(block: memoryview, compressor: Any) -> bytes | memoryview:
    frame = encode_frame(block, compressor)
    return frame if len(frame) < len(block) * _LARGEST_WORTHWHILE_PART else block


def _table(stored: memoryview, count: int) -> tuple[tuple[int, ...], int]:
    """The stored lengths of all blocks, and where the first one begins."""
    table_bytes = count * _LENGTH_BYTES
    if len(stored) < table_bytes:
        raise CodecError("a chunk of planes is cut off in its table")
    return struct.unpack(f"<{count}I", stored[:table_bytes]), table_bytes
