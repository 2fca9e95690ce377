"""What a benchmark says about its trials: the arithmetic, whether answers agree, the reports."""

from __future__ import annotations

import json
import math
import platform
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.bench import report as reports
from coldstart.bench.agreement import Agreement, compare
from coldstart.bench.machine import Machine, describe_machine
from coldstart.bench.summary import (
    Part,
    Stretch,
    median_parts,
    ratio,
    spread,
    stretches,
    summarise,
    summarise_scenario,
    with_overlaps,
)
from coldstart.bench.timeline import WIDTH, draw
from coldstart.bench.trial import FIRST, NAIVE, ORDINARY, PROGRAM, RESTORED, SCENARIOS, Trial


def made_trial(scenario, number, seconds, **changes):
    """A trial that took ``seconds`` to its first response."""
    start = {"kind": "restored" if scenario in (RESTORED, PROGRAM) else "cold", "phases": [], "spans": []}
    trial = Trial(scenario, number, seconds, seconds + 1, (0.01, 0.03), {"v": [1.0, 2.0]}, True, start, ())
    return trial._replace(**changes)


def made_rounds(seconds_of):
    """Trials of all scenarios; ``seconds_of`` maps a scenario to its seconds by round, round 0 first."""
    return [
        made_trial(scenario, number, seconds)
        for scenario, all_seconds in seconds_of.items()
        for number, seconds in enumerate(all_seconds)
    ]


def span(name, began, ended, track="main"):
    """A span as start records have it."""
    return {"name": name, "track": track, "began_seconds": began, "ended_seconds": ended}


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_spread_is_median_p95_and_maximum():
    """Percentiles are interpolated linearly between neighbours, and of nothing there is none."""
    assert spread([3.0, 1.0, 2.0, 4.0]) == (4, 2.5, pytest.approx(3.85), 4.0)
    assert spread([7.0]) == (1, 7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="samples"):
        spread([])


def test_ratio_is_the_median_of_pairs():
    """Trials are compared with those of their own round, so a slow round of the machine does not bend the ratio."""
    slow = [made_trial(ORDINARY, number, seconds) for number, seconds in enumerate((10.0, 40.0, 12.0), 1)]
    fast = [made_trial(RESTORED, number, seconds) for number, seconds in enumerate((1.0, 8.0, 1.0), 1)]
    assert ratio(slow, fast) == (ORDINARY, RESTORED, 10.0, 5.0, 12.0)


def test_round_zero_is_left_out():
    """Results are of the counted rounds alone, with the pairs that are there."""
    seconds = {ORDINARY: (99.0, 8.0, 6.0), NAIVE: (99.0, 4.0, 4.0), FIRST: (99.0, 5.0, 5.0), RESTORED: (0.1, 2.0, 2.0)}
    results = summarise(made_rounds(seconds))
    assert [each.first_response.maximum for each in results.scenarios] == [8.0, 4.0, 5.0, 2.0]
    assert [(each.over, each.under, each.median) for each in results.ratios] == [
        (ORDINARY, RESTORED, 3.5),
        (NAIVE, RESTORED, 2.0),
        (FIRST, NAIVE, 1.25),
    ]
    without = summarise(made_rounds({name: seconds[name] for name in (NAIVE, FIRST, RESTORED)}))
    assert [(each.over, each.under) for each in without.ratios] == [(NAIVE, RESTORED), (FIRST, NAIVE)]
    assert without.answers.ordinary is None
    assert without.answers.program is None


