"""What a handler's file says about its deployment: its PEP 723 block, with our table ``[tool.coldstart]``.

::

    # /// script
    # requires-python = ">=3.12"
    # dependencies = ["torch>=2.6", "tokenizers"]
    # [tool.coldstart]
    # gpu = "L4"
    # max_workers = 5
    # [tool.coldstart.runpod]
    # flashboot = "priority"
    # ///

``OPTIONS``, ``RUNPOD_OPTIONS`` and ``MODAL_OPTIONS`` are the tables of what may stand there. Workers read the block too,
so a file without one costs no more than a look at its bytes. Standard library only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import HandlerError
from coldstart.terms import MODAL_SNAPSHOTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

PYTHONS = ("3.11", "3.12", "3.13")
"""The minor versions of Python that coldstart runs on."""

_OPEN, _CLOSE = "# /// script", "# ///"
_OPENING = re.compile("# /// [a-zA-Z0-9-]+")


class RunpodOptions(NamedTuple):
    """``[tool.coldstart.runpod]``: what only RunPod has. Defaults and meanings: ``RUNPOD_OPTIONS``."""

    gpu: tuple[str, ...]
    disk_gb: int
    flashboot: str
    network_volumes: tuple[str, ...]
    data_centers: tuple[str, ...]
    registry: str
    refresh_worker: bool
    return_aggregate_stream: bool
    secrets: Mapping[str, str]


class ModalOptions(NamedTuple):
    """``[tool.coldstart.modal]``: what only Modal has. Defaults and meanings: ``MODAL_OPTIONS``."""

    gpu: tuple[str, ...]
    snapshot: str
    secrets: tuple[str, ...]
    volume: str
    region: str
    web: str


class Script(NamedTuple):
    """A file's block. ``python`` is the minor version its image gets, such as "3.12", "" where the block does not say.

    ``dependencies`` are the block's requirements; the other fields are ``[tool.coldstart]``: ``OPTIONS``.
    """

    python: str
    dependencies: tuple[str, ...]
    apt: tuple[str, ...]
    include: tuple[str, ...]
    gpu: tuple[str, ...]
    gpu_count: int
    concurrency: int
    env: Mapping[str, str]
    timeout_seconds: int
    min_workers: int
    max_workers: int
    idle_seconds: int
    runpod: RunpodOptions
    modal: ModalOptions


def read_script(path: str) -> Script:
    """The block of the file at ``path``; all defaults where it has none.

    Raises HandlerError, with the file, the key and what is allowed, for a block that cannot be meant.
    """
    block = _block(path)
    return _NO_BLOCK if block is None else _read_block(path, block)


# --- options ---------------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """One key: ``read`` turns its TOML value into ours, or raises TypeError or ValueError where it is not ``allowed``."""

    read: Callable[[Any], Any]
    allowed: str
    default: Any
    doc: str


def _whole(least: int, most: int, default: int, doc: str) -> Option:
    def read(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError
        return value

    return Option(read, f"a whole number from {least} to {most}", default, doc)


def _flag(*, default: bool, doc: str) -> Option:
    def read(value: Any) -> bool:
        if type(value) is not bool:
            raise ValueError
        return value

    return Option(read, "true or false", default, doc)


def _choice(*words: str, default: str, doc: str) -> Option:
    def read(value: Any) -> Any:
        if value not in words:
            raise ValueError
        return value

    return Option(read, " or ".join(f'"{word}"' for word in words), default, doc)


def _text(allowed: str, doc: str, *, pattern: str = r"\S+") -> Option:
    return Option(lambda value: _checked_text(value, pattern), allowed, "", doc)


def _texts(allowed: str, doc: str, *, pattern: str = r"\S+", or_one: bool = False) -> Option:
    def read(value: Any) -> tuple[str, ...]:
        listed = [value] if or_one and isinstance(value, str) else value
        if not isinstance(listed, list):
            raise TypeError
        return tuple(dict.fromkeys(_checked_text(item, pattern) for item in listed))

    return Option(read, allowed, (), doc)


def _mapping(allowed: str, doc: str, *, pattern: str = r"[^\0]*") -> Option:
    def read(value: Any) -> Mapping[str, str]:
        if not isinstance(value, dict):
            raise TypeError
        return {_checked_text(key, _VARIABLE): _checked_text(text, pattern) for key, text in value.items()}

    return Option(read, allowed, {}, doc)


def _checked_text(value: Any, pattern: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError
    return value


_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_GPU = r"[A-Za-z0-9][A-Za-z0-9 _.:+!-]*"

OPTIONS: Mapping[str, Option] = {
    "apt": _texts('a list of Debian packages, such as ["ffmpeg"]', "packages of the image", pattern="[a-z0-9.+-]+"),
    "include": _texts(
        'a list of patterns, such as ["assets/**"]', "data files of the image, relative to the file", pattern=r"[^\0]+"
    ),
    "gpu": _texts(
        'a GPU or a list of them by preference, such as "L4" or ["H100", "A100"]',
        "GPUs that workers run on; none: workers have no GPU",
        pattern=_GPU,
        or_one=True,
    ),
    "gpu_count": _whole(1, 8, 1, "GPUs a worker"),
    "concurrency": _whole(0, 1000, 0, "events a worker takes at a time; 0: what the decorator says"),
    "env": _mapping('a table of texts, such as {MODEL_ID = "small"}', "variables of the workers' environment"),
    "timeout_seconds": _whole(1, 86_400, 300, "how long one event may take"),
    "min_workers": _whole(0, 1000, 0, "workers that are always there"),
    "max_workers": _whole(1, 1000, 3, "the most workers at a time"),
    "idle_seconds": _whole(2, 3600, 30, "how long a worker without events stays; a first snapshot is made in it"),
}
"""``[tool.coldstart]``, for every platform."""

RUNPOD_OPTIONS: Mapping[str, Option] = {
    "gpu": _texts('a list of RunPod pools, such as ["ADA_24"]', "pools; none: those of gpu", or_one=True),
    "disk_gb": _whole(1, 4096, 20, "container disk, in GB"),
    "flashboot": _choice("off", "on", "priority", default="on", doc="whether RunPod suspends idle workers"),
    "network_volumes": _texts("a list of ids", "network volumes, mounted at /runpod-volume"),
    "data_centers": _texts('a list of ids, such as ["EU-RO-1"]', "where workers run; none: anywhere"),
    "registry": _text("the id of a registry credential", "the credential that pulls a private image"),
    "refresh_worker": _flag(default=False, doc="end the worker after each event"),
    "return_aggregate_stream": _flag(default=True, doc="give the pieces of a stream as the final output too"),
    "secrets": _mapping(
        'a table of secrets\' names, such as {HF_TOKEN = "hf"}', "variables from RunPod secrets", pattern=r"[\w.-]+"
    ),
}
"""``[tool.coldstart.runpod]``."""

MODAL_OPTIONS: Mapping[str, Option] = {
    "gpu": _texts('Modal\'s GPU names, such as ["H100!"]', "GPUs; none: those of gpu", pattern=_GPU, or_one=True),
    "snapshot": _choice(*MODAL_SNAPSHOTS, default="off", doc="Modal's own memory snapshots"),
    "secrets": _texts("a list of secrets' names", "Modal secrets", pattern=r"[\w.-]+"),
    "volume": _text("the name of a volume", "a Modal volume to keep snapshots in", pattern=r"[\w.-]+"),
    "region": _text("the name of a region", "where workers run; none: anywhere"),
    "web": _choice("", "GET", "POST", default="", doc="also answer HTTP requests of this method"),
}
"""``[tool.coldstart.modal]``."""


def _defaults(options: Mapping[str, Option]) -> dict[str, Any]:
    return {key: option.default for key, option in options.items()}


_NO_BLOCK = Script(
    python="",
    dependencies=(),
    **_defaults(OPTIONS),
    runpod=RunpodOptions(**_defaults(RUNPOD_OPTIONS)),
    modal=ModalOptions(**_defaults(MODAL_OPTIONS)),
)


# --- the block -------------------------------------------------------------------------------------------------------


def _block(path: str) -> str | None:
    """The TOML text of a file's ``script`` block, None where there is none. Raises HandlerError for more than one."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise HandlerError(f"cannot read {path} ({error.strerror}): check the path of the handler file") from error
    if _OPEN.encode() not in data:
        return None
    try:
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise HandlerError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    blocks = _blocks(lines)
    if len(blocks) > 1:
        raise HandlerError(f"{path} has {len(blocks)} blocks '{_OPEN}': a file has one")
    return "\n".join(line[2:] for line in blocks[0]) if blocks else None


