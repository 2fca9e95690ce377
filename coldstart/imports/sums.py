"""Imports added up: own times, by top-level package, and by who is to thank for them. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coldstart.imports.watch import Load

COLDSTART, HANDLER, RUNTIME = "coldstart", "handler", "runtime"
OWNERS: Mapping[str, str] = {
    COLDSTART: "coldstart and what it imports",
    HANDLER: "the handler's module and what it imports",
    RUNTIME: "the runtime and what it imports",
}
"""Who an import is counted to -> what that is."""

RUNTIMES = frozenset({"cupy", "numpy", "onnxruntime", "torch"})
"""Packages that run a computation: whoever imports them, a start cannot do without the one that its model runs on."""


class Module(NamedTuple):
    """One import. ``own_seconds``: without what it imported itself; ``outermost``: nothing of its package is around it."""

    load: Load
    owner: str
    own_seconds: float
    outermost: bool


class Package(NamedTuple):
    """A top-level package: ``seconds`` with everything that its modules import, ``own_seconds`` without other modules."""

    name: str
    owner: str
    modules: int
    seconds: float
    own_seconds: float


def modules_of(loads: Iterable[Load], *, handler: str) -> list[Module]:
    """Every import with its owner and own time, by beginning. ``handler``: the name of the handler's module."""
    loads = sorted(loads, key=lambda load: (load.thread, load.began_seconds, -load.ended_seconds))
    owners = owners_of(loads, handler=handler)
    own = {id(load): load.seconds for load in loads}
    packages: dict[int, frozenset[str]] = {}
    around: list[Load] = []
    for load in loads:
        while around and (around[-1].thread != load.thread or around[-1].ended_seconds <= load.began_seconds):
            around.pop()
        above = frozenset((*packages[id(around[-1])], around[-1].package)) if around else frozenset()
        if around:
            own[id(around[-1])] -= load.seconds
        packages[id(load)] = above
        around.append(load)
    return sorted(
        (Module(load, owners[load.name], own[id(load)], load.package not in packages[id(load)]) for load in loads),
        key=lambda module: module.load.began_seconds,
    )


def owners_of(loads: Iterable[Load], *, handler: str) -> dict[str, str]:
    """Module -> its owner: coldstart's and the handler's own modules, a runtime, else the owner of who imported it."""
    importers: dict[str, str] = {}
    for load in loads:
        importers.setdefault(load.name, load.importer)
    return {name: _owner(name, importers, handler) for name in importers}


def _owner(name: str, importers: Mapping[str, str], handler: str) -> str:
    seen: set[str] = set()
    while name not in seen:
        package = name.partition(".")[0]
        if name == handler:
            return HANDLER
        if package == "coldstart":
            return COLDSTART
        if package in RUNTIMES:
            return RUNTIME
        seen.add(name)
        name = importers.get(name, name)
    return COLDSTART  # imported by something that was there before the watch: the command


def packages_of(modules: Iterable[Module]) -> list[Package]:
    """Top-level packages, the most expensive first."""
    grouped: dict[str, list[Module]] = {}
    for module in modules:
        grouped.setdefault(module.load.package, []).append(module)
    found = [
        Package(
            name,
            members[0].owner,
            len(members),
            sum(member.load.seconds for member in members if member.outermost),
            sum(member.own_seconds for member in members),
        )
        for name, members in grouped.items()
    ]
    return sorted(found, key=lambda package: (-package.seconds, package.name))


def seconds_of(modules: Iterable[Module]) -> dict[str, float]:
    """Owner -> the own times of all its imports. No time counts twice; threads that import at the same time add up."""
    sums = dict.fromkeys(OWNERS, 0.0)
    for module in modules:
        sums[module.owner] += module.own_seconds
    return sums


def covered_seconds(stretches: Iterable[tuple[float, float]], began_seconds: float, ended_seconds: float) -> float:
    """How much of the time between two moments lies within some of the stretches (begin and end, by the same clock)."""
    covered, until = 0.0, began_seconds
    for began, ended in sorted(stretches):
        begin, end = max(began, until), min(ended, ended_seconds)
        if end > begin:
            covered += end - begin
            until = end
    return covered


def describe(loads: Iterable[Load], *, handler: str, began_seconds: float, offset_seconds: float) -> dict[str, Any]:
    """Imports as plain JSON. ``began_seconds``: when the watch began; ``offset_seconds`` leads to the clock of the output."""
    modules = modules_of(loads, handler=handler)
    return {
        "began_seconds": round(began_seconds + offset_seconds, 6),
        "handler": handler,
        "owners": {owner: round(seconds, 6) for owner, seconds in seconds_of(modules).items()},
        "packages": [
            {**package._asdict(), "seconds": round(package.seconds, 6), "own_seconds": round(package.own_seconds, 6)}
            for package in packages_of(modules)
        ],
        "modules": [
            {
                "name": module.load.name,
                "importer": module.load.importer,
                "owner": module.owner,
                "thread": module.load.thread,
                "compiled": module.load.compiled,
                "began_seconds": round(module.load.began_seconds + offset_seconds, 6),
                "ended_seconds": round(module.load.ended_seconds + offset_seconds, 6),
                "own_seconds": round(module.own_seconds, 6),
            }
            for module in modules
        ],
    }
