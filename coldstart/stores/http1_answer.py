"""An answer over HTTP/1.1 as it comes: its head checked, its body received within limits of time and length.

A refusal is an answer that is no data: its text may come in any framing and is read up to a limit. Data has the length
that its head announces.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import StoreTransientError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coldstart.stores.http1 import Watch, Wire

HEAD_BYTES = 16 << 10
"""The longest head of an answer."""
REFUSAL_BYTES = 64 << 10
"""What is read of a refusal's text at most."""

_ONE_READ_BYTES = 4096
_INFORMATIONAL_ANSWERS = 8
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: [^\r\n\0]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*")
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
_SAID_ONCE = frozenset({"content-length", "content-range", "transfer-encoding", "etag"})


class Limits(NamedTuple):
    """How long a request may take.

    ``connect_seconds`` for each address of the host and again for the TLS handshake; ``answer_seconds`` from the
    request to the end of the answer's head; ``deadline_seconds`` for all of it, and a second more for every
    ``deadline_bytes_per_second`` of its body. A body is given up that brings nothing for ``silence_seconds``, or less
    than ``floor_bytes_per_second`` over ``floor_window_seconds``. While it waits, a request looks about every
    ``look_seconds``. Its ``Watch`` may be more patient with silence than this.
    """

    # What is told apart is a link that is slow and a connection that is dead. Slow and healthy: 64 connections that
    # share 1 MB/s have 16 KB/s each on average, and now and then one has nothing for as long as TCP waits after losses
    # in a row: 3 s after four, 6 after five, 13 after six. A request for 4 MiB then takes 260 s, one for 16 MiB 1000 s,
    # and every one that is given up makes the link slower yet: its bytes are fetched again. So the floor is an eighth
    # of that share, over a window in which chance evens out, and the deadline, which a server that keeps just above
    # the floor would otherwise stretch, half of it over the whole body. No fixed floor finds the connection that
    # brings 200 KB/s beside others with 20 MB/s: that is a matter of comparison, and of ``hedging``.
    # Dead: 8 s of silence are five losses in a row, rare wherever connections are not that slow all alike, which
    # ``hedging`` sees too and is patient then. They leave a hedge of 2.5 s time to win. A connection is tried for 4 s:
    # the system repeats its request after 1 and 3.
    connect_seconds: float = 4.0
    answer_seconds: float = 8.0
    silence_seconds: float = 8.0
    floor_bytes_per_second: float = 2 << 10
    floor_window_seconds: float = 30.0
    deadline_seconds: float = 30.0
    deadline_bytes_per_second: float = 8 << 10
    look_seconds: float = 0.5


BRIEF_LIMITS = Limits(connect_seconds=2.0, answer_seconds=3.0, silence_seconds=3.0)
"""For a read that another store can answer too: long enough for a hedge at 2.5 s to have been asked, not to have won."""


