"""The arithmetic of a benchmark: from trials to medians, percentiles, ratios of pairs and overlaps. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.bench.agreement import Agreement, canonical, compare
from coldstart.bench.trial import FIRST, NAIVE, ORDINARY, PROGRAM, RESTORED, SCENARIOS, Trial
from coldstart.metrics import percentile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

RATIOS = (
    (ORDINARY, PROGRAM),
    (NAIVE, PROGRAM),
    (RESTORED, PROGRAM),
    (ORDINARY, RESTORED),
    (NAIVE, RESTORED),
    (FIRST, NAIVE),
)
"""Slower over faster: what restoring gains, and what the first worker pays for making the snapshot."""

PHASES_TRACK = "phases"
_LEAST_OVERLAP_SECONDS = 0.001


class Spread(NamedTuple):
    """A sample in four numbers. With few samples p95 lies close to the maximum."""

    samples: int
    median: float
    p95: float
    maximum: float


class Stretch(NamedTuple):
    """A phase or span of one trial, in seconds since its process start.

    ``beside``: what ran on other tracks meanwhile, and for how many seconds.
    """

    track: str
    name: str
    began_seconds: float
    ended_seconds: float
    beside: tuple[tuple[str, float], ...] = ()

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended_seconds - self.began_seconds


class Part(NamedTuple):
    """A phase or span over all trials of a scenario: the median of those that have it, and how many do.

    ``skipped``: why a phase did not take place.
    """

    track: str
    name: str
    median_seconds: float
    samples: int
    skipped: str = ""


class ScenarioSummary(NamedTuple):
    """All trials of one scenario. ``median_round`` is the round whose trial lies nearest to the median."""

    scenario: str
    first_response: Spread
    warm: Spread | None
    median_round: int
    timeline: tuple[Stretch, ...]
    parts: tuple[Part, ...]
    bytes: Mapping[str, int]
    captures: tuple[Mapping[str, Any], ...]


class Ratio(NamedTuple):
    """Time to the first response of ``over`` as a multiple of ``under``'s, in pairs of the same round."""

    over: str
    under: str
    median: float
    lowest: float
    highest: float


class Answers(NamedTuple):
    """Whether the answers agree: restored ones, the program's and the ordinary way's with naive ones. Counts are of rounds."""

    restored_identical: int
    rounds: int
    repeats_equal: bool
    restored: Agreement
    """Of the round that agrees least, as are the next."""
    ordinary: Agreement | None
    program: Agreement | None = None


class Results(NamedTuple):
    """What a benchmark found."""

    scenarios: tuple[ScenarioSummary, ...]
    ratios: tuple[Ratio, ...]
    answers: Answers


def summarise(trials: Iterable[Trial]) -> Results:
    """Everything that is said about trials. Round 0 warms caches and is left out.

    Raises ValueError unless each scenario has the same rounds, at least one.
    """
    by_scenario: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.round > 0:
            by_scenario.setdefault(trial.scenario, []).append(trial)
    rounds = {tuple(trial.round for trial in group) for group in by_scenario.values()}
    if len(rounds) != 1:
        raise ValueError(f"each scenario needs the same rounds, not {sorted(rounds)}")
    return Results(
        tuple(summarise_scenario(by_scenario[name]) for name in SCENARIOS if name in by_scenario),
        tuple(ratio(by_scenario[a], by_scenario[b]) for a, b in RATIOS if a in by_scenario and b in by_scenario),
        judge_answers(by_scenario),
    )


def spread(samples: Sequence[float]) -> Spread:
    """Median, p95 and maximum of samples in any unit. Raises ValueError without samples."""
    return Spread(len(samples), percentile(samples, 0.5), percentile(samples, 0.95), max(samples, default=0.0))


def summarise_scenario(trials: Sequence[Trial]) -> ScenarioSummary:
    """The trials of one scenario in numbers."""
    first = spread([trial.first_response_seconds for trial in trials])
    warm = [seconds for trial in trials for seconds in trial.warm_seconds]
    middle = min(trials, key=lambda trial: (abs(trial.first_response_seconds - first.median), trial.round))
    return ScenarioSummary(
        scenario=trials[0].scenario,
        first_response=first,
        warm=spread(warm) if warm else None,
        median_round=middle.round,
        timeline=with_overlaps(stretches(middle.start)),
        parts=median_parts([trial.start for trial in trials]),
        bytes={name: int(count) for name, count in dict(middle.start.get("bytes") or {}).items()},
        captures=middle.captures,
    )


