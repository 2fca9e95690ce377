"""Programs of several platforms in one generation: whoever adds one keeps those of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldstart.manifest import Pool, manifest_from_json, manifest_to_json
from coldstart.others import shared_buffers, with_programs_of
from coldstart.plan import BOTH, needed
from coldstart.programs.base import Array
from coldstart.programs.placing import Block, Placed
from coldstart.programs.record import MOST_PROGRAMS, ConstantPlace, Entry, Program, consumer_of, program_id, programs_of
from coldstart.programs.signature import Signature
from coldstart.repository import Repository
from coldstart.stores.memory import MemoryStore
from tests.generations import OTHER_KEY, blobs_of, capture_of, file_bytes, restored, write

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.capture import Written
    from coldstart.manifest import Manifest

SIGNATURE = Signature(("x",), ["dict", [["x", ["array", 0]]]], (Array("x", "float32", ()),), ["list", []], (), {})
STATE = {"w": np.arange(300, dtype=np.float32), "only eager": np.ones(100, np.float32), "deep": np.ones(50, np.int64)}


class World:
    """A store, and generations with programs of numbered platforms in it."""

    def __init__(self, folder: Path) -> None:
        self.repository = Repository(MemoryStore())
        self.latest: Written | None = None
        self._folder = folder

    def add(self, platform: int, *, shared: str = '["w"]', state: Any = STATE, **options: Any) -> Manifest:
        """The next generation, with this platform's program: a constant of the state's, one of its own, a cache and a file."""
        capture = capture_of(state, follows=self.latest, **options)
        assert capture.survey is not None
        storage = next(each.leaf.buffer for each in capture.survey.leaves if each.leaf.path == shared)
        placed = self._placed(platform, shared, storage)
        self.latest = write(capture._replace(program=placed), self.repository)
        return self.latest.manifest

    def _placed(self, platform: int, shared: str, storage: int) -> Placed:
        facts = {"device": "cpu", "processor": f"p{platform}"}
        own = consumer_of(program_id("onnx", facts))
        constants = (
            ConstantPlace("shared", "float32", (100,), shared, 0),
            ConstantPlace("own", "float32", (64,), f"{own}/0", 0),
            ConstantPlace("cache", "uint8", (32,), f"{own}/256", 0),
        )
        entry = Entry("", SIGNATURE, "0.onnx", constants, ("cache",))
        program = Program(program_id("onnx", facts), "onnx", facts, "wishes", {}, (entry,))
        data = np.full(64, platform, np.float32).view(np.uint8)
        file = self._folder / f"{platform}.onnx"
        file.write_bytes(b"graph of %d" % platform)
        return Placed(
            program,
            (Block(f"{own}/0", 4, "weights", data),),
            (Pool(f"{own}/256", "kv_cache", 32),),
            frozenset({storage}),
            {"0.onnx": file},
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    """An empty store."""
    return World(tmp_path)


def platforms(manifest: Manifest) -> list[str]:
    """The processors whose programs a generation has, newest first."""
    return [program.platform["processor"] for program in programs_of(manifest.programs)]


def check_whole(manifest: Manifest, world: World) -> None:
    """The strict reader takes it, and each of its programs finds its constants and its file where its record says."""
    assert manifest_to_json(manifest_from_json(manifest_to_json(manifest))) == manifest_to_json(manifest)
    store = world.repository.store
    for program in programs_of(manifest.programs):
        own = consumer_of(program.id)
        number = int(program.platform["processor"][1:])
        narrowed = needed(manifest, own)
        assert file_bytes(narrowed, store) == {f"{own}/0.onnx": b"graph of %d" % number}
        places = {place.name: place.buffer for place in program.entries[0].constants}
        assert {places["shared"], places["own"]} == {
            buffer.name for buffer in narrowed.buffers if buffer.name in places.values()
        }
        assert places["cache"] in {pool.name for pool in narrowed.pools}
        assert bytes(own_bytes(narrowed, places["own"], store)) == np.full(64, number, np.float32).tobytes()


def own_bytes(manifest: Manifest, name: str, store: Any) -> Any:
    """The bytes of a buffer of a generation."""
    from tests.generations import fetched

    (buffer,) = (buffer for buffer in manifest.buffers if buffer.name == name)
    return fetched(manifest, store).writable(buffer.segment)[
        buffer.offset_bytes : buffer.offset_bytes + buffer.length_bytes
    ]


def test_two_platforms(world: World) -> None:
    """The second platform's generation has both programs, whole, and the state beside them; only its own bytes are new."""
    first = world.add(1)
    before = blobs_of(world.repository.store)
    second = world.add(2)
    assert (platforms(first), platforms(second)) == (["p1"], ["p2", "p1"])
    check_whole(second, world)
    state = restored(needed(second), world.repository.store)
    assert {name: array.tolist() for name, array in state.items()} == {
        name: array.tolist() for name, array in STATE.items()
    }
    new = {hash_ for hash_ in blobs_of(world.repository.store) if hash_ not in before}
    assert len(new) == 2  # the constant of its own, and its file