class Answer:
    """The answer to a request: its head is read when it is made, its body when the caller says where to.

    ``headers`` have lower-case names. ``length_bytes`` is the body's as announced (of a HEAD: what a GET would
    have), None without a usable Content-Length.
    """

    def __init__(self, wire: Wire, method: str, limits: Limits, watch: Watch) -> None:
        self._wire = wire
        self._limits = limits
        self._watch = watch
        self._began = time.monotonic()
        self.status, self._early, lines, lasting = self._read_head()
        self.headers = _fields(lines)
        self.length_bytes = _length(self.headers)
        self._left_bytes: int | None = self.length_bytes
        if method == "HEAD" or self.status in (204, 304):
            self._left_bytes = 0
        self._lasting = lasting and "close" not in self.headers.get("connection", "").lower()

    @property
    def leaves_connection(self) -> bool:
        """Whether the connection can take another request: all of the body was read, and nothing came after it."""
        return self._lasting and self._left_bytes == 0 and not self._early

    def read_into(self, target: memoryview) -> None:
        """Fill ``target`` with the next bytes of the body. Raises StoreTransientError where it has fewer."""
        if self._left_bytes is None or self._left_bytes < len(target):
            raise StoreTransientError(f"the answer has fewer than the {len(target)} bytes that it should have")
        early = min(len(self._early), len(target))
        target[:early] = self._early[:early]
        del self._early[:early]
        self._fill(target, early)
        self._left_bytes -= len(target)

    def read_refusal(self) -> bytes:
        """The body in any framing, for an answer that is no data: up to REFUSAL_BYTES of it."""
        if self._left_bytes is not None and self._left_bytes <= REFUSAL_BYTES:
            text = bytearray(self._left_bytes)
            self.read_into(memoryview(text))
            return bytes(text)
        chunked = "transfer-encoding" in self.headers
        began = time.monotonic()
        piece = memoryview(bytearray(_ONE_READ_BYTES))
        while len(self._early) < REFUSAL_BYTES and not (chunked and _dechunked(self._early)[1]):
            try:
                self._early += piece[: self._receive_some(piece, began)]
            except EOFError as error:
                if chunked:
                    raise StoreTransientError("the connection ended in the middle of an answer") from error
                break
        return _dechunked(self._early)[0] if chunked else bytes(self._early)

    def _read_head(self) -> tuple[int, bytearray, list[bytes], bool]:
        """Status, what came after the head, the head's fields, and whether the protocol keeps connections."""
        data = bytearray()
        for _ in range(_INFORMATIONAL_ANSWERS):
            first, *lines = self._read_lines(data)
            found = _STATUS.fullmatch(first)
            if found is None:
                raise _not_http()
            status = int(found[2])
            if status >= 200 or status == 101:  # noqa: PLR2004  101 would be another protocol: nobody asked for one
                return status, data, lines, found[1] == b"1"
        raise _not_http()

    def _read_lines(self, data: bytearray) -> list[bytes]:
        """The lines of the head that ``data`` begins with or will begin with; what follows stays in ``data``."""
        piece = memoryview(bytearray(_ONE_READ_BYTES))
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > HEAD_BYTES or not data.startswith(b"HTTP/1."[: len(data)]):
                raise _not_http()
            try:
                data += piece[: self._receive_some(piece, self._began)]
            except EOFError as error:
                raise StoreTransientError("the connection ended before an answer") from error
        lines = bytes(data[:end]).split(b"\r\n")
        del data[: end + 4]
        return lines

    def _receive_some(self, target: memoryview, began: float) -> int:
        """The next bytes of what should be there ``answer_seconds`` after it began."""
        limit_seconds = self._limits.answer_seconds
        while (seconds := self._left(began, limit_seconds)) > 0:
            if received := self._receive(target, seconds, all_of_it=False):
                return received
        raise StoreTransientError("the server took too long to answer")

    def _left(self, began: float, limit_seconds: float) -> float:
        """Seconds until a silence since ``began`` is too long; the watch is asked only when the limit is reached."""
        past = time.monotonic() - began
        return (limit_seconds if past < limit_seconds else self._watch.patience_seconds(limit_seconds)) - past

    def _fill(self, target: memoryview, done: int) -> None:
        """Receive ``target[done:]`` by the deadline and above the floor."""
        pace = _Pace(self._limits, self._deadline())
        while done < len(target):
            if self._left(pace.last_came, self._limits.silence_seconds) <= 0:
                silent_seconds = time.monotonic() - pace.last_came
                raise StoreTransientError(f"the answer came too slowly: nothing for {silent_seconds:.1f} s")
            try:
                received = self._receive(target[done:], pace.seconds_left(), all_of_it=True)
            except EOFError as error:
                raise StoreTransientError(f"the connection ended after {done} of {len(target)} bytes") from error
            done += received
            pace.came(received)

    def _receive(self, target: memoryview, seconds: float, *, all_of_it: bool) -> int:
        """One wait, no longer than the watch should go without a word."""
        received = self._wire.receive(target, min(seconds, self._limits.look_seconds), all_of_it=all_of_it)
        self._watch.hear(received)
        return received

    def _deadline(self) -> float:
        allowed_seconds = (self.length_bytes or 0) / self._limits.deadline_bytes_per_second
        return self._began + self._limits.deadline_seconds + allowed_seconds


class _Pace:
    """Whether a body comes fast enough; ``deadline`` is its last moment, ``last_came`` that of the last bytes."""

    def __init__(self, limits: Limits, deadline: float) -> None:
        self._limits = limits
        self._began = self.last_came = time.monotonic()
        self._deadline = deadline
        self._begin_window(self._began)

    def seconds_left(self) -> float:
        """Until the next moment at which it may have come too slowly; more than 0. Raises StoreTransientError."""
        limits, now = self._limits, time.monotonic()
        if now >= self._deadline:
            raise StoreTransientError(f"the answer took longer than {now - self._began:.0f} s")
        if now >= self._window_ends:
            if self._window_bytes < limits.floor_bytes_per_second * limits.floor_window_seconds:
                raise StoreTransientError(
                    f"the answer came too slowly: {self._window_bytes} bytes in {limits.floor_window_seconds:g} s"
                )
            self._begin_window(now)
        return min(self._deadline, self._window_ends) - now

    def came(self, received: int) -> None:
        """Take note of so many more bytes."""
        self._window_bytes += received
        if received:
            self.last_came = time.monotonic()

    def _begin_window(self, now: float) -> None:
        self._window_bytes, self._window_ends = 0, now + self._limits.floor_window_seconds


def _not_http() -> StoreTransientError:
    return StoreTransientError(
        "the server answered with something that is not HTTP/1.1; a proxy in between may do that"
    )


def _fields(lines: list[bytes]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in lines:
        found = _FIELD.fullmatch(line)
        if found is None:
            raise _not_http()
        name, value = found[1].decode().lower(), found[2].decode("latin-1")
        if fields.setdefault(name, value) != value and name in _SAID_ONCE:
            raise _not_http()
    return fields


def _length(fields: Mapping[str, str]) -> int | None:
    """The announced length; None if there is none, or if another framing stands against it."""
    length = fields.get("content-length")
    if length is None or "transfer-encoding" in fields:
        return None
    if not _LENGTH.fullmatch(length):
        raise _not_http()
    return int(length)


def _dechunked(raw: bytes | bytearray) -> tuple[bytes, bool]:
    """The content of the chunks that ``raw`` begins with, and whether the last chunk was among them."""
    content, at = bytearray(), 0
    while found := _CHUNK.match(raw, at):
        length_bytes = int(found[1], 16)
        if not length_bytes:
            return bytes(content), True
        content += raw[found.end() : found.end() + length_bytes]
        at = found.end() + length_bytes + 2
    return bytes(content), False
