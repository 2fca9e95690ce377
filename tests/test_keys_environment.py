"""Environment variables in keys, and secrets that stay out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coldstart.keys import explain_change
from tests.key_project import HANDLER, START, Project, project_in, uncomputable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A folder for a handler and its modules."""
    with project_in(tmp_path, monkeypatch) as made:
        yield made


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
    "os by a star import": "from lib import *\ndef load(ctx): return os.environ['A']",
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


@pytest.mark.parametrize(
    "line",
    [
        "os.environ['A'] = ctx.name",
        "os.environ.update(ctx)",
        "del os.environ[ctx.name]",
        "os.environ.clear()",
        "os.putenv(ctx, 'x')",
    ],
)
def test_writing_the_environment_is_no_read(project: Project, line: str) -> None:
    """Setting variables puts nothing of the environment into the key."""
    key = project.key(START + f"import os\ndef load(ctx): {line}" + HANDLER)
    assert set(key.parts) == {"load", "device", "format"}


def test_unreached_environment_reads_do_not_matter(project: Project) -> None:
    """What only the handler or init read is not in the key, computed or not."""
    text = (
        START
        + "import os\nLEVEL = os.environ.get('LEVEL')\ndef load(ctx): return 1\ndef init(ctx, s): return dict(os.environ)"
    )
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
    text = (
        START
        + "import os\ndef load(ctx): return os.environ['A'], 1"
        + HANDLER.replace("load=load", 'load=load, version="v1", env=["B"]')
    )
    first = project.key(text)
    assert set(first.parts) == {"version", "env:B", "device", "format"}
    project.environment["A"] = "changed"
    assert project.key(text.replace(", 1", ", 2")) == first
    assert explain_change(first, project.key(text.replace("v1", "v2"))) == "version changed: v1 -> v2"
    project.environment["B"] = "changed"
    assert explain_change(first, project.key(text)) == "environment changed: B"
