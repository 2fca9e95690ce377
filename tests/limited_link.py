"""A limited link to a server of this machine: every connection's bytes pass through, at the given rate in all."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

PIECE_BYTES = 64 << 10
SLACK_SECONDS = 0.05
"""Time that a sleep lasted too long and the link may catch up, or its rate would be lower than it says."""


class Direction:
    """One way of the link. ``bytes_per_second``: its rate, shared by all connections, 0 for no limit; may be changed."""

    def __init__(self, bytes_per_second: float = 0.0) -> None:
        self.bytes_per_second = bytes_per_second
        self.passed_bytes = 0
        self._free_seconds = 0.0
        self._lock = threading.Lock()

    def wait_turn(self, length_bytes: int) -> None:
        """Wait until so many bytes may pass."""
        with self._lock:
            self.passed_bytes += length_bytes
            now = time.monotonic()
            took = length_bytes / self.bytes_per_second if self.bytes_per_second else 0.0
            self._free_seconds = max(self._free_seconds, now - SLACK_SECONDS) + took
            wait_seconds = self._free_seconds - now
        time.sleep(max(0.0, wait_seconds))


class LimitedLink:
    """Passes connections of its own port on to ``address``. ``up`` is what clients send, ``down`` what they get."""

    def __init__(self, host: str, port: int) -> None:
        self.up, self.down = Direction(), Direction()
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed: the link is over
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._sockets += (client, server)
                for pair in ((client, server, self.up), (server, client, self.down)):
                    threading.Thread(target=_pass_on, args=pair, daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket, direction: Direction) -> None:
    with suppress(OSError):
        while data := source.recv(PIECE_BYTES):
            direction.wait_turn(len(data))
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
