"""An S3 server of this machine over the files of a folder store, that keeps connections open and errs where it is told to."""

from __future__ import annotations

import re
import select
import socket
import struct
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BUCKET = "bucket/prefix"
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
WAIT_SECONDS = 60.0


class Fault(NamedTuple):
    """What goes wrong with one answer: ``status`` instead of it, a ``flip`` of its first byte, or an end after half of it.

    ``ending``: ``stall`` (send nothing more until the test is over), ``reset``, or "".
    """

    status: int = 0
    flip: bool = False
    ending: str = ""


FINE = Fault()
STALL, RESET, FLIP = Fault(ending="stall"), Fault(ending="reset"), Fault(flip=True)


class FaultyServer:
    """Serves the store in ``folder``. ``fault`` says what goes wrong with a GET of a key, and is told how many came before.

    It is called in the thread that answers, one call at a time. ``asked`` has the keys of all GETs, in order;
    ``written`` the paths of all PUTs, which are refused.
    """

    def __init__(self, folder: Path, fault: Callable[[str, int], Fault] = lambda *_: FINE) -> None:
        self.asked: list[str] = []
        self.written: list[str] = []
        self._folder = folder
        self._fault = fault
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._stalled: list[socket.socket] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        """The settings of a worker that uses this store."""
        return settings_of(self._server.server_port)

    def blobs_asked(self) -> list[str]:
        """The blobs of all GETs so far, in order."""
        with self._lock:
            return [key.rpartition("/")[2] for key in self.asked if key.startswith("blobs/")]

    def waits_for_stalled(self) -> bool:
        """Whether somebody still waits for the first answer that stalled."""
        poll = select.poll()
        poll.register(self._stalled[0], select.POLLIN)
        return not poll.poll(0)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(WAIT_SECONDS)

    def _next_fault(self, key: str) -> Fault:
        with self._lock:
            before = self.asked.count(key)
            self.asked.append(key)
            return self._fault(key, before)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = WAIT_SECONDS
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                with suppress(OSError):
                    self.answer()

            def do_PUT(self) -> None:
                outer.written.append(self.path)
                self.send_error(403)

            def log_message(self, *_: object) -> None:
                """Nothing is told on standard error."""

            def answer(self) -> None:
                key = self.path.removeprefix(f"/{BUCKET}/")
                fault = outer._next_fault(key)
                path = outer._folder / key
                if fault.status or not path.is_file():
                    self.refuse(fault.status or 404)
                    return
                data = bytearray(path.read_bytes())
                if fault.flip:
                    data[0] ^= 0x55
                self.give(fault, data)

            def give(self, fault: Fault, data: bytearray) -> None:
                found = _RANGE.fullmatch(self.headers.get("Range", ""))
                first, last = (int(found[1]), int(found[2])) if found else (0, len(data) - 1)
                body = memoryview(data)[first : last + 1]
                self.send_response_only(206 if found else 200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"e"')
                if found:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if fault.ending else body)
                self.finish_badly(fault.ending)

            def finish_badly(self, ending: str) -> None:
                if ending == "stall":
                    outer._stalled.append(self.connection)
                    outer._over.wait(WAIT_SECONDS)
                if ending == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                self.close_connection = bool(ending)

            def refuse(self, status: int) -> None:
                code = {403: "AccessDenied", 404: "NoSuchKey", 503: "SlowDown"}[status]
                text = f"<Error><Code>{code}</Code></Error>".encode()
                self.send_response_only(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        return Handler


def settings_of(port: int) -> dict[str, str]:
    """The settings of a worker whose store is the S3 server on a port of this machine."""
    return {
        "COLDSTART_STORE": f"s3://{BUCKET}",
        "COLDSTART_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "COLDSTART_ACCESS_KEY_ID": "id",
        "COLDSTART_SECRET_ACCESS_KEY": "secret",
    }
