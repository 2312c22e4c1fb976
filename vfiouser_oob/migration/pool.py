"""The agents of a daemon: functions that name the same agent in the same way share it, and so its connection."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self, TypeAlias

from vfiouser_agents.api import Agent
from vfiouser_oob.config.schema import AgentConfig

#: Makes an agent from its kind and its options.
AgentMaker: TypeAlias = Callable[[str, Mapping[str, Any]], Agent]


class AgentPool:
    """All agents of a daemon; used as ``async with``, and agents work only inside it.

    Args:
        make: makes agents.
    """

    def __init__(self, make: AgentMaker) -> None:
        self._make = make
        self._agents: dict[str, Agent] = {}
        self._stack = AsyncExitStack()

    def agent(self, config: AgentConfig) -> Agent:
        """Return the agent of a configuration.

        Args:
            config: which; the function that it names does not matter.

        Raises:
            ValueError: there is no such kind, or its options are not usable.
        """
        key = json.dumps([config.kind, config.options], sort_keys=True, default=str)
        agent = self._agents.get(key)
        if agent is None:
            agent = self._agents[key] = self._make(config.kind, config.options)
        return agent

    async def __aenter__(self) -> Self:
        for agent in self._agents.values():
            await self._stack.enter_async_context(agent)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
