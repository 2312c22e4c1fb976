"""The agents of a daemon: functions that name the same agent in the same way share it, and so its connection.

Agents come and go while the daemon runs. Each lives in a task of its own, since what an agent opens when it is entered
(a nursery, mostly) has to be left by the same task; the first function that needs it has it entered, and the last one
that does not need it any more has it left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self, TypeAlias

import trio

from vfiouser_agents.api import Agent
from vfiouser_oob.config.schema import AgentConfig

#: Makes an agent from its kind and its options.
AgentMaker: TypeAlias = Callable[[str, Mapping[str, Any]], Agent]


#: Functions of one agent that may ask it at once where they are: clients that all come in the same moment wait for
#: their own answers, and not for what nobody waits for.
PROBES = 8


class _Shared:
    """An agent, and how many functions have a share in it."""

    def __init__(self, key: str, agent: Agent) -> None:
        self.key = key
        self.agent = agent
        self.leases = 0
        self.probes = trio.CapacityLimiter(PROBES)
        self.entering = trio.Lock()
        self.entered = False
        self.unused = trio.Event()
        self.left = trio.Event()

    async def live(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be there until nobody needs the agent any more."""
        try:
            async with self.agent:
                task_status.started()
                # Functions that are cancelled with us may still need it to bring their devices back.
                with trio.CancelScope(shield=True):
                    await self.unused.wait()
        finally:
            self.left.set()


class AgentPool:
    """All agents of a daemon; used as ``async with``, and agents work only inside it.

    Args:
        make: makes agents.
    """

    def __init__(self, make: AgentMaker) -> None:
        self._make = make
        self._shared: dict[str, _Shared] = {}
        self._stack = AsyncExitStack()
        self._nursery: trio.Nursery | None = None

    def lease(self, config: AgentConfig) -> AgentLease:
        """Take a share in the agent of a configuration, which is made for the first one; also before the pool works.

        Args:
            config: which; the function that it names does not matter.

        Raises:
            ValueError: there is no such kind, or its options are not usable.
        """
        key = json.dumps([config.kind, config.options], sort_keys=True, default=str)
        shared = self._shared.get(key)
        if shared is None:
            shared = self._shared[key] = _Shared(key, self._make(config.kind, config.options))
        shared.leases += 1
        return AgentLease(self, shared)

    async def enter(self, shared: _Shared) -> None:
        """Have an agent entered, unless it is already."""
        assert self._nursery is not None, "agents work only inside the pool"
        async with shared.entering:
            if not shared.entered:
                await self._nursery.start(shared.live)
                shared.entered = True

    def give_back(self, shared: _Shared) -> None:
        """Give up a share; without any the agent is left, and the next lease makes a new one."""
        shared.leases -= 1
        if not shared.leases:
            del self._shared[shared.key]
            shared.unused.set()

    async def __aenter__(self) -> Self:
        self._nursery = await self._stack.enter_async_context(trio.open_nursery())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        for shared in self._shared.values():
            shared.unused.set()
        return await self._stack.__aexit__(kind, error, trace)


class AgentLease:
    """A function's share in an agent; used as ``async with`` by the function, once, or given up by `release`.

    Args:
        pool: where it is from.
        shared: the agent.
    """

    def __init__(self, pool: AgentPool, shared: _Shared) -> None:
        self._pool = pool
        self._shared = shared
        self._held = True

    @property
    def agent(self) -> Agent:
        """The agent; it works inside ``async with``."""
        return self._shared.agent

    @property
    def probes(self) -> trio.CapacityLimiter:
        """What its functions take turns by when they ask where they are."""
        return self._shared.probes

    def release(self) -> None:
        """Give the share up; a second call does nothing."""
        if self._held:
            self._held = False
            self._pool.give_back(self._shared)

    async def __aenter__(self) -> Self:
        await self._pool.enter(self._shared)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        if not self._shared.leases:
            await self._shared.left.wait()
