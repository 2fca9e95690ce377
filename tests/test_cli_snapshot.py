"""``coldstart snapshot`` and ``coldstart doctor``: what is in a store, and what a machine has."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

from coldstart.cli import main
from coldstart.stores import open_store
from coldstart.stores.memory import MemoryStore
from tests.starts import SCALES, Project, flip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with a snapshot of two keys."""
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
    assert all(
        (row["name"], row["generation"], row["rung"], row["device"]) == ("scales", 1, "arrays", "cpu") for row in rows
    )
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
    """A damaged ref and a missing manifest are rows with their error, and the command does not fail."""
    damaged, orphan = keys_of(project)
    (project.store / "refs" / "scales" / damaged).write_text("{}")
    for path in project.objects("manifests"):
        path.unlink()
    status, out, _ = command("snapshot", "list", "--json")
    rows = {row.get("key") or row["ref"]: row for row in json.loads(out)}
    assert status == 0
    assert set(rows) == {f"refs/scales/{damaged}", orphan}
    assert all(row["error"] for row in rows.values())


def test_show_describes_the_newest_key(project, command):
    """Without ``--key`` the newest key is shown: buffers, chunks, what it depends on, what made it."""
    status, out, _ = command("snapshot", "show", "scales")
    assert status == 0
    assert f"key            {keys_of(project)[-1]}" in out
    assert '  ["scale"]  <f4[64]\n' in out
    assert "made with      coldstart " in out
    document = json.loads(command("snapshot", "show", "scales", "--json")[1])
    assert [leaf["path"] for leaf in document["leaves"]] == ['["scale"]', '["offset"]']
    assert document["generation"] == 1
    assert document["chunks"]


def test_show_takes_the_first_digits_of_a_key(project, command):
    """``--key`` chooses by the first digits; digits of no key are told."""
    first = keys_of(project)[0]
    document = json.loads(command("snapshot", "show", "scales", "--json", "--key", first[:8])[1])
    assert document["key"] == first
    status, out, err = command("snapshot", "show", "scales", "--key", "zz")
    assert (status, out) == (1, "")
    assert err.startswith("coldstart: UsageError: no snapshot 'scales' with key 'zz' in file://")


@pytest.mark.parametrize("action", [["show"], ["verify"], ["delete", "--yes"]])
def test_an_ambiguous_key_is_refused(action, project, command):
    """Digits that several keys begin with name none of them, least of all for a deletion."""
    key = keys_of(project)[0]
    twin = key[:-1] + ("0" if key[-1] != "0" else "1")
    ref = project.store / "refs" / "scales" / key
    ref.with_name(twin).write_text(ref.read_text().replace(key, twin))
    status, out, err = command("snapshot", action[0], "scales", "--key", key[:-1], *action[1:])
    assert (status, out) == (1, "")
    assert err == f"coldstart: UsageError: 2 keys of 'scales' begin with {key[:-1]!r}: give more of its digits\n"
    assert ref.exists()


