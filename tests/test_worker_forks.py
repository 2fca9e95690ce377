"""Forks before, during and after a start: a child has a ready worker, an error, or a start of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.starts import ROOT, RUN_SECONDS

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


FORKS = """
import os, sys, threading, warnings
from coldstart import coldstart
from coldstart.errors import ForkError
from coldstart.registry import worker_for
warnings.simplefilter("ignore", DeprecationWarning)
loading, go = threading.Event(), threading.Event()

def load():
    loading.set()
    go.wait(60)
    return os.getpid()

@coldstart("a", load=load)
def slow(event, model):
    return model

@coldstart("b", load=lambda: os.getpid())
def fast(event, model):
    return model

def in_child(work):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, work().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answers:
        text = answers.read()
    os.waitpid(child, 0)
    return text

def error_of(handler):
    try:
        return str(handler({"input": 1}))
    except ForkError as error:
        return "ForkError " + worker_for(handler.__coldstart__).state
"""


def _forks(body: str, folder: Path) -> list[str]:
    (folder / "forks.py").write_text(FORKS + body)
    done = subprocess.run(
        [sys.executable, "forks.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLDSTART_LOG": "off"},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_fork_while_starting(tmp_path: Path) -> None:
    """In a child forked during the start every call is a ForkError; the parent's start is not disturbed."""
    body = """
worker_for(slow.__coldstart__).begin()
loading.wait(60)
print(in_child(lambda: error_of(slow) + ", again " + error_of(slow)))
go.set()
print(error_of(slow) == str(os.getpid()))
"""
    assert _forks(body, tmp_path) == ["ForkError failed, again ForkError failed", "True"]


def test_fork_when_ready(tmp_path: Path) -> None:
    """A child forked from a ready worker answers from the parent's state, counts for itself, and can be closed."""
    body = """
print(fast({"input": 1}) == os.getpid())
parent = str(os.getpid())
def work():
    worker = worker_for(fast.__coldstart__)
    answers = {error_of(fast) for _ in range(3)}
    counted = worker.metrics.warm.count
    worker.close()
    return f"{answers == {parent}} {counted} {worker.state}"
print(in_child(work))
print(worker_for(fast.__coldstart__).metrics.warm.count)
"""
    assert _forks(body, tmp_path) == ["True", "True 3 closed", "1"]


def test_fork_before_the_start(tmp_path: Path) -> None:
    """A child forked before anybody asked starts a worker of its own, and so does its parent."""
    body = """
go.set()
print(in_child(lambda: str(error_of(slow) == str(os.getpid()))))
print(error_of(slow) == str(os.getpid()))
"""
    assert _forks(body, tmp_path) == ["True", "True"]


def test_fork_of_an_early_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child forked while a prefetch is under way does not wait for the prefetch's threads, which it does not have."""
    monkeypatch.setenv("COLDSTART_STORE", f"file://{tmp_path}/store")
    (tmp_path / "huggingface_hub.py").write_text("")
    body = """
from coldstart import prefetch
from coldstart.restore import Restoration

Restoration._run = lambda self: threading.Event().wait()  # a store that never answers
prefetch("b")

def import_hub():
    import huggingface_hub
    return "imported"
print(in_child(import_hub))
"""
    assert _forks(body, tmp_path) == ["imported"]
