"""The contract suite of codecs: subclass ``CodecContract`` in a test module and say how your codec is made."""

from __future__ import annotations

import json
import random
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest

from coldstart.errors import CodecError

if TYPE_CHECKING:
    from coldstart.codecs.base import Codec

_GUARD = b"\xa5" * 64


def _weights(count: int) -> bytes:
    """Numbers around zero as trained weights are, as float32: bytes that compress a little."""
    random_ = random.Random(7)  # noqa: S311  test data, not a secret
    return struct.pack(f"<{count}f", *(random_.gauss(0, 0.02) for _ in range(count)))


_RANDOM = random.Random(11)  # noqa: S311  test data, not a secret
CORPUS: dict[str, bytes] = {
    "one byte": b"x",
    "odd length": bytes(range(251)) * 3,
    "zeros": bytes(300_000),
    "text": b"the quick brown fox jumps over the lazy dog, " * 5000,
    "random": _RANDOM.randbytes(300_001),
    "weights": _weights(80_000),
    "zeros, then random": bytes(200_000) + _RANDOM.randbytes(200_000),
}
"""Raw chunks by what is special about them."""


class CodecContract:
    """What every codec promises: see ``coldstart.codecs.base``. A subclass overrides ``make``."""

    def make(self) -> Codec:
        """Return the codec under test."""
        raise NotImplementedError

    def decode(self, stored: bytes | memoryview, length_bytes: int, parameters: Any, *, item_bytes: int) -> bytes:
        """Decode into the middle of a larger buffer, and check that nothing around the target was written."""
        room = bytearray(_GUARD + b"\x5a" * length_bytes + _GUARD)
        target = memoryview(room)[len(_GUARD) : len(_GUARD) + length_bytes]
        try:
            self.make().decode(memoryview(stored), target, item_bytes=item_bytes, parameters=parameters)
        finally:
            assert room.startswith(_GUARD)
            assert room.endswith(_GUARD)
        return bytes(target)

    @pytest.mark.parametrize("item_bytes", [1, 2, 4, 8])
    @pytest.mark.parametrize("name", CORPUS)
    def test_round_trip(self, name: str, item_bytes: int) -> None:
        """What was encoded decodes to the same bytes, from read-only memory, and the parameters survive JSON."""
        raw = CORPUS[name]
        stored, parameters = self.make().encode(memoryview(raw), item_bytes=item_bytes)
        parameters = json.loads(json.dumps(dict(parameters)))
        assert all(type(value) in (int, str) for value in parameters.values())
        assert self.decode(bytes(stored), len(raw), parameters, item_bytes=item_bytes) == raw

    @pytest.mark.parametrize("name", CORPUS)
    def test_encode_leaves_its_input_alone(self, name: str) -> None:
        """Live memory is handed to encode, so encode must not write to it."""
        raw = bytearray(CORPUS[name])
        self.make().encode(memoryview(raw), item_bytes=2)
        assert raw == CORPUS[name]

    @pytest.mark.parametrize("name", CORPUS)
    def test_encoding_is_repeatable(self, name: str) -> None:
        """The same bytes give the same stored bytes, or equal chunks would not share a blob."""
        first, second = (self.make().encode(memoryview(CORPUS[name]), item_bytes=4) for _ in range(2))
        assert (bytes(first[0]), dict(first[1])) == (bytes(second[0]), dict(second[1]))

    @pytest.mark.parametrize("name", CORPUS)
    def test_growth_is_bounded(self, name: str) -> None:
        """Stored bytes exceed raw ones by no more than a manifest allows."""
        stored, _ = self.make().encode(memoryview(CORPUS[name]), item_bytes=4)
        assert len(stored) <= len(CORPUS[name]) * 9 // 8 + (64 << 10)

    @pytest.mark.parametrize("name", CORPUS)
    def test_another_raw_length_is_refused(self, name: str) -> None:
        """The manifest's length decides: a frame that would give fewer or more bytes raises CodecError."""
        stored, parameters = self.make().encode(memoryview(CORPUS[name]), item_bytes=1)
        length = len(CORPUS[name])
        for wrong in {length - 1, length + 1, 2 * length, 0}:
            with pytest.raises(CodecError):
                self.decode(bytes(stored), wrong, parameters, item_bytes=1)

    @pytest.mark.parametrize("name", CORPUS)
    def test_stored_bytes_cut_short_are_refused(self, name: str) -> None:
        """Any part of the stored bytes, none included, raises CodecError."""
        stored, parameters = self.make().encode(memoryview(CORPUS[name]), item_bytes=1)
        for kept in sorted({0, 1, len(stored) // 3, len(stored) // 2, len(stored) - 1} - {len(stored)}):
            with pytest.raises(CodecError):
                self.decode(bytes(stored[:kept]), len(CORPUS[name]), parameters, item_bytes=1)

    @pytest.mark.parametrize("tail", [b"\0", b"tail", None], ids=["zero", "text", "the same again"])
    @pytest.mark.parametrize("name", CORPUS)
    def test_trailing_bytes_are_refused(self, name: str, tail: bytes | None) -> None:
        """Bytes behind the end raise CodecError, even where they are a second frame."""
        stored, parameters = self.make().encode(memoryview(CORPUS[name]), item_bytes=1)
        longer = bytes(stored) + (bytes(stored) if tail is None else tail)
        with pytest.raises(CodecError):
            self.decode(longer, len(CORPUS[name]), parameters, item_bytes=1)

    @pytest.mark.parametrize("name", CORPUS)
    def test_altered_bytes_do_no_harm(self, name: str) -> None:
        """Altered bytes raise CodecError or decode to as many bytes; nothing else happens, nowhere else is written."""
        encoded, parameters = self.make().encode(memoryview(CORPUS[name]), item_bytes=2)
        random_ = random.Random(3)  # noqa: S311  test data, not a secret
        for _ in range(60):
            stored = bytearray(encoded)
            position = random_.choice((random_.randrange(len(stored)), random_.randrange(min(16, len(stored)))))
            stored[position] ^= 1 << random_.randrange(8)
            try:
                self.decode(bytes(stored), len(CORPUS[name]), parameters, item_bytes=2)
            except CodecError:
                continue

    def test_one_instance_serves_many_threads(self) -> None:
        """Threads that share an instance do not disturb each other."""
        codec = self.make()
        failures: list[str] = []

        def work(name: str) -> None:
            for _ in range(5):
                stored, parameters = codec.encode(memoryview(CORPUS[name]), item_bytes=4)
                target = bytearray(len(CORPUS[name]))
                codec.decode(memoryview(stored), memoryview(target), item_bytes=4, parameters=parameters)
                if target != CORPUS[name]:
                    failures.append(name)

        threads = [threading.Thread(target=work, args=(name,)) for name in [*CORPUS, *CORPUS]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
