"""Modules of the project that a loader reaches."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tests.key_project import HANDLER, START, Project, project_in, shape, uncomputable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A folder for a handler and its modules."""
    with project_in(tmp_path, monkeypatch) as made:
        yield made


IMPORTING = {
    "a name": ("from lib import f\ndef load(ctx): return f()", True, False),
    "a name inside load": ("def load(ctx):\n    from lib import f\n    return f()", True, False),
    "a name under another": ("from lib import f as g\ndef load(ctx): return g()", True, False),
    "the module": ("import lib\ndef load(ctx): return lib.f()", True, True),
    "the module inside load": ("def load(ctx):\n    import lib\n    return lib.f()", True, True),
    "everything": ("from lib import *\ndef load(ctx): return f()", True, True),
    "nothing that load reaches": ("from lib import f\ndef load(ctx): return 1", False, False),
    "a name through another module": ("from middle import f\ndef load(ctx): return f()", True, False),
    "everything through another module": ("from star import f\ndef load(ctx): return f()", True, True),
    "a name for types only": (
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lib import f\ndef load(ctx) -> f: return 1",
        True,
        False,
    ),
}


@pytest.mark.parametrize("name", IMPORTING)
def test_local_modules_count_as_far_as_they_are_reached(project: Project, name: str) -> None:
    """Edits of a module of the project change the key exactly when load may reach what was edited."""
    body, reached_matters, unreached_matters = IMPORTING[name]
    library = "def f(): return HERE\nHERE = 1\ndef g(): return 5\nif __name__ == '__main__': print(3)\n"
    project.write("from lib import f, g\n", "middle.py")
    project.write("from lib import *\n", "star.py")
    project.write(library, "lib.py")
    text = shape(body) + HANDLER
    first = project.key(text)
    project.write(library.replace("HERE = 1", "HERE = 2"), "lib.py")
    assert (project.key() != first) is reached_matters
    project.write(library.replace("return 5", "return 6"), "lib.py")
    assert (project.key() != first) is unreached_matters
    project.write("# comment\n" + library.replace("print(3)", "print(4)"), "lib.py")
    assert project.key() == first


def test_packages_relative_imports_and_namespaces(project: Project) -> None:
    """Submodules, relative imports and folders without __init__ are followed like an import would."""
    project.write("", "pkg/__init__.py")
    project.write(
        "from .low import value\nfrom . import side\nfrom .sub.deep import d\ndef top(): return value, side.s, d\n",
        "pkg/high.py",
    )
    project.write("value = 1\n", "pkg/low.py")
    project.write("s = 1\n", "pkg/side.py")
    project.write("from ...pkg.low import value as d\nfrom ..side import s as e\n", "pkg/sub/deep.py")
    project.write("", "pkg/sub/__init__.py")
    project.write("n = 1\n", "space/inner/mod.py")
    text = (
        START
        + "import pkg.high\nfrom space.inner import mod\nfrom space.inner.mod import n\ndef load(ctx): return pkg.high.top(), mod.n"
        + HANDLER
    )
    project.write("from .low import value\nfrom .sub import deep\nd = value\n", "pkg/sub2.py")
    project.write("from .low import value as d\n", "pkg/sub/deep.py")
    project.write("value = 2\n", "pkg/sub/low.py")
    keys = [project.key(text)]
    for name, content in (("pkg/low.py", "value = 5\n"), ("pkg/side.py", "s = 5\n"), ("pkg/sub/low.py", "value = 6\n"),
                          ("space/inner/mod.py", "n = 2\n"), ("pkg/__init__.py", "x = 1\n")):  # fmt: skip
        project.write(content, name)
        keys.append(project.key())
    assert len({key.digest for key in keys}) == len(keys)


def test_modules_that_trade_places_change_the_key(project: Project) -> None:
    """Which module holds what is part of the key, not only the sum of the contents."""
    for left, right, name in (("1", "2", "first"), ("2", "1", "second")):
        project.write(f"X = {left}\n", "left.py")
        project.write(f"X = {right}\n", "right.py")
        digest = project.key(START + "import left, right\ndef load(ctx): return left.X - right.X" + HANDLER).digest
        if name == "first":
            first = digest
    assert digest != first


@pytest.mark.parametrize("has_init", [True, False])
def test_modules_of_one_name_that_trade_places_change_the_key(project: Project, *, has_init: bool) -> None:
    """Modules of one name in two packages are told apart by their packages, those without __init__ too."""
    digests = set()
    for left, right in (("1", "2"), ("2", "1")):
        for package, value in (("left", left), ("right", right)):
            project.write(f"X = {value}\n", f"{package}/mod.py")
            if has_init:
                project.write("from .mod import X\n", f"{package}/__init__.py")
        places = ("left", "right") if has_init else ("left.mod", "right.mod")
        imports = "from {} import X as a\nfrom {} import X as b\n".format(*places)
        digests.add(project.key(START + imports + "def load(ctx): return a - b" + HANDLER).digest)
    assert len(digests) == 2


