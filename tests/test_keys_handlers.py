"""Handlers as their file shows them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coldstart.errors import HandlerError
from coldstart.keys import COMPUTED, find_handlers
from tests.key_project import HANDLER, START, Project, project_in, uncomputable

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A folder for a handler and its modules."""
    with project_in(tmp_path, monkeypatch) as made:
        yield made


SPELLINGS = [
    ("from coldstart import coldstart", "coldstart"),
    ("from coldstart import coldstart as cs", "cs"),
    ("import coldstart", "coldstart.coldstart"),
    ("import coldstart as c", "c.coldstart"),
    ("from coldstart.decorator import coldstart", "coldstart"),
    ("import coldstart.decorator", "coldstart.decorator.coldstart"),
    ("from coldstart import *", "coldstart"),
    ("try:\n    from coldstart import coldstart\nexcept ImportError:\n    raise", "coldstart"),
]


@pytest.mark.parametrize(("statement", "decorator"), SPELLINGS)
def test_handlers_are_found_under_every_spelling(project: Project, statement: str, decorator: str) -> None:
    """Decorated functions are found whatever coldstart is called in the file."""
    project.write(
        f"{statement}\ndef load(ctx): return 1\n@{decorator}('m', load=load)\ndef serve(event, model): return model\n"
    )
    (handler,) = find_handlers(project.path)
    assert (handler.name, handler.attribute, handler.line, handler.is_class) == (
        "m",
        "serve",
        project.line("def serve"),
        False,
    )
    assert project.before()[""].parts["load"]


def test_several_handlers_are_found_in_order(project: Project) -> None:
    """Functions, classes and assignments are all found, in the order of the file, with their attributes."""
    project.write(
        START
        + """
NAME = "second"
def load(ctx): return 1
@coldstart("first", load=load)
def a(event, model): return model
@coldstart(NAME)
class B:
    def load(self, ctx): self.x = 1
    def handle(self, event): return 1
if NAME:
    c = coldstart(name="third", load=load)(a)
def inside():
    @coldstart("hidden", load=load)
    def d(event, model): return model
@other("not ours", load=load)
def e(event, model): return model
coldstart("unapplied", load=load)
f: int
"""
    )
    found = [(h.name, h.attribute, h.is_class, set(h.parts)) for h in find_handlers(project.path)]
    assert found == [("first", "a", False, {""}), ("second", "B", True, {""}), ("third", "c", False, {""})]


def test_literal_options_are_read_and_others_marked(project: Project) -> None:
    """env, secrets, version and files come as values, None where absent, COMPUTED where only the import knows."""
    project.write(
        START
        + """
@coldstart("a", load=f, env=["A", "B"], secrets=("S",), version="3", files={"t.json": "assets/t.json"})
def a(event, model): return model
@coldstart("b", load=f)
def b(event, model): return model
@coldstart(f"c{1}", load=f, env=names(), secrets=[name()], version=str(3), files={"t": path(), **more})
def c(event, model): return model
@coldstart("d", load=f, files={key: "x"}, env={"A"}, version=-1)
def d(event, model): return model
"""
    )
    a, b, c, d = find_handlers(project.path)
    assert (a.env, a.secrets, a.version, a.files) == (["A", "B"], ("S",), "3", {"t.json": "assets/t.json"})
    assert (b.env, b.secrets, b.version, b.files) == (None, None, None, None)
    assert (c.name, c.env, c.secrets, c.version, c.files) == (None, COMPUTED, COMPUTED, COMPUTED, COMPUTED)
    assert (d.env, d.version, d.files) == (["A"], -1, COMPUTED)
    assert repr(COMPUTED) == "COMPUTED"


@pytest.mark.parametrize(("text", "line"), [("x = 1\ny = (\n", 2), ("def f(:\n", 1), ("x = '\0'\n", 1)])
def test_a_handler_file_that_is_not_python_is_named(project: Project, text: str, line: int) -> None:
    """A syntax error gives the file and the line."""
    project.write(text)
    with pytest.raises(HandlerError, match=rf"handler\.py:{line}: not valid Python"):
        find_handlers(project.path)


def test_a_missing_handler_file_is_named(project: Project) -> None:
    """A path that cannot be read says so."""
    with pytest.raises(HandlerError, match=r"cannot read .*handler\.py"):
        find_handlers(project.path)


def test_code_nested_too_deeply_is_refused_with_the_remedy(project: Project) -> None:
    """A reached expression that would exhaust the stack has no key, rather than ending the worker."""
    project.write(START + "def load(ctx): return " + "+".join(["1"] * 2500) + HANDLER)
    assert 'version="1"' in uncomputable(project.before)


def test_source_in_another_encoding_is_read(project: Project) -> None:
    """An encoding cookie and a byte-order mark are understood, as by the import."""
    Path(project.path).write_bytes(
        b"# coding: latin-1\nX = '\xe9'\n" + (START + "def load(ctx): return X" + HANDLER).encode()
    )
    latin = project.key()
    Path(project.path).write_bytes(
        b"\xef\xbb\xbf" + ("X = '\u00e9'\n" + START + "def load(ctx): return X" + HANDLER).encode()
    )
    assert project.key() == latin
