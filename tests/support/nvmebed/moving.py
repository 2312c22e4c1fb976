"""Moves a running machine from one function to another, as a VMM and a daemon do together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from xxhash import xxh3_128_digest

from nvmebed.driver import Driver
from nvmebed.host import Host
from nvmebed.machine import Machine
from vfiouser_agents.api import Chunk, Outcome, Phase, Role
from vfiouser_soc.agent.function import AgentFunction, MigrationOptions
from vfiouser_soc.agent.session import NvmeSession
from vfiouser_soc.agent.state_memory import StateMemoryOptions
from vfiouser_soc.nvme.function import NvmeFunction


def agent_function(
    function: NvmeFunction, *, state_size: int = 0, churn: int = 0, drain_s: float = 1.0, firmware: str | None = None
) -> AgentFunction:
    """The agent's view of a function; all of them are called f0."""
    memory = StateMemoryOptions(state_size, churn)
    return AgentFunction("f0", function, MigrationOptions(memory, firmware, drain_s))


async def session_of(function: AgentFunction, role: Role | None = None) -> NvmeSession:
    """A session, which takes part in a migration if a role is given."""
    session = NvmeSession(function)
    if role is not None:
        await session.begin(role, "test")
    return session


async def read_all(session: NvmeSession, offset: int, limit: int, phase: Phase) -> tuple[bytes, Chunk]:
    """Save until there is nothing more for now, and return all of it with the last chunk."""
    parts = []
    while True:
        chunk = await session.save(offset, limit, phase)
        parts.append(chunk.data)
        offset += len(chunk.data)
        if chunk.eof or chunk.drained:
            return b"".join(parts), chunk


async def load_all(session: NvmeSession, data: bytes, piece: int) -> None:
    """Load a whole stream."""
    await session.load_begin(None)
    for start in range(0, len(data), piece):
        await session.load(start, data[start : start + piece])
    await session.load_commit(len(data), xxh3_128_digest(data))


async def migrate(
    source: AgentFunction, target: AgentFunction, *, piece: int = 1 << 20, precopy: bool = False
) -> bytes:
    """Move the state, and leave the source stopped and the target running; returns the stream."""
    giver, taker = await session_of(source, Role.SOURCE), await session_of(target, Role.DESTINATION)
    await taker.check(await giver.describe())
    stream = b""
    if precopy:
        stream, _ = await read_all(giver, 0, piece, Phase.PRECOPY)
    await giver.stop()
    stream += (await read_all(giver, len(stream), piece, Phase.FINAL))[0]
    await taker.stop()
    await load_all(taker, stream, piece)
    await giver.end(Outcome.SUCCESS)
    await taker.resume()
    await taker.end(Outcome.SUCCESS)
    return stream


@asynccontextmanager
async def spare(function: NvmeFunction, machine: Machine) -> AsyncIterator[Host]:
    """Run another function, plugged into the memory of a machine: the one that the machine is moved to."""
    host = Host(function, 4096)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(function.run)
            function.connected()
            host.memory.ram, host.memory.end = machine.host.memory.ram, machine.host.memory.end
            yield host
            nursery.cancel_scope.cancel()
    finally:
        function.close()


def moved_driver(machine: Machine, function: NvmeFunction, host: Host) -> Driver:
    """The machine's driver, which now finds another function behind the same registers."""
    driver = machine.driver
    driver.function, driver.host = function, host
    return driver
