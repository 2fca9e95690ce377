"""The contract of a store as tests: subclass ``StoreContract``, give it a ``store`` fixture, and all of it runs.

What ``capabilities`` does not claim is tested for what it then does: accept the option, and ignore it.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, TypeVar

import pytest

from coldstart.errors import (
    BlobCorruptError,
    ConditionFailedError,
    ObjectMissingError,
    StoreSetupError,
    StoreTransientError,
)
from coldstart.stores.base import StoredObject

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.stores.base import Store

    _Action = Callable[[], object]

HOSTILE_KEYS = (
    "",
    "/",
    "/etc/passwd",
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "a/./b",
    "a//b",
    "a/",
    ".hidden",
    "a/.tmp-1",
    "a\\b",
    "a b",
    "a\n",
    "a\0b",
    "a?b",
    "a#b",
    "a%2fb",
    "%2e%2e/x",
    "~",
    "caf\u00e9",
    "a" * 202,
    "/".join("abcdefghijklmnopq"),
)
"""What must never reach a file system or a server; every operation refuses each of them with StoreSetupError."""

ODD_KEYS = ("-", "_", "=", "a=b", "a..b", "0", "a" * 201, "/".join("abcdefghijklmnop"), "A.B-c_d=e/f")
"""Legal keys at the edges of what the grammar allows."""

_Result = TypeVar("_Result")
_THREADS = 8
_PATIENCE = 20
_STEPS = 60
_WHOLE_BYTES = 200_000


class StoreContract:
    """Everything that ``coldstart.stores.base`` promises. Subclasses define the fixture ``store``: fresh and empty.

    ``swaps_of_each`` is how many acknowledged swaps each of eight threads makes of one object at the same time. A store
    whose conditions are a server's needs fewer than one that keeps them itself.
    """

    swaps_of_each = 20

    def test_what_was_put_is_what_get_returns(self, store: Store) -> None:
        """An object of every byte value comes back as it was, with the etag that put returned."""
        data = bytes(range(256)) * 3
        etag = store.put("blobs/ab/x", data)
        assert store.get("blobs/ab/x") == StoredObject(data, etag)

    def test_an_empty_object_is_an_object(self, store: Store) -> None:
        """Zero bytes are stored, found, and different from nothing."""
        store.put("empty", b"")
        assert store.get("empty").data == b""
        assert store.head("empty").size_bytes == 0
        store.read_into("empty", memoryview(bytearray()))

    def test_a_put_takes_a_view_and_keeps_a_copy(self, store: Store) -> None:
        """A slice of a larger buffer is stored, and what happens to the buffer later changes nothing."""
        buffer = bytearray(b"0123456789")
        store.put("view", memoryview(buffer)[2:6])
        buffer[:] = bytes(10)
        assert store.get("view").data == b"2345"

    def test_a_large_object_survives(self, store: Store) -> None:
        """Several megabytes of noise, not a round number of them, come back unchanged by both ways of reading."""
        data = Random(7).randbytes((3 << 20) + 17)  # noqa: S311  noise
        target = memoryview(bytearray(len(data)))
        store.put("large", data)
        store.read_into("large", target)
        assert target == data
        assert store.get("large").data == data

    def test_a_second_put_replaces_the_first(self, store: Store) -> None:
        """The last write is read, shorter or longer, under an etag of its own."""
        first = store.put("k", b"the first, longer one")
        second = store.put("k", b"second")
        assert store.get("k") == StoredObject(b"second", second)
        assert first != second
        assert store.head("k").size_bytes == len(b"second")

    def test_what_is_not_there_is_missing(self, store: Store) -> None:
        """get, read_into and head say ObjectMissingError and name the key, also beside and below other objects."""
        store.put("a/b", b"x")
        for key in ("a/c", "nothing", "a/b/c"):
            for read in _readers(store, key):
                with pytest.raises(ObjectMissingError) as caught:
                    read()
                assert caught.value.key == key

    def test_read_into_fills_just_the_target(self, store: Store) -> None:
        """A part from the middle lands in a part of a buffer, and the bytes around it stay."""
        store.put("k", b"0123456789")
        buffer = bytearray(b"........")
        store.read_into("k", memoryview(buffer)[2:6], offset_bytes=3)
        assert bytes(buffer) == b"..3456.."

    def test_read_into_reaches_the_last_byte(self, store: Store) -> None:
        """The end of the object can be read, and so can all of it."""
        store.put("k", b"0123456789")
        for offset_bytes in (0, 9):
            buffer = bytearray(10 - offset_bytes)
            store.read_into("k", memoryview(buffer), offset_bytes=offset_bytes)
            assert bytes(buffer) == b"0123456789"[offset_bytes:]

    @pytest.mark.parametrize(("offset_bytes", "length_bytes"), [(0, 11), (9, 2), (10, 1), (500, 1)])
    def test_read_into_past_the_end_is_corruption(self, store: Store, offset_bytes: int, length_bytes: int) -> None:
        """An object that is shorter than the manifest says is BlobCorruptError, not fewer bytes."""
        store.put("k", b"0123456789")
        with pytest.raises(BlobCorruptError):
            store.read_into("k", memoryview(bytearray(length_bytes)), offset_bytes=offset_bytes)

    def test_head_tells_size_and_age(self, store: Store) -> None:
        """A head has the key and size, and a write time that a later write does not put back."""
        store.put("k", b"123")
        before = store.head("k")
        store.put("k", b"12345")
        after = store.head("k")
        assert (before.key, before.size_bytes, after.size_bytes) == ("k", 3, 5)
        assert 0 < before.modified_seconds <= after.modified_seconds

    def test_delete_removes_and_repeats(self, store: Store) -> None:
        """A deleted object is missing, its neighbour stays, and deleting what is not there is no error."""
        store.put("a/x", b"1")
        store.put("a/y", b"2")
        for key in ("a/x", "a/x", "never/there", "a/y/below"):
            store.delete(key)
        with pytest.raises(ObjectMissingError):
            store.get("a/x")
        assert store.get("a/y").data == b"2"

    @pytest.mark.parametrize(
        ("prefix", "expected"),
        [
            ("", {"refs/a/1", "refs/a/2", "refs/ab/1", "refs/a-b", "x"}),
            ("refs/", {"refs/a/1", "refs/a/2", "refs/ab/1", "refs/a-b"}),
            ("refs/a/", {"refs/a/1", "refs/a/2"}),
            ("refs/a", {"refs/a/1", "refs/a/2", "refs/ab/1", "refs/a-b"}),
            ("refs/a/2", {"refs/a/2"}),
            ("refs/a/1/", set()),
            ("nothing/", set()),
        ],
    )
    def test_list_finds_what_begins_so(self, store: Store, prefix: str, expected: set[str]) -> None:
        """A listing has every object whose key starts with the prefix, once, and no other."""
        for number, key in enumerate(("refs/a/1", "refs/a/2", "refs/ab/1", "refs/a-b", "x")):
            store.put(key, bytes(number))
        found = sorted(store.list(prefix))
        assert [info.key for info in found] == sorted(expected)
        assert found == sorted(store.head(key) for key in expected)

    def test_a_deleted_object_is_not_listed(self, store: Store) -> None:
        """A listing begun after a deletion does not show the object, nor anything that writing left behind."""
        store.put("a/x", b"1")
        store.put("a/y", b"2", if_absent=True)
        store.delete("a/x")
        assert [info.key for info in store.list("")] == ["a/y"]

    @pytest.mark.parametrize("prefix", ["..", "../", "/", "a//", "a/../", "a b", "\0"])
    def test_a_hostile_prefix_is_refused(self, store: Store, prefix: str) -> None:
        """A listing cannot be led out of the store."""
        with pytest.raises(StoreSetupError):
            list(store.list(prefix))

    @pytest.mark.parametrize("key", HOSTILE_KEYS)
    def test_a_hostile_key_is_refused(self, store: Store, key: str) -> None:
        """No operation takes a key outside the grammar, and nothing is written by trying."""
        writers: tuple[_Action, ...] = (lambda: store.put(key, b"x"), lambda: store.delete(key))
        for action in (*_readers(store, key), *writers):
            with pytest.raises(StoreSetupError):
                action()
        assert list(store.list("")) == []

    @pytest.mark.parametrize("key", ODD_KEYS)
    def test_an_odd_key_is_a_key(self, store: Store, key: str) -> None:
        """Every legal key can be written, read and listed, at the limits of length and depth too."""
        store.put(key, b"odd")
        assert store.get(key).data == b"odd"
        assert [info.key for info in store.list("")] == [key]

    def test_the_address_is_for_people(self, store: Store) -> None:
        """The url has a scheme and no place for credentials or options."""
        assert "://" in store.url
        assert not set("@?#") & set(store.url)

    # --- conditions -------------------------------------------------------------------------------------------------

    def test_if_absent_creates_once(self, store: Store) -> None:
        """The first create wins, the second is refused and changes nothing; after a deletion the name is free."""
        _need(store.capabilities.create_if_absent)
        store.put("k", b"first", if_absent=True)
        with pytest.raises(ConditionFailedError) as caught:
            store.put("k", b"second", if_absent=True)
        assert caught.value.key == "k"
        assert store.get("k").data == b"first"
        store.delete("k")
        store.put("k", b"third", if_absent=True)
        assert store.get("k").data == b"third"

    def test_if_match_swaps_just_the_version_that_was_read(self, store: Store) -> None:
        """The etag of put and of get both swap once; a stale one is refused and changes nothing."""
        _need(store.capabilities.compare_and_swap)
        first = store.put("k", b"1")
        second = store.put("k", b"2", if_match=first)
        with pytest.raises(ConditionFailedError) as caught:
            store.put("k", b"lost", if_match=first)
        assert caught.value.key == "k"
        assert store.get("k") == StoredObject(b"2", second)
        store.put("k", b"3", if_match=store.get("k").etag)
        assert store.get("k").data == b"3"

    def test_if_match_does_not_match_what_is_not_there(self, store: Store) -> None:
        """A swap neither creates an object nor brings a deleted one back."""
        _need(store.capabilities.compare_and_swap)
        etag = store.put("k", b"1")
        store.delete("k")
        for key in ("k", "never/there"):
            with pytest.raises(ConditionFailedError):
                store.put(key, b"2", if_match=etag)
            with pytest.raises(ObjectMissingError):
                store.get(key)

    def test_an_unclaimed_condition_is_ignored(self, store: Store) -> None:
        """A store that does not claim a condition takes the option and writes."""
        if store.capabilities.create_if_absent and store.capabilities.compare_and_swap:
            pytest.skip("the store claims both")
        store.put("k", b"first")
        if not store.capabilities.create_if_absent:
            store.put("k", b"second", if_absent=True)
            assert store.get("k").data == b"second"
        if not store.capabilities.compare_and_swap:
            store.put("k", b"third", if_match="something else")
            assert store.get("k").data == b"third"

    # --- several threads --------------------------------------------------------------------------------------------

    def test_of_many_creators_one_wins(self, store: Store) -> None:
        """Threads that create the same objects at once: each has one winner, and holds what the winner wrote."""
        _need(store.capabilities.create_if_absent)
        keys = [f"race/{number}" for number in range(5)]
        barrier = threading.Barrier(_THREADS)

        def create(thread: int) -> set[str]:
            won = set()
            for key in keys:
                barrier.wait(timeout=60)
                try:
                    store.put(key, b"writer %d" % thread, if_absent=True)
                    won.add(key)
                except ConditionFailedError:
                    continue
            return won

        wins = _in_threads(create)
        for key in keys:
            assert [b"writer %d" % thread for thread, won in enumerate(wins) if key in won] == [store.get(key).data]

    def test_no_acknowledged_swap_is_lost(self, store: Store) -> None:
        """Threads that count up by compare-and-swap end at the number of their acknowledged swaps."""
        _need(store.capabilities.compare_and_swap)
        store.put("counter", b"0 start")

        def count_up(thread: int) -> int:
            acknowledged = 0
            while acknowledged < self.swaps_of_each:
                stored = store.get("counter")
                number = int(stored.data.split()[0])
                try:
                    store.put("counter", b"%d by %d" % (number + 1, thread), if_match=stored.etag)
                    acknowledged += 1
                except ConditionFailedError:
                    continue
            return acknowledged

        acknowledged = sum(_in_threads(count_up))
        assert int(store.get("counter").data.split()[0]) == acknowledged == _THREADS * self.swaps_of_each

    def test_a_reader_sees_one_version_or_another(self, store: Store) -> None:
        """Reads during overwrites give whole objects: all bytes of one write, by get and by read_into."""
        if not store.capabilities.atomic_put:
            pytest.skip("the store does not claim atomic writes")
        store.put("k", bytes(_WHOLE_BYTES))

        def work(thread: int) -> None:
            for turn in range(8):
                if thread % 2:
                    version = bytes([thread * 8 + turn]) * _WHOLE_BYTES
                    _answered(lambda version=version: store.put("k", version))  # type: ignore[misc]
                    continue
                target = bytearray(_WHOLE_BYTES)
                _answered(lambda target=target: store.read_into("k", memoryview(target)))  # type: ignore[misc]
                for data in (_answered(lambda: store.get("k")).data, target):
                    assert len(data) == _WHOLE_BYTES
                    assert len(set(data)) == 1

        _in_threads(work)

    @pytest.mark.parametrize("seed", range(3))
    def test_a_random_history_agrees_with_a_dictionary(self, store: Store, seed: int) -> None:
        """Operations in any order leave what the same operations leave in a dictionary."""
        random = Random(seed)  # noqa: S311  a history
        model = _Model()
        for number in range(_STEPS):
            key = random.choice(("a", "b/1", "b/2", "c/d/e"))
            data = b"%d " % number + random.randbytes(random.randrange(20))
            model.step(store, random.choice(("put", "create", "swap", "delete")), key, data)
            assert {info.key: store.get(info.key) for info in store.list("")} == model.objects


class _Model:
    """What a store should hold after the steps that it was given."""

    def __init__(self) -> None:
        self.objects: dict[str, StoredObject] = {}
        self._last_etag: dict[str, str] = {}

    def step(self, store: Store, action: str, key: str, data: bytes) -> None:
        """Do one step to the store, and to the model if it should take effect; fail where the two differ."""
        if action == "delete":
            store.delete(key)
            self.objects.pop(key, None)
            return
        creates = action == "create" and store.capabilities.create_if_absent
        swaps = action == "swap" and store.capabilities.compare_and_swap and key in self._last_etag
        allowed = (not creates or key not in self.objects) and (not swaps or key in self.objects)
        if_match = self._last_etag[key] if swaps else None
        if not allowed:
            with pytest.raises(ConditionFailedError):
                store.put(key, data, if_absent=creates, if_match=if_match)
            return
        self._last_etag[key] = etag = store.put(key, data, if_absent=creates, if_match=if_match)
        self.objects[key] = StoredObject(data, etag)


def _need(capability: bool) -> None:  # noqa: FBT001
    if not capability:
        pytest.skip("the store does not claim this condition")


def _readers(store: Store, key: str) -> tuple[_Action, ...]:
    return (
        lambda: store.get(key),
        lambda: store.head(key),
        lambda: store.read_into(key, memoryview(bytearray(1))),
        lambda: store.read_into(key, memoryview(bytearray())),
    )


def _answered(action: Callable[[], _Result]) -> _Result:
    """The answer of a store that may fail for a moment under load, which is no breach: a wrong answer would be."""
    for _ in range(_PATIENCE):
        with suppress(StoreTransientError):
            return action()
    return action()


def _in_threads(work: Callable[[int], _Result]) -> list[_Result]:
    """Run ``work(0)`` to ``work(7)`` at once; the first error of any is raised here."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, range(_THREADS)))
