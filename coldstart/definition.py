"""What a decorator was given: checked, as plain data. What users pass, ``Warmup`` and ``Policy``, is here too.

This module is on the path of ``from coldstart import coldstart``, so it imports nothing, not even ``typing``:
annotations are text, and kinds of functions are told by their code flags.
"""

from __future__ import annotations

import sys

from coldstart.errors import HandlerError
from coldstart.terms import BUFFER_KINDS, SKIPPABLE_PHASES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from coldstart.exports import Export
    from coldstart.worker import Worker

_GENERATOR, _COROUTINE, _ASYNC_GENERATOR, _VARARGS = 0x20, 0x80, 0x200, 0x04  # inspect.CO_* flags
_HOOKS = ("load", "build", "compile", "init", "close", "before_snapshot", "after_restore")
CLASS_METHODS = (*_HOOKS, "handle")
RESERVED = ("run",)
"""What a handler has of its own: no public method of a class may be called that."""


class Frozen:
    """A small value: attributes set once, equality and repr by them. A dataclass would cost 23 ms at import."""

    __slots__: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and all(getattr(self, n) == getattr(other, n) for n in self.__slots__)

    def __hash__(self) -> int:
        return hash(tuple(repr(getattr(self, name)) for name in self.__slots__))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


class Warmup(Frozen):
    """How a worker warms up: inputs that go through the real handler before the first event.

    ``inputs`` become events ``{"id": "warmup-N", "input": ...}``, run ``iterations`` times over. Phases named in
    ``skip`` are left out. A phase that takes longer than ``target_seconds`` is reported; after ``maximum_seconds`` no
    further iteration is begun. Raises HandlerError for values that cannot be meant.
    """

    __slots__ = ("inputs", "iterations", "maximum_seconds", "skip", "target_seconds")
    inputs: tuple[Any, ...]
    iterations: int
    skip: tuple[str, ...]
    target_seconds: float
    maximum_seconds: float

    def __init__(
        self,
        inputs: Sequence[Any] = (),
        *,
        iterations: int = 1,
        skip: Sequence[str] = (),
        target_seconds: float = 30.0,
        maximum_seconds: float = 300.0,
    ) -> None:
        if not is_sequence(inputs):
            raise HandlerError(
                f"warmup= takes a list of inputs, such as [{{'texts': ['a']}}], or a Warmup(...), not {inputs!r}"
            )
        if not is_number(iterations, least=1, whole=True):
            raise HandlerError(f"Warmup(iterations={iterations!r}) must be a whole number of at least 1")
        if not is_sequence(skip) or any(phase not in SKIPPABLE_PHASES for phase in skip):
            raise HandlerError(
                f"Warmup(skip={skip!r}) takes a list of phases; it may name {', '.join(SKIPPABLE_PHASES)}"
            )
        if not (is_number(target_seconds) and is_number(maximum_seconds)):
            raise HandlerError(
                f"Warmup(target_seconds={target_seconds!r}, maximum_seconds={maximum_seconds!r}) takes seconds"
                " of 0 or more"
            )
        assign(self, inputs=tuple(inputs), iterations=iterations, skip=tuple(skip))
        assign(self, target_seconds=target_seconds, maximum_seconds=maximum_seconds)


class Policy(Frozen):
    """When a worker makes a new generation although one is there for its key. 0 switches a condition off.

    ``after_events``: once this many events were served since the last one. ``interval_seconds``: this long after
    the last one. ``maximum_age_seconds``: when the generation it started from is older. The default: never.
    """

    __slots__ = ("after_events", "interval_seconds", "maximum_age_seconds")
    after_events: int
    interval_seconds: float
    maximum_age_seconds: float

    def __init__(
        self, *, after_events: int = 0, interval_seconds: float = 0.0, maximum_age_seconds: float = 0.0
    ) -> None:
        given = (after_events, interval_seconds, maximum_age_seconds)
        if not (is_number(after_events, whole=True) and all(map(is_number, given))):
            raise HandlerError(f"Policy{given} takes a whole number of events, and seconds, of 0 or more")
        assign(self, after_events=after_events, interval_seconds=interval_seconds)
        assign(self, maximum_age_seconds=maximum_age_seconds)


