"""Pools: allocated ahead or when asked for, the same array either way, told where the list is out of date."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldstart import events
from coldstart.devices.base import DeviceInfo
from coldstart.devices.cpu import CpuDevice
from coldstart.errors import DeviceError, HandlerError
from coldstart.frameworks import survey
from coldstart.frameworks.torch_memory import Workspace
from coldstart.manifest import Pool, PoolArray, manifest_from_json, manifest_to_json
from coldstart.metrics import Timeline
from coldstart.pools import MARGIN_BYTES, WORKSPACE, Plan, Pools, planned
from tests.generations import manifest_of

if TYPE_CHECKING:
    from coldstart.manifest import Manifest


class Start:
    """The pools of one start, what they told, and their timeline."""

    def __init__(self, *manifests: Manifest, device: Any = None, workspace: Any = None) -> None:
        self.told: list[str] = []
        self.timeline = Timeline(time.monotonic)
        self.device = device or CpuDevice()
        bus = SimpleNamespace(publish=lambda event: self.told.append(event.reason))
        self.pools = Pools("net", self.device, self.timeline, bus, workspace=workspace)
        self.manifests = manifests
        if manifests:
            self.pools.begin(self.plan)
            self.pools.settle()

    def plan(self) -> Plan:
        """What the generations list."""
        return Plan([each for manifest in self.manifests for each in planned(manifest, None)])

    def ask(self, name: str = "kv", shape: Any = (4, 8), dtype: Any = "float32", kind: str = "kv_cache") -> Any:
        """What ``ctx.pool`` returns."""
        return self.pools.take(name, shape, dtype, kind)


def following(start: Start, **more: Any) -> Start:
    """The start from the snapshot of another."""
    pools, arrays = start.pools.listed({})
    manifest = manifest_of()._replace(pools=pools, pool_arrays=arrays)
    return Start(manifest_from_json(manifest_to_json(manifest)), **more)


# --- asked for -------------------------------------------------------------------------------------------------------


def test_first_start() -> None:
    """A pool is an array of zeros of the dtype's framework; the same name is the same array."""
    torch = pytest.importorskip("torch")
    start = Start()
    array, tensor = start.ask(), start.ask("more", [2, 3], torch.bfloat16)
    assert (array.shape, array.dtype, array.any()) == ((4, 8), np.float32, False)
    assert (tuple(tensor.shape), tensor.dtype, bool(tensor.any())) == ((2, 3), torch.bfloat16, False)
    assert start.ask() is array
    assert start.pools.listed({}) == (
        (Pool("kv", "kv_cache", 128), Pool("more", "kv_cache", 12)),
        (PoolArray("kv", "numpy", "<f4", (4, 8), ()), PoolArray("more", "torch", "bfloat16", (2, 3), ())),
    )
    assert not start.pools.has_plan()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": "a/b"}, "a pool cannot be called 'a/b'"),
        ({"kind": "cache"}, "use one of weights, kv_cache"),
        ({"shape": (4, 0)}, r"the shape \(4, 0\) is not one of whole numbers above 0"),
        ({"shape": (4.0,)}, r"the shape \(4.0,\) is not one of whole numbers above 0"),
        ({"dtype": "bfloat17"}, "'bfloat17' is no dtype of numpy; pass torch's own, such as torch.bfloat16"),
        ({"dtype": object}, "has items that are not plain numbers"),
        ({"dtype": "U4"}, "has items that are not plain numbers"),
    ],
)
def test_refused(asked: dict[str, Any], message: str) -> None:
    """What cannot be a pool is refused with what is wrong about it."""
    with pytest.raises(HandlerError, match=message):
        Start().ask(**asked)


def test_two_forms() -> None:
    """One name cannot be two arrays in one start."""
    start = Start()
    start.ask()
    with pytest.raises(HandlerError, match=r"asked for as \[4, 8\] of <f4 and now as \[4, 9\] of <f4"):
        start.ask(shape=(4, 9))


