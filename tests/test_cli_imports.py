"""``coldstart imports``: who needs an import, what it costs, and what a file that cannot be imported gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coldstart.cli import bench, main
from coldstart.cli.imports import report, warning_of
from coldstart.errors import HandlerError
from coldstart.imports.costs import measure_imports
from coldstart.imports.needs import read_needs
from tests.test_bench import made_trial

ROOT = Path(__file__).parent.parent
HEAD = "from __future__ import annotations\nimport heavy\nfrom coldstart import coldstart\n"
TAIL = """
@coldstart("mine", load=load, build=build, init=init, warmup=[1])
def handler(event, model):
    return model
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch, tmp_path):
    """Children find the same coldstart; a store is named, so that touching it would be seen."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLDSTART_STORE", str(tmp_path / "store"))


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path."""

    def to_file(text, name="imports_of_cli.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return to_file


@pytest.fixture
def command(capsys):
    """Runs ``coldstart`` in this process: exit status, standard output and error."""

    def run(*words):
        status = main(list(words))
        return (status, *capsys.readouterr())

    return run


def hooks(load="return 1", build="return 1", init="return model", more=""):
    """A handler's file that imports ``heavy``, with these bodies."""
    defined = f"def load(ctx):\n    {load}\ndef build(ctx):\n    {build}\ndef init(ctx, model):\n    {init}\n"
    return HEAD + more + "\n" + defined + TAIL


# --- who needs it ----------------------------------------------------------------------------------------------------

NEEDED = {
    "load alone": (hooks(load="return heavy.make()"), {"load"}),
    "load through a helper": (hooks(load="return made()", more="def made(): return heavy.make()"), {"load"}),
    "load and build": (hooks(load="return heavy.a()", build="return heavy.b()"), {"load", "build"}),
    "load and init": (hooks(load="return heavy.a()", init="return heavy.b()"), {"load", "init"}),
    "a helper that init shares": (
        hooks(load="return made()", init="return made()", more="def made(): return heavy.make()"),
        {"load", "init"},
    ),
    "the handler": (
        hooks(load="return heavy.a()", init="return 1").replace("return model", "return heavy.b()"),
        {"load", "handler"},
    ),
    "a statement of the module": (hooks(load="return heavy.a()", more="SIZE = heavy.size"), {"load", "the module"}),
    "a default value": (hooks(load="return heavy.a()", more="def f(x=heavy.x): ..."), {"load", "the module"}),
    "a decorator": (hooks(load="return heavy.a()", more="@heavy.wrap\ndef f(): ..."), {"load", "the module"}),
    "a class that load makes": (
        hooks(load="return Net()", more="class Net:\n    def run(self): return heavy.b()"),
        {"load", "class Net"},
    ),
    "a function that no handler reaches": (
        hooks(load="return heavy.a()", more="def other(): return heavy.b()"),
        {"load", "the module"},
    ),
    "only python FILE": (
        hooks(load="return heavy.a()")
        + 'if __name__ == "__main__":\n    print(heavy.b())\n    coldstart.serve(handler)\n',
        {"load", "the module"},
    ),
    "nobody": (hooks(), set()),
    "a name of its own in load": (hooks(load="heavy = 1; return heavy"), set()),
    "an import of its own in load": (hooks(load="import heavy; return heavy.a()"), set()),
    "an annotation, which is not evaluated": (
        hooks(load="return heavy.a()", more="def noted(x: heavy.X) -> heavy.Y: ..."),
        {"load"},
    ),
    "an annotation, which is evaluated": (
        hooks(load="return heavy.a()", more="def noted(x: heavy.X): ...").replace(
            "from __future__ import annotations\n", ""
        ),
        {"load", "the module"},
    ),
    "a lambda": (HEAD + '@coldstart("m", load=lambda: heavy.make())\ndef handler(event, model): ...\n', {"load"}),
    "a partial over it, made by the module": (
        HEAD
        + 'from functools import partial\n@coldstart("m", load=partial(heavy.make, 1))\ndef handler(event, m): ...\n',
        {"load", "the module"},
    ),
    "named parts": (
        HEAD
        + 'def a(): return heavy.a()\n@coldstart("m", load={"a": a, "b": lambda: 1})\ndef handler(event, m): ...\n',
        {"load"},
    ),
    "an applied function": (
        HEAD + 'def f(event, m): return 1\nhandler = coldstart("m", load=lambda: heavy.make())(f)\n',
        {"load"},
    ),
    "load of a class": (
        HEAD + '@coldstart("m")\nclass C:\n    def load(self): self.x = self._made()\n'
        "    def _made(self): return heavy.make()\n    def handle(self, event): return self.x\n",
        {"load"},
    ),
    "handle of a class": (
        HEAD + '@coldstart("m")\nclass C:\n    def load(self): self.x = heavy.a()\n'
        "    def handle(self, event): return heavy.b(self.x)\n",
        {"load", "handler"},
    ),
    "a star": (hooks(load="return a()").replace("import heavy", "from heavy import *"), {"the module"}),
}


@pytest.mark.parametrize(("text", "users"), NEEDED.values(), ids=NEEDED)
def test_who_uses_an_import_is_read_from_the_source(text, users, write):
    """Whoever runs the code that names it, directly or through functions of the file; in doubt, more of them."""
    found = [need for need in read_needs(write(text)) if need.modules == ("heavy",)]
    assert [need.users for need in found] == [users]


def test_imports_in_branches_count_and_those_for_checkers_do_not(write):
    """What an import of the file may run is listed, in order; what only type checkers or ``python FILE`` see is not."""
    text = (
        "from typing import TYPE_CHECKING\ntry:\n    import first\nexcept ImportError:\n    import second as first\n"
        "if TYPE_CHECKING:\n    import third\nif __name__ == '__main__':\n    import fourth\nimport a.b, c\n"
    )
    needs = read_needs(write(text))
    assert [(need.line, need.modules) for need in needs] == [
        (1, ("typing",)), (3, ("first",)), (5, ("second",)), (10, ("a.b", "c")),
    ]  # fmt: skip
    assert needs[0].users == {"the module"}


def test_with_a_name_other_handlers_count_as_users(write):
    """What only ``load`` of another handler in the file uses is not for this one's ``load`` alone."""
    text = HEAD + "".join(
        f'@coldstart("{name}", load=lambda: heavy.{name}())\ndef of_{name}(event, model): ...\n'
        for name in ("one", "two")
    )
    path = write(text)
    assert read_needs(path)[0].users == {"load"}
    assert read_needs(path, "one")[0].users == read_needs(path, "of_one")[0].users == {"load", "handler of_two"}
    with pytest.raises(HandlerError, match=r"no handler 'three'.*there: of_one, of_two"):
        read_needs(path, "three")


# --- what it costs ---------------------------------------------------------------------------------------------------

SLOW = "import time\ntime.sleep({seconds})\ndef make(): return 1\n"


def slow_project(write, *, seconds=0.15):
    """A file with an import that takes a while and only ``load`` needs, one that ``init`` needs, and ``prefetch``."""
    write(SLOW.format(seconds=seconds), "heavy.py")
    write(SLOW.format(seconds=0.05), "needed.py")
    text = hooks(load="open('loaded', 'w'); return heavy.make()", init="return needed.make()")
    text = text.replace("import heavy\n", "import heavy\nimport (needed)\n".replace("(needed)", "needed"))
    return write(text.replace("coldstart\n\n", "coldstart\ncoldstart.prefetch('mine')\n\n", 1))


def test_costs_are_those_of_each_line(write, tmp_path, monkeypatch):
    """A row takes at least what its module sleeps, the sum is the whole, and no worker starts: no load, no store."""
    monkeypatch.chdir(tmp_path)
    costs = measure_imports(slow_project(write), runs=1)
    by_module = {cost.need.modules[0]: cost.seconds for cost in costs.costs}
    assert by_module["heavy"] >= 0.15
    assert by_module["needed"] >= 0.05
    assert sum(by_module.values()) + costs.own_seconds == pytest.approx(costs.seconds, abs=1e-3)
    assert costs.without_seconds is not None
    assert not (tmp_path / "loaded").exists()
    assert not (tmp_path / "store").exists()


def test_a_file_without_its_imports_for_load_is_really_imported(write):
    """``without`` is a run of the file with ``pass`` in their place, wherever and however they are written."""
    write("import os\nassert not os.environ.get('ONLY'), 'imported'\n", "heavy.py")
    text = hooks(load="return heavy.make(), a, b")
    text = text.replace("import heavy\n", "x = 1; import heavy; y = 2\ntry:\n    from heavy import (\n        a,\n        b,\n    )\nexcept ImportError: a = b = 0\nassert x + y == 3\n")  # fmt: skip
    costs = measure_imports(write(text), runs=1)
    assert [cost.need.line for cost in costs.for_load] == [2, 4]
    assert costs.without_seconds is not None


def test_the_report_says_who_needs_what_and_the_remedy(write, command):
    """Rows in the file's order, each with its users or the remedy, and what the remedy brings."""
    path = slow_project(write)
    status, out, err = command("imports", path)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"importing {path} costs 0.")
    assert [line.split()[0] for line in lines[1:5]] == ["line", "2", "3", "4"]
    assert lines[2].endswith("  heavy                 used only in load: move the import into load()")
    assert lines[3].endswith("  needed                used in init")
    assert lines[-1].startswith("Without line 2 the import takes 0.")