def _blocks(lines: list[str]) -> list[list[str]]:
    """The comment lines of each ``script`` block.

    As PEP 723 has it: the last closing line before other code ends a block, one that is not closed is none, and what
    looks like an opening inside another tool's block is none either.
    """
    found, number = [], 0
    while number < len(lines):
        opening = _OPENING.fullmatch(lines[number])
        number += 1
        end = _end_of_block(lines, number) if opening else 0
        if opening and end:
            if lines[number - 1] == _OPEN:
                found.append(lines[number:end])
            number = end + 1
    return found


def _end_of_block(lines: list[str], first: int) -> int:
    """Where the block whose content starts at ``first`` is closed, 0 if nowhere."""
    end, number = 0, first
    while number < len(lines) and (lines[number] == "#" or lines[number].startswith("# ")):
        if lines[number] == _CLOSE and number > first:
            end = number
        number += 1
    return end


def _read_block(path: str, block: str) -> Script:
    import tomllib

    try:
        document = tomllib.loads(block)
    except tomllib.TOMLDecodeError as error:
        raise HandlerError(f"{path}: its '{_OPEN}' block is not TOML: {error}") from error
    _check_keys(path, "", document, ("requires-python", "dependencies", "tool"))
    table = _table(path, "tool.coldstart", _table(path, "tool", document.get("tool", {})).get("coldstart", {}))
    runpod = _table(path, "tool.coldstart.runpod", table.pop("runpod", {}))
    modal = _table(path, "tool.coldstart.modal", table.pop("modal", {}))
    script = Script(
        python=_python(path, document.get("requires-python", "")),
        dependencies=_read(path, "dependencies", _DEPENDENCIES, document.get("dependencies", [])),
        **_read_table(path, "tool.coldstart", OPTIONS, table, further=("runpod", "modal")),
        runpod=RunpodOptions(**_read_table(path, "tool.coldstart.runpod", RUNPOD_OPTIONS, runpod)),
        modal=ModalOptions(**_read_table(path, "tool.coldstart.modal", MODAL_OPTIONS, modal)),
    )
    if script.min_workers > script.max_workers:
        raise HandlerError(
            f"{path}: tool.coldstart.min_workers={script.min_workers} is more than max_workers={script.max_workers}"
        )
    return script


