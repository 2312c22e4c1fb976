"""Lanes: work in slices, and everybody's turn between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator

import trio

from vfiouser_oob.transport.turns import FunctionQueue

ROUNDS = 60


def work(lane: FunctionQueue) -> None:
    """A piece of work that uses up the slice."""
    while not lane.must_wait:
        pass


async def test_everything_else_has_its_turn_after_each_slice() -> None:
    """However many tasks have work, a task that has none passes between two of their slices."""
    lane = FunctionQueue()
    pieces = 0
    most = 0

    async def busy() -> None:
        nonlocal pieces
        while True:
            await lane.turn()
            work(lane)
            pieces += 1

    async with trio.open_nursery() as nursery:
        for _ in range(500):
            nursery.start_soon(busy)
        await trio.lowlevel.checkpoint()
        for _ in range(ROUNDS):
            before = pieces
            await trio.lowlevel.checkpoint()
            most = max(most, pieces - before)
        nursery.cancel_scope.cancel()
    assert pieces > ROUNDS // 4
    assert most <= 8


async def test_a_function_with_many_tasks_gets_no_more_than_one_with_few() -> None:
    """Lanes take turns, however many tasks wait in each."""
    done: Counter[str] = Counter()

    async def busy(name: str, lane: FunctionQueue) -> None:
        while True:
            await lane.turn()
            work(lane)
            done[name] += 1

    crowd, single = FunctionQueue(), FunctionQueue()
    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(busy, "crowd", crowd)
        nursery.start_soon(busy, "single", single)
        while done.total() < 4 * ROUNDS:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert done["single"] > ROUNDS // 2


async def test_tasks_that_were_cancelled_leave_no_trace() -> None:
    """A waiting task can be cancelled, whoever comes next is served."""
    lane = FunctionQueue()
    work(lane)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lane.turn)
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert not lane.waiting
    with trio.fail_after(5):
        for _ in range(3):
            await lane.turn()
            work(lane)


async def test_a_turn_inside_a_slice_does_not_wait() -> None:
    """What is asked for while the slice lasts is granted at once."""
    lane = FunctionQueue()
    work(lane)
    await lane.turn()  # opens a slice
    steps = 0

    async def other() -> None:
        nonlocal steps
        while True:
            steps += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        if not lane.must_wait:  # else the machine was so busy that the slice is over
            await lane.turn()
            assert steps == 0
        nursery.cancel_scope.cancel()


async def test_work_in_steps_returns_what_it_made_and_is_closed_when_given_up() -> None:
    """Steps are carried out one after the other with others between them; a cancellation ends them."""
    lane = FunctionQueue()
    ended = False

    def steps(count: int) -> Generator[None, None, int]:
        nonlocal ended
        try:
            for _ in range(count):
                work(lane)
                yield
            return count
        finally:
            ended = True

    assert await lane.work(steps(5)) == 5
    ended = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.work, steps(1 << 30))
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert ended
