"""Commands that a signal ends in an orderly way."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

import trio

from vfiouser_oob.client.nursery import background_nursery

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def run_interruptible(work: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """Run something until it is done or SIGINT or SIGTERM comes, which cancels it.

    A KeyboardInterrupt out of the blue could strike between the making of a coroutine and its start.

    Args:
        work: what to run with trio.
        args: its arguments.

    Returns:
        What it returns.

    Raises:
        KeyboardInterrupt: a signal came; what was under way is cleaned up.
    """
    results: list[T] = []

    async def until_signal() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with background_nursery() as nursery:

                async def listen() -> None:
                    await anext(signals)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(listen)
                results.append(await work(*args))

    trio.run(until_signal)
    if not results:
        raise KeyboardInterrupt
    return results[0]
