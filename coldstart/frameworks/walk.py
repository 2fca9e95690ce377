"""Every array of a state, with its path and how to put another one there.

The walk goes through containers, torch modules and the attributes of any other object, and meets each object once. It
does not enter functions, classes, modules of Python, threads, locks, files and loggers: what only they hold is made
again by ``build``. Its order is the same in every process, and the first path to an object is the one it is known by:
first whatever is reached without the plain attributes of torch modules (so parameters get the names of the
``state_dict``), then those attributes, last the places where arrays cannot be put back (sets, attributes of tensors).

Nothing is refused here: a spot that cannot be captured says so, and the caller decides.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from functools import lru_cache, partial
from itertools import chain
from types import MemberDescriptorType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.frameworks import cupy as for_cupy
from coldstart.frameworks import numpy as for_numpy
from coldstart.frameworks import torch as for_torch
from coldstart.frameworks.paths import ROOT, attribute, item
from coldstart.manifest import MAX_TEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from coldstart.frameworks.memory import Extent, Form

_FRAMEWORKS: Mapping[str, Any] = {"torch": for_torch, "numpy": for_numpy, "cupy": for_cupy}
_ATOMS = frozenset({str, bytes, int, float, bool, complex, type(None), bytearray, range, slice, type(...)})
_OPAQUE_TYPES = (str, bytes, bytearray, int, float, complex, type, ModuleType, BaseException)
_OPAQUE_PACKAGES = frozenset(
    """
    _asyncio _ctypes _functools _io _queue _socket _sqlite3 _ssl _thread _weakref _weakrefset asyncio concurrent
    ctypes datetime decimal enum functools importlib inspect io logging mmap multiprocessing pathlib queue re
    select selectors socket sqlite3 ssl subprocess threading uuid weakref
    """.split()  # noqa: SIM905  a list of names, not of quotes
)
"""Classes of these, and what derives from them, are not looked into: they stand for something of the process."""


class Assembly:
    """An object that cannot be changed in place: new parts mean making it anew, everywhere it is held."""

    def __init__(self, original: Any, place: Callable[[Any], None], parts: dict[Any, Any]) -> None:
        self.original = original
        self.places = [place]
        self.parts = parts

    def put(self, key: Any, part: Any) -> None:
        """Replace one part."""
        self.parts[key] = part
        self.place_all()

    def place_all(self) -> None:
        """Make the object anew and put it wherever the original is held."""
        made = self.made()
        for place in self.places:
            place(made)

    def made(self) -> Any:
        """A tuple of the same type with the present parts."""
        return _tuple_like(self.original, self.parts.values())


class WrapperAssembly(Assembly):
    """A tensor subclass taken apart by ``__tensor_flatten__``; made anew when all its parts are there."""

    def __init__(self, original: Any, place: Callable[[Any], None], parts: dict[Any, Any]) -> None:
        super().__init__(original, place, parts)
        self.requires_grad = bool(original.requires_grad)
        self._missing = set(parts)

    def put(self, key: Any, part: Any) -> None:
        """Replace one part; the wrapper follows with the last of them."""
        self.parts[key] = part
        self._missing.discard(key)
        if not self._missing:
            self.place_all()

    def made(self) -> Any:
        """The wrapper around the present parts, with the original's metadata."""
        return for_torch.wrap(self.original, self.parts, requires_grad=self.requires_grad)


