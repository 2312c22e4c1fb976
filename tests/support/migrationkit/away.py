"""A function whose agent is reached through a real adapter and socket, and can be taken away and brought back."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from agentbed import Served, served
from daemonkit import TEST_DEVICE, function, serving
from migrationkit import Vmm, until
from rawclient import QEMU_CAPABILITIES, connect
from vfiouser_agents.adapters.msgpack_rpc import MsgpackRpcAgent
from vfiouser_agents.api import Agent, AgentState
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_agents.registry import make_agent
from vfiouser_oob.config.schema import AgentConfig, DeviceConfig, MigrationConfig
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.server.daemon import Daemon

#: As shipped, but with small pieces of state.
CONFIG = MigrationConfig(chunk_size=64 << 10, v1_data_size=64 << 10)
NAME = "f0"
SIZE = 256 << 10


@dataclass
class Place:
    """The function, its agent, and the daemon in between."""

    server: Served
    adapter: Agent
    device: MemoryFunction
    daemon: Daemon
    path: Path
    nursery: trio.Nursery

    @property
    def runner(self) -> MigrationRunner:
        """Its migration."""
        engine = self.daemon.functions[0].migration
        assert engine is not None
        return engine

    @property
    def runs(self) -> bool:
        """Whether it really runs."""
        return self.device.state is AgentState.RUNNING

    @property
    def status(self) -> Any:
        """What `status` says of its migration."""
        return self.daemon.status()["functions"][0]["migration"]

    async def leave(self) -> None:
        """The agent goes: its socket is refused from now on, and what was connected is lost, and known to be."""
        await self.server.stop()
        if isinstance(self.adapter, MsgpackRpcAgent):
            rpc = self.adapter
            await until(lambda: rpc._link is None or not rpc._link.usable)

    async def come_back(self) -> None:
        """The agent is back, with the functions as they were."""
        await self.server.start()

    async def leave_for(self, seconds: float) -> None:
        """The agent goes and comes back by itself."""
        await self.leave()

        async def later() -> None:
            await trio.sleep(seconds)
            await self.come_back()

        self.nursery.start_soon(later)

    @asynccontextmanager
    async def vmm(self) -> AsyncIterator[Vmm]:
        """A client of the function."""
        client = Vmm((await connect(self.path)).sock)
        try:
            assert 1 == (await client.negotiate(QEMU_CAPABILITIES)).flags
            yield client
        finally:
            client.close()


def adapter(server: Served, library: Path | None) -> Agent:
    """The adapter that reaches the server: of its protocol, or the library that speaks it."""
    if library is not None:
        port = str(server.address.port)
        options = {"path": str(library), "arg": port, "devices": {NAME: "0000:3b:00.2"}}
        return make_agent("plugin-so", options)
    return server.client(**({"device": NAME} if server.protocol == "legacy-tcp" else {}))


@asynccontextmanager
async def place(
    directory: Path,
    protocol: str = "msgpack-rpc",
    *,
    library: Path | None = None,
    reply_budget_s: float = 4.0,
    config: MigrationConfig = CONFIG,
    device: DeviceConfig = TEST_DEVICE,
    start: bool = True,
) -> AsyncIterator[Place]:
    """Run it all; without `start` the agent is away from the beginning."""
    made = MemoryFunction(NAME, SIZE, 1)
    transport = "tcp" if library is not None else "unix"
    async with served(MemoryAgent([made]), transport, directory / "agent", protocol) as server:
        if not start:
            await server.stop()
        configured = function(directory, NAME, device, agent=AgentConfig(kind="test", function=NAME), migration=config)
        agents = {"test": adapter(server, library)}
        async with (
            trio.open_nursery() as nursery,
            serving(configured, reply_budget_s=reply_budget_s, agents=agents) as daemon,
        ):
            yield Place(server, agents["test"], made, daemon, directory / f"{NAME}.sock", nursery)
            nursery.cancel_scope.cancel()


def warnings(records: Sequence[logging.LogRecord]) -> list[str]:
    """What was said as a warning or worse, without the refusals of what the client asked for."""
    return [
        record.getMessage()
        for record in records
        if record.levelno >= logging.WARNING and record.getMessage() != "command refused"
    ]
