"""Chunks as one standard zstd frame that says its content's size, readable by any zstd.

``encode_frame`` and ``decode_frame`` are also for codecs that store part of a chunk as a frame.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from coldstart.codecs.base import Codec
from coldstart.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_LEVEL = 3
MAX_WINDOW_BYTES = 8 << 20
"""The largest window that the zstd standard asks every decoder to support. A frame no larger needs no window at all."""

_BLOCK_HEADER_BYTES = 3
_CHECKSUM_BYTES = 4
_RLE_BLOCK = 1


class ZstdCodec(Codec):
    """A chunk as one zstd frame. ``level`` is zstd's, 1 to 22; decoding does not depend on it."""

    id = "zstd"

    def __init__(self, *, level: int = DEFAULT_LEVEL) -> None:
        self._level = level
        zstandard_package()

    def encode(self, raw: memoryview, *, item_bytes: int) -> tuple[bytes, Mapping[str, int | str]]:  # noqa: ARG002
        """Return the frame; it needs no parameters."""
        return encode_frame(raw, zstandard_package().ZstdCompressor(level=self._level)), {}

    def decode(
        self,
        stored: memoryview,
        target: memoryview,
        *,
        item_bytes: int,  # noqa: ARG002
        parameters: Mapping[str, int | str],  # noqa: ARG002
    ) -> None:
        """Fill ``target`` from the frame. Raises CodecError unless it is one frame of exactly that many bytes."""
        decode_frame(stored, target)


def encode_frame(raw: memoryview, compressor: Any) -> bytes:
    """Return ``raw`` as one frame. ``compressor`` (a ZstdCompressor) must not be used by two threads at once."""
    frame: bytes = compressor.compress(raw)
    return frame


def check_frame(stored: memoryview, raw_bytes: int) -> None:
    """Raise CodecError unless ``stored`` claims to be exactly one frame of ``raw_bytes`` bytes; nothing is decoded."""
    zstandard = zstandard_package()
    try:
        _check_frame(zstandard, stored, raw_bytes)
    except zstandard.ZstdError as error:
        raise CodecError(f"a zstd frame is damaged: {error}") from error


def decode_frame(stored: memoryview, target: memoryview) -> None:
    """Fill ``target`` from ``stored``, which must be exactly one frame of ``len(target)`` bytes; else CodecError.

    What the frame claims is checked before any of it is decoded, and only ``target`` is written to.
    """
    zstandard = zstandard_package()
    try:
        _check_frame(zstandard, stored, len(target))
        # zstd decodes a whole frame straight into a target that fits it: no window, no buffer, and an error of its own
        # where the blocks give more or fewer bytes than the header says.
        with _decompressor(zstandard).stream_reader(stored, closefd=False) as reader:
            filled_bytes = reader.readinto(target)
    except zstandard.ZstdError as error:
        raise CodecError(f"a zstd frame is damaged: {error}") from error
    if filled_bytes != len(target):
        raise CodecError(f"a zstd frame gives {filled_bytes} bytes where the manifest says {len(target)}")


_of_thread = threading.local()


def _decompressor(zstandard: Any) -> Any:
    """This thread's: making one takes 40 us, as long as decoding 50 kB. No two threads may use one at once."""
    try:
        return _of_thread.decompressor
    except AttributeError:
        _of_thread.decompressor = zstandard.ZstdDecompressor()
        return _of_thread.decompressor


def zstandard_package() -> Any:
    """The package, imported on first use. Raises CodecError where it is not installed."""
    try:
        import zstandard
    except ImportError as error:
        raise CodecError("the codec zstd needs the package zstandard: pip install zstandard") from error
    return zstandard


def _check_frame(zstandard: Any, stored: memoryview, raw_bytes: int) -> None:
    claims = zstandard.get_frame_parameters(stored)
    if claims.content_size != raw_bytes:
        raise CodecError(f"a zstd frame claims {claims.content_size} bytes where the manifest says {raw_bytes}")
    if claims.window_size > max(MAX_WINDOW_BYTES, raw_bytes):
        raise CodecError(f"a zstd frame asks for a window of {claims.window_size} bytes: at most 8 MiB are allowed")
    header_bytes = zstandard.frame_header_size(stored)
    frame_bytes = _end_of_blocks(stored, header_bytes) + _CHECKSUM_BYTES * claims.has_checksum
    if frame_bytes != len(stored):
        raise CodecError(f"a zstd frame of {frame_bytes} bytes is stored in {len(stored)} bytes: the blob is damaged")


def _end_of_blocks(stored: memoryview, position: int) -> int:
    """Where the last block ends, by the blocks' headers. zstd's readers stop there and never tell what follows."""
    last = False
    while not last:
        if position + _BLOCK_HEADER_BYTES > len(stored):
            raise CodecError("a zstd frame is cut off")
        header = int.from_bytes(stored[position : position + _BLOCK_HEADER_BYTES], "little")
        last = bool(header & 1)
        position += _BLOCK_HEADER_BYTES + (1 if (header >> 1) & 3 == _RLE_BLOCK else header >> 3)
    return position