@pytest.mark.parametrize("action", [["show"], ["verify"], ["delete", "--yes"]])
@pytest.mark.parametrize("options", [[], ["--key", "ab"]])
def test_an_unknown_snapshot_is_told_in_one_line(action, options, project, command):
    """A name that is not there is a UsageError with the store and where to look."""
    status, out, err = command("snapshot", action[0], "absent", *action[1:], *options)
    assert (status, out) == (1, "")
    assert err.startswith("coldstart: UsageError: no snapshot 'absent'")
    assert err.endswith(f" in file://{project.store}; see coldstart snapshot list\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("action", ["show", "verify"])
def test_a_damaged_ref_is_told_and_not_taken_for_none(action, project, command):
    """Where nothing but damaged refs is there, the error is theirs."""
    for key in keys_of(project):
        (project.store / "refs" / "scales" / key).write_text("{}")
    status, out, err = command("snapshot", action, "scales")
    assert (status, out) == (1, "")
    assert err.startswith("coldstart: ManifestError: ")
    assert err.count("\n") == 1


def test_a_name_that_cannot_be_one_is_told(command):
    """A name with a slash is refused before the store is asked."""
    status, out, err = command("snapshot", "show", "../scales")
    assert (status, out) == (1, "")
    assert err.startswith("coldstart: ManifestError: '../scales' cannot name a snapshot")


@pytest.mark.parametrize(
    ("store", "told"),
    [
        ("off", "ConfigError: COLDSTART_STORE=off: there is no store to look into; name one with --store URL"),
        ("ftp://host/folder", "StoreSetupError: unknown store scheme 'ftp': use file://, s3://, r2://, memory:// or"),
        ("relative/path", "ConfigError: COLDSTART_STORE='relative/path' cannot be used: store has to be an address"),
    ],
)
def test_a_store_that_cannot_be_used_is_told_in_one_line(store, told, command, monkeypatch):
    """No store, an unknown scheme, and what is no address at all are each one line and status 1."""
    monkeypatch.setenv("COLDSTART_STORE", store)
    status, out, err = command("snapshot", "list")
    assert (status, out) == (1, "")
    assert err.startswith(f"coldstart: {told}")
    assert err.count("\n") == 1


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_finds_what_is_damaged(project, command):
    """A whole snapshot verifies with status 0; a flipped byte is named by chunk and blob, with status 1."""
    status, out, _ = command("snapshot", "verify", "scales")
    assert status == 0
    assert re.fullmatch(r"scales generation 1: (\d+) of \1 chunks are right\n", out)
    for blob in project.objects("blobs"):
        flip(blob)
    status, out, _ = command("snapshot", "verify", "scales")
    assert status == 1
    assert re.search(r"chunk 0 \([0-9a-f]{12}\): .+\nscales generation 1: 0 of ", out)
    status, out, _ = command("snapshot", "verify", "scales", "--json")
    assert status == 1
    assert [finding["chunk"] for finding in json.loads(out)["findings"]] == [0]


# --- delete ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["", "n\n", "\n", "yesterday\n"])
def test_delete_asks_and_does_nothing_without_a_yes(answer, project, command, monkeypatch):
    """Any answer but yes, and no answer at all, leaves everything, with status 1 and what to do."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    before = project.objects("refs")
    status, out, err = command("snapshot", "delete", "scales")
    assert (status, out) == (1, "")
    question, told = err.rstrip("\n").split("? [y/N] ")
    assert question == f"delete snapshot 'scales' in file://{project.store}"
    assert told.startswith("coldstart: UsageError: nothing was deleted: answer y, or add --yes, to delete snapshot")
    assert project.objects("refs") == before


@pytest.mark.parametrize(("options", "answer"), [(["--yes"], ""), ([], "y\n"), ([], "YES\n")])
def test_delete_takes_a_snapshot_away(options, answer, project, command, monkeypatch):
    """With a yes, all refs and manifests of the name are gone but for tombstones, and it is listed no more."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    status, out, _ = command("snapshot", "delete", "scales", *options)
    assert (status, out) == (0, "deleted 5 objects of 'scales'\n")
    assert all(b'"deleted":true' in path.read_bytes() for path in project.objects("refs"))
    assert project.objects("manifests") == []
    assert project.objects("blobs")
    assert command("snapshot", "list", "--json")[1] == "[]\n"


def test_delete_of_one_key_leaves_the_others(project, command):
    """``--key`` deletes the refs of that key alone."""
    first, second = keys_of(project)
    status, out, _ = command("snapshot", "delete", "scales", "--key", first, "--yes", "--json")
    assert status == 0
    assert f"refs/scales/{first}" in json.loads(out)
    rows = json.loads(command("snapshot", "list", "--json")[1])
    assert [row["key"] for row in rows] == [second]


def test_delete_takes_damaged_refs_too(project, command):
    """A snapshot whose refs cannot be read can be deleted by its name."""
    for path in project.objects("refs"):
        if path.name != "newest":
            path.write_text("{}")
    assert command("snapshot", "delete", "scales", "--yes")[0] == 0
    assert command("snapshot", "list", "--json")[1] == "[]\n"


# --- doctor ----------------------------------------------------------------------------------------------------------


def findings(out):
    """Topic and state of each finding, with its text."""
    return [tuple(finding.values()) for finding in json.loads(out)]


def test_doctor_finds_a_good_machine_good(command, monkeypatch, tmp_path):
    """Where all works, nothing is a problem, the store was tried and left as it was, and the status is 0."""
    monkeypatch.setenv("COLDSTART_STORE", str(tmp_path / "store"))
    status, out, _ = command("doctor", "--json")
    found = findings(out)
    assert status == 0
    assert {state for _, state, _ in found} <= {"ok", "note"}
    assert ("store", "ok", f"file://{tmp_path}/store: writable, readable") in found
    assert [text for topic, _, text in found if topic == "store"][1:] == [
        "ranges: right",
        "create-if-absent: enforced",
        "compare-and-swap: enforced",
    ]
    assert list(open_store(str(tmp_path / "store")).list("")) == []


def test_doctor_prints_a_line_a_finding(command, monkeypatch):
    """Without ``--json`` every finding is one line: state, topic, text. A store that is off is worth a note."""
    monkeypatch.setenv("COLDSTART_STORE", "off")
    status, out, _ = command("doctor")
    lines = out.splitlines()
    assert status == 0
    assert all(re.match(r"(ok|note|problem) +\S", line) for line in lines)
    assert "note     store            off: every start runs load" in lines


def test_doctor_notes_a_store_that_ignores_conditions(command, monkeypatch):
    """A store that takes a conditional write without looking is usable, and worth a note for each condition."""

    class LaxStore(MemoryStore):
        def put(self, key, data, *, if_absent=False, if_match=None):
            return super().put(key, data)

    monkeypatch.setitem(MemoryStore._shared, "lax", LaxStore("lax"))
    monkeypatch.setenv("COLDSTART_STORE", "memory://lax")
    status, out, _ = command("doctor", "--json")
    assert status == 0
    assert [(state, text) for topic, state, text in findings(out) if topic == "store"][1:] == [
        ("ok", "ranges: right"),
        ("note", "create-if-absent: NOT enforced: two writers may undo each other"),
        ("note", "compare-and-swap: NOT enforced: two writers may undo each other"),
    ]


def test_doctor_finds_a_store_that_answers_ranges_wrongly(command, monkeypatch):
    """A store, or a proxy before it, that sends other bytes than those asked for is a problem."""

    class ShiftedStore(MemoryStore):
        def read_into(self, key, target, *, offset_bytes=0):
            return super().read_into(key, target, offset_bytes=0)

    monkeypatch.setitem(MemoryStore._shared, "shifted", ShiftedStore("shifted"))
    monkeypatch.setenv("COLDSTART_STORE", "memory://shifted")
    status, out, _ = command("doctor", "--json")
    told = "ranges: answered with other bytes, so nothing can be restored from it: use another store"
    assert status == 1
    assert ("store", "problem", told) in findings(out)


@pytest.mark.parametrize(
    ("variable", "value", "topic", "told"),
    [
        (
            "COLDSTART_STORR",
            "x",
            "settings",
            "COLDSTART_STORR is not a setting of coldstart; did you mean COLDSTART_STORE?",
        ),
        ("COLDSTART_CODEC", "rar", "settings", "COLDSTART_CODEC='rar' cannot be used: codec has to be "),
        ("COLDSTART_DEVICE", "cuda:63", "device", "there is no "),
        ("COLDSTART_STORE", "ftp://a/b", "store", "unknown store scheme 'ftp'"),
        ("COLDSTART_STORE", "{folder}/file/store", "store", "{folder}/file/store/probes/"),
    ],
)
def test_doctor_tells_what_will_not_work(variable, value, topic, told, command, monkeypatch, tmp_path):
    """Each trouble is a problem under its topic, the rest is looked at all the same, and the status is 1."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, value.format(folder=tmp_path))
    status, out, err = command("doctor", "--json")
    problems = [(place, text) for place, state, text in findings(out) if state == "problem"]
    assert (status, err) == (1, "")
    assert topic in {place for place, _ in problems}
    assert any(text.startswith(told.format(folder=tmp_path)) for _, text in problems)
    assert "numpy" in {place for place, _, _ in findings(out)}


def test_doctor_tells_of_programs(command, monkeypatch, tmp_path):
    """Each backend's runtime and version, whether the store may give code, and what to do where something is in the way."""
    monkeypatch.setenv("COLDSTART_STORE", f"file://{tmp_path}/store")
    pytest.importorskip("onnxruntime")

    def told():
        _, out, _ = command("doctor", "--json")
        return {text: state for topic, state, text in findings(out) if topic == "programs"}

    found = told()
    assert [state for text, state in found.items() if text.startswith("onnx: device cpu, onnxruntime ")] == ["ok"]
    assert found[f"file://{tmp_path}/store is trusted to give code"] == "ok"
    (tmp_path / "store").chmod(0o777)
    monkeypatch.setattr("coldstart.programs.onnx.installed_version", lambda: "1.17.0")
    found = told()
    assert [state for text, state in found.items() if text.startswith("onnx: ONNX Runtime 1.17.0 is too old")] == [
        "note"
    ]
    (untrusted,) = (text for text in found if "is not trusted to give code" in text)
    assert "COLDSTART_TRUST_STORE=on" in untrusted
    assert found[untrusted] == "note"
    monkeypatch.setenv("COLDSTART_TRUST_STORE", "on")
    assert untrusted not in told()
    monkeypatch.setenv("COLDSTART_PROGRAMS", "off")
    assert list(told()) == ["off (COLDSTART_PROGRAMS): starts restore the state and compute eagerly"]


def test_doctor_says_how_to_get_what_is_missing(command, monkeypatch):
    """A package that is not installed is named with its purpose and the command that installs it."""
    import importlib.metadata

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("COLDSTART_STORE", "off")
    monkeypatch.setattr(importlib.metadata, "version", version)
    status, out, _ = command("doctor", "--json")
    found = findings(out)
    assert status == 1
    assert ("blake3", "problem", "not installed, and needed for content addresses: pip install coldstart-gpu") in found
    extra = 'not installed, and needed for serving on Modal: pip install "coldstart-gpu[modal]"'
    assert ("modal", "note", extra) in found
