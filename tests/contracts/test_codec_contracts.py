"""The codecs of coldstart, each under the contract of all codecs and the tests of its own."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from coldstart.codecs import NAMES, choose, codec, encoder
from coldstart.codecs.planes import BLOCK_BYTES, PlanesCodec
from coldstart.codecs.raw import RawCodec
from coldstart.codecs.zstd import MAX_WINDOW_BYTES, ZstdCodec
from coldstart.errors import CodecError, ConfigError
from coldstart.testing.codecs import CORPUS, CodecContract

RANDOM_BYTES = random.Random(5).randbytes(1 << 20)


class TestRaw(CodecContract):
    def make(self):
        return RawCodec()

    def test_encode_copies_nothing(self):
        """The stored bytes are the raw ones, in their own memory."""
        raw = memoryview(bytearray(b"abc"))
        assert self.make().encode(raw, item_bytes=1)[0] is raw


class TestZstd(CodecContract):
    def make(self):
        return ZstdCodec()


class TestPlanes(CodecContract):
    def make(self):
        return PlanesCodec()


class TestZstdAtAnotherLevel(CodecContract):
    def make(self):
        return ZstdCodec(level=1)


def decode_zstd(stored: bytes, length: int) -> bytes:
    """What the codec makes of a frame when the manifest says that it has ``length`` bytes."""
    target = bytearray(length)
    ZstdCodec().decode(memoryview(stored), memoryview(target), item_bytes=1, parameters={})
    return bytes(target)


def zstd_frame(raw: bytes, **options) -> bytes:
    """A frame as the library writes it."""
    return zstandard.ZstdCompressor(**options).compress(raw)


def frame_header(content_size: int, *, window_descriptor: int) -> bytes:
    """A frame header with an eight-byte content size, written from the format's description."""
    return b"\x28\xb5\x2f\xfd" + bytes([0b1100_0000, window_descriptor]) + content_size.to_bytes(8, "little")


def test_zstd_frames_are_read_by_any_zstd():
    """A stored chunk is one standard frame that carries its content's size."""
    stored, _ = ZstdCodec().encode(memoryview(CORPUS["text"]), item_bytes=1)
    assert zstandard.get_frame_parameters(stored).content_size == len(CORPUS["text"])
    assert zstandard.decompress(stored) == CORPUS["text"]


def test_zstd_level_reaches_the_compressor():
    """A higher level gives a smaller frame of bytes that have something to find."""
    text = b"".join(b"%d bottles of beer on the wall %d" % (n * n, n) for n in range(20_000))
    small, large = (len(encoder("zstd", level=level).encode(memoryview(text), item_bytes=1)[0]) for level in (19, 1))
    assert small < large


def test_zstd_reads_frames_of_other_writers():
    """Frames with a checksum decode too, whatever wrote them."""
    assert decode_zstd(zstd_frame(CORPUS["text"], write_checksum=True), len(CORPUS["text"])) == CORPUS["text"]


