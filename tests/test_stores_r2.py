"""The stores against R2's own rules, as Cloudflare's simulator has them (npm: miniflare, which needs node).

Slow: needs an installation of its own. One command makes it and runs these tests::

    npm install --prefix .miniflare miniflare@4 && python -m pytest -m slow tests/test_stores_r2.py

``MINIFLARE`` names another folder that has it. What R2 does and the simulator does not: one write a second to a key,
signatures, tokens. Those are held by ``tests/test_stores_s3.py`` with answers that R2 documents.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coldstart.errors import BlobCorruptError, StoreError, StoreTransientError
from coldstart.repository import Repository
from coldstart.stores import StoreOptions, s3
from coldstart.stores.location import locate
from coldstart.stores.retrying import RetryingStore
from coldstart.stores.s3 import S3Store
from coldstart.stores.s3_reader import ReadingS3Store
from coldstart.testing import StoreContract
from tests.generations import KEY, publish

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstart.stores.base import Store

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("MINIFLARE", ROOT / ".miniflare"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("node") and (FOLDER / "node_modules/miniflare").is_dir()), reason="no node, or no miniflare"
    ),
]


@pytest.fixture(scope="module")
def options() -> Iterator[StoreOptions]:
    """Options that reach the simulator."""
    command = ["node", str(Path(__file__).with_name("r2_simulator.mjs")), str(FOLDER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip().rstrip("/")
        yield StoreOptions(endpoint_url=address, access_key_id="id", secret_access_key="secret")
        process.stdin.close()
        process.wait(30)


@pytest.fixture(scope="module")
def written(options: StoreOptions) -> Iterator[Store]:
    """One store that boto3 reads and writes."""
    store = S3Store(locate("r2://bucket/some/prefix", options), options)
    yield store
    store.close()


@pytest.fixture(scope="module")
def read(options: StoreOptions) -> Iterator[Store]:
    """One store that reads by itself."""
    store = ReadingS3Store(locate("r2://bucket/other/prefix", options), options)
    yield store
    store.close()


def emptied(store: Store) -> Store:
    """The store, with nothing in it."""
    for info in list(store.list("")):
        store.delete(info.key)
    return store


class TestR2(StoreContract):
    @pytest.fixture
    def store(self, written: Store) -> Store:
        return emptied(written)


class TestReadingR2(StoreContract):
    @pytest.fixture
    def store(self, read: Store) -> Store:
        return emptied(read)


def test_bytes_that_changed_on_their_way_are_refused(written: Store, monkeypatch: pytest.MonkeyPatch):
    """R2 looks at Content-MD5, which every write carries: other bytes are BadDigest, which is asked again, and nothing is stored."""
    monkeypatch.setattr(s3, "_md5", lambda _: "XrY7u+Ae7tCTyyK7j1rNww==")  # of other bytes
    with pytest.raises(StoreTransientError, match="BadDigest"):
        written.put("damaged", b"data")
    assert not [info for info in written.list("") if info.key == "damaged"]


def test_a_range_past_the_end_is_corruption(read: Store):
    """As R2 has it: the part that is there, or 416 where nothing is."""
    read.put("short", b"12345")
    for offset in (0, 4, 5, 100):
        with pytest.raises(BlobCorruptError):
            read.read_into("short", memoryview(bytearray(6)), offset_bytes=offset)


def test_a_name_that_is_too_long_for_r2_is_an_error_of_ours(options: StoreOptions):
    """Beyond 1,024 bytes R2 refuses a key, and that will not pass: it is not asked again."""
    store = S3Store(locate(f"r2://bucket/{'/'.join(['p' * 200] * 5)}", options), options)
    with pytest.raises(StoreError) as caught:
        store.put("k" * 100, b"data")
    assert not isinstance(caught.value, StoreTransientError)
    store.close()


def test_generations_are_published_one_after_another(options: StoreOptions):
    """The commit protocol over R2's conditions: each generation replaces the one before, and a stale look-up loses."""
    repository = Repository(RetryingStore(ReadingS3Store(locate("r2://bucket/repository", options), options)))
    refs = [publish(repository) for _ in range(3)]
    assert [ref.generation for ref in refs] == [1, 2, 3]
    assert repository.look_up("model", KEY).ref == refs[-1]
