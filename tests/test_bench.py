"""The benchmark: what it takes from a source, how it runs and reads processes, its arithmetic, and its reports."""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.bench import report as reports
from coldstart.bench import trial as trials_module
from coldstart.bench.agreement import Agreement, compare
from coldstart.bench.machine import Machine, describe_machine
from coldstart.bench.rounds import scenarios_of
from coldstart.bench.summary import Part, Stretch, median_parts, ratio, spread, stretches, summarise, with_overlaps
from coldstart.bench.target import Target, first_warmup_input, read_target
from coldstart.bench.timeline import WIDTH, draw
from coldstart.bench.trial import FIRST, NAIVE, ORDINARY, RESTORED, SCENARIOS, Trial
from coldstart.cli import bench as command
from coldstart.cli import main
from coldstart.errors import CaptureError, HandlerError, StartError, UsageError

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "handlers" / "digits.py"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Children import the same coldstart as the tests do, wherever they run."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def made_trial(scenario, number, seconds, **changes):
    """A trial that took ``seconds`` to its first response."""
    start = {"kind": "restored" if scenario == RESTORED else "cold", "phases": [], "spans": []}
    trial = Trial(scenario, number, seconds, seconds + 1, (0.01, 0.03), {"v": [1.0, 2.0]}, True, start, {})
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


# --- the target ------------------------------------------------------------------------------------------------------


def written(folder, text):
    """A handler file with this text."""
    path = folder / "mine.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("decorator", "expected"),
    [
        ('@coldstart("a", load=load, warmup=[{"texts": ["x", "y"]}, {"texts": []}])', {"texts": ["x", "y"]}),
        ('@coldstart("a", load=load, warmup=({"n": 1},))', {"n": 1}),
        ('@coldstart("a", load=load, warmup=Warmup([{"n": -1.5}], iterations=2))', {"n": -1.5}),
        ('@coldstart.coldstart("a", load=load, warmup=coldstart.Warmup(inputs=[[1, (2, 3)]]))', [1, [2, 3]]),
        ('@other\n@coldstart("a", load=load, warmup=["text"])', "text"),
    ],
)
def test_first_warmup_input_is_read_from_the_source(tmp_path, decorator, expected):
    """The first literal input is the default event, in every way of writing it, as JSON would carry it."""
    path = written(tmp_path, f"{decorator}\ndef handler(event, model): return 1\n")
    assert first_warmup_input(path) == expected


@pytest.mark.parametrize(
    "warmup", ["", ", warmup=[]", ", warmup=INPUTS", ", warmup=[make()]", ", warmup=[{1, 2}]", ", warmup=[b'raw']"]
)
def test_input_is_asked_for_when_the_source_does_not_tell(tmp_path, warmup):
    """Without a literal that JSON can carry, the error says to pass --input, and passing it helps."""
    path = written(tmp_path, f'@coldstart("a", load=load{warmup})\nasync def handler(event, model): return 1\n')
    with pytest.raises(UsageError, match="pass --input"):
        first_warmup_input(path)
    assert read_target(str(path), input_text='{"n": 2}', ordinary=None).input == {"n": 2}


def test_one_of_several_handlers_is_chosen_by_either_name(tmp_path):
    """FILE:NAME takes the function's name or the handler's own; without a name the choices are told."""
    path = written(
        tmp_path,
        '@coldstart("first", load=load, warmup=[1])\ndef one(event, model): ...\n'
        '@coldstart("second", warmup=[2])\nclass Two: ...\n',
    )
    assert [first_warmup_input(path, name) for name in ("one", "first", "Two", "second")] == [1, 1, 2, 2]
    assert read_target(f"{path}:Two", input_text=None, ordinary=None).label == "mine-Two"
    with pytest.raises(UsageError, match="one, Two"):
        first_warmup_input(path)
    with pytest.raises(HandlerError, match="named third"):
        first_warmup_input(path, "third")


def test_unusable_targets_are_usage_errors(tmp_path):
    """A file that is missing or not Python, an input that is not JSON, a companion that is missing: each names itself."""
    path = written(tmp_path, "def broken(:\n")
    with pytest.raises(HandlerError, match=r"mine\.py:1"):
        read_target(str(path), input_text=None, ordinary=None)
    with pytest.raises(HandlerError, match="absent"):
        read_target(str(tmp_path / "absent.py"), input_text="1", ordinary=None)
    with pytest.raises(UsageError, match="not JSON"):
        read_target(str(path), input_text="{", ordinary=None)
    with pytest.raises(HandlerError, match="--ordinary"):
        read_target(str(path), input_text="1", ordinary=str(tmp_path / "absent.py"))


