"""Processes of ours that work for this one: how a child is spawned, spoken with and ended.

A child is an interpreter that runs ``main`` of one module. Its wire, a socket pair, carries messages: a header of two
lengths, a JSON document and bytes. A message may bring file descriptors, which travel with its header (SCM_RIGHTS). What
a child is told is never in its argv, which others can read. Where the wire ends, whoever held its other side has ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.errors import ColdstartError

WIRE_FD = 3
"""The child's end of the wire. The files that it is given follow it, from 4 on."""

_BOOT = "import sys; sys.path += {path!r}; from {module} import main; main()"
"""Its own path, the standard library's, comes first: a user's ``queue.py`` beside the handler is none of its business."""

_FIRST_FREE_FD = 10
_LENGTHS = struct.Struct("<II")
_MOST_DESCRIPTORS = 6
"""A ring's five and a queue."""
_DESCRIPTOR = struct.Struct("@i")


class Message(NamedTuple):
    """One message. Whoever receives ``descriptors`` closes them."""

    document: dict[str, Any]
    data: bytes = b""
    descriptors: tuple[int, ...] = ()


def can_spawn() -> bool:
    """Whether this platform has what a child needs. In a frozen program the executable is no interpreter, but that program."""
    is_interpreter = bool(sys.executable) and not getattr(sys, "frozen", False)
    return sys.platform == "linux" and hasattr(os, "posix_spawn") and is_interpreter


def spawn(
    module: str, environment: Mapping[str, str], *, files: Sequence[int] = (), leads_group: bool = False
) -> tuple[socket.socket, int]:
    """A child that runs ``main`` of ``module``: our end of its wire, and its process id. Raises OSError.

    ``files``: descriptors that it has as 4, 5 and so on. ``leads_group``: it leads a process group of its own.
    """
    import fcntl

    with ExitStack() as on_failure, ExitStack() as meanwhile:
        ours, theirs = socket.socketpair()
        on_failure.callback(ours.close)
        meanwhile.callback(theirs.close)
        actions: list[Any] = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        ]
        for place, file in enumerate((theirs.fileno(), *files), WIRE_FD):
            # Above all places, so that putting one in its place cannot overwrite another; and a descriptor that is
            # there already would stay close-on-exec.
            moved = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD)
            meanwhile.callback(os.close, moved)
            actions.append((os.POSIX_SPAWN_DUP2, moved, place))
        code = _BOOT.format(path=list(map(str, sys.path)), module=module)
        group: dict[str, Any] = {"setpgroup": 0} if leads_group else {}
        arguments = [sys.executable, "-I", "-S", "-c", code]
        # A terminal sends SIGINT to both, and the parent decides: the child must not hear it, while it boots least of all.
        pid = os.posix_spawn(
            sys.executable, arguments, environment, file_actions=actions, setsigmask=[signal.SIGINT], **group
        )
        on_failure.pop_all()
    return ours, pid


def hang_up(wire: socket.socket) -> None:
    """Let whoever is at the other side, and whoever waits for a message at this one, hear of the end."""
    with suppress(OSError):  # it has ended already
        wire.shutdown(socket.SHUT_RDWR)


def end(pid: int) -> None:
    """End a child now and take its exit status from the kernel.

    Where somebody in this process has waited for all children, it is no child any more: its number may be another's.
    """
    with suppress(ChildProcessError, ProcessLookupError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# --- messages --------------------------------------------------------------------------------------------------------


def send(wire: socket.socket, document: dict[str, Any], data: bytes = b"", descriptors: Sequence[int] = ()) -> None:
    """Send one message; one thread at a time. Raises OSError where the other side has ended."""
    text = json.dumps(document).encode()
    head = _LENGTHS.pack(len(text), len(data))
    if descriptors:
        socket.send_fds(wire, [head], list(descriptors))
        head = b""
    wire.sendall(b"".join((head, text, data)))


def receive(wire: socket.socket) -> Message | None:
    """The next message. None if the other side ended before it was whole, or its descriptors could not be had. Raises OSError.

    A message without its descriptors would say another thing: this process may have no more of them just now.
    """
    with ExitStack() as unused, suppress(ConnectionResetError):  # it has ended without reading all that was sent
        head, descriptors, some_are_lost = _head(wire)
        for descriptor in descriptors:
            unused.callback(os.close, descriptor)
        rest = _exactly(wire, _LENGTHS.size - len(head)) if head and not some_are_lost else None
        if rest is None:
            return None
        text_bytes, data_bytes = _LENGTHS.unpack(head + rest)
        body = _exactly(wire, text_bytes + data_bytes)
        if body is None:
            return None
        unused.pop_all()
        return Message(json.loads(body[:text_bytes]), body[text_bytes:], tuple(descriptors))
    return None


def _head(wire: socket.socket) -> tuple[bytes, list[int], bool]:
    """The beginning of a message, its descriptors, and whether some were lost. None goes on to programs of the user's code."""
    room_bytes = socket.CMSG_LEN(_MOST_DESCRIPTORS * _DESCRIPTOR.size)
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    head, extra, told_flags, _ = wire.recvmsg(_LENGTHS.size, room_bytes, flags)  # socket.recv_fds passes no flags on
    rights = b"".join(data for level, kind, data in extra if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS))
    descriptors = [descriptor for (descriptor,) in _DESCRIPTOR.iter_unpack(rights)]
    return head, descriptors, bool(told_flags & socket.MSG_CTRUNC)


def _exactly(wire: socket.socket, size_bytes: int) -> bytes | None:
    room = memoryview(bytearray(size_bytes))
    done = 0
    while done < size_bytes:
        count = wire.recv_into(room[done:])
        if not count:
            return None
        done += count
    return bytes(room)


def told(error: ColdstartError) -> dict[str, Any]:
    """An error as a document, for ``error_of`` at the other side."""
    return {"error": type(error).__name__, "message": str(error), "snapshot": error.snapshot, "key": error.key}


def error_of(document: dict[str, Any], unknown: type[ColdstartError]) -> ColdstartError:
    """The error that a child ended with, as it would have been raised here; ``unknown`` for one that is not known here."""
    kind = getattr(errors, document["error"], unknown)
    made: ColdstartError = kind(document["message"], snapshot=document["snapshot"], key=document["key"])
    return made
