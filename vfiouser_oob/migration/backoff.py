"""The one way in which anything here is attempted again: with pauses that double, until a deadline if there is one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from vfiouser_agents.errors import AgentError, Retry
from vfiouser_oob.migration.record import Failure
from vfiouser_protocol.errors import VfioUserError

T = TypeVar("T")
#: The longest pause in the background, in seconds.
PAUSE_MAX_S = 5.0
#: The longest pause while a client waits: what comes back has to be noticed within its time.
WAITING_PAUSE_MAX_S = 0.4


class Backoff:
    """Pauses between attempts.

    Args:
        first: seconds before the first repetition.
        longest: seconds that no pause exceeds.
        deadline: when no attempt is begun any more, as trio's clock has it.
    """

    def __init__(self, first: float, longest: float = PAUSE_MAX_S, deadline: float = float("inf")) -> None:
        self._next = first
        self._longest = longest
        self._deadline = deadline

    async def pause(self, hurry: trio.Event | None = None) -> bool:
        """Wait until the next attempt is due.

        Args:
            hurry: makes it due at once.

        Returns:
            Whether there is time for one; if not, nothing was waited for.
        """
        seconds = self._next
        if trio.current_time() + seconds >= self._deadline:
            return False
        self._next = min(2 * seconds, self._longest)
        with trio.move_on_after(seconds):
            await (trio.Event() if hurry is None else hurry).wait()
        return True


class Pace:
    """Lets so much happen in a stretch of time; whoever does more waits for the next one.

    Args:
        most: how often.
        seconds: of a stretch.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        self._seconds = seconds
        self._left = 0
        self._end = float("-inf")

    async def taken(self) -> None:
        """It has happened once more."""
        now = trio.current_time()
        if now >= self._end:
            self._end, self._left = now + self._seconds, self._most
        self._left -= 1
        if self._left <= 0:
            await trio.sleep_until(self._end)


async def until_done(attempt: Callable[[], Awaitable[bool]], pauses: Backoff) -> None:
    """Make attempts until one says that it is done.

    Args:
        attempt: makes one; returns whether no other is needed.
        pauses: between them.
    """
    while not await attempt():
        await pauses.pause()


def repeatable(error: AgentError) -> bool:
    """The call may be made again, whatever it is that failed."""
    return error.retryable


def agent_is_away(error: AgentError) -> bool:
    """Nobody answered: the agent was not reached, or was lost."""
    return error.away and (error.unsent or error.retry is Retry.RECONNECT)


async def persist(
    attempt: Callable[[], Awaitable[T]], pauses: Backoff, again: Callable[[AgentError], bool] = repeatable
) -> T:
    """Make attempts until one succeeds, or no other is worth while.

    Args:
        attempt: makes one.
        pauses: between them.
        again: whether an error is worth another one.

    Raises:
        AgentError: that of the last one; `unsent` and `unclear` are about all of them.
    """
    doubt = False
    while True:
        try:
            return await attempt()
        except AgentError as error:
            doubt = doubt or error.unclear
            if not again(error) or not await pauses.pause():
                error.unclear = doubt
                error.unsent = error.unsent and not doubt
                raise


def failure_of(error: AgentError | VfioUserError) -> Failure:
    """What the record keeps of an error.

    Args:
        error: of the agent, or of the device.
    """
    if isinstance(error, AgentError):
        return Failure(str(error), error.errno, error.unsent, error.unclear, agent_is_away(error), error.fatal)
    return Failure(str(error), error.errno)
