"""The README is executed: its code blocks as files, its commands as commands. None may be skipped silently."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from coldstart.bench.rounds import scenarios_of
from coldstart.bench.summary import summarise
from coldstart.bench.target import read_target
from coldstart.bench.trial import run_trial
from tests.starts import CAPTURE_WAIT

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", README, re.DOTALL))
COMMANDS = re.findall(r"^    ((?:coldstart|pip|export|python) .*)$", README, re.MULTILINE)
INPUTS = {
    "cached.py": 3,
    "centroids.py": [0.5] * 64,
    "classify.py": [0.5] * 64,
    "counter.py": "a b a",
    "score.py": [[0.5] * 64],
}
CHANGES = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
"""What changes in a file that comes from a platform's own SDK: RunPod's, then Modal's."""
PAGES = ("README.md", "deploy/modal/README.md", "deploy/runpod/README.md", "deploy/store/README.md")
NAMED = [
    (page, " ".join(words.split()))
    for page in PAGES
    for words in re.findall(r"(?m)(?:^ {4,}|`)(coldstart [a-z]+ [^`#\n]+)", (ROOT / page).read_text())
]
"""Page and command of every call that the pages name, in their text too."""
INSTALLS = ['pip install -e ".[demo]" && coldstart bench handlers/minilm.py', 'pip install -e ".[test]" && pytest']


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in ``folder``, with its output; this checkout is importable, logs are off."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), COLDSTART_LOG="off", **CAPTURE_WAIT, **variables)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def start(file: str, folder: Path, **variables: str) -> dict:
    """One ``coldstart run`` of a README block, as its own JSON document."""
    command = [sys.executable, "-m", "coldstart", "run", file, "--input", json.dumps(INPUTS[file]), "--json"]
    done = run(command, folder, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_block_is_known_here() -> None:
    """A new code block cannot be added to the README without being run by a test."""
    assert len(BLOCKS) == README.count("```python")
    assert set(BLOCKS) == {*INPUTS, "embed.py", "test_centroids.py"}


@pytest.mark.parametrize("file", ["cached.py", "centroids.py", "classify.py", "counter.py"])
def test_a_block_starts_cold_then_restored(file: str, tmp_path: Path) -> None:
    """Each handler of the README is captured by its first start and restored, with the same answer, by its second."""
    (tmp_path / file).write_text(BLOCKS[file])
    first, second = (start(file, tmp_path) for _ in range(2))
    assert first["start"]["kind"] == "cold"
    assert first["capture"]["published"], first["capture"]
    assert second["start"]["kind"] == "restored", second["start"]["reason"]
    assert second["start"]["rung"] == "arrays"
    assert second["output"] == first["output"]


@pytest.mark.demo
def test_the_block_with_a_program_starts_from_it(tmp_path: Path) -> None:
    """The second start of that block has the program in place of the state, never imports torch, and answers the same."""
    (tmp_path / "score.py").write_text(BLOCKS["score.py"])
    first, second = (start("score.py", tmp_path) for _ in range(2))
    assert [capture["published"] for capture in first["captures"]] == [True], first["captures"]
    assert (second["start"]["kind"], second["start"]["program"]) == ("restored", "onnx"), second["start"]["reason"]
    assert "torch" not in second["start"]["versions"]
    assert second["output"] == first["output"]


def test_the_three_line_handler_is_the_example() -> None:
    """The first block is handlers/sentences.py but for its name, and what the tests of that file say holds for it."""
    block, example = (
        [ast.unparse(node) for node in ast.parse(text).body if not isinstance(node, (ast.Expr, ast.If))]
        for text in (BLOCKS["embed.py"], (ROOT / "handlers" / "sentences.py").read_text())
    )
    assert len(block) == 3
    assert block == [text.replace("'sentences'", "'embed'") for text in example]


@pytest.mark.parametrize(("page", "command"), NAMED)
def test_every_command_that_a_page_names_is_one(page: str, command: str) -> None:
    """No command of the README or the deploying pages lacks an option that it needs, or has one that there is not."""
    _, name, *words = shlex.split(command.replace("--count N", "--count 1").replace("PORT", "8000"))
    parser = argparse.ArgumentParser()
    if name == "deploy":
        platform, *words = words
        parser.add_argument("target")
        import_module(f"coldstart.deploy.{platform}").add_arguments(parser)
    else:
        import_module(f"coldstart.cli.{name}").add_parser(parser.add_subparsers())
        words = [name, *words]
    parser.parse_args(words)


def sides(change: str) -> tuple[str, str]:
    """The file before and after a change."""
    lines = change.splitlines()
    assert all(line[:1] in ("-", "+", " ", "") for line in lines)
    before, after = ("\n".join(line[1:] for line in lines if line[:1] != other) + "\n" for other in "+-")
    return before, after


def test_a_handler_that_comes_from_runpod_answers_as_before(tmp_path: Path) -> None:
    """The file before the change answers under RunPod's SDK as the file after it does here."""
    pytest.importorskip("runpod")
    before, after = sides(CHANGES[0])
    (tmp_path / "before.py").write_text(before)
    (tmp_path / "after.py").write_text(after)
    event = {"id": "one", "input": [0.5] * 64}
    old = run([sys.executable, "before.py", "--test_input", json.dumps(event)], tmp_path)
    assert old.returncode == 0, old.stderr
    command = [sys.executable, "-m", "coldstart", "run", "after.py", "--input", json.dumps(event["input"]), "--json"]
    new = json.loads(run(command, tmp_path).stdout)
    assert f"'nearest': {new['output']['nearest']}" in old.stdout.replace('"', "'")
    again = json.loads(run(command, tmp_path).stdout)
    assert (again["start"]["kind"], again["output"]) == ("restored", new["output"])


def test_a_class_that_comes_from_modal_answers_as_before(tmp_path: Path) -> None:
    """The class before the change answers under Modal's SDK as the handler after it does here, and Modal would find it."""
    pytest.importorskip("modal")
    before, after = sides(CHANGES[1])
    (tmp_path / "before.py").write_text(before)
    (tmp_path / "after.py").write_text(after)
    old = run([sys.executable, "-c", "import before; print(before.Nearest().nearest.local([0.5] * 64))"], tmp_path)
    assert old.returncode == 0, old.stderr
    command = [sys.executable, "-m", "coldstart", "run", "after.py", "--input", json.dumps([0.5] * 64), "--json"]
    new = run(command, tmp_path)
    assert new.returncode == 0, new.stderr
    assert json.loads(new.stdout)["output"] == int(old.stdout)
    assert json.loads(run(command, tmp_path).stdout)["start"]["kind"] == "restored"
    deployed = run([sys.executable, "-m", "coldstart", "deploy", "modal", "after.py", "--dry-run"], tmp_path)
    assert "modal deploy" in deployed.stdout, deployed.stderr


def test_the_tests_block_passes(tmp_path: Path) -> None:
    """The README's own test file is a test file that passes."""
    for file in ("centroids.py", "test_centroids.py"):
        (tmp_path / file).write_text(BLOCKS[file])
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_centroids.py"], tmp_path)
    assert done.returncode == 0, done.stdout


def test_every_command_is_run_or_named(tmp_path: Path) -> None:
    """Commands of the README do what they say, in the README's order; the two that install are run by hand and by CI."""
    rest = [command for command in COMMANDS if command not in INSTALLS and not command.startswith("export ")]
    assert [command for command in COMMANDS if command in INSTALLS] == INSTALLS
    assert rest[0] == "coldstart run handlers/digits.py"
    for command in (rest[0], *rest):
        words = shlex.split(command)
        assert words[0] == "coldstart"
        done = run([sys.executable, "-m", "coldstart", *words[1:]], ROOT, COLDSTART_STORE=f"file://{tmp_path}/store")
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


@pytest.mark.demo
def test_the_main_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's benchmark reports four start kinds and the ordinary way: restored bit for bit, the program within 2e-5.

    One round of it: the command would run a second one before, which only warms the disk (``test_bench`` runs the command).
    """
    parser = argparse.ArgumentParser()
    import_module("coldstart.cli.bench").add_parser(parser.add_subparsers())
    arguments = parser.parse_args(shlex.split(INSTALLS[0].split("&& ")[1])[1:])
    for name, value in {"PYTHONPATH": str(ROOT), **CAPTURE_WAIT}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    target = read_target(arguments.handler, input_text=arguments.input, ordinary=arguments.ordinary)
    scenarios = ["ordinary", "naive", "first", "restored", "program"]
    assert list(scenarios_of(target)) == scenarios
    results = summarise([run_trial(target, scenario, 1, tmp_path) for scenario in scenarios_of(target)])
    assert [scenario.scenario for scenario in results.scenarios] == scenarios
    assert (results.answers.restored_identical, results.answers.rounds) == (1, 1)
    assert results.answers.program is not None
    assert not results.answers.program.difference
    assert results.answers.program.largest_difference < 2e-5