class Spot(NamedTuple):
    """A place that holds an array.

    ``framework`` is "" for a value that is no array of torch or numpy, ``out_of_reach`` says why the array could not be
    put back whatever it is. ``wrappers`` are the tensor subclasses that it is a part of, outermost first; its role and
    ``requires_grad`` are the outermost's.
    """

    path: str
    framework: str
    role: str
    array: Any
    place: Callable[[Any], None]
    same_as: str
    wrappers: tuple[WrapperAssembly, ...]
    out_of_reach: str

    def refusal(self, *, meta: bool = False) -> str:
        """Why this array cannot be captured, as the rest of a sentence; "" if it can. ``meta``: it needs no bytes."""
        if self.out_of_reach or self.framework in ("numpy", "cupy"):
            return self.out_of_reach or str(_FRAMEWORKS[self.framework].refusal(self.array))
        if self.wrappers and self.array.requires_grad:
            return "is a part of a tensor subclass and requires a gradient of its own"
        reasons = (for_torch.graph_refusal(wrapper.original) for wrapper in self.wrappers)
        return next(filter(None, reasons), "") or for_torch.refusal(self.array, meta=meta)

    def form(self) -> Form:
        """What the array looks like; only for one that is not refused."""
        form: Form = _FRAMEWORKS[self.framework].form(self.array)
        return form

    def extent(self, length_bytes: int) -> Extent:
        """The memory of the array; only for one that is not refused and has elements."""
        extent: Extent = _FRAMEWORKS[self.framework].extent(self.array, length_bytes)
        return extent


class _Visit(NamedTuple):
    path: str
    value: Any
    place: Callable[[Any], None]
    role: str = ""
    wrappers: tuple[WrapperAssembly, ...] = ()
    refusal: str = ""