def stretches(start: Mapping[str, Any]) -> tuple[Stretch, ...]:
    """Phases that took place, then spans, of a start record, each group in order of time."""
    phases = [_stretch(PHASES_TRACK, item) for item in start.get("phases") or () if not item.get("skipped")]
    spans = [_stretch(str(item.get("track", "main")), item) for item in start.get("spans") or ()]
    return (*sorted(phases, key=_when), *sorted(spans, key=_when))


def _stretch(track: str, item: Mapping[str, Any]) -> Stretch:
    return Stretch(track, str(item["name"]), float(item["began_seconds"]), float(item["ended_seconds"]))


def _when(stretch: Stretch) -> tuple[float, float]:
    return stretch.began_seconds, -stretch.ended_seconds


def with_overlaps(timeline: Sequence[Stretch]) -> tuple[Stretch, ...]:
    """Each stretch with what ran beside it on other tracks for at least a millisecond, longest first."""
    return tuple(one._replace(beside=_beside(one, timeline)) for one in timeline)


def _beside(one: Stretch, timeline: Sequence[Stretch]) -> tuple[tuple[str, float], ...]:
    """Phases sum up what the main track does, so they are beside nothing and nothing is beside them."""
    if one.track == PHASES_TRACK:
        return ()
    shared = [
        (other.name, min(one.ended_seconds, other.ended_seconds) - max(one.began_seconds, other.began_seconds))
        for other in timeline
        if other.track not in (one.track, PHASES_TRACK)
    ]
    long_enough = [pair for pair in shared if pair[1] >= _LEAST_OVERLAP_SECONDS]
    return tuple(sorted(long_enough, key=lambda pair: -pair[1]))


def median_parts(starts: Sequence[Mapping[str, Any]]) -> tuple[Part, ...]:
    """Median seconds of every phase and span, in the order of their first appearance, then skipped phases."""
    seconds: dict[tuple[str, str], list[float]] = {}
    skipped: dict[tuple[str, str], str] = {}
    for start in starts:
        for key, total in _totals(start).items():
            seconds.setdefault(key, []).append(total)
        skipped |= {
            (PHASES_TRACK, item["name"]): item["skipped"] for item in start.get("phases") or () if item.get("skipped")
        }
    ran = [Part(*key, percentile(samples, 0.5), len(samples)) for key, samples in seconds.items()]
    return (*ran, *(Part(*key, 0.0, 0, reason) for key, reason in skipped.items() if key not in seconds))


def _totals(start: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Seconds by (track, name) of one trial; what appears several times is summed."""
    totals: dict[tuple[str, str], float] = {}
    for item in stretches(start):
        key = item.track, item.name
        totals[key] = totals.get(key, 0.0) + item.seconds
    return totals


def ratio(over: Sequence[Trial], under: Sequence[Trial]) -> Ratio:
    """How many times as long ``over`` takes, by pairs of trials of the same round."""
    pairs = zip(over, under, strict=True)
    ratios = [slow.first_response_seconds / fast.first_response_seconds for slow, fast in pairs]
    return Ratio(over[0].scenario, under[0].scenario, percentile(ratios, 0.5), min(ratios), max(ratios))


def judge_answers(by_scenario: Mapping[str, Sequence[Trial]]) -> Answers:
    """Compare the restored answers, the program's and the ordinary way's with the naive ones of the same round.

    Where a snapshot holds a program alone, its answers are the restored ones.
    """
    naive = [trial.output for trial in by_scenario[NAIVE]]
    restored = [trial.output for trial in by_scenario.get(RESTORED) or by_scenario[PROGRAM]]
    others = {
        name: _least([compare(trial.output, other) for trial, other in zip(by_scenario[name], naive, strict=True)])
        for name in (ORDINARY, PROGRAM)
        if name in by_scenario
    }
    identical = [canonical(one) == canonical(other) for one, other in zip(restored, naive, strict=True)]
    return Answers(
        restored_identical=sum(identical),
        rounds=len(identical),
        repeats_equal=all(trial.answers_equal for group in by_scenario.values() for trial in group),
        restored=_least([compare(one, other) for one, other in zip(restored, naive, strict=True)]),
        ordinary=others.get(ORDINARY),
        program=others.get(PROGRAM),
    )


def _least(agreements: Sequence[Agreement]) -> Agreement:
    """The agreement that agrees least: one that differs in shape before the largest numeric difference."""
    return max(agreements, key=lambda each: (bool(each.difference), each.largest_difference, not each.identical))
