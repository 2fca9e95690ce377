"""Children: what they are given, how messages cross the wire, how they end."""

from __future__ import annotations

import os
import queue
import resource
import socket
import sys
import threading
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart import children
from coldstart.errors import AccessDeniedError, CaptureError, SnapshotError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are for Linux")

ECHO = """
import os, sys
sys.path[:] = {path!r}
from coldstart.children import WIRE_FD, receive, send
import socket
wire = socket.socket(fileno=WIRE_FD)
while (message := receive(wire)) is not None:
    files = {{fd: os.pread(fd, 10, 0).decode() for fd in (4, 5)}}
    send(wire, {{**message.document, "argv": sys.argv, "module": {module!r}, "files": files,
               "variable": os.environ.get("GIVEN"), "group": os.getpgid(0) == os.getpid()}}, message.data)
"""


@pytest.fixture
def wires():
    """Both ends of a wire."""
    with ExitStack() as opened:
        yield tuple(map(opened.enter_context, socket.socketpair()))


def open_files():
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def memory_file(text):
    """A descriptor of a file with ``text`` in it."""
    file = os.memfd_create("test")
    os.write(file, text)
    return file


@pytest.mark.parametrize("leads_group", [False, True])
def test_a_child_has_what_it_is_given(monkeypatch, leads_group):
    """Files lie behind its wire in order, its environment is the one given, and an end leaves no process or descriptor."""
    monkeypatch.setattr(children, "_BOOT", ECHO)
    files = [memory_file(b"first"), memory_file(b"second")]
    before = open_files()
    wire, pid = children.spawn("some.module", {**os.environ, "GIVEN": "yes"}, files=files, leads_group=leads_group)
    children.send(wire, {"said": 1}, b"data")
    answer = children.receive(wire)
    assert answer is not None
    assert (answer.data, answer.descriptors) == (b"data", ())
    assert answer.document == {
        "said": 1,
        "argv": ["-c"],
        "module": "some.module",
        "files": {"4": "first", "5": "second"},
        "variable": "yes",
        "group": leads_group,
    }
    wire.close()
    children.end(pid)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert open_files() <= before
    children.end(pid)  # nobody is there any more, and that is no error
    for file in files:
        os.close(file)


@pytest.mark.parametrize("fault", ["no interpreter", "no descriptor"])
def test_a_spawn_that_fails_leaves_nothing(monkeypatch, fault):
    """Whatever the system refuses, the error is raised and no descriptor stays open."""
    files = [0]
    if fault == "no interpreter":
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
    else:
        files.append(10_000_000)
    before = open_files()
    with pytest.raises(OSError):
        children.spawn("some.module", os.environ, files=files)
    assert open_files() <= before


documents = st.dictionaries(
    st.text(max_size=9), st.one_of(st.none(), st.integers(), st.text(), st.lists(st.booleans()))
)


@given(messages=st.lists(st.tuples(documents, st.binary(max_size=2000), st.integers(0, 2)), max_size=6))
def test_messages_arrive_as_they_were_sent(messages):
    """Documents, bytes and files arrive whole and in order, each file with its own message, closed on exec."""
    with ExitStack() as opened:
        ours, theirs = map(opened.enter_context, socket.socketpair())
        file = os.open(os.devnull, os.O_RDONLY)
        opened.callback(os.close, file)

        def send():
            for document, data, count in messages:
                children.send(theirs, document, data, [file] * count)
            theirs.shutdown(socket.SHUT_RDWR)

        sender = threading.Thread(target=send)
        sender.start()
        for document, data, count in messages:
            message = children.receive(ours)
            assert message is not None
            assert (message.document, message.data, len(message.descriptors)) == (document, data, count)
            for descriptor in message.descriptors:
                assert os.path.samestat(os.fstat(descriptor), os.fstat(file))
                assert not os.get_inheritable(descriptor)
                os.close(descriptor)
        assert children.receive(ours) is None
        sender.join()


