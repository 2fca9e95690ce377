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
from typing import TYPE_CHECKING, Any

from coldstart.codecs.base import Codec
from coldstart.codecs.zstd import decode_frame, encode_frame
from coldstart.codecs.zstd import zstandard_package as zstandard
from coldstart.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BLOCK_BYTES = 256 << 10
"""Raw bytes of a plane in one block."""

_LENGTH_BYTES = 4
_LARGEST_WORTHWHILE_PART = 0.95
"""Stored over raw bytes above which a block is stored as it is: decoding it would cost more than it saves."""


class PlanesCodec(Codec):
    """Byte planes, each block of which is a zstd frame or stored. For items of one byte there is but one plane."""

    id = "planes+zstd"

    def __init__(self) -> None:
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
            for block in _encoded_plane(np.ascontiguousarray(items[plane:whole:item_bytes]), compressor)
        ]
        table = struct.pack(f"<{len(blocks)}I", *map(len, blocks))
        return b"".join([table, *blocks, bytes(raw[whole:])]), {"block_bytes": BLOCK_BYTES}

    def decode(
        self, stored: memoryview, target: memoryview, *, item_bytes: int, parameters: Mapping[str, int | str]
    ) -> None:
        """Fill ``target``, block by block. Raises CodecError unless every block gives exactly what it has to."""
        import numpy as np

        block_bytes = parameters.get("block_bytes")
        if type(block_bytes) is not int or block_bytes < 1:
            raise CodecError(f"a chunk of planes says its blocks have {block_bytes!r} bytes")
        plane_bytes = len(target) // item_bytes
        whole = plane_bytes * item_bytes
        block_count = len(range(0, plane_bytes, block_bytes))
        lengths, position = _table(stored, item_bytes * block_count)
        ends = list(accumulate(lengths, initial=position))
        if len(stored) - ends[-1] != len(target) - whole:
            raise CodecError(f"a chunk of planes of {ends[-1] + len(target) - whole} bytes is stored in {len(stored)}")
        rooms = [memoryview(bytearray(min(block_bytes, plane_bytes))) for _ in range(item_bytes)]
        scratch = np.empty(min(block_bytes, plane_bytes), np.uint16)
        items = np.frombuffer(target, np.uint8)
        for number, begin in enumerate(range(0, plane_bytes, block_bytes)):
            end = min(begin + block_bytes, plane_bytes)
            blocks = []
            for plane, room in enumerate(rooms):
                index = plane * block_count + number
                blocks.append(_decoded(stored[ends[index] : ends[index + 1]], room[: end - begin]))
            place = items[begin * item_bytes : end * item_bytes]
            _merge([np.frombuffer(block, np.uint8) for block in blocks], place, scratch[: end - begin])
        target[whole:] = stored[ends[-1] :]


def _decoded(block: memoryview, room: memoryview) -> memoryview:
    """The bytes of a block of ``len(room)`` bytes: the block itself if it is stored as it is, else decoded in ``room``."""
    if len(block) == len(room):
        return block
    decode_frame(block, room)
    return room


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


def _encoded_plane(plane: Any, compressor: Any) -> Iterator[Any]:
    """The blocks of a plane. Where neither its first nor its middle one shrinks, no other is tried: it is noise."""
    blocks = [memoryview(plane[begin : begin + BLOCK_BYTES]) for begin in range(0, len(plane), BLOCK_BYTES)]
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
