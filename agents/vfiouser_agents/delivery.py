"""Whether a call can have reached its agent.

A call that is given up says nothing, and a connection may have been lost before the message or after it. So whoever
makes the call follows it, and an adapter that can tell notes how far it came:

    with followed() as delivery:
        await session.stop()        # preparing() … sending() …
    delivery.unsent                 # also when it was cancelled

An adapter that notes nothing is taken at its errors' word, and what is given up may have been sent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from .errors import AgentError, FunctionCertainty

T = TypeVar("T")


class Delivery:
    """How far one call has come."""

    __slots__ = ("_sent",)

    def __init__(self) -> None:
        self._sent: bool | None = None

    @property
    def unsent(self) -> bool:
        """The adapter says that nothing was sent that could change anything."""
        return self._sent is False

    def note(self, sent: bool | None) -> None:
        """Take how far it came; None: nobody tells."""
        self._sent = sent

    def judge(self, error: AgentError) -> None:
        """Note at an error what is known of the call that failed with it.

        Args:
            error: as the adapter raised it.
        """
        error.unsent = error.undelivered if self._sent is None else not self._sent
        error.unclear = not error.unsent and (error.fate is FunctionCertainty.UNKNOWN or error.undelivered)


_current: ContextVar[Delivery | None] = ContextVar("delivery", default=None)


@contextmanager
def followed() -> Iterator[Delivery]:
    """Follow the call in the block."""
    delivery = Delivery()
    token = _current.set(delivery)
    try:
        yield delivery
    finally:
        _current.reset(token)


def carried(work: Callable[[], Awaitable[T]]) -> Callable[[], Awaitable[T]]:
    """For adapters whose calls are executed by another task: what that one notes counts for the call of this one."""
    delivery = _current.get()

    async def run() -> T:
        token = _current.set(delivery)
        try:
            return await work()
        finally:
            _current.reset(token)

    return run


def preparing() -> None:
    """For adapters: nothing of the call was sent yet that could change anything, and `sending` will tell when it is."""
    _note(False)


def sending() -> None:
    """For adapters: from here on the agent may have the call."""
    _note(True)


def _note(sent: bool) -> None:
    delivery = _current.get()
    if delivery is not None:
        delivery.note(sent)
