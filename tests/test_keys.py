"""What a snapshot's key depends on, and that it is the same before and after the handler's module is imported."""

from __future__ import annotations

import importlib.util
import itertools
import random
import subprocess
import symtable
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coldstart.errors import HandlerError, KeyUncomputableError
from coldstart.keys import COMPUTED, explain_change, find_handlers, key_from_functions, key_from_source
from coldstart.keys.facts import read_facts
from coldstart.keys.syntax import digest_of, dump, literal_text, parse
from coldstart.manifest import FORMAT_MAJOR, KeyRecord, check_name

HANDLER = """
@coldstart("m", load=load)
def handler(event, model):
    return model
"""
START = "from coldstart import coldstart\n"

Keys = Mapping[str, KeyRecord]


class Project:
    """A folder with a handler file and modules beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}
        self.device = "cpu"
        self._numbers = itertools.count()

    @property
    def path(self) -> str:
        return str(self.folder / "handler.py")

    def write(self, text: str, name: str = "handler.py") -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    def before(self) -> Keys:
        """Keys from the file alone."""
        (handler,) = find_handlers(self.path)
        return key_from_source(handler, device_type=self.device, environment=self.environment.get)

    def module(self) -> ModuleType:
        """The handler's module, imported anew, with nothing left of earlier imports."""
        forget(self.folder)
        spec = importlib.util.spec_from_file_location(f"handler_{next(self._numbers)}", self.path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    def after(self, handler: Any = None) -> Keys:
        """Keys from the objects of the imported module."""
        definition = (handler or self.module().handler).__coldstart__
        return {
            part: key_from_functions(definition, part, device_type=self.device, environment=self.environment.get)
            for part in definition.load
        }

    def key(self, text: str | None = None) -> KeyRecord:
        """The one key of the handler, the same before and after the import."""
        (key,) = self.keys(text).values()
        return key

    def keys(self, text: str | None = None) -> Keys:
        if text is not None:
            self.write(text)
        before, after = self.before(), self.after()
        assert before == after
        return before

    def load_digest(self, body: str) -> str:
        """The digest of part ``load`` for a file made of this body and a plain handler that uses ``load``."""
        return self.key(START + textwrap.dedent(body) + HANDLER).parts["load"]

    def changes(self, old: str, new: str) -> bool:
        return self.load_digest(old) != self.load_digest(new)


def forget(folder: Path) -> None:
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a rewritten file of the same second and size is read anew
    yield Project(tmp_path)
    forget(tmp_path)


def uncomputable(compute: Callable[[], object]) -> str:
    with pytest.raises(KeyUncomputableError) as caught:
        compute()
    return str(caught.value)


# --- the same before and after the import ------------------------------------------------------------------------------

SHAPES = {
    "function": "def load(ctx):\n    return 1\n" + HANDLER,
    "no argument": "def load():\n    return 1\n" + HANDLER,
    "async function": "async def load(ctx):\n    return 1\n" + HANDLER,
    "lambda in the decorator": '@coldstart("m", load=lambda: [1])\ndef handler(event, model): return model',
    "lambda with parameters": '@coldstart("m", load=lambda ctx, *, size=3: [size])\ndef handler(event, model): return model',
    "lambda that is assigned": "load = lambda ctx: {'a': 1}\n" + HANDLER,
    "lambda over several lines": '@coldstart(\n  "m",\n  load=lambda ctx: (\n    1,\n  ),\n)\ndef handler(event, model): return model',
    "lambdas on one line": '@coldstart("m", load=lambda: 1, build=lambda: 2, init=lambda ctx, s: s)\ndef handler(e, m): return m',
    "build": '''
        def load(ctx): return build(ctx)
        def build(ctx): return [ctx]
        @coldstart("m", load=load, build=build, init=lambda ctx, state: state)
        def handler(event, model): return model
    ''',
    "parts": '''
        def encoder(ctx): return 1
        @coldstart("m", load={"encoder": encoder, "adapter": lambda: 2}, build={"encoder": lambda ctx: 3})
        def handler(event, model): return model
    ''',
    "partial": '''
        from functools import partial
        def load_named(name, ctx, *, revision="main"): return name
        @coldstart("m", load=partial(load_named, "a", revision="b"))
        def handler(event, model): return model
    ''',
    "partial of a partial": '''
        import functools as ft
        NAME = "x"
        def load_named(name, size, ctx, revision=0): return name
        first = ft.partial(load_named, NAME, revision=1)
        load = ft.partial(first, (1, -2.5, None, b"x", True), revision=2)
    ''' + textwrap.indent(HANDLER, "        "),
    "alias": "def load_it(ctx): return 1\nfirst = load_it\nload = first\n" + HANDLER,
    "decorated with wraps": '''
        from functools import wraps
        def logged(function):
            @wraps(function)
            def wrapper(ctx): return function(ctx)
            return wrapper
        @logged
        def load(ctx): return 1
    ''' + textwrap.indent(HANDLER, "        "),
    "cached": "from functools import lru_cache\n@lru_cache(maxsize=None)\ndef load(): return 1\n" + HANDLER,
    "in branches": '''
        import sys
        if sys.platform == "linux":
            def load(ctx): return 1
        else:
            def load(ctx): return 2
    ''' + textwrap.indent(HANDLER, "        "),
    "handler in a branch": '''
        def load(ctx): return 1
        try:
            @coldstart("m", load=load)
            def handler(event, model): return model
        except ValueError:
            raise
    ''',
    "async handler": 'def load(ctx): return 1\n@coldstart("m", load=load)\nasync def handler(event, model): return model',
    "generator handler": 'def load(ctx): return 1\n@coldstart("m", load=load)\ndef handler(event, model): yield model',
    "assignment": 'def load(ctx): return 1\ndef serve(event, model): return model\nhandler = coldstart("m", load=load)(serve)',
    "annotated assignment": 'def load(ctx): return 1\ndef f(e, m): return m\nhandler: object = coldstart("m", load=load)(f)',
    "a class as loader": "class load:\n    SIZE = 3\n    def __init__(self, ctx): self.size = self.SIZE\n" + HANDLER,
    "version": 'def load(ctx): return 1\n@coldstart("m", load=load, version="7")\ndef handler(event, model): return model',
    "declared environment": 'NAMES = ("A", "B")\ndef load(ctx): return 1\n@coldstart("m", load=load, env=NAMES, secrets=["S"])\ndef handler(event, model): return model',
    "class": '''
        @coldstart("m")
        class handler:
            name = "x"
            def load(self, ctx): self.model = self.make(self.name)
            @staticmethod
            def make(name): return name
            def build(self, ctx): self.model = None
            def handle(self, event): return self.model
    ''',
    "class by assignment": '''
        class Handler:
            def load(self, ctx): self.model = 1
            def handle(self, event): return self.model
        handler = coldstart("m")(Handler)
    ''',
    "class with a local base": '''
        class Base:
            size = 3
            def load(self, ctx): self.model = self.make()
            def make(self): return super().__repr__()
        @coldstart("m")
        class handler(Base):
            def make(self): return self.size + super().size
            def handle(self, event): return self.model
    ''',
    "type hints and a match": '''
        from __future__ import annotations
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from coldstart import Context
        def load(ctx: Context) -> dict[str, int]:
            match ctx:
                case {"a": [first, *rest], **others} if others: return {"n": first}
                case _: return {}
    ''' + textwrap.indent(HANDLER, "        "),
}


def shape(text: str) -> str:
    text = textwrap.dedent(text)
    future = "from __future__ import annotations\n"
    return (future if future in text else "") + START + text.replace(future, "")


@pytest.mark.parametrize("name", SHAPES)
def test_key_is_the_same_before_and_after_the_import(project: Project, name: str) -> None:
    """The file and the imported objects give equal keys, so a fetch begun before the import is the right one."""
    for key in project.keys(shape(SHAPES[name])).values():
        assert len(key.digest) == 32
        assert key.parts["device"] == "cpu"
        assert key.parts["format"] == str(FORMAT_MAJOR)
        assert "load" in key.parts or "version" in key.parts


LOCAL_SHAPES = {
    "imported name": ("from lib import load", "def load(ctx): return X\nX = 1"),
    "imported alias": ("from lib import load_it as load", "def load_it(ctx): return X\nX = 1"),
    "imported twice": ("from lib import load", "from .inner import load"),
    "attribute of a module": ("import lib\nload = lib.load", "def load(ctx): return 1"),
    "attribute of a renamed module": ("import lib.inner as li\nload = li.load", ""),
    "partial of an imported name": (
        "from functools import partial\nfrom lib import load_it\nload = partial(load_it, 3)",
        "def load_it(size, ctx): return size",
    ),
}


@pytest.mark.parametrize("name", LOCAL_SHAPES)
def test_loaders_of_local_modules_are_followed(project: Project, name: str) -> None:
    """A loader that lives in a module of the project has the same key both ways, and its edits change it."""
    handler, library = LOCAL_SHAPES[name]
    project.write(library, "lib/__init__.py")
    project.write("def load(ctx): return 1", "lib/inner.py")
    first = project.key(START + handler + HANDLER)
    project.write(library.replace("1", "2").replace("size,", "size, *,"), "lib/__init__.py")
    project.write("def load(ctx): return 2", "lib/inner.py")
    assert project.key() != first


def test_installed_loaders_are_known_by_place(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an installed function the key holds which one it is, and not its code or what it reads."""
    installed = project.folder / "site-packages"
    monkeypatch.syspath_prepend(str(installed))
    library = "import os\ndef load(size): return dict(os.environ)\ndef other(size): return 2\n"
    project.write(library, "site-packages/models/__init__.py")
    text = START + "import functools\nfrom models import load\nload = functools.partial({}, 3)" + HANDLER
    first = project.key(text.format("load").replace("\nload =", "\nload_it =").replace("load=load", "load=load_it"))
    project.write(library.replace("2", "3"), "site-packages/models/__init__.py")
    assert project.key() == first
    second = project.key(
        text.format("other").replace("import load", "import other").replace("\nload =", "\nload_it =").replace("load=load", "load=load_it")
    )
    assert second != first


WAITING = {
    "computed name": ('name = "m" + "x"', 'coldstart(name, load=load)', "its name is computed"),
    "computed env": ("names = sorted(['A'])", 'coldstart("m", load=load, env=names)', "env="),
    "computed secrets": ("names = sorted(['A'])", 'coldstart("m", load=load, secrets=names)', "secrets="),
    "computed version": ("v = str(1)", 'coldstart("m", load=load, version=v)', "version="),
    "options": ("options = {'load': load}", 'coldstart("m", **options)', "computed"),
    "computed parts": ("parts = {'a': load}", 'coldstart("m", load={**parts})', "parts"),
    "parts in a variable": ("parts = {'a': load}", 'coldstart("m", load=parts)', "which function"),
    "a call": ("def make(): return load", 'coldstart("m", load=make())', "which function"),
    "bound in two ways": ("pick = load\nif pick: pick = other", 'coldstart("m", load=pick)', "which function"),
    "a partial of a list of calls": (
        "from functools import partial",
        'coldstart("m", load=partial(load, [str(1)]))',
        "which function",
    ),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_only_the_import_knows_waits_for_it(project: Project, name: str) -> None:
    """Where the source does not fix the key, key_from_source says that it waits, and the imported objects give it."""
    setup, decorator, reason = WAITING[name]
    text = f"{START}def load(ctx=0): return 1\ndef other(ctx): return 2\n{setup}\n@{decorator}\ndef handler(event, model): return model\n"
    project.write(text)
    message = uncomputable(project.before)
    assert "waits for the import" in message
    assert reason in message
    assert len(project.after()) == 1


def test_handlers_inside_functions_have_keys_after_the_import(project: Project) -> None:
    """A handler made in a function is not found in the file; its closure's plain values are part of its key."""
    text = START + """
def make(model_id, revision):
    def load(ctx): return (model_id, revision, SIZE)
    @coldstart("m", load=load)
    def handler(event, model): return model
    return handler
SIZE = 3
"""
    project.write(text)
    assert find_handlers(project.path) == ()
    module = project.module()
    first = project.after(module.make("a", ("b", None, 1.5)))
    assert first == project.after(module.make("a", ("b", None, 1.5)))
    assert first != project.after(module.make("a", ("b", None, 2.5)))
    project.write(text.replace("3", "4"))
    assert first != project.after(project.module().make("a", ("b", None, 1.5)))


def test_classes_inside_functions_have_keys_after_the_import(project: Project) -> None:
    """A class made in a function is found by its methods, and what they close over is part of its key."""
    project.write(START + """
def make(size, other=None):
    class Handler:
        def load(self, ctx): self.model = size
        def handle(self, event): return super().__repr__()
    return coldstart("m")(Handler)
def bad(thing):
    class Handler:
        def load(self, ctx): self.model = thing
        def handle(self, event): return 1
    return coldstart("m")(Handler)
""")
    module = project.module()
    assert project.after(module.make(1)) == project.after(module.make(1))
    assert project.after(module.make(1)) != project.after(module.make(2))
    assert "'thing'" in uncomputable(lambda: project.after(module.bad(object())))


REFUSED = {
    "a closure over an object": "def make(x):\n    def load(ctx): return x\n    return load\nload = make(object())",
    "a closure over a function": "def make(f):\n    def load(ctx): return f\n    return load\nload = make(len)",
    "a closure not yet bound": "def make():\n    def load(ctx): return later\n    return load\n    later = 1\nload = make()",
    "an object that can be called": "class Loader:\n    def __call__(self, ctx): return 1\nload = Loader()",
    "a bound method": "class Loader:\n    def load(self, ctx): return 1\nload = Loader().load",
    "a builtin": "load = len",
    "a function without a file": "exec('def load(ctx): return 1')",
    "a lambda without a file": "load = eval('lambda ctx: 1')",
    "a partial of an object": "from functools import partial\ndef f(a, ctx): return a\nload = partial(f, object())",
}


@pytest.mark.parametrize("name", REFUSED)
def test_loaders_that_source_cannot_describe_are_refused_with_the_remedy(project: Project, name: str) -> None:
    """What is not written in a file, or holds more than plain values, has no key: the error says to give a version."""
    project.write(START + REFUSED[name] + HANDLER)
    assert 'version="1"' in uncomputable(project.after)
    project.write(START + REFUSED[name] + HANDLER.replace("load=load", 'load=load, version="1"'))
    assert project.before() == project.after()


def test_a_file_that_changed_since_the_import_is_refused(project: Project) -> None:
    """A function or lambda that is no longer where its code says has no key, rather than that of other code."""
    for loader in ("def load(ctx): return 1", "load = lambda ctx: 1"):
        project.write(START + loader + HANDLER)
        handler = project.module().handler
        project.write(START + "X = 1\n" + loader + HANDLER)
        assert "has changed" in uncomputable(lambda handler=handler: project.after(handler))


# --- what the code part depends on ---------------------------------------------------------------------------------

LOAD = "def load(ctx): return use(X)\n"

CHANGING = {
    "a constant": (LOAD + "X = 1", LOAD + "X = 2"),
    "the type of a constant": (LOAD + "X = 1", LOAD + "X = True"),
    "a float": (LOAD + "X = 1.0", LOAD + "X = 1"),
    "bytes": (LOAD + "X = b'1'", LOAD + "X = '1'"),
    "None": ("def load(ctx): return None", "def load(ctx): return"),
    "a constant behind a constant": (LOAD + "Y = 1\nX = Y", LOAD + "Y = 2\nX = Y"),
    "an annotated constant": (LOAD + "X: int = 1", LOAD + "X: int = 2"),
    "an augmented constant": (LOAD + "X = 1\nX += 1", LOAD + "X = 1\nX += 2"),
    "one of several assignments": (LOAD + "X = 1\nX = 5", LOAD + "X = 2\nX = 5"),
    "the order of assignments": (LOAD + "X = 1\nX = 5", LOAD + "X = 5\nX = 1"),
    "a tuple target": (LOAD + "X, Y = 1, 2", LOAD + "X, Y = 3, 2"),
    "a starred target": (LOAD + "Y, *X = 1, 2", LOAD + "Y, *X = 1, 3"),
    "the order of two tuple targets": (LOAD + "A, X = 1, 2\nX, A = 3, 4", LOAD + "X, A = 3, 4\nA, X = 1, 2"),
    "a function": (LOAD + "X = 1\ndef use(x): return x", LOAD + "X = 1\ndef use(x): return -x"),
    "a function in a function": (
        "def load(ctx):\n    def inner(): return X\n    return inner()\nX = 1",
        "def load(ctx):\n    def inner(): return X\n    return inner()\nX = 2",
    ),
    "a function of a function": (
        "def load(ctx): return a()\ndef a(): return b()\ndef b(): return 1",
        "def load(ctx): return a()\ndef a(): return b()\ndef b(): return 2",
    ),
    "recursion": (
        "def load(ctx): return even(4)\ndef even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)",
        "def load(ctx): return even(4)\ndef even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 3)",
    ),
    "a class": ("def load(ctx): return C()\nclass C: a = 1", "def load(ctx): return C()\nclass C: a = 2"),
    "a base class": (
        "def load(ctx): return C()\nclass B: a = 1\nclass C(B): pass",
        "def load(ctx): return C()\nclass B: a = 2\nclass C(B): pass",
    ),
    "a method's global": (
        "def load(ctx): return C()\nclass C:\n    X = 0\n    def m(self): return X\nX = 1",
        "def load(ctx): return C()\nclass C:\n    X = 0\n    def m(self): return X\nX = 2",
    ),
    "a decorator on load": (
        "def load_it(f): return f\nSIZE = 1\n@load_it\ndef load(ctx): return 1",
        "def load_it(f): return (f)\nSIZE = 1\n@(load_it)\ndef load(ctx): return 1\n@load_it\ndef load(ctx): return 1",
    ),
    "the code of a decorator": (
        "def deco(f): return f\n@deco\ndef load(ctx): return 1",
        "def deco(f):\n    f.x = 1\n    return f\n@deco\ndef load(ctx): return 1",
    ),
    "a default argument": ("X = 1\ndef load(ctx=X): return 1", "X = 2\ndef load(ctx=X): return 1"),
    "a keyword default": ("X = 1\ndef load(ctx, *, k=X): return 1", "X = 2\ndef load(ctx, *, k=X): return 1"),
    "a lambda's default": ("X = 1\nload = lambda ctx, X=X: X", "X = 2\nload = lambda ctx, X=X: X"),
    "an annotation": ("def load(ctx) -> int: return 1", "def load(ctx) -> float: return 1"),
    "an iterable of the same name": (
        "def load(ctx): return [X for X in X]\nX = [1]",
        "def load(ctx): return [X for X in X]\nX = [2]",
    ),
    "a condition of a comprehension": (
        "def load(ctx): return {k: v for k, v in ctx if k > X}\nX = 1",
        "def load(ctx): return {k: v for k, v in ctx if k > X}\nX = 2",
    ),
    "a second iterable": (
        "def load(ctx): return list(a for b in ctx for a in X)\nX = [1]",
        "def load(ctx): return list(a for b in ctx for a in X)\nX = [2]",
    ),
    "a walrus at the top": (LOAD + "print(X := 1)", LOAD + "print(X := 2)"),
    "a walrus in a comprehension": (LOAD + "[X := n for n in (1,)]", LOAD + "[X := n for n in (2,)]"),
    "a value in a match": (
        "def load(ctx):\n    match ctx:\n        case C.a: return 1\nclass C: a = 1",
        "def load(ctx):\n    match ctx:\n        case C.a: return 1\nclass C: a = 2",
    ),
    "a match at the top": (
        LOAD + "match [1]:\n    case [X]: pass",
        LOAD + "match [2]:\n    case [X]: pass",
    ),
    "a match on None": (
        "def load(ctx):\n    match ctx:\n        case None: return 1",
        "def load(ctx):\n    match ctx:\n        case True: return 1",
    ),
    "the branch not taken": (
        LOAD + "if True: X = 1\nelse: X = 2",
        LOAD + "if True: X = 1\nelse: X = 3",
    ),
    "a condition at the top": (LOAD + "if 1: X = 1\nelse: X = 2", LOAD + "if 0: X = 1\nelse: X = 2"),
    "a fallback import": (
        LOAD + "try:\n    import missing as X\nexcept ImportError:\n    X = 1",
        LOAD + "try:\n    import missing as X\nexcept ImportError:\n    X = 2",
    ),
    "a loop at the top": (LOAD + "for X in (1,): pass", LOAD + "for X in (2,): pass"),
    "a with at the top": (
        LOAD + "import contextlib\nwith contextlib.nullcontext(1) as X: pass",
        LOAD + "import contextlib\nwith contextlib.nullcontext(2) as X: pass",
    ),
    "a global set by a function": (
        LOAD + "X = 1\ndef setup():\n    global X\n    X = 2\nsetup()",
        LOAD + "X = 1\ndef setup():\n    global X\n    X = 3\nsetup()",
    ),
    "the call that sets a global": (
        LOAD + "X = 1\ndef setup(v=0):\n    global X\n    X = v\nsetup(2)",
        LOAD + "X = 1\ndef setup(v=0):\n    global X\n    X = v\nsetup(3)",
    ),
    "an item set at the top": (LOAD + "X = {}\nX['a'] = 1", LOAD + "X = {}\nX['a'] = 2"),
    "an item deleted at the top": (LOAD + "X = {1: 1, 2: 2}\ndel X[1]", LOAD + "X = {1: 1, 2: 2}\ndel X[2]"),
    "an item set in a loop": (
        LOAD + "X = {}\nfor k in (1,): X[k] = 1",
        LOAD + "X = {}\nfor k in (2,): X[k] = 1",
    ),
    "an attribute set at the top": (LOAD + "class X: pass\nX.a = 1", LOAD + "class X: pass\nX.a = 2"),
    "a method called at the top": (LOAD + "X = []\nX.append(1)", LOAD + "X = []\nX.append(2)"),
    "the order of calls at the top": (
        LOAD + "X = []\nX.append(1)\nX.append(2)",
        LOAD + "X = []\nX.append(2)\nX.append(1)",
    ),
    "a method called in an assignment": (LOAD + "X = [1, 2]\ny = X.pop(0)", LOAD + "X = [1, 2]\ny = X.pop(1)"),
    "a function that fills it": (
        LOAD + "X = {}\ndef fill(v): X['a'] = v\nfill(1)",
        LOAD + "X = {}\ndef fill(v): X['a'] = v\nfill(2)",
    ),
    "an alias that is changed": (LOAD + "X = {}\nY = X\nY['a'] = 1", LOAD + "X = {}\nY = X\nY['a'] = 2"),
    "a registered function": (
        LOAD + "X = {}\ndef register(f): X[f.__name__] = f\n@register\ndef a(): return 1",
        LOAD + "X = {}\ndef register(f): X[f.__name__] = f\n@register\ndef a(): return 2",
    ),
    "a registered class": (
        LOAD + "X = []\nclass B:\n    def __init_subclass__(cls): X.append(cls)\nclass C(B): a = 1",
        LOAD + "X = []\nclass B:\n    def __init_subclass__(cls): X.append(cls)\nclass C(B): a = 2",
    ),
    "a setting of an imported module": (
        "import decimal\ndef load(ctx): return decimal.Decimal(1)\ndecimal.getcontext().prec = 28",
        "import decimal\ndef load(ctx): return decimal.Decimal(1)\ndecimal.getcontext().prec = 27",
    ),
    "a call on a module that load imports": (
        "import random\nrandom.seed(1)\ndef load(ctx):\n    from random import random\n    return random()",
        "import random\nrandom.seed(2)\ndef load(ctx):\n    from random import random\n    return random()",
    ),
    "an import": ("from math import pi as X\n" + LOAD, "from math import e as X\n" + LOAD),
    "an import inside load": (
        "def load(ctx):\n    from math import pi\n    return pi",
        "def load(ctx):\n    from math import e as pi\n    return pi",
    ),
    "what happens beside the main guard": (
        LOAD + "X = []\nif __name__ == '__main__': pass\nelse: X.append(1)",
        LOAD + "X = []\nif __name__ == '__main__': pass\nelse: X.append(2)",
    ),
    "what happens unless it is the main module": (
        LOAD + "X = []\nif __name__ != '__main__': X.append(1)",
        LOAD + "X = []\nif __name__ != '__main__': X.append(2)",
    ),
    "an f-string": ("def load(ctx): return f'a{ctx}b'", "def load(ctx): return f'a{ctx}c'"),
    "a format": ("def load(ctx): return f'{ctx:>4}'", "def load(ctx): return f'{ctx:>5}'"),
    "an operator": ("def load(ctx): return 1 + 2", "def load(ctx): return 1 - 2"),
    "a name": ("def load(ctx): return ctx.a", "def load(ctx): return ctx.b"),
    "star arguments": ("def load(*ctx): return 1", "def load(**ctx): return 1"),
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_load_reaches_is_in_its_key(project: Project, name: str) -> None:
    """Editing anything that load reaches, or what changes it during the import, changes the key."""
    assert project.changes(*(f"def use(x): return x\n{text}\n" for text in CHANGING[name]))


NOT_CHANGING = {
    "comments": (LOAD, "# first\ndef load(ctx):  # why\n    # here\n    return use(X)"),
    "layout": (LOAD, "def load(\n    ctx,\n):\n\n    return (\n        use( X )\n    )"),
    "quotes": ("def load(ctx): return 'a'", 'def load(ctx): return "a"'),
    "number notation": ("def load(ctx): return 1_000", "def load(ctx): return 0x3E8"),
    "a docstring": (LOAD, "def load(ctx):\n    '''Text.'''\n    return use(X)"),
    "a text as comment": (LOAD, "def load(ctx):\n    'now'\n    return use(X)"),
    "a class's docstring": ("def load(ctx): return C\nclass C: a = 1", "def load(ctx): return C\nclass C:\n    '''Doc.'''\n    a = 1"),
    "joined texts": ("def load(ctx): return 'a' 'b'", "def load(ctx): return 'ab'"),
    "joined f-strings": ("def load(ctx): return f'a{ctx}' 'b'", "def load(ctx): return f'a{ctx}b'"),
    "an unrelated global": (LOAD + "Y = 1", LOAD + "Z = 2"),
    "an unrelated function": (LOAD + "def other(): return X", LOAD + "def another(): return X + 1"),
    "a parameter of the same name": ("def load(X): return X\nX = 1", "def load(X): return X\nX = 2"),
    "a local of the same name": (
        "def load(ctx):\n    X = 1\n    return X\nX = 1",
        "def load(ctx):\n    X = 1\n    return X\nX = 2",
    ),
    "a local import of the same name": (
        "def load(ctx):\n    import math as X\n    return X\nX = 1",
        "def load(ctx):\n    import math as X\n    return X\nX = 2",
    ),
    "other locals of the same name": (
        "def load(ctx):\n    try: pass\n    except OSError as A: pass\n    with ctx as B: pass\n    for C in ctx: pass\n    return A, B, C\nA = B = C = 1",
        "def load(ctx):\n    try: pass\n    except OSError as A: pass\n    with ctx as B: pass\n    for C in ctx: pass\n    return A, B, C\nA = B = C = 2",
    ),
    "captures of a match": (
        "def load(ctx):\n    match ctx:\n        case [A, *B]: return A, B\n        case {'a': C, **D}: return C, D\nA = B = C = D = 1",
        "def load(ctx):\n    match ctx:\n        case [A, *B]: return A, B\n        case {'a': C, **D}: return C, D\nA = B = C = D = 2",
    ),
    "a walrus of the same name": (
        "def load(ctx): return [Y := 1 for a in ctx], Y\nY = 1",
        "def load(ctx): return [Y := 1 for a in ctx], Y\nY = 2",
    ),
    "an enclosing function's local": (
        "def load(ctx):\n    X = 1\n    def inner(): return X\n    return inner()\nX = 1",
        "def load(ctx):\n    X = 1\n    def inner(): return X\n    return inner()\nX = 2",
    ),
    "a nonlocal": (
        "def load(ctx):\n    X = 1\n    def inner():\n        nonlocal X\n        X = 2\n    return inner()\nX = 1",
        "def load(ctx):\n    X = 1\n    def inner():\n        nonlocal X\n        X = 2\n    return inner()\nX = 2",
    ),
    "a target of a comprehension": (
        "def load(ctx): return [X for X in ctx]\nX = 1",
        "def load(ctx): return [X for X in ctx]\nX = 2",
    ),
    "a lambda's parameter": ("def load(ctx): return lambda X: X\nX = 1", "def load(ctx): return lambda X: X\nX = 2"),
    "the order of definitions": (
        LOAD + "Y = 1\nX = Y\ndef a(): return 1\nZ = 1\nclass C: pass",
        "Z = 1\nY = 1\nclass C: pass\nX = Y\ndef a(): return 1\n" + LOAD,
    ),
    "another name of the same import": ("from math import pi as X, e\n" + LOAD, "from math import tau, pi as X\n" + LOAD),
    "what happens under the main guard": (
        LOAD + "X = []\nif __name__ == '__main__': X.append(1)",
        LOAD + "X = []\nif __name__ == '__main__': X.append(2)",
    ),
    "logging set-up": (
        "import logging\nlog = logging.getLogger()\nlogging.basicConfig(level=30)\ndef load(ctx): return log",
        "import logging\nlog = logging.getLogger()\nlogging.basicConfig(level=40)\ndef load(ctx): return log",
    ),
    "a text that is printed": (LOAD + "X = 'a'\nprint(X)", LOAD + "X = 'a'\nprint(X, X)"),
    "another call of a helper": (
        LOAD + "X = use(1)\ny = use(2)",
        LOAD + "X = use(1)\ny = use(3)",
    ),
    "a call of coldstart": (LOAD + "X = []\ncoldstart.subscribe(print)", LOAD + "X = []\ncoldstart.subscribe(len)"),
    "a class attribute that reads a reached value": (
        "X = {}\n" + LOAD + "class C: a = X",
        "X = {}\n" + LOAD + "class C: b = X",
    ),
    "a class beside a reached type": (
        "from typing import NamedTuple\nFloats = dict[str, float]\ndef load(ctx) -> Floats: return {}\nclass C(NamedTuple):\n    a: Floats",
        "from typing import NamedTuple\nFloats = dict[str, float]\ndef load(ctx) -> Floats: return {}\nclass C(NamedTuple):\n    b: Floats",
    ),
}


@pytest.mark.parametrize("name", NOT_CHANGING)
def test_what_load_does_not_reach_is_not_in_its_key(project: Project, name: str) -> None:
    """Comments, layout, docstrings and code that load does not reach leave the key as it is."""
    assert not project.changes(*(f"def use(x): return x\n{text}\n" for text in NOT_CHANGING[name]))


def test_what_runs_at_every_start_is_not_in_the_key(project: Project) -> None:
    """compile, init, close, the handler and the warm-up can change without a new snapshot."""
    text = START + """
def load(ctx): return 1
def init(ctx, state): return HERE
def compile(ctx, state): return 1
HERE = 1
@coldstart("m", load=load, init=init, compile=compile, close=lambda m: 1, warmup=[{"a": 1}])
def handler(event, model):
    return HERE
"""
    first = project.key(text)
    assert project.key(text.replace("1\n", "2\n").replace("return 2\ndef init", "return 1\ndef init")) == first
    assert project.key(text.replace('{"a": 1}', '{"b": 2}').replace("lambda m: 1", "lambda m: 2")) == first
    assert project.key(text.replace("load(ctx): return 1", "load(ctx): return 2")) != first


def test_load_and_build_are_told_apart(project: Project) -> None:
    """A change of build changes its part of the key and not that of load."""
    text = START + """
def load(ctx): return 1
def build(ctx): return 2
@coldstart("m", load=load, build=build)
def handler(event, model): return model
"""
    first, second = project.key(text), project.key(text.replace("return 2", "return 3"))
    assert first.parts["load"] == second.parts["load"]
    assert explain_change(first, second) == "code changed: build"
    third = project.key(text.replace(", build=build", ""))
    assert "build" not in third.parts
    assert explain_change(first, third) == "code changed: build"


def test_parts_have_keys_of_their_own(project: Project) -> None:
    """Each named part depends on its own loader only, and its name can name a snapshot."""
    text = START + """
def encoder(ctx): return 1
def adapter(ctx): return 2
@coldstart("m", load={"encoder": encoder, "adapter": adapter})
def handler(event, model): return model
"""
    first, second = project.keys(text), project.keys(text.replace("return 2", "return 3"))
    assert set(first) == {"encoder", "adapter"}
    assert first["encoder"] == second["encoder"]
    assert first["adapter"] != second["adapter"]
    assert [check_name(f"m={part}") for part in first] == ["m=encoder", "m=adapter"]


CLASS = '''
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
'''


@pytest.mark.parametrize("edit", [
    ("SIZE = 3", "SIZE = 4"), ("width = 1", "width = 2"), ("return self.width", "return -self.width"), ("= 4", "= 5"),
    ('"kind"', '"sort"'), ("self.model = (", "self.state = ("), ("class handler(Base)", "class handler(Base, object)"),
])
def test_class_form_holds_what_load_reaches_through_self(project: Project, edit: tuple[str, str]) -> None:
    """Methods and attributes that load reaches, in local bases and through helpers too, are in a class's key."""
    assert project.key(START + CLASS) != project.key(START + CLASS.replace(*edit))


@pytest.mark.parametrize("edit", [
    ("depth = 2", "depth = 3"), ('"t"', '"u"'), ("return self.model, self.depth", "return 5"), ("warmup=[1]", "warmup=[2]"),
    ("def unused(self): return 1", "def unused(self): return 2"), ("def load", "@property\n    def more(self): return 2\n    def load"),
])
def test_class_form_leaves_out_other_members(project: Project, edit: tuple[str, str]) -> None:
    """Members that load does not reach (init, handle, close ...) can change without a new key."""
    assert project.key(START + CLASS) == project.key(START + CLASS.replace(*edit))


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
    project.write(START + "from installed_base import Base\n@coldstart('m')\nclass handler(Base):\n    def other(self): return 1\n")
    assert "no load method" in uncomputable(project.before)
    assert "no load method" in uncomputable(project.after)


# --- local modules -------------------------------------------------------------------------------------------------

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
    project.write("from .low import value\nfrom . import side\nfrom .sub.deep import d\ndef top(): return value, side.s, d\n", "pkg/high.py")
    project.write("value = 1\n", "pkg/low.py")
    project.write("s = 1\n", "pkg/side.py")
    project.write("from ...pkg.low import value as d\nfrom ..side import s as e\n", "pkg/sub/deep.py")
    project.write("", "pkg/sub/__init__.py")
    project.write("n = 1\n", "space/inner/mod.py")
    text = START + "import pkg.high\nfrom space.inner import mod\nfrom space.inner.mod import n\ndef load(ctx): return pkg.high.top(), mod.n" + HANDLER
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


def test_installed_and_standard_modules_enter_by_name_only(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content of what is under site-packages is not in the key; neither is coldstart's own."""
    monkeypatch.syspath_prepend(str(project.folder / "site-packages"))
    project.write("def f(): return 1\n", "site-packages/installed.py")
    text = START + "import installed, json, os.path\nfrom coldstart import errors\ndef load(ctx): return installed.f(), json, os, errors" + HANDLER
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


# --- the environment -----------------------------------------------------------------------------------------------

READS = {
    "item": "import os\ndef load(ctx): return os.environ['A']",
    "get": "import os\ndef load(ctx): return os.environ.get('A', '')",
    "getenv": "import os\ndef load(ctx): return os.getenv('A')",
    "getenv by keyword": "import os\ndef load(ctx): return os.getenv(key='A')",
    "setdefault": "import os\ndef load(ctx): return os.environ.setdefault('A', 'x')",
    "pop": "import os\ndef load(ctx): return os.environ.pop('A', 'x')",
    "membership": "import os\ndef load(ctx): return 'A' in os.environ",
    "another name of os": "import os as system\ndef load(ctx): return system.environ['A']",
    "environ": "from os import environ\ndef load(ctx): return environ['A']",
    "environ renamed": "from os import environ as e\ndef load(ctx): return e.get('A')",
    "getenv renamed": "from os import getenv as g\ndef load(ctx): return g('A')",
    "imported inside": "def load(ctx):\n    import os\n    return os.environ['A']",
    "environ imported inside": "def load(ctx):\n    from os import environ as e\n    return e['A']",
    "os.path imported": "import os.path\ndef load(ctx): return os.environ['A']",
    "a constant": "import os\nNAME = 'A'\ndef load(ctx): return os.environ[NAME]",
    "a module-level value": "import os\nVALUE = os.environ.get('A')\ndef load(ctx): return VALUE",
    "a helper": "import os\ndef helper(): return os.environ['A']\ndef load(ctx): return helper()",
    "a default argument": "import os\ndef load(ctx, a=os.environ.get('A')): return a",
    "a local module": "from lib import read\ndef load(ctx): return read()",
}


@pytest.mark.parametrize("name", READS)
def test_literal_environment_reads_enter_the_key_by_value(project: Project, name: str) -> None:
    """Each variable that reached code reads by name is a part of the key; unset is not empty."""
    project.write("import os\ndef read(): return os.environ['A']\n", "lib.py")
    text = START + READS[name] + HANDLER
    unset = project.key(text)
    digests = set()
    for value in ("", "x", "y"):
        project.environment["A"] = value
        key = project.key()
        digests.add(key.digest)
        assert explain_change(unset, key) == "environment changed: A"
    assert len(digests | {unset.digest}) == 4
    project.environment["B"] = "other"
    assert project.key().digest in digests


COMPUTED_READS = {
    "item": "import os\ndef load(ctx): return os.environ[ctx.name]",
    "get": "import os\ndef load(ctx): return os.environ.get(ctx.name)",
    "getenv": "import os\ndef load(ctx): return os.getenv('A' + 'B')",
    "f-string": "import os\ndef load(ctx): return os.environ[f'A{ctx}']",
    "a parameter that hides a constant": "import os\nNAME = 'A'\ndef load(NAME): return os.environ[NAME]",
    "a name that is bound twice": "import os\nNAME = 'A'\nNAME = 'B'\ndef load(ctx): return os.environ[NAME]",
    "membership": "import os\ndef load(ctx): return ctx in os.environ",
    "dict": "import os\ndef load(ctx): return dict(os.environ)",
    "unpacked": "import os\ndef load(ctx): return {**os.environ}",
    "passed on": "import os, subprocess\ndef load(ctx): return subprocess.run(['x'], env=os.environ)",
    "iterated": "import os\ndef load(ctx): return [k for k in os.environ]",
    "items": "import os\ndef load(ctx): return os.environ.items()",
    "bound": "import os\nE = os.environ\ndef load(ctx): return E['A']",
    "a function passed on": "import os\ndef load(ctx): return map(os.getenv, ctx)",
    "a method passed on": "import os\ndef load(ctx): return map(os.environ.get, ctx)",
    "an imported function passed on": "from os import getenv\ndef load(ctx): return map(getenv, ctx)",
    "bytes": "import os\ndef load(ctx): return os.environb[b'A']",
    "nothing": "import os\ndef load(ctx): return os.getenv(**ctx)",
}


@pytest.mark.parametrize("name", COMPUTED_READS)
def test_computed_environment_reads_are_refused_with_the_remedy(project: Project, name: str) -> None:
    """Code that may read any variable has no key before or after the import; the error says where and what to do."""
    project.write(START + COMPUTED_READS[name] + HANDLER)
    for compute in (project.before, project.after):
        message = uncomputable(compute)
        assert "handler.py:" in message
        assert "env=[" in message
        assert "version=" in message
    project.environment = {"A": "1"}
    key = project.key(START + COMPUTED_READS[name] + HANDLER.replace("load=load", 'load=load, env=["A"], version="1"'))
    assert set(key.parts) == {"version", "env:A", "device", "format"}


@pytest.mark.parametrize("line", [
    "os.environ['A'] = ctx.name", "os.environ.update(ctx)", "del os.environ[ctx.name]", "os.environ.clear()", "os.putenv(ctx, 'x')",
])
def test_writing_the_environment_is_no_read(project: Project, line: str) -> None:
    """Setting variables puts nothing of the environment into the key."""
    key = project.key(START + f"import os\ndef load(ctx): {line}" + HANDLER)
    assert set(key.parts) == {"load", "device", "format"}


def test_unreached_environment_reads_do_not_matter(project: Project) -> None:
    """What only the handler or init read is not in the key, computed or not."""
    text = START + "import os\nLEVEL = os.environ.get('LEVEL')\ndef load(ctx): return 1\ndef init(ctx, s): return dict(os.environ)"
    assert set(project.key(text + HANDLER).parts) == {"load", "device", "format"}


SECRET_NAMES = ["HF_TOKEN", "hf_token", "MY_SECRET", "DB_PASSWORD", "PASSWD", "GOOGLE_APPLICATION_CREDENTIALS", "OPENAI_API_KEY",
                "AWS_ACCESS_KEY_ID", "SIGNING_KEY"]  # fmt: skip


@pytest.mark.parametrize("name", ["MODEL_ID", "TOKENIZER_ID", "MAX_TOKENS", "KEYBOARD"])
def test_names_that_only_resemble_a_secret_enter(project: Project, name: str) -> None:
    """A tokenizer's name or a number of tokens is no secret, and a state may well depend on it."""
    text = START + f"import os\ndef load(ctx): return os.environ['{name}']" + HANDLER
    assert f"env:{name}" in project.key(text).parts


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_that_look_secret_never_enter_undeclared(project: Project, name: str) -> None:
    """A variable whose name says that it is a secret is left out, unless env= asks for it."""
    text = START + f"import os\ndef load(ctx): return os.environ['{name}']" + HANDLER
    keys = []
    for value in ("one", "two"):
        project.environment[name] = value
        keys.append(project.key(text))
    assert keys[0] == keys[1]
    declared = project.key(text.replace("load=load", f"load=load, env=['{name}']"))
    assert f"env:{name}" in declared.parts


def test_declared_secrets_never_enter(project: Project) -> None:
    """Names in secrets= stay out although the code reads them."""
    text = START + "import os\ndef load(ctx): return os.environ['PIN']" + HANDLER
    project.environment["PIN"] = "1234"
    assert "env:PIN" in project.key(text).parts
    first = project.key(text.replace("load=load", "load=load, secrets=['PIN']"))
    assert "env:PIN" not in first.parts
    project.environment["PIN"] = "5678"
    assert project.key() == first


def test_values_of_the_environment_are_not_readable_in_the_key(project: Project) -> None:
    """A key holds digests of values: nobody who may read the store reads the environment there."""
    project.environment["MODEL_ID"] = "org/private-model"
    key = project.key(START + "import os\ndef load(ctx): return os.environ['MODEL_ID']" + HANDLER)
    assert "private-model" not in repr(key)
    assert len(key.parts["env:MODEL_ID"]) == 32


def test_version_replaces_the_code(project: Project) -> None:
    """With version= only it, declared variables, device and format count: code and what it reads do not."""
    text = START + "import os\ndef load(ctx): return os.environ['A'], 1" + HANDLER.replace("load=load", 'load=load, version="v1", env=["B"]')
    first = project.key(text)
    assert set(first.parts) == {"version", "env:B", "device", "format"}
    project.environment["A"] = "changed"
    assert project.key(text.replace(", 1", ", 2")) == first
    assert explain_change(first, project.key(text.replace("v1", "v2"))) == "version changed: v1 -> v2"
    project.environment["B"] = "changed"
    assert explain_change(first, project.key(text)) == "environment changed: B"


# --- explaining ----------------------------------------------------------------------------------------------------


def record(**parts: str) -> KeyRecord:
    named = {name.replace("_", ":", 1) if name.startswith("env_") else name: value for name, value in parts.items()}
    return KeyRecord("0" * 32, {"device": "cuda", "format": "1", **named})


@pytest.mark.parametrize(("old", "new", "text"), [
    (record(load="a"), record(load="a"), "nothing changed"),
    (record(load="a"), record(load="b"), "code changed: load"),
    (record(load="a", build="a"), record(load="b", build="b"), "code changed: load, build"),
    (record(load="a"), record(load="a", build="b"), "code changed: build"),
    (record(load="a", env_B="1", env_A="1"), record(load="b", env_B="2"), "code changed: load; environment changed: A, B"),
    (record(load="a"), record(load="a", device="cpu"), "device changed: cuda -> cpu"),
    (record(load="a"), record(load="a", format="2"), "format changed: 1 -> 2"),
    (record(load="a"), record(version="1"), "version changed: none -> 1"),
    (record(version="1"), record(load="a"), "version changed: 1 -> none"),
    (record(version="1", env_A="1"), record(version="2", env_A="2", device="cpu"),
     "version changed: 1 -> 2; environment changed: A; device changed: cuda -> cpu"),
    (record(load="a"), record(load="a", shards="2"), "shards changed: none -> 2"),
])  # fmt: skip
def test_a_change_of_key_is_named(old: KeyRecord, new: KeyRecord, text: str) -> None:
    """What differs between two keys is said by name, with the values where they may be read."""
    assert explain_change(old, new) == text


def test_device_and_format_are_told_in_the_key(project: Project) -> None:
    """The device type is part of the key and its old and new value can be told."""
    project.write(START + "def load(ctx): return 1" + HANDLER)
    cpu = project.key()
    project.device = "cuda"
    cuda = project.key()
    assert cpu.digest != cuda.digest
    assert explain_change(cuda, cpu) == "device changed: cuda -> cpu"


# --- finding handlers ----------------------------------------------------------------------------------------------

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
    project.write(f"{statement}\ndef load(ctx): return 1\n@{decorator}('m', load=load)\ndef serve(event, model): return model\n")
    (handler,) = find_handlers(project.path)
    assert (handler.name, handler.attribute, handler.line, handler.is_class) == ("m", "serve", project_line(project, "def serve"), False)
    assert project.before()["" ].parts["load"]


def project_line(project: Project, text: str) -> int:
    lines = Path(project.path).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_several_handlers_are_found_in_order(project: Project) -> None:
    """Functions, classes and assignments are all found, in the order of the file, with their attributes."""
    project.write(START + """
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
""")
    found = [(h.name, h.attribute, h.is_class, set(h.parts)) for h in find_handlers(project.path)]
    assert found == [("first", "a", False, {""}), ("second", "B", True, {""}), ("third", "c", False, {""})]


def test_literal_options_are_read_and_others_marked(project: Project) -> None:
    """env, secrets, version and files come as values, None where absent, COMPUTED where only the import knows."""
    project.write(START + """
@coldstart("a", load=f, env=["A", "B"], secrets=("S",), version="3", files={"t.json": "assets/t.json"})
def a(event, model): return model
@coldstart("b", load=f)
def b(event, model): return model
@coldstart(f"c{1}", load=f, env=names(), secrets=[name()], version=str(3), files={"t": path(), **more})
def c(event, model): return model
@coldstart("d", load=f, files={key: "x"}, env={"A"}, version=-1)
def d(event, model): return model
""")
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
    with pytest.raises(HandlerError, match="cannot read .*handler.py"):
        find_handlers(project.path)


def test_code_nested_too_deeply_is_refused_with_the_remedy(project: Project) -> None:
    """A reached expression that would exhaust the stack has no key, rather than ending the worker."""
    project.write(START + "def load(ctx): return " + "+".join(["1"] * 2500) + HANDLER)
    assert 'version="1"' in uncomputable(project.before)


def test_source_in_another_encoding_is_read(project: Project) -> None:
    """An encoding cookie and a byte-order mark are understood, as by the import."""
    Path(project.path).write_bytes(b"# coding: latin-1\nX = '\xe9'\n" + (START + "def load(ctx): return X" + HANDLER).encode())
    latin = project.key()
    Path(project.path).write_bytes(b"\xef\xbb\xbf" + ("X = '\u00e9'\n" + START + "def load(ctx): return X" + HANDLER).encode())
    assert project.key() == latin


# --- properties ----------------------------------------------------------------------------------------------------

DEFINITIONS = ["X = Y + 1", "Y = 2", "def load(ctx): return a(X), C()", "def a(n): return b(n) if n else Y",
               "def b(n): return a(n - 1)", "class C:\n    y = 1", "unrelated = 9", "def other(): return X"]  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(DEFINITIONS), noise=st.lists(st.sampled_from(["", "# note", "'text'", "\f"]), min_size=8, max_size=8))
def test_order_of_definitions_and_comments_do_not_matter(project: Project, order: list[str], noise: list[str]) -> None:
    """Any order of the same definitions, with any comments between them, has one key."""
    def digest(lines: list[str]) -> str:
        project.write(START + "\n".join(lines) + HANDLER)
        return project.before()[""].digest

    mixed = [line for pair in zip(noise, order, strict=True) for line in pair]
    assert digest(mixed) == digest(DEFINITIONS)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


@given(left=plain, right=plain)
def test_texts_of_plain_values_tell_them_apart(left: object, right: object) -> None:
    """Two plain values have the same text exactly when they are of the same types and print the same."""
    assert (literal_text(left) == literal_text(right)) == (repr(left) == repr(right))


def test_objects_have_no_text() -> None:
    """Anything that is not plain, at any depth, is refused."""
    for value in (object(), len, {1, 2}, [object()], {"a": object()}, (1, [len])):
        assert literal_text(value) is None


STANDARD = ["argparse", "ast", "dataclasses", "inspect", "typing", "enum", "tokenize", "contextlib", "functools", "shutil", "pathlib",
            "asyncio.base_events", "json.decoder", "email.message", "unittest.mock", "logging", "tarfile", "zipfile"]  # fmt: skip


def symbol_globals(table: symtable.SymbolTable) -> set[str]:
    """Global names that a compiler's symbol table says code reads or declares, below the module's own scope."""
    found = {s.get_name() for s in table.get_symbols() if s.is_global() and (s.is_referenced() or s.is_declared_global())}
    for child in table.get_children():
        found |= symbol_globals(child)
    return found


@pytest.mark.parametrize("name", STANDARD)
def test_no_global_read_of_real_code_is_missed(name: str) -> None:
    """For every top-level function and class of large modules, all names that the compiler calls global are found."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_bytes()
    nodes = [node for node in parse(source, spec.origin).body if hasattr(node, "decorator_list")]
    tables = symtable.symtable(source.decode(), spec.origin, "exec").get_children()
    tables = [table for table in tables if table.get_name() in {node.name for node in nodes} and table.get_type() in ("function", "class")]
    total = 0
    for node in nodes:
        wanted = set().union(*(symbol_globals(t) for t in tables if t.get_name() == node.name and t.get_lineno() in (node.lineno, *(d.lineno for d in node.decorator_list))))
        found = read_facts([node], {}).reads
        assert wanted <= found, (node.name, wanted - found)
        total += len(wanted)
    assert total > 20


def test_canonical_text_is_the_same_on_every_python() -> None:
    """The text of a file with all kinds of syntax is pinned, so that mixed versions of Python share snapshots."""
    source = b'''
from __future__ import annotations
import os.path as p, sys
from .. import x as y
@deco(1, *a, k=2, **b)
async def f(a: int = 1, /, b=..., *c, d: str = "e", **g) -> None:
    """Doc."""
    global h
    async with a as b, c: pass
    async for i in j: await k
    return [l async for l in m if n if o], {**q, "r": s}, {t for t in u}
class C(B, metaclass=M):
    x: int
    y: list[int] = [1, 2.5, 1j, b"z", None, True]
try:
    a[1:2, ::3] = b.c = d, *e
except (F, G) as g: raise H from g
except: del a, b[0]
else: assert a, "m"
finally: lambda *a, b=1: (yield)
try: pass
except* E: pass
while not a < b <= c is not d in e: continue
else: (z := -1)
match a:
    case C(1, x=[a, *_]) | {"k": None, **r}: a @= 1 if b else ~c
    case -1 | "s" as t if u: x //= f"a{b!r:>{c}}d{{}}" f"{e=}" "f"
'''
    assert digest_of(dump(parse(source, "x"))) == "0233bb249ecaa664ff7a03163d355513"


def test_the_keys_are_the_same_in_another_process_and_order(project: Project) -> None:
    """Hash randomisation does not reach a key: another process with another seed computes the same."""
    names = [f"name_{n}" for n in range(30)]
    random.Random(3).shuffle(names)
    body = "\n".join(f"{name} = {n}" for n, name in enumerate(names)) + f"\ndef load(ctx): return {', '.join(names)}\n"
    project.write("y = 1", "lib.py")
    project.write(START + "import lib\n" + body + HANDLER)
    program = (
        "import sys; from coldstart.keys import *; (h,) = find_handlers(sys.argv[1]);"
        "print(key_from_source(h, device_type='cpu', environment={}.get)[''].digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, project.path], env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            check=True, capture_output=True, text=True,
        ).stdout.strip()
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert digests == {project.before()[""].digest}


def test_the_start_path_stays_light() -> None:
    """Computing a key imports none of the slow modules that inspect source."""
    program = (
        "import sys; import coldstart.keys as k; k.find_handlers(k.__file__);"
        "print(*sorted({'ast', 'inspect', 'dataclasses', 'tokenize', 'linecache', 'asyncio', 'logging', 'subprocess'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); {program}"],
                          check=True, capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == ""
