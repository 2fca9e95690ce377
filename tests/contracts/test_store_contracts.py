"""Every store, bare and wrapped, keeps the contract of stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from coldstart.stores.base import Capabilities
from coldstart.stores.cached import CachedStore
from coldstart.stores.local import LocalStore
from coldstart.stores.location import locate
from coldstart.stores.memory import MemoryStore
from coldstart.stores.probing import ProbingStore
from coldstart.stores.replicated import Member, ReplicatedStore
from coldstart.stores.retrying import RetryingStore
from coldstart.stores.s3 import S3Store
from coldstart.stores.s3_reader import ReadingS3Store
from coldstart.testing import FakeClock, Fault, FaultyStore, LatencyStore, StoreContract
from tests.ignoring_store import Ignoring

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from coldstart.stores import StoreOptions
    from coldstart.stores.base import Store


@pytest.fixture(scope="module")
def bucket_store(new_s3_bucket: Callable[[], str], s3_options: StoreOptions) -> Iterator[Store]:
    """One store for all tests of S3: making a boto3 client takes longer than most of them."""
    store = S3Store(locate(f"s3://{new_s3_bucket()}/some/prefix", s3_options), s3_options)
    yield store
    store.close()


@pytest.fixture(scope="module")
def reading_store(new_s3_bucket: Callable[[], str], s3_options: StoreOptions) -> Iterator[Store]:
    """One store that reads by itself, for the same reason: it writes with a boto3 client."""
    store = ReadingS3Store(locate(f"s3://{new_s3_bucket()}/some/prefix", s3_options), s3_options)
    yield store
    store.close()


class TestMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore("test")


class TestMemoryThatIgnoresConditions(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore(capabilities=Capabilities(create_if_absent=False, compare_and_swap=False, ranges=True))


class TestLocal(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "store")


class TestLocalWithoutLinks(StoreContract):
    """A file system without hard links: creating falls back to the folder's lock."""

    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
        def no_link(source: str, target: str) -> None:
            raise PermissionError(1, "Operation not permitted", source, None, target)

        monkeypatch.setattr("os.link", no_link)
        return LocalStore(tmp_path / "store")


class TestS3(StoreContract):
    swaps_of_each = 4  # the server decides; ours is to send the condition and to believe the answer

    @pytest.fixture
    def store(self, bucket_store: Store) -> Store:
        for info in bucket_store.list(""):
            bucket_store.delete(info.key)
        return bucket_store


class TestReadingS3(StoreContract):
    """Read over connections of our own, written with boto3."""

    swaps_of_each = 4

    @pytest.fixture
    def store(self, reading_store: Store) -> Store:
        for info in reading_store.list(""):
            reading_store.delete(info.key)
        return reading_store


class TestRetryingUnderFailures(StoreContract):
    """One call in five fails before it takes effect; the wrapper makes that invisible."""

    @pytest.fixture
    def store(self) -> Store:
        clock = FakeClock()
        faulty = FaultyStore(MemoryStore(), [Fault("transient_before", times=None, probability=0.2)], clock=clock)
        return RetryingStore(faulty, clock=clock)


class TestCached(StoreContract):
    """A cache so small that copies are evicted all the time."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return CachedStore(MemoryStore(), str(tmp_path / "cache"), limit_bytes=10_000)


class TestCachedWithoutItsFolder(StoreContract):
    """A cache that had to give up its folder."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        (tmp_path / "file").touch()
        return CachedStore(MemoryStore(), str(tmp_path / "file"), limit_bytes=10_000)


def replicated(*stores: Store, **options: Any) -> Store:
    """One store of several."""
    return ReplicatedStore([Member(store, store) for store in stores], **options)


class TestReplicated(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return replicated(MemoryStore(), MemoryStore())


class TestReplicatedWithAReplicaThatIsDown(StoreContract):
    """What one store of two does not take, the other has; it is written on purpose with a single copy."""

    @pytest.fixture
    def store(self) -> Store:
        down = FaultyStore(MemoryStore(), [Fault("transient_before", "put", times=None)])
        return replicated(MemoryStore(), down, copies=1)


class TestReplicatedOfPrimaryWithoutClaims(StoreContract):
    """The primary's claims are those of all."""

    @pytest.fixture
    def store(self) -> Store:
        bare = Capabilities(create_if_absent=False, compare_and_swap=False, ranges=True)
        return replicated(MemoryStore(capabilities=bare), MemoryStore())


class TestProbing(StoreContract):
    """A store that keeps what it claims, found out by the first conditional write."""

    @pytest.fixture
    def store(self) -> Store:
        return ProbingStore(MemoryStore(), identity=uuid4().hex)


class TestProbingOfAServerThatIgnoresConditions(StoreContract):
    """A store that claims all and enforces nothing, as it is known after the first conditional write."""

    @pytest.fixture
    def store(self) -> Store:
        store = ProbingStore(Ignoring(MemoryStore()), identity=uuid4().hex)
        store.put("first", b"", if_absent=True)
        store.delete("first")
        return store


class TestFaultyWithoutFaults(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return FaultyStore(MemoryStore())


class TestLatency(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return LatencyStore(MemoryStore(), latency_seconds=0.02, bytes_per_second=1e6, clock=FakeClock())
