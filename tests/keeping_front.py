"""A front of an HTTP server of this machine that keeps connections open between requests, as real stores do.

The S3 server of the tests ends every connection after its answer, so nobody could forget one there.
"""

from __future__ import annotations

import http.client
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_SECONDS = 30.0


@contextmanager
def keeping_front(address: str) -> Iterator[str]:
    """The address of a front of the server at ``http://host:port``."""

    class Front(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = WAIT_SECONDS
        disable_nagle_algorithm = True  # or an answer's body would wait 40 ms for the receipt of its head

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            behind = http.client.HTTPConnection(address.removeprefix("http://"), timeout=WAIT_SECONDS)
            try:
                behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    behind.putheader(name, value)
                behind.endheaders(body)
                answer = behind.getresponse()
                data = answer.read()
                self.send_response_only(answer.status, answer.reason)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding"):
                        self.send_header(name, value)
                if not answer.getheader("Content-Length"):
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            finally:
                behind.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    with ThreadingHTTPServer(("127.0.0.1", 0), Front) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, name="keeping-front", daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(WAIT_SECONDS)