def test_importing_a_submodule_takes_its_packages_too(project: Project) -> None:
    """``import a.b`` gives the whole of a, through which its other names can be reached."""
    project.write("x = 1\n", "pkg/mod.py")
    text = START + "import pkg.mod\ndef load(ctx): return pkg.size" + HANDLER
    digests = set()
    for size in (1, 2):
        project.write(f"size = {size}\n", "pkg/__init__.py")
        digests.add(project.key(text).digest)
    assert len(digests) == 2


def test_a_name_that_a_module_makes_up_takes_the_whole_module(project: Project) -> None:
    """Where a local module does not bind what is imported from it, all of it counts."""
    text = START + "from lib import size\ndef load(ctx): return size" + HANDLER
    digests = set()
    for size in (1, 2):
        project.write(f"def __getattr__(name): return {size}\n", "lib.py")
        digests.add(project.key(text).digest)
    assert len(digests) == 2


def test_circular_imports_end(project: Project) -> None:
    """Modules that import each other, and the handler's own file, are looked at once."""
    project.write("import b\nimport a\nx = 1\n", "a.py")
    project.write("import a\nfrom handler import SIZE\ny = 1\n", "b.py")
    project.write(START + "SIZE = 1\ndef load(ctx):\n    import a\n    return a.x" + HANDLER)
    first = project.key()
    project.write(START + "SIZE = 2\ndef load(ctx):\n    import a\n    return a.x" + HANDLER)
    assert project.key() != first


def test_what_is_done_to_a_reached_module_counts(project: Project) -> None:
    """A statement of the handler's file that configures a module which load reaches changes the key."""
    project.write("CONFIG = {}\ndef f(): return CONFIG\ndef set_up(n): CONFIG['n'] = n\n", "lib.py")
    for line in ("CONFIG['n'] = {}", "set_up({})", "lib.CONFIG.update(n={})", "lib.FLAG = {}"):
        text = START + "import lib\nfrom lib import CONFIG, f, set_up\ndef load(ctx): return f()\n" + line + HANDLER
        assert project.key(text.format(1)) != project.key(text.format(2)), line


def test_what_packages_on_the_way_do_counts(project: Project) -> None:
    """Importing from a submodule runs its packages: what they do to a module that load reaches changes the key."""
    project.write("def f(): return 1\n", "pkg/sub/mod.py")
    project.write("", "pkg/sub/__init__.py")
    text = START + "import decimal\nfrom pkg.sub.mod import f\ndef load(ctx): return f(), decimal" + HANDLER
    digests = set()
    for line in ("import decimal\n", "import decimal\ndecimal.getcontext().prec = 28\n", "other = 1\n"):
        project.write(line, "pkg/__init__.py")
        digests.add(project.key(text).digest)
    assert len(digests) == 2


def test_installed_and_standard_modules_enter_by_name_only(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content of what is under site-packages is not in the key; neither is coldstart's own."""
    monkeypatch.syspath_prepend(str(project.folder / "site-packages"))
    project.write("def f(): return 1\n", "site-packages/installed.py")
    text = (
        START
        + "import installed, json, os.path\nfrom coldstart import errors\ndef load(ctx): return installed.f(), json, os, errors"
        + HANDLER
    )
    first = project.key(text)
    project.write("import os\ndef f(): return os.environ\n", "site-packages/installed.py")
    assert project.key() == first


def test_a_local_module_hides_a_standard_one_of_its_name(project: Project) -> None:
    """The search follows the import: a module in the handler's folder comes first."""
    project.write("value = 1\n", "colorsys.py")
    text = START + "import colorsys\ndef load(ctx): return colorsys.value" + HANDLER
    first = project.key(text)
    project.write("value = 2\n", "colorsys.py")
    assert project.key() != first
    del sys.modules["colorsys"]


def test_a_local_extension_module_counts_by_its_bytes(project: Project) -> None:
    """A compiled module of the project has no source, so its bytes are in the key."""
    import importlib.machinery

    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    text = START + "def load(ctx):\n    import fast\n    return fast" + HANDLER
    project.write("one", f"fast{suffix}")
    first = project.key(text)
    project.write("two", f"fast{suffix}")
    assert project.key() != first


def test_a_local_module_that_is_not_python_is_named(project: Project) -> None:
    """A reached module with a syntax error has no key; the error gives its file and line."""
    project.write("x = 1\ny = (\n", "broken.py")
    project.write(START + "def load(ctx):\n    import broken" + HANDLER)
    for compute in (project.before, project.after):
        message = uncomputable(compute)
        assert "broken.py:2" in message


def test_the_key_does_not_depend_on_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same project at another path has the same key, so a laptop and a container share snapshots."""
    keys = []
    for folder in (tmp_path / "a", tmp_path / "b" / "c"):
        project = Project(folder)
        project.write("from .deep import x\ndef f(): return x\n", "lib/__init__.py")
        project.write("x = 1\n", "lib/deep.py")
        project.write(START + "from lib import f\ndef load(ctx): return f()" + HANDLER)
        keys.append(project.before())
    assert keys[0] == keys[1]
