"""The public face: what can be imported, what an import costs and starts, and how the errors hang together."""

from __future__ import annotations

import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import coldstart as package
from coldstart import coldstart, errors, registry
from coldstart.loading import import_file

ROOT = Path(__file__).parent.parent
HEAVY = (
    "dataclasses",
    "inspect",
    "typing",
    "asyncio",
    "threading",
    "pathlib",
    "json",
    "coldstart.worker",
    "coldstart.registry",
)


def in_fresh_interpreter(code, **environment):
    """The last line that ``code`` prints in an isolated interpreter, as JSON. ``before`` are the modules it starts with."""
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", head + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- names -----------------------------------------------------------------------------------------------------------


def test_all_is_what_can_be_imported():
    """``__all__`` is sorted and whole: each name is there, a checker sees the same ones, and ``dir`` lists them."""
    tree = ast.parse(Path(package.__file__).read_text())
    seen_by_checkers = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("coldstart.")
        for alias in node.names
    }
    assert sorted(package.__all__) == package.__all__ == dir(package)
    assert seen_by_checkers == set(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)


def test_a_star_import_brings_all():
    """``from coldstart import *`` gives every public name and nothing else."""
    names: dict[str, object] = {}
    exec("from coldstart import *", names)
    assert set(names) - {"__builtins__"} == set(package.__all__)


def test_an_unknown_name_is_an_attribute_error():
    """A name that is not public is missing in the ordinary way, so ``hasattr`` and ``from ... import`` work."""
    assert not hasattr(package, "nothing")
    with pytest.raises(ImportError, match="nothing"):
        exec("from coldstart import nothing")


def test_testing_exports_what_it_lists():
    """Every name of ``coldstart.testing`` is there, and others are missing in the ordinary way."""
    from coldstart import testing

    assert all(getattr(testing, name) is not None for name in testing.__all__)
    assert set(testing.__all__) == set(testing._HOMES)
    assert not hasattr(testing, "nothing")


def test_the_decorator_carries_the_functions():
    """One import is enough: ``coldstart.serve``, ``.prefetch`` and ``.subscribe`` hang on the decorator too."""
    for name in ("serve", "prefetch", "subscribe"):
        assert callable(getattr(coldstart, name))
        assert getattr(coldstart, name).__doc__


# --- imports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["import coldstart", "from coldstart import coldstart"])
def test_importing_is_light(statement):
    """An import loads a handful of modules, none of them another package's and none of the heavy ones."""
    new = in_fresh_interpreter(
        f"{statement}\nloaded = sorted(set(sys.modules) - before)\nimport json; print(json.dumps(loaded))"
    )
    foreign = [name for name in new if name.partition(".")[0] not in ("coldstart", *sys.stdlib_module_names)]
    assert (foreign, [name for name in HEAVY if name in new]) == ([], [])
    assert len(new) < 10


DECORATING = """
from coldstart import Policy, Warmup, coldstart
events = []
sys.addaudithook(lambda name, arguments: events.append(name))

@coldstart("one", load=lambda: 1, build=lambda: 1, init=lambda ctx, state: state, close=print, version="1",
           warmup=Warmup([1]), files={"a": "b"}, env=["A"], secrets=["B"], kinds={"a": "other"}, policy=Policy())
def one(event, model):
    return model

@coldstart("two")
class Two:
    def load(self): ...
    def handle(self, event): ...
    def more(self): ...

begun = [name for name in events if name not in ("object.__getattr__", "object.__setattr__", "compile", "exec")]
loaded = [name for name in %r if name in sys.modules and name not in before]
import json, os, threading
print(json.dumps([begun, loaded, threading.active_count(), os.path.exists(os.environ["COLDSTART_STORE"])]))
"""


def test_decorating_starts_nothing(tmp_path):
    """Decorating opens no file, starts no thread, loads no worker and leaves the store alone."""
    found = in_fresh_interpreter(DECORATING % (HEAVY,), COLDSTART_STORE=str(tmp_path / "store"))
    assert found == [[], [], 1, False]


# --- prefetch and subscribe ------------------------------------------------------------------------------------------

