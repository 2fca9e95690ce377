"""``check``: does a handler restore as it loads? In real processes, with a temporary store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.config import child_environment
from coldstart.definition import definition_of
from coldstart.errors import ColdstartError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.decorator import Handler

CHECK_SECONDS = 600.0
"""How long one process may take."""

_PLAIN = {"COLDSTART_LOG": "off", "COLDSTART_FRESH": None, "COLDSTART_CAPTURE": None, "COLDSTART_SKIP_PHASES": None}
"""What a start has to be like to be compared, whatever this process' own environment says."""


class CheckFailed(ColdstartError, AssertionError):  # noqa: N818  it reads as pytest's failures do
    """A handler does not do in a restored process what it does in the first one."""


class CheckReport(NamedTuple):
    """``outputs``: the first worker's answer to each input. ``rung``: what the snapshot holds (arrays, files)."""

    outputs: tuple[Any, ...]
    rung: str
    raw_bytes: int
    stored_bytes: int


def check(handler: Handler[Any, Any] | type, *, inputs: Sequence[Any]) -> CheckReport:
    """Start the handler in a fresh process that loads and captures, then once per input in processes that restore.

    The handler has to be in a file, at its top level. Raises CheckFailed when no snapshot comes of it, when a start is
    not ``restored``, or when an answer differs from that of a process that loaded.
    """
    definition = definition_of(handler)
    target = f"{definition.file}:{definition.name}"
    if not inputs:
        raise CheckFailed("check(handler, inputs=[...]) needs at least one input")
    with tempfile.TemporaryDirectory(prefix="coldstart-check-") as folder:
        changes = {
            "COLDSTART_STORE": f"file://{folder}/store",
            "COLDSTART_STORE_REPLICAS": None,
            "COLDSTART_FILES_FOLDER": f"{folder}/files",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **_PLAIN,
        }
        first = _run(target, inputs[0], changes)
        if not first["capture"]["published"]:
            raise CheckFailed(
                f"{definition.name!r} made no snapshot: {first['capture']['reason'] or 'it took too long'}"
            )
        without_store = {**changes, "COLDSTART_STORE": "off"}
        loaded = [first["output"], *(_run(target, value, without_store)["output"] for value in inputs[1:])]
        restored = [_run(target, value, changes) for value in inputs]
    for value, expected, got in zip(inputs, loaded, restored, strict=True):
        if got["start"]["kind"] != "restored":
            raise CheckFailed(f"{definition.name!r} started {got['start']['kind']}: {got['start']['reason']}")
        if repr(got["output"]) != repr(expected):  # by repr: one NaN is like another
            raise CheckFailed(
                f"{definition.name!r} answers {value!r} differently when restored: {got['output']!r}, not {expected!r}"
            )
    start = restored[0]["start"]
    return CheckReport(tuple(loaded), start["rung"], start["bytes"]["raw"], start["bytes"]["stored"])


def _run(target: str, value: Any, changes: Mapping[str, str | None]) -> Any:
    command = [sys.executable, "-m", "coldstart", "run", target, "--input", json.dumps(value), "--json"]
    environment = child_environment(changes)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"the handler's process took longer than {CHECK_SECONDS:.0f} s with {value!r}") from error
    if done.returncode:
        raise CheckFailed(f"the handler's process failed with {value!r}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
