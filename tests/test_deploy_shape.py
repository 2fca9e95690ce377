"""The shape of a handler, read from its file's syntax tree alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from coldstart.definition import definition_of
from coldstart.deploy.shape import HandlerShape, read_shape
from coldstart.errors import HandlerError
from coldstart.loading import import_file

HANDLERS = Path(__file__).parent.parent / "handlers"
HEAD = "import a_module_that_nobody_has\nfrom coldstart import coldstart, Warmup\n"


def shape(folder, text, name=None):
    """The shape of a handler in a file with this text, whose imports cannot be run here."""
    path = folder / "handler.py"
    path.write_text(HEAD + text)
    return read_shape(str(path), name)


def test_everything_literal_is_read_without_running_the_file(tmp_path):
    """Name, kind, concurrency, variables, files and warm-up inputs come from a file that could not be imported."""
    found = shape(
        tmp_path,
        "LIMIT = 4\n"
        "@coldstart('m', load=one, env=['A'], secrets=('B',), files={'v.txt': 'assets/v.txt'}, concurrency=LIMIT,\n"
        "           warmup=[{'x': [1, -2]}, None])\n"
        "def handler(event, model): ...\n",
    )
    assert found == HandlerShape(
        "m", "handler", "sync", {}, 4, ("A",), ("B",), {"v.txt": "assets/v.txt"}, ({"x": [1, -2]}, None)
    )
    assert "a_module_that_nobody_has" not in sys.modules


@pytest.mark.parametrize(
    ("definition", "kind"),
    [
        ("def handler(event, model): return 1", "sync"),
        ("def handler(event, model): yield 1", "generator"),
        ("def handler(event, model):\n    for x in y:\n        z = yield from x", "generator"),
        ("async def handler(event, model): return 1", "async"),
        ("async def handler(event, model):\n    yield 1", "async_generator"),
        ("def handler(event, model):\n    def inner(): yield 1\n    return list(inner())", "sync"),
        ("def handler(event, model):\n    return [lambda: (yield), *(x for x in y)]", "sync"),
    ],
)
def test_the_kind_is_that_of_the_functions_own_body(tmp_path, definition, kind):
    """What a function is shows in its own body; functions inside it do not count."""
    assert shape(tmp_path, f"@coldstart('m', load=one)\n{definition}\n").kind == kind


@pytest.mark.parametrize("name", ["digits", "fanout", "minilm", "sentences", "stream"])
def test_the_shape_is_what_importing_gives(name, forgotten_imports):
    """For the examples, the shape says what the imported definition says."""
    path = HANDLERS / f"{name}.py"
    found = read_shape(str(path))
    if name in ("minilm", "sentences"):
        pytest.importorskip("torch")
    definition = definition_of(getattr(import_file(str(path)), found.attribute))
    assert (found.name, found.kind, found.concurrency) == (definition.name, definition.kind, definition.concurrency)
    assert (found.env, found.secrets, found.files) == (definition.env, definition.secrets, definition.files)
    assert found.warmup_inputs == definition.warmup.inputs


def test_a_class_shows_its_handle_and_its_further_methods(tmp_path):
    """In class form the kind is that of handle; further public methods have kinds too, those of bases in the file included."""
    found = shape(
        tmp_path,
        "class Base:\n"
        "    def shared(self): yield 1\n"
        "    def init(self): ...\n"
        "@coldstart('m', warmup=Warmup([1], iterations=2))\n"
        "class Model(Base):\n"
        "    def load(self): ...\n"
        "    async def handle(self, event): yield event\n"
        "    async def count(self): return 1\n"
        "    def plain(self): return 1\n"
        "    def _private(self): ...\n"
        "    @property\n"
        "    def size(self): return 1\n",
    )
    assert (found.attribute, found.kind, found.warmup_inputs) == ("Model", "async_generator", (1,))
    assert found.methods == {"count": "async", "plain": "sync", "shared": "generator"}


def test_a_call_that_decorates_is_a_handler_too(tmp_path):
    """``handler = coldstart(...)(function)`` is read like the decorator, of a lambda too."""
    text = "def work(event, model): yield 1\nhandler = coldstart('m', load=one)(work)\nother = coldstart('n', load=one)(lambda e, m: 1)\n"
    assert shape(tmp_path, text, "m")[:3] == ("m", "handler", "generator")
    assert shape(tmp_path, text, "other")[:3] == ("n", "other", "sync")


def test_what_is_computed_has_a_default_where_nobody_needs_it(tmp_path):
    """Computed inputs, files, env and concurrency are left out; the handler can be deployed all the same."""
    found = shape(
        tmp_path,
        "@coldstart('m', load=one, warmup=inputs(), files=files(), env=env(), concurrency=limit())\n"
        "def handler(event, model): ...\n",
    )
    assert found == HandlerShape("m", "handler", "sync", {}, 1, (), (), {}, ())


TWO = "@coldstart('a', load=one)\ndef first(e, m): ...\n@coldstart('b', load=one)\ndef second(e, m): ...\n"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("x = 1\n", None, "shows no handler at its top level"),
        (TWO, None, "has 2 handlers; choose one with FILE:NAME (there: a, b)"),
        (TWO, "c", "has no handler 'c'; choose one with FILE:NAME (there: a, b)"),
        (
            "@coldstart(NAME(), load=one)\ndef handler(e, m): ...\n",
            None,
            "handler.py:4: the name of handler 'handler' is computed",
        ),
        ("@coldstart('m', load=one, secrets=names())\ndef handler(e, m): ...\n", None, "secrets= of 'm' is computed"),
        ("@coldstart('a b', load=one)\ndef handler(e, m): ...\n", None, "'a b' cannot name a handler"),
        ("from x import work\nhandler = coldstart('m', load=one)(work)\n", None, "is not defined in this file"),
        ("@coldstart('m')\nclass Model: ...\n", None, "class Model shows no method handle(self, event)"),
        ("def broken(:\n", None, "handler.py:3: not valid Python"),
    ],
)
def test_what_deploying_cannot_do_without_is_asked_for(tmp_path, text, name, message):
    """A missing, ambiguous or computed handler is an error that says where and what to write."""
    with pytest.raises(HandlerError, match=re.escape(message)):
        shape(tmp_path, text, name)


def test_a_handler_is_chosen_by_its_name_or_its_variable(tmp_path):
    """Of several handlers, the name or the variable chooses."""
    assert shape(tmp_path, TWO, "b").attribute == "second"
    assert shape(tmp_path, TWO, "first").name == "a"


def test_each_branch_of_a_file_keeps_its_own_options(tmp_path):
    """Where a variable is bound in two branches, each handler has the options of its own call."""
    text = (
        "if x:\n    @coldstart('a', load=one, concurrency=2)\n    def handler(e, m): ...\n"
        "else:\n    @coldstart('b', load=one, concurrency=3)\n    async def handler(e, m): ...\n"
    )
    assert [shape(tmp_path, text, name)[2:5] for name in "ab"] == [("sync", {}, 2), ("async", {}, 3)]
