"""The HTTP side of serving: connections, requests and answers. What is answered, and when, is ``coldstart.adapters.http``."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import closing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any

from coldstart.adapters.admission import Busy
from coldstart.adapters.answers import described, encoded, identity_of, parsed
from coldstart.errors import EventError
from coldstart.loading import check_event
from coldstart.terms import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstart.adapters.http import HttpService

RETRY_SECONDS = 2
IDLE_SECONDS = 75.0
"""How long a connection may say nothing, or take nothing of its answer. Above what load balancers keep one open."""

STARTING = ("new", "starting")
"""States of a worker that is on its way."""


class Server(ThreadingHTTPServer):
    """Listens, and has a thread for each connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, service: HttpService) -> None:
        self.service = service
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Connection)

    def server_bind(self) -> None:
        """Without the base's look-up of the host's full name, which can take seconds in a container."""
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Gone(Exception):  # noqa: N818  the reader left: nobody is left to tell
    pass


class _Refused(Exception):  # noqa: N818  a request's answer
    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Connection(BaseHTTPRequestHandler):
    """One connection's requests, one after another."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"coldstart/{VERSION}", ""
    timeout = IDLE_SECONDS
    wbufsize = -1
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: Any) -> None:
        """Requests are counted, not logged."""

    def do_GET(self) -> None:
        """/ping and /metrics.json."""
        service, path = self.server.service, self.path.partition("?")[0]
        if path in service.health_paths:
            self._ping()
        elif path == "/metrics.json":
            self._answer(HTTPStatus.OK, encoded(**service.metrics()))
        else:
            self._refuse(_unknown(path, "POST" if path == "/run" else ""))

    def do_POST(self) -> None:
        """/run."""
        path = self.path.partition("?")[0]
        known = path in self.server.service.health_paths or path == "/metrics.json"
        try:
            if path != "/run":
                raise _unknown(path, "GET" if known else "")
            data = self._body()
        except _Refused as refused:
            self._refuse(refused)
            return
        with self.server.service.admission.present():
            self._run(data)

    def _ping(self) -> None:
        service = self.server.service
        state = "closing" if service.admission.ending else service.worker.state if service.worker else "new"
        if state in STARTING:
            self._answer(HTTPStatus.NO_CONTENT, "")
        else:
            status = HTTPStatus.OK if state == "ready" else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, encoded(state=state))

    def _body(self) -> bytes:
        """The request's body. Raises _Refused for one of unknown length, too long, or cut off."""
        most_bytes, length = self.server.service.most_body_bytes, self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "send the event with a Content-Length")
        if not length.isascii() or not length.isdigit():
            raise _Refused(HTTPStatus.BAD_REQUEST, f"Content-Length {length[:20]!r} is no length")
        if len(length) > 18 or int(length) > most_bytes:  # noqa: PLR2004  before int() of a million digits
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an event has at most {most_bytes} bytes")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise _Refused(HTTPStatus.BAD_REQUEST, f"the body ended after {len(data)} of {length} bytes")
        return data

    def _run(self, data: bytes) -> None:
        """Answer one event, whatever comes of it."""
        identity: Any = None
        try:
            event = parsed(data, "the body")
            identity = identity_of(event)
            event = check_event(event)
        except EventError as error:
            self._answer(HTTPStatus.BAD_REQUEST, encoded(id=identity, error=described(error)))
            return
        if identity is None:
            identity = event["id"] = f"http-{os.urandom(8).hex()}"
        try:
            self._answer_event(event, identity)
        except Busy:
            self._busy(identity)
        except _Gone:
            self.close_connection = True

    def _answer_event(self, event: Any, identity: Any) -> None:
        service = self.server.service
        with service.admission.place():
            assert service.answering is not None  # no place is free before
            if service.answering.is_stream:
                self._stream(service.answering.pieces(event), identity)
                return
            status, answer = HTTPStatus.OK, ""
            try:
                answer = encoded(id=identity, output=service.answering.output(event))
            except BaseException as error:  # noqa: BLE001  the request's edge, in a thread of its own
                status, answer = self._failure(error, identity)
        self._answer(status, answer)

    def _stream(self, pieces: Iterator[Any], identity: Any) -> None:
        """Pieces as they come, then the answer; an error before the first piece has the status of one."""
        gathered = []
        status, begun = HTTPStatus.OK, False
        try:
            with closing(pieces):  # type: ignore[type-var]  # a generator, of either kind
                for piece in pieces:
                    line = encoded(id=identity, piece=piece)
                    if not begun:
                        self._begin_stream()
                        begun = True
                    self._send_line(line)
                    gathered.append(piece)
            last = encoded(id=identity, output=gathered)
        except _Gone:
            raise
        except BaseException as error:  # noqa: BLE001  the request's edge, in a thread of its own
            status, last = self._failure(error, identity)
        if begun or status == HTTPStatus.OK:
            if not begun:
                self._begin_stream()
            self._send_line(last)
            self._end_stream()
        else:
            self._answer(status, last)

    def _failure(self, error: BaseException, identity: Any) -> tuple[HTTPStatus, str]:
        """An event's error as its answer. One that failed because the worker is being closed may be sent again."""
        service = self.server.service
        if service.admission.ending and (service.worker is None or service.worker.state != "ready"):
            raise Busy from error
        return HTTPStatus.INTERNAL_SERVER_ERROR, encoded(id=identity, error=described(error))

    def _busy(self, identity: Any) -> None:
        ending = self.server.service.admission.ending
        self.close_connection = self.close_connection or ending
        text = "the worker is ending" if ending else "too many events wait"
        self._answer(
            HTTPStatus.SERVICE_UNAVAILABLE,
            encoded(id=identity, error={"type": "Busy", "message": f"{text}: send it again"}),
            {"Retry-After": str(RETRY_SECONDS)},
        )

    # --- writing -----------------------------------------------------------------------------------------------------

    def _refuse(self, refused: _Refused) -> None:
        """An answer to a request whose body was not read: nothing more can be read from this connection."""
        self.close_connection = True
        self._answer(refused.status, encoded(error={"type": "Refused", "message": str(refused)}))

    def _answer(self, status: HTTPStatus, text: str, headers: dict[str, str] | None = None) -> None:
        data = f"{text}\n".encode() if text else b""
        try:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            if self.close_connection:
                self.send_header("Connection", "close")
            if data:
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()
        except OSError:
            self.close_connection = True

    def _begin_stream(self) -> None:
        self._is_chunked = self.request_version != "HTTP/1.0"
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/x-ndjson")
        if self._is_chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _send_line(self, line: str) -> None:
        data = f"{line}\n".encode()
        self._send(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)

    def _end_stream(self) -> None:
        if self._is_chunked:
            self._send(b"0\r\n\r\n")

    def _send(self, data: bytes) -> None:
        """Send now. Raises _Gone: an error of the connection, apart from those of the user's generator."""
        try:
            self.wfile.write(data)
            self.wfile.flush()
        except OSError as error:
            raise _Gone from error


def _unknown(path: str, method: str) -> _Refused:
    if method:
        return _Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"{path} takes {method}")
    return _Refused(HTTPStatus.NOT_FOUND, "there are POST /run, GET /ping and GET /metrics.json")
