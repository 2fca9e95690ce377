"""A proxy between a client and an S3 server that errs by rules: on the way there, on the way back, before or after a write."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import re
import socket
import struct
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_SECONDS = 60.0
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_HOP = {"connection", "transfer-encoding", "expect", "keep-alive"}
CODES = {
    301: "PermanentRedirect",
    307: "TemporaryRedirect",
    400: "BadDigest",
    403: "ExpiredToken",
    404: "NoSuchKey",
    408: "RequestTimeout",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}


class Rule(NamedTuple):
    """What happens to requests of ``method`` whose key begins with ``prefix``: after ``skip`` of them, to ``times`` (None: all).

    ``action``, before the server hears of it: ``reset_before``, ``refuse`` (``status``, with an S3 error), ``flip_up`` (a bit of the
    body, which the server's checksum notices). After the server has done it: ``reset_after``, ``refuse_after``, ``stall_after``.
    To the answer: ``flip``, ``truncate`` (ends early), ``shorten`` (half, as if that were all), ``reset``, ``stall``, ``trickle``,
    ``whole`` (a range is ignored), ``shifted`` (another range, and says so), ``lying`` (another range, and says nothing),
    ``error200`` and ``html200`` (a text instead, with status 200), ``no_etag``, ``gzip`` (compressed, unasked).
    """

    action: str
    method: str = "GET"
    prefix: str = ""
    times: int | None = 1
    skip: int = 0
    status: int = 503


class FaultProxy:
    """Stands before the server at ``upstream``, whose bucket is ``bucket``. Safe from several threads.

    ``seen``: method and key of every request, in order; ``struck``: the actions that took place. ``chance``: asked for every
    request that no rule concerns, for an action or None.
    """

    def __init__(self, upstream: str, bucket: str, *rules: Rule) -> None:
        self.seen: list[tuple[str, str]] = []
        self.struck: list[str] = []
        self.chance: Callable[[str, str], Rule | None] = lambda *_: None
        self._rules = list(rules)
        self._upstream = upstream.removeprefix("http://")
        self._root = f"/{bucket}/"
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """Its own address."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(self, *rules: Rule) -> None:
        """Have further rules, after those that there are."""
        with self._lock:
            self._rules.extend(rules)

    def heal(self) -> None:
        """Have no rules, and no chances."""
        with self._lock:
            self._rules.clear()
        self.chance = lambda *_: None

    def count(self, method: str, prefix: str = "") -> int:
        """Requests so far."""
        with self._lock:
            return sum(one == method and key.startswith(prefix) for one, key in self.seen)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(WAIT_SECONDS)

    def _due(self, method: str, key: str) -> Rule | None:
        with self._lock:
            self.seen.append((method, key))
            for place, rule in enumerate(self._rules):
                if rule.method != method or not key.startswith(rule.prefix) or rule.times == 0:
                    continue
                if rule.skip:
                    self._rules[place] = rule._replace(skip=rule.skip - 1)
                    continue
                self._rules[place] = rule._replace(times=None if rule.times is None else rule.times - 1)
                return self._strike(rule)
            rule = self.chance(method, key)
            return None if rule is None else self._strike(rule)

    def _strike(self, rule: Rule) -> Rule:
        self.struck.append(rule.action)
        return rule

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = WAIT_SECONDS
            disable_nagle_algorithm = True

            def handle(self) -> None:
                with suppress(OSError):
                    super().handle()

            def log_message(self, *_: object) -> None:
                """Nothing is told on standard error."""

            def do_GET(self) -> None:
                self.pass_on()

            do_HEAD = do_PUT = do_DELETE = do_GET

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                rule = outer._due(self.command, self.path.partition("?")[0].removeprefix(outer._root))
                action = rule.action if rule else ""
                if action == "reset_before":
                    return self.reset()
                if action == "refuse":
                    return self.refuse(rule.status)
                if action == "flip_up":
                    body = bytes([body[0] ^ 1]) + body[1:]
                wanted = self.headers.get("Content-MD5")
                if wanted and wanted != base64.b64encode(hashlib.md5(body).digest()).decode():
                    return self.refuse(400)  # what servers do, and moto does not
                status, headers, data = self.ask(body, action)
                if action == "reset_after":
                    return self.reset()
                if action == "refuse_after":
                    return self.refuse(rule.status)
                if action == "stall_after":
                    return self.wait()
                return self.answer(action, status, headers, data)

            def ask(self, body: bytes, action: str) -> tuple[int, dict[str, str], bytes]:
                """The server's answer, to the question that was asked or to another."""
                headers = {name: text for name, text in self.headers.items() if name.lower() not in _HOP}
                found = _RANGE.fullmatch(self.headers.get("Range", ""))
                if found and action in ("whole", "shifted"):
                    headers = {name: text for name, text in headers.items() if name.lower() != "range"}
                if found and action == "shifted":
                    first, last = int(found[1]), int(found[2])
                    headers["Range"] = f"bytes={first}-{last - 1}"
                connection = http.client.HTTPConnection(outer._upstream, timeout=WAIT_SECONDS)
                try:
                    connection.request(self.command, self.path, body or None, headers)
                    answer = connection.getresponse()
                    kept = {name: text for name, text in answer.getheaders() if name.lower() not in _HOP}
                    return answer.status, kept, answer.read()
                finally:
                    connection.close()

            def answer(self, action: str, status: int, headers: dict[str, str], data: bytes) -> None:
                found = _RANGE.fullmatch(self.headers.get("Range", ""))
                if action == "flip" and data:
                    data = bytes([data[0] ^ 1]) + data[1:]
                if action in ("error200", "html200"):
                    text = (
                        "<Error><Code>InternalError</Code></Error>" if action == "error200" else "<html>sign in</html>"
                    )
                    status, data = 200, text.encode()
                if action == "lying":
                    data = data[1:] + data[:1]
                if action == "shorten":
                    data = data[: len(data) // 2]
                    if found:
                        total = headers.get("Content-Range", "/*").rpartition("/")[2]
                        headers["Content-Range"] = f"bytes {found[1]}-{int(found[1]) + len(data) - 1}/{total}"
                if action == "gzip":
                    headers["Content-Encoding"], data = "gzip", gzip.compress(data)
                self.send_response_only(status)
                for name, text in headers.items():
                    if name.lower() != "content-length" and not (name.lower() == "etag" and action == "no_etag"):
                        self.send_header(name, text)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.send_body(action, data)

            def send_body(self, action: str, data: bytes) -> None:
                half = len(data) // 2
                if action == "truncate":
                    self.wfile.write(data[:half])
                    self.close_connection = True
                elif action == "reset":
                    self.wfile.write(data[:half])
                    self.reset()
                elif action == "stall":
                    self.wfile.write(data[:half])
                    self.wait()
                elif action == "trickle":
                    for start in range(len(data)):
                        if outer._over.wait(0.05):
                            break
                        self.wfile.write(data[start : start + 1])
                    self.close_connection = True
                else:
                    self.wfile.write(data)

            def refuse(self, status: int) -> None:
                text = f"<Error><Code>{CODES[status]}</Code></Error>".encode()
                self.send_response_only(status)
                self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)

            def reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True

            def wait(self) -> None:
                self.close_connection = True
                outer._over.wait(WAIT_SECONDS)

        return Handler
