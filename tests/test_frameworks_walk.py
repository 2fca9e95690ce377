"""Where arrays are found in states of plain Python objects, and that they can be replaced there."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import io
import logging
import queue
import threading
import types
import typing
import weakref
from typing import Any

import numpy as np
import pytest

from coldstart.errors import UncapturableError
from coldstart.frameworks import survey
from coldstart.frameworks.walk import Walk


def paths(state: Any) -> list[str]:
    """The paths of a state's arrays."""
    return [spot.path for spot in Walk(state).spots]


def array(value: float = 0.0) -> Any:
    """Some array."""
    return np.full((2,), value)


class Holder:
    """An object with attributes."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Slotted:
    """An object with slots, one of them private and one never set."""

    __slots__ = ("__hidden", "b", "unset")

    def __init__(self, hidden: Any, b: Any) -> None:
        self.__hidden = hidden
        self.b = b

    @property
    def hidden(self) -> Any:
        """What the private slot holds."""
        return self.__hidden


class SlottedChild(Slotted):
    """Slots in two classes, and a __dict__."""

    __slots__ = ("__dict__", "c")


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen dataclass with slots."""

    weights: Any


class Point(typing.NamedTuple):
    """A namedtuple."""

    x: Any
    y: Any


class Tagged(tuple):  # noqa: SLOT001  it is to have a __dict__
    """A tuple with attributes."""


class Color(enum.Enum):
    """An enum with an array in it."""

    RED = "red"


def test_containers_are_walked_in_their_own_order():
    """Insertion order decides the order, so that two processes agree."""
    state = {"b": [array(), {3: array()}], "a": (array(), collections.deque([array()]))}
    assert paths(state) == ['["b"][0]', '["b"][1][3]', '["a"][0]', '["a"][1][0]']


def test_attributes_and_slots_are_walked():
    """Objects of any class are looked into, without running code of theirs."""
    child = SlottedChild(array(), Slotted(array(), array()))
    child.c = array()
    child.d = array()
    state = Holder(plain=1, child=child, ns=types.SimpleNamespace(w=array()), frozen=Frozen(array()))
    assert paths(state) == [
        "child.d",
        "child._Slotted__hidden",
        "child.b._Slotted__hidden",
        "child.b.b",
        "child.c",
        "ns.w",
        "frozen.weights",
    ]


def test_items_come_before_attributes_of_a_container():
    """A dict with attributes of its own has both, under different names."""

    class Output(collections.OrderedDict):
        pass

    output = Output(logits=array())
    output.logits = array()
    assert paths(output) == ['["logits"]', "logits"]


def test_a_bare_array_is_the_state_itself():
    """The root has a path of its own."""
    assert paths(array()) == ["$"]


def test_what_stands_for_the_process_is_not_entered():
    """Functions, classes, modules, locks, threads, files, loggers, queues and weak references are left to build()."""
    hidden = array()

    class Class:
        held = hidden

    def function() -> Any:
        return hidden

    thread = threading.Thread(target=function, args=(hidden,))
    thread.held = hidden  # type: ignore[attr-defined]
    logger = logging.getLogger("coldstart.tests.walk")
    logger.held = hidden  # type: ignore[attr-defined]
    module = types.ModuleType("made")
    module.held = hidden  # type: ignore[attr-defined]
    file = io.BytesIO()
    waiting: queue.Queue[Any] = queue.Queue()
    waiting.put(hidden)
    text = type("Text", (str,), {})("x")
    text.held = hidden
    error = ValueError(hidden)
    error.held = hidden  # type: ignore[attr-defined]
    state = [
        Class, function, thread, logger, module, file, waiting, text, error, threading.Lock(), threading.local(),
        functools.partial(function, hidden), Holder().__init__, weakref.ref(Holder()), Color.RED, np.float64(1), range(3),
    ]  # fmt: skip
    assert paths(state) == []


def test_cycles_end():
    """An object that holds itself, through containers or attributes, is met once."""
    holder = Holder(w=array())
    holder.me = holder
    holder.list = [holder, {"again": holder}]
    holder.list.append(holder.list)
    assert paths(holder) == ["w"]


def test_deep_nesting_does_not_overflow():
    """Twenty thousand levels of lists, tuples, sets and objects are walked without recursion."""
    state: Any = 0
    for level in range(20_000):
        state = [[state], (state, [None]), Holder(inner=state), {"k": state}][level % 4]
    assert paths(state) == []


def test_an_array_too_deep_for_a_path_is_refused():
    """What the format could not name is an error and is not left out."""
    state: Any = array()
    for _ in range(3000):
        state = [state]
    with pytest.raises(UncapturableError, match="4096 characters"):
        survey(state)


