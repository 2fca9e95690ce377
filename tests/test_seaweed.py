"""The commit protocol against a real S3 server with atomic conditions: races of writers, and writers that are killed."""

from __future__ import annotations

import random
import signal
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from coldstart.errors import StateChangedError
from coldstart.manifest import blob_key
from coldstart.repository import Margins, Repository
from coldstart.stores import open_store
from tests.generations import KEY, capture_of, hash_of, publish, restored, write
from tests.seaweed import seaweed
from tests.starts import Project, in_threads

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coldstart.stores import StoreOptions

WRITERS, COMMITS = 10, 2
KILLS = 30
URL = "s3://snapshots/root"

WRITER = """
import sys
import numpy as np
from coldstart.commit import confirm
from coldstart.fetch import Address
from coldstart.repository import Margins, Repository
from coldstart.save import Saving
from coldstart.capture import Encoding, write_generation
from coldstart.stores import StoreOptions, open_store
from tests.generations import KEY, Written, capture_of

options = StoreOptions(endpoint_url=sys.argv[1], region="us-east-1", access_key_id="testkey", secret_access_key="testsecret")
address = Address("s3://snapshots/root", options)
repository = Repository(open_store(*address), margins=Margins(ref_interval_seconds=0.0))
print("ready", flush=True)
while True:
    seen = repository.look_up("model", KEY)
    parent = repository.manifest(seen.ref.manifest, name="model") if seen.ref else None
    number = repository.next_generation("model", KEY, seen.ref)
    state = {"same": np.arange(1 << 18), "new": np.full(1 << 17, number)}
    capture = capture_of(state, follows=parent and Written(parent, seen.ref.manifest, 0, 0), generation=number)
    saving = Saving("process", address, 64 << 20, 0)
    written = write_generation(capture, repository, encoding=Encoding("raw", 1), pace=lambda: None, saving=saving)
    confirm(repository, written.manifest, written.manifest_key, replaced=parent)
    repository.publish(written.manifest, written.manifest_key, replaces=seen)
    print(number, flush=True)
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreOptions]:
    """A server for the tests of this file."""
    with seaweed(tmp_path_factory.mktemp("seaweed")) as found:
        yield found


def test_ten_writers_race(options: StoreOptions) -> None:
    """Ten writers that publish as fast as they can: each acknowledged generation is kept, each number given once."""
    root = "s3://snapshots/race"
    losses: list[int] = []

    def work() -> list[int]:
        repository = Repository(open_store(root, options), margins=Margins(ref_interval_seconds=0.0))
        mine: list[int] = []
        while len(mine) < COMMITS:
            try:
                mine.append(publish(repository).generation)
            except StateChangedError:
                losses.append(1)
        return mine

    acknowledged = sorted(number for numbers in in_threads(WRITERS, work) for number in numbers)
    assert acknowledged == list(range(1, WRITERS * COMMITS + 1))
    assert losses, "nobody met anybody: that was no race"
    repository = Repository(open_store(root, options))
    ref = repository.look_up("model", KEY).ref
    assert ref is not None
    assert [entry.generation for entry in ref.named] == acknowledged[::-1]
    assert all(repository.manifest(entry.manifest, name="model").generation == entry.generation for entry in ref.named)


def test_a_generation_is_looked_at_before_its_ref_moves(options: StoreOptions) -> None:
    """On a real server too: what the store lost after it was written keeps the ref from moving."""
    from coldstart.commit import confirm
    from coldstart.errors import ObjectMissingError

    repository = Repository(open_store("s3://snapshots/looked-at", options))
    written = write(capture_of({"w": np.arange(1000)}), repository)
    confirm(repository, written.manifest, written.manifest_key, replaced=None)
    repository.store.delete(blob_key(written.manifest.chunks[0].blob))
    with pytest.raises(ObjectMissingError):
        confirm(repository, written.manifest, written.manifest_key, replaced=None)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the saver process is for Linux")
def test_killed_writers(options: StoreOptions, tmp_path: Path) -> None:
    """However often a capturing process is killed, the last committed generation restores, bit for bit."""
    project = Project(tmp_path)
    script = project.write(WRITER, "writer.py")
    repository = Repository(open_store(URL, options))
    last = kills = 0
    chance = random.Random(0)
    while kills < KILLS:
        with project.popen(str(script), options.endpoint_url) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
            first = process.stdout.readline() if kills % 2 else ""  # every other time it has committed one, at least
            time.sleep(chance.random() * 2)
            process.send_signal(signal.SIGKILL)
            told, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors
        kills += 1
        last = max([last, *map(int, (first + told).split())])
        ref = repository.look_up("model", KEY).ref
        assert (ref is None and last == 0) or (ref is not None and ref.generation >= last)
        for entry in ref.named if ref else ():
            manifest = repository.manifest(entry.manifest, name="model")
            state = restored(manifest, repository.store)
            assert np.array_equal(state["same"], np.arange(1 << 18))
            assert set(state["new"]) == {entry.generation}
    assert last >= KILLS // 2
    print(f"{kills} kills, {last} generations committed, all of them restored after each kill")


def test_blobs_are_what_they_say(options: StoreOptions) -> None:
    """A blob of the server is read back with the bytes that were written."""
    repository = Repository(open_store("s3://snapshots/blobs", options))
    data = bytes(range(256)) * 100
    assert repository.put_blob(hash_of(data), data)
    assert not repository.put_blob(hash_of(data), data)
    assert repository.store.get(blob_key(hash_of(data))).data == data
