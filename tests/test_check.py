"""``coldstart.testing.check``: whether a handler restores as it loads, told by real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldstart.errors import ColdstartError, HandlerError
from coldstart.loading import import_file
from coldstart.testing import CheckFailed, check, handlers
from tests.starts import Project

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("forgotten_imports")
PIXELS = [0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1]

DIFFERENT = """
import numpy as np
from coldstart import coldstart

ORIGIN = {"from": "import"}

def load():
    ORIGIN["from"] = "load"
    return {"number": np.float32([2])}

@coldstart("different", load=load)
def handler(event, model):
    return ORIGIN["from"] if event["input"] == "origin" else float(model["number"][0] * event["input"])
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Processes find coldstart where the tests do."""
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def project(tmp_path):
    """A folder for a handler's file."""
    return Project(tmp_path / "project")


def handler_in(path):
    """The handler of a file, imported here."""
    return import_file(str(path)).handler


def test_a_handler_that_restores_passes(monkeypatch):
    """An example passes, whatever switches this process' own environment has, and its snapshot is described."""
    for name, value in {"FRESH": "on", "CAPTURE": "off", "STORE": "off"}.items():
        monkeypatch.setenv(f"COLDSTART_{name}", value)
    report = check(handler_in(ROOT / "handlers" / "digits.py"), inputs=[{"pixels": PIXELS}])
    assert [output["digit"] for output in report.outputs] == ["1"]
    assert report.rung == "arrays"
    assert report.raw_bytes >= 10 * 15 * 4
    assert report.stored_bytes > 0


def test_a_handler_that_answers_differently_fails(project):
    """What load leaves outside the state is missing in a restored process, and the input that shows it is named."""
    handler = handler_in(project.write(DIFFERENT, "different_of_test.py"))
    with pytest.raises(CheckFailed) as caught:
        check(handler, inputs=[3, "origin"])
    assert str(caught.value) == "'different' answers 'origin' differently when restored: 'import', not 'load'"
    assert isinstance(caught.value, ColdstartError)
    assert isinstance(caught.value, AssertionError)


def test_a_handler_without_a_snapshot_fails_with_its_reason(project):
    """A state that cannot be stored is told with the reason that the worker gives."""
    text = DIFFERENT.replace('{"number": np.float32([2])}', "object()")
    handler = handler_in(project.write(text, "opaque_of_test.py"))
    with pytest.raises(CheckFailed, match=r"'different' made no snapshot: .*object.*build="):
        check(handler, inputs=["origin"])


def test_a_handler_that_fails_is_told_with_its_own_error(project):
    """An event that raises in the handler's process fails the check with the error and the input."""
    handler = handler_in(project.write(DIFFERENT, "failing_of_test.py"))
    with pytest.raises(
        CheckFailed, match=r"(?s)process failed with \{'a': 1\}: coldstart: TypeError: .*failing_of_test"
    ):
        check(handler, inputs=[{"a": 1}])


def test_what_cannot_be_checked_is_told():
    """No inputs, and what is no handler, are errors at once."""
    handler = handler_in(ROOT / "handlers" / "digits.py")
    with pytest.raises(CheckFailed, match="needs at least one input"):
        check(handler, inputs=[])
    with pytest.raises(HandlerError, match="is not a handler"):
        check(print, inputs=[1])


def test_a_start_that_is_not_restored_fails_with_its_reason(monkeypatch):
    """A snapshot that is made but passed over by the next process is no success."""

    def run(_target, _value, changes):
        kind = "cold" if "published" in seen else "restored"
        seen.append("published")
        return {"output": 1, "start": {"kind": kind, "reason": "code changed: load"}, "capture": {"published": True}}

    seen = []
    monkeypatch.setattr(handlers, "_run", run)
    with pytest.raises(CheckFailed, match="'digits' started cold: code changed: load"):
        check(handler_in(ROOT / "handlers" / "digits.py"), inputs=[1])


def test_a_process_that_takes_too_long_fails(monkeypatch):
    """A handler that hangs fails the check with the input that it hung on."""
    monkeypatch.setattr(handlers, "CHECK_SECONDS", 0.01)
    with pytest.raises(CheckFailed, match=r"process took longer than 0 s with \[1\]"):
        check(handler_in(ROOT / "handlers" / "digits.py"), inputs=[[1]])