def test_the_report_as_json(write, command):
    """``--json`` prints one document with the same rows."""
    write("def make(): ...", "heavy.py")
    status, out, err = command("imports", write(hooks(init="return heavy.make()")), "--json")
    document = json.loads(out)
    assert (status, err, document["without_seconds"]) == (0, "", None)
    rows = [(row["line"], row["modules"], row["users"], row["only_for_load"]) for row in document["imports"]]
    assert rows == [(2, ["heavy"], ["init"], False), (3, ["coldstart"], [], False)]
    assert document["seconds"] >= document["own_seconds"] >= 0


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        (
            hooks(load="return made()", more="def made(): return heavy.make()"),
            "used only in load: move the import into made()",
        ),
        (
            HEAD + '@coldstart("m", load=lambda: heavy.make())\ndef handler(event, model): ...\n',
            "used only in load: make load a function, and move the import into it",
        ),
        (
            hooks(load="return heavy.a()", more="def n(x: heavy.X): ..."),
            "; for annotations import it under if TYPE_CHECKING:",
        ),
        (hooks(more="def n(x: heavy.X): ..."), "used only in annotations: import it under if TYPE_CHECKING:"),
        (hooks(), "used nowhere in this file: needed only if importing it has an effect"),
        (
            hooks(load="return heavy.a()", build="return heavy.b()"),
            "used only in build and load: imported in them, a start with a program would not pay for it",
        ),
    ],
)
def test_the_remedy_fits_the_use(text, remedy, write):
    """The import moves into the function that names it; a lambda has to become one; annotations need none at run time."""
    write("def make(): ...", "heavy.py")
    (row,) = (line for line in report(measure_imports(write(text), runs=1)).splitlines() if "  heavy  " in line)
    assert row.endswith(remedy)


