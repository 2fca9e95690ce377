"""How places in a state are named."""

from __future__ import annotations

import enum
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.frameworks.paths import ROOT, attribute, item, shown

KEYS = st.recursive(
    st.text() | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False) | st.binary(),
    lambda keys: st.lists(keys, max_size=3).map(tuple),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (attribute(ROOT, "encoder"), "encoder"),
        (attribute("encoder", "0"), "encoder.0"),
        (attribute("a", "two words"), 'a."two words"'),
        (attribute(ROOT, ""), '""'),
        (item(ROOT, "w", 0), '["w"]'),
        (item("a", 3, 7), "a[3]"),
        (item("a", -3, 0), "a[-3]"),
        (item("a", True, 0), "a[True]"),
        (item("a", None, 0), "a[None]"),
        (item("a", 1.5, 0), "a[1.5]"),
        (item("a", b"\xff", 0), "a[b'\\xff']"),
        (item("a", ("x", 1), 0), 'a[("x", 1,)]'),
        (item("a", 'quote"', 0), 'a["quote\\""]'),
        (item("a", "ümlaut", 0), 'a["ümlaut"]'),
        (item("a", "\ud800", 0), 'a["\\ud800"]'),
    ],
)
def test_paths_read_as_python_would_write_them(path: str, expected: str):
    """Attributes, items and odd names have one readable spelling each."""
    assert path == expected


@pytest.mark.parametrize(
    "key", [object(), enum.Enum("Color", "RED").RED, float("nan"), 1 << 80, (1, object()), ((((((1,),),),),),)]
)
def test_a_key_without_a_text_of_its_own_is_named_by_its_position(key: object):
    """Nothing of an address or a repr that another process would not repeat gets into a path."""
    assert item("a", key, 2) == f"a[{type(key).__name__}#2]"


@given(st.lists(KEYS, unique_by=lambda key: (type(key).__name__, repr(key))))
def test_no_two_keys_of_a_dict_share_a_path(keys: list[object]):
    """Distinct keys of one dict have distinct paths, also those that print alike."""
    distinct = list(dict.fromkeys(keys))
    paths = [item("a", key, position) for position, key in enumerate(distinct)]
    assert len(set(paths)) == len(distinct)


@given(st.lists(st.text(), unique=True), st.lists(st.text(), unique=True))
def test_no_two_attributes_share_a_path(names: list[str], inner: list[str]):
    """A name with dots and brackets in it cannot look like an attribute of an attribute, or an item."""
    paths = [attribute(ROOT, name) for name in names]
    deeper = [attribute(attribute(ROOT, name), other) for name in names for other in inner]
    items = [item(attribute(ROOT, name), other, 0) for name in names for other in inner]
    assert len({*paths, *deeper, *items}) == len(paths) + len(deeper) + len(items)
    assert ROOT not in {*paths, *deeper, *items}


def test_a_person_reads_them_as_parts_of_the_state():
    """Messages say state.x and state["k"], whatever the path begins with."""
    assert [shown(path) for path in (ROOT, "a.b", '["k"]')] == ["state", "state.a.b", 'state["k"]']


def test_a_state_without_torch_imports_no_torch():
    """A tree of numpy arrays is surveyed, stored and made again in a process that never imports torch."""
    code = """
import sys, numpy as np
from coldstart.frameworks import survey, arrays, rebuild
assert "numpy" in sys.modules
found = survey({"w": np.arange(3), "n": [1, None]})
leaves = [leaf.leaf for leaf in found.leaves]
made = rebuild(found.tree, arrays(leaves, lambda i: found.storages[i].data.copy()))
assert made["w"].tolist() == [0, 1, 2] and made["n"] == [1, None]
assert not [name for name in sys.modules if name == "torch" or name.startswith("torch.")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_importing_imports_neither_torch_nor_numpy():
    """The package itself is light: arrays' libraries come with the first array."""
    code = "import sys, coldstart.frameworks; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
