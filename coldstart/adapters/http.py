"""Serving over HTTP: what a pod, a load-balancing endpoint or any container runs. Standard library, HTTP/1.1.

::

    POST /run           the event, {"input": ...}, with an id if it has one -> {"id", "output"} or {"id", "error"}
                        a stream's pieces come as lines {"id", "piece"}, chunked, before the answer's line
    GET  /ping          204 while starting, 200 when ready, 503 when the start failed or the end has begun
    GET  /metrics.json  how the worker started, what it counts

400 is no event, 413 one that is too large, 500 an error of the handler (or of the start), 503 with ``Retry-After`` too
many that wait, or the end. ``concurrency`` events are answered at a time. The listener is there before the handler's
file is imported, so that the platform that asks for ``/ping`` sees the whole start; events that come early wait for it.
SIGTERM: nothing more is taken, what runs is finished, a snapshot being made is given up, the worker is closed.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.adapters.admission import Admission
from coldstart.adapters.calls import Direct, OnLoop
from coldstart.adapters.connection import STARTING, Server
from coldstart.adapters.signals import on_sigterm
from coldstart.config import load, read_variable
from coldstart.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from coldstart.definition import Definition
    from coldstart.worker import Worker

DEFAULT_PORT = 8000
MOST_BODY_BYTES = 20 << 20
"""The largest event: what RunPod's /runsync takes."""

MOST_WAITING = 64
_POLL_SECONDS = 0.1


class Address(NamedTuple):
    """Where to listen. ``health_port``: where ``/ping`` is asked for, if elsewhere (0: the same port)."""

    host: str
    port: int
    health_port: int = 0


def address_of(text: str) -> Address:
    """``HOST:PORT``, ``:PORT`` or ``PORT``; "" is every interface at PORT, where a platform sets that, else at 8000.

    With "", the PORT_HEALTH of a load-balancing endpoint is heeded too. Raises UsageError and ConfigError.
    """
    if text:
        host, _, number = text.rpartition(":")
        if not number.isascii() or not number.isdigit() or int(number) > 65535:  # noqa: PLR2004
            raise UsageError(f"--http {text!r}: give HOST:PORT, such as 127.0.0.1:8000")
        return Address(host.strip("[]") or "0.0.0.0", int(number))  # noqa: S104  a container's port is meant to be reached
    port, health_port = _port_variable("PORT", DEFAULT_PORT), _port_variable("PORT_HEALTH", 0)
    return Address("0.0.0.0", port, 0 if health_port == port else health_port)  # noqa: S104


def _port_variable(name: str, default: int) -> int:
    text = (read_variable(name) or "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 65535:  # noqa: PLR2004
        raise ConfigError(f"{name}={text!r} cannot be used: it has to be a port, 1 to 65535")
    return int(text)


class HttpService:
    """A listener, from its construction on, and the worker that it serves, from ``serve`` on.

    Raises UsageError where the address cannot be listened at.
    """

    def __init__(
        self, address: Address, *, most_waiting: int = MOST_WAITING, most_body_bytes: int = MOST_BODY_BYTES
    ) -> None:
        self.most_body_bytes = most_body_bytes
        self.admission = Admission(most_waiting=most_waiting)
        self.health_paths = {"/ping", read_variable("HEALTH_CHECK_PATH") or "/ping"}
        self.worker: Worker | None = None
        self.answering: Direct | None = None
        self._told: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put may be called by a signal's handler
        self._servers = [_listen(address.host, port, self) for port in (address.port, address.health_port) if port]
        if not self._servers:  # port 0: any that is free
            self._servers = [_listen(address.host, 0, self)]
        self.port: int = self._servers[0].server_address[1]
        for server in self._servers:
            threading.Thread(
                target=server.serve_forever, args=(_POLL_SECONDS,), name="coldstart-http", daemon=True
            ).start()

    def serve(self, definition: Definition, handler: Any) -> None:
        """Begin the start, and answer events until SIGTERM or ``stop``."""
        from coldstart.registry import enter_serving, worker_for

        enter_serving()
        worker = worker_for(definition)
        answering = OnLoop(handler) if definition.kind in ("async", "async_generator") else Direct(handler)
        try:
            with on_sigterm(self.stop):
                answering.begin(worker)
                self.worker, self.answering = worker, answering
                self.admission.open(load().concurrency or definition.concurrency)
                self._told.get()
        finally:
            self._end(worker)
            answering.close()

    def stop(self) -> None:
        """Begin the end: ``serve`` returns once what runs is finished. From any thread or signal's handler."""
        self._told.put(None)

    def close(self) -> None:
        """Stop listening."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _end(self, worker: Worker) -> None:
        self.close()
        self.admission.end()
        if worker.state in STARTING:
            worker.close()  # whoever waits for the start is told
        worker.stop_capture()
        self.admission.drain()
        worker.close()

    def metrics(self) -> dict[str, Any]:
        """What ``/metrics.json`` shows."""
        worker = self.worker
        if worker is None:
            return {"state": "new", "waiting": self.admission.waiting}
        start = {name: worker.record.get(name) for name in ("kind", "generation", "ready_seconds")}
        return {
            "name": worker.definition.name,
            "state": worker.state,
            "waiting": self.admission.waiting,
            "start": start if worker.record else None,
            "stats": worker.stats._asdict(),
            "metrics": worker.metrics.to_dict(),
        }


def _listen(host: str, port: int, service: HttpService) -> Server:
    try:
        return Server(host, port, service)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen at {host}:{port} ({error}): choose another with --http HOST:PORT") from error
