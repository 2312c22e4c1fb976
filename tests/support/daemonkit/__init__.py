"""A real daemon inside the test's event loop, and what is needed to look at it from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from vfiouser_agents.api import Agent
from vfiouser_oob.config.schema import (
    AgentConfig,
    DaemonConfig,
    DeviceConfig,
    DmaMode,
    FunctionConfig,
    MigrationConfig,
    ModelDevice,
)
from vfiouser_oob.control.server import serve_control
from vfiouser_oob.server.administration import Reread
from vfiouser_oob.server.daemon import Daemon, run_daemon
from vfiouser_oob.vm.kind import vm_kind

TEST_DEVICE = ModelDevice(model="test")


def function(
    directory: Path,
    name: str = "f0",
    device: DeviceConfig = TEST_DEVICE,
    *,
    dma: DmaMode = DmaMode.FILES,
    allow_uids: tuple[int, ...] | None = None,
    socket_mode: int = 0o660,
    agent: AgentConfig | None = None,
    migration: MigrationConfig | None = None,
) -> FunctionConfig:
    """A function whose socket is NAME.sock in the directory."""
    return FunctionConfig(
        name=name,
        device=device,
        socket=directory / f"{name}.sock",
        dma=dma,
        allow_uids=allow_uids,
        socket_mode=socket_mode,
        agent=agent,
        migration=migration or MigrationConfig(),
    )


@asynccontextmanager
async def serving(
    *functions: FunctionConfig,
    reply_budget_s: float = 4.0,
    control_socket: Path | None = None,
    agents: Mapping[str, Agent] | None = None,
    state_directory: Path | None = None,
    config: DaemonConfig | None = None,
    reread: Reread | None = None,
) -> AsyncIterator[Daemon]:
    """Run a daemon until the block ends; `agents` are the agents that there are, by kind, `config` is all of it."""

    def make(kind: str, options: Mapping[str, Any]) -> Agent:
        assert agents is not None, f"no agent of kind {kind} was given"
        return agents[kind]

    config = config or DaemonConfig(
        functions=functions,
        reply_budget_s=reply_budget_s,
        control_socket=control_socket,
        state_directory=state_directory,
    )
    async with trio.open_nursery() as nursery:
        run = partial(run_daemon, config, agents=make, control=serve_control, reread=reread, vms=vm_kind)
        daemon = await nursery.start(run)
        yield daemon
        nursery.cancel_scope.cancel()
