"""A store that claims what it does not do, as some S3-compatible servers."""

from __future__ import annotations

from coldstart.errors import BlobCorruptError
from coldstart.stores.base import Capabilities, StoreWrapper


class Ignoring(StoreWrapper):
    """``store``, which takes the conditions in ``ignored`` and writes regardless; ``ranges``: reads from the beginning."""

    def __init__(self, store, ignored=("create_if_absent", "compare_and_swap"), *, whole_ranges=False):
        super().__init__(store)
        self.conditions = 0
        self._ignored = ignored
        self._whole_ranges = whole_ranges

    @property
    def capabilities(self):
        return Capabilities(create_if_absent=True, compare_and_swap=True, ranges=True)

    def put(self, key, data, *, if_absent=False, if_match=None):
        self.conditions += if_absent or if_match is not None
        if "create_if_absent" in self._ignored:
            if_absent = False
        if "compare_and_swap" in self._ignored:
            if_match = None
        return self._store.put(key, data, if_absent=if_absent, if_match=if_match)

    def read_into(self, key, target, *, offset_bytes=0):
        if self._whole_ranges and offset_bytes:
            raise BlobCorruptError("the whole object came", key=key)
        self._store.read_into(key, target, offset_bytes=offset_bytes)
