"""Saving in a process of its own, which nobody who is served notices: it has an interpreter lock and a priority of its own.

A thread of low priority that holds this interpreter's lock, and is not scheduled, holds up every request; a process does
not. So this one only copies chunks into slots of a memory file, by calls that let other threads go on. The saver hashes,
encodes and stores them, several at a time, and answers how. It writes manifest and ref too, so that a bucket's client is
never imported here.

The saver ends when this process does, or lets go of it. Where it cannot be had, or dies, the thread that captures does
the work: of chunks without an answer it takes another copy.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from coldstart import children
from coldstart.config import helper_environment
from coldstart.errors import CaptureError, ColdstartError, ObjectMissingError
from coldstart.save.base import PROCESS, STOPPED, Saved, Saver, reused
from coldstart.save.here import gathered, save_here
from coldstart.save.stage import hash_of
from coldstart.stores.base import Capabilities, StoreWrapper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from coldstart.repository import Repository
    from coldstart.save.base import Saving, Task, Terms
    from coldstart.stores.base import Store

_Result = TypeVar("_Result")

RING_FD = children.WIRE_FD + 1
"""The saver's descriptor of the memory file with the slots."""
CHUNKS_AT_ONCE = 8
"""Chunks that are encoded and sent at a time, where the budget has room for them: many small ones, or few large ones."""

_MOST_SLOTS = 2 * CHUNKS_AT_ONCE
_SLOTS_PART, _WORK_PART = 4, 2
"""The slots may have a quarter of the memory budget, the saver's work a half; the rest is for its interpreter."""
_PIECES_AT_ONCE = 1024
_STOP_SECONDS = 0.2


def save_in_process(saving: Saving, terms: Terms, repository: Repository, stopping: threading.Event) -> Saver:
    """A saver process for chunks under ``terms``; where there is none to be had, the thread that captures."""
    assert saving.address is not None
    if saving.address.url.startswith("memory:"):
        return save_here(repository, terms, saving.bytes_per_second, stopping)
    if not children.can_spawn() or not hasattr(os, "memfd_create"):
        return save_here(
            repository, terms, saving.bytes_per_second, stopping, reason="this platform has no saver process"
        )
    try:
        return _Process(saving, terms, repository, stopping)
    except OSError as error:
        reason = f"the saver process could not be started: {error.strerror}"
        return save_here(repository, terms, saving.bytes_per_second, stopping, reason=reason)


