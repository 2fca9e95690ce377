"""A note of this host that a generation was bad, so that its next worker does not try it first again.

A note changes the order in which generations are tried and nothing else: nothing is deleted, and a generation that has one
is still tried before ``load``. It holds for ``HOLDS_SECONDS``, because somebody may mend the store; a start or a
``coldstart snapshot verify`` that finds the generation good lifts it at once.

Notes are files below the folder of restored files, not objects of the store: a worker that may only read can write them,
and looking for them costs a start no request. So a fresh host finds out by itself, at the price of one failed attempt.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HOLDS_SECONDS = 24 * 3600.0
_FOLDER = ".quarantine"
_MOST_REASON = 1000


class Quarantine:
    """The notes of this host about the generations of one store. ``clock`` gives Unix seconds.

    Best effort: a folder that cannot be read has no notes, one that cannot be written gets none. A start goes on either way.
    """

    def __init__(self, folder: str, store_url: str, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = f"{folder}/{_FOLDER}"
        self._store = f"{zlib.crc32(store_url.rstrip('/').encode()):08x}"
        self._clock = clock

    def has_notes(self, name: str) -> bool:
        """Whether there are notes about snapshot ``name`` that still hold: one look at a folder, before anything is known."""
        try:
            notes = os.listdir(f"{self._folder}/{name}")
        except OSError:
            return False
        ending = f"-{self._store}.json"
        return any(
            self.reason(f"manifests/{name}/{note.removesuffix(ending)}") for note in notes if note.endswith(ending)
        )

    def reason(self, manifest_key: str) -> str:
        """Why the generation stored under this key was found bad, "" if it was not, or long ago."""
        try:
            with open(self._path(manifest_key), encoding="utf-8") as file:
                note = json.load(file)
            until = float(note["noted_seconds"]) + HOLDS_SECONDS
            return str(note["reason"]) if self._clock() < until else ""
        except (OSError, ValueError, KeyError, TypeError):  # none, or none that we wrote
            return ""

    def note(self, manifest_key: str, reason: str) -> None:
        """Note that the generation is bad."""
        path = self._path(manifest_key)
        temporary = f"{path}.{os.getpid()}"
        with suppress(OSError):  # see the class: without a note the next worker tries it first, as this one did
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"reason": reason[:_MOST_REASON], "noted_seconds": self._clock()}, file)
            os.replace(temporary, path)

    def lift(self, manifest_key: str) -> bool:
        """The generation is good after all; whether there was a note."""
        path = self._path(manifest_key)
        try:
            os.unlink(path)
        except OSError:
            return False
        with suppress(OSError):  # others of this snapshot have notes
            os.rmdir(os.path.dirname(path))
        return True

    def clear(self, name: str) -> None:
        """Lift all notes about a snapshot: its current generation is good, and the others are not tried before it."""
        folder = f"{self._folder}/{name}"
        with suppress(OSError):  # there is none, or somebody else clears it
            for note in os.listdir(folder):
                if note.endswith(f"-{self._store}.json"):
                    os.unlink(f"{folder}/{note}")
            os.rmdir(folder)

    def _path(self, manifest_key: str) -> str:
        _, name, generation = manifest_key.split("/")
        return f"{self._folder}/{name}/{generation}-{self._store}.json"