def test_unpaired_rounds_are_refused():
    """Scenarios with different rounds have no pairs, so they are no result."""
    with pytest.raises(ValueError, match="same rounds"):
        summarise(made_rounds({NAIVE: (1.0, 1.0), FIRST: (1.0, 1.0), RESTORED: (1.0, 1.0, 1.0)}))
    with pytest.raises(ValueError, match="same rounds"):
        summarise([])


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_summary_does_not_depend_on_the_order_of_trials(seconds, shuffler):
    """Median, p95 and maximum hold for any order, lie in it, and the timeline is of a trial nearest to the median."""
    trials = [made_trial(NAIVE, number, each) for number, each in enumerate(seconds, 1)]
    shuffled = random.Random(shuffler.random()).sample(trials, len(trials))
    assert spread([t.first_response_seconds for t in shuffled]) == spread(seconds)
    summary = summarise_scenario(shuffled)
    assert summary.first_response.median <= summary.first_response.p95 <= summary.first_response.maximum == max(seconds)
    nearest = abs(seconds[summary.median_round - 1] - summary.first_response.median)
    assert all(nearest <= abs(each - summary.first_response.median) for each in seconds)


def test_parts_are_medians_over_trials():
    """A part that appears twice in a trial is summed; one that a trial lacks is not counted there; skips keep their reason."""
    phases = [
        {"name": "weight_load", "began_seconds": 0.0, "ended_seconds": 1.0, "skipped": ""},
        {"name": "pool_alloc", "began_seconds": 1.0, "ended_seconds": 1.0, "skipped": "nothing to do"},
    ]
    starts = [
        {"phases": phases, "spans": [span("read", 0.0, 0.5, "fetch"), span("read", 0.5, 1.5, "fetch")]},
        {"spans": [span("read", 0.0, 0.5, "fetch")]},
    ]
    assert median_parts(starts) == (
        Part("phases", "weight_load", 1.0, 1),
        Part("fetch", "read", 1.0, 2),
        Part("phases", "pool_alloc", 0.0, 0, "nothing to do"),
    )
    assert median_parts([{}]) == ()


def test_overlaps_are_between_tracks():
    """A span lists what ran beside it on other tracks, longest first; neighbours of its own track and phases are not beside."""
    start = {
        "phases": [{"name": "weight_load", "began_seconds": 0.0, "ended_seconds": 9.0, "skipped": ""}],
        "spans": [
            span("import", 0.0, 4.0),
            span("build", 4.0, 5.0),
            span("look up", 0.5, 1.0, "fetch"),
            span("fetch", 1.0, 4.5, "fetch"),
            span("device", 4.9995, 6.0, "device"),
        ],
    }
    beside = {item.name: item.beside for item in with_overlaps(stretches(start))}
    assert beside == {
        "weight_load": (),
        "import": (("fetch", 3.0), ("look up", 0.5)),
        "build": (("fetch", 0.5),),
        "look up": (("import", 0.5),),
        "fetch": (("import", 3.0), ("build", 0.5)),
        "device": (),
    }


# --- agreement -------------------------------------------------------------------------------------------------------


def test_equal_answers_are_identical():
    """The same values are bit for bit the same, whatever the order of keys."""
    assert compare({"a": [1.5, "x"], "b": None}, {"b": None, "a": [1.5, "x"]}) == Agreement(True, "", 0.0, None)
    assert compare([1.0, 0.0], [1.0, -0.0]) == Agreement(False, "", 0.0, 1.0)


def test_distance_of_numbers():
    """Numbers at the same place differ by so much, and vectors by their cosine; the worst of each is told."""
    found = compare({"e": [[3.0, 4.0], [1.0, 0.0]], "n": 2}, {"e": [[3.0, 4.0], [0.0, 1.0]], "n": 5})
    assert found == Agreement(False, "", 3.0, 0.0)
    assert compare([[2.0, 0.0]], [[1.0, 0.0]]) == Agreement(False, "", 1.0, 1.0)
    assert compare([0.0, 0.0], [0.0, 0.0]).lowest_cosine == 1.0
    assert compare([0.0, 0.0], [0.0, 1.0]).lowest_cosine == 0.0


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, "answer.a"),
        ({"a": 1}, {"b": 1}, "answer"),
        ([{"label": "cat"}], [{"label": "dog"}], "answer[0].label"),
        ([1, True], [1, 1], "answer[1]"),
        ([1], {"[0]": 1}, "answer"),
        (None, 0, "answer"),
    ],
)
def test_other_differences_are_named_by_their_place(one, other, place):
    """Where two answers differ in more than numbers, the first such place is told, from either side."""
    assert compare(one, other) == compare(other, one) == Agreement(False, place, 0.0, None)


