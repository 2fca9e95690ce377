"""What of a file a key depends on, and what not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.key_project import HANDLER, LOAD, START, Project, project_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A folder for a handler and its modules."""
    with project_in(tmp_path, monkeypatch) as made:
        yield made


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
    "a variable set before it is read": (
        "import os\nos.environ['Q'] = '1'\ndef load(ctx): return os.environ['Q']",
        "import os\nos.environ['Q'] = '2'\ndef load(ctx): return os.environ['Q']",
    ),
    "another name of the same value": (LOAD + "X = Y = {}\nY['a'] = 1", LOAD + "X = Y = {}\nY['a'] = 2"),
    "the order of assignments with effects": (
        LOAD + "X = [1, 2, 3]\na = X.pop(0)\nb = X.pop(1)",
        LOAD + "X = [1, 2, 3]\nb = X.pop(1)\na = X.pop(0)",
    ),
    "a call in a class body": (
        LOAD + "X = []\nclass C:\n    X.append(1)",
        LOAD + "X = []\nclass C:\n    X.append(2)",
    ),
    "variables set before one is read": (
        "import os\nos.environ.update(Q='1')\ndef load(ctx): return os.environ.get('Q')",
        "import os\nos.environ.update(Q='2')\ndef load(ctx): return os.environ.get('Q')",
    ),
    "a variable set before it is looked for": (
        "import os\nos.environ['Q'] = ''\ndef load(ctx): return 'Q' in os.environ",
        "import os\nos.environ['R'] = ''\ndef load(ctx): return 'Q' in os.environ",
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
    "a class's docstring": (
        "def load(ctx): return C\nclass C: a = 1",
        "def load(ctx): return C\nclass C:\n    '''Doc.'''\n    a = 1",
    ),
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
    "another name of the same import": (
        "from math import pi as X, e\n" + LOAD,
        "from math import tau, pi as X\n" + LOAD,
    ),
    "what happens under the main guard": (
        LOAD + "X = []\nif __name__ == '__main__': X.append(1)",
        LOAD + "X = []\nif __name__ == '__main__': X.append(2)",
    ),
    "logging set-up": (
        "import logging\nlog = logging.getLogger()\nlogging.basicConfig(level=30)\ndef load(ctx): return log",
        "import logging\nlog = logging.getLogger()\nlogging.basicConfig(level=40)\ndef load(ctx): return log",
    ),
    "a text that is printed": (LOAD + "X = 'a'\nprint(X)", LOAD + "X = 'a'\nprint(X, X)"),
    "an f-string that is printed": (
        LOAD + "Y = 1\nX = f'{Y}'\nprint(X)",
        LOAD + "Y = 1\nX = f'{Y}'\nprint(X, X)",
    ),
    "another call of a helper": (
        LOAD + "X = use(1)\ny = use(2)",
        LOAD + "X = use(1)\ny = use(3)",
    ),
    "a call of coldstart": (LOAD + "X = []\ncoldstart.subscribe(print)()", LOAD + "X = []\ncoldstart.subscribe(len)()"),
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


DEFINITIONS = ["X = Y + 1", "Y = 2", "def load(ctx): return a(X), C()", "def a(n): return b(n) if n else Y",
               "def b(n): return a(n - 1)", "class C:\n    y = 1", "unrelated = 9", "def other(): return X"]  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(DEFINITIONS),
    noise=st.lists(st.sampled_from(["", "# note", "'text'", "\f"]), min_size=8, max_size=8),
)
def test_order_of_definitions_and_comments_do_not_matter(project: Project, order: list[str], noise: list[str]) -> None:
    """Any order of the same definitions, with any comments between them, has one key."""

    def digest(lines: list[str]) -> str:
        project.write(START + "\n".join(lines) + HANDLER)
        return project.before()[""].digest

    mixed = [line for pair in zip(noise, order, strict=True) for line in pair]
    assert digest(mixed) == digest(DEFINITIONS)