class _Process(Saver):
    def __init__(self, saving: Saving, terms: Terms, repository: Repository, stopping: threading.Event) -> None:
        self._store = repository.store
        self._repository = repository.through(_WritingStore(self, repository.store))
        self._terms = terms
        self._stopping = stopping
        reason = "the saver process ended early"
        self._here = save_here(repository, terms, saving.bytes_per_second, stopping, reason=reason)
        self._engine = PROCESS
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._answers: dict[int, dict[str, Any]] = {}
        self._slots: dict[int, int] = {}
        """The slot of each chunk that has no answer yet."""
        self._sent = 0
        self._error: ColdstartError | None = None
        self._is_over = False
        self._slot_bytes = max(1, terms.largest_bytes)
        count = min(_MOST_SLOTS, max(1, saving.budget_bytes // _SLOTS_PART // self._slot_bytes))
        self._free = list(range(count))
        self._ring = _memory_file(count * self._slot_bytes)
        try:
            self._wire, self._pid = children.spawn(
                "coldstart.save.child",
                helper_environment({"OPENBLAS_NUM_THREADS": "1"}),  # numpy only moves bytes there
                files=[self._ring],
                leads_group=True,  # coldstart.save.turns stops the group
            )
        except OSError:
            os.close(self._ring)
            raise
        self._listener = threading.Thread(target=self._listen, name="coldstart-saver", daemon=True)
        self._listener.start()
        self._send(_greeting(saving, terms))

    @property
    def engine(self) -> str:
        return self._engine

    @property
    def repository(self) -> Repository:
        return self._repository

    @property
    def group(self) -> int:
        return self._pid

    def save(self, tasks: Iterable[Task]) -> list[Saved]:
        return _beside(
            tasks,
            lambda task: reused(task, self._terms),
            lambda others: self._done("save", others, _saved, self._here.save),
        )

    def hashes(self, tasks: Iterable[Task]) -> list[str]:
        return _beside(
            tasks,
            lambda task: None if task.raw_hash is None else task.raw_hash(),
            lambda others: self._done("hash", others, _raw_hash, self._here.hashes),
        )

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool, if_match: str | None) -> str | None:
        """Write a small object and return its etag; None where the saver ended without saying. Raises StoreError."""
        with self._changed:
            number = self._next_number()
        head = {"number": number, "operation": "put", "key": key, "if_absent": if_absent, "if_match": if_match}
        sent = not self._is_over and self._send(head, bytes(data))
        with self._changed:
            self._changed.wait_for(lambda: number in self._answers or self._is_over or self._error or not sent)
            answer = self._answers.pop(number, None)
        if answer is None and self._error is not None:
            raise self._error
        if answer is None:
            self._engine = self._here.engine
            return None
        if "error" in answer:
            raise children.error_of(answer, CaptureError)
        self._store.learn(Capabilities(*answer["capabilities"]))
        return str(answer["etag"])

    def stop(self) -> None:
        if self._sending.acquire(timeout=_STOP_SECONDS):  # else it is given something long, and no chunk
            try:
                with suppress(OSError):
                    children.send(self._wire, {"operation": "stop"})
            finally:
                self._sending.release()
        with self._changed:
            self._changed.notify_all()

    def end(self, seconds: float = 0.0) -> None:
        with self._changed:
            if self._ring < 0:
                return
            self._changed.wait_for(lambda: self._is_over or not self._slots, timeout=seconds)
        children.hang_up(self._wire)
        self._listener.join()
        self._wire.close()
        os.close(self._ring)
        self._ring = -1
        children.end(self._pid)

    # --- chunks ------------------------------------------------------------------------------------------------------

    def _done(
        self,
        operation: str,
        tasks: Iterable[Task],
        read: Callable[[dict[str, Any]], _Result],
        instead: Callable[[Iterable[Task]], list[_Result]],
    ) -> list[_Result]:
        """What became of each task: by the saver as long as there is one, the rest ``instead``."""
        left = iter(tasks)
        given: list[tuple[Task, int | None]] = []
        for task in left:
            given.append((task, self._give(operation, task)))
            if given[-1][1] is None:
                break
        answers = self._wait_for([number for _, number in given])
        unanswered = [task for (task, _), answer in zip(given, answers, strict=True) if answer is None]
        if unanswered:
            self._engine = self._here.engine
        again = iter(instead(unanswered))
        found = [next(again) if answer is None else read(answer) for answer in answers]
        return found + (instead(left) if self._is_over else [])

    def _give(self, operation: str, task: Task) -> int | None:
        """Copy a chunk into a slot, once there is one, and send word of it; None where the saver has ended."""
        before = _hash_now(task) if operation == "save" and not task.settled else ""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._is_halted())
            self._check_halted()
            if self._is_over:
                return None
            number, slot = self._next_number(), self._free.pop()
            self._slots[number] = slot
        offset_bytes = slot * self._slot_bytes
        _write(self._ring, offset_bytes, task.pieces())
        head = {
            "number": number,
            "operation": operation,
            "offset_bytes": offset_bytes,
            "length_bytes": task.length_bytes,
            "item_bytes": task.item_bytes,
            "segment": task.segment,
            "before": before,
            "stored_as": None if task.stored_as is None else [task.stored_as.codec, dict(task.stored_as.parameters)],
        }
        return number if self._send(head) else None

    def _wait_for(self, numbers: list[int | None]) -> list[dict[str, Any] | None]:
        """The answers to what was sent, None where there will be none."""
        asked = [number for number in numbers if number is not None]
        with self._changed:
            self._changed.wait_for(lambda: self._is_halted() or all(number in self._answers for number in asked))
            if not all(number in self._answers for number in asked):
                self._check_halted()
            return [None if number is None else self._answers.pop(number, None) for number in numbers]

    def _is_halted(self) -> bool:
        return self._is_over or self._error is not None or self._stopping.is_set()

    def _check_halted(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopping.is_set():
            raise CaptureError(STOPPED)

    def _next_number(self) -> int:
        self._sent += 1
        return self._sent

    # --- the wire ----------------------------------------------------------------------------------------------------

    def _send(self, document: dict[str, Any], data: bytes = b"") -> bool:
        """Whether it could be sent; what cannot is the saver's end, which the listener notices."""
        try:
            with self._sending:
                children.send(self._wire, document, data)
        except OSError:
            self._note_end()
            return False
        return True

    def _listen(self) -> None:
        """Take answers until the saver ends, or is let go of."""
        with suppress(OSError):
            while (message := children.receive(self._wire)) is not None:
                self._take(message.document)
        self._note_end()

    def _take(self, answer: dict[str, Any]) -> None:
        number = answer["number"]
        with self._changed:
            slot = self._slots.pop(number, None)
            if slot is not None:
                self._free.append(slot)
            if "error" in answer and (slot is not None or number == 0):
                self._error = self._error or children.error_of(answer, CaptureError)
            else:
                self._answers[number] = answer
            self._changed.notify_all()

    def _note_end(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


class _WritingStore(StoreWrapper):
    """The store as this process reads it; what is written goes through the saver as long as there is one."""

    def __init__(self, saver: _Process, store: Store) -> None:
        super().__init__(store)
        self._saver = saver

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        etag = self._saver.put(key, data, if_absent=if_absent, if_match=if_match)
        return self._put_here(key, data, if_absent=if_absent, if_match=if_match) if etag is None else etag

    def _put_here(self, key: str, data: bytes | memoryview, *, if_absent: bool, if_match: str | None) -> str:
        """After the saver's end: it may have written before. Whoever swaps a ref can tell its own from another's."""
        with suppress(ObjectMissingError):
            stored = self._store.get(key)
            if stored.data == bytes(data):
                return stored.etag
        return self._store.put(key, data, if_absent=if_absent, if_match=if_match)


def _beside(
    tasks: Iterable[Task],
    known: Callable[[Task], _Result | None],
    done: Callable[[Iterable[Task]], list[_Result]],
) -> list[_Result]:
    """The results of all tasks in their order: what is ``known`` without the saver's help, and what it has ``done``."""
    found: list[_Result | None] = []

    def others() -> Iterator[Task]:
        for task in tasks:
            found.append(known(task))
            if found[-1] is None:
                yield task

    left = iter(done(others()))
    return [next(left) if each is None else each for each in found]


def _hash_now(task: Task) -> str:
    return hash_of(gathered(task)) if task.raw_hash is None else task.raw_hash()


def _memory_file(size_bytes: int) -> int:
    descriptor = os.memfd_create("coldstart-saver", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size_bytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _write(file: int, offset_bytes: int, pieces: Iterator[memoryview]) -> None:
    """Write pieces end to end. Other threads of this interpreter go on during each call."""
    while batch := list(islice(pieces, _PIECES_AT_ONCE)):
        while batch:
            done = os.pwritev(file, batch, offset_bytes)
            offset_bytes += done
            batch = _rest(batch, done)


def _rest(pieces: list[memoryview], done: int) -> list[memoryview]:
    """What is left of pieces of which the first ``done`` bytes are written."""
    for index, piece in enumerate(pieces):
        if done < len(piece):
            return [piece[done:], *pieces[index + 1 :]]
        done -= len(piece)
    return []


def _greeting(saving: Saving, terms: Terms) -> dict[str, Any]:
    assert saving.address is not None
    return {
        "url": saving.address.url,
        "options": saving.address.options._asdict(),
        "parent": os.getpid(),
        "threads": CHUNKS_AT_ONCE,
        "budget_bytes": saving.budget_bytes // _WORK_PART,
        "bytes_per_second": saving.bytes_per_second,
        "codec": terms.codec,
        "level": terms.level,
        "known": [
            [item_bytes, chunk._replace(parameters=dict(chunk.parameters))]
            for (_, item_bytes, _), chunk in terms.known.items()
        ],
        "known_stays": terms.known_stays,
        "relies_on_stored": terms.relies_on_stored,
        "raw_bytes": terms.raw_bytes,
        "largest_bytes": terms.largest_bytes,
        "device_segments": list(terms.device_segments),
    }


def _saved(answer: dict[str, Any]) -> Saved:
    return Saved(*(answer[field] for field in Saved._fields))


def _raw_hash(answer: dict[str, Any]) -> str:
    return str(answer["raw_hash"])
