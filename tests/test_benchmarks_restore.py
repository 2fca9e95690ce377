"""The restore benchmark: its own arithmetic and reports, and one whole small run of what needs no peers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import restore
from benchmarks.restoring import link, model, plot, report, summary
from benchmarks.restoring.contenders import CONTENDERS, LIMIT, OURS, OURS_PLANES, PEERS, RUNAI
from benchmarks.restoring.peers import requirements
from benchmarks.restoring.reading import Task
from benchmarks.restoring.server import ObjectServer, nginx
from benchmarks.restoring.trial import memory_bytes, run_trial, wrong_of

MIB = 1 << 20
needs_nginx = pytest.mark.skipif(nginx() is None, reason="nginx is not installed")


def trial(seconds, **changes):
    """One trial of a document."""
    made = {"seconds": seconds, "spawn_seconds": seconds + 2, "processor_seconds": 2 * seconds, "touch_seconds": 0.5}
    return {**made, "memory_bytes": 0, "before_bytes": 0, "wrong": [], "details": {}, **changes}


def weighed(over_mib, state_mib):
    """A trial whose memory was looked at."""
    return trial(1.0, memory_bytes=(200 + state_mib + over_mib) * MIB, before_bytes=200 * MIB)


@pytest.fixture
def document():
    """A run of all parts, with numbers that are easy to follow."""
    fetched = {"fetch_seconds": 1.5, "import_seconds": 2.0}
    return {
        "machine": {"text": "Some CPU, 2 cores", "short": "Some <CPU>"},
        "versions": {"torch": "2.13.0"},
        "size_bytes": 100 * MIB,
        "tensors": 111,
        "wrong": 0,
        "stored": {"raw": 100 * MIB, "planes": 67 * MIB},
        "limit_connections": 2,
        "limit_tried": {"1": 1.5, "2": 1.0},
        "contenders": {
            LIMIT: [trial(1.0), trial(2.0), trial(3.0)],
            OURS: [trial(1.25), trial(2.0), trial(4.0)],
            RUNAI: [trial(5.0), trial(9.0), trial(16.0)],
        },
        "links": [
            {
                "megabytes_per_second": 50.0,
                "trials": {LIMIT: [trial(3.0)], OURS: [trial(3.0)], OURS_PLANES: [trial(2.0)]},
            }
        ],
        "start": {
            "megabytes_per_second": 10.0,
            "start_seconds": [7.5, 8.4, 9.0],
            "fetch_seconds": [7.0, 7.0, 7.0],
            "import_seconds": [2.0, 2.0, 2.0],
        },
        "memory": [
            {"size_bytes": 100 * MIB, "trials": {OURS: weighed(20, 100), OURS_PLANES: weighed(60, 100)}},
            {"size_bytes": 300 * MIB, "trials": {OURS: weighed(300, 300), OURS_PLANES: weighed(61, 300)}},
        ],
        "engines": {
            "threads|TLS|alone": [trial(1.6, details=fetched)],
            "threads|TLS|beside": [trial(2.5, details=fetched)],
        },
        "import_alone": [trial(1.9, details=fetched)],
    }


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_goals_are_judged_by_the_rounds_own_ratios(document):
    """Each goal has the median of the rounds' ratios, and is met on its own side of its bound."""
    found = {
        goal.what: (None if goal.value is None else round(goal.value, 3), goal.met) for goal in summary.goals(document)
    }
    assert list(found.values()) == [
        (0.8, False),
        (4.0, True),
        (4.0, True),
        (1.5, True),
        (1.2, False),
        (60.0, True),
        (300.0, False),
    ]


def test_goals_that_were_not_measured_say_why(document):
    """A document without links says what stood in their way; no goal is met by having been left out."""
    left_out = {"machine": document["machine"], "left_out": {"links": "network namespaces need root"}}
    found = summary.goals(left_out)
    assert len(found) == 6
    assert not any(goal.met for goal in found)
    assert [goal.why for goal in found if "link" in goal.what] == ["network namespaces need root"]


def test_rows_have_medians_and_memory_where_it_was_looked_at(document):
    """A row's numbers are the medians of its trials; the limit is itself to itself."""
    limit, ours, _ = summary.rows(document["contenders"], document["size_bytes"], summary.memory_of(document))
    assert (limit.of_limit, limit.over_mib) == (1.0, None)
    assert (ours.seconds, ours.spawn_seconds, ours.touched_seconds, ours.processor_seconds) == (2.0, 4.0, 2.5, 4.0)
    assert (ours.of_limit, ours.over_mib) == (0.8, 20.0)
    assert ours.gigabytes_per_second == pytest.approx(0.0524288)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
def test_a_ratio_turns_around(seconds):
    """Over an odd number of rounds, the ratio of two contenders is the inverse of the ratio the other way."""
    over = [trial(each) for each in seconds[: len(seconds) - (len(seconds) + 1) % 2]]
    under = [trial(each / 2 + 1) for each in seconds[: len(over)]]
    assert summary.ratio(over, under) * summary.ratio(under, over) == pytest.approx(1.0)