def test_companion_is_found_beside_the_file(tmp_path):
    """<stem>_ordinary.py beside the file is taken by itself; without it the ordinary scenario is left out."""
    path = written(tmp_path, "")
    alone = read_target(str(path), input_text="1", ordinary=None)
    companion = tmp_path / "mine_ordinary.py"
    companion.write_text("")
    accompanied = read_target(str(path), input_text="1", ordinary=None)
    assert alone.ordinary is None
    assert accompanied.ordinary == companion
    assert scenarios_of(alone) == (NAIVE, FIRST, RESTORED)
    assert scenarios_of(accompanied) == (ORDINARY, NAIVE, FIRST, RESTORED) == tuple(SCENARIOS)


# --- processes -------------------------------------------------------------------------------------------------------

KINDS = {
    "sync": "def handler(event): return [event['input'], 1.5]",
    "generator": "def handler(event):\n    yield event['input']\n    yield 1.5",
    "async": "async def handler(event): return [event['input'], 1.5]",
    "async generator": "async def handler(event):\n    yield event['input']\n    yield 1.5",
    "array": "class A:\n    def tolist(self): return ['x', 1.5]\ndef handler(event): return A()",
}


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_trial_answers_with_any_kind_of_function(tmp_path, kind):
    """The plain runner gives the whole answer of every kind of function, and the times of what it did."""
    ordinary = written(tmp_path, f"print('noise')\n{KINDS[kind]}\n")
    trial = trials_module.run_trial(Target(ordinary, "", "x", ordinary), ORDINARY, 3, tmp_path)
    assert (trial.output, trial.round, len(trial.warm_seconds)) == (["x", 1.5], 3, trials_module.WARM_REPEATS)
    assert 0 < trial.first_response_seconds < trial.process_seconds
    assert [item["name"] for item in trial.start["spans"]] == ["interpreter", "import and load", "first answer"]
    assert trial.start["spans"][-1]["ended_seconds"] == pytest.approx(trial.first_response_seconds)


def test_ordinary_trial_knows_nothing_of_coldstart(tmp_path):
    """The file sees its own folder first and neither coldstart nor the modules that lie beside the plain runner."""
    (tmp_path / "summary.py").write_text("whose = 'the neighbour'\n")
    ordinary = written(
        tmp_path,
        "import sys, summary\n"
        "def handler(event): return [summary.whose, [n for n in sys.modules if n.startswith('coldstart')]]\n",
    )
    trial = trials_module.run_trial(Target(ordinary, "", None, ordinary), ORDINARY, 1, tmp_path)
    assert trial.output == ["the neighbour", []]


def test_unequal_answers_are_told(tmp_path):
    """A handler whose answers change from call to call is on record as such."""
    ordinary = written(tmp_path, "calls = []\ndef handler(event):\n    calls.append(1)\n    return len(calls)\n")
    trial = trials_module.run_trial(Target(ordinary, "", None, ordinary), ORDINARY, 1, tmp_path)
    assert (trial.output, trial.answers_equal) == (1, False)


def test_a_child_that_fails_ends_the_benchmark_with_its_words(tmp_path):
    """The error carries the scenario, the status and what the process wrote to standard error."""
    ordinary = written(tmp_path, "raise OSError('no weights here')\n")
    with pytest.raises(StartError, match=r"(?s)ordinary ended with status 1.*no weights here"):
        trials_module.run_trial(Target(ordinary, "", None, ordinary), ORDINARY, 1, tmp_path)


