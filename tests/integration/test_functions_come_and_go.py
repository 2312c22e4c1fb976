"""Functions enter and leave a running daemon, each with its agent, and those that serve notice nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from daemonkit import function, serving
from migrationkit import FAST, RUNNING, STOP, Side, Vmm, until
from rawclient import connect
from vfiouser_agents.api import Agent
from vfiouser_agents.faults import FaultyAgent
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import AgentConfig, DaemonConfig, FunctionConfig, ModelDevice
from vfiouser_oob.server.daemon import Daemon, run_daemon
from vfiouser_oob.transport.listener import ListenError


class CountedAgent(FaultyAgent):
    """An agent in memory that counts who enters and leaves it."""

    def __init__(self, inner: MemoryAgent) -> None:
        super().__init__(inner)
        self.entered = self.left = 0

    async def __aenter__(self) -> CountedAgent:
        self.entered += 1
        await super().__aenter__()
        return self

    async def __aexit__(self, *raised: Any) -> None:
        self.left += 1
        await super().__aexit__(*raised)


def late(directory: Path, name: str = "late") -> FunctionConfig:
    """A function with an agent."""
    return function(directory, name, agent=AgentConfig(kind="test", function=name), migration=FAST)


async def test_a_function_comes_and_goes_while_another_one_serves(tmp_path: Path) -> None:
    """Its agent is entered for the first function that needs it, and left with the last one."""
    device = MemoryFunction("late")
    agent = CountedAgent(MemoryAgent([device, MemoryFunction("later")]))
    async with serving(function(tmp_path, "old"), agents={"test": agent}) as daemon:
        old = Vmm((await connect(tmp_path / "old.sock")).sock)
        assert 1 == (await old.negotiate()).flags
        assert (0, ["old"]) == (agent.entered, [each.name for each in daemon.functions])

        await daemon.registry.add(late(tmp_path))
        await daemon.registry.add(late(tmp_path, "later"))
        assert (1, ["old", "late", "later"]) == (agent.entered, [each.name for each in daemon.functions])
        side = Side("late", tmp_path / "late.sock", device, daemon, agent)
        async with side.vmm() as client:
            await client.set_state(STOP)
            assert not side.runs
            await client.write32(2, 0, 1)
            await old.read32(2, 0)
            await client.set_state(RUNNING)
            await daemon.registry.remove("late")
            assert b"" == await client.sock.recv(1)
        assert not (tmp_path / "late.sock").exists()
        assert (0, ["old", "later"]) == (agent.left, [each.name for each in daemon.functions])

        await daemon.registry.remove("later")
        assert 1 == agent.left
        await old.read32(2, 0)
        await daemon.registry.add(late(tmp_path))
        assert 2 == agent.entered
        async with side.vmm() as client:
            assert RUNNING == await client.state()
        old.close()
    assert 2 == agent.left


async def test_a_function_that_is_removed_while_it_stands_still_is_brought_back(tmp_path: Path) -> None:
    """Nobody else would do it."""
    device = MemoryFunction("late")
    agent = CountedAgent(MemoryAgent([device]))
    async with serving(function(tmp_path, "old"), agents={"test": agent}) as daemon:
        await daemon.registry.add(late(tmp_path))
        side = Side("late", tmp_path / "late.sock", device, daemon, agent)
        async with side.vmm() as client:
            await client.set_state(STOP)
            await daemon.registry.remove("late")
        assert side.runs
        assert 1 == agent.left


async def test_a_function_that_cannot_come_changes_nothing(tmp_path: Path) -> None:
    """One of a name that there is, one without a device, one whose socket cannot be made: the others serve."""
    (tmp_path / "file").write_text("")
    agent = CountedAgent(MemoryAgent([MemoryFunction("late")]))
    async with serving(function(tmp_path, "old"), agents={"test": agent}) as daemon:
        with pytest.raises(ConfigError, match="a function 'old' already"):
            await daemon.registry.add(function(tmp_path, "old"))
        with pytest.raises(ConfigError, match="there is no model"):
            await daemon.registry.add(function(tmp_path, "late", ModelDevice(model="none")))
        with pytest.raises(ListenError):
            await daemon.registry.add(late(tmp_path / "file"))
        with pytest.raises(KeyError):
            await daemon.registry.remove("late")
        assert ["old"] == [each.name for each in daemon.functions]
        client = Vmm((await connect(tmp_path / "old.sock")).sock)
        assert 1 == (await client.negotiate()).flags
        client.close()
        await daemon.registry.add(late(tmp_path))
        await until(lambda: 1 == agent.entered)
    assert 1 == agent.left


async def test_a_listening_socket_that_breaks_ends_its_function_alone(tmp_path: Path) -> None:
    """No client could come any more: that is said, and not tried again for ever."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "broken.sock"))
        listening.listen()
        inherited = replace(function(tmp_path, "broken"), socket=None, fd=os.dup(listening.fileno()))
        async with serving(function(tmp_path, "old"), inherited) as daemon:
            broken = daemon.functions[1]
            listening.shutdown(socket.SHUT_RDWR)
            await until(lambda: broken.failed is not None)
            assert "Invalid argument" in str(broken.failed)
            client = Vmm((await connect(tmp_path / "old.sock")).sock)
            assert 1 == (await client.negotiate()).flags
            client.close()


class BrokenAgent(FaultyAgent):
    """An agent that cannot be entered."""

    async def __aenter__(self) -> BrokenAgent:
        raise RuntimeError("smoke")


async def test_an_agent_that_cannot_be_entered_is_told_of(tmp_path: Path) -> None:
    """A daemon that cannot begin says why, and one that runs goes on without that function."""

    def make(kind: str, options: Mapping[str, Any]) -> Agent:
        return BrokenAgent(MemoryAgent([MemoryFunction("late")]))

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="smoke"), flatten_subgroups=True):
        await run_daemon(DaemonConfig(functions=(late(tmp_path),)), agents=make)
    async with trio.open_nursery() as nursery:
        daemon: Daemon = await nursery.start(
            partial(run_daemon, DaemonConfig(functions=(function(tmp_path, "old"),)), agents=make)
        )
        with pytest.RaisesGroup(
            pytest.RaisesExc(RuntimeError, match="smoke"), flatten_subgroups=True, allow_unwrapped=True
        ):
            await daemon.registry.add(late(tmp_path))
        client = Vmm((await connect(tmp_path / "old.sock")).sock)
        assert 1 == (await client.negotiate()).flags
        client.close()
        nursery.cancel_scope.cancel()
