"""The benchmark: what it takes from a source, how it runs and reads processes, and its command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from coldstart.bench import trial as trials_module
from coldstart.bench.machine import describe_machine
from coldstart.bench.rounds import scenarios_of
from coldstart.bench.target import Target, first_warmup_input, read_target
from coldstart.bench.trial import FIRST, NAIVE, ORDINARY, PROGRAM, RESTORED, SCENARIOS, Trial
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
    start = {"kind": "restored" if scenario in (RESTORED, PROGRAM) else "cold", "phases": [], "spans": []}
    trial = Trial(scenario, number, seconds, seconds + 1, (0.01, 0.03), {"v": [1.0, 2.0]}, True, start, ())
    return trial._replace(**changes)


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
    assert scenarios_of(accompanied) == (ORDINARY, NAIVE, FIRST, RESTORED)


@pytest.mark.parametrize(("program", "asks"), [("", False), (", program=None", False), (", program=export()", True)])
def test_program_is_a_scenario_where_the_handler_asks_for_one(tmp_path, program, asks):
    """With program= in the decorator starts with the program are measured too; without it they are left out."""
    decorated = f'@coldstart("a", load=load{program}, warmup=[1])\ndef handler(event, model): return 1\n'
    path = written(tmp_path, f"from coldstart import coldstart, export\n{decorated}")
    (tmp_path / "mine_ordinary.py").write_text("")
    scenarios = scenarios_of(read_target(str(path), input_text=None, ordinary=None))
    assert scenarios == (tuple(SCENARIOS) if asks else (ORDINARY, NAIVE, FIRST, RESTORED))


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
    ordinary = written(tmp_path, f"import atexit\nprint('noise')\natexit.register(print, 'noise')\n{KINDS[kind]}\n")
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


def test_without_a_snapshot_nothing_is_compiled_yet(tmp_path, monkeypatch):
    """The scenarios without a store find no kernels that an earlier trial has compiled, as on a fresh machine."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # which a start in this process has set
    for name in (ORDINARY, NAIVE):
        folder = trials_module.environment_of(name, tmp_path)["TORCHINDUCTOR_CACHE_DIR"]
        assert folder.startswith(str(tmp_path))
    assert "TORCHINDUCTOR_CACHE_DIR" not in trials_module.environment_of(FIRST, tmp_path)


def test_scenarios_differ_in_store_and_nothing_else(tmp_path, monkeypatch):
    """Only first and restored have a store, the round's own; the environment is otherwise the parent's, but for kernels."""
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
    "captures": [{"published": True}, {"published": True, "program": "onnx"}],
}


def test_trial_is_read_from_a_document():
    """Time runs from the parent's stamp; the start gets what lies before its first span and after ready as spans."""
    trial = trials_module.read_trial(DOCUMENT, FIRST, 2, spawned_seconds=10.0, process_seconds=4.0)
    assert (trial.first_response_seconds, trial.warm_seconds) == (2.5, (0.1,))
    assert trial.captures == ({"published": True}, {"published": True, "program": "onnx"})
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
    for what, program in (("snapshot", ""), ("program", "onnx")):
        captures = ({"published": True}, {"published": False, "program": program, "reason": "state changed"})
        with pytest.raises(CaptureError, match=rf"no {what} \(state changed\)"):
            trials_module.check_trial(made_trial(FIRST, 1, 1.0, captures=captures))
    without = made_trial(PROGRAM, 1, 1.0, start={"kind": "restored", "program": "", "program_obstacle": "not trusted"})
    with pytest.raises(StartError, match=r"without one \(not trusted\)"):
        trials_module.check_trial(without)
    trials_module.check_trial(made_trial(FIRST, 1, 1.0, captures=({"published": True},)))
    trials_module.check_trial(made_trial(RESTORED, 1, 1.0))
    trials_module.check_trial(made_trial(PROGRAM, 1, 1.0, start={"kind": "restored", "program": "onnx"}))


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
        (number, scenario) for number in (0, 1) for scenario in (ORDINARY, NAIVE, FIRST, RESTORED)
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
