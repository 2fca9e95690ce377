"""A server of this machine that sends the very bytes it was told to, over TCP or TLS, and keeps what it was asked."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    import ssl

WAIT_SECONDS = 30.0


class Said(NamedTuple):
    """What the server does when asked once: send ``pieces``, each after ``pause_seconds``, then end so.

    ``ending``: keep (wait for the next request), close, reset, or hold (send nothing more, until the test is over).
    """

    pieces: tuple[bytes, ...]
    ending: str = "keep"
    pause_seconds: float = 0.0


class Asked(NamedTuple):
    """One request. ``connection``: the number of the connection that it came on, from 0."""

    connection: int
    line: str
    headers: dict[str, str]


def said(
    body: bytes = b"", *, status: str = "200 OK", ending: str = "keep", announced: int | None = None, **headers: str
) -> Said:
    """An answer in order, but for what is asked to be out of it. Names of headers are given with _ for -."""
    length = len(body) if announced is None else announced
    fields = {"Content-Length": str(length), "ETag": '"e"', **{n.replace("_", "-"): v for n, v in headers.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return Said((f"HTTP/1.1 {status}\r\n{lines}\r\n".encode("latin-1") + body,), ending)


def said_range(start: int, body: bytes, total: int, **more: object) -> Said:
    """The answer to a range of ``body``'s length."""
    span = f"bytes {start}-{start + len(body) - 1}/{total}"
    return said(body, status="206 Partial Content", Content_Range=span, **more)  # type: ignore[arg-type]


class RawServer:
    """Gives its ``answers`` in order, whatever is asked on whichever connection. A server without one closes."""

    def __init__(self, context: ssl.SSLContext | None = None, *, host: str = "127.0.0.1") -> None:
        self.answers: list[Said] = []
        self.asked: list[Asked] = []
        self.connections = 0
        self._context = context
        self._over = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=64)
        shown = f"[{host}]" if ":" in host else host
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if context else 'http'}://{shown}:{self.port}"
        self._threads = [threading.Thread(target=self._accept)]
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT_SECONDS)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                thread = threading.Thread(target=self._serve, args=(client, self.connections))
                self.connections += 1
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket, number: int) -> None:
        client.settimeout(WAIT_SECONDS)
        with client, suppress(OSError):
            if self._context is not None:
                client = self._context.wrap_socket(client, server_side=True)
            with client, client.makefile("rb") as incoming:
                while request := _request(incoming, number):
                    self.asked.append(request)
                    answer = self.answers.pop(0) if self.answers else Said((), "close")
                    if not self._give(client, answer):
                        return

    def _give(self, client: socket.socket, answer: Said) -> bool:
        for piece in answer.pieces:
            if answer.pause_seconds and self._over.wait(answer.pause_seconds):
                return False
            client.sendall(piece)
        if answer.ending == "hold":
            self._over.wait(WAIT_SECONDS)
        if answer.ending == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return answer.ending == "keep"


def _request(incoming: object, number: int) -> Asked | None:
    lines = list(iter(lambda: incoming.readline().decode("latin-1").strip(), ""))  # type: ignore[attr-defined]
    if not lines:
        return None
    fields = (line.partition(": ") for line in lines[1:])
    return Asked(number, lines[0], {name.lower(): value for name, _, value in fields})
