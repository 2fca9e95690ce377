"""What a handler class's key depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.key_project import START, Project, project_in, uncomputable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A folder for a handler and its modules."""
    with project_in(tmp_path, monkeypatch) as made:
        yield made


CLASS = """
SIZE = 3
def helper(): return SIZE
class Base:
    width = 1
    def make(self): return self.width
    def unused(self): return 1
@coldstart("m", warmup=[1])
class handler(Base):
    depth = 2
    size: int = 4
    def load(self, ctx):
        self.model = (self.make(), helper(), self.size, self.each())
    def each(self): return [self.kind for _ in ()]
    @property
    def kind(self): return "kind"
    def init(self, ctx): self.tokenizer = "t"
    def handle(self, event): return self.model, self.depth
"""


@pytest.mark.parametrize(
    "edit",
    [
        ("SIZE = 3", "SIZE = 4"),
        ("width = 1", "width = 2"),
        ("return self.width", "return -self.width"),
        ("= 4", "= 5"),
        ('"kind"', '"sort"'),
        ("self.model = (", "self.state = ("),
        ("class handler(Base)", "class handler(Base, object)"),
    ],
)
def test_class_form_holds_what_load_reaches_through_self(project: Project, edit: tuple[str, str]) -> None:
    """Methods and attributes that load reaches, in local bases and through helpers too, are in a class's key."""
    assert project.key(START + CLASS) != project.key(START + CLASS.replace(*edit))


@pytest.mark.parametrize(
    "edit",
    [
        ("depth = 2", "depth = 3"),
        ('"t"', '"u"'),
        ("return self.model, self.depth", "return 5"),
        ("warmup=[1]", "warmup=[2]"),
        ("def unused(self): return 1", "def unused(self): return 2"),
        ("def load", "@property\n    def more(self): return 2\n    def load"),
    ],
)
def test_class_form_leaves_out_other_members(project: Project, edit: tuple[str, str]) -> None:
    """Members that load does not reach (init, handle, close ...) can change without a new key."""
    assert project.key(START + CLASS) == project.key(START + CLASS.replace(*edit))


HEADED = """
def passed(cls): return cls
def seen(handler): return handler
class Kind(type):
    size = 1
class Base: pass
@seen
@coldstart("m")
@passed
class handler(Base, metaclass=Kind):
    def load(self, ctx): self.model = 1
    def handle(self, event): return self.model
"""


def test_class_form_holds_what_makes_the_class(project: Project) -> None:
    """Decorators that get the class itself and its metaclass count, decorators of the finished handler do not."""
    first = project.key(START + HEADED)
    assert project.key(START + HEADED.replace("return cls", "return (cls, cls)[0]")) != first
    assert project.key(START + HEADED.replace("size = 1", "size = 2")) != first
    assert project.key(START + HEADED.replace("return handler", "return (handler, handler)[0]")) == first
    assert project.key(START + HEADED.replace("@seen", "")) == first


def test_members_reached_through_super_count(project: Project) -> None:
    """What load takes from a base by super() is in the key."""
    text = """
class Base:
    def prepare(self): return 1
@coldstart("m")
class handler(Base):
    def load(self, ctx): self.model = super().prepare()
    def handle(self, event): return self.model
"""
    assert project.key(START + text) != project.key(START + text.replace("return 1", "return 2"))


def test_a_private_base_with_the_loader_counts_as_a_whole_chain(project: Project) -> None:
    """A base of a base is followed too, and a base that is named twice is looked at once."""
    text = """
class Root:
    def load(self, ctx): self.model = self.make()
class Left(Root):
    def make(self): return 1
class Right(Root): pass
@coldstart("m")
class handler(Left, Right):
    def handle(self, event): return self.model
"""
    first = project.key(START + text)
    assert project.key(START + text.replace("return 1", "return 2")) != first
    assert project.key(START + text.replace("self.make()", "(self.make())")) == first
    assert project.key(START + text.replace("self.model = ", "self.state = ")) != first


def test_class_form_takes_all_members_where_self_is_passed_on(project: Project) -> None:
    """When self leaves the method, any member may be reached, so all of them count."""
    text = START + CLASS.replace("helper(), ", "helper(), vars(self), ")
    assert project.key(text) != project.key(text.replace('"t"', '"u"'))


def test_class_form_with_a_base_in_a_local_module(project: Project) -> None:
    """The reached members of a base class from a module of the project are in the key, the others are not."""
    base = "W = 1\nclass Base:\n    def load(self, ctx): self.model = W\n    def handle(self, event): return 1\n"
    project.write(base, "bases.py")
    text = START + "from bases import Base as B\n@coldstart('m')\nclass handler(B):\n    def other(self): return 1\n"
    first = project.key(text)
    project.write(base.replace("return 1", "return 2"), "bases.py")
    assert project.key() == first
    project.write(base.replace("W = 1", "W = 2"), "bases.py")
    assert project.key() != first


def test_a_class_whose_load_is_installed_code_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that inherits load from an installed package shows no load of its own to depend on."""
    monkeypatch.syspath_prepend(str(project.folder / "site-packages"))
    base = "class Base:\n    def load(self, ctx): self.model = 1\n    def handle(self, event): return 1\n"
    project.write(base, "site-packages/installed_base.py")
    project.write(
        START
        + "from installed_base import Base\n@coldstart('m')\nclass handler(Base):\n    def other(self): return 1\n"
    )
    assert "no load method" in uncomputable(project.before)
    assert "no load method" in uncomputable(project.after)
