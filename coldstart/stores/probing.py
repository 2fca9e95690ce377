"""What a server enforces, found out by trying, before the first write that rests on it.

A reader needs none of it, so nothing is tried on the way of a start that restores. Whoever writes with a condition tries
first (``ProbingStore``), once a process for each bucket: ten small requests beside a capture that takes seconds. The answer
is not kept any longer: a server may be replaced behind its address, and an old answer would cost a generation.

A condition that the server ignores is not claimed from then on (``capabilities``), and not sent; the reason is told once.
What was written before is as it is.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from coldstart.errors import (
    AccessDeniedError,
    BlobCorruptError,
    ConditionFailedError,
    StoreSetupError,
    StoreTransientError,
)
from coldstart.stores.base import Capabilities, Store, StoreWrapper

if TYPE_CHECKING:
    from collections.abc import Callable

    _Conditional = Callable[[], object]

PREFIX = "probes/"
"""Where probes are written, each under a key of its own, and deleted again."""
R2_SECONDS = 1.1
"""R2 takes one write of an object a second."""
MOST_SKEW_SECONDS = 300.0
"""How far this machine's clock may be off the store's. Signatures are refused from 900 s on."""

_TEXT = b"what does this store enforce?"
_PART = slice(5, 9)


class Probed(NamedTuple):
    """What a store does. ``skew_seconds``: how far its clock is ahead of this machine's, to about a request's duration."""

    capabilities: Capabilities
    skew_seconds: float


def probe(
    store: Store,
    *,
    clock: Callable[[], float] = time.time,
    unique: Callable[[], str] = lambda: os.urandom(8).hex(),
    pause: Callable[[], None] | None = None,
) -> Probed:
    """Try what ``store`` enforces, with two small objects that are deleted again. Raises StoreError.

    ``pause`` is waited between two writes of one object; default: a second for R2, which takes no more than one in that time.
    """
    if pause is None:
        pause = partial(time.sleep, R2_SECONDS if store.url.startswith("r2:") else 0.0)
    created, swapped = f"{PREFIX}{unique()}", f"{PREFIX}{unique()}"
    try:
        began = clock()
        store.put(created, _TEXT)
        middle = (began + clock()) / 2
        skew_seconds = store.head(created).modified_seconds - middle
        etag = store.put(swapped, _TEXT)
        ranges = _gives_ranges(store, created)
        pause()
        creates = _refuses(lambda: store.put(created, _TEXT, if_absent=True))
        swaps = _refuses(lambda: store.put(swapped, _TEXT, if_match=_another(etag)))
        pause()
        swaps = swaps and not _refuses(lambda: store.put(swapped, _TEXT, if_match=etag))
    finally:
        for key in (created, swapped):
            with suppress(
                AccessDeniedError
            ):  # writers may have no right to delete: some bytes stay, which nothing reads
                store.delete(key)
    return Probed(Capabilities(create_if_absent=creates, compare_and_swap=swaps, ranges=ranges), skew_seconds)


def _refuses(attempt: _Conditional) -> bool:
    """Whether a write is refused that has to be. A server that knows no such request enforces nothing."""
    try:
        attempt()
    except ConditionFailedError:
        return True
    except StoreSetupError:
        return False
    return False


def _another(etag: str) -> str:
    """An etag of the same form that no object has: S3 servers compare what stands between the quotes."""
    digits = "0123456789abcdef"
    return "".join(digits[(digits.index(sign) + 1) % 16] if sign in digits else sign for sign in etag)


def _gives_ranges(store: Store, key: str) -> bool:
    part = bytearray(_PART.stop - _PART.start)
    try:
        store.read_into(key, memoryview(part), offset_bytes=_PART.start)
    except (BlobCorruptError, StoreTransientError):  # how a store says that the answer was to another question
        return False
    return bytes(part) == _TEXT[_PART]


def missing(capabilities: Capabilities) -> str:
    """What a store without some of them cannot do, in words; "" if it can do all."""
    lacks = [
        text
        for holds, text in (
            (capabilities.create_if_absent, "create-if-absent"),
            (capabilities.compare_and_swap, "compare-and-swap"),
            (capabilities.ranges, "exact ranges"),
        )
        if not holds
    ]
    return " and ".join(lacks)


class ProbingStore(StoreWrapper):
    """``store``, of which is claimed what a probe has shown, from the first conditional write on; before, what it claims.

    ``degraded`` is told, once, what it does not enforce. Stands inside the retrying wrapper, which repeats a probe too.
    """

    _known: dict[str, Capabilities] = {}  # noqa: RUF012  one for the process: what a server does is the same for all openings
    _known_lock = threading.Lock()

    def __init__(self, store: Store, *, identity: str, degraded: Callable[[str], None] | None = None) -> None:
        super().__init__(store)
        self._identity = identity
        self._degraded = degraded
        self._told = False
        self._lock = threading.Lock()

    @classmethod
    def forget(cls) -> None:
        """Know nothing, as a fresh process."""
        with cls._known_lock:
            cls._known.clear()

    @property
    def capabilities(self) -> Capabilities:
        """What has been found out, or what the store claims."""
        return self._known.get(self._identity, self._store.capabilities)

    def learn(self, capabilities: Capabilities) -> None:
        """Take over what was found out elsewhere, and tell what is missing."""
        with self._known_lock:
            self._known[self._identity] = capabilities
        self._tell(capabilities)

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """As the wrapped store; a condition is sent only if it is known to be enforced."""
        if not if_absent and if_match is None:
            return self._store.put(key, data)
        found = self._probed()
        if if_absent:
            return self._store.put(key, data, if_absent=found.create_if_absent)
        return self._store.put(key, data, if_match=if_match if found.compare_and_swap else None)

    def _probed(self) -> Capabilities:
        with self._lock:  # one probe, for which the others wait
            if self._identity not in self._known:
                self.learn(self._probe())
            found = self._known[self._identity]
        self._tell(found)
        return found

    def _probe(self) -> Capabilities:
        try:
            is_r2 = "r2.cloudflarestorage.com" in self._identity  # reached as s3:// too
            return probe(self._store, pause=partial(time.sleep, R2_SECONDS) if is_r2 else None).capabilities
        except AccessDeniedError:  # a credential for the snapshots' own keys alone: what is claimed has to do
            return self._store.capabilities

    def _tell(self, capabilities: Capabilities) -> None:
        lacks = missing(capabilities)
        told, self._told = self._told, self._told or bool(lacks)
        if lacks and not told and self._degraded is not None:
            self._degraded(
                f"{self.url} ignores {lacks}: it is used without, so two writers of one snapshot may undo each other; use a"
                " store that enforces conditions, or let one worker write"
            )