def test_same_platform_again(world: World) -> None:
    """A platform's new program takes the place of its old one; the others stay."""
    world.add(1)
    world.add(2)
    third = world.add(1)
    assert platforms(third) == ["p1", "p2"]
    check_whole(third, world)
    names = [buffer.name for buffer in third.buffers]
    assert len(names) == len(set(names))


def test_oldest_goes(world: World) -> None:
    """A generation has a limited number of programs: the one that was added longest ago makes room, with its bytes."""
    for platform in range(MOST_PROGRAMS + 2):
        manifest = world.add(platform)
        check_whole(manifest, world)
    assert platforms(manifest) == [f"p{number}" for number in range(MOST_PROGRAMS + 1, 1, -1)]
    consumers = {segment.consumer for segment in manifest.segments if segment.consumer.startswith("program_")}
    assert consumers == {consumer_of(program.id) for program in programs_of(manifest.programs)}
    assert len(manifest.pools) == MOST_PROGRAMS


def test_other_constants_of_the_state(world: World) -> None:
    """What another platform's program needs of the state is still in the part that starts with a program read."""
    world.add(1, shared='["w"]')
    second = world.add(2, shared='["only eager"]')
    both = {buffer.name for buffer in second.buffers if second.segments[buffer.segment].consumer == BOTH}
    assert both == {'["w"]', '["only eager"]'}
    assert shared_buffers(second, "") == both
    assert shared_buffers(second, programs_of(second.programs)[0].id) == {'["w"]'}
    assert shared_buffers(None, "") == set()
    check_whole(second, world)


def test_state_without_what_a_program_needs(world: World) -> None:
    """A program whose constant the new state has no buffer for any more is left out: it would not load."""
    world.add(1, shared='["deep"]')
    second = world.add(2, state={"w": STATE["w"], "only eager": STATE["only eager"]})
    assert platforms(second) == ["p2"]
    check_whole(second, world)


def test_other_key(world: World) -> None:
    """Programs of a generation of another key are not taken over: they were made of other code."""
    world.add(1)
    second = world.add(2, key=OTHER_KEY, generation=1)
    assert platforms(second) == ["p2"]
    check_whole(second, world)


def test_unreadable_program_is_not_taken_over(world: World) -> None:
    """A program of a newer coldstart, whose needs cannot be told, is left behind; the rest is taken."""
    first = world.add(1)
    second = world.add(2)
    strange = second._replace(programs=({"id": "of tomorrow"}, *second.programs))
    found = with_programs_of(first._replace(programs=()), strange, "none")
    assert platforms(found) == ["p2", "p1"]


def test_files_of_programs_are_not_the_states(world: World) -> None:
    """What a start without a program fetches has no file and no buffer of any program."""
    world.add(1, files=())
    second = world.add(2)
    plain = needed(second)
    assert plain.files == ()
    assert {buffer.name for buffer in plain.buffers} == {'["w"]', '["only eager"]', '["deep"]'}