@pytest.mark.parametrize(
    ("what", "stored", "length"),
    [
        ("no content size", zstd_frame(b"a" * 1000, write_content_size=False), 1000),
        ("a claim of a tebibyte", frame_header(1 << 40, window_descriptor=0) + b"\x03\0\0a", 1000),
        ("fewer bytes than claimed", frame_header(1000, window_descriptor=0) + b"\x21\0\0" + b"abcd", 1000),
        ("more bytes than claimed", frame_header(4, window_descriptor=0) + b"\x29\0\0" + b"abcde", 4),
        ("a window of 2 GiB", frame_header(4, window_descriptor=21 << 3) + b"\x21\0\0abcd", 4),
        ("a reserved block", frame_header(4, window_descriptor=0) + b"\x27\0\0abcd", 4),
        ("blocks without a last one", frame_header(4, window_descriptor=0) + b"\x20\0\0abcd", 4),
        ("a skippable frame", b"\x50\x2a\x4d\x18\x04\0\0\0abcd", 4),
        ("an empty frame behind", zstd_frame(b"a" * 1000) + zstd_frame(b""), 1000),
        ("a skippable frame behind", zstd_frame(b"a" * 1000) + b"\x50\x2a\x4d\x18\x04\0\0\0abcd", 1000),
        ("a skippable frame before", b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstd_frame(b"a" * 1000), 1000),
        ("a wrong checksum", zstd_frame(b"a" * 1000, write_checksum=True)[:-1] + b"\0", 1000),
        ("a checksum cut short", zstd_frame(b"a" * 1000, write_checksum=True)[:-1], 1000),
        ("a dictionary", frame_header(4, window_descriptor=0)[:4] + b"\xc3\0" + b"\1\0\0\0" + bytes(8), 4),
        ("a bomb", zstd_frame(bytes(1 << 26)), 1000),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_zstd_refuses_hostile_frames(what, stored, length):
    """A frame that lies, or is not exactly one frame, raises CodecError and allocates nothing that it claims."""
    with pytest.raises(CodecError):
        decode_zstd(stored, length)


def test_zstd_frame_headers_of_the_tests_are_right():
    """The hand-written header is a real one: with true claims it decodes."""
    assert decode_zstd(frame_header(4, window_descriptor=0) + b"\x21\0\0abcd", 4) == b"abcd"
    assert decode_zstd(frame_header(4, window_descriptor=13 << 3) + b"\x21\0\0abcd", 4) == b"abcd"
    assert decode_zstd(frame_header(0, window_descriptor=0) + b"\x01\0\0", 0) == b""


def test_zstd_needs_a_window_no_larger_than_the_chunk():
    """A chunk above the window limit still decodes, because its window is the target itself."""
    raw = RANDOM_BYTES * 9 + b"end"
    assert len(raw) > MAX_WINDOW_BYTES
    parameters = zstandard.ZstdCompressionParameters(window_log=24)
    assert decode_zstd(zstandard.ZstdCompressor(compression_params=parameters).compress(raw), len(raw)) == raw


@given(st.binary(max_size=300), st.integers(0, 400))
def test_zstd_survives_arbitrary_bytes(stored, length):
    """Bytes that are no frame raise CodecError and nothing else."""
    for candidate in (stored, b"\x28\xb5\x2f\xfd" + stored):
        try:
            decode_zstd(candidate, length)
        except CodecError:
            continue


def test_zstd_without_its_package(monkeypatch):
    """Where zstandard is not installed, asking for the codec raises CodecError with the command that helps."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CodecError, match="pip install zstandard"):
        ZstdCodec()


@pytest.mark.parametrize("name", NAMES)
def test_the_table_gives_the_codec_it_names(name):
    """A codec is found by the name it writes into manifests, and all threads get one instance."""
    assert codec(name).id == name
    assert codec(name) is codec(name)
    assert encoder(name, level=1).id == name


def test_an_unknown_codec_is_refused():
    """The error names what this coldstart knows, and why it may not be enough."""
    with pytest.raises(CodecError, match=r"unknown codec 'lz9'.*raw, zstd.*newer coldstart"):
        codec("lz9")


def test_choose_takes_the_setting_at_its_word():
    """A codec asked for is used whatever the bytes; a setting that is none is an error that lists them."""
    assert [choose(memoryview(CORPUS["random"]), item_bytes=1, setting=name) for name in NAMES] == list(NAMES)
    with pytest.raises(ConfigError, match="auto, raw or zstd"):
        choose(memoryview(b""), item_bytes=1, setting="gzip")


@pytest.mark.parametrize(
    ("expected", "sample"),
    [
        ("zstd", CORPUS["text"]),
        ("raw", CORPUS["random"]),
        ("raw", RANDOM_BYTES[:96_000] + bytes(4_000)),
        ("zstd", RANDOM_BYTES[:90_000] + bytes(10_000)),
        ("raw", b""),
        ("raw", b"x"),
    ],
    ids=["text", "random", "saves 4 %", "saves 10 %", "empty", "one byte"],
)
def test_choose_by_sample(expected, sample):
    """What saves less than 5 % is stored raw."""
    assert choose(memoryview(sample), item_bytes=1, setting="auto") == expected


def test_choose_looks_at_the_whole_segment_without_encoding_all_of_it(monkeypatch):
    """Slices from everywhere, 4 MiB together, decide: a random beginning does not hide a compressible rest."""
    seen = []
    encode = ZstdCodec.encode

    def spy(self, raw, *, item_bytes):
        seen.append(bytes(raw[:1]))
        sizes.append(len(raw))
        return encode(self, raw, item_bytes=item_bytes)

    sizes: list[int] = []
    monkeypatch.setattr(ZstdCodec, "encode", spy)
    segment = RANDOM_BYTES * 2 + bytes(14 << 20)
    assert choose(memoryview(segment), item_bytes=4, setting="auto") == "zstd"
    assert sum(sizes) == 4 << 20
    assert seen.count(b"\0") >= 6


# --- planes ----------------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent.parent / "golden"


def bf16_weights(count):
    """Trained-looking numbers as bfloat16: the upper halves of float32."""
    numbers = np.random.default_rng(3).normal(0, 0.02, count).astype(np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def test_planes_of_bf16_weights_take_two_thirds():
    """Weights in bfloat16 are stored in at most 0.68 of their bytes, and come back."""
    raw = bf16_weights(1 << 20)
    stored, parameters = PlanesCodec().encode(memoryview(raw), item_bytes=2)
    assert len(stored) <= 0.68 * len(raw)
    target = bytearray(len(raw))
    PlanesCodec().decode(memoryview(stored), memoryview(target), item_bytes=2, parameters=parameters)
    assert target == raw


def test_planes_written_by_the_first_version_are_read():
    """The stored form does not change under its name: bytes written once decode for ever."""
    raw, stored = ((GOLDEN / f"planes-v1.{part}").read_bytes() for part in ("raw", "stored"))
    target = bytearray(len(raw))
    PlanesCodec().decode(memoryview(stored), memoryview(target), item_bytes=2, parameters={"block_bytes": 262144})
    assert target == raw


def test_noise_is_stored_as_it_is():
    """Planes that do not shrink are stored raw: the table and nothing else is added."""
    stored, _ = PlanesCodec().encode(memoryview(RANDOM_BYTES), item_bytes=2)
    blocks = 2 * -(-len(RANDOM_BYTES) // 2 // BLOCK_BYTES)
    assert len(stored) == len(RANDOM_BYTES) + 4 * blocks


@pytest.mark.parametrize("parameters", [{}, {"block_bytes": 0}, {"block_bytes": -1}, {"block_bytes": "262144"}])
def test_planes_of_an_unknown_block_size_are_refused(parameters):
    """A manifest without a usable block size is an error, not a guess."""
    stored, _ = PlanesCodec().encode(memoryview(b"abcd"), item_bytes=2)
    with pytest.raises(CodecError, match="blocks"):
        PlanesCodec().decode(memoryview(stored), memoryview(bytearray(4)), item_bytes=2, parameters=parameters)


@given(raw=st.binary(max_size=2000), item_bytes=st.sampled_from([1, 2, 4, 8]))
def test_planes_of_any_bytes_come_back(raw, item_bytes):
    """Whatever the bytes and the item size, also where the last item is cut off."""
    stored, parameters = PlanesCodec().encode(memoryview(raw), item_bytes=item_bytes)
    target = bytearray(len(raw))
    PlanesCodec().decode(memoryview(stored), memoryview(target), item_bytes=item_bytes, parameters=parameters)
    assert target == raw


def test_auto_takes_planes_for_numbers_only():
    """For items of two bytes planes win; for items of one byte they are not even tried."""
    raw = memoryview(bf16_weights(1 << 18))
    assert choose(raw, item_bytes=2, setting="auto") == "planes+zstd"
    assert choose(raw, item_bytes=1, setting="auto") != "planes+zstd"
