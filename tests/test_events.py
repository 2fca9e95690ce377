"""The bus: order, replay, failing subscribers; and the log lines made from events."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart import config, events, sinks
from coldstart.events import (
    CaptureFailed,
    EventBus,
    FetchProgress,
    PhaseBegan,
    PhaseEnded,
    StateChanged,
    SubscriberFailed,
    UserLine,
    WorkerFailed,
    WorkerReady,
    error_text,
)

KINDS = tuple(
    kind
    for kind in vars(events).values()
    if isinstance(kind, type) and issubclass(kind, tuple) and kind.__module__ == events.__name__
)
PLANTED = "planted/secret+value"


def sample(kind):
    """An event of any kind, with a value of the right type in every field."""
    values = {"str": "text", "int": 7, "float": 0.25, "tuple[str, ...]": ("a.b",), "Mapping[str, Any]": {"k": 1}}
    return kind(*(values[annotation.__forward_arg__] for annotation in kind.__annotations__.values()))


def numbered(number):
    """An event that can be told from others."""
    return PhaseBegan("minilm", str(number))


# --- the bus ---------------------------------------------------------------------------------------------------------


def test_subscribers_get_events_in_order():
    """Every subscriber sees every event published after it subscribed, in the order of publishing."""
    bus, first, second = EventBus(), [], []
    bus.subscribe(first.append)
    bus.publish(numbered(1))
    bus.subscribe(second.append)
    bus.publish(numbered(2))
    assert first == [numbered(1), numbered(2)]
    assert second == [numbered(2)]


def test_past_events_are_replayed_to_those_who_ask():
    """A subscriber with replay gets what was before it first, then what comes; so does every later one."""
    bus = EventBus()
    bus.publish(numbered(1))
    for _ in range(2):
        seen = []
        unsubscribe = bus.subscribe(seen.append, replay=True)
        assert seen == [numbered(1)]
        unsubscribe()


def test_only_the_newest_events_are_kept():
    """The history is bounded: the oldest events go first."""
    bus, seen = EventBus(), []
    for number in range(events.KEPT_EVENTS + 3):
        bus.publish(numbered(number))
    bus.subscribe(seen.append, replay=True)
    assert len(seen) == events.KEPT_EVENTS
    assert (seen[0], seen[-1]) == (numbered(3), numbered(events.KEPT_EVENTS + 2))


def test_a_stamped_subscriber_learns_when_events_were_published():
    """The time of a replayed event is that of its publishing, not of its delivery."""
    times = iter([100.0, 200.0])
    bus, seen = EventBus(clock=lambda: next(times)), []
    bus.publish(numbered(1))
    bus.subscribe(lambda event, seconds: seen.append((event, seconds)), replay=True, stamped=True)
    bus.publish(numbered(2))
    assert seen == [(numbered(1), 100.0), (numbered(2), 200.0)]


def test_an_ended_subscription_gets_nothing_more():
    """Unsubscribing ends just that subscription, at once and for good, and may be repeated."""
    bus, seen = EventBus(), []
    first = bus.subscribe(seen.append)
    bus.subscribe(seen.append)
    first()
    first()
    bus.publish(numbered(1))
    assert seen == [numbered(1)]


def test_a_subscription_ended_by_another_subscriber_gets_not_even_this_event():
    """A subscriber that unsubscribes a later one keeps the current event from it."""
    bus, seen = EventBus(), []
    bus.subscribe(lambda _event: end_second())
    end_second = bus.subscribe(seen.append)
    bus.publish(numbered(1))
    assert seen == []


def test_a_subscriber_may_publish_and_subscribe():
    """What a subscriber publishes comes after the event that it is handling, for all; subscribing takes part in the order."""
    bus, seen, late = EventBus(), [], []

    def answer(event):
        if event == numbered(1):
            bus.publish(numbered(2))
            bus.subscribe(late.append)
            bus.publish(numbered(3))

    bus.subscribe(answer)
    bus.subscribe(seen.append)
    bus.publish(numbered(1))
    assert seen == [numbered(1), numbered(2), numbered(3)]
    assert late == [numbered(3)]


def test_publishing_does_not_wait_for_a_subscriber_in_another_thread():
    """While one thread is held up in a subscriber, another publishes and returns; its event is delivered afterwards."""
    bus, seen = EventBus(), []
    entered, release = threading.Event(), threading.Event()

    def hold(event):
        seen.append(event)
        if event == numbered(1):
            entered.set()
            assert release.wait(30)

    bus.subscribe(hold)
    thread = threading.Thread(target=bus.publish, args=[numbered(1)])
    thread.start()
    assert entered.wait(30)
    bus.publish(numbered(2))
    assert seen == [numbered(1)]
    release.set()
    thread.join()
    assert seen == [numbered(1), numbered(2)]


def test_events_of_many_threads_are_all_delivered_one_at_a_time():
    """With four threads publishing, nothing is lost or doubled, each thread's order is kept, and no two calls overlap."""
    bus, seen, busy = EventBus(), [], threading.Lock()

    def note(event):
        assert busy.acquire(blocking=False)
        seen.append(event)
        busy.release()

    bus.subscribe(note)
    threads = [
        threading.Thread(target=lambda track=track: [bus.publish(PhaseBegan(track, str(n))) for n in range(500)])
        for track in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 2000
    for track in "abcd":
        assert [event.phase for event in seen if event.name == track] == [str(n) for n in range(500)]


def test_an_event_that_comes_when_the_queue_seemed_done_is_delivered():
    """An event from another thread, after the last look at the queue and before its release, is not left lying."""
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    working = threading.Lock()

    class LateRelease:
        acquire = working.acquire

        def release(self):
            if numbered(2) not in seen:
                bus.publish(numbered(2))
                assert seen == [numbered(1)]
            working.release()

    bus._working = LateRelease()
    bus.publish(numbered(1))
    assert seen == [numbered(1), numbered(2)]


def test_a_failing_subscriber_is_contained_and_reported_once(capsys):
    """Its errors do not reach the publisher or other subscribers; one event and one line tell, however often it fails."""
    bus, seen = EventBus(), []

    def broken(event):
        raise ZeroDivisionError("oh")

    bus.subscribe(broken)
    bus.subscribe(seen.append)
    bus.publish(numbered(1))
    bus.publish(numbered(2))
    failed = SubscriberFailed(broken.__qualname__, "ZeroDivisionError: oh")
    assert seen == [numbered(1), failed, numbered(2)]
    assert capsys.readouterr().err.count("ZeroDivisionError: oh") == 1
    kept = []
    bus.subscribe(kept.append, replay=True)
    assert kept == seen


def test_a_failing_subscriber_stays_subscribed():
    """An error at one event does not cost a subscriber the next ones."""
    bus, seen = EventBus(), []

    class Picky:
        def __call__(self, event):
            seen.append(event)
            if event == numbered(1):
                raise KeyError("x")

    bus.subscribe(Picky())
    bus.publish(numbered(1))
    bus.publish(numbered(2))
    assert seen == [numbered(1), SubscriberFailed(Picky.__qualname__, "KeyError: 'x'"), numbered(2)]


@pytest.mark.parametrize("stream", [None, io.TextIOWrapper(io.BytesIO())], ids=["absent", "closed"])
def test_a_failure_is_contained_without_a_standard_error(monkeypatch, stream):
    """Where nothing can be written, the event alone tells of a failed subscriber."""
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    bus, seen = EventBus(), []
    bus.subscribe(lambda event: 1 / 0)
    bus.subscribe(seen.append)
    bus.publish(numbered(1))
    assert [type(event) for event in seen] == [PhaseBegan, SubscriberFailed]


def test_an_interrupt_in_a_subscriber_goes_through_and_the_bus_goes_on():
    """KeyboardInterrupt is not contained, and what was published afterwards is still delivered."""
    bus, seen = EventBus(), []

    def interrupt(event):
        seen.append(event)
        if event == numbered(1):
            raise KeyboardInterrupt

    bus.subscribe(interrupt)
    with pytest.raises(KeyboardInterrupt):
        bus.publish(numbered(1))
    bus.publish(numbered(2))
    assert seen == [numbered(1), numbered(2)]


def test_names_of_fields_carry_units():
    """Numbers in events say what they count: seconds, bytes, a generation, files."""
    numbers = {
        field
        for kind in KINDS
        for field, annotation in kind.__annotations__.items()
        if annotation.__forward_arg__ in ("int", "float")
    }
    assert all(re.fullmatch("(.*_)?(seconds|bytes|files)|generation", field) for field in numbers)


def test_progress_is_not_kept():
    """Who subscribes later does not see how far a fetch once was."""
    bus, seen = EventBus(), []
    bus.publish(FetchProgress("minilm", 1, 2, 3.0))
    bus.subscribe(seen.append, replay=True)
    assert seen == []


# --- the log ---------------------------------------------------------------------------------------------------------


def logged(published, **overrides):
    """The lines that a sink writes for events that were published at Unix time 1,000,000,000.25."""
    stream = io.StringIO()
    bus = EventBus(clock=lambda: 1_000_000_000.25)
    for event in published:
        bus.publish(event)
    sinks.attach_structlog(bus, config.load(**overrides), stream=stream)
    return stream.getvalue().splitlines()


def test_json_lines_hold_the_event_and_its_time():
    """One JSON object a line: name in snake case, level, the time of publishing, and the fields."""
    (line,) = logged([PhaseEnded("minilm", "weight_load", 0.0625, "")], log="json")
    assert json.loads(line) == {
        "event": "phase_ended",
        "level": "info",
        "timestamp": "2001-09-09T01:46:40.250Z",
        "name": "minilm",
        "phase": "weight_load",
        "seconds": 0.0625,
        "skipped": "",
    }


def test_console_lines_are_for_people():
    """Time, level, event and fields in one line; texts that could be misread are quoted."""
    lines = logged(
        [PhaseEnded("minilm", "weight_load", 0.0625, ""), WorkerFailed("minilm", "OSError: no\nway \x1b[31m")]
    )
    assert lines == [
        "01:46:40.250Z info    phase_ended name=minilm phase=weight_load seconds=0.062 skipped=''",
        r"01:46:40.250Z error   worker_failed name=minilm error='OSError: no\nway \x1b[31m'",
    ]


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not FetchProgress], ids=lambda kind: kind.__name__)
def test_every_event_is_one_line(kind, form):
    """Each kind of event gives exactly one line that begins with its name in snake case and names its fields."""
    (line,) = logged([sample(kind)], log=form, log_level="debug")
    assert sinks.event_name(kind) in line
    assert all(field in line for field in kind._fields)
    assert re.fullmatch("[a-z]+(_[a-z]+)*", sinks.event_name(kind))


