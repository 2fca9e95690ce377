"""Programs that could not be made: remembered in the store, so that not every worker of a fleet tries for minutes again.

::

    <root>/refusals/<name>/<key>/<program id>-<options>     {"reason": ..., "versions": {...}, "created_seconds": ...}

A note holds for the code, the platform and the wishes that its key names, and for the versions of what makes programs: with
another torch, or another coldstart, it is tried again. ``--fresh`` tries again too.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from coldstart.errors import ObjectMissingError
from coldstart.terms import VERSION

if TYPE_CHECKING:
    from coldstart.manifest import KeyRecord
    from coldstart.stores.base import Store

MAX_REASON = 2000


def refusal(store: Store, name: str, key: KeyRecord, program: str) -> str:
    """Why making this program failed before, "" if it did not, or might not again. Raises StoreError."""
    try:
        document = json.loads(store.get(_key(name, key, program)).data)
        return str(document["reason"]) if document["versions"] == _versions() else ""
    except (ObjectMissingError, ValueError, KeyError, TypeError):  # no note, or one that somebody damaged: try
        return ""


def note_refusal(store: Store, name: str, key: KeyRecord, program: str, reason: str) -> None:
    """Remember why making this program failed. Raises StoreError."""
    document = {"reason": reason[:MAX_REASON], "versions": _versions(), "created_seconds": round(time.time(), 3)}
    store.put(_key(name, key, program), json.dumps(document).encode())


def _key(name: str, key: KeyRecord, program: str) -> str:
    return f"refusals/{name}/{key.digest}/{program}"


def _versions() -> dict[str, str]:
    """Versions of what makes programs, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"coldstart": VERSION}
    for package in ("torch", "onnxscript", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found
