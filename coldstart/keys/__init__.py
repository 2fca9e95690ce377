"""Keys: what a snapshot depends on, so that nobody is served old weights by accident.

A key is computed from source, never from bytecode or memory, so it is the same before the handler's module is imported
(``find_handlers``, ``key_from_source``: the fetch starts while the module is still being imported) and after
(``key_from_functions``: the truth). Its parts, each with a digest of its own so that a change can be named:

- ``load``, ``build``: their code with all that it reaches (see ``reach``), or ``version`` where one is given;
- ``env:NAME``: the value's digest, for each name in ``env=`` and each that the code reads by a literal name. Names in
  ``secrets=``, and undeclared ones that look like a secret's, never enter;
- ``device`` and ``format``, in plain text.

``compile``, ``init`` and the handler run at every start and do not belong to the key; neither do comments, layout and
docstrings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from coldstart.errors import HandlerError, KeyUncomputableError
from coldstart.keys.handlers import HandlerSource, find_handlers
from coldstart.keys.lineage import has_member
from coldstart.keys.reach import Root, code_of
from coldstart.keys.roots import class_definition, class_free_values, class_path, root_of_expression, root_of_object
from coldstart.keys.source import COMPUTED, Sources
from coldstart.keys.syntax import digest_of
from coldstart.manifest import FORMAT_MAJOR, KeyRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from coldstart.keys.handlers import PartSource

    class Defined(Protocol):
        """The arguments of a decorator, as ``coldstart.decorator.Definition`` holds them."""

        load: Mapping[str, Callable[..., Any]]
        build: Mapping[str, Callable[..., Any]]
        owner: type | None
        env: tuple[str, ...]
        secrets: tuple[str, ...]
        version: str | None

        @property
        def file(self) -> str:
            """The file that defines the handler."""

    Environment = Callable[[str], str | None]

__all__ = ["COMPUTED", "HandlerSource", "explain_change", "find_handlers", "key_from_functions", "key_from_source"]

_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "ACCESS_KEY")
_CODE_PARTS = ("load", "build")
_ENVIRONMENT = "env:"


def key_from_source(handler: HandlerSource, *, device_type: str, environment: Environment) -> dict[str, KeyRecord]:
    """The key of each part of a handler, before its module is imported.

    ``environment(name)`` must answer with the values that the process was started with, None for an unset name: the
    module may change its environment while it is imported. Raises KeyUncomputableError when the key has to wait for the
    import, or cannot be computed at all; the text says which.
    """
    with _Computing():
        obstacle = _obstacle(handler)
        if obstacle:
            raise _wait(obstacle)
        keys = {}
        for part, source in handler.parts.items():
            roots = {} if handler.version is not None else _roots_of_source(handler, source)
            keys[part] = _record(
                handler.sources,
                roots,
                declared=handler.env or (),
                secrets=handler.secrets or (),
                version=handler.version,
                device_type=device_type,
                environment=environment,
            )
        return keys


def key_from_functions(definition: Defined, part: str, *, device_type: str, environment: Environment) -> KeyRecord:
    """The key of one part of a handler, from the objects that its decorator was given.

    ``environment`` as for ``key_from_source``. Raises KeyUncomputableError, with the remedy, where a loader has no
    source, closes over more than plain values, or reads the environment by a computed name.
    """
    with _Computing():
        owner = definition.owner
        path = class_path(owner) if owner is not None else None
        sources = Sources(path or definition.file)
        roots = {} if definition.version is not None else _roots_of_objects(sources, definition, part)
        return _record(
            sources,
            roots,
            declared=definition.env,
            secrets=definition.secrets,
            version=definition.version,
            device_type=device_type,
            environment=environment,
        )


def explain_change(old: KeyRecord, new: KeyRecord) -> str:
    """What differs between two keys, for people: ``code changed: load; environment changed: MODEL_ID``."""
    changed = [name for name in {**old.parts, **new.parts} if old.parts.get(name) != new.parts.get(name)]
    found = []
    if "version" in changed:
        found.append(f"version changed: {_told(old, 'version')} -> {_told(new, 'version')}")
    elif code := [name for name in _CODE_PARTS if name in changed]:
        found.append(f"code changed: {', '.join(code)}")
    if variables := sorted(name.removeprefix(_ENVIRONMENT) for name in changed if name.startswith(_ENVIRONMENT)):
        found.append(f"environment changed: {', '.join(variables)}")
    told = ("version", *_CODE_PARTS)
    others = sorted(name for name in changed if name not in told and not name.startswith(_ENVIRONMENT))
    found += [f"{name} changed: {_told(old, name)} -> {_told(new, name)}" for name in others]
    return "; ".join(found) or "nothing changed"


def _told(key: KeyRecord, part: str) -> str:
    return key.parts.get(part, "none")


class _Computing:
    """Turns what can go wrong with other people's source into KeyUncomputableError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, HandlerError):
            raise KeyUncomputableError(f"{error}; the snapshot's key depends on that file") from error
        if isinstance(error, RecursionError):
            raise KeyUncomputableError(
                'code that load or build reaches is nested too deeply to be read; give the decorator version="1"'
            ) from error


