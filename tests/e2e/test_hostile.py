"""What users do by accident, end to end: each was once answered wrongly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(folder: Path, target: str, *words: str, **variables: str) -> dict[str, Any]:
    """One ``coldstart run --json`` of a file in ``folder``, with a store and a files folder of the test's own."""
    own = {
        "COLDSTART_STORE": f"file://{folder}/store",
        "COLDSTART_FILES_FOLDER": f"{folder}/files",
        "COLDSTART_LOG": "off",
    }
    done = subprocess.run(
        [sys.executable, "-m", "coldstart", "run", target, "--json", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **own, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def write(folder: Path, body: str) -> None:
    """A handler file ``h.py`` with the usual imports above ``body``."""
    (folder / "h.py").write_text(f"import numpy as np\n\nfrom coldstart import coldstart\n\n{body}")


def test_a_start_without_its_warmup_publishes_nothing(tmp_path: Path) -> None:
    """A generation whose warm-up was switched off could not be proven, so there is none."""
    write(
        tmp_path,
        "@coldstart('h', load=lambda: {'a': np.ones(2)}, warmup=[1])\n"
        "def handler(event, m):\n    return m['a'].tolist()\n",
    )
    document = run(tmp_path, "h.py", COLDSTART_SKIP_PHASES="warmup_inference")
    assert not document["capture"]["published"]
    assert "could not be proven" in document["capture"]["reason"]


def test_a_generation_without_compared_answers_says_so(tmp_path: Path) -> None:
    """Without warm-up inputs the proof is a start alone, and the report names what is missing."""
    write(
        tmp_path,
        "@coldstart('h', load=lambda: {'a': np.ones(2)})\ndef handler(event, m):\n    return m['a'].tolist()\n",
    )
    capture = run(tmp_path, "h.py", "--input", "1")["capture"]
    assert capture["published"]
    assert "no answers were compared" in capture["reason"]


def test_a_handler_that_calls_another_is_captured(tmp_path: Path) -> None:
    """The proof pins the generation of one handler, and the other one starts by itself."""
    write(
        tmp_path,
        "@coldstart('inner', load=lambda: {'a': np.ones(2)}, warmup=[1])\n"
        "def inner(event, m):\n    return float(m['a'].sum())\n\n"
        "@coldstart('outer', load=lambda: {'a': np.ones(5)}, warmup=[1])\n"
        "def outer(event, m):\n    return float(m['a'].sum()) + inner({'input': 1})\n",
    )
    first, second = run(tmp_path, "h.py:outer"), run(tmp_path, "h.py:outer")
    assert first["capture"]["published"], first["capture"]
    assert (second["start"]["kind"], second["output"]) == ("restored", 7.0)


def test_a_handler_may_change_its_input(tmp_path: Path) -> None:
    """Warm-up inputs are handed out as copies, so each start and each iteration sees the whole input."""
    write(
        tmp_path,
        "@coldstart('h', load=lambda: {'a': np.ones(2)}, warmup=[{'x': 2}])\n"
        "def handler(event, m):\n    return float(m['a'].sum()) * event['input'].pop('x')\n",
    )
    first = run(tmp_path, "h.py", "--input", '{"x": 3}')
    assert first["capture"]["published"], first["capture"]
    assert run(tmp_path, "h.py")["output"] == 4.0


def test_a_kept_file_that_is_gone_costs_the_snapshot_alone(tmp_path: Path) -> None:
    """A file that load kept and then removed is no reason to fail the start."""
    write(
        tmp_path,
        "import tempfile\n\ndef load(ctx):\n    with tempfile.NamedTemporaryFile() as file:\n"
        "        ctx.keep(file.name, name='v')\n    return {'a': np.ones(2)}\n\n"
        "@coldstart('h', load=load, warmup=[1])\ndef handler(event, m):\n    return m['a'].tolist()\n",
    )
    document = run(tmp_path, "h.py")
    assert document["output"] == [1.0, 1.0]
    assert not document["capture"]["published"]


def test_an_altered_restored_file_is_written_anew(tmp_path: Path) -> None:
    """Bytes that somebody changed in the folder of restored files, size unchanged, are not what a start gets."""
    (tmp_path / "v.txt").write_text("right!")
    write(
        tmp_path,
        "def load(ctx):\n    ctx.keep('v.txt')\n    return {}\n\n"
        "@coldstart('h', load=load, init=lambda ctx, state: open(ctx.files['v.txt']).read(), warmup=[1])\n"
        "def handler(event, text):\n    return text\n",
    )
    run(tmp_path, "h.py")
    run(tmp_path, "h.py")
    (placed,) = (tmp_path / "files").rglob("v.txt")
    placed.chmod(0o600)
    placed.write_text("wrong!")
    document = run(tmp_path, "h.py")
    assert (document["start"]["kind"], document["output"]) == ("restored", "right!")


def test_a_users_module_does_not_shadow_the_proofs(tmp_path: Path) -> None:
    """A file named like one of the standard library's, in the folder that the worker was started in, breaks no proof."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "secrets.py").write_text("raise ImportError('the wrong one')\n")
    (tmp_path / "dataclasses.py").write_text("raise ImportError('the wrong one')\n")
    body = "@coldstart('h', load=lambda: {'a': [1]}, warmup=[1])\ndef handler(event, m):\n    return m['a']\n"
    (tmp_path / "elsewhere" / "h.py").write_text(f"from coldstart import coldstart\n\n{body}")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "coldstart", "run", "elsewhere/h.py", "--json"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "COLDSTART_STORE": f"file://{tmp_path}/store",
            "COLDSTART_LOG": "off",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert json.loads(done.stdout)["capture"]["published"], done.stdout