class Walk:
    """A walk through ``state``: its ``spots`` in order, its torch ``modules`` by path, and ``state`` as it is now."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.spots: list[Spot] = []
        self.modules: dict[str, Any] = {}
        self._seen: dict[int, Any] = {}
        self._first_path: dict[int, str] = {}
        self._assemblies: dict[int, Assembly] = {}
        self._handlers: dict[type, Callable[[_Visit], None]] = {}
        self._stack = [_Visit(ROOT, state, self._replace_state)]
        self._later: deque[_Visit] = deque()
        self._last: deque[_Visit] = deque()
        while self._stack:
            visit = self._stack.pop()
            self._handler(type(visit.value))(visit)
            if not self._stack and (self._later or self._last):
                self._stack.append((self._later or self._last).popleft())

    def _replace_state(self, state: Any) -> None:
        self.state = state

    def _enter(self, visit: _Visit) -> bool:
        """Whether this is the first visit; keeps the object alive, so that its id stays its own."""
        first = id(visit.value) not in self._seen
        self._seen[id(visit.value)] = visit.value
        return first

    def _push(self, visits: Iterable[_Visit]) -> None:
        self._stack.extend(reversed([_bounded(visit) for visit in visits]))

    # --- which way to look into a type -------------------------------------------------------------------------------

    def _handler(self, cls: type) -> Callable[[_Visit], None]:
        handler = self._handlers.get(cls)
        if handler is None:
            handler = self._handlers[cls] = self._array_handler(cls) or self._holder_handler(cls)
        return handler

    def _array_handler(self, cls: type) -> Callable[[_Visit], None] | None:
        # By name, so that a state without torch imports no torch and one without numpy no numpy.
        names = {(base.__module__, base.__qualname__) for base in cls.__mro__}
        if ("torch", "Tensor") in names:
            return self._tensor
        if ("numpy", "ndarray") in names:
            return partial(self._array, "numpy")
        if for_cupy.is_array(names):
            return partial(self._array, "cupy")
        if ("numpy", "generic") in names:
            return self._nothing
        members = {name for base in cls.__mro__ for name in vars(base)}
        if "__cuda_array_interface__" in members:
            return partial(
                self._refuse, f"is a {cls.__name__} on a GPU: only arrays of torch and cupy can be captured there"
            )
        if "__dlpack__" in members:
            return partial(self._refuse, f"is a {cls.__name__}: only arrays of torch and numpy can be captured")
        if ("torch.jit._script", "ScriptModule") in names:
            return partial(self._refuse, "is a TorchScript module, whose parameters cannot be replaced")
        if cls.__name__ == "ScriptObject" and cls.__module__.partition(".")[0] == "torch":
            return partial(self._refuse, "is a compiled torch object (packed parameters), whose bytes cannot be seen")
        return self._module if ("torch.nn.modules.module", "Module") in names else None

    def _holder_handler(self, cls: type) -> Callable[[_Visit], None]:
        packages = {str(base.__module__).partition(".")[0] for base in cls.__mro__}
        if issubclass(cls, _OPAQUE_TYPES) or not packages.isdisjoint(_OPAQUE_PACKAGES):
            return self._nothing
        if issubclass(cls, dict):
            return self._mapping
        if issubclass(cls, (list, deque)):
            return self._sequence
        if issubclass(cls, tuple):
            return self._tuple
        if issubclass(cls, (set, frozenset)):
            return self._set
        return self._nothing if cls.__module__ == "builtins" else self._object

    # --- arrays ------------------------------------------------------------------------------------------------------

    def _nothing(self, visit: _Visit) -> None:
        pass

    def _refuse(self, refusal: str, visit: _Visit) -> None:
        self.spots.append(
            Spot(visit.path, "", "", visit.value, visit.place, "", visit.wrappers, visit.refusal or refusal)
        )

    def _array(self, framework: str, visit: _Visit) -> None:
        self._spot(visit, framework, "array")

    def _tensor(self, visit: _Visit) -> None:
        tensor = visit.value
        role = visit.role if visit.wrappers else for_torch.role(tensor, visit.role)
        parts = for_torch.parts(tensor)
        if parts is None:
            self._spot(visit, "torch", role)
            self._tensor_attributes(visit)
        elif visit.refusal:
            self._refuse(visit.refusal, visit)
        elif id(tensor) in self._assemblies:
            self._assemblies[id(tensor)].places.append(visit.place)
        else:
            wrapper = WrapperAssembly(tensor, visit.place, parts)
            self._assemblies[id(tensor)] = wrapper
            wrappers = (*visit.wrappers, wrapper)
            self._push(
                _Visit(attribute(visit.path, name), part, partial(wrapper.put, name), role, wrappers)
                for name, part in list(parts.items())
            )

    def _spot(self, visit: _Visit, framework: str, role: str) -> None:
        path, value = visit.path, visit.value
        first_path = self._first_path.setdefault(id(value), path)
        same_as = "" if first_path == path else first_path
        self.spots.append(Spot(path, framework, role, value, visit.place, same_as, visit.wrappers, visit.refusal))

    def _tensor_attributes(self, visit: _Visit) -> None:
        refusal = "is an attribute of a tensor, and a restore replaces the tensor"
        if vars(visit.value):
            self._last.extend(
                _bounded(_Visit(attribute(visit.path, name), value, place, refusal=refusal))
                for name, value, place in _attributes(visit.value)
            )

    # --- what holds them ---------------------------------------------------------------------------------------------

    def _module(self, visit: _Visit) -> None:
        if not self._enter(visit):
            return
        if visit.refusal:
            self._refuse(visit.refusal, visit)
            return
        module, path = visit.value, visit.path
        self.modules[path] = module
        held = [(vars(module).get(field, {}), role) for field, role in for_torch.MODULE_FIELDS]
        self._push(
            [
                _Visit(attribute(path, name), value, partial(dict.__setitem__, values, name), role)
                for values, role in held
                for name, value in values.items()
                if value is not None
            ]
        )
        self._later.extend(
            _bounded(_Visit(attribute(path, name), value, place))
            for name, value, place in _attributes(module, for_torch.module_internals())
        )

    def _mapping(self, visit: _Visit) -> None:
        if self._enter(visit):
            atoms_only = _ATOMS.issuperset(map(type, dict.values(visit.value)))
            # A subclass may override items(); of OrderedDict, only its own knows the order.
            kind: Any = OrderedDict if isinstance(visit.value, OrderedDict) else dict
            pairs = [] if atoms_only else list(enumerate(kind.items(visit.value)))
            items = (
                self._item(visit, key, position, value) for position, (key, value) in pairs if type(value) not in _ATOMS
            )
            self._push(chain(items, self._members(visit)))

    def _item(self, visit: _Visit, key: Any, position: int, value: Any) -> _Visit:
        refusal = visit.refusal
        if self._handler(type(key)) in (self._tensor, self._module):
            refusal = refusal or "has a tensor or a module as its key, and a restore replaces that"
        place = partial(dict.__setitem__, visit.value, key)
        return _Visit(item(visit.path, key, position), value, place, refusal=refusal)

    def _sequence(self, visit: _Visit) -> None:
        if self._enter(visit):
            values = visit.value
            kind: Any = list if isinstance(values, list) else deque
            items = (
                _Visit(
                    item(visit.path, index, index),
                    value,
                    partial(kind.__setitem__, values, index),
                    "",
                    (),
                    visit.refusal,
                )
                for index, value in list(enumerate(kind.__iter__(values)))
                if type(value) not in _ATOMS
            )
            self._push(chain(items, self._members(visit)))

    def _tuple(self, visit: _Visit) -> None:
        values = visit.value
        if _ATOMS.issuperset(map(type, values)):
            return
        assembly = self._assemblies.get(id(values))
        if assembly is None:
            assembly = self._assemblies[id(values)] = Assembly(values, visit.place, dict(enumerate(values)))
        elif not visit.refusal:
            assembly.places.append(visit.place)
            return
        elif not self._enter(visit):
            return
        self._push(
            _Visit(item(visit.path, index, index), value, partial(assembly.put, index), refusal=visit.refusal)
            for index, value in enumerate(values)
            if type(value) not in _ATOMS
        )

    def _set(self, visit: _Visit) -> None:
        if self._enter(visit):
            refusal = visit.refusal or "lies in a set, whose order is not the same in every process"
            self._last.extend(
                _bounded(_Visit(item(visit.path, element, 0), element, visit.place, refusal=refusal))
                for element in visit.value
                if type(element) not in _ATOMS
            )

    def _object(self, visit: _Visit) -> None:
        if self._enter(visit):
            self._push(self._members(visit))

    def _members(self, visit: _Visit) -> Iterator[_Visit]:
        for name, value, place in _attributes(visit.value):
            yield _Visit(attribute(visit.path, name), value, place, refusal=visit.refusal)


def _bounded(visit: _Visit) -> _Visit:
    if len(visit.path) <= MAX_TEXT:
        return visit
    refusal = visit.refusal or f"lies deeper than a path of {MAX_TEXT} characters reaches"
    return visit._replace(path=visit.path[:MAX_TEXT], refusal=refusal)


def _attributes(value: Any, without: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Name, value and setter of each attribute, but plain values, that the object stores. No code of its class is run.

    The setters go past ``__setattr__`` too: frozen and validating classes take the array as it is.
    """
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        own = None
    if isinstance(own, dict):
        for name, held in list(own.items()):
            if type(held) not in _ATOMS and name not in without and isinstance(name, str):
                yield name, held, partial(dict.__setitem__, own, name)
    cls: Any = type(value)
    for name, member in _slots(cls):
        try:
            held = member.__get__(value)
        except AttributeError:
            continue
        if type(held) not in _ATOMS:
            yield name, held, partial(member.__set__, value)


@lru_cache(maxsize=1024)
def _slots(cls: type) -> tuple[tuple[str, Any], ...]:
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__slots__" in vars(base):
            members.update(vars(base))
    return tuple((name, member) for name, member in members.items() if type(member) is MemberDescriptorType)


def _tuple_like(original: Any, parts: Iterable[Any]) -> Any:
    cls = type(original)
    if cls is tuple:
        return tuple(parts)
    if hasattr(cls, "n_sequence_fields"):  # torch.return_types and their like: only their own constructor makes them
        return cls(parts)
    made = tuple.__new__(cls, parts)
    if hasattr(original, "__dict__"):
        vars(made).update(vars(original))
    return made
