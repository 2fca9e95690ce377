"""Codecs by the name that a manifest gives them, and the choice of one for a segment.

A codec's module is imported when a chunk first needs it, so a snapshot of raw chunks costs no import.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from coldstart.errors import CodecError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.codecs.base import Codec

_CODECS = {
    "raw": ("coldstart.codecs.raw", "RawCodec"),
    "zstd": ("coldstart.codecs.zstd", "ZstdCodec"),
    "planes+zstd": ("coldstart.codecs.planes", "PlanesCodec"),
    "nvcomp-ans/6": ("coldstart.codecs.ans", "AnsCodec"),
}
FOR_DEVICES = ("nvcomp-ans/6",)
"""Codecs of further forms of a chunk, which only devices encode and decode."""
NAMES = tuple(name for name in _CODECS if name not in FOR_DEVICES)
"""Every codec that any machine encodes and decodes, as manifests name them."""

ANS = "nvcomp-ans"
"""The setting that stores chunks of a GPU's memory in a further form; in their own they are stored as with ``auto``."""

DEVICE_BLOCK_BYTES = 64 << 10
"""Raw bytes of a block that a GPU will decode: one takes few of a GPU's threads, so it wants many, shorter than a processor's."""

_OPTIONS = {"zstd": "level", "planes+zstd": "block_bytes"}
"""What a codec's encoder can be told."""

_AUTOMATIC = ("zstd", "planes+zstd")
"""What ``auto`` tries on a sample; ``raw`` needs no trying."""

_OF_NUMBERS = {"planes+zstd": (2, 4)}
"""Codecs that ``auto`` tries for items of these sizes only."""

_SAMPLE_BYTES = 4 << 20
_SAMPLE_SLICES = 8
_LARGEST_WORTHWHILE_PART = 0.95
"""Stored over raw bytes above which decoding costs a start more than the saved bytes do."""


@cache
def codec(codec_id: str) -> Codec:
    """Return the codec of this name, one instance for all threads. Raises CodecError if unknown or not installed."""
    return _make(codec_id)


@cache
def encoder(codec_id: str, *, level: int, block_bytes: int | None = None) -> Codec:
    """Return the codec of this name for writing at ``level``, where it has levels, in blocks of that size, where it has blocks.

    Raises CodecError like ``codec``.
    """
    told = {"level": level, "block_bytes": block_bytes}
    value = told.get(_OPTIONS.get(codec_id, ""))
    return codec(codec_id) if value is None else _make(codec_id, **{_OPTIONS[codec_id]: value})


def _make(codec_id: str, **options: int) -> Codec:
    if codec_id not in _CODECS:
        raise CodecError(
            f"unknown codec {codec_id[:80]!r}: this coldstart knows {', '.join(_CODECS)}; "
            "was the snapshot written by a newer coldstart?"
        )
    module, name = _CODECS[codec_id]
    made: Codec = getattr(import_module(module), name)(**options)
    return made


def check_setting(setting: str, device_type: str) -> None:
    """Raise ConfigError where the codec setting asks for what a device of this type cannot do."""
    if setting == ANS and device_type != "cuda":
        raise ConfigError(
            f"COLDSTART_CODEC={ANS} has nvCOMP encode on an NVIDIA GPU, and the state is to live on device {device_type}:"
            " use auto, or COLDSTART_DEVICE=cuda on a machine with a GPU"
        )


def choose(sample: memoryview, *, item_bytes: int, setting: str) -> str:
    """Return the id of the codec for a segment that ``sample`` is typical of (it may be the whole segment).

    ``setting`` is ``auto`` or a codec's id. For ``auto`` a few slices spread over the sample, 4 MiB at most, are
    encoded: what saves less than 5 % is stored raw. Raises ConfigError for any other setting, CodecError where the
    codec asked for is not installed.
    """
    if setting == "auto":
        return _choose_by_sample(_spread(sample), item_bytes)
    if setting not in NAMES:
        raise ConfigError(f"the codec setting is {setting!r}: use auto, {' or '.join(NAMES)}")
    return codec(setting).id


def _choose_by_sample(slices: Sequence[memoryview], item_bytes: int) -> str:
    best, best_bytes = "raw", _LARGEST_WORTHWHILE_PART * sum(map(len, slices))
    for candidate in _AUTOMATIC:
        if item_bytes not in _OF_NUMBERS.get(candidate, (item_bytes,)):
            continue
        stored_bytes = sum(len(codec(candidate).encode(raw, item_bytes=item_bytes)[0]) for raw in slices)
        if stored_bytes < best_bytes:
            best, best_bytes = candidate, stored_bytes
    return best


def _spread(sample: memoryview) -> list[memoryview]:
    """Slices from the whole length of ``sample``: its first bytes alone may be an embedding of mostly unused rows."""
    if len(sample) <= _SAMPLE_BYTES:
        return [sample] if len(sample) else []
    length_bytes = _SAMPLE_BYTES // _SAMPLE_SLICES
    step_bytes = (len(sample) - length_bytes) // (_SAMPLE_SLICES - 1)
    starts = (index * step_bytes // 64 * 64 for index in range(_SAMPLE_SLICES))  # on an item, whatever its size
    return [sample[start : start + length_bytes] for start in starts]
