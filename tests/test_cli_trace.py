"""``coldstart run --timeline`` and ``--trace``: imports as they were timed in the start itself, in tables and as trace events."""

from __future__ import annotations

import json
import re
import sys
import threading
import time

import pytest

from coldstart import caches
from coldstart.cli.import_table import stretches, tables
from coldstart.cli.trace import trace_of
from coldstart.imports.sums import covered_seconds, modules_of, packages_of, seconds_of
from coldstart.imports.watch import ImportWatch, Load
from tests.starts import Project

HANDLER = """
    import needed_at_top
    from coldstart import coldstart

    def load():
        import needed_by_load
        return {"number": 10}

    @coldstart("traced", load=load, warmup=[1])
    def handler(event, model):
        import sys
        print(*sorted(name for name in sys.modules if name.startswith("coldstart.imports")), file=sys.stderr)
        return event["input"] + model["number"]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A handler whose module and ``load`` import something of their own."""
    made = Project(tmp_path_factory.mktemp("traced"))
    made.environment["COLDSTART_LOG"] = "off"
    made.write(HANDLER)
    made.write("import time\nimport needed_below\ntime.sleep(0.05)", "needed_at_top.py")
    made.write("import time\ntime.sleep(0.03)", "needed_below.py")
    made.write("", "needed_by_load.py")
    return made


def run(project, *options):
    """Exit status, standard output and error of a start in a process of its own."""
    with project.popen("-m", "coldstart", "run", "handler.py", *options) as process:
        out, err = process.communicate()
    return process.returncode, out, err


# --- in a real start -------------------------------------------------------------------------------------------------


def test_nothing_is_watched_unless_it_is_asked_for(project):
    """A start without the options imports nothing that times imports."""
    status, out, err = run(project, "--no-wait")
    assert (status, out) == (0, "11\n")
    assert "coldstart.imports" not in err


def test_a_traced_start(project):
    """One start with both options: the tables, and a trace whose events have the format's fields and nest."""
    status, out, err = run(project, "--timeline", "--trace", "start.json", "--no-wait")
    assert (status, out) == (0, "11\n")
    assert "coldstart.imports.watch" in err
    assert re.search(r"^  import handler +\d+\.\d +\d+\.\d +\d+\.\d$", err, re.MULTILINE)
    assert re.search(r"^  the handler's module \(handler\) and what it imports +\d+\.\d$", err, re.MULTILINE)
    assert re.search(r"^  needed_at_top +handler +\d+\.\d +\d+\.\d +1$", err, re.MULTILINE)
    assert re.search(r"^  needed_at_top +handler +\d+\.\d$", err, re.MULTILINE)
    trace = json.loads((project.folder / "start.json").read_text())
    events = trace["traceEvents"]
    check_structure(events)
    named = {event["name"]: event for event in events if event["ph"] == "X"}
    for name in ("interpreter and the command's first lines", "import handler", "weight_load", "warmup_inference"):
        assert named[name]["dur"] >= 0
    outer, inner = named["needed_at_top"], named["needed_below"]
    assert inner["dur"] >= 30_000
    assert outer["dur"] >= 80_000
    assert outer["ts"] <= inner["ts"] <= inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert outer["args"]["imported by"] == "handler"
    assert outer["args"]["counted to"] == "the handler's module and what it imports"
    assert named["needed_by_load"]["tid"] != outer["tid"]
    assert trace["otherData"]["name"] == "traced"
    ready, answered = (event["ts"] for event in events if event["ph"] == "i")
    assert 0 < ready <= answered


def test_the_json_document_has_the_imports(project):
    """``--json --timeline`` adds ``imports``; every module's own time is in one owner's sum, none in two."""
    status, out, err = run(project, "--timeline", "--json", "--no-wait")
    document = json.loads(out)
    assert status == 0
    assert "imports before" not in err
    imports = document["imports"]
    assert imports["handler"] == "handler"
    modules = {module["name"]: module for module in imports["modules"]}
    owners = {
        name: modules[name]["owner"] for name in ("needed_at_top", "needed_below", "needed_by_load", "coldstart.worker")
    }
    assert owners == {
        "needed_at_top": "handler", "needed_below": "handler", "needed_by_load": "handler", "coldstart.worker": "coldstart",
    }  # fmt: skip
    total = sum(module["own_seconds"] for module in imports["modules"])
    assert sum(imports["owners"].values()) == pytest.approx(total, abs=1e-3)
    assert imports["owners"]["handler"] >= 0.08
    assert all(0 <= module["began_seconds"] <= module["ended_seconds"] for module in imports["modules"])
    assert max(module["ended_seconds"] for module in imports["modules"]) <= document["first_answer_seconds"]


@pytest.mark.parametrize("place", ["absent/start.json", ".", "handler.py/start.json"])
def test_a_trace_that_cannot_be_written_is_told_before_anything_starts(project, place):
    """One line with the path and the remedy; the handler's file is not even imported, and a bad FILE leaves no trace behind."""
    status, out, err = run(project, "--trace", place)
    assert (status, out) == (1, "")
    assert err.startswith(f"coldstart: UsageError: --trace {place} cannot be written (")
    assert err.count("\n") == 1
    assert not (project.folder / "absent").exists()


