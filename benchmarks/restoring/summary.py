"""What the trials say: medians, ratios as medians of the rounds' own, and goals beside what was reached. Pure."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.restoring.contenders import LIMIT, OURS, OURS_PLANES, RUNAI

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Trials = Mapping[str, Sequence[Mapping[str, Any]]]
    """Contender -> one trial a round, in the order of rounds."""

MIB = 1 << 20
LIMIT_PART = 0.85
RUNAI_TIMES = 4.0
LINK_TIMES = 1.45
START_TIMES = 1.10
MEMORY_MIB = 256.0
_NO_PEERS = (LIMIT, "coldstart")


class Row(NamedTuple):
    """A contender's medians. ``of_limit``: the limit's seconds over its own, None where the limit was not run."""

    name: str
    seconds: float
    gigabytes_per_second: float
    of_limit: float | None
    spawn_seconds: float
    touched_seconds: float
    processor_seconds: float
    over_mib: float | None


class Goal(NamedTuple):
    """What was wanted and what was reached. ``value`` None: not measured, ``why`` says why."""

    what: str
    goal: str
    value: float | None
    met: bool
    why: str = ""


def rows(trials: Trials, size_bytes: int, memory: Mapping[str, float]) -> list[Row]:
    """The table of contenders, in their order; ``memory``: MiB over the state by contender, where it was looked at."""
    return [_row(name, found, trials.get(LIMIT), size_bytes, memory.get(name)) for name, found in trials.items()]


def _row(
    name: str,
    found: Sequence[Mapping[str, Any]],
    limit: Sequence[Mapping[str, Any]] | None,
    size_bytes: int,
    over_mib: float | None,
) -> Row:
    seconds = _median_of(found, "seconds")
    return Row(
        name=name,
        seconds=seconds,
        gigabytes_per_second=size_bytes / 1e9 / seconds,
        of_limit=ratio(limit, found) if limit else None,
        spawn_seconds=_median_of(found, "spawn_seconds"),
        touched_seconds=median(each["seconds"] + each["touch_seconds"] for each in found),
        processor_seconds=_median_of(found, "processor_seconds"),
        over_mib=over_mib,
    )


def _median_of(found: Sequence[Mapping[str, Any]], field: str) -> float:
    return float(median(each[field] for each in found))


def ratio(over: Sequence[Mapping[str, Any]], under: Sequence[Mapping[str, Any]], field: str = "seconds") -> float:
    """The median of the rounds' own ratios."""
    return float(median(one[field] / other[field] for one, other in zip(over, under, strict=True)))


def over_state_mib(trial: Mapping[str, Any], size_bytes: int) -> float:
    """Memory of a reader beyond what it held before and the state itself."""
    return float(trial["memory_bytes"] - trial["before_bytes"] - size_bytes) / MIB


def memory_of(document: Mapping[str, Any]) -> dict[str, float]:
    """Contender -> MiB over the state, with the model of the table."""
    found = next((each for each in document.get("memory", ()) if each["size_bytes"] == document["size_bytes"]), None)
    if found is None:
        return {}
    return {name: over_state_mib(trial, found["size_bytes"]) for name, trial in found["trials"].items()}


def link_times(link: Mapping[str, Any], name: str) -> float:
    """Raw bytes restored a second over the bytes a second that bare sockets got from the same link, round by round.

    The limit reads the safetensors file, which is the raw bytes and a header of a few thousandths of them.
    """
    return ratio(link["trials"][LIMIT], link["trials"][name])


def start_times(start: Mapping[str, Any]) -> float:
    """The wall of a whole start, from spawn to answer, over a fetch that nothing ran beside."""
    pairs = zip(start["start_seconds"], start["fetch_seconds"], strict=True)
    return float(median(whole / alone for whole, alone in pairs))


def goals(document: Mapping[str, Any]) -> list[Goal]:
    """All goals. What was not measured in this document is there with its reason."""
    return [*_contender_goals(document), *_link_goals(document), _start_goal(document), *_memory_goals(document)]