def test_a_message_that_is_cut_off_is_none(wires):
    """Wherever a message ends too early there is none, and the files that came with it are closed."""
    ours, theirs = wires
    children.send(theirs, {"a": 1}, b"data")
    whole = ours.recv(1000)
    for size in range(len(whole)):
        with ExitStack() as opened:
            receiver, sender = map(opened.enter_context, socket.socketpair())
            before = open_files()
            if size:
                socket.send_fds(sender, [whole[:size]], [ours.fileno()])
            sender.shutdown(socket.SHUT_RDWR)
            assert children.receive(receiver) is None
            assert open_files() <= before


def test_hanging_up_wakes_who_waits(wires):
    """Whoever waits for a message at this end hears that there is none, and hanging up again is no error."""
    ours, theirs = wires
    heard = []
    waiting = threading.Thread(target=lambda: heard.append(children.receive(ours)))
    waiting.start()
    children.hang_up(ours)
    waiting.join()
    assert heard == [None]
    assert children.receive(theirs) is None
    children.hang_up(ours)


@pytest.mark.parametrize("error", [AccessDeniedError("no", key="blobs/ab"), SnapshotError("no", snapshot="model")])
def test_errors_keep_their_class(error):
    """What a child meets is raised as if it had happened here, with its snapshot and key."""
    found = children.error_of(children.told(error), CaptureError)
    assert type(found) is type(error)
    assert (str(found), found.key, found.snapshot) == (str(error), error.key, error.snapshot)


def test_an_error_that_is_not_known_here():
    """A child of another version may have errors that this one has not: they become the caller's."""
    found = children.error_of({"error": "NewError", "message": "no", "snapshot": None, "key": None}, CaptureError)
    assert (type(found), str(found)) == (CaptureError, "no")


# --- what users do to it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [0, 1])
def test_a_message_whose_files_cannot_be_taken_is_none(wires, free):
    """Without the files that belong to it a message would say another thing: out of descriptors, there is no message."""
    ours, theirs = wires
    file = os.open(os.devnull, os.O_RDONLY)
    children.send(theirs, {"is": "filled"}, descriptors=[file, file])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before, taken = open_files(), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(file))
        for _ in range(free):
            os.close(taken.pop())
        received = children.receive(ours)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)
    assert received is None
    assert open_files() == before
    os.close(file)


def test_an_end_that_has_not_read_all_is_an_end(wires):
    """A parent that is killed with unread messages resets the wire: for its child that is the end like any other."""
    ours, theirs = wires
    children.send(ours, {"nobody": "reads this"})
    theirs.close()
    assert children.receive(ours) is None


SAYS = """
import json, os, signal, socket
from coldstart.children import WIRE_FD, send
import queue
def main():
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    send(socket.socket(fileno=WIRE_FD), {"queue": queue.__file__, "blocked": blocked})
"""


def test_what_lies_beside_the_handler_does_not_disturb_it(tmp_path, monkeypatch):
    """A user's module with a name of the standard library, and what is no text on the path, are not the child's business."""
    (tmp_path / "queue.py").write_text("raise SystemExit('the user's queue')")
    (tmp_path / "says_where.py").write_text(SAYS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), tmp_path / "no text", *sys.path])
    wire, pid = children.spawn("says_where", os.environ)
    answer = children.receive(wire)
    children.end(pid)
    wire.close()
    assert answer is not None
    assert answer.document == {"queue": queue.__file__, "blocked": True}, "and Ctrl-C is its parent's business alone"


def test_a_frozen_program_is_no_interpreter(monkeypatch):
    """There the executable is the user's program: as a child it would begin from its start, and have children too."""
    assert children.can_spawn()
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert not children.can_spawn()


def test_a_number_that_may_be_anothers_is_not_killed(monkeypatch):
    """Once somebody has waited for a child its process id is free for others, and is left alone."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitpid(pid, 0)
    killed = []
    monkeypatch.setattr(os, "kill", lambda *call: killed.append(call))
    children.end(pid)
    assert killed == []