def _wait(why: str) -> KeyUncomputableError:
    return KeyUncomputableError(f"the key waits for the import of the handler: {why}")


def _obstacle(handler: HandlerSource) -> str:
    """Why a handler's key cannot be computed before the import, if so."""
    if handler.name is None:
        return "its name is computed"
    for what, value in (("env", handler.env), ("secrets", handler.secrets)):
        if value is not None and not (type(value) in (list, tuple) and all(type(name) is str for name in value)):
            return f"{what}= is not a list of literal names"
    if handler.version is not None and type(handler.version) is not str:
        return "version= is not a literal text"
    return handler.obstacle


def _roots_of_source(handler: HandlerSource, source: PartSource) -> dict[str, Root]:
    file = handler.sources.handler
    if handler.is_class:
        return _class_roots(handler.sources, Root(file, owner=source.load))
    roots = {}
    for what, expression in (("load", source.load), ("build", source.build)):
        if expression is not None:
            root = root_of_expression(handler.sources, file, expression)
            if root is None:
                raise _wait(f"the source does not say which function {what}= is")
            roots[what] = root
    return roots


def _roots_of_objects(sources: Sources, definition: Defined, part: str) -> dict[str, Root]:
    if definition.owner is not None:
        file, node = class_definition(sources, definition.owner, "load")
        free = class_free_values(definition.owner, "load")
        return _class_roots(sources, Root(file, owner=node, free=free))
    loaders = {"load": definition.load.get(part), "build": definition.build.get(part)}
    return {what: root_of_object(sources, each, f"{what}=") for what, each in loaders.items() if each is not None}


def _class_roots(sources: Sources, root: Root) -> dict[str, Root]:
    roots = {what: root._replace(name=what) for what in _CODE_PARTS if has_member(sources, root.file, root.owner, what)}
    if "load" not in roots:
        raise KeyUncomputableError(
            f'class {root.owner.name} has no load method that its source shows; define it there, or give version="1"'
        )
    return roots


def _record(
    sources: Sources,
    roots: Mapping[str, Root],
    *,
    declared: Iterable[str],
    secrets: Iterable[str],
    version: str | None,
    device_type: str,
    environment: Environment,
) -> KeyRecord:
    codes = {what: code_of(sources, root) for what, root in roots.items()}
    parts = {what: digest for what, (digest, _) in codes.items()}
    if version is not None:
        parts["version"] = version
    read = {name for _, names in codes.values() for name in names if not _looks_secret(name)}
    for name in sorted((read | set(declared)) - set(secrets)):
        parts[_ENVIRONMENT + name] = _value_digest(environment(name))
    parts["device"] = device_type
    parts["format"] = str(FORMAT_MAJOR)
    return KeyRecord(
        digest_of("".join(f"{len(text)}:{text}" for part in sorted(parts.items()) for text in part)), parts
    )


def _looks_secret(name: str) -> bool:
    upper = name.upper().replace("TOKENIZER", "").replace("TOKENS", "")  # which tokenizer, how many tokens
    return upper.endswith("_KEY") or any(word in upper for word in _SECRET_WORDS)


def _value_digest(value: str | None) -> str:
    return digest_of("unset" if value is None else f"set {value}")
