"""Canonical text of source and values, and the names that code reads."""

from __future__ import annotations

import importlib.util
import symtable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.keys.facts import read_facts
from coldstart.keys.syntax import digest_of, dump, literal_text, parse
from tests.key_project import Project, project_in

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A folder for a handler and its modules."""
    with project_in(tmp_path, monkeypatch) as made:
        yield made


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
)


@given(left=plain, right=plain)
def test_texts_of_plain_values_tell_them_apart(left: object, right: object) -> None:
    """Two plain values have the same text exactly when they are of the same types and print the same."""
    assert (literal_text(left) == literal_text(right)) == (repr(left) == repr(right))


def test_objects_have_no_text() -> None:
    """Anything that is not plain, at any depth, is refused."""
    for value in (object(), len, {1, 2}, [object()], {"a": object()}, (1, [len])):
        assert literal_text(value) is None


STANDARD = ["argparse", "ast", "dataclasses", "inspect", "typing", "enum", "tokenize", "contextlib", "functools", "shutil", "subprocess",
            "asyncio.base_events", "json.decoder", "email.message", "unittest.mock", "logging", "tarfile", "zipfile"]  # fmt: skip


def symbol_globals(table: symtable.SymbolTable) -> set[str]:
    """Global names that a compiler's symbol table says code reads or declares, below the module's own scope."""
    found = {
        s.get_name() for s in table.get_symbols() if s.is_global() and (s.is_referenced() or s.is_declared_global())
    }
    for child in table.get_children():
        found |= symbol_globals(child)
    return found - {"__class__"}  # the compiler's own: the cell that super() reads


@pytest.mark.parametrize("name", STANDARD)
def test_no_global_read_of_real_code_is_missed(name: str) -> None:
    """For every top-level function and class of large modules, all names that the compiler calls global are found."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_bytes()
    nodes = [node for node in parse(source, spec.origin).body if hasattr(node, "decorator_list")]
    tables = symtable.symtable(source.decode(), spec.origin, "exec").get_children()
    tables = [
        table
        for table in tables
        if table.get_name() in {node.name for node in nodes} and table.get_type() in ("function", "class")
    ]
    total = 0
    for node in nodes:
        wanted = set().union(
            *(
                symbol_globals(t)
                for t in tables
                if t.get_name() == node.name
                and t.get_lineno() in (node.lineno, *(d.lineno for d in node.decorator_list))
            )
        )
        found = read_facts([node], {}).reads
        assert wanted <= found, (node.name, wanted - found)
        total += len(wanted)
    assert total > 20


def test_splits_of_an_f_string_do_not_matter() -> None:
    """Texts of an f-string that one Python joins and another splits, or leaves empty, have one canonical text."""
    whole, split = (parse(b"f'a{b}c{d}'", "x").body[0].value for _ in range(2))
    constant = type(whole.values[0])
    split.values[:1] = [constant(value=""), constant(value="a"), constant(value="")]
    split.values[-1:] = [split.values[-1], constant(value="")]
    assert dump(split) == dump(whole)
    split.values[0] = constant(value="z")
    assert dump(split) != dump(whole)


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
