"""One start as Chrome trace events (the JSON that ui.perfetto.dev and chrome://tracing open).

The format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Used of
it are complete events (``X``: ``ts`` and ``dur`` in microseconds, here since the process began), instants (``i``) and names
of processes and threads (``M``). Two events of one thread either follow one another or lie in one another.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import UsageError
from coldstart.imports.sums import OWNERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

WORKER, FETCH = 1, 2
"""Processes of the trace. What fetched, a process of its own or threads, is not in the document: it is shown apart."""

INTERPRETER = "interpreter and the command's first lines"


class Event(NamedTuple):
    """A stretch of time on a track of a process, in seconds since the process began."""

    process: int
    track: str
    name: str
    category: str
    began_seconds: float
    ended_seconds: float
    details: Mapping[str, Any]


def check_writable(path: str) -> None:
    """See to it that the file can be written, before there is anything to write. Raises UsageError."""
    existed = os.path.exists(path)
    try:
        with open(path, "ab"):
            pass
        if not existed:
            os.remove(path)
    except OSError as error:
        raise _unwritable(path, error) from error


def write_trace(path: str, document: Mapping[str, Any]) -> None:
    """Write the trace of a document of ``coldstart run``. Raises UsageError."""
    text = json.dumps(trace_of(document))
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: str, error: OSError) -> UsageError:
    return UsageError(
        f"--trace {path} cannot be written ({error.strerror}): give a file in a folder that can be written to"
    )


def trace_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """The trace as JSON takes it."""
    start = document["start"]
    threads: dict[tuple[int, str, int], int] = {}
    events = [_complete(event, threads, lane) for event, lane in _in_lanes(_events(document))]
    instants = [("ready", start["ready_seconds"]), ("first answer", document["first_answer_seconds"])]
    main = threads.setdefault((WORKER, "main", 0), len(threads) + 1)
    events += [
        {"ph": "i", "s": "p", "name": name, "cat": "start", "pid": WORKER, "tid": main, "ts": _us(seconds)}
        for name, seconds in instants
    ]
    return {
        "traceEvents": [*_names(start, threads), *events],
        "displayTimeUnit": "ms",
        "otherData": {
            "name": start["name"],
            "kind": start["kind"],
            "reason": start["reason"],
            "generation": start["generation"],
            "pid": start["pid"],
            "process_start_resolution_us": _us(start["process_start_resolution_seconds"]),
        },
    }


# --- what goes into it -----------------------------------------------------------------------------------------------


def _events(document: Mapping[str, Any]) -> list[Event]:
    start, imports = document["start"], document.get("imports")
    found = [
        Event(WORKER, "phases", phase["name"], "phase", phase["began_seconds"], phase["ended_seconds"], {})
        for phase in start["phases"]
        if not phase["skipped"]
    ]
    for span in start["spans"]:
        process, track = (FETCH, "fetch") if span["track"] == "fetch" else (WORKER, _track(span["track"]))
        details = dict(start["bytes"]) if span["name"] == "fetch" else {}
        found.append(Event(process, track, span["name"], "span", span["began_seconds"], span["ended_seconds"], details))
    answered = document["first_answer_seconds"]
    found.append(Event(WORKER, "phases", "first answer", "span", start["ready_seconds"], answered, {}))
    if imports is not None:
        found.append(Event(WORKER, "main", INTERPRETER, "interpreter", 0.0, imports["began_seconds"], {}))
        found += _import_events(imports)
    return found


def _track(track: str) -> str:
    return "phases" if track == "phase" else track


def _import_events(imports: Mapping[str, Any]) -> list[Event]:
    """Imports, on a track for each thread: the one that imported the handler's file first."""
    modules = imports["modules"]
    mains = [module["thread"] for module in modules if module["name"] == imports["handler"]]
    threads = list(dict.fromkeys([*mains, *(module["thread"] for module in modules)]))
    return [
        Event(
            WORKER,
            f"imports, thread {threads.index(module['thread']) + 1}",
            module["name"],
            "import",
            module["began_seconds"],
            module["ended_seconds"],
            {
                "counted to": OWNERS[module["owner"]],
                "imported by": module["importer"],
                "bytecode": "none: compiled first" if module["compiled"] else "there",
            },
        )
        for module in modules
    ]


# --- how it is written -----------------------------------------------------------------------------------------------


def _in_lanes(events: Iterable[Event]) -> list[tuple[Event, int]]:
    """Each event with its lane of its track: what overlaps without lying in one another takes another lane."""
    lanes: dict[tuple[int, str], list[list[int]]] = {}
    placed = []
    for event in sorted(events, key=lambda event: (_us(event.began_seconds), -_us(event.ended_seconds))):
        began, ended = _us(event.began_seconds), _us(event.ended_seconds)
        stacks = lanes.setdefault((event.process, event.track), [])
        lane = next((place for place, ends in enumerate(stacks) if _fits(ends, began, ended)), len(stacks))
        if lane == len(stacks):
            stacks.append([])
        stacks[lane].append(ended)
        placed.append((event, lane))
    return placed


def _fits(ends: list[int], began: int, ended: int) -> bool:
    """Whether an event that is next by its beginning lies within what is still open in a lane, or after all of it."""
    while ends and ends[-1] <= began:
        ends.pop()
    return not ends or ended <= ends[-1]


def _complete(event: Event, threads: dict[tuple[int, str, int], int], lane: int) -> dict[str, Any]:
    began, ended = _us(event.began_seconds), _us(event.ended_seconds)
    thread = threads.setdefault((event.process, event.track, lane), len(threads) + 1)
    return {
        "ph": "X",
        "name": event.name,
        "cat": event.category,
        "pid": event.process,
        "tid": thread,
        "ts": began,
        "dur": max(0, ended - began),
        "args": dict(event.details),
    }


def _names(start: Mapping[str, Any], threads: Mapping[tuple[int, str, int], int]) -> list[dict[str, Any]]:
    engines = ", ".join(start["engines"]) or "none"
    processes = {WORKER: f"worker {start['name']} (pid {start['pid']})", FETCH: f"fetch (engine: {engines})"}
    used = {process for process, _, _ in threads}
    named = [_name("process_name", process, 0, name) for process, name in processes.items() if process in used]
    for (process, track, lane), thread in threads.items():
        named.append(_name("thread_name", process, thread, f"{track} ({lane + 1})" if lane else track))
    return named


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "ts": 0, "args": {"name": name}}


def _us(seconds: float) -> int:
    return round(seconds * 1_000_000)