@given(st.text(), st.sampled_from(["json", "console"]))
def test_no_text_breaks_out_of_its_line(text, form):
    """Whatever an error's text holds, its event is one printable line."""
    (line,) = logged([CaptureFailed("minilm", text)], log=form)
    assert line.isprintable()


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["state_changed", "worker_ready", "capture_failed", "worker_failed"]),
        ("info", ["worker_ready", "capture_failed", "worker_failed"]),
        ("warning", ["capture_failed", "worker_failed"]),
        ("error", ["worker_failed"]),
    ],
)
def test_the_level_filters(level, expected):
    """Events below ``log_level`` are not written."""
    published = [
        StateChanged("m", "new", "starting"),
        WorkerReady("m", "cold", "", 1.0),
        CaptureFailed("m", "x"),
        WorkerFailed("m", "x"),
    ]
    assert [json.loads(line)["event"] for line in logged(published, log="json", log_level=level)] == expected


def test_log_off_writes_and_subscribes_nothing():
    """With ``off`` there is no line, and ending the sink is a no-op."""
    assert logged([WorkerFailed("m", "x")], log="off") == []
    assert sinks.attach_structlog(EventBus(), config.load(log="off"))() is None


def test_a_user_line_keeps_its_fields_apart():
    """Fields of ``ctx.log`` cannot replace ours; errors among them are texts, and so is what JSON does not know."""
    fields = {"event": "mine", "error": ValueError("bad"), "other": {1}, "deep": [OSError("no")]}
    (line,) = logged([UserLine("m", "hello", fields)], log="json")
    entry = json.loads(line)
    assert (entry["event"], entry["message"]) == ("user_line", "hello")
    assert entry["fields"] == {"event": "mine", "error": "ValueError: bad", "other": "{1}", "deep": ["OSError: no"]}


