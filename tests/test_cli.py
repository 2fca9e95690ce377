"""The command line: what run and serve print, and every wrong use as one clear line and an exit status."""

from __future__ import annotations

import io
import json
import operator
import re
import sys
from pathlib import Path

import pytest

from coldstart.cli import COMMANDS, main
from coldstart.registry import forget_workers
from coldstart.terms import VERSION
from tests.starts import SCALED, SCALES, Project

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "handlers" / "digits.py")
PIXELS = {"pixels": [0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1]}
PLAIN = """
from coldstart import coldstart

@coldstart("plain", load=lambda: {"number": 10})
def handler(event, model):
    return event["input"] + model["number"]
"""

pytestmark = pytest.mark.usefixtures("forgotten_imports")


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """No store unless a test names one; children find coldstart; nothing is logged."""
    monkeypatch.setenv("COLDSTART_STORE", "off")
    monkeypatch.setenv("COLDSTART_LOG", "off")
    monkeypatch.setenv("COLDSTART_FRESH", "off")
    monkeypatch.setenv("COLDSTART_FILES_FOLDER", str(tmp_path / "files"))
    monkeypatch.setenv("COLDSTART_CAPTURE_IDLE_SECONDS", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def write(tmp_path):
    """Writes a handler's file and returns its path."""

    def to_file(text, name="handler_of_cli.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return to_file


@pytest.fixture
def command(capsys):
    """Runs ``coldstart`` in this process, in a worker's life of its own: exit status, standard output and error."""

    def run(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
        forget_workers()
        return (status, *capsys.readouterr())

    return run


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_is_cold_then_restored(command, monkeypatch, tmp_path):
    """The first start loads and makes a snapshot, the second restores it and answers the same; both say so."""
    monkeypatch.setenv("COLDSTART_STORE", f"file://{tmp_path / 'store'}")
    status, out, err = command("run", DIGITS, "--input", json.dumps(PIXELS))
    assert status == 0
    assert json.loads(out)["digit"] == "1"
    assert err.startswith("digits cold: no snapshot yet; first answer ")
    assert "snapshot: generation 1 published in " in err
    assert " phase: weight_load " in err
    assert "skipped custom_init: no init=" in err
    status, again, err = command("run", DIGITS, "--input", json.dumps(PIXELS))
    assert (status, again) == (0, out)
    assert err.startswith("digits restored (generation 1); first answer ")
    assert re.search(r"  restored \d+ bytes from \d+ bytes stored\n", err)
    assert "snapshot:" not in err


def test_run_as_json_is_one_document(command, monkeypatch):
    """``--json`` prints all there is to know as one line, and nothing else: no log lines, unless they are asked for."""
    monkeypatch.delenv("COLDSTART_LOG")
    status, out, err = command("run", DIGITS, "--json", "--repeat", "3")
    document = json.loads(out)
    assert (status, err) == (0, "")
    assert document["output"]["digit"] == "1"
    assert document["start"]["kind"] == "cold"
    assert document["start"]["reason"] == "no store"
    assert document["capture"] == {"published": False, "reason": "no store"}
    assert len(document["warm_seconds"]) == 3
    assert document["answers_equal"] is True
    assert document["start"]["ready_seconds"] <= document["first_answer_seconds"]


def test_run_takes_the_first_warmup_input_by_default(command, write):
    """Without ``--input`` the event is the first warm-up input; without either, the error says what to type."""
    assert json.loads(command("run", write(SCALES, "scales_of_cli.py"))[1]) == SCALED
    status, out, err = command("run", write(PLAIN))
    assert (status, out) == (1, "")
    assert err.startswith("coldstart: UsageError: give the event's input: coldstart run ")
    assert err.endswith("handler_of_cli.py --input '{...}'\n")


def test_run_fresh_makes_a_further_generation(command, write, monkeypatch, tmp_path):
    """``--fresh`` loads although a snapshot is there, and replaces it."""
    monkeypatch.setenv("COLDSTART_STORE", str(tmp_path / "store"))
    path = write(SCALES)
    starts = [json.loads(command("run", path, "--json", *options)[1]) for options in ([], ["--fresh"])]
    assert [start["start"]["kind"] for start in starts] == ["cold", "cold"]
    assert [start["capture"]["generation"] for start in starts] == [1, 2]


def test_run_without_waiting_leaves_the_snapshot(command, write, monkeypatch, tmp_path):
    """``--no-wait`` ends with the answer: nothing is published, and nothing said of it."""
    monkeypatch.setenv("COLDSTART_STORE", str(tmp_path / "store"))
    status, out, _ = command("run", write(PLAIN), "--json", "--input", "1", "--no-wait")
    assert (status, json.loads(out)["capture"]) == (0, {"published": False, "reason": ""})
    assert not (tmp_path / "store" / "refs").exists()


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        ("np.arange(3)", [0, 1, 2]),
        ("np.float32(0.5)", 0.5),
        ("b'bytes'", "bytes"),
        ("{(1, 2): 3}", "{(1, 2): 3}"),
        ("{1}", "{1}"),
        ("datetime.date(2020, 1, 2)", "2020-01-02"),
    ],
)
def test_run_shows_what_json_cannot_say(expression, shown, command, write):
    """Arrays come as lists, and what JSON has no form for as text: a person wants to see it in any case."""
    text = PLAIN.replace('event["input"] + model["number"]', expression)
    path = write("import datetime\nimport numpy as np\n" + text)
    status, out, _ = command("run", path, "--input", "0")
    assert (status, json.loads(out)) == (0, shown)


@pytest.mark.parametrize("kind", ["generator", "async", "async_generator"])
def test_run_answers_in_every_kind(kind, command, write):
    """Async handlers run on a loop, and a stream's answer is the list of its pieces."""
    bodies = {
        "generator": "def handler(event, model):\n    yield 1\n    yield 2",
        "async": "async def handler(event, model):\n    return [1, 2]",
        "async_generator": "async def handler(event, model):\n    yield 1\n    yield 2",
    }
    path = write(PLAIN[: PLAIN.index("def ")] + bodies[kind])
    assert json.loads(command("run", path, "--input", "0")[1]) == [1, 2]


# --- errors are one clear line ---------------------------------------------------------------------------------------

SYNTAX = "x = (\n"
TWO = PLAIN + PLAIN.replace("plain", "other").replace("handler", "second")

TOLD = {
    "missing file": (None, [], "HandlerError: no file is at 'absent.py' (looked from "),
    "no handler": (
        "x = 1",
        [],
        "handler_of_cli.py has no handler: decorate a function (event, model) with @coldstart(",
    ),
    "two handlers": (TWO, [], "has 2 handlers; choose one with FILE:NAME (there: plain, other)"),
    "syntax error": (SYNTAX, [], "handler_of_cli.py:1: not valid Python: '(' was never closed"),
    "input not JSON": (PLAIN, ["--input", "{bad"], "EventError: --input '{bad' is not JSON: "),
    "wrong decorator": (
        PLAIN.replace("load=", "lode="),
        ["--input", "1"],
        "HandlerError: @coldstart has no option 'lode': did you mean load=?",
    ),
}


@pytest.mark.parametrize("store", ["off", "on"])
@pytest.mark.parametrize(("text", "options", "told"), TOLD.values(), ids=TOLD)
def test_run_tells_what_is_wrong_in_one_line(text, options, told, store, command, write, monkeypatch, tmp_path):
    """Whatever is wrong with file, handler or input is one line on standard error, and status 1, with and without a store."""
    if store == "on":
        monkeypatch.setenv("COLDSTART_STORE", str(tmp_path / "store"))
    status, out, err = command("run", "absent.py" if text is None else write(text), *options)
    assert (status, out) == (1, "")
    assert err.startswith("coldstart: ")
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("target", ["notes.txt", "handlers"])
def test_run_and_serve_want_a_python_file(target, command):
    """Something that is not Python is told before anything is begun, by both commands."""
    expected = f"coldstart: HandlerError: '{target}' is not a Python file; give the path of a handler's file: handlers/minilm.py\n"
    assert command("run", target) == command("serve", target) == (1, "", expected)


def test_a_handler_is_chosen_by_name(command, write):
    """``FILE:NAME`` chooses among several, and an unknown name is told with those there are."""
    path = write(TWO)
    assert json.loads(command("run", f"{path}:other", "--input", "1")[1]) == 11
    status, _, err = command("run", f"{path}:third", "--input", "1")
    assert status == 1
    assert err.endswith("has no handler 'third'; choose one with FILE:NAME (there: plain, other)\n")


USERS_OWN = {
    "import": ("import absent_of_cli\n" + PLAIN, "ModuleNotFoundError: No module named 'absent_of_cli'"),
    "load": (
        PLAIN.replace('lambda: {"number": 10}', "lambda: open('/absent')"),
        "PhaseError: phase weight_load of 'plain' failed: FileNotFoundError: [Errno 2]",
    ),
    "handler": (PLAIN.replace('["number"]', '["lost"]'), "KeyError: 'lost'"),
}


@pytest.mark.parametrize(("text", "told"), USERS_OWN.values(), ids=USERS_OWN)
def test_errors_of_the_users_code_show_that_code_alone(text, told, command, write):
    """What import, load or handler raise is told with the traceback of the user's file, without coldstart's frames."""
    path = write(text)
    status, out, err = command("run", path, "--input", "1")
    first, *rest = err.splitlines()
    assert (status, out) == (1, "")
    assert first.startswith(f"coldstart: {told}")
    assert rest[0].startswith(f'  File "{path}", line ')
    assert "/coldstart/" not in "\n".join(rest)
    assert "importlib" not in err


def test_a_bug_of_coldstart_shows_all_of_its_traceback(command, write, monkeypatch):
    """An error without a frame of the user's is coldstart's own, and a report of it needs every frame."""
    monkeypatch.setattr("coldstart.loading.choose_handler", operator.getitem)
    status, _, err = command("run", write(PLAIN), "--input", "1")
    assert status == 1
    assert err.startswith("coldstart: TypeError: 'module' object is not subscriptable\n")
    assert "coldstart/cli/run.py" in err


def test_ctrl_c_ends_quietly(command, write):
    """An interrupt ends with the status that shells expect, and without a word."""
    path = write(PLAIN.replace('event["input"] + model["number"]', "exec('raise KeyboardInterrupt')"))
    assert command("run", path, "--input", "1") == (130, "", "")


@pytest.mark.parametrize(
    ("store", "told"),
    [
        ("ftp://host/folder", "unknown store scheme 'ftp': use file://, s3://"),
        ("{folder}/file/store", "{folder}/file/store"),
    ],
)
def test_a_store_that_cannot_be_used_never_fails_a_request(store, told, command, write, monkeypatch, tmp_path):
    """The event is answered, and the report says why no snapshot was made."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("COLDSTART_STORE", store.format(folder=tmp_path))
    status, out, err = command("run", write(PLAIN), "--input", "1")
    assert (status, json.loads(out)) == (0, 11)
    assert "no snapshot was made: " in err
    assert told.format(folder=tmp_path) in err.splitlines()[-1]


def test_a_setting_that_cannot_be_used_is_told(command, write, monkeypatch):
    """A wrong value is one line with the variable and what is allowed."""
    monkeypatch.setenv("COLDSTART_DEVICE", "tpu")
    expected = "coldstart: ConfigError: COLDSTART_DEVICE='tpu' cannot be used: device has to be auto, cpu, cuda or cuda:<number>\n"
    assert command("run", write(PLAIN), "--input", "1") == (1, "", expected)


# --- serve -----------------------------------------------------------------------------------------------------------


def test_serve_answers_lines(command, write, monkeypatch):
    """Events from standard input are answered on standard output, and the end of the input is a good end."""
    lines = b'{"id": 1, "input": 2}\n{"id": 2}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    status, out, err = command("serve", write(PLAIN))
    assert (status, err) == (0, "")
    error = {"type": "EventError", "message": 'the event has no input (it has id): send {"input": ...}'}
    assert [json.loads(line) for line in out.splitlines()] == [{"id": 1, "output": 12}, {"id": 2, "error": error}]


def test_serve_in_a_container_of_modal_is_told(command, write, monkeypatch):
    """Modal runs no loop of ours: that is one line with the remedy, and standard input is left alone."""
    monkeypatch.setenv("MODAL_IS_REMOTE", "1")
    status, out, err = command("serve", write(PLAIN))
    assert (status, out) == (1, "")
    assert err.startswith("coldstart: UsageError: a container of Modal runs no worker loop: deploy the file with")
    assert err.count("\n") == 1


# --- the command itself ----------------------------------------------------------------------------------------------


def test_the_version_is_printed(command):
    """``--version`` prints the version alone."""
    assert command("--version") == (0, f"{VERSION}\n", "")


def test_without_a_command_the_help_is_printed(command):
    """``coldstart`` alone lists the commands, not those it gives itself, and is wrong usage."""
    status, out, _ = command()
    assert status == 2
    assert all(name in out for name in COMMANDS)
    assert "prove" not in out
    assert command("--help")[:2] == (0, out)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, command):
    """``coldstart COMMAND --help`` describes the command."""
    status, out, _ = command(name, "--help")
    assert status == 0
    assert out.startswith(f"usage: coldstart {name} ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["restore"], "invalid choice: 'restore'"),
        (["--wrong"], "unrecognized arguments: --wrong"),
        (["run"], "the following arguments are required: FILE[:NAME]"),
        (["run", "a.py", "b.py"], "unrecognized arguments: b.py"),
        (["run", "a.py", "--repeat", "x"], "argument --repeat: invalid int value: 'x'"),
        (["serve"], "the following arguments are required: FILE[:NAME]"),
        (["snapshot"], "the following arguments are required: ACTION"),
        (["snapshot", "steal"], "invalid choice: 'steal'"),
        (["snapshot", "show"], "the following arguments are required: NAME"),
        (["doctor", "--fix"], "unrecognized arguments: --fix"),
    ],
)
def test_wrong_usage_is_told_with_status_2(words, told, command):
    """A command line that cannot be read is told with the usage, and nothing is done."""
    status, out, err = command(*words)
    assert (status, out) == (2, "")
    assert err.startswith("usage: coldstart")
    assert told in err


def test_the_module_is_the_command(tmp_path):
    """``python -m coldstart`` passes arguments and exit status on, and a reader that has gone is no error to talk about."""
    project = Project(tmp_path)
    with project.popen("-m", "coldstart", "run", "absent.py") as process:
        _, err = process.communicate()
    assert process.returncode == 1
    assert err.startswith("coldstart: HandlerError: no file is at 'absent.py'")
    buffered = {"PYTHONUNBUFFERED": "", "COLDSTART_STORE": "off"}
    with project.popen("-m", "coldstart", "config", "--reference", environment=buffered) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert (process.wait(), err) == (1, "")