def assign(target: object, **values: object) -> None:
    """Set attributes of a frozen value, in its constructor."""
    for name, value in values.items():
        object.__setattr__(target, name, value)


class Definition:
    """All that a decorator was given, checked. Plain data; the worker that serves it hangs on it once it is ready."""

    __slots__ = (
        "after_restore",
        "before_snapshot",
        "build",
        "close",
        "compile",
        "concurrency",
        "env",
        "files",
        "function",
        "init",
        "kind",
        "kinds",
        "load",
        "name",
        "owner",
        "policy",
        "program",
        "ready_worker",
        "secrets",
        "version",
        "warmup",
    )
    name: str
    function: Callable[..., Any]
    """The user's ``handler(event, model)``; in class form ``handle(self, event)`` behind the same two arguments."""
    kind: str
    """``sync``, ``async``, ``generator`` or ``async_generator``."""
    owner: type | None
    """The class, in class form."""
    load: Mapping[str, Callable[..., Any]]
    """Part name -> loader; the one part of an undivided state is named ""."""
    build: Mapping[str, Callable[..., Any]]
    compile: Callable[..., Any] | None
    init: Callable[..., Any] | None
    close: Callable[..., Any] | None
    before_snapshot: Callable[..., Any] | None
    after_restore: Callable[..., Any] | None
    warmup: Warmup
    files: Mapping[str, str]
    env: tuple[str, ...]
    secrets: tuple[str, ...]
    kinds: Mapping[str, str]
    version: str | None
    concurrency: int
    policy: Policy
    program: Export | None
    ready_worker: Worker | None

    @property
    def code(self) -> Any:
        """The code object of the user's function: its kind, and what it takes."""
        return code_of(self.function)

    @property
    def file(self) -> str:
        """The file that defines the handler: its module's. A decorator below ours has code that lies elsewhere."""
        module = sys.modules.get((self.owner or self.function).__module__)
        return str(getattr(module, "__file__", None) or self.code.co_filename)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_name(name: Any, most: int = 100) -> str:
    """Return ``name`` if a handler, or a part of its state, can be called that. Raises HandlerError."""
    if name is None or callable(name):
        raise HandlerError("@coldstart needs a name: write @coldstart('my-model', load=...)")
    plain = name.replace("-", "").replace("_", "").replace(".", "") if isinstance(name, str) else ""
    if not (plain.isalnum() and plain.isascii() and name[0].isalnum() and len(name) <= most):
        raise HandlerError(
            f"{name!r} cannot name a handler: use letters, digits, '.', '_' and '-', at most {most} of them"
        )
    return str(name)


def _checked_names(names: Any, what: str) -> tuple[str, ...]:
    if not is_sequence(names) or not all(isinstance(name, str) and name for name in names):
        raise HandlerError(f"{what}= takes a list of variable names, such as {what}=['MODEL_ID'], not {names!r}")
    return tuple(names)


def _checked_files(files: Any) -> Mapping[str, str]:
    if not hasattr(files, "items"):
        raise HandlerError(
            f"files= takes a mapping of name -> path, such as {{'vocab.txt': 'assets/vocab.txt'}}, not {files!r}"
        )
    return {str(name): str(path) for name, path in files.items()}


def _checked_kinds(kinds: Any) -> Mapping[str, str]:
    if not hasattr(kinds, "items") or any(kind not in BUFFER_KINDS for kind in kinds.values()):
        raise HandlerError(
            f"kinds={kinds!r} has to map path prefixes to kinds of buffers, each one of {', '.join(BUFFER_KINDS)}"
        )
    return dict(kinds)


def _check_options(definition: Definition) -> None:
    both = set(definition.env) & set(definition.secrets)
    if both:
        raise HandlerError(
            f"{', '.join(sorted(both))} in both env= and secrets=: a secret never enters a key, so choose one"
        )
    if definition.version == "" or not isinstance(definition.version, (str, type(None))):
        raise HandlerError(f"version={definition.version!r} must be a text that is not empty")
    if type(definition.concurrency) is not int or definition.concurrency < 1:
        raise HandlerError(f"concurrency={definition.concurrency!r} must be a whole number of at least 1")
    if not isinstance(definition.policy, Policy):
        raise HandlerError(f"policy= takes a coldstart.Policy(...), not {definition.policy!r}")