@pytest.mark.parametrize("form", ["json", "console"])
def test_our_own_secrets_are_blotted_out_of_foreign_errors(form):
    """A credential that some library put into its error text does not reach the log."""
    secret = """'quo"ted\\planted"""
    error = error_text(RuntimeError(f"signing with {PLANTED} and {secret} failed"))
    lines = logged(
        [WorkerFailed("m", error)],
        log=form,
        access_key_id="AKIAPLANTED",
        secret_access_key=PLANTED,
        session_token=secret,
    )
    assert len(lines) == 1
    assert "planted" not in lines[0]
    assert lines[0].count("****") == 2


def test_attaching_ends_with_what_it_returned():
    """After the returned function was called nothing is written."""
    stream, bus = io.StringIO(), EventBus()
    sinks.attach_structlog(bus, config.load(), stream=stream)()
    bus.publish(WorkerFailed("m", "x"))
    assert stream.getvalue() == ""


def test_structlog_is_imported_by_attaching_and_set_up_for_nobody_else():
    """Importing events and sinks loads no structlog; attaching later replays what was kept and configures nothing globally."""
    code = """
import sys
from coldstart import config, events, sinks
heavy = {"structlog", "logging", "dataclasses", "inspect", "asyncio", "subprocess", "pydantic", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
events.bus.publish(events.WorkerReady("minilm", "restored", "", 0.5))
sinks.attach_structlog(events.bus, config.load(log="json"))
import structlog
assert not structlog.is_configured()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert json.loads(line)["kind"] == "restored"
    assert result.stdout == ""


def test_the_union_of_events_is_complete():
    """``Event``, which type checkers see, names every kind of event that the module has."""
    source = Path(events.__file__).read_text()
    union = re.search(r"Event: TypeAlias = \((.*?)\n    \)", source, re.DOTALL)
    assert set(re.findall(r"\w+", union.group(1))) == {kind.__name__ for kind in KINDS}