def test_a_start_that_fails_keeps_an_older_trace(project):
    """The file is written at the end: what was there before a failed start is still there, and nothing where nothing was."""
    older = project.folder / "older.json"
    older.write_text("older")
    for name in ("older.json", "newer.json"):
        assert run(project, "--trace", name, "--input", "{bad")[0] == 1
    assert older.read_text() == "older"
    assert not (project.folder / "newer.json").exists()


# --- the trace -------------------------------------------------------------------------------------------------------


def check_structure(events):
    """Fields that the format asks for, whole microseconds, names for all tracks, and events of a track that nest."""
    tracks = {}
    for event in events:
        assert event["ph"] in ("X", "i", "M")
        assert isinstance(event["name"], str)
        assert event["name"]
        assert isinstance(event["ts"], int)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert isinstance(event["dur"], int)
            assert event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "i":
            assert event["s"] in ("g", "p", "t")
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert set(tracks) <= named
    assert {pid for pid, _ in tracks} <= {event["pid"] for event in events if event["name"] == "process_name"}
    for stretches_of_track in tracks.values():
        for index, (began, ended) in enumerate(stretches_of_track):
            for other_began, other_ended in stretches_of_track[index + 1 :]:
                apart = other_ended <= began or ended <= other_began
                within = began <= other_began <= other_ended <= ended or other_began <= began <= ended <= other_ended
                assert apart or within


def made_document(**changes):
    """What ``coldstart run --json --timeline`` prints, as far as tables and trace look at it."""
    start = {
        "name": "made", "kind": "restored", "reason": "", "generation": 2, "pid": 77, "engines": ["process"],
        "ready_seconds": 0.9, "process_start_resolution_seconds": 0.01, "bytes": {"raw": 5, "stored": 4, "fetched": 4},
        "phases": [
            {"name": "weight_load", "began_seconds": 0.5, "ended_seconds": 0.8, "skipped": ""},
            {"name": "custom_init", "began_seconds": 0.8, "ended_seconds": 0.8, "skipped": "no init="},
        ],
        "spans": [
            {"name": "key from source", "track": "main", "began_seconds": 0.2, "ended_seconds": 0.21},
            {"name": "look up", "track": "fetch", "began_seconds": 0.1, "ended_seconds": 0.3},
            {"name": "look up", "track": "fetch", "began_seconds": 0.2, "ended_seconds": 0.4},
            {"name": "import handler", "track": "main", "began_seconds": 0.21, "ended_seconds": 0.5},
            {"name": "build", "track": "main", "began_seconds": 0.6, "ended_seconds": 0.7},
        ],
    }  # fmt: skip
    imports = {"began_seconds": 0.1, "handler": "h", "owners": {}, "packages": [], "modules": []}
    return {"first_answer_seconds": 1.0, "imports": imports, "start": {**start, **changes}}


def test_fetches_that_overlap_get_tracks_of_their_own():
    """What overlaps without lying in one another cannot be on one track; what was skipped is on none."""
    events = trace_of(made_document())["traceEvents"]
    check_structure(events)
    look_ups = [event["tid"] for event in events if event["name"] == "look up"]
    assert len(set(look_ups)) == 2
    assert "custom_init" not in [event["name"] for event in events]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == [
        "worker made (pid 77)", "fetch (engine: process)", "main", "fetch", "fetch (2)", "phases",
    ]  # fmt: skip


def test_times_are_microseconds_since_the_process_began():
    """0.21 s to 0.5 s is ``ts`` 210000 and ``dur`` 290000; without imports nothing is said of the interpreter."""
    document = made_document()
    del document["imports"]
    events = trace_of(document)["traceEvents"]
    (imported,) = (event for event in events if event["name"] == "import handler")
    assert (imported["ts"], imported["dur"]) == (210_000, 290_000)
    assert min(event["ts"] for event in events if event["ph"] == "X") == 100_000


# --- the tables ------------------------------------------------------------------------------------------------------


def test_stretches_have_no_gap_and_no_overlap():
    """From the spawn to the first answer every moment is in one row; what lies within a row has none of its own."""
    rows = stretches(made_document())
    assert [(name, round(began, 3), round(ended, 3)) for name, began, ended in rows] == [
        ("interpreter and the command's first lines", 0.0, 0.1),
        ("before key from source", 0.1, 0.2),
        ("key from source", 0.2, 0.21),
        ("import handler", 0.21, 0.5),
        ("weight_load", 0.5, 0.8),
        ("first answer", 0.8, 1.0),
    ]


def test_modules_without_bytecode_are_told_with_the_remedy():
    """Compiling at every start is the dearest import of all, and the easiest to be rid of."""
    document = made_document()
    module = {
        "name": "a",
        "importer": "h",
        "owner": "handler",
        "began_seconds": 0.3,
        "ended_seconds": 0.4,
        "own_seconds": 0.1,
    }
    document["imports"]["modules"] = [{**module, "compiled": True}, {**module, "compiled": False}]
    assert "  1 of the modules had no bytecode and were compiled first: let it be written (unset PYTHON" in tables(
        document
    )
    document["imports"]["modules"] = [{**module, "compiled": False}]
    assert "bytecode" not in tables(document)


