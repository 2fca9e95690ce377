"""GET and HEAD over HTTP/1.1, straight into the caller's memory: connections kept for reuse, and a server not believed.

One ``ask`` is one attempt on one connection. What keeps it honest:

- an answer's head comes within ``answer_seconds`` and ``HEAD_BYTES``, and its body within a deadline by its length and
  never slower than the floor: a server that trickles is as good as one that is silent;
- a body has the length that the head gives. Only a refusal, whose text is short and not data, may be chunked;
- a connection is used again only if its last answer was read to the end and nothing has come since. Where one fails,
  those that lie idle are closed too: a restarted server, or a frozen and woken machine, has lost them all;
- a request that lasts says so to its ``Watch``, through which another thread can end it.

Redirects are answers like others. It knows no proxies. Looking up a
host's name has the resolver's own limits of time, not these.

TLS trusts what the system trusts, or the given file alone. ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` work as OpenSSL has
them. On a machine without any certificates (many GPU images) those that certifi or botocore bring are used.
"""

from __future__ import annotations

import os
import re
import select
import socket
import struct
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import StoreSetupError, StoreTransientError
from coldstart.stores.http1_answer import Answer, Limits

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping

_IDLE_CONNECTIONS = 64
_ENDPOINT = re.compile(
    r"(https?)://(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::(\d{0,5}))?(/[A-Za-z0-9._~/-]*)?", re.IGNORECASE
)
_WAITS_FOR_ALL = sys.platform == "linux"
"""Whether one system call waits for all bytes and SO_RCVTIMEO bounds the whole of it; elsewhere it bounds each wait."""