ANSWERS = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(allow_nan=False, width=32) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(ANSWERS)
def test_any_answer_agrees_with_its_copy(answer):
    """Every JSON value is identical to what comes back out of JSON, with no distance and no difference."""
    found = compare(answer, json.loads(json.dumps(answer)))
    assert found.identical
    assert (found.difference, found.largest_difference) == ("", 0.0) or not math.isfinite(found.largest_difference)


@given(ANSWERS, ANSWERS)
def test_two_answers_compare_alike_from_both_sides(one, other):
    """Whether two answers are identical, and how far apart they are, does not depend on which comes first."""
    there, back = compare(one, other), compare(other, one)
    assert there.identical == back.identical
    assert bool(there.difference) == bool(back.difference)
    if not math.isnan(there.largest_difference):
        assert there.largest_difference == back.largest_difference


def test_answers_are_judged_by_round():
    """Restored, program and ordinary answers are compared with the naive one of their round, and the worst round is told."""
    rounds = made_rounds(dict.fromkeys(SCENARIOS, (1.0, 1.0, 1.0)))
    changed = {(RESTORED, 2): {"v": [1.0, 2.5]}, (ORDINARY, 1): {"v": [1.0, 2.25]}, (ORDINARY, 2): {"w": 1}}
    changed[PROGRAM, 1] = {"v": [1.0, 2.125]}
    rounds = [each._replace(output=changed.get((each.scenario, each.round), each.output)) for each in rounds]
    answers = summarise(rounds).answers
    assert (answers.restored_identical, answers.rounds, answers.repeats_equal) == (1, 2, True)
    assert answers.restored.largest_difference == 0.5
    assert answers.ordinary.difference == "answer"
    assert (answers.program.identical, answers.program.largest_difference) == (False, 0.125)


# --- reports ---------------------------------------------------------------------------------------------------------

MACHINE = Machine("Some(R) Xeon(R) CPU 8481C @ 2.70GHz", 2, 16 << 30, "Linux 6.1", "3.11.7", {"numpy": "2.4.6"})


@pytest.fixture
def report():
    """A report of three rounds of all scenarios."""
    rounds = made_rounds(
        {
            ORDINARY: (9, 8, 8, 8),
            NAIVE: (9, 4, 4, 4),
            FIRST: (9, 5, 5, 5),
            RESTORED: (9, 2, 2, 2),
            PROGRAM: (9, 0.5, 0.5, 0.5),
        }
    )
    start = {
        "kind": "restored",
        "phases": [{"name": "pool_alloc", "began_seconds": 1, "ended_seconds": 1, "skipped": "no pool"}],
        "spans": [span("import", 0.0, 1.0), span("fetch", 0.5, 2.0, "fetch")],
        "bytes": {"raw": 2000, "stored": 1500, "fetched": 1500},
    }
    captures = (
        {"published": True, "written_bytes": 1500, "seconds": 0.75},
        {"published": True, "written_bytes": 700, "seconds": 30.5, "program": "onnx"},
    )
    told = {RESTORED: {"start": start}, FIRST: {"captures": captures}, PROGRAM: {"output": {"v": [1.0, 2.0 + 1e-6]}}}
    rounds = [each._replace(**told.get(each.scenario, {})) for each in rounds]
    return reports.Report("mine", {"texts": ["a"]}, MACHINE, rounds, summarise(rounds))


def test_screen_has_what_people_ask_for(report):
    """The screen shows each scenario's numbers, the ratios, agreement, bytes and a timeline."""
    text = reports.to_text(report)
    for words in (
        "ordinary / restored: 4.00",
        "naive / restored: 2.00",
        "ordinary / program: 16.00",
        "bit for bit in 3 of 3 rounds",
        "ordinary answers against naive ones: bit for bit the same",
        "restored: 2,000 bytes of state, 1,500 stored (0.75), 1,500 fetched",
        "first: snapshot made in 0.75 s after the answer, 1,500 bytes written",
        "first: program (onnx) made in 30.50 s after the answer, 700 bytes written",
        "the program's answers against naive ones: largest difference 1.00e-06",
        "beside import 0.500 s",
    ):
        assert words in text
    assert [line.split() for line in text.splitlines() if line.startswith("restored  ")] == [
        ["restored", "3", "2.000", "2.000", "2.000", "20.00", "30.00"]
    ]


