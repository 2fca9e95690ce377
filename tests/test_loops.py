"""Where async hooks run: on the loop that serves an async handler, on a private one beside a sync handler."""

from __future__ import annotations

import asyncio
import threading

import pytest

from coldstart import coldstart, loops
from coldstart.errors import StartError
from coldstart.loops import Loops


@pytest.fixture
def private():
    """Loops of a sync handler."""
    found = Loops(needs_serving_loop=False)
    yield found
    found.close()


async def running():
    """The loop that this runs on."""
    return asyncio.get_running_loop()


async def pieces():
    """A stream on a loop."""
    for number in range(3):
        await asyncio.sleep(0)
        yield number


def test_plain_values_pass(private):
    """What is no coroutine is finished already; a generator stays one unless its pieces are asked for."""
    generator = iter([1])
    assert private.finish(3) == 3
    assert private.finish(generator) is generator


def test_pieces_are_collected_where_they_are_asked_for(private):
    """With ``collect`` a stream of either kind becomes the list of its pieces; a list is left alone."""
    assert private.finish((number for number in range(3)), collect=True) == [0, 1, 2]
    assert private.finish(pieces(), collect=True) == [0, 1, 2]
    assert private.finish([0, 1], collect=True) == [0, 1]


def test_hooks_beside_a_sync_handler_share_one_private_loop(private):
    """Coroutines run on one loop of their own, in another thread, which ends with the worker."""
    first, second = private.finish(running()), private.finish(running())
    assert first is second
    thread = next(thread for thread in threading.enumerate() if thread.name == "coldstart-loop")
    private.close()
    thread.join()
    assert first.is_closed()


def test_an_error_of_a_hook_reaches_who_waits(private):
    """What a coroutine raises is raised where it is finished."""

    async def fails():
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        private.finish(fails())


def test_hooks_of_an_async_handler_run_on_the_loop_that_serves():
    """The first attached loop is used, from a thread that waits, as long as it is open; then the next one is."""
    found = Loops(needs_serving_loop=True)

    async def serve():
        found.attach(asyncio.get_running_loop())
        return await asyncio.to_thread(found.finish, running()), asyncio.get_running_loop()

    async def serve_beside():
        return await asyncio.gather(serve(), asyncio.to_thread(asyncio.run, serve()))

    (here, own), (there, other) = asyncio.run(serve_beside())
    assert here is own is there is not other
    later, own = asyncio.run(serve())
    assert later is own is not here


def test_without_a_serving_loop_the_start_fails_in_time(monkeypatch):
    """An async hook of an async handler waits for a loop that serves, but not for ever."""
    monkeypatch.setattr(loops, "LOOP_SECONDS", 0.0)
    waiting = running()
    with pytest.raises(StartError, match="no event loop began to serve within 0 s"):
        Loops(needs_serving_loop=True).finish(waiting)
    waiting.close()


def test_async_hooks_of_a_sync_handler(monkeypatch):
    """``load``, ``compile``, ``init`` and ``close`` may be async beside a sync handler, on one loop."""
    monkeypatch.setenv("COLDSTART_LOG", "off")
    seen = []

    async def load(ctx):
        seen.append(asyncio.get_running_loop())
        return 1

    async def compiled(ctx, state):
        seen.append(asyncio.get_running_loop())
        return state + 1

    async def init(ctx, state):
        seen.append(asyncio.get_running_loop())
        return state * 10

    async def close(model):
        seen.append(model)

    handler = coldstart("mixed", load=load, compile=compiled, init=init, close=close)(lambda event, model: model)
    assert handler({"input": 0}) == 20
    handler.__coldstart__.ready_worker.close()
    assert len(set(seen[:3])) == 1
    assert seen[3:] == [20]
