"""What decoders on a GPU share: tables of the items that nvCOMP is to decode, and what it said of each of them.

For ``count`` items a table has four columns of 8 bytes an entry: where an item is, its stored length, the room for what it
gives, and where that is. Results are a column of 8 bytes an entry, how much it gave, and one of 4, its status.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from coldstart.codecs.nvcomp import DecodeBatch, status_name
from coldstart.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Sequence

ADDRESS_BYTES = 8
STATUS_BYTES = 4
COLUMNS = 4
RESULT_BYTES = ADDRESS_BYTES + STATUS_BYTES
"""Of one item."""


def decode_batch(count: int, table: int, decoded_bytes: int, statuses: int, scratch: tuple[int, int]) -> DecodeBatch:
    """A batch of ``count`` items: device addresses of their table and results; scratch is (address, bytes)."""
    column_bytes = ADDRESS_BYTES * count
    return DecodeBatch(
        item_count=count,
        stored=table,
        stored_bytes=table + column_bytes,
        targets=table + 3 * column_bytes,
        room_bytes=table + 2 * column_bytes,
        decoded_bytes=decoded_bytes,
        statuses=statuses,
        scratch=scratch[0],
        scratch_bytes=scratch[1],
    )


def check_results(results: memoryview, rooms: Sequence[int], what: str) -> None:
    """Raise CodecError unless every item (``what``: the name of its kind) gave the bytes that there was room for."""
    count = len(rooms)
    actual = struct.unpack_from(f"<{count}Q", results, 0)
    statuses = struct.unpack_from(f"<{count}i", results, ADDRESS_BYTES * count)
    for room, got, status in zip(rooms, actual, statuses, strict=True):
        if status or got != room:
            raise CodecError(
                f"nvCOMP decoded {what} of {room} bytes to {got} ({status_name(status)}): it is damaged, or this nvCOMP does"
                " not read it; COLDSTART_CODEC=raw stores without"
            )
