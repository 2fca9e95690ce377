"""Pools: memory that a handler needs and no snapshot holds (a KV cache, a workspace), allocated while weights land.

``ctx.pool(name, shape, dtype)`` gives an array of zeros. The first start allocates it when it is asked for, and its
snapshot lists it without its bytes; a start from that snapshot has it allocated by a thread of its own, beside the fetch,
before anybody asks, and the very same call gets it. Phase pool_alloc is what is left to wait for. An array of the state
that is memory of a pool is not stored either: ``build`` asks for it again, and a plain tree gets it put in its place.

A list that is out of date costs time and nothing else: a pool that is asked for in another form is allocated there and
then, and one that nobody asks for is let go before the warm-up; both are told. Memory that cannot be had is an error for
whoever asks, never for the thread that was early.

On a GPU torch's allocator is warmed as well: what it held at most during the warm-up is asked of the driver at once and
given back to the allocator, so that neither the warm-up nor a request waits for that.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart import events
from coldstart.errors import ColdstartError, DeviceError, HandlerError, ManifestError
from coldstart.frameworks import fresh
from coldstart.frameworks.memory import Form
from coldstart.frameworks.pooled import Memory, without_pools
from coldstart.frameworks.torch_memory import Workspace
from coldstart.manifest import Pool, PoolArray, check_name
from coldstart.terms import BUFFER_KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from coldstart.devices.base import Device
    from coldstart.frameworks import Survey
    from coldstart.manifest import Manifest
    from coldstart.metrics import Timeline
    from coldstart.programs.record import Program

WORKSPACE = "torch/workspace"
"""The pool that stands for what torch's allocator held: no user's pool has a slash in its name."""
RAW = "bytes"
"""What stands for a framework where a pool is a program's."""
MARGIN_BYTES = 64 << 20
"""Memory that pools leave free."""


class Planned(NamedTuple):
    """A pool, and the array that it is; None for memory that torch's allocator is to keep."""

    pool: Pool
    array: PoolArray | None


class Plan(NamedTuple):
    """What a start is to allocate ahead, and how large the state is beside it."""

    pools: Sequence[Planned] = ()
    state_bytes: int = 0


def planned(manifest: Manifest, program: Program | None) -> Iterator[Planned]:
    """What a start from this generation needs: pools that are arrays, those of its program, torch's workspace.

    A start with a program may go without torch: where nobody has imported it, what is torch's waits until it is asked for.
    """
    without_torch = program is not None and "torch" not in sys.modules
    arrays = {array.name: array for array in manifest.pool_arrays}
    used = {place.buffer for entry in program.entries for place in entry.constants} if program is not None else set()
    for pool in manifest.pools:
        array = arrays.get(pool.name)
        if pool.name in used:
            yield _raw(pool)
        elif without_torch and (array is None or array.framework == "torch"):
            continue
        elif array is not None or pool.name == WORKSPACE:
            yield Planned(pool, array)


def _raw(pool: Pool) -> Planned:
    """Bytes as an arena has them, of no framework."""
    return Planned(pool, PoolArray(pool.name, RAW, "|u1", (pool.length_bytes,), ()))


class _Made(NamedTuple):
    planned: Planned
    memory: Any


