"""The order of a function's calls, and events that slow watchers lose."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from vfiouser_agents.api import Event, EventKind
from vfiouser_agents.errors import InvalidState, NoResources
from vfiouser_agents.events import BACKLOG, EventFeed
from vfiouser_agents.ordering import QUEUE_LIMIT, CallQueue


async def test_calls_run_in_order_one_at_a_time() -> None:
    """Each call begins when the one before it has ended, in the order in which they came."""
    log: list[str] = []

    async def work(name: str) -> None:
        log.append(f"+{name}")
        await trio.lowlevel.checkpoint()
        log.append(f"-{name}")

    async with trio.open_nursery() as nursery:
        queue = CallQueue(nursery)
        answers = [queue.enter(name, lambda name=name: work(name)) for name in "abc"]  # type: ignore[misc]
        for answer in answers:
            await answer()
    assert ["+a", "-a", "+b", "-b", "+c", "-c"] == log
    assert queue.idle


async def test_results_and_errors_reach_the_caller() -> None:
    """What the work returns or raises comes out, and the queue goes on after an error."""

    async def fails() -> None:
        raise KeyError("x")

    async def works() -> int:
        return 5

    async with trio.open_nursery() as nursery:
        queue = CallQueue(nursery)
        with pytest.raises(KeyError):
            await queue.call("fails", fails)
        assert 5 == await queue.call("works", works)


async def test_overtaking() -> None:
    """A call that overtakes ends what runs, drops what waits, and is not overtaken itself."""
    ended: list[str] = []

    async def forever() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append("running")

    async def reset() -> str:
        ended.append("reset")
        await trio.lowlevel.checkpoint()
        return "done"

    async with trio.open_nursery() as nursery:
        queue = CallQueue(nursery)
        running, waiting = queue.enter("stop", forever), queue.enter("save", forever)
        await wait_all_tasks_blocked()
        assert "stop" == queue.pending
        first, second = (queue.enter("reset", reset, overtakes=True) for _ in range(2))
        with pytest.raises(InvalidState, match="reset ended stop"):
            await running()
        with pytest.raises(InvalidState, match="reset dropped save"):
            await waiting()
        assert ("done", "done") == (await first(), await second())
    assert ["running", "reset", "reset"] == ended


async def test_the_queue_is_bounded() -> None:
    """Calls beyond the limit are refused, but a reset never is."""
    async with trio.open_nursery() as nursery:
        queue = CallQueue(nursery)
        for _ in range(QUEUE_LIMIT):
            queue.enter("stop", trio.sleep_forever)
        with pytest.raises(NoResources):
            queue.enter("stop", trio.sleep_forever)
        await queue.call("reset", trio.lowlevel.checkpoint, overtakes=True)
        assert queue.idle


async def test_watchers_are_independent() -> None:
    """Each watcher gets all events of its time; a slow one loses the oldest and learns how many."""
    feed = EventFeed()
    feed.put(Event(EventKind.STATE_CHANGED, "before"))
    async with feed.watch() as quick, feed.watch() as slow:
        for number in range(BACKLOG + 10):
            feed.put(Event(EventKind.STATE_CHANGED, str(number)))
            assert str(number) == (await anext(quick)).detail
        event = await anext(slow)
        assert ("10", 10) == (event.detail, event.lost)
        assert ("11", 0) == ((event := await anext(slow)).detail, event.lost)
    assert not feed.watched


async def test_a_watcher_waits() -> None:
    """Without events a watcher sleeps until there is one."""
    feed = EventFeed()
    async with feed.watch() as events, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def wait() -> None:
            assert EventKind.DEVICE_ERROR is (await anext(events)).kind

        await wait_all_tasks_blocked()
        feed.put(Event(EventKind.DEVICE_ERROR))


async def test_a_queue_that_is_abandoned() -> None:
    """What runs is ended and what waits is dropped, calls that overtake included; the next call is executed."""
    async with trio.open_nursery() as nursery:
        queue = CallQueue(nursery)
        answers = [
            queue.enter(name, trio.sleep_forever, overtakes=name == "reset") for name in ("reset", "reset", "stop")
        ]
        await wait_all_tasks_blocked()
        queue.abandon("a test")
        for answer, word in zip(answers, ("a test ended", "a test dropped", "a test dropped"), strict=True):
            with pytest.raises(InvalidState, match=word):
                await answer()
        await queue.call("stop", trio.lowlevel.checkpoint)
        await wait_all_tasks_blocked()
        assert queue.idle