def is_sequence(value: Any) -> bool:
    """Whether a user can have meant a list by it: a text or a mapping, which can be iterated too, is a mistake."""
    return hasattr(value, "__iter__") and not isinstance(value, (str, bytes)) and not hasattr(value, "items")


def is_number(value: Any, *, least: int = 0, whole: bool = False) -> bool:
    """Whether ``value`` is a number that is no bool and not below ``least``."""
    return type(value) in ((int,) if whole else (int, float)) and value >= least


def code_of(function: Any) -> Any:
    """The code object of a Python function or method, None for anything else."""
    return getattr(getattr(function, "__func__", function), "__code__", None)


def _check_takes(function: Any, what: str, least: int, most: int, signature: str) -> None:
    """Check that ``function`` can be called with ``least`` to ``most`` positional arguments, where that can be seen."""
    if not callable(function):
        raise HandlerError(f"{what}= must be a function {signature}, not {function!r}")
    code = code_of(function)
    if code is None:
        return
    taken = code.co_argcount - (1 if hasattr(function, "__self__") else 0)
    required = taken - len(getattr(function, "__defaults__", None) or ())
    if required > most or (taken < least and not code.co_flags & _VARARGS):
        raise HandlerError(f"{what} {code.co_name!r} takes {taken} argument(s); it must be {signature}")
    if code.co_kwonlyargcount > len(getattr(function, "__kwdefaults__", None) or ()):
        raise HandlerError(
            f"{what} {code.co_name!r} has a keyword-only parameter without a default, and nothing passes it;"
            f" it must be {signature}"
        )


def accepts(function: Any, count: int) -> bool:
    """Whether a user's hook takes at least ``count`` positional arguments; what cannot be seen is taken to."""
    code = code_of(function)
    if code is None or code.co_flags & _VARARGS:
        return True
    return bool(code.co_argcount - (1 if hasattr(function, "__self__") else 0) >= count)


def _parts(value: Any, what: str) -> Mapping[str, Callable[..., Any]]:
    named = hasattr(value, "items") and not isinstance(value, type)
    parts = dict(value) if named else {"": value}
    for name, function in parts.items():
        if name:
            check_name(name, most=64)
        _check_takes(function, what, 0, 1, f"{what}(ctx) or {what}()")
    if not parts:
        raise HandlerError(f"{what}= is an empty mapping: name at least one part of the state")
    return parts


# --- what is decorated -----------------------------------------------------------------------------------------------


def define(name: Any, target: Any, options: Mapping[str, Any]) -> Definition:
    """Check what ``@coldstart(name, **options)`` was given for ``target``: a Definition. Raises HandlerError."""
    definition = Definition()
    warmup = options["warmup"]
    definition.name = check_name(name)
    definition.warmup = warmup if isinstance(warmup, Warmup) else Warmup(warmup)
    definition.files = _checked_files(options["files"] or {})
    definition.env, definition.secrets = (
        _checked_names(options["env"], "env"),
        _checked_names(options["secrets"], "secrets"),
    )
    definition.kinds = _checked_kinds(options["kinds"] or {})
    definition.version = options["version"]
    definition.concurrency = options["concurrency"]
    definition.policy = Policy() if options["policy"] is None else options["policy"]
    definition.program = options["program"]
    definition.ready_worker = None
    _check_options(definition)
    if isinstance(target, type):
        _define_class(definition, target, options)
    else:
        _define_function(definition, target, options)
    return definition