# --- sums ------------------------------------------------------------------------------------------------------------

LOADS = [
    Load("h", "coldstart.loading", 0, 1, 10.0, 20.0),
    Load("torch", "h", 1, 1, 11.0, 16.0),
    Load("torch.nn", "torch", 1, 1, 12.0, 13.0),
    Load("sympy", "torch", 1, 1, 13.0, 15.0),
    Load("sympy.core", "sympy", 1, 1, 13.5, 14.5),
    Load("coldstart.api", "h", 2, 1, 17.0, 18.0),
    Load("inspect", "coldstart.api", 1, 1, 17.25, 17.75),
    Load("argparse", "coldstart.cli", 1, 1, 8.0, 9.0),
    Load("tokenizers", "h", 9, 2, 14.0, 17.0),
]


def test_own_times_and_owners():
    """Own time is without what a module imported; an import counts to whoever asked for it, a runtime to itself."""
    modules = {module.load.name: (module.owner, module.own_seconds) for module in modules_of(LOADS, handler="h")}
    assert modules == {
        "argparse": ("coldstart", 1.0),
        "h": ("handler", 4.0),
        "torch": ("runtime", 2.0),
        "torch.nn": ("runtime", 1.0),
        "sympy": ("runtime", 1.0),
        "sympy.core": ("runtime", 1.0),
        "coldstart.api": ("coldstart", 0.5),
        "inspect": ("coldstart", 0.5),
        "tokenizers": ("handler", 3.0),
    }
    assert seconds_of(modules_of(LOADS, handler="h")) == {"coldstart": 2.0, "handler": 7.0, "runtime": 5.0}


def test_packages_add_up():
    """A package costs what its outermost modules cost; a module within another of its package is not counted again."""
    packages = {
        each.name: (each.modules, each.seconds, each.own_seconds)
        for each in packages_of(modules_of(LOADS, handler="h"))
    }
    assert packages["torch"] == (2, 5.0, 3.0)
    assert packages["sympy"] == (2, 2.0, 2.0)
    assert next(iter(packages)) == "h"


def test_covered_time_counts_once():
    """Nested, parallel and cut-off stretches: a moment is covered or it is not."""
    assert covered_seconds([(1.0, 3.0), (1.5, 2.0), (2.5, 4.0), (6.0, 9.0)], 2.0, 7.0) == pytest.approx(3.0)
    assert covered_seconds([], 0.0, 1.0) == 0.0


# --- the watch -------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A watch that has begun, and a function that writes a module where it can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    watch = ImportWatch().begin()
    yield watch, write
    watch.end()
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_watch_sees_who_imports_what(watched):
    """Module, importer, line and thread, the inner import first; the module is left as its loader made it."""
    watch, write = watched
    write("watched_outer", "x = 1\nimport watched_inner\n")
    write("watched_inner", "")
    import watched_outer

    assert [(load.name, load.importer, load.line) for load in watch.loads][:2] == [
        ("watched_inner", "watched_outer", 2),
        ("watched_outer", __name__, watch.loads[1].line),
    ]
    assert {load.thread for load in watch.loads} == {threading.get_ident()}
    inner, outer = watch.loads
    assert outer.began_seconds <= inner.began_seconds <= inner.ended_seconds <= outer.ended_seconds
    assert set(vars(watched_outer.__loader__)) == {"name", "path"}


def test_a_failed_import_is_seen_and_fails_as_ever(watched):
    """The error passes through, and the time that it took is taken down."""
    watch, write = watched
    write("watched_failing", "1 / 0")
    with pytest.raises(ZeroDivisionError):
        import watched_failing  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        import watched_absent  # noqa: F401
    assert [load.name for load in watch.loads] == ["watched_failing"]


def test_looking_for_a_module_is_no_import(watched):
    """``find_spec`` alone takes nothing down, and a module that is loaded later begins when it is loaded."""
    from importlib.util import find_spec, module_from_spec

    watch, write = watched
    write("watched_later", "")
    write("watched_between", "")
    spec = find_spec("watched_later")
    import watched_between  # noqa: F401

    between = time.monotonic()
    spec.loader.exec_module(module_from_spec(spec))
    assert [load.name for load in watch.loads] == ["watched_between", "watched_later"]
    assert watch.loads[1].began_seconds >= between


def test_the_watch_and_a_hub_watch_find_through_each_other(watched):
    """A finder that others find for, put before the watch, does not go round in circles, and both do their work."""
    watch, write = watched
    write("watched_hub", "")
    ran = []
    caches.before_import("watched_hub", lambda: ran.append(True))
    import watched_hub  # noqa: F401

    assert ran == [True]
    assert [load.name for load in watch.loads] == ["watched_hub"]


def test_after_its_end_the_watch_sees_nothing(watched):
    """An ended watch is no finder any more."""
    watch, write = watched
    write("watched_after", "")
    watch.end()
    import watched_after  # noqa: F401

    assert watch.loads == []
