"""Agents that say too much, and agents that are not there."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import trio
import trio.lowlevel

from agentbed import Served, served
from hostilekit.case import Scene, Stage, attack
from migrationkit import PRE_COPY, RUNNING, SET, STATE, STOP
from rawclient import FEATURE, RESET, attached
from vfiouser_agents.api import Event, EventKind
from vfiouser_agents.faults import ChangesResult, FaultyAgent
from vfiouser_agents.memory import MemoryAgent, MemoryFunction

#: Nine megabytes: more than any stream carries, and less than a message may have; each text is one that is taken.
_HUGE = {str(number): "x" * 60_000 for number in range(150)}
_Attack = Callable[[Stage, FaultyAgent, MemoryFunction, Served], Awaitable[None]]


def _as_agent(stage: Stage, work: _Attack) -> None:
    """Play the first function's agent, and its client."""

    async def play() -> None:
        function = MemoryFunction("f0", 1 << 20, 1)
        agent = FaultyAgent(MemoryAgent([function]))
        async with served(agent, "unix", stage.agent.parent) as server:
            assert stage.agent.parent / "agent.sock" == stage.agent
            await work(stage, agent, function, server)

    trio.run(play)


@attack(Scene.AGENT)
def huge_descriptor(stage: Stage) -> None:
    """A descriptor of nine megabytes each time that a migration begins; the function can be migrated afterwards."""
    _as_agent(stage, _describe)


async def _describe(stage: Stage, agent: FaultyAgent, function: MemoryFunction, server: Served) -> None:
    going = stage.clock()
    huge = ChangesResult(lambda found: replace(found, fingerprint=_HUGE))
    async with attached(stage.first) as client:
        while going():
            agent.inject("describe", huge)
            request = struct.pack("<IIII", 16, STATE | SET, PRE_COPY, 0)
            assert (await client.command(FEATURE, request)).error
            await trio.sleep(0.05)
        for state in (PRE_COPY, RUNNING):
            await client.succeed(FEATURE, struct.pack("<IIII", 16, STATE | SET, state, 0))


@attack(Scene.AGENT)
def events_without_end(stage: Stage) -> None:
    """Events about nothing, as fast as they are taken."""
    _as_agent(stage, _tell)


async def _tell(stage: Stage, agent: FaultyAgent, function: MemoryFunction, server: Served) -> None:
    going = stage.clock()
    async with attached(stage.first) as client:
        await client.succeed(FEATURE, struct.pack("<IIII", 16, STATE | SET, PRE_COPY, 0))
        while not function.feed.watched:  # noqa: ASYNC110  the watcher is the daemon
            await trio.sleep(0.01)
        while going():
            for _ in range(64):
                function.feed.put(Event(EventKind.RECONNECTED, "about nothing"))
            await trio.lowlevel.checkpoint()


@attack(Scene.AGENT, waits=True)
def agent_that_comes_and_goes(stage: Stage) -> None:
    """It is away half of the time, while its function is paused, goes on and is reset: no reset ever fails."""
    _as_agent(stage, _come_and_go)


async def _come_and_go(stage: Stage, agent: FaultyAgent, function: MemoryFunction, server: Served) -> None:
    going = stage.clock()

    async def switch(scope: trio.CancelScope) -> None:
        with scope:
            while True:
                await trio.sleep(0.2)
                await server.stop()
                await trio.sleep(0.2)
                await server.start()

    scope = trio.CancelScope()
    async with attached(stage.first) as client, trio.open_nursery() as nursery:
        nursery.start_soon(partial(switch, scope))
        while going():
            for state in (STOP, RUNNING):
                request = struct.pack("<IIII", 16, STATE | SET, state, 0)
                if (await client.command(FEATURE, request)).error:
                    await client.succeed(RESET)
        scope.cancel()
        await client.succeed(RESET)
