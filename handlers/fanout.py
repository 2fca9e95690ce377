"""An async handler: every event fans out to the shards of a vector index, and many events are in flight at once.

coldstart run handlers/fanout.py --input '{"vector": [1, 0, 0, 0, 0, 0, 0, 0], "count": 3}'
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from coldstart import coldstart

if TYPE_CHECKING:
    from coldstart import Context

SHARDS, ROWS, WIDTH = 4, 4096, 8
Floats = np.ndarray[Any, np.dtype[np.float32]]


class Shard(NamedTuple):
    first: int
    units: Floats

    def nearest(self, query: Floats, count: int) -> list[tuple[float, int]]:
        scores = self.units @ query
        best = np.argsort(-scores, kind="stable")[:count]
        return [(float(scores[row]), self.first + int(row)) for row in best]


class Index(NamedTuple):
    shards: tuple[Shard, ...]
    room: asyncio.Semaphore
    """At most this many searches in threads at a time, whatever the number of events."""

    async def search(self, shard: Shard, query: Floats, count: int) -> list[tuple[float, int]]:
        async with self.room:
            return await asyncio.to_thread(shard.nearest, query, count)


async def load() -> dict[str, Any]:
    vectors = np.random.default_rng(3).standard_normal((SHARDS, ROWS, WIDTH), np.float32)
    return {"shards": list(vectors)}


async def init(ctx: Context, state: dict[str, Any]) -> Index:
    """Normalise the shards, all at once. It runs on the loop that serves, so the semaphore belongs to that loop."""
    with ctx.phase("normalise"):
        units = await asyncio.gather(*(asyncio.to_thread(unit_rows, shard) for shard in state["shards"]))
    return Index(tuple(Shard(number * ROWS, rows) for number, rows in enumerate(units)), asyncio.Semaphore(SHARDS))


def unit_rows(rows: Floats) -> Floats:
    lengths: Floats = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / lengths


@coldstart("fanout", load=load, init=init, concurrency=8, warmup=[{"vector": [1.0, 0, 0, 0, 0, 0, 0, 0], "count": 3}])
async def handler(event: dict[str, Any], model: Index) -> dict[str, Any]:
    query, count = np.asarray(event["input"]["vector"], np.float32), event["input"].get("count", 10)
    found = await asyncio.gather(*(model.search(shard, query / np.linalg.norm(query), count) for shard in model.shards))
    best = sorted((pair for part in found for pair in part), key=lambda pair: (-pair[0], pair[1]))[:count]
    return {"matches": [{"row": row, "score": score} for score, row in best]}


if __name__ == "__main__":
    coldstart.serve(handler)
