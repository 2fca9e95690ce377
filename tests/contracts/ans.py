"""ANS under the contract of codecs: nvCOMP encodes and decodes, the fake one or a real one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coldstart.codecs.ans import AnsCodec, blocks_of
from coldstart.codecs.ans_gpu import AnsDecoder, AnsEncoder, AnsLimits, EncodedBlocks
from coldstart.devices.cuda_driver import Stream
from coldstart.devices.cuda_memory import DeviceMemory, copy_out, host_address
from coldstart.testing.codecs import CodecContract

if TYPE_CHECKING:
    from tests.fake_gpu.machine import FakeMachine


class OnGpu(AnsCodec):
    """The codec with a GPU at hand: each call with scratch of its own."""

    def __init__(self, machine: FakeMachine, block_bytes: int = 65_536) -> None:
        self._machine, self._block_bytes = machine, block_bytes
        self._library = machine.frames()

    def encode(self, raw, *, item_bytes):
        gpu, stream = self._machine.gpu, Stream(self._machine.gpu)
        memory = DeviceMemory(gpu, len(raw))
        source, _kept = host_address(raw.toreadonly())
        stream.copy_in(memory.address, source, len(raw))
        encoder = AnsEncoder(gpu, self._library, len(raw), block_bytes=self._block_bytes)
        stored = encoder.encode(
            memory.address, len(raw), item_bytes=item_bytes, most_bytes=2 * len(raw) + 64, stream=stream
        )
        return bytes(stored.data), stored.parameters

    def decode(self, stored, target, *, item_bytes, parameters):
        blocks = blocks_of(stored, len(target), item_bytes=item_bytes, parameters=parameters)
        gpu, stream = self._machine.gpu, Stream(self._machine.gpu)
        source, place = DeviceMemory(gpu, len(stored)), DeviceMemory(gpu, len(target))
        address, _kept = host_address(stored.toreadonly())
        stream.copy_in(source.address, address, len(stored))
        decoder = AnsDecoder(gpu, self._library, AnsLimits(len(blocks), parameters["block_bytes"]))
        decoder.decode([EncodedBlocks(source.address, place.address, item_bytes, blocks)], stream)
        stream.synchronize()
        decoder.check()
        target[:] = copy_out(gpu, place.address, len(target))


class AnsContract(CodecContract):
    """Give a fixture ``machine``."""

    @pytest.fixture(autouse=True)
    def _on_a_machine(self, machine: FakeMachine) -> None:
        self._machine = machine

    def make(self) -> OnGpu:
        return OnGpu(self._machine)


__all__ = ["AnsContract"]