def _contender_goals(document: Mapping[str, Any]) -> list[Goal]:
    trials = document.get("contenders", {})
    found = []
    for what, goal, over in (
        ("verified restore, raw, plain loopback: part of the limit", LIMIT_PART, LIMIT),
        ("the same: times Run:ai", RUNAI_TIMES, RUNAI),
    ):
        there = OURS in trials and over in trials
        value = ratio(trials[over], trials[OURS]) if there else None
        found.append(_at_least(what, goal, value))
    return [*found, _fastest_peer_goal(trials)]


def _fastest_peer_goal(trials: Trials) -> Goal:
    """Against whichever peer has the smallest median, whether or not it checks a byte."""
    seconds = {name: _median_of(each, "seconds") for name, each in trials.items() if not name.startswith(_NO_PEERS)}
    if OURS not in trials or not seconds:
        return _at_least("the same: times the fastest peer", 1.0, None)
    fastest = min(seconds, key=lambda name: seconds[name])
    return _at_least(f"the same: times the fastest peer ({fastest})", 1.0, ratio(trials[fastest], trials[OURS]))


def _link_goals(document: Mapping[str, Any]) -> list[Goal]:
    return [
        _at_least(
            f"bf16 over a link of {link['megabytes_per_second']:g} MB/s, planes+zstd: times the link",
            LINK_TIMES,
            link_times(link, OURS_PLANES),
        )
        for link in document.get("links", ())
    ] or [_at_least("bf16 over limited links: times the link", LINK_TIMES, None, _lack(document, "links"))]


def _start_goal(document: Mapping[str, Any]) -> Goal:
    what = "start bound by the fetch, import of torch included: times the fetch alone"
    start = document.get("start")
    return _at_most(what, START_TIMES, start_times(start) if start else None, _lack(document, "start"))


def _memory_goals(document: Mapping[str, Any]) -> list[Goal]:
    found = []
    for each in document.get("memory", ()):
        over = [over_state_mib(each["trials"][name], each["size_bytes"]) for name in (OURS, OURS_PLANES)]
        what = f"memory over a state of {each['size_bytes'] / MIB:,.0f} MiB, MiB (the larger of raw and planes+zstd)"
        found.append(_at_most(what, MEMORY_MIB, max(over)))
    return found or [_at_most("memory over the state, MiB", MEMORY_MIB, None)]


def _lack(document: Mapping[str, Any], part: str) -> str:
    return str(document.get("left_out", {}).get(part, "not run"))


def _at_least(what: str, goal: float, value: float | None, why: str = "not run") -> Goal:
    is_met = value is not None and round(value, 2) >= goal
    return Goal(what, f"at least {goal:g}", value, is_met, "" if value is not None else why)


def _at_most(what: str, goal: float, value: float | None, why: str = "not run") -> Goal:
    is_met = value is not None and round(value, 2) <= goal
    return Goal(what, f"at most {goal:g}", value, is_met, "" if value is not None else why)


class EngineRow(NamedTuple):
    """One engine or client at one endpoint, medians: alone, and beside the import of torch."""

    name: str
    endpoint: str
    alone_seconds: float
    beside_seconds: float
    import_seconds: float
    both_seconds: float


def engine_rows(engines: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[EngineRow]:
    """``engines``: "name|endpoint|alone or beside" -> trials."""
    found = []
    for name, endpoint, how in (key.split("|") for key in engines):
        if how != "alone":
            continue
        beside = engines[f"{name}|{endpoint}|beside"]
        found.append(
            EngineRow(
                name,
                endpoint,
                median(each["details"]["fetch_seconds"] for each in engines[f"{name}|{endpoint}|alone"]),
                median(each["details"]["fetch_seconds"] for each in beside),
                median(each["details"]["import_seconds"] for each in beside),
                _median_of(beside, "seconds"),
            )
        )
    return found