def _define_function(definition: Definition, function: Any, options: Mapping[str, Any]) -> None:
    if type(function).__name__ != "function":
        raise HandlerError(
            f"@coldstart decorates a function or a class, not {type(function).__name__} {function!r}; put it directly"
            " above the def, below decorators of platforms"
        )
    if hasattr(function, "__coldstart__"):
        raise HandlerError(f"{function.__name__!r} is decorated with @coldstart(...) already: decorate it once")
    if function.__code__.co_argcount < 2 and not function.__code__.co_flags & _VARARGS:  # noqa: PLR2004
        raise HandlerError(
            f"handler {function.__name__!r} has no second parameter: write def {function.__name__}(event, model), where"
            " model is what init (or load) returned"
        )
    _check_takes(function, "handler", 2, 2, "handler(event, model)")
    if options["load"] is None:
        raise HandlerError(f"@coldstart({definition.name!r}) needs load=: the function that makes the state")
    definition.owner = None
    definition.function = function
    definition.kind = kind_of_code(function.__code__)
    definition.load = _parts(options["load"], "load")
    definition.build = {} if options["build"] is None else _parts(options["build"], "build")
    if set(definition.build) - set(definition.load):
        raise HandlerError(
            f"build= has parts {sorted(definition.build)} and load= has {sorted(definition.load)}:"
            " give both the same names"
        )
    for what, signature in (
        ("compile", "compile(ctx, state)"),
        ("init", "init(ctx, state)"),
        ("close", "close(model)"),
        ("before_snapshot", "before_snapshot(model)"),
        ("after_restore", "after_restore(ctx, model)"),
    ):
        hook = options[what]
        if hook is not None:
            count = signature.count(",") + 1
            _check_takes(hook, what, count, count, signature)
        setattr(definition, what, hook)


def _define_class(definition: Definition, owner: type, options: Mapping[str, Any]) -> None:
    given = sorted(name for name in _HOOKS if options[name] is not None)
    if given:
        raise HandlerError(
            f"class {owner.__name__} was decorated with {', '.join(f'{name}=' for name in given)}:"
            " write methods of these names instead"
        )
    if owner.__init__ is not object.__init__:  # type: ignore[misc]  # asking for identity is sound
        raise HandlerError(
            f"class {owner.__name__} has an __init__: move it into load(self, ctx), which runs once ever"
        )
    methods = {name: _method(owner, name) for name in CLASS_METHODS}
    if methods["load"] is None or methods["handle"] is None:
        raise HandlerError(f"class {owner.__name__} needs the methods load(self, ctx) and handle(self, event)")
    for name, method in methods.items():
        least, most, signature = _METHOD_TAKES[name]
        if method is not None:
            _check_takes(method, f"{owner.__name__}.{name}", least, most, signature)
    clash = [name for name in RESERVED if hasattr(owner, name)]
    if clash:
        raise HandlerError(
            f"class {owner.__name__} has a public {clash[0]!r}, which every handler has of its own: rename it"
        )
    handle = methods["handle"]
    definition.owner = owner
    definition.kind = kind_of_code(handle.__code__)
    definition.function = handle
    definition.load = {"": methods["load"]}
    definition.build = {} if methods["build"] is None else {"": methods["build"]}
    for name in ("compile", "init", "close", "before_snapshot", "after_restore"):
        setattr(definition, name, methods[name])


_METHOD_TAKES = {
    "load": (1, 2, "load(self, ctx) or load(self)"),
    "build": (1, 2, "build(self, ctx) or build(self)"),
    "compile": (1, 2, "compile(self, ctx) or compile(self)"),
    "init": (1, 2, "init(self, ctx) or init(self)"),
    "close": (1, 1, "close(self)"),
    "before_snapshot": (1, 1, "before_snapshot(self)"),
    "after_restore": (1, 2, "after_restore(self, ctx) or after_restore(self)"),
    "handle": (2, 2, "handle(self, event)"),
}
"""Method -> the least and the most that it takes, and how it is written."""


def _method(owner: type, name: str) -> Any:
    method = next((vars(base)[name] for base in owner.__mro__ if name in vars(base)), None)
    if method is not None and type(method).__name__ != "function":
        raise HandlerError(
            f"{owner.__name__}.{name} is a {type(method).__name__}: make it an ordinary method, def {name}(self, ...)"
        )
    return method


def kind_of_code(code: Any) -> str:
    """``sync``, ``async``, ``generator`` or ``async_generator``, by the flags of a code object."""
    flags = code.co_flags
    if flags & _ASYNC_GENERATOR:
        return "async_generator"
    if flags & _COROUTINE:
        return "async"
    return "generator" if flags & _GENERATOR else "sync"


def definition_of(handler: Any) -> Definition:
    """What ``handler`` was decorated with. Raises HandlerError for anything that is not a decorated handler."""
    definition = getattr(handler, "__coldstart__", None)
    if not isinstance(definition, Definition):
        raise HandlerError(f"{handler!r} is not a handler: decorate it with @coldstart('name', load=...)")
    return definition