def test_too_large() -> None:
    """A pool beyond the free memory says what was asked and what is free, and nothing is allocated."""
    start = Start(device=Small(free_bytes=MARGIN_BYTES + 4096))
    start.ask("fits", (4096,), "uint8")
    with pytest.raises(DeviceError, match="pool 'more' needs 4097 bytes of memory and 67112960 are free"):
        start.ask("more", (4097,), "uint8")
    with pytest.raises(DeviceError, match="pool 'kv' needs 1099511627776 bytes of memory and 67112960 are free"):
        start.ask("kv", (1 << 40,), "uint8")


def test_refused_memory() -> None:
    """Memory that the system refuses, where nothing is known of what is free, is the same error."""
    with pytest.raises(
        DeviceError, match=f"pool 'kv' needs {1 << 61} bytes of memory and 0 are free on cpu: .*llocate"
    ):
        Start(device=Small(free_bytes=0)).ask("kv", (1 << 61,), "uint8")


class Small(CpuDevice):
    """A CPU with so much memory left."""

    def __init__(self, free_bytes: int, memory_bytes: int = 0) -> None:
        self.free_bytes = free_bytes
        self.memory_bytes = memory_bytes

    def info(self) -> DeviceInfo:
        return DeviceInfo("cpu", "small", self.memory_bytes, self.free_bytes)


# --- ahead -----------------------------------------------------------------------------------------------------------


def test_ahead() -> None:
    """What the snapshot lists is there before it is asked for, timed on its own track, and is what the call gets."""
    first = Start()
    first.ask()
    start = following(first)
    assert start.pools.has_plan()
    (span,) = start.timeline.spans()
    assert (span.name, span.track) == ("allocate pools", "pools")
    ahead = start.pools._ready["kv"].memory
    assert start.ask() is ahead
    assert not ahead.any()
    start.pools.let_go()
    assert start.told == []
    assert start.pools.listed({}) == first.pools.listed({})


def test_asked_while_it_is_made() -> None:
    """Who asks before the plan is known waits for it, and gets what was made ahead; phase pool_alloc waits as well."""
    first = Start()
    first.ask()
    known, got = threading.Event(), []
    start = Start()
    start.manifests = (manifest_of()._replace(pools=first.pools.listed({})[0], pool_arrays=first.pools.listed({})[1]),)
    start.pools.begin(lambda: (known.wait(60), start.plan())[1])
    asking = threading.Thread(target=lambda: got.append(start.ask()))
    asking.start()
    assert start.timeline.spans() == ()
    assert got == []
    known.set()
    start.pools.settle()
    asking.join(60)
    assert len(start.timeline.spans()) == len(got) == 1


def test_another_form_than_listed() -> None:
    """A list that is out of date costs the time it saves: the new form is allocated when asked for, and that is told."""
    first = Start()
    first.ask()
    start = following(first)
    assert start.ask(shape=(4, 16)).shape == (4, 16)
    assert start.told == ["the snapshot lists pool 'kv' as [4, 8] of <f4, and it is now [4, 16] of <f4"]
    assert start.pools.listed({})[0] == (Pool("kv", "kv_cache", 256),)


def test_not_asked_for() -> None:
    """Memory that nobody asks for is given back before the warm-up, and is in no further list."""
    first = Start()
    first.ask()
    start = following(first)
    start.pools.let_go()
    assert start.told == ["pool 'kv' (128 bytes) is in the snapshot's list and was not asked for"]
    assert start.pools._ready == {}
    assert start.pools.listed({}) == ((), ())


def test_ahead_and_too_large() -> None:
    """What is more than is free fails nobody: it is told, and an error for who asks for just that."""
    first = Start()
    first.ask("kv", (1 << 20,), "uint8")
    start = following(first, device=Small(free_bytes=MARGIN_BYTES, memory_bytes=1 << 31))
    assert "pool 'kv' could not be allocated ahead: pool 'kv' needs 1048576 bytes" in start.told[0]
    with pytest.raises(DeviceError, match="and 67108864 are free"):
        start.ask("kv", (1 << 20,), "uint8")
    start.device.free_bytes *= 2
    assert start.ask("kv", (1 << 20,), "uint8").shape == (1 << 20,)