def test_a_child_that_hangs_is_ended(tmp_path):
    """A process that is not done in time is ended and told."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(StartError, match="naive was not done"):
        trials_module.run_child(sleeper, scenario=NAIVE, environment={}, timeout_seconds=0.2)


def test_scenarios_differ_in_store_and_nothing_else(tmp_path, monkeypatch):
    """Only first and restored have a store, the round's own; the environment is otherwise the parent's."""
    monkeypatch.setenv("MARKER", "kept")
    stores = {name: trials_module.environment_of(name, tmp_path)["COLDSTART_STORE"] for name in SCENARIOS}
    assert stores[ORDINARY] == stores[NAIVE] == "off"
    assert stores[FIRST] == stores[RESTORED] == f"file://{tmp_path}/store"
    assert trials_module.environment_of(FIRST, tmp_path)["MARKER"] == "kept"
    target = Target(DIGITS, "handler", {"a": 1}, None)
    commands = {tuple(trials_module.command_of(target, name)) for name in (NAIVE, FIRST, RESTORED)}
    assert len(commands) == 1
    assert f"{DIGITS}:handler" in commands.pop()


@pytest.mark.parametrize(
    "before", ["", "a line\n", "{not json}\n", '{"a": 1}\nmore\n', "{\n  half\n", "text {\n"], ids=repr
)
def test_document_is_found_behind_what_a_handler_prints(before):
    """The last JSON object is the document, on one line or many, whatever was printed before it."""
    document = {"output": {"text": "\n{"}, "n": [1.5]}
    for text in (json.dumps(document), json.dumps(document, indent=1)):
        assert trials_module.read_document(f"{before}{text}\n", NAIVE) == document


@pytest.mark.parametrize("text", ["", "no json", "{", "[1]", '{"a": 1} and more'])
def test_output_without_a_document_is_an_error(text):
    """Output that does not end with a JSON object is told with the scenario."""
    with pytest.raises(StartError, match="naive printed no JSON document"):
        trials_module.read_document(text, NAIVE)


DOCUMENT = {
    "output": 1,
    "answers_equal": True,
    "first_answer_monotonic_seconds": 12.5,
    "first_answer_seconds": 2.25,
    "warm_seconds": [0.1],
    "start": {"kind": "cold", "spans": [span("import", 0.25, 1.0)], "ready_seconds": 2.0},
    "capture": {"published": True},
}


def test_trial_is_read_from_a_document():
    """Time runs from the parent's stamp; the start gets what lies before its first span and after ready as spans."""
    trial = trials_module.read_trial(DOCUMENT, FIRST, 2, spawned_seconds=10.0, process_seconds=4.0)
    assert (trial.first_response_seconds, trial.capture, trial.warm_seconds) == (2.5, {"published": True}, (0.1,))
    assert trial.start["spans"] == [
        span("import", 0.25, 1.0),
        span("interpreter and command", 0.0, 0.25),
        span("first answer", 2.0, 2.25),
    ]
    assert DOCUMENT["start"]["spans"] == [span("import", 0.25, 1.0)]


@pytest.mark.parametrize("name", ["output", "answers_equal", "first_answer_monotonic_seconds", "warm_seconds", "start"])
def test_incomplete_documents_are_errors(name):
    """A document that lacks a needed field, or has none of its kind there, names the field instead of guessing."""
    without = {key: value for key, value in DOCUMENT.items() if key != name}
    with pytest.raises(StartError, match=f"cannot be read.*{name}"):
        trials_module.read_trial(without, NAIVE, 1, spawned_seconds=0.0, process_seconds=1.0)


def test_a_scenario_that_did_not_take_place_is_no_measurement():
    """A restored trial that was a fallback, and a first one that published nothing, end the benchmark with the reason."""
    fallback = made_trial(RESTORED, 1, 1.0, start={"kind": "fallback", "reason": "build disagrees"})
    with pytest.raises(StartError, match="fallback start \\(build disagrees\\)"):
        trials_module.check_trial(fallback)
    unpublished = made_trial(FIRST, 1, 1.0, capture={"published": False, "reason": "state changed"})
    with pytest.raises(CaptureError, match="state changed"):
        trials_module.check_trial(unpublished)
    trials_module.check_trial(made_trial(FIRST, 1, 1.0, capture={"published": True}))
    trials_module.check_trial(made_trial(RESTORED, 1, 1.0))


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
    from coldstart.bench.summary import summarise_scenario

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
    """Restored and ordinary answers are compared with the naive one of their round, and the worst round is told."""
    rounds = made_rounds(dict.fromkeys(SCENARIOS, (1.0, 1.0, 1.0)))
    changed = {(RESTORED, 2): {"v": [1.0, 2.5]}, (ORDINARY, 1): {"v": [1.0, 2.25]}, (ORDINARY, 2): {"w": 1}}
    rounds = [each._replace(output=changed.get((each.scenario, each.round), each.output)) for each in rounds]
    answers = summarise(rounds).answers
    assert (answers.restored_identical, answers.rounds, answers.repeats_equal) == (1, 2, True)
    assert answers.restored.largest_difference == 0.5
    assert answers.ordinary.difference == "answer"


# --- reports ---------------------------------------------------------------------------------------------------------

