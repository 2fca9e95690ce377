"""A worker whose platform freezes its process: what is let go before, made anew after, and what the record says."""

from __future__ import annotations

import os
import random
import threading

import pytest

from coldstart import coldstart, events
from coldstart.registry import enter_serving, worker_for
from coldstart.repository import Repository
from coldstart.stores.memory import MemoryStore
from coldstart.testing import Fault, FaultyStore
from tests.starts import Project, Seen

DOUBLED = """
from coldstart import coldstart

@coldstart("scales", load=lambda: {"a": 2.0}, warmup=[1])
def handler(event, model):
    return model["a"] * event["input"]
"""
"""A handler that doubles its input."""

SETTLED = """
import json, os, shutil, subprocess, sys, threading
sys.path.insert(0, ".")
from coldstart.loading import import_file
from coldstart.registry import enter_serving, worker_for
handler = import_file("handler.py").handler
enter_serving()
worker = worker_for(handler.__coldstart__)
worker.fetch_only()
worker.prepare_freeze()
"""
"""The beginning of a process whose worker has fetched and may be frozen now."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """Workers of these tests have a store of their own and write no log lines."""
    monkeypatch.setenv("COLDSTART_STORE", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("COLDSTART_LOG", "off")
    monkeypatch.setenv("COLDSTART_CAPTURE", "off")


def handler_of(**options):
    """A handler whose state is the number 10."""

    def answer(event, model):
        return model + event["input"]

    return coldstart("frozen", **{"load": lambda: 10, "version": "1", **options})(answer)


def project_in(folder):
    """A project of the test's own, whose processes make snapshots."""
    project = Project(folder / "project")
    project.environment["COLDSTART_CAPTURE"] = "on"
    return project


def settled(project, code, **environment):
    """What a process prints that runs ``code`` once its worker has fetched and settled."""
    start = project.python("-c", SETTLED + code, environment=environment)
    assert start.code == 0, start.errors
    return start


def threads():
    """The names of this process' threads that are coldstart's."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("coldstart"))


def records(tmp_path):
    """The start records in the store."""
    return list((tmp_path / "store" / "starts").rglob("*.json"))


def test_a_held_worker_goes_no_further_than_ready(tmp_path):
    """Before the platform's snapshot there is no log, record or capture; after ``release_after_ready`` there is, once."""
    worker = worker_for(handler_of().__coldstart__)
    enter_serving()
    worker.hold_after_ready()
    worker.wait()
    worker.prepare_freeze()
    assert (threads(), records(tmp_path)) == ([], [])
    worker.release_after_ready()
    worker.release_after_ready()
    worker.close()
    assert len(records(tmp_path)) == 1


def test_settling_leaves_no_thread_even_where_hooks_are_async():
    """The private loop of a handler with async hooks ends with ``prepare_freeze``, and another is made when it is needed."""
    seen = []

    async def init(ctx, state):
        return state

    async def after_restore(ctx, model):
        seen.append((ctx.device, model))

    handler = handler_of(init=init, after_restore=after_restore)
    worker = worker_for(handler.__coldstart__)
    worker.hold_after_ready()
    worker.wait()
    worker.prepare_freeze()
    assert threads() == []
    worker.thaw("platform", "a test")
    assert seen == [("cpu", 10)]
    assert handler({"input": 1}) == 11


def test_the_hooks_run_around_a_freeze_in_their_order():
    """``before_snapshot`` gets the model, ``after_restore`` the context and the model, with the variables of now."""
    did = []
    handler = handler_of(
        secrets=["TOKEN"],
        before_snapshot=lambda model: did.append(("before", model)),
        after_restore=lambda ctx, model: did.append(("after", ctx.secret("TOKEN"), model)),
    )
    os.environ["TOKEN"] = "old"
    try:
        worker = worker_for(handler.__coldstart__)
        worker.hold_after_ready()
        worker.wait()
        worker.prepare_freeze()
        os.environ["TOKEN"] = "new"
        worker.thaw("platform", "a test")
    finally:
        del os.environ["TOKEN"]
    assert did == [("before", 10), ("after", "new", 10)]


def test_hooks_of_a_class_are_methods():
    """In class form both hooks are methods of the instance that serves."""
    did = []

    @coldstart("frozen")
    class Model:
        def load(self):
            self.number = 1

        def handle(self, event):
            return self.number

        def before_snapshot(self):
            did.append(("before", self.number))

        def after_restore(self, ctx):
            did.append(("after", ctx.kind, self.number))

    worker = worker_for(Model.__coldstart__)
    worker.hold_after_ready()
    worker.wait()
    worker.prepare_freeze()
    worker.thaw("platform", "a test")
    assert did == [("before", 1), ("after", "cold", 1)]


def test_waking_gives_new_random_numbers_and_says_so():
    """After a freeze random numbers are others, and an event tells subscribers."""
    seen = Seen("frozen")
    worker = worker_for(handler_of().__coldstart__)
    worker.wait()
    random.seed(1)
    expected = random.Random(1).random()
    worker.thaw("thawed", "a test")
    assert random.random() != expected
    woke = seen.wait_for(events.WorkerThawed)
    assert (woke.kind, woke.reason) == ("thawed", "a test")
    seen.stop()