PREFETCHING = """
from coldstart import coldstart, prefetch
{call}("early")
@coldstart("early", load=lambda: 1)
def handler(event, model):
    return model
"""


@pytest.mark.usefixtures("forgotten_imports")
@pytest.mark.parametrize("call", ["prefetch", "coldstart.prefetch"])
def test_prefetch_begins_the_start_of_the_calling_file(call, tmp_path, monkeypatch):
    """Called above the heavy imports, it reads the file that calls it and begins what its handler will need."""
    monkeypatch.setenv("COLDSTART_STORE", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("COLDSTART_LOG", "off")
    path = tmp_path / f"{call.replace('.', '_')}_handler.py"
    path.write_text(PREFETCHING.format(call=call))
    module = import_file(str(path))
    restoration = registry._registry.early["early"].restorations[""]
    assert module.handler({"input": 0}) == 1
    assert [part.restoration for part in registry._registry.workers["early"]._parts.parts] == [restoration]


@pytest.mark.usefixtures("forgotten_imports")
def test_prefetch_does_nothing_where_multiprocessing_imports_again(tmp_path, monkeypatch):
    """In a process that multiprocessing spawned, the main file is imported for its functions: no worker starts there."""
    monkeypatch.setenv("COLDSTART_STORE", f"file://{tmp_path / 'store'}")
    path = tmp_path / "main_handler.py"
    path.write_text(PREFETCHING.format(call="prefetch"))
    runpy.run_path(str(path), run_name="__mp_main__")
    assert registry._registry.early == {}


def test_subscribers_hear_the_past_and_the_present(monkeypatch):
    """A subscriber is given the events there were and those to come, until it ends its subscription."""
    monkeypatch.setenv("COLDSTART_LOG", "off")
    heard = []
    handler = coldstart("heard", load=lambda: 1)(lambda event, model: model)
    handler({"input": 0})
    end = coldstart.subscribe(heard.append)

    def states():
        return [event.new for event in heard if type(event).__name__ == "StateChanged" and event.name == "heard"]

    assert states() == ["starting", "ready"]
    handler.__coldstart__.ready_worker.close()
    assert states() == ["starting", "ready", "closing", "closed"]
    end()
    before = len(heard)
    coldstart("unheard", load=lambda: 1)(lambda event, model: model)({"input": 0})
    assert len(heard) == before


# --- errors ----------------------------------------------------------------------------------------------------------


def drawn_tree():
    """Error name -> its parent's, as the docstring of ``coldstart.errors`` draws it."""
    parents: dict[str, str] = {}
    path = ["ColdstartError"]
    for line in errors.__doc__.splitlines():
        if "+--" in line:
            depth = line.index("+--") // 4
            name = line.split("+--")[1].split()[0]
            path[depth:] = [name]
            parents[name] = path[depth - 1]
    return parents


def test_the_drawn_tree_is_the_tree():
    """The picture has every error with its real parent, and no other."""
    real = {
        name: value.__base__.__name__
        for name, value in vars(errors).items()
        if isinstance(value, type) and value is not errors.ColdstartError
    }
    assert len(real) > 20
    assert drawn_tree() == real


def test_no_error_is_defined_elsewhere():
    """Every ColdstartError that coldstart raises is in the tree; only the testing seams have one of their own."""
    known = {"ColdstartError", *drawn_tree()}
    elsewhere = [
        f"{path.name}: {node.name}"
        for path in sorted((ROOT / "coldstart").rglob("*.py"))
        if path.name != "errors.py" and "testing" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases} & known
    ]
    assert elsewhere == []


def test_errors_carry_what_they_are_about():
    """Snapshot, key and phase are attributes; those that know more have it as attributes too."""
    error = errors.StoreError("text", snapshot="s", key="k", phase="weight_load")
    assert (str(error), error.snapshot, error.key, error.phase) == ("text", "s", "k", "weight_load")
    assert errors.StateMismatchError("text", differences=["a", "b"]).differences == ("a", "b")
    assert errors.UncapturableError("text", path="model.head").path == "model.head"
