"""What time it is at the store: the age of what others wrote there is told by its clock, whatever a worker's own says."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.stores.base import Store

_OF_THIS_MACHINE = ("file:", "memory:")
"""Stores that say of an object when this machine wrote it."""


class StoreClock:
    """Unix seconds by the store's clock. ``clock`` is this machine's; how far the two are apart is found out once.

    An empty object ``clocks/<2 hex>`` is written and looked at: no reading store call says what time it is. There are 256
    of them, so that workers that ask at once do not meet at one that may be written once a second.
    """

    def __init__(self, store: Store, clock: Callable[[], float], unique: Callable[[], str]) -> None:
        self._store = store
        self._clock = clock
        self._unique = unique
        self._offset_seconds: float | None = 0.0 if store.url.startswith(_OF_THIS_MACHINE) else None
        self._lock = threading.Lock()

    def now(self) -> float:
        """Seconds now. Raises StoreError where the store cannot be asked."""
        with self._lock:
            if self._offset_seconds is None:
                self._offset_seconds = self._measured()
            return self._clock() + self._offset_seconds

    def _measured(self) -> float:
        key = f"clocks/{self._unique()[-2:]}"
        self._store.put(key, b"")
        return self._store.head(key).modified_seconds - self._clock()