def test_state_that_needs_the_room() -> None:
    """On a device that does not hold the state beside the listed pools, the state has its room before any pool does."""
    first = Start()
    first.ask("kv", (1 << 20,), "uint8")
    start = Start(device=Small(free_bytes=1 << 30, memory_bytes=1 << 30))
    manifest = manifest_of()._replace(pools=first.pools.listed({})[0], pool_arrays=first.pools.listed({})[1])
    start.manifests = (manifest,)
    start.pools.begin(lambda: start.plan()._replace(state_bytes=1 << 30))
    start.pools.settle()
    assert "pools of 1,048,576 bytes and a state of 1,073,741,824 do not fit into 1,073,741,824" in start.told[0]
    assert start.pools._ready == {}
    assert start.ask("kv", (1 << 20,), "uint8").shape == (1 << 20,)


def test_unknown_form_in_a_list() -> None:
    """A list is data of a store: what it says of an array is checked, and never runs or crashes anything."""
    rows = [PoolArray("a", "numpy", "O", (1,), ()), PoolArray("b", "jax", "<f4", (1,), ())]
    rows += [PoolArray("c", "torch", "nn", (1,), ())]
    manifest = manifest_of()._replace(pools=tuple(Pool(row.name, "other", 4) for row in rows), pool_arrays=tuple(rows))
    start = Start(manifest)
    assert len(start.told) == 3
    assert all("could not be allocated ahead" in reason for reason in start.told)