class Endpoint(NamedTuple):
    """A server. ``host`` is a name or an address without brackets; ``path`` has no slash at its end."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _default_port(secure=self.secure) else f"{host}:{self.port}"


def endpoint_of(url: str) -> Endpoint:
    """Take apart a URL that ``location.check_endpoint`` has passed. Raises StoreSetupError."""
    found = _ENDPOINT.fullmatch(url)
    if found is None:
        raise StoreSetupError("the endpoint URL of the store cannot be used: it is not http(s)://host[:port][/path]")
    secure = found[1].lower() == "https"
    port = int(found[4] or _default_port(secure=secure))
    return Endpoint(secure, (found[2] or found[3]).lower(), port, (found[5] or "").rstrip("/"))


def _default_port(*, secure: bool) -> int:
    return 443 if secure else 80


class Http:
    """Connections to one server, for any number of threads. ``ca_file``: trust the certificates in it and no others.

    Raises StoreTransientError and StoreSetupError (an untrusted certificate), which name the server alone, and OSError
    as the system gives it.
    """

    def __init__(self, endpoint: Endpoint, *, limits: Limits = Limits(), ca_file: str = "") -> None:  # noqa: B008
        self._endpoint = endpoint
        self._limits = limits
        self._ca_file = ca_file
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._closed = False
        self._context: ssl.SSLContext | None = None

    @contextmanager
    def ask(self, method: str, path: str, headers: Mapping[str, str], watch: Watch | None = None) -> Iterator[Answer]:
        """Send a request without a body; inside the block its answer can be read."""
        watch = watch or Watch()
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("ascii")
        wire = (None if watch.wants_new_connection else self._take()) or self._connect()
        answer = None
        try:
            watch.hold(wire)
            wire.send(request, self._limits.answer_seconds)
            answer = Answer(wire, method, self._limits, watch)
            yield answer
        finally:
            watch.let_go()
            if watch.is_interrupted:
                wire.close()  # which says nothing of the others
            elif answer is not None and answer.leaves_connection:
                self._put_back(wire)
            else:
                wire.close()
                self._close_idle()

    def close(self) -> None:
        """Close what is idle, and what is in use as soon as it is not."""
        with self._lock:
            self._closed = True
        self._close_idle()

    def _take(self) -> Wire | None:
        """An idle connection on which nothing has come, the end least of all; the last one used has the widest window."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                wire = self._idle.pop()
            if wire.is_quiet():
                return wire
            wire.close()

    def _put_back(self, wire: Wire) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append(wire)
                return
        wire.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _connect(self) -> Wire:
        context = self._trust() if self._endpoint.secure else None
        where = (self._endpoint.host, self._endpoint.port)
        plain = socket.create_connection(where, timeout=self._limits.connect_seconds)
        try:
            # Without this the request waits for the server to acknowledge the end of the TLS handshake.
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is None:
                return Wire(plain, waits_for_all=_WAITS_FOR_ALL)
            return Wire(self._secured(plain, context), waits_for_all=False)
        except BaseException:
            plain.close()
            raise

    def _secured(self, plain: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
        from ssl import SSLCertVerificationError

        try:
            return context.wrap_socket(plain, server_hostname=self._endpoint.host)
        except SSLCertVerificationError as error:
            raise StoreSetupError(
                f"this machine does not trust the certificate of {self._endpoint.authority} ({error.verify_message}): "
                "install the certificate of its authority, or name the file that has it in SSL_CERT_FILE"
            ) from None

    def _trust(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                self._context = _trust(self._ca_file)
            return self._context


class Watch:
    """What others have of a request under way: they hear of its progress, and may end it. For one request.

    ``wants_new_connection``: the request takes none that was used before.
    """

    def __init__(self, *, wants_new_connection: bool = False) -> None:
        self.wants_new_connection = wants_new_connection
        self.is_interrupted = False
        self._wire: Wire | None = None
        self._lock = threading.Lock()

    def interrupt(self) -> None:
        """End the request from any thread: its connection is shut down at once, and its own thread fails soon."""
        with self._lock:
            self.is_interrupted = True
            if self._wire is not None:
                self._wire.shut_down()

    def hear(self, received_bytes: int) -> None:  # noqa: ARG002  for those who listen
        """Called in the request's thread after every wait, with the bytes that it brought: 0 every ``look_seconds``.

        Raises StoreTransientError in an interrupted request, which may still have bytes to read.
        """
        if self.is_interrupted:
            raise StoreTransientError("the request was ended from this side")

    def patience_seconds(self, limit_seconds: float) -> float:
        """How long the request may go on without a byte, asked when it has had none for the limit of it."""
        return limit_seconds

    def hold(self, wire: Wire) -> None:
        """Make ``wire`` what an interrupt shuts down."""
        with self._lock:
            self._wire = wire
        self.hear(0)

    def let_go(self) -> None:
        """No interrupt reaches the connection from here on: another request may use it, or its number."""
        with self._lock:
            self._wire = None


class Wire:
    """A connected socket, used by one thread at a time."""

    def __init__(self, connected: socket.socket, *, waits_for_all: bool) -> None:
        self._socket = connected
        self._waits_for_all = waits_for_all

    def send(self, request: bytes, seconds: float) -> None:
        """Send all of ``request`` within ``seconds``."""
        self._socket.settimeout(seconds)
        self._socket.sendall(request)
        if self._waits_for_all:
            self._socket.settimeout(None)

    def receive(self, target: memoryview, seconds: float, *, all_of_it: bool) -> int:
        """Bytes put into ``target`` within about ``seconds``: all of it if so asked and they come, 0 if none do.

        Raises EOFError where no byte will come any more.
        """
        received = (self._receive_at_once if self._waits_for_all else self._receive_in_turns)(
            target, seconds, all_of_it=all_of_it
        )
        if received is None:
            raise EOFError
        return received

    def _receive_at_once(self, target: memoryview, seconds: float, *, all_of_it: bool) -> int | None:
        """One system call for a whole body: a thread that gives up the interpreter's lock once, not at every packet."""
        limit = struct.pack("@ll", *divmod(int(seconds * 1_000_000) + 1, 1_000_000))  # 0 would be for ever
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        try:
            return self._socket.recv_into(target, 0, socket.MSG_WAITALL if all_of_it else 0) or None
        except BlockingIOError:
            return 0

    def _receive_in_turns(self, target: memoryview, seconds: float, *, all_of_it: bool) -> int | None:
        """As often as needed: a TLS connection gives a record of at most 16 KiB a call."""
        done, ends = 0, time.monotonic() + seconds
        self._socket.settimeout(seconds)
        with suppress(TimeoutError):
            while received := self._socket.recv_into(target[done:]):
                done += received
                if not all_of_it or done == len(target) or time.monotonic() >= ends:
                    return done
            return done or None
        return done

    def is_quiet(self) -> bool:
        """Whether nothing has come, neither bytes nor an end."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def shut_down(self) -> None:
        """End the connection under a thread that uses it, which finds an end of it, or an error."""
        with suppress(OSError):
            # Not TLS's own: that would turn the connection into a plain one first, of which records could be read.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection, in whatever state it is."""
        with suppress(OSError):
            self._socket.close()

    def __del__(self) -> None:
        self.close()  # of a store that nobody closed


def _trust(ca_file: str) -> ssl.SSLContext:
    """Checks of host names and certificates; see the module for whose. Raises StoreSetupError."""
    import ssl

    try:
        context = ssl.create_default_context(cafile=ca_file or _bundle(ssl.get_default_verify_paths()))
    except (OSError, ValueError) as error:
        raise StoreSetupError(f"the file of trusted certificates {ca_file!r} cannot be read: {error}") from error
    context.set_alpn_protocols(["http/1.1"])
    return context


def _bundle(system: ssl.DefaultVerifyPaths) -> str | None:
    """None where the system has certificates, else the file that a package brings, found without importing it."""
    with suppress(OSError):
        if system.cafile or (system.capath and os.listdir(system.capath)):
            return None
    for folder in sys.path:
        for package in ("certifi", "botocore"):
            bundle = os.path.join(folder, package, "cacert.pem")
            if os.path.isfile(bundle):
                return bundle
    return None
