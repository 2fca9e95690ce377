"""Keys: the same before and after the import of the handler's module, refused with a remedy, and explained."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coldstart.keys import explain_change, find_handlers
from coldstart.manifest import FORMAT_MAJOR, KeyRecord, check_name
from tests.key_project import HANDLER, START, Project, project_in, shape, uncomputable

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A folder for a handler and its modules."""
    with project_in(tmp_path, monkeypatch) as made:
        yield made


SHAPES = {
    "function": "def load(ctx):\n    return 1\n" + HANDLER,
    "no argument": "def load():\n    return 1\n" + HANDLER,
    "async function": "async def load(ctx):\n    return 1\n" + HANDLER,
    "lambda in the decorator": '@coldstart("m", load=lambda: [1])\ndef handler(event, model): return model',
    "lambda with parameters": '@coldstart("m", load=lambda ctx, *, size=3: [size])\ndef handler(event, model): return model',
    "lambda that is assigned": "load = lambda ctx: {'a': 1}\n" + HANDLER,
    "lambda over several lines": '@coldstart(\n  "m",\n  load=lambda ctx: (\n    1,\n  ),\n)\ndef handler(event, model): return model',
    "lambdas on one line": '@coldstart("m", load=lambda: 1, build=lambda: 2, init=lambda ctx, s: s)\ndef handler(e, m): return m',
    "build": """
        def load(ctx): return build(ctx)
        def build(ctx): return [ctx]
        @coldstart("m", load=load, build=build, init=lambda ctx, state: state)
        def handler(event, model): return model
    """,
    "parts": """
        def encoder(ctx): return 1
        @coldstart("m", load={"encoder": encoder, "adapter": lambda: 2}, build={"encoder": lambda ctx: 3})
        def handler(event, model): return model
    """,
    "partial": """
        from functools import partial
        def load_named(name, ctx, *, revision="main"): return name
        @coldstart("m", load=partial(load_named, "a", revision="b"))
        def handler(event, model): return model
    """,
    "partial of a partial": """
        import functools as ft
        NAME = "x"
        def load_named(name, size, ctx, revision=0): return name
        first = ft.partial(load_named, NAME, revision=1)
        load = ft.partial(first, (1, -2.5, None, b"x", True), revision=2)
    """
    + textwrap.indent(HANDLER, "        "),
    "alias": "def load_it(ctx): return 1\nfirst = load_it\nload = first\n" + HANDLER,
    "decorated with wraps": """
        from functools import wraps
        def logged(function):
            @wraps(function)
            def wrapper(ctx): return function(ctx)
            return wrapper
        @logged
        def load(ctx): return 1
    """
    + textwrap.indent(HANDLER, "        "),
    "cached": "from functools import lru_cache\n@lru_cache(maxsize=None)\ndef load(): return 1\n" + HANDLER,
    "in branches": """
        import sys
        if sys.platform == "linux":
            def load(ctx): return 1
        else:
            def load(ctx): return 2
    """
    + textwrap.indent(HANDLER, "        "),
    "handler in a branch": """
        def load(ctx): return 1
        try:
            @coldstart("m", load=load)
            def handler(event, model): return model
        except ValueError:
            raise
    """,
    "async handler": 'def load(ctx): return 1\n@coldstart("m", load=load)\nasync def handler(event, model): return model',
    "generator handler": 'def load(ctx): return 1\n@coldstart("m", load=load)\ndef handler(event, model): yield model',
    "assignment": 'def load(ctx): return 1\ndef serve(event, model): return model\nhandler = coldstart("m", load=load)(serve)',
    "annotated assignment": 'def load(ctx): return 1\ndef f(e, m): return m\nhandler: object = coldstart("m", load=load)(f)',
    "a class as loader": "class load:\n    SIZE = 3\n    def __init__(self, ctx): self.size = self.SIZE\n" + HANDLER,
    "version": 'def load(ctx): return 1\n@coldstart("m", load=load, version="7")\ndef handler(event, model): return model',
    "declared environment": 'NAMES = ("A", "B")\ndef load(ctx): return 1\n@coldstart("m", load=load, env=NAMES, secrets=["S"])\ndef handler(event, model): return model',
    "class": """
        @coldstart("m")
        class handler:
            name = "x"
            def load(self, ctx): self.model = self.make(self.name)
            @staticmethod
            def make(name): return name
            def build(self, ctx): self.model = None
            def handle(self, event): return self.model
    """,
    "class by assignment": """
        class Handler:
            def load(self, ctx): self.model = 1
            def handle(self, event): return self.model
        handler = coldstart("m")(Handler)
    """,
    "class with a local base": """
        class Base:
            size = 3
            def load(self, ctx): self.model = self.make()
            def make(self): return super().__repr__()
        @coldstart("m")
        class handler(Base):
            def make(self): return self.size + super().size
            def handle(self, event): return self.model
    """,
    "type hints and a match": """
        from __future__ import annotations
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from coldstart import Context
        def load(ctx: Context) -> dict[str, int]:
            match ctx:
                case {"a": [first, *rest], **others} if others: return {"n": first}
                case _: return {}
    """
    + textwrap.indent(HANDLER, "        "),
}


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
        text.format("other")
        .replace("import load", "import other")
        .replace("\nload =", "\nload_it =")
        .replace("load=load", "load=load_it")
    )
    assert second != first