# --- what cannot be imported -----------------------------------------------------------------------------------------

TOLD = {
    "missing file": (None, "HandlerError: no file is at "),
    "syntax error": ("x = (\n", "imports_of_cli.py:1: not valid Python: '(' was never closed"),
    "missing module": (
        "\nimport absent_of_imports\n",
        "imports_of_cli.py:2: the import of the file raises ModuleNotFoundError: No module named 'absent_of_imports'",
    ),
    "raises": (
        "x = 1\nprint('noise')\n1 / 0\n",
        "imports_of_cli.py:3: the import of the file raises ZeroDivisionError: division",
    ),
    "raises several lines": ("raise ValueError('a\\n\\tb')", "raises ValueError: a b"),
    "exits": ("import sys\nsys.exit(3)\n", "imports_of_cli.py:2: the import of the file raises SystemExit: 3"),
    "dies": ("import os\nos._exit(7)\n", "imports_of_cli.py ended its process (status 7)"),
    "serves": (
        hooks() + "coldstart.serve(handler)\n",
        'importing this file serves: put the call of serve under if __name__ == "__main__":',
    ),
}


@pytest.mark.parametrize(("text", "told"), TOLD.values(), ids=TOLD)
def test_what_cannot_be_imported_is_told_in_one_line(text, told, write, command, tmp_path):
    """Whatever is wrong with the file is one line on standard error, and status 1."""
    status, out, err = command("imports", str(tmp_path / "absent.py") if text is None else write(text))
    assert (status, out) == (1, "")
    assert err.startswith("coldstart: HandlerError: ")
    assert told in err
    assert err.count("\n") == 1


# --- bench -----------------------------------------------------------------------------------------------------------


def test_bench_warns_of_what_only_load_needs(write, capsys):
    """An import for ``load`` alone that costs more than 100 ms is a warning with the remedy; on rung files there is none."""
    path = slow_project(write)

    class Report:
        trials = (made_trial("restored", 1, 1.0, start={"kind": "restored", "rung": "arrays"}),)

    bench._warn_of_imports(path, Report)
    err = capsys.readouterr().err
    assert err.startswith("warning: every start imports heavy (line 2) for 0.")
    assert err.endswith(f"and only load uses it: move the import into load() (coldstart imports {path})\n")
    Report.trials = (made_trial("restored", 1, 1.0, start={"kind": "restored", "rung": "files"}),)
    bench._warn_of_imports(path, Report)
    assert capsys.readouterr().err == ""


def test_bench_tells_what_it_could_not_measure(write, capsys):
    """A file that cannot be imported alone is a word at the end: what was measured before stands."""

    class Report:
        trials = (made_trial("restored", 1, 1.0, start={"kind": "restored", "rung": "arrays"}),)

    write("1 / 0", "heavy.py")
    bench._warn_of_imports(write(hooks(load="return heavy.a()")), Report)
    err = capsys.readouterr().err
    assert err.startswith("what the file imports could not be measured: ")
    assert "ZeroDivisionError" in err


def test_bench_does_not_warn_of_little(write):
    """An import for ``load`` alone that costs next to nothing is not worth a word."""
    write("def make(): ...", "heavy.py")
    assert warning_of(measure_imports(write(hooks(load="return heavy.make()")), runs=1)) is None
    assert warning_of(measure_imports(write(hooks(init="return heavy.make()")), runs=1)) is None


def test_the_child_starts_with_next_to_nothing(write):
    """What the file imports counts whole: of ours only the watch is there before, and none of the library's larger modules."""
    seen = "import sys\nhere = sorted(name for name in sys.modules if name in {'typing', 're', 'json', 'inspect'})\n"
    path = write(seen + "assert here == [], here\nours = [n for n in sys.modules if n.startswith('coldstart')]\n"
                 "assert len(ours) == 5, ours\n")  # fmt: skip

    assert measure_imports(path, runs=1).costs[0].need.modules == ("sys",)
