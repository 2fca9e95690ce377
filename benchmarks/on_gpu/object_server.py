"""Objects of a folder over HTTP on the loopback, in processes of their own: what S3 answers to GET and HEAD, at a given rate.

    python -m benchmarks.on_gpu.object_server FOLDER BYTES_PER_SECOND

It takes any bucket's name and any signature. The rate, 0 for no limit, is that of all connections together.
"""

from __future__ import annotations

import os
import re
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent.parent
PIECE_BYTES = 1 << 20
START_SECONDS = 20.0
_RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")


class Rate:
    """Lets so many bytes a second pass."""

    def __init__(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._free_seconds = 0.0
        self._lock = threading.Lock()

    def wait(self, length_bytes: int) -> None:
        """Wait for the turn of so many bytes."""
        if not self._bytes_per_second:
            return
        with self._lock:
            now = time.monotonic()
            self._free_seconds = max(self._free_seconds, now) + length_bytes / self._bytes_per_second
            wait_seconds = self._free_seconds - now
        time.sleep(max(0.0, wait_seconds))


def handler_of(folder: Path, allowed: Rate) -> type[BaseHTTPRequestHandler]:
    """The class that answers requests."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def _answer(self, *, with_body: bool) -> None:
            path = folder / self.path.partition("?")[0].lstrip("/").partition("/")[2]
            if ".." in path.parts or not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                begin, end = self._wanted(size)
                self.send_response(206 if self.headers.get("Range") else 200)
                self.send_header("Content-Length", str(end - begin))
                self.send_header("ETag", f'"{path.name[:32]}"')
                self.send_header("Last-Modified", self.date_time_string(0))
                self.send_header("Accept-Ranges", "bytes")
                if self.headers.get("Range"):
                    self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
                self.end_headers()
                self.wfile.flush()
                if with_body:
                    self._send(file.fileno(), begin, end)

        def _wanted(self, size: int) -> tuple[int, int]:
            found = _RANGE.match(self.headers.get("Range") or "")
            if not found:
                return 0, size
            return int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)

        def _send(self, descriptor: int, begin: int, end: int) -> None:
            while begin < end:
                length = min(PIECE_BYTES, end - begin)
                allowed.wait(length)
                begin += os.sendfile(self.connection.fileno(), descriptor, begin, length)

    return Handler


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def handle_error(self, *_: Any) -> None:
        """A client that went away is none of ours."""


class ObjectServer:
    """A server for a block: a process of its own, so that it takes no turn of the reader's interpreter."""

    def __init__(self, folder: str, *, bytes_per_second: float = 0.0) -> None:
        self._command = [sys.executable, "-m", "benchmarks.on_gpu.object_server", folder, str(bytes_per_second)]
        self.url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        if not port:
            raise RuntimeError("the server of objects did not start")
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def main(folder: str, bytes_per_second: float) -> None:
    """Serve until standard input ends."""
    with _Server(("127.0.0.1", 0), handler_of(Path(folder), Rate(bytes_per_second))) as server:
        print(server.server_address[1], flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdin.read()
        server.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