def test_an_object_at_two_places_is_named_by_the_first():
    """A shared container is walked once; a shared array is a leaf at each place, the later ones same_as the first."""
    shared = array()
    inner = [shared]
    spots = Walk({"a": inner, "b": inner, "c": shared}).spots
    assert [(spot.path, spot.same_as) for spot in spots] == [('["a"][0]', ""), ('["c"]', '["a"][0]')]


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda w: {"k": w}, lambda state: state["k"]),
        (lambda w: [None, w], lambda state: state[1]),
        (lambda w: collections.deque([w, 1]), lambda state: state[0]),
        (lambda w: collections.OrderedDict(k=w), lambda state: state["k"]),
        (lambda w: Holder(w=w), lambda state: state.w),
        (lambda w: Slotted(w, 1), lambda state: state.hidden),
        (lambda w: Frozen(w), lambda state: state.weights),
        (lambda w: types.SimpleNamespace(w=w), lambda state: state.w),
        (lambda w: [(1, (2, w))], lambda state: state[0][1][1]),
        (lambda w: Holder(point=Point(1, w)), lambda state: state.point.y),
        (lambda w: {"t": Tagged((w,))}, lambda state: state["t"][0]),
        (lambda w: (w, 1), lambda state: state[0]),
        (lambda w: w, lambda state: state),
    ],
)
def test_an_array_can_be_replaced_wherever_it_was_found(make: Any, read: Any):
    """place() puts another array at the path: in mutable holders in place, through immutable ones by making them anew."""
    walk = Walk(make(array()))
    new = array(1.0)
    walk.spots[0].place(new)
    assert read(walk.state) is new


def test_a_tuple_keeps_its_type_its_attributes_and_its_other_members():
    """A rebuilt tuple differs from the old one in the replaced member only."""
    tagged = Tagged((array(), "x"))
    tagged.note = "kept"
    walk = Walk([tagged, Point(array(), y=2)])
    for spot in walk.spots:
        spot.place(array(7.0))
    made, point = walk.state
    assert (type(made), made.note, made[1]) == (Tagged, "kept", "x")
    assert (type(point), point.y) == (Point, 2)
    assert (made[0][0], point.x[0]) == (7.0, 7.0)


def test_a_tuple_in_two_places_is_replaced_in_both():
    """Sharing of a tuple survives: both holders get the one made anew."""
    shared = (array(), array())
    walk = Walk({"a": shared, "b": [shared]})
    for spot in walk.spots:
        spot.place(array(3.0))
    assert walk.state["a"] is walk.state["b"][0]
    assert [member[0] for member in walk.state["a"]] == [3.0, 3.0]


def test_an_array_in_a_set_is_refused():
    """A set has another order in every process, so no path could name its members."""
    with pytest.raises(UncapturableError, match="lies in a set"):
        survey([{(1, Holder(w=array()))}])


def test_what_is_reached_in_order_too_may_also_lie_in_a_set():
    """Sets are looked at last, so that an index of known objects is no obstacle wherever it stands."""
    holder = Holder(w=array())
    assert paths({"index": {holder}, "holders": [holder]}) == ['["holders"][0].w']


def test_arrays_of_other_libraries_are_refused():
    """What says that it is an array is never left out silently."""

    class Foreign:
        def __dlpack__(self) -> None: ...

    class OnDevice:
        @property
        def __cuda_array_interface__(self) -> None:
            raise AssertionError("is not asked for")

    with pytest.raises(UncapturableError, match=r"state\.w is a Foreign: only arrays of torch and numpy"):
        survey(Holder(w=Foreign()))
    with pytest.raises(UncapturableError, match=r'state\["w"\] is a OnDevice on a GPU: only arrays of torch and cupy'):
        survey({"w": OnDevice()})


def test_containers_that_override_their_reading_are_read_as_they_are():
    """A dict or list that would import or compute something when iterated is not asked to."""

    class LazyDict(dict[str, Any]):
        def items(self) -> Any:
            raise AssertionError

        values = keys = __iter__ = items

    class LazyOrdered(collections.OrderedDict[str, Any]):
        def values(self) -> Any:
            raise AssertionError

    class LazyList(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError

    ordered = LazyOrdered(a=array(), b=array())
    ordered.move_to_end("a")
    assert paths([LazyDict(w=array()), LazyList([array()]), ordered]) == ['[0]["w"]', "[1][0]", '[2]["b"]', '[2]["a"]']


def test_no_code_of_the_states_classes_runs():
    """Properties, __getattr__ and __setattr__ are not called, neither to look nor to replace."""

    class Guarded:
        def __init__(self) -> None:
            vars(self)["w"] = array()

        def __getattr__(self, name: str) -> None:
            raise AssertionError(name)

        def __setattr__(self, name: str, value: object) -> None:
            raise AssertionError(name)

        @property
        def costly(self) -> None:
            raise AssertionError("costly")

    walk = Walk(Guarded())
    walk.spots[0].place(array(2.0))
    assert walk.state.w[0] == 2.0