def test_plan_that_fails() -> None:
    """A plan that cannot be had leaves nobody waiting."""
    errors: list[Any] = []
    start = Start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", errors.append)
        start.pools.begin(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
        start.pools.settle()
        assert not start.pools.has_plan()
        assert start.ask().shape == (4, 8)


def test_second_try() -> None:
    """A start that is tried again has the same memory, and zeros in it."""
    start = Start()
    array = start.ask()
    array += 1
    start.pools.begin(start.plan)
    assert start.ask() is array
    assert not array.any()


def test_pools_of_a_program() -> None:
    """Bytes of a program are allocated ahead too, those of another platform's program are not."""
    manifest = manifest_of()._replace(pools=(Pool("own/64", "kv_cache", 8), Pool("other/64", "kv_cache", 8)))
    place = SimpleNamespace(buffer="own/64")
    program: Any = SimpleNamespace(entries=[SimpleNamespace(constants=[place])])
    start = Start()
    start.pools.begin(lambda: Plan(list(planned(manifest, program))))
    start.pools.settle()
    assert list(start.pools._ready) == ["own/64"]
    memory = start.pools.raw("own/64", 8)
    assert (memory.dtype, memory.shape, memory.any()) == (np.uint8, (8,), False)
    assert start.pools.raw("own/64", 8) is memory
    assert start.pools.listed({}) == ((), ())  # they are the program's to list


def test_no_torch_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start with a program does not come to torch by its pools: what is torch's waits until somebody asks."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    pools = (Pool("a", "other", 4), Pool("b", "other", 4), Pool(WORKSPACE, "activations", 1 << 21))
    arrays = (PoolArray("a", "torch", "float32", (1,), ()), PoolArray("b", "numpy", "<f4", (1,), ()))
    manifest = manifest_of()._replace(pools=pools, pool_arrays=arrays)
    program: Any = SimpleNamespace(entries=[])
    assert [each.pool.name for each in planned(manifest, program)] == ["b"]
    assert [each.pool.name for each in planned(manifest, None)] == ["a", "b", WORKSPACE]


# --- in the state ----------------------------------------------------------------------------------------------------


def test_arrays_of_a_state() -> None:
    """Arrays that are memory of pools are no part of what a snapshot holds, wherever they are; the tree keeps their place."""
    start = Start()
    kv = start.ask()
    state = {"w": np.ones(3), "kv": kv, "again": [kv], "b": np.zeros(2)}
    found, paths = start.pools.without(survey(state))
    assert [each.leaf.path for each in found.leaves] == ['["w"]', '["b"]']
    assert [found.storages[each.leaf.buffer].length_bytes for each in found.leaves] == [24, 16]
    assert paths == {'["kv"]': "kv", '["again"][0]': "kv"}
    assert found.tree is not None
    assert start.pools.listed(paths)[1] == (PoolArray("kv", "numpy", "<f4", (4, 8), ('["kv"]', '["again"][0]')),)
    untouched, none = Start().pools.without(survey(state))
    assert (len(untouched.leaves), none) == (4, {})


def test_parts_of_a_pool() -> None:
    """A plain tree that holds only parts of a pool has no way to be made again; with build it needs none."""
    torch = pytest.importorskip("torch")
    start = Start()
    kv = start.ask(dtype=torch.float32)
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    for index, layer in enumerate(layers):
        layer.register_buffer("keys", kv[index])
    found, paths = start.pools.without(survey(layers))
    assert paths == {"0.keys": "kv", "1.keys": "kv"}
    assert len(found.leaves) == 4
    found, _ = start.pools.without(survey({"keys": kv[1], "w": torch.ones(2)}))
    assert (found.tree, found.tree_obstacle) == (None, "state[\"keys\"] is a part of pool 'kv'")


# --- torch's allocator -----------------------------------------------------------------------------------------------


class Cuda:
    """torch and torch.cuda as far as a workspace sees them: an allocator that is told what is in use."""

    uint8 = "uint8"

    def __init__(self, free_bytes: int = 1 << 40) -> None:
        self.cuda = self
        self.now = self.peak = 0
        self.free_bytes = free_bytes
        self.asked: list[int] = []

    def is_initialized(self) -> bool:
        return True

    def memory_allocated(self, device: str) -> int:
        assert device == "cuda:1"
        return self.now

    def max_memory_allocated(self, device: str) -> int:
        assert device == "cuda:1"
        return self.peak

    def reset_peak_memory_stats(self, device: str) -> None:
        assert device == "cuda:1"
        self.peak = self.now

    def use(self, length_bytes: int) -> None:
        self.now += length_bytes
        self.peak = max(self.peak, self.now)

    def empty(self, length_bytes: int, *, dtype: str, device: str) -> None:
        assert (dtype, device) == ("uint8", "cuda:1")
        if length_bytes > self.free_bytes:
            raise RuntimeError("CUDA out of memory")
        self.asked.append(length_bytes)


def test_workspace() -> None:
    """The peak of the warm-up, over weights and caches and whatever loading them took, is listed and warmed by the next start."""
    cuda = Cuda()
    first = Start(workspace=Workspace("cuda:1", cuda))
    cuda.use(7 << 30)  # loading
    cuda.use(-(3 << 30))
    assert first.pools.listed({}) == ((), ())
    first.pools.watch_workspace()
    cuda.use((5 << 20) + 1)
    cuda.use(-(5 << 20))
    assert first.pools.listed({}) == ((Pool(WORKSPACE, "activations", 6 << 20),), ())
    later = Cuda()
    following(first, workspace=Workspace("cuda:1", later))
    assert later.asked == [6 << 20]


def test_workspace_that_cannot_be_had() -> None:
    """A GPU that has too little left is no obstacle: the warm-up will ask for what it really needs."""
    cuda = Cuda(free_bytes=1 << 20)
    manifest = manifest_of()._replace(pools=(Pool(WORKSPACE, "activations", 2 << 20),))
    start = Start(manifest, workspace=Workspace("cuda:1", cuda))
    assert "could not be warmed by 2097152 bytes: CUDA out of memory" in start.told[0]


def test_no_workspace_without_a_gpu() -> None:
    """Where torch uses no GPU nothing is listed."""
    pytest.importorskip("torch")
    start = Start()
    start.pools.watch_workspace()
    assert start.pools.listed({}) == ((), ())


def test_event_is_published() -> None:
    """Subscribers are told of a pool that was passed over, by the handler's name."""
    seen: list[Any] = []
    bus = events.EventBus()
    bus.subscribe(seen.append)
    pools = Pools("net", CpuDevice(), Timeline(time.monotonic), bus)
    manifest = manifest_of()._replace(
        pools=(Pool("kv", "other", 4),), pool_arrays=(PoolArray("kv", "numpy", "<f4", (1,), ()),)
    )
    pools.begin(lambda: Plan(list(planned(manifest, None))))
    pools.let_go()
    assert seen == [events.PoolPassedOver("net", "pool 'kv' (4 bytes) is in the snapshot's list and was not asked for")]
