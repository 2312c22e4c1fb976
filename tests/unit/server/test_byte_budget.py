"""How many bytes of DMA_READ may be under way at once."""

from __future__ import annotations

import trio

from vfiouser_oob.server.dma_link import ByteBudget


async def test_never_more_than_the_limit_under_way(autojump_clock: trio.testing.MockClock) -> None:
    """Many readers of different sizes share the budget, all of them get through, and the limit holds."""
    budget = ByteBudget(100)
    under_way = 0
    most = 0

    async def reader(size: int) -> None:
        nonlocal under_way, most
        await budget.take(size)
        under_way += size
        most = max(most, under_way)
        await trio.sleep(size)
        under_way -= size
        budget.give_back(size)

    with trio.fail_after(100_000):
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(reader, 1 + number * 37 % 100)
    assert 0 == under_way
    assert 80 <= most <= 100


async def test_a_request_larger_than_the_limit_goes_alone() -> None:
    """It is not stuck for ever."""
    budget = ByteBudget(100)
    with trio.fail_after(5):
        await budget.take(1000)
        budget.give_back(1000)
        await budget.take(1)


async def test_a_cancelled_waiter_does_not_hold_up_the_others(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever gives up its place leaves it to the next."""
    budget = ByteBudget(100)
    await budget.take(100)
    order: list[int] = []

    async def waiter(number: int, scope: trio.CancelScope) -> None:
        with scope:
            await budget.take(50)
            order.append(number)

    scopes = [trio.CancelScope() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for number, scope in enumerate(scopes):
            nursery.start_soon(waiter, number, scope)
        await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked()
        budget.give_back(100)
    assert [1, 2] == sorted(order)
