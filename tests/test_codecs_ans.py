"""Chunks of ANS: the stored form byte for byte, what is refused of it, and the contract of codecs on the fake GPU."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.codecs import FOR_DEVICES, NAMES, check_setting, choose, codec
from coldstart.codecs.ans import ALIGNMENT_BYTES, AnsBlock, AnsCodec, blocks_of, places, table
from coldstart.codecs.ans_gpu import AnsEncoder
from coldstart.codecs.nvcomp import ANS_MAX_RAW_BYTES, MAJOR
from coldstart.devices.cuda_driver import Stream
from coldstart.devices.cuda_memory import DeviceMemory, host_address
from coldstart.errors import CodecError, ConfigError
from tests.contracts.ans import AnsContract
from tests.contracts.nvcomp import NOISE, bf16_weights
from tests.fake_gpu.machine import FakeMachine

PARAMETERS = {"block_bytes": 4096, "nvcomp": "6.0.0"}
GOLDEN = (
    bytes.fromhex("05000000001000000a000000")  # stored lengths: 5, 4096 (as it is), 10
    + bytes(4)  # to a multiple of 16
    + b"first"
    + bytes(11)
    + bytes(range(256)) * 16
    + b"last block"
)
"""Three blocks of 4096, 4096 and 100 bytes; what nvCOMP makes of the first and the last stands for its own."""


@pytest.fixture
def machine(fake_gpu_folder) -> FakeMachine:
    """A machine with a fake GPU."""
    return FakeMachine(fake_gpu_folder)


class TestOnTheFakeGpu(AnsContract):
    pass


def test_the_table_is_read_as_it_was_defined():
    """The form does not change under its name: lengths, gaps and blocks are where they were in the first version."""
    blocks = blocks_of(memoryview(GOLDEN), 8292, item_bytes=2, parameters=PARAMETERS)
    assert blocks == (AnsBlock(16, 5, 4096), AnsBlock(32, 4096, 4096), AnsBlock(4128, 10, 100))
    assert [block.is_encoded for block in blocks] == [True, False, True]


def test_the_table_is_written_as_it_was_defined():
    """What an encoder lays out is the golden form."""
    begins, end = places([5, 4096, 10])
    room = bytearray(end)
    room[:12] = table([5, 4096, 10])
    for begin, block in zip(begins, (b"first", bytes(range(256)) * 16, b"last block"), strict=True):
        room[begin : begin + len(block)] = block
    assert bytes(room) == GOLDEN


def test_a_gpu_writes_that_form(machine):
    """Blocks begin at multiples of 16 with zeros before them, noise is stored as it is, and memory used before does not show."""
    raw = bf16_weights(2_000) + NOISE[:4096] + bf16_weights(50)
    encoder = AnsEncoder(machine.gpu, machine.frames(), 1 << 20, block_bytes=4096)
    stream = Stream(machine.gpu)
    memory = DeviceMemory(machine.gpu, len(raw))
    for content in (NOISE[: len(raw)], raw):
        source, _kept = host_address(memoryview(content))
        stream.copy_in(memory.address, source, len(raw))
        stored = encoder.encode(memory.address, len(raw), item_bytes=2, most_bytes=1 << 20, stream=stream)
    blocks = blocks_of(stored.data, len(raw), item_bytes=2, parameters=stored.parameters)
    assert stored.parameters == {"block_bytes": 4096, "nvcomp": "6.0.0"}
    assert [block.is_encoded for block in blocks] == [True, False, False]
    end = 4 * len(blocks)
    for block in blocks:
        assert block.offset_bytes % ALIGNMENT_BYTES == 0
        assert not any(stored.data[end : block.offset_bytes])
        end = block.offset_bytes + block.stored_bytes
    assert bytes(stored.data[blocks[1].offset_bytes :][:4096]) == raw[4096:8192]
    assert encoder.encode(memory.address, len(raw), item_bytes=2, most_bytes=end - 1, stream=stream) is None


def lengths(*of: int) -> bytes:
    """A stored chunk with a table that says so, and as many bytes as that takes."""
    _, end = places(of)
    head = struct.pack(f"<{len(of)}I", *of)
    return head + bytes(end - len(head))


@pytest.mark.parametrize(
    ("stored", "raw_bytes", "item_bytes", "parameters"),
    [
        (GOLDEN, 8292, 2, {}),
        (GOLDEN, 8292, 2, {"block_bytes": "4096"}),
        (GOLDEN, 8292, 2, {"block_bytes": 16}),
        (GOLDEN, 8292, 2, {"block_bytes": 1 << 30}),
        (GOLDEN, 8292, 2, {"block_bytes": 4100}),
        (GOLDEN, 12_289, 2, PARAMETERS),
        (GOLDEN, 4096, 2, PARAMETERS),
        (GOLDEN, 0, 2, PARAMETERS),
        (GOLDEN[:-1], 8292, 2, PARAMETERS),
        (GOLDEN + b"\0", 8292, 2, PARAMETERS),
        (GOLDEN[:11], 8292, 2, PARAMETERS),
        (b"", 8292, 2, PARAMETERS),
        (lengths(0), 4096, 2, PARAMETERS),
        (lengths(4097), 4096, 2, PARAMETERS),
        (lengths(100), 4095, 2, PARAMETERS),
    ],
)
def test_claims_that_do_not_hold_are_refused(stored, raw_bytes, item_bytes, parameters):
    """A table, block size or length that cannot be is a CodecError, before nvCOMP has seen a byte."""
    with pytest.raises(CodecError):
        AnsCodec().check(memoryview(stored), raw_bytes, item_bytes=item_bytes, parameters=parameters)


@given(st.binary(max_size=200), st.integers(0, 20_000), st.sampled_from([1, 2, 4]))
def test_any_bytes_are_read_or_refused(stored, raw_bytes, item_bytes):
    """Whatever the bytes, blocks that are accepted lie inside them and give just what they have to."""
    try:
        blocks = blocks_of(memoryview(stored), raw_bytes, item_bytes=item_bytes, parameters=PARAMETERS)
    except CodecError:
        return
    assert sum(block.raw_bytes for block in blocks) == raw_bytes
    assert all(0 < block.stored_bytes <= block.raw_bytes for block in blocks)
    assert max((block.offset_bytes + block.stored_bytes for block in blocks), default=0) == len(stored)


def test_a_processor_says_what_it_cannot_do():
    """Without a GPU both directions are refused, with what to do instead."""
    with pytest.raises(CodecError, match="own form"):
        AnsCodec().decode(memoryview(GOLDEN), memoryview(bytearray(8292)), item_bytes=2, parameters=PARAMETERS)
    with pytest.raises(CodecError, match="only a GPU encodes"):
        AnsCodec().encode(memoryview(b"ab"), item_bytes=2)


def test_the_name_says_the_major_version_of_nvcomp():
    """The codec is named after the nvCOMP that reads it, known to manifests, and no codec of a chunk's own form."""
    assert (f"nvcomp-ans/{MAJOR}",) == FOR_DEVICES
    assert codec(FOR_DEVICES[0]).id == FOR_DEVICES[0]
    assert not set(FOR_DEVICES) & set(NAMES)
    with pytest.raises(ConfigError):
        choose(memoryview(b""), item_bytes=2, setting=FOR_DEVICES[0])
    with pytest.raises(CodecError, match="unknown codec"):
        codec(f"nvcomp-ans/{MAJOR + 1}")


def test_blocks_are_of_a_size_that_nvcomp_takes():
    """The longest block that a manifest may claim is the longest that nvCOMP encodes."""
    stored = lengths(10)
    blocks_of(memoryview(stored), ANS_MAX_RAW_BYTES, item_bytes=2, parameters={"block_bytes": ANS_MAX_RAW_BYTES})
    with pytest.raises(CodecError):
        blocks_of(memoryview(stored), 32, item_bytes=2, parameters={"block_bytes": ANS_MAX_RAW_BYTES + 16})


def test_the_setting_is_for_gpus():
    """Whoever asks for ANS without a GPU is told so at the start, with what to use."""
    check_setting("nvcomp-ans", "cuda")
    check_setting("auto", "cpu")
    with pytest.raises(ConfigError, match=r"COLDSTART_CODEC=nvcomp-ans.*device cpu: use auto"):
        check_setting("nvcomp-ans", "cpu")