class Pools:
    """The pools of one start. Any method may be called from any thread; ``begin`` once for each try of the start."""

    def __init__(
        self,
        name: str,
        device: Device,
        timeline: Timeline,
        bus: events.EventBus,
        *,
        workspace: Workspace | None = None,
    ) -> None:
        self._name = name
        self._device = device
        self._timeline = timeline
        self._bus = bus
        self._workspace = workspace or Workspace(device.label)
        self._taking = threading.Lock()
        self._changed = threading.Condition()
        self._work: threading.Thread | None = None
        self._plan = Plan()
        self._is_known = self._is_over = True
        self._ready: dict[str, _Made] = {}
        """Allocated, and not asked for yet."""
        self._held: dict[str, _Made] = {}

    # --- ahead -------------------------------------------------------------------------------------------------------

    def begin(self, plan: Callable[[], Plan]) -> None:
        """Allocate what ``plan()`` gives, in a thread; it may wait for what it says. A second try has zeros again."""
        with self._taking:
            if self._held:
                self._renew()
                return
        self._is_known = self._is_over = False
        name = f"coldstart-pools-{self._name}"
        self._work = threading.Thread(target=self._allocate_ahead, args=(plan,), name=name, daemon=True)
        self._work.start()

    def _renew(self) -> None:
        for name, made in self._held.items():
            if made.planned.array is not None and made.planned.array.framework != RAW:
                fresh.clear(made.memory)
                self._ready[name] = made
        self._held = {}

    def has_plan(self) -> bool:
        """Whether anything is allocated ahead; waits until that is known."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_known)
        return bool(self._plan.pools)

    def settle(self) -> None:
        """Phase pool_alloc: wait for the thread that ``begin`` began."""
        if self._work is not None:
            self._work.join()

    def _allocate_ahead(self, plan: Callable[[], Plan]) -> None:
        try:
            self._plan = plan()
            self._note()
            if self._plan.pools and self._fits(self._plan):
                with self._timeline.span("allocate pools", "pools"):
                    for each in self._plan.pools:
                        self._make_ahead(each)
        finally:
            self._note(is_over=True)

    def _fits(self, plan: Plan) -> bool:
        """Whether the state has room beside the pools: a smaller device than the one that listed them may not have it.

        The state comes first: without it ``load`` would have to run, and a pool can still be asked for in another size.
        """
        asked_bytes = sum(each.pool.length_bytes for each in plan.pools)
        memory_bytes = self._device.info().memory_bytes
        if memory_bytes and asked_bytes + plan.state_bytes + MARGIN_BYTES > memory_bytes:
            self._pass_over(
                f"pools of {asked_bytes:,} bytes and a state of {plan.state_bytes:,} do not fit into {memory_bytes:,},"
                " so none is allocated ahead"
            )
            return False
        return True

    def _note(self, *, is_over: bool = False) -> None:
        with self._changed:
            self._is_known, self._is_over = True, is_over
            self._changed.notify_all()

    def _make_ahead(self, each: Planned) -> None:
        try:
            if each.array is None:
                self._workspace.warm(each.pool.length_bytes)
                return
            made = _Made(each, self._allocate(each))
        except ColdstartError as error:  # nobody has asked yet: who does gets it, or the error
            self._pass_over(f"pool {each.pool.name!r} could not be allocated ahead: {error}")
            return
        with self._changed:
            self._ready[each.pool.name] = made
            self._changed.notify_all()

    # --- asked for ---------------------------------------------------------------------------------------------------

    def take(self, name: str, shape: Sequence[int], dtype: Any, kind: str) -> Any:
        """What ``ctx.pool`` returns; see there. Raises HandlerError and DeviceError."""
        try:
            check_name(name)
        except ManifestError as error:
            raise HandlerError(f"a pool cannot be called {name!r}: {error}") from error
        if kind not in BUFFER_KINDS:
            raise HandlerError(f"ctx.pool({name!r}, kind={kind!r}): use one of {', '.join(BUFFER_KINDS)}")
        try:
            framework, form = fresh.form_of(shape, dtype, device_type=self._device.type)
        except HandlerError as error:
            raise HandlerError(f"ctx.pool({name!r}): {error}") from error
        pool = Pool(name, kind, math.prod(form.shape) * form.item_bytes)
        return self._take(Planned(pool, PoolArray(name, framework, form.dtype, form.shape, ())))

    def raw(self, name: str, length_bytes: int) -> Any:
        """A program's pool: zeros, as bytes like those of an arena. Raises DeviceError."""
        return self._take(_raw(Pool(name, "kv_cache", length_bytes)))

    def recorded(self, array: PoolArray, manifest: Manifest) -> Any:
        """A pool that the state holds, as the manifest describes it. Raises DeviceError, ManifestError."""
        pool = next(pool for pool in manifest.pools if pool.name == array.name)
        return self._take(Planned(pool, array))

    def _take(self, wanted: Planned) -> Any:
        name = wanted.pool.name
        with self._taking:
            held = self._held.get(name)
            if held is not None and not _is_alike(held.planned, wanted):
                raise HandlerError(
                    f"ctx.pool({name!r}): it was asked for as {_told(held.planned)} and now as {_told(wanted)};"
                    " give the other one another name"
                )
            if held is None:
                held = self._held[name] = self._claimed(wanted) or _Made(wanted, self._allocate(wanted))
            return held.memory

    def _claimed(self, wanted: Planned) -> _Made | None:
        """The pool, if it was allocated ahead in this form."""
        name = wanted.pool.name
        with self._changed:
            self._changed.wait_for(lambda: name in self._ready or self._is_over)
            made = self._ready.pop(name, None)
        if made is None or _is_alike(made.planned, wanted):
            return made
        self._pass_over(f"the snapshot lists pool {name!r} as {_told(made.planned)}, and it is now {_told(wanted)}")
        return None

    def _allocate(self, each: Planned) -> Any:
        pool, array = each
        assert array is not None
        free_bytes = self._device.info().free_bytes if self._device.type == "cpu" else 0
        if free_bytes and pool.length_bytes + MARGIN_BYTES > free_bytes:  # the kernel would promise it, and kill later
            raise DeviceError(
                f"pool {pool.name!r} needs {pool.length_bytes} bytes of memory and {free_bytes} are free"
                f" ({MARGIN_BYTES} stay reserved): make it smaller, or give the worker more memory"
            )
        try:
            if array.framework == RAW:
                return self._device.zeros(pool.length_bytes)
            return fresh.zeros(array, label=self._device.label, ordinal=self._device.ordinal)
        except (DeviceError, MemoryError) as error:
            free_bytes = self._device.info().free_bytes
            raise DeviceError(
                f"pool {pool.name!r} needs {pool.length_bytes} bytes of memory and {free_bytes} are free on"
                f" {self._device.label}: {error}"
            ) from error

    def let_go(self) -> None:
        """Before the warm-up: what was allocated and nobody has asked for is given back."""
        self.settle()
        with self._changed:
            unused, self._ready = self._ready, {}
        for name, made in unused.items():
            length_bytes = made.planned.pool.length_bytes
            self._pass_over(f"pool {name!r} ({length_bytes:,} bytes) is in the snapshot's list and was not asked for")

    def _pass_over(self, reason: str) -> None:
        self._bus.publish(events.PoolPassedOver(self._name, reason))

    # --- for the next snapshot ---------------------------------------------------------------------------------------

    def watch_workspace(self) -> None:
        """From now on, what torch's allocator holds at most is its workspace."""
        self._workspace.begin()

    def without(self, survey: Survey) -> tuple[Survey, Mapping[str, str]]:
        """The survey of a state without arrays that are memory of pools; and their paths, each with its pool's name."""
        memories = [
            Memory.of(name, made.planned.array.framework, _form_of(made.planned), made.memory)
            for name, made in self._held.items()
            if made.planned.array is not None
        ]
        return without_pools(survey, memories)

    def listed(self, paths: Mapping[str, str]) -> tuple[tuple[Pool, ...], tuple[PoolArray, ...]]:
        """What a snapshot lists of this start's pools. ``paths``: where its state holds them, as ``without`` tells."""
        held = {name: made.planned for name, made in self._held.items() if "/" not in name}
        pools = [each.pool for each in held.values()]
        if self._workspace.peak_bytes:
            pools.append(Pool(WORKSPACE, "activations", self._workspace.peak_bytes))
        arrays = [
            each.array._replace(paths=tuple(path for path, owner in paths.items() if owner == name))
            for name, each in held.items()
            if each.array is not None
        ]
        return tuple(pools), tuple(arrays)


def _is_alike(one: Planned, other: Planned) -> bool:
    return bool(_looks(one) == _looks(other))


def _looks(each: Planned) -> Any:
    """Without kind and paths: those are what it is for, not what it is."""
    return (each.pool.length_bytes, each.array and each.array._replace(paths=()))


def _told(each: Planned) -> str:
    return f"{list(each.array.shape)} of {each.array.dtype}" if each.array is not None else "memory"


def _form_of(each: Planned) -> Form:
    assert each.array is not None
    shape = each.array.shape
    return Form(each.array.dtype, each.pool.length_bytes // math.prod(shape), shape, fresh.c_order(shape))
