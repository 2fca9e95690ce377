"""Messages between a worker and its saver: a header of two lengths, a JSON document, and bytes."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import socket

_LENGTHS = struct.Struct("<II")


class Message(NamedTuple):
    """One message."""

    document: dict[str, Any]
    data: bytes = b""


def send(wire: socket.socket, document: dict[str, Any], data: bytes = b"") -> None:
    """Send one message; one thread at a time. Raises OSError where the other side has ended."""
    text = json.dumps(document).encode()
    wire.sendall(b"".join((_LENGTHS.pack(len(text), len(data)), text, data)))


def receive(wire: socket.socket) -> Message | None:
    """The next message, None if the other side ended before it was whole. Raises OSError."""
    lengths = _exactly(wire, _LENGTHS.size)
    if lengths is None:
        return None
    text_bytes, data_bytes = _LENGTHS.unpack(lengths)
    body = _exactly(wire, text_bytes + data_bytes)
    return None if body is None else Message(json.loads(body[:text_bytes]), body[text_bytes:])


def _exactly(wire: socket.socket, size_bytes: int) -> bytes | None:
    room = memoryview(bytearray(size_bytes))
    done = 0
    while done < size_bytes:
        count = wire.recv_into(room[done:])
        if not count:
            return None
        done += count
    return bytes(room)