_DEPENDENCIES = _texts('a list of requirements, such as ["torch>=2.6"]', "", pattern=r"\S[^\0\n]*")


def _table(path: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise HandlerError(f"{path}: {name} has to be a table, not {value!r}")
    return dict(value)


def _read_table(
    path: str, name: str, options: Mapping[str, Option], table: Mapping[str, Any], further: tuple[str, ...] = ()
) -> dict[str, Any]:
    _check_keys(path, name, table, (*options, *further))
    return {
        key: _read(path, f"{name}.{key}", option, table[key]) if key in table else option.default
        for key, option in options.items()
    }


def _read(path: str, key: str, option: Option, value: Any) -> Any:
    try:
        return option.read(value)
    except (TypeError, ValueError):
        raise HandlerError(f"{path}: {key}={_shown(key, value)} has to be {option.allowed}") from None


def _shown(key: str, value: Any) -> str:
    """A value as people may see it: what an environment holds may be a secret that is in the wrong place."""
    return "{...}" if key.endswith((".env", ".secrets")) and isinstance(value, dict) else repr(value)[:200]


def _check_keys(path: str, table: str, given: Iterable[str], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise HandlerError(f"{path}: {table + '.' if table else ''}{key} is not a key of the block: {hint}")


# --- requires-python -------------------------------------------------------------------------------------------------

_NEWEST_PATCH = 999
_SPECIFIER = re.compile(r"(~=|==|!=|<=|>=|<|>)\s*(\d+(?:\.\d+){0,2})(\.\*)?")


def _python(path: str, requirement: Any) -> str:
    """The lowest minor version that satisfies ``requires-python``, its newest patch taken: images have that one."""
    if requirement == "":
        return ""
    parts = [part.strip() for part in requirement.split(",")] if isinstance(requirement, str) else []
    clauses = [_SPECIFIER.fullmatch(part) for part in parts if part]
    if not clauses or None in clauses:
        raise HandlerError(
            f'{path}: requires-python={requirement!r} has to be versions, such as ">=3.12" or "==3.12.*"'
        )
    for minor in PYTHONS:
        version = (*map(int, minor.split(".")), _NEWEST_PATCH)
        if all(_satisfies(version, *clause.groups()) for clause in clauses if clause):
            return minor
    raise HandlerError(
        f"{path}: requires-python={requirement!r} fits no newest patch of Python {', '.join(PYTHONS)}:"
        ' write ">=3.12" or "==3.12.*"'
    )


def _satisfies(version: tuple[int, ...], operator: str, text: str, star: str | None) -> bool:
    given = tuple(map(int, text.split(".")))
    same_series = version[: len(given)] == given
    if operator in ("==", "!="):
        equal = same_series if star else version == (*given, 0, 0)[:3]
        return equal == (operator == "==")
    padded = (*given, 0, 0)[:3]
    if operator == "~=":
        return version >= padded and version[: len(given) - 1] == given[:-1]
    if operator == ">" and same_series and len(given) < len(version):
        return True
    return {">=": version >= padded, "<=": version <= padded, "<": version < padded, ">": version > padded}[operator]
