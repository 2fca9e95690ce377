"""nginx as the object server: GET, HEAD and ranges of a folder's files by ``/bucket/key``, plain and over TLS.

It looks at no signature, lists nothing and writes nothing. A folder store writes the same keys as files, so what
coldstart published into ``ROOT/bucket/prefix`` is read as ``s3://bucket/prefix``.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

START_SECONDS = 10.0
_PLACES = ("/usr/sbin", "/usr/local/sbin")

_CONFIGURATION = """
daemon off;
{user}
worker_processes auto;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    tcp_nodelay on;
    keepalive_timeout 600;
    keepalive_requests 1000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{plain};
        listen 127.0.0.1:{tls} ssl;
        ssl_certificate {folder}/certificate.pem;
        ssl_certificate_key {folder}/key.pem;
        root {root};
    }}
}}
"""


def nginx() -> str | None:
    """The path of nginx, None where it is not installed. It lies where users other than root do not look."""
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES]))


class ObjectServer:
    """nginx over ``root``, its own files in ``folder``. ``within``: a command before it, such as ``ip netns exec NAME``."""

    def __init__(self, root: Path, folder: Path, *, within: Sequence[str] = ()) -> None:
        self._root = root
        self._folder = folder
        self._within = tuple(within)
        self._process: subprocess.Popen[bytes] | None = None
        self.plain_port, self.tls_port = _free_ports(2)
        self.certificate = folder / "certificate.pem"

    @property
    def url(self) -> str:
        """The plain endpoint."""
        return f"http://127.0.0.1:{self.plain_port}"

    @property
    def tls_url(self) -> str:
        """The endpoint that shows the certificate."""
        return f"https://127.0.0.1:{self.tls_port}"

    def __enter__(self) -> Self:
        """Start it and wait until it answers. Raises RuntimeError where it does not."""
        program = nginx()
        if program is None:
            raise RuntimeError("nginx is not installed: apt-get install nginx-light")
        self._folder.mkdir(parents=True, exist_ok=True)
        _write_certificate(self._folder)
        configuration = self._folder / "nginx.conf"
        configuration.write_text(self._configuration())
        self._process = subprocess.Popen(
            [
                *self._within,
                program,
                "-p",
                str(self._folder),
                "-e",
                str(self._folder / "error.log"),
                "-c",
                configuration,
            ],
            start_new_session=True,
        )
        try:
            self._wait_until_it_answers(self._process)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _configuration(self) -> str:
        return _CONFIGURATION.format(
            user="user root;" if os.geteuid() == 0 else "",  # else root's workers could not read root's cache folder
            folder=self._folder,
            root=self._root,
            plain=self.plain_port,
            tls=self.tls_port,
        )

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        """Its pid file is written once it listens. Its port cannot be tried from outside of a network namespace."""
        ends = time.monotonic() + START_SECONDS
        while not (self._folder / "nginx.pid").exists():
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"nginx did not start: {(self._folder / 'error.log').read_text()[-2000:]}")
            time.sleep(0.01)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
            with suppress(subprocess.TimeoutExpired):
                process.wait(START_SECONDS)
                return


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    found = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in found]
    for each in found:
        each.close()
    return ports


def _write_certificate(folder: Path) -> None:
    """A certificate for 127.0.0.1 that signs itself, valid for a day."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    subprocess.run(command, check=True, capture_output=True)
