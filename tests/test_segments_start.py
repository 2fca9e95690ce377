"""Starts from flat files, in real processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.starts import Project

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.stores import StoreOptions

HANDLER = """
import numpy as np
from coldstart import coldstart

def load():
    return {"w": np.random.default_rng(1).integers(0, 256, 16 << 20, dtype=np.uint8), "scale": np.ones(7, np.float32)}

@coldstart("flat", load=load, warmup=[{"x": 1}])
def handler(event, model):
    return {"sum": int(model["w"].sum()) * event["input"]["x"]}
"""
INPUT = ("--input", '{"x": 2}')


def test_the_second_worker_maps_what_the_first_ones_proof_kept(tmp_path: Path):
    """A start loads and its proof keeps, the next ones map; all answer the same, and a damaged file is healed by a fetch."""
    project = Project(tmp_path / "project")
    project.write(HANDLER)
    starts = [project.run(*INPUT) for _ in range(3)]
    assert [start.kind for start in starts] == ["cold", "restored", "restored"]
    assert len({str(start.output) for start in starts}) == 1
    assert [start.record["engines"] for start in starts] == [[], ["mapped"], ["mapped"]]
    large = max((project.store / ".flat/v1/segments").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(large.read_bytes())
    data[77] ^= 1
    large.unlink()
    large.write_bytes(data)
    large.chmod(0o400)
    healed = project.run(*INPUT)
    assert (healed.kind, healed.output) == ("restored", starts[0].output)
    assert healed.record["engines"] != ["mapped"]
    assert project.run(*INPUT).record["engines"] == ["mapped"]


def test_a_worker_of_a_remote_store_maps_from_the_cache(tmp_path: Path, s3_options: StoreOptions, s3_bucket: str):
    """Before a bucket the files lie in the host's cache; the start after the one that fetched maps them."""
    project = Project(tmp_path / "project")
    project.write(HANDLER)
    project.environment = {
        "COLDSTART_STORE": f"s3://{s3_bucket}/prefix",
        "COLDSTART_CACHE": str(tmp_path / "cache"),
        "COLDSTART_ENDPOINT_URL": s3_options.endpoint_url,
        "COLDSTART_REGION": s3_options.region,
        "COLDSTART_ACCESS_KEY_ID": s3_options.access_key_id,
        "COLDSTART_SECRET_ACCESS_KEY": s3_options.secret_access_key,
    }
    starts = [project.run(*INPUT) for _ in range(3)]
    assert [start.kind for start in starts] == ["cold", "restored", "restored"]
    assert len({str(start.output) for start in starts}) == 1
    assert starts[1].record["engines"] != ["mapped"]
    assert starts[2].record["engines"] == ["mapped"]
    assert len(list((tmp_path / "cache/v1/segments").iterdir())) == 2
