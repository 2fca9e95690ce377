"""Which stored chunks a GPU decodes as they are, and scratch for a batch of them, whatever their codecs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from coldstart.codecs.ans import ALIGNMENT_BYTES, AnsBlock, AnsCodec, blocks_of
from coldstart.codecs.ans import SMALLEST_BLOCK_BYTES as SMALLEST_ANS_BYTES
from coldstart.codecs.ans_gpu import AnsDecoder, AnsLimits, BlockDecoder, EncodedBlocks
from coldstart.codecs.planes import Planes, PlanesCodec, planes_of
from coldstart.codecs.planes_gpu import SMALLEST_BLOCK_BYTES, Encoded, FrameDecoder, Limits, PlanesDecoder

if TYPE_CHECKING:
    from coldstart.devices.cuda_driver import Gpu, Stream
    from coldstart.manifest import Chunk, Manifest

PLANES = PlanesCodec.id
ANS = AnsCodec.id

_SMALLEST_BLOCKS = {PLANES: SMALLEST_BLOCK_BYTES, ANS: SMALLEST_ANS_BYTES}

Table = Planes | tuple[AnsBlock, ...]
"""What a stored chunk says of its blocks."""
Arrived = Encoded | EncodedBlocks
"""A chunk whose stored bytes are on the device, and where it belongs."""


class GpuDecoder(FrameDecoder, BlockDecoder, Protocol):
    """What is needed of nvCOMP: frames of zstd for planes, blocks of ANS only where a manifest has such chunks."""


def is_for_gpu(chunk: Chunk) -> bool:
    """Whether a GPU can decode a chunk's stored bytes: nvCOMP writes blocks of ANS to aligned places only."""
    if chunk.codec == ANS and chunk.offset_bytes % ALIGNMENT_BYTES:
        return False
    return chunk.codec in _SMALLEST_BLOCKS and _block_bytes(chunk) >= _SMALLEST_BLOCKS[chunk.codec]


def table_of(chunk: Chunk, stored: memoryview, item_bytes: int) -> Table:
    """Read the table of a chunk that ``is_for_gpu``. Raises CodecError."""
    read = planes_of if chunk.codec == PLANES else blocks_of
    return read(stored, chunk.length_bytes, item_bytes=item_bytes, parameters=chunk.parameters)


def arrived(address: int, target: int, chunk: Chunk, item_bytes: int, table: Table) -> Arrived:
    """The chunk, its stored bytes at ``address`` once the stream is there."""
    if isinstance(table, Planes):
        return Encoded(address, target, chunk.length_bytes, item_bytes, table)
    return EncodedBlocks(address, target, item_bytes, table)


class Decoders:
    """A decoder of each codec that chunks of a manifest have, for one batch at a time."""

    def __init__(self, gpu: Gpu, library: GpuDecoder, manifest: Manifest, chunks: int) -> None:
        """``chunks``: of a batch, at most. Raises DeviceError where the GPU has no room for the scratch."""
        planes, ans = limits_of(manifest, chunks), ans_limits_of(manifest, chunks)
        self._planes = PlanesDecoder(gpu, library, planes) if planes.raw_bytes else None
        self._ans = AnsDecoder(gpu, library, ans) if ans.blocks else None
        self._used: list[PlanesDecoder | AnsDecoder] = []

    def decode(self, batch: list[Arrived], stream: Stream) -> None:
        """Queue a batch. The one before it must have been checked, or given up."""
        self._used = []
        planes = [each for each in batch if isinstance(each, Encoded)]
        blocks = [each for each in batch if isinstance(each, EncodedBlocks)]
        if planes and self._planes is not None:
            self._planes.decode(planes, stream)
            self._used.append(self._planes)
        if blocks and self._ans is not None:
            self._ans.decode(blocks, stream)
            self._used.append(self._ans)

    def check(self) -> None:
        """After the stream is done: raise CodecError unless all of the batch gave what it had to."""
        for decoder in self._used:
            decoder.check()

    def end(self) -> None:
        """Give the scratch back; nothing may be queued any more."""
        for decoder in (self._planes, self._ans):
            if decoder is not None:
                decoder.end()


def limits_of(manifest: Manifest, chunks: int) -> Limits:
    """What a batch of so many of the manifest's chunks of planes can have at most, of those that a GPU decodes."""
    found = [
        (chunk, manifest.segments[chunk.segment].item_bytes, _block_bytes(chunk))
        for chunk in manifest.chunks
        if chunk.codec == PLANES and is_for_gpu(chunk)
    ]
    blocks = [
        item_bytes * -(-(chunk.length_bytes // item_bytes) // block_bytes) for chunk, item_bytes, block_bytes in found
    ]
    return Limits(
        chunks * max((chunk.length_bytes for chunk, _, _ in found), default=0),
        chunks * max(blocks, default=0),
        max((min(block_bytes, chunk.length_bytes) for chunk, _, block_bytes in found), default=0),
    )


def ans_limits_of(manifest: Manifest, chunks: int) -> AnsLimits:
    """What a batch of so many of the manifest's chunks of ANS can have at most."""
    found = [
        (chunk.length_bytes, _block_bytes(chunk))
        for chunk in manifest.chunks
        if chunk.codec == ANS and is_for_gpu(chunk)
    ]
    return AnsLimits(
        chunks * max((-(-length_bytes // block_bytes) for length_bytes, block_bytes in found), default=0),
        max((min(length_bytes, block_bytes) for length_bytes, block_bytes in found), default=0),
    )


def _block_bytes(chunk: Chunk) -> int:
    """What the manifest says; 0 where it says nothing that could be meant."""
    block_bytes = chunk.parameters.get("block_bytes")
    return block_bytes if type(block_bytes) is int else 0
