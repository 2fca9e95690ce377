"""The saver process: what ``coldstart.save.process`` starts. It saves what it finds in the slots until it is let go of."""

from __future__ import annotations

import mmap
import os
import queue
import signal
import socket
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from coldstart.children import WIRE_FD, Message, receive, send, told
from coldstart.errors import ColdstartError, StateChangedError
from coldstart.manifest import Chunk
from coldstart.pipeline import Job, run_all
from coldstart.repository import Repository
from coldstart.save.base import StoredAs, Terms
from coldstart.save.priority import follow_parent, give_way
from coldstart.save.process import RING_FD
from coldstart.save.stage import Rate, Stage, hash_of
from coldstart.stores import StoreOptions, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coldstart.save.base import Saved

COPIES = 3
"""Times its raw bytes that a chunk may hold while it is encoded and sent: planes, the stored form, a client's copy of that."""
_ORPHAN_SECONDS = 1.0


def main() -> None:
    """Do what comes over the wire, and leave when it ends."""
    give_way()
    follow_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both; the parent decides
    wire = socket.socket(fileno=WIRE_FD)
    greeting = receive(wire)
    if greeting is not None:
        threading.Thread(target=_leave_with_parent, args=(greeting.document["parent"],), daemon=True).start()
        _Work(wire, greeting.document).run()
    os._exit(0)  # nothing is to be cleaned up, and the parent waits


def _leave_with_parent(parent: int) -> None:
    """The wire's end says it at once, unless a forked child of the parent holds the parent's side of it."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_SECONDS)
    os._exit(0)


class _Work:
    """All work of one saver."""

    def __init__(self, wire: socket.socket, greeting: dict[str, Any]) -> None:
        self._wire = wire
        self._sending = threading.Lock()
        self._stopping = threading.Event()
        self._asked: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._greeting = greeting
        self._ring = memoryview(mmap.mmap(RING_FD, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))

    def run(self) -> None:
        """Answer until told to stop. The end of the wire ends the process."""
        if not self._answering(0, self._open):
            return
        threading.Thread(target=self._listen, daemon=True).start()
        run_all(
            self._jobs(),
            threads=self._greeting["threads"],
            budget_bytes=self._greeting["budget_bytes"],
            name="coldstart-saver",
            stop=self._stopping,
        )

    def _open(self) -> None:
        greeting = self._greeting
        self._store = open_store(greeting["url"], StoreOptions(**greeting["options"]), degraded=lambda _: None)
        rate = Rate(greeting["bytes_per_second"], self._stopping)
        self._stage = Stage(Repository(self._store), _terms(greeting), rate)

    def _listen(self) -> None:
        try:
            while (message := receive(self._wire)) is not None:
                if message.document["operation"] == "stop":
                    self._stopping.set()
                    message = None
                self._asked.put(message)
        finally:  # also where a message cannot be read: nobody would hear the parent any more
            os._exit(0)

    def _jobs(self) -> Iterator[Job]:
        """One job a message. Codecs are chosen here, by one thread, so that it is always the first chunk that decides."""
        while (message := self._asked.get()) is not None:
            head = message.document
            if head["operation"] == "put":
                yield self._job(head, len(message.data), partial(self._put, head, message.data))
            elif head["operation"] == "hash":
                yield self._job(head, 0, partial(self._hash, head))
            else:
                yield from self._save_jobs(head)

    def _save_jobs(self, head: dict[str, Any]) -> Iterator[Job]:
        if head["stored_as"] is not None:
            yield self._job(head, COPIES * head["length_bytes"], partial(self._keep, head))
            return
        found: list[tuple[str, str]] = []
        self._answering(head["number"], lambda: found.append(self._begun(head)))
        for raw_hash, codec in found:
            cost_bytes = COPIES * head["length_bytes"] if codec else 0
            yield self._job(head, cost_bytes, partial(self._save, head, raw_hash, codec))

    def _job(self, head: dict[str, Any], cost_bytes: int, work: Callable[[], dict[str, Any]]) -> Job:
        return Job(cost_bytes, lambda: self._answer(head["number"], work))

    # --- what is done ------------------------------------------------------------------------------------------------

    def _begun(self, head: dict[str, Any]) -> tuple[str, str]:
        """The hash of a chunk's bytes and, unless the parent has them, its codec."""
        raw = self._raw(head)
        raw_hash = hash_of(raw)
        if head["before"] not in ("", raw_hash):
            raise StateChangedError("bytes of the state changed while they were copied")
        if self._stage.is_known(raw_hash, head["item_bytes"], head["length_bytes"]):
            return raw_hash, ""
        return raw_hash, self._stage.codec_of(head["segment"], head["item_bytes"], raw)

    def _save(self, head: dict[str, Any], raw_hash: str, codec: str) -> dict[str, Any]:
        item_bytes, raw = head["item_bytes"], self._raw(head)
        saved = self._stage.reused(raw_hash, item_bytes, head["length_bytes"])
        if saved is None:
            codec = codec or self._stage.codec_of(head["segment"], item_bytes, raw)
            saved = self._stage.stored(raw, raw_hash, head["segment"], item_bytes, codec)
        return _told_saved(saved)

    def _keep(self, head: dict[str, Any]) -> dict[str, Any]:
        return _told_saved(self._stage.kept(self._raw(head), StoredAs(*head["stored_as"])))

    def _hash(self, head: dict[str, Any]) -> dict[str, Any]:
        return {"raw_hash": hash_of(self._raw(head))}

    def _put(self, head: dict[str, Any], data: bytes) -> dict[str, Any]:
        etag = self._store.put(head["key"], data, if_absent=head["if_absent"], if_match=head["if_match"])
        return {"etag": etag, "capabilities": list(self._store.capabilities)}

    def _raw(self, head: dict[str, Any]) -> memoryview:
        return self._ring[head["offset_bytes"] : head["offset_bytes"] + head["length_bytes"]]

    # --- answers -----------------------------------------------------------------------------------------------------

    def _answer(self, number: int, work: Callable[[], dict[str, Any]]) -> None:
        self._answering(number, lambda: self._send({"number": number, **work()}))

    def _answering(self, number: int, work: Callable[[], None]) -> bool:
        """Do ``work``; an error that it ends with is the answer, and the result then False."""
        try:
            work()
        except ColdstartError as error:
            self._send({"number": number, **told(error)})
            return False
        return True

    def _send(self, answer: dict[str, Any]) -> None:
        try:
            with self._sending:
                send(self._wire, answer)
        except OSError:
            os._exit(0)  # the parent has gone


def _told_saved(saved: Saved) -> dict[str, Any]:
    return {**saved._asdict(), "parameters": dict(saved.parameters)}


def _terms(greeting: dict[str, Any]) -> Terms:
    chunks = [(item_bytes, Chunk(*fields)) for item_bytes, fields in greeting["known"]]
    known = {(chunk.raw_hash, item_bytes, chunk.length_bytes): chunk for item_bytes, chunk in chunks}
    others = {field: greeting[field] for field in Terms._fields if field != "known"}
    return Terms(known=known, **others)
