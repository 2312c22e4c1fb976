"""Requests that are not cut off: a peer that is left in the middle of one may spin or die."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from vfiouser_agents.errors import AgentError, DeadlineExceeded

T = TypeVar("T")
#: Seconds that a request under way has to come to its end once nobody wants its answer any more.
GRACE_S = 2.0


async def unbroken(work: Callable[[], Awaitable[T]], limit_s: float, too_late: str) -> T:
    """Do something to its end, also when the caller is cancelled meanwhile.

    Args:
        work: what.
        limit_s: seconds that it may take.
        too_late: the error's message when it takes longer.

    Raises:
        DeadlineExceeded: it took longer, or a caller that was cancelled could not wait for it any more.
        AgentError: as `work` raised it.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    failure: AgentError = DeadlineExceeded(too_late)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + limit_s) as scope:
            nursery.start_soon(_shorten, scope)
            try:
                result = await work()
                nursery.cancel_scope.cancel()
                return result
            except AgentError as error:
                failure = error
        nursery.cancel_scope.cancel()
    raise failure


async def _shorten(scope: trio.CancelScope) -> None:
    """Leave a request that is not wanted any more no more than a grace."""
    try:
        await trio.sleep_forever()
    finally:
        scope.deadline = min(scope.deadline, trio.current_time() + GRACE_S)