def test_engines_are_paired_by_endpoint(document):
    """A line of the engines has the fetch alone and beside, the import beside it, and the wall of both."""
    assert summary.engine_rows(document["engines"]) == [summary.EngineRow("threads", "TLS", 1.5, 1.5, 2.0, 2.5)]


# --- reports ---------------------------------------------------------------------------------------------------------


def test_report_has_tables_of_equal_width(document):
    """Every table's rows have as many cells as its heading, and each part that was run has a heading."""
    lines = report.to_markdown(document, plot="x.svg").splitlines()
    tables, headings = [[]], [line for line in lines if line.startswith("## ")]
    for line in lines:
        if line.startswith("|"):
            tables[-1].append(line.count("|"))
        elif tables[-1]:
            tables.append([])
    assert len(headings) == 6
    assert [len(table) for table in tables if table] == [9, 5, 3, 3, 3, 6]
    assert all(len(set(table)) == 1 for table in tables if table)
    assert "![wall time and what it is spent on](x.svg)" in lines


def test_report_of_a_part_of_a_run(document):
    """What was not run has no table; what cannot be run here is listed with its reason."""
    part = {name: document[name] for name in ("machine", "versions", "size_bytes", "tensors", "wrong")}
    text = report.to_markdown({**part, "left_out": {"links": "network namespaces need root"}})
    assert "## Links" not in text
    assert "- links: network namespaces need root" in text


def test_picture_has_a_bar_for_each_contender(document):
    """The picture is XML with a bar for each contender, as long as its seconds, whatever its names have in them."""
    tree = ET.fromstring(plot.to_svg(document))
    bars = [float(each.get("width")) for each in tree.findall("{*}rect")[1:]]
    assert [round(bar / bars[-1], 2) for bar in bars] == [0.22, 0.22, 1.0]
    with pytest.raises(ValueError, match="no contenders"):
        plot.to_svg({})


def test_wrong_tensors_are_counted_wherever_they_are(document):
    """A tensor that was not right in any part's trial is counted, so that no table can hide it."""
    assert restore.wrong_tensors(document) == 0
    document["links"][0]["trials"][OURS][0]["wrong"] = ["a", "b"]
    document["contenders"][RUNAI][1]["wrong"] = ["c"]
    assert restore.wrong_tensors(document) == 3


def test_wrong_tensors_are_missing_altered_or_too_many():
    """A reader is right only if it has every tensor with its bytes and none else, or the whole file."""
    expected = {"": "whole", "a": "1", "b": "2"}
    assert wrong_of({"a": "1", "b": "2"}, expected) == wrong_of({"": "whole"}, expected) == ()
    assert wrong_of({"a": "1"}, expected) == ("b",)
    assert wrong_of({"a": "1", "b": "3", "c": "4"}, expected) == ("b", "c")
    assert wrong_of({"": "part"}, expected) == ("",)
    assert wrong_of({}, expected) == ("a", "b")


# --- the command line ------------------------------------------------------------------------------------------------


def test_every_peer_can_be_chosen():
    """All, none, or some peers by name, in the table's order; an unknown one is refused."""
    assert restore.parsed([]).peers == PEERS
    assert restore.parsed(["--peers", "none"]).peers == ()
    assert restore.parsed(["--peers", f"{PEERS[2]},{PEERS[0]}"]).peers == (PEERS[0], PEERS[2])
    with pytest.raises(SystemExit):
        restore.parsed(["--peers", "nobody"])


def test_every_peer_is_installed():
    """The environment of the readers has every peer of the table and all that coldstart depends on."""
    names = " ".join(requirements())
    missing = [peer for peer in (*PEERS, "blake3", "numpy", "torch") if peer not in names.replace("runai-", "runai ")]
    assert missing == []
    assert {each.peer for each in CONTENDERS} == {"", *PEERS}


def test_results_are_named_by_the_machine():
    """The name has cores and family, not vendor and memory."""
    assert restore.machine_name("2-cores-intel-xeon-24gib") == "2-cores-xeon"
    assert restore.machine_name("64-cores-amd-epyc-9655-1008gib") == "64-cores-epyc-9655"


def test_parts_of_an_earlier_run_are_kept_for_the_same_model(tmp_path):
    """A later run adds its parts to what is there, unless that is of another model."""
    (tmp_path / "x.json").write_text(json.dumps({"size_bytes": 10, "seed": 1, "links": []}))
    assert restore.kept(tmp_path / "x", 10, 1)["links"] == []
    assert restore.kept(tmp_path / "x", 10, 2) == restore.kept(tmp_path / "y", 10, 1) == {}


def test_order_turns_around_and_round_zero_is_not_counted():
    """Every contender has one trial a round, round 0 is dropped, and the order is reversed every other round."""
    calls = []

    def asked(name):
        calls.append(name)
        return {"seconds": len(calls)}

    found = restore.in_turns(2, {"a": lambda: asked("a"), "b": lambda: asked("b")})
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert found == {"a": [{"seconds": 3}, {"seconds": 6}], "b": [{"seconds": 4}, {"seconds": 5}]}