MACHINE = Machine("Some(R) Xeon(R) CPU 8481C @ 2.70GHz", 2, 16 << 30, "Linux 6.1", "3.11.7", {"numpy": "2.4.6"})


@pytest.fixture
def report():
    """A report of three rounds of all scenarios."""
    rounds = made_rounds({ORDINARY: (9, 8, 8, 8), NAIVE: (9, 4, 4, 4), FIRST: (9, 5, 5, 5), RESTORED: (9, 2, 2, 2)})
    start = {
        "kind": "restored",
        "phases": [{"name": "pool_alloc", "began_seconds": 1, "ended_seconds": 1, "skipped": "no pool"}],
        "spans": [span("import", 0.0, 1.0), span("fetch", 0.5, 2.0, "fetch")],
        "bytes": {"raw": 2000, "stored": 1500, "fetched": 1500},
    }
    capture = {"published": True, "written_bytes": 1500, "seconds": 0.75}
    rounds = [
        each._replace(start=start) if each.scenario == RESTORED else each._replace(capture=capture)
        for each in rounds
        if each.scenario in (FIRST, RESTORED)
    ] + [each for each in rounds if each.scenario in (ORDINARY, NAIVE)]
    return reports.Report("mine", {"texts": ["a"]}, MACHINE, rounds, summarise(rounds))


def test_screen_has_what_people_ask_for(report):
    """The screen shows each scenario's numbers, the ratios, agreement, bytes and a timeline."""
    text = reports.to_text(report)
    for words in (
        "ordinary / restored: 4.00",
        "naive / restored: 2.00",
        "bit for bit in 3 of 3 rounds",
        "ordinary answers against naive ones: bit for bit the same",
        "restored: 2,000 bytes of state, 1,500 stored (0.75), 1,500 fetched",
        "first: snapshot made in 0.75 s after the answer, 1,500 bytes written",
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
    assert len(document["trials"]) == 4 * 4
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
    assert [len(table) for table in tables if table] == [6, 5]
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
    from coldstart.bench.summary import summarise_scenario

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


# --- the command -----------------------------------------------------------------------------------------------------


def parsed(*words):
    """Parsed arguments of ``coldstart bench``."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *words])


def test_command_has_its_defaults():
    """Five trials, the companion and the input found by themselves, table on the screen."""
    arguments = parsed("x.py")
    assert (arguments.trials, arguments.input, arguments.ordinary, arguments.json) == (5, None, None, False)
    assert arguments.run is command.run


def test_command_refuses_no_trials():
    """A benchmark of nothing is a wrong use, told before anything runs."""
    with pytest.raises(UsageError, match="--trials 0"):
        command.run(parsed("absent.py", "--trials", "0"))


def test_bench_of_a_real_handler(tmp_path, monkeypatch, capsys):
    """Real processes of the numpy example: rounds in order, restored from what first published, equal bit for bit."""
    monkeypatch.chdir(tmp_path)
    ordinary = tmp_path / "ordinary.py"
    ordinary.write_text("def handler(event): return {'digit': '1', 'distance': 0.06}\n")
    assert main(["bench", str(DIGITS), "--trials", "1", "--ordinary", str(ordinary), "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document == json.loads((tmp_path / "bench-digits.json").read_text())
    assert (tmp_path / "bench-digits.md").read_text().startswith("# Cold start of `digits`")
    assert [(trial["round"], trial["scenario"]) for trial in document["trials"]] == [
        (number, scenario) for number in (0, 1) for scenario in SCENARIOS
    ]
    kinds = [trial["start"].get("kind") for trial in document["trials"][4:]]
    assert kinds == [None, "cold", "cold", "restored"]
    answers = document["results"]["answers"]
    assert answers["restored"]["identical"]
    assert 0 < answers["ordinary"]["largest_difference"] < 0.01
    assert document["results"]["scenarios"][3]["bytes"]["raw"] > 0
    assert "round 1/1  restored" in shown.err


def test_bench_says_what_it_leaves_out(tmp_path, capsys):
    """Without a companion it goes on without the ordinary way and says so; files go to the folder that was asked for."""
    handler = written(
        tmp_path,
        "from coldstart import coldstart\n"
        "@coldstart('mine', load=lambda: {'scale': 2.0}, warmup=[21])\n"
        "def handler(event, model): return event['input'] * model['scale']\n",
    )
    assert main(["bench", str(handler), "--trials", "1", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "no mine_ordinary.py beside the file" in shown.err
    assert "naive / restored" in shown.out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"mine-{describe_machine().label}.{ending}" for ending in ("json", "md")]