def test_json_has_every_trial(report):
    """The JSON document has the results by name and every trial with its output, round 0 too."""
    document = json.loads(reports.to_json(report))
    assert document["input"] == {"texts": ["a"]}
    assert document["machine"]["cores"] == 2
    assert len(document["trials"]) == 5 * 4
    assert {trial["round"] for trial in document["trials"]} == {0, 1, 2, 3}
    assert document["trials"][0]["output"] == {"v": [1.0, 2.0]}
    summary = next(each for each in document["results"]["scenarios"] if each["scenario"] == RESTORED)
    assert summary["first_response"] == {"samples": 3, "median": 2, "p95": 2, "maximum": 2}
    assert summary["timeline"][0]["beside"] == [["fetch", 0.5]]


def test_markdown_has_tables_of_equal_width(report):
    """Each table row has as many cells as its heading, and skipped phases say why."""
    lines = reports.to_markdown(report).splitlines()
    tables = [[]]
    for line in lines:
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    assert [len(table) for table in tables if table] == [7, 5]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables if table)
    assert "| phases | pool_alloc | skipped: no pool | 0 |" in lines
    assert sum(line == "```" for line in lines) == 2 * len(SCENARIOS)


def test_files_are_written_where_asked(report, tmp_path):
    """Both files get the stem, in a folder that is made, also where the stem has dots."""
    paths = reports.write(report, tmp_path / "deep" / "mine-3.11")
    assert [path.name for path in paths] == ["mine-3.11.json", "mine-3.11.md"]
    assert json.loads(paths[0].read_text())["handler"] == "mine"
    assert paths[1].read_text().startswith("# Cold start of `mine`")


def test_timeline_is_to_scale(report):
    """Bars begin and end where their stretch did, within a character, and even the shortest can be seen."""
    summary = report.results.scenarios[-1]._replace(
        timeline=(
            Stretch("main", "import", 0.0, 1.0),
            Stretch("main", "end", 1.999, 2.0),
            Stretch("x", "all", 0.0, 2.0),
        )
    )
    bars = [line.split("|")[1] for line in draw(summary).splitlines()[1:]]
    assert bars[0] == "#" * (WIDTH // 2) + " " * (WIDTH // 2)
    assert bars[1] == " " * (WIDTH - 1) + "#"
    assert bars[2] == "#" * WIDTH
    assert "no phases or spans" in draw(summary._replace(timeline=()))


@given(st.lists(st.tuples(st.floats(-0.02, 50), st.floats(0, 50)), min_size=1, max_size=6), st.floats(0.001, 60))
def test_timeline_rows_have_one_width(stretches_of, answered):
    """Whatever the times, clocks a little out of step included, each bar is drawn inside the same frame."""
    timeline = tuple(Stretch("main", "x", began, began + seconds) for began, seconds in stretches_of)
    summary = summarise_scenario([made_trial(NAIVE, 1, answered)])._replace(timeline=timeline)
    bars = [line.split("|")[1] for line in draw(summary).splitlines()[1:]]
    assert {len(bar) for bar in bars} == {WIDTH}
    assert all("#" in bar for bar in bars)


def test_machine_is_described_without_its_name():
    """The description has what matters to the numbers; host and user are not in it."""
    machine = describe_machine()
    assert machine.cores > 0
    assert machine.memory_bytes > 1 << 20
    assert machine.python == platform.python_version()
    assert machine.packages["numpy"]
    assert platform.node() not in f"{machine} {machine.label}".split()
    assert MACHINE.label == "2-cores-some-xeon-8481c-16gib"
    assert Machine("", 0, 0, "", "", {}).label == "0-cores-unknown-processor-0gib"