# --- the model, memory, and one whole run ----------------------------------------------------------------------------


@given(st.integers(1, 4096))
def test_model_has_the_size_asked_for(size_mib):
    """Whatever the size, at most one row of the last matrix is missing to it, and large models have hundreds of tensors."""
    shapes = model.shapes(size_mib * MIB)
    width = shapes["norm.weight"][0]
    size_bytes = sum(model.ITEM_BYTES * model._items(shape) for shape in shapes.values())
    assert 0 <= size_mib * MIB - size_bytes < model.ITEM_BYTES * width
    assert size_mib < 1024 or len(shapes) > 250


def test_memory_of_a_process_counts_memory_files_once(tmp_path):
    """A memory file that two processes map counts once, private memory for each, and pages that nobody mapped count."""
    code = """
import mmap, os, subprocess, sys
fd = os.memfd_create("x")
os.set_inheritable(fd, True)
os.write(fd, bytes(32 << 20))
child = "import mmap, time; m = mmap.mmap(%d, 0); n = len(bytes(m)); b = bytearray(24 << 20); print('there', flush=True); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child % fd], close_fds=False)
process.wait()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout.readline() == b"there\n"
        found_mib = memory_bytes(process.pid) / MIB
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert 56 <= found_mib < 56 + 32


@needs_nginx
def test_server_gives_ranges_and_ends(tmp_path):
    """The bare-socket reader gets a file from the server byte for byte, and nothing of the server is left behind."""
    from blake3 import blake3

    data = os.urandom(3 * MIB + 17)
    (tmp_path / "root" / "b").mkdir(parents=True)
    (tmp_path / "root" / "b" / "o").write_bytes(data)
    with ObjectServer(tmp_path / "root", tmp_path / "nginx") as server:
        options = {"connections": 3, "part_bytes": MIB}
        task = Task(server.url, "b", "o", len(data), "", "", 0.0, options)
        found = run_trial(Path(sys.executable), "limit", task, {}, {"": blake3(data).hexdigest()})
        other = run_trial(Path(sys.executable), "limit", task, {}, {"": blake3(b"").hexdigest()})
        process = server._process
    assert (found.wrong, other.wrong) == ((), ("",))
    assert process.poll() is not None


def test_a_reader_that_fails_says_so(tmp_path):
    """What a reader wrote to standard error before it failed is in the error."""
    task = Task("http://127.0.0.1:1", "b", "o", 10, "", "", 0.0, {})
    with pytest.raises(RuntimeError, match="limit ended with 1"):
        run_trial(Path(sys.executable), "limit", task, {}, {"": ""})


@needs_nginx
@pytest.mark.skipif(bool(link.lack()), reason=f"no limited links here: {link.lack()}")
def test_a_link_is_between_reader_and_server(tmp_path):
    """Inside a link the reader gets its bytes from a server there; the link is gone afterwards."""
    from blake3 import blake3

    data = os.urandom(MIB)
    (tmp_path / "root" / "b").mkdir(parents=True)
    (tmp_path / "root" / "b" / "o").write_bytes(data)
    with link.Link(50.0) as made, ObjectServer(tmp_path / "root", tmp_path / "nginx", within=made.within) as server:
        task = Task(server.url, "b", "o", len(data), "", "", 0.0, {})
        found = run_trial(Path(sys.executable), "limit", task, {}, {"": blake3(data).hexdigest()}, within=made.within)
    assert found.wrong == ()
    assert subprocess.run([*made.within, "true"], check=False, capture_output=True).returncode != 0


@needs_nginx
@pytest.mark.demo
def test_small_run_without_peers(tmp_path, monkeypatch):
    """One command makes document, report and picture; coldstart's tensors are the model's in every row."""
    pytest.importorskip("safetensors")
    chosen = tuple(each for each in CONTENDERS if each.name in (LIMIT, OURS, OURS_PLANES))
    for name, value in (("CONTENDERS", chosen), ("CONNECTIONS", (2,)), ("PARTS", ("contenders",))):
        monkeypatch.setattr(restore, name, value)
    monkeypatch.setattr(restore, "installed", lambda _cache: Path(sys.executable))
    monkeypatch.setattr(restore, "versions", lambda _python: {})
    monkeypatch.setattr(restore, "in_turns", lambda _rounds, trials: {name: [each()] for name, each in trials.items()})
    stem = tmp_path / "results" / "small"
    arguments = ["--gib", "0.002", "--rounds", "1", "--peers", "none", "--parts", "contenders", "--output", str(stem)]
    monkeypatch.setattr(sys, "argv", ["restore", *arguments])
    restore.main()
    document = json.loads((tmp_path / "results" / "small.json").read_text())
    assert document["wrong"] == 0
    assert set(document["contenders"]) == {LIMIT, OURS, OURS_PLANES}
    assert document["stored"]["planes"] < 0.8 * document["stored"]["raw"]
    assert (tmp_path / "results" / "small.svg").exists()
    assert "## Goals" in (tmp_path / "results" / "small.md").read_text()
