"""The limit: bare sockets, ranged GETs received in fresh memory. Nothing is hashed, decoded or made into tensors.

``connections`` threads, each with one connection, take ranges of ``part_bytes`` in turn; one system call receives a whole range.
"""

from __future__ import annotations

import mmap
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from benchmarks.restoring.reading import Reading, Task, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEAD_BYTES = 64 << 10


def prepare(task: Task) -> Callable[[], Reading]:
    """Nothing more to import."""
    return lambda: Reading({"": _read(task)})


def _read(task: Task) -> memoryview:
    target = memoryview(mmap.mmap(-1, task.object_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    parts = _Parts(task.object_bytes, task.option("part_bytes", 16 << 20))
    connections = task.option("connections", 4)
    with ThreadPoolExecutor(connections) as pool:
        for drained in [pool.submit(_drain, task, parts, target) for _ in range(connections)]:
            drained.result()
    return target


class _Parts:
    """Ranges that threads take in turn."""

    def __init__(self, size_bytes: int, part_bytes: int) -> None:
        self._ranges = ((begin, min(begin + part_bytes, size_bytes)) for begin in range(0, size_bytes, part_bytes))
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while True:
            with self._lock:
                taken = next(self._ranges, None)
            if taken is None:
                return
            yield taken


def _drain(task: Task, parts: _Parts, target: memoryview) -> None:
    with socket.create_connection((task.host, task.port)) as connection:
        for begin, end in parts:
            _get(connection, f"/{task.bucket}/{task.object_key}", task.host, target[begin:end], begin)


def _get(connection: socket.socket, path: str, host: str, target: memoryview, begin: int) -> None:
    last = begin + len(target) - 1
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nRange: bytes={begin}-{last}\r\n\r\n".encode())
    head = b""
    while b"\r\n\r\n" not in head:
        received = connection.recv(HEAD_BYTES)
        assert received, "the server closed the connection"
        head += received
    head, _, body = head.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 206 "), head
    target[: len(body)] = body
    rest: Any = target[len(body) :]
    while rest:
        received_bytes = connection.recv_into(rest, 0, socket.MSG_WAITALL)
        assert received_bytes, "the server closed the connection"
        rest = rest[received_bytes:]


if __name__ == "__main__":
    run(prepare)