def test_the_record_of_a_thaw_has_what_lay_before_apart():
    """Its phases are amortised, its seconds count from the waking, and what the start was by itself is kept."""
    worker = worker_for(handler_of(init=lambda ctx, state: state, after_restore=lambda ctx, model: None).__coldstart__)
    worker.wait()
    before = worker.record
    assert (before["kind"], before["own_kind"], before["amortised"]) == ("cold", "cold", None)
    worker.thaw("thawed", "stood still")
    after = worker.record
    assert (after["kind"], after["own_kind"], after["reason"]) == ("thawed", "cold", "stood still")
    assert after["phases"] == []
    assert [span["name"] for span in after["spans"]] == ["after_restore"]
    assert after["amortised"]["phases"] == before["phases"]
    assert after["amortised"]["ready_seconds"] == before["ready_seconds"]
    assert after["process_start_source"] == "platform"
    assert 0 <= after["ready_seconds"] < before["ready_seconds"]  # which counts from when pytest began
    assert set(after["bytes"].values()) == {0}


def test_what_was_fetched_before_a_freeze_is_used_after_it(tmp_path, monkeypatch):
    """``fetch_only`` brings the snapshot into memory and leaves no thread; the start after it reads nothing of the store."""
    project = project_in(tmp_path)
    project.write(DOUBLED)
    first = project.run()
    assert first.capture["published"], first.capture
    code = """
left = [thread.name for thread in threading.enumerate() if thread.name.startswith("coldstart")]
shutil.rmtree("store")
worker.thaw("platform", "a test", {})
answer = handler({"input": 3})
print(json.dumps({"left": left, "answer": answer, "start": worker.record}))
"""
    start = settled(project, code)
    assert (start.document["left"], start.document["answer"]) == ([], 6.0)
    assert (start.kind, start.record["own_kind"]) == ("platform", "restored")
    assert {span["name"] for span in start.record["amortised"]["spans"]} >= {"look up", "fetch"}
    assert all(span["began_seconds"] >= 0 for span in start.record["spans"])


def test_nothing_found_before_a_freeze_is_looked_for_after_it(tmp_path):
    """A snapshot that was made between the fetch and the start is found: a miss before a freeze is not kept."""
    project = project_in(tmp_path)
    project.write(DOUBLED)
    code = """
subprocess.run([sys.executable, "-m", "coldstart", "run", "handler.py", "--json"], check=True, stdout=subprocess.DEVNULL)
worker.thaw("platform", "a test", {})
answer = handler({"input": 3})
print(json.dumps({"answer": answer, "start": worker.record}))
"""
    start = settled(project, code)
    assert (start.document["answer"], start.record["own_kind"]) == (6.0, "restored")


def test_a_variable_that_the_platform_changed_changes_the_key(tmp_path):
    """What was fetched for the value of a declared variable before the freeze is not used for another one after it."""
    project = project_in(tmp_path)
    project.write("""
        from coldstart import coldstart

        def load(ctx):
            return {"size": ctx.env("SIZE")}

        @coldstart("sizes", load=load, env=["SIZE"], warmup=[1])
        def handler(event, model):
            return model["size"]
        """)
    for size in ("small", "large"):
        assert project.run(SIZE=size).capture["published"]
    code = """
os.environ["SIZE"] = "large"
worker.thaw("platform", "a test", {"SIZE": "large"})
print(json.dumps({"answer": handler({"input": 3}), "start": worker.record}))
"""
    start = settled(project, code, SIZE="small")
    assert (start.document["answer"], start.record["own_kind"]) == ("large", "restored")


@pytest.mark.parametrize("hook", ["before_snapshot", "after_restore"])
def test_a_hook_that_hangs_is_reported_and_the_worker_goes_on(monkeypatch, hook):
    """Past its limit a hook is left to itself: an event names it, and the worker answers."""
    monkeypatch.setenv("COLDSTART_HOOK_SECONDS", "0.05")
    released = threading.Event()
    handler = handler_of(**{hook: lambda *_: released.wait(60)})
    seen = Seen("frozen")
    worker = worker_for(handler.__coldstart__)
    worker.hold_after_ready()
    worker.wait()
    try:
        worker.prepare_freeze()
        worker.thaw("platform", "a test")
        assert seen.of(events.HookOverran) == [events.HookOverran("frozen", hook, 0.05)]
        assert handler({"input": 1}) == 11
    finally:
        released.set()
        seen.stop()


@pytest.mark.parametrize("seconds", ["0", "60"])
def test_what_a_hook_raises_is_raised(monkeypatch, seconds):
    """With a limit or without, the error of a hook is its caller's, and a hook in time is not reported."""
    monkeypatch.setenv("COLDSTART_HOOK_SECONDS", seconds)

    def fails(model):
        raise RuntimeError("no way to close")

    seen = Seen("frozen")
    worker = worker_for(handler_of(before_snapshot=fails).__coldstart__)
    worker.hold_after_ready()
    worker.wait()
    with pytest.raises(RuntimeError, match="no way to close"):
        worker.prepare_freeze()
    assert seen.of(events.HookOverran) == []
    seen.stop()


@pytest.mark.parametrize(
    ("fault", "told", "tried"),
    [
        (Fault("denied", "put", "starts/*", times=None), "start records are off", 1),
        (Fault("transient_before", "put", "starts/*", times=None), "this start has no record", 2),
    ],
)
def test_who_may_not_write_is_told_once(monkeypatch, fault, told, tried):
    """Start records that are refused are not tried again; a store that fails for once is asked for the next one."""
    monkeypatch.setenv("COLDSTART_STORE", "memory://records")
    seen = Seen("frozen")
    worker = worker_for(handler_of().__coldstart__)
    enter_serving()
    worker.hold_after_ready()
    worker.wait()
    store = FaultyStore(MemoryStore(), [fault])
    parts = worker._parts
    parts.open_repository = lambda: Repository(store)
    for _ in range(2):
        parts.write_record(worker.record)
    assert store.count("put", "starts/*") == tried
    assert [event.reason.split(":")[0] for event in seen.of(events.StoreDegraded)] == [told] * tried
    seen.stop()
