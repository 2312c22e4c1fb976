"""An agent with tasks of its own: they run while it is entered, and end with it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import trio

from vfiouser_agents.api import Agent


class AgentWithTasks(Agent):
    """What the adapters that keep something running have in common; leaving the block closes the agent first."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._nursery: trio.Nursery | None = None

    @property
    def nursery(self) -> trio.Nursery:
        """Where its tasks run.

        Raises:
            RuntimeError: it was not entered.
        """
        if self._nursery is None:
            raise RuntimeError("an agent is used inside `async with`")
        return self._nursery

    async def __aenter__(self) -> Self:
        self._nursery = await self._stack.enter_async_context(trio.open_nursery())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.aclose()
        finally:
            if self._nursery is not None:
                self._nursery.cancel_scope.cancel()
            await self._stack.__aexit__(None, None, None)