WAITING = {
    "computed name": ('name = "m" + "x"', "coldstart(name, load=load)", "its name is computed"),
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
    text = (
        START
        + """
def make(model_id, revision):
    def load(ctx): return (model_id, revision, SIZE)
    @coldstart("m", load=load)
    def handler(event, model): return model
    return handler
SIZE = 3
"""
    )
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
    project.write(
        START
        + """
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
"""
    )
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


def test_what_runs_at_every_start_is_not_in_the_key(project: Project) -> None:
    """compile, init, close, the handler and the warm-up can change without a new snapshot."""
    text = (
        START
        + """
def load(ctx): return 1
def init(ctx, state): return HERE
def compile(ctx, state): return 1
HERE = 1
@coldstart("m", load=load, init=init, compile=compile, close=lambda m: 1, warmup=[{"a": 1}])
def handler(event, model):
    return HERE
"""
    )
    first = project.key(text)
    assert project.key(text.replace("1\n", "2\n").replace("return 2\ndef init", "return 1\ndef init")) == first
    assert project.key(text.replace('{"a": 1}', '{"b": 2}').replace("lambda m: 1", "lambda m: 2")) == first
    assert project.key(text.replace("load(ctx): return 1", "load(ctx): return 2")) != first


def test_load_and_build_are_told_apart(project: Project) -> None:
    """A change of build changes its part of the key and not that of load."""
    text = (
        START
        + """
def load(ctx): return 1
def build(ctx): return 2
@coldstart("m", load=load, build=build)
def handler(event, model): return model
"""
    )
    first, second = project.key(text), project.key(text.replace("return 2", "return 3"))
    assert first.parts["load"] == second.parts["load"]
    assert explain_change(first, second) == "code changed: build"
    third = project.key(text.replace(", build=build", ""))
    assert "build" not in third.parts
    assert explain_change(first, third) == "code changed: build"


def test_parts_have_keys_of_their_own(project: Project) -> None:
    """Each named part depends on its own loader only, and its name can name a snapshot."""
    text = (
        START
        + """
def encoder(ctx): return 1
def adapter(ctx): return 2
@coldstart("m", load={"encoder": encoder, "adapter": adapter})
def handler(event, model): return model
"""
    )
    first, second = project.keys(text), project.keys(text.replace("return 2", "return 3"))
    assert set(first) == {"encoder", "adapter"}
    assert first["encoder"] == second["encoder"]
    assert first["adapter"] != second["adapter"]
    assert [check_name(f"m={part}") for part in first] == ["m=encoder", "m=adapter"]


def record(**parts: str) -> KeyRecord:
    """A key of these parts; env_NAME stands for env:NAME."""
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
        "print(*sorted({'ast', 'inspect', 'dataclasses', 'tokenize', 'asyncio', 'logging', 'subprocess'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-IB", "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); {program}"],
                          check=True, capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == ""
