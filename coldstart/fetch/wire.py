"""Messages between a worker and its fetcher: four bytes of length, then JSON, over a socket pair.

A message may bring file descriptors, which travel with its first bytes (SCM_RIGHTS).
"""

from __future__ import annotations

import json
import socket
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

WIRE_FD = 3
"""The fetcher's end of the wire."""

_LENGTH = struct.Struct("<I")


_MOST_DESCRIPTORS = 2
_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
"""What comes must not go on to programs that the user's code starts."""


def send(wire: socket.socket, document: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one message. Raises OSError where the other side has ended."""
    data = json.dumps(document).encode()
    socket.send_fds(wire, [_LENGTH.pack(len(data))], list(descriptors))
    wire.sendall(data)


def receive(wire: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The other side's message, None if it ended before it was whole, and the descriptors that came with it."""
    head, descriptors, _, _ = socket.recv_fds(wire, _LENGTH.size, _MOST_DESCRIPTORS, _FLAGS)
    rest = _exactly(wire, _LENGTH.size - len(head)) if head else None
    data = None if rest is None else _exactly(wire, *_LENGTH.unpack(head + rest))
    if data is None:
        return None, descriptors
    document: dict[str, Any] = json.loads(data)
    return document, descriptors


def _exactly(wire: socket.socket, size_bytes: int) -> bytes | None:
    data = bytearray(size_bytes)
    view = memoryview(data)
    done = 0
    while done < size_bytes:
        received = wire.recv_into(view[done:])
        if not received:
            return None
        done += received
    return bytes(data)
