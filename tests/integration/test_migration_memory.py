"""A daemon that was killed knows what its agents could do, though they cannot be reached now."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from agentbed import served
from daemonkit import function, serving
from killbed.hosts import Service
from migrationkit import FAST, V1_REGION, Vmm, until
from rawclient import FEATURE, connect
from vfiouser_agents.errors import Busy
from vfiouser_agents.faults import Fails, FaultyAgent
from vfiouser_agents.memory import ALL_CAPABILITIES, MemoryAgent, MemoryFunction
from vfiouser_oob.config.schema import AgentConfig, UpstreamDevice
from vfiouser_oob.control.client import ControlClient
from vfiouser_oob.persist.capabilities import Source

_CONFIG = """\
[daemon]
control_socket = "{place}/control.sock"
reply_budget_s = 1.5
[[function]]
name = "f0"
socket = "{place}/f0.sock"
device = {{ kind = "model", model = "test" }}
agent = {{ kind = "msgpack-rpc", address = "unix://{place}/agent.sock", function = "{agent}" }}
migration = {{ call_s = 0.3, retry_s = 0.05 }}
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path leaves room for socket names."""
    with tempfile.TemporaryDirectory(prefix="vt-") as name:
        yield Path(name)


class Bed:
    """A daemon in a process of its own, told where its state goes as systemd tells it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.configure("x")
        serve = ["serve", f"--config={place / 'daemon.toml'}"]
        told = {"STATE_DIRECTORY": str(place / "state")}
        self.daemon = Service("daemon", "vfiouser_oob", serve, place, told)
        self.stored = place / "state" / "agents" / "f0.json"

    def configure(self, agent: str) -> None:
        """Write the configuration."""
        (self.place / "daemon.toml").write_text(_CONFIG.format(place=self.place, agent=agent))

    async def capabilities(self) -> Mapping[str, Any]:
        """What `status` shows."""
        return (await self.migration())["capabilities"]  # type: ignore[no-any-return]

    async def migration(self) -> Mapping[str, Any]:
        """What `status` shows of the migration."""

        def ask() -> Mapping[str, Any]:
            with ControlClient(self.place / "control.sock") as control:
                found = control.status()["functions"][0]["migration"]
            assert found is not None
            return found

        return await trio.to_thread.run_sync(ask)

    async def learn(self, device: MemoryFunction) -> None:
        """Let the daemon meet its agent, and kill it once it has written what it learned."""
        async with served(MemoryAgent([device]), "unix", self.place):
            await self.daemon.start()
            await until(self.stored.exists, 20)
        self.daemon.kill()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Vmm]:
        """A VMM."""
        vmm = Vmm((await connect(self.place / "f0.sock")).sock)
        try:
            assert 1 == (await vmm.negotiate()).flags
            yield vmm
        finally:
            vmm.close()


async def offers(client: Vmm) -> tuple[int, bool]:
    """The errno of asking for migration in v2, and whether v1's region is there."""
    error = (await client.command(FEATURE, bytes((16, 0, 0, 0, 1, 0, 1, 0)) + bytes(8))).error
    info = await client.succeed(4, (16).to_bytes(4, "little") + bytes(12))
    return error, int.from_bytes(info.payload[8:12], "little") > V1_REGION


@pytest.mark.parametrize("can", [True, False])
async def test_killed_daemon_remembers_while_its_agent_is_away(place: Path, can: bool) -> None:
    """At attach the client sees what the agent said to the daemon before, for good or ill, and `status` says whence."""
    bed = Bed(place)
    device = MemoryFunction("x", caps=replace(ALL_CAPABILITIES, stop_copy=can))
    try:
        await bed.learn(device)
        await bed.daemon.start()
        expected = {"source": "stored", "stop_copy": can, "precopy": True, "dirty": True, "problem": None}
        assert expected.items() <= (await bed.capabilities()).items()
        async with bed.client() as client:
            assert ((0, True) if can else (22, False)) == await offers(client)
            assert can == (await bed.migration())["migratable"]
        async with served(MemoryAgent([device]), "unix", place):
            with trio.fail_after(20):
                while (await bed.capabilities())["source"] != "agent":  # noqa: ASYNC110  it is in another process
                    await trio.sleep(0.02)
    finally:
        bed.daemon.close()


async def test_changed_configuration_finds_nothing(place: Path) -> None:
    """Another agent's function is not judged by what was stored; nor is anything lost by a damaged file."""
    bed = Bed(place)
    try:
        await bed.learn(MemoryFunction("x", caps=replace(ALL_CAPABILITIES, stop_copy=False)))
        bed.configure("other")
        await bed.daemon.start()
        assert "configuration" == (await bed.capabilities())["source"]
        async with bed.client() as client:
            assert (0, True) == await offers(client)
        bed.daemon.kill()
        bed.configure("x")
        bed.stored.write_bytes(bed.stored.read_bytes()[:50])
        await bed.daemon.start()
        found = await bed.capabilities()
        assert "configuration" == found["source"]
        assert str(bed.stored) in found["problem"]
        assert "could not be read" in bed.daemon.log
        async with bed.client() as client:
            assert (0, True) == await offers(client)
    finally:
        bed.daemon.close()


async def test_agent_that_can_do_something_else_now(tmp_path: Path) -> None:
    """What is stored gives way to what the agent says, on the disk too; the dirty log does not rely on what is old."""
    device = MemoryFunction("x", caps=replace(ALL_CAPABILITIES, dirty=False))
    agent = FaultyAgent(MemoryAgent([device]))
    upstream = UpstreamDevice(socket=tmp_path / "up.sock")
    config = (
        function(tmp_path, "up"),
        function(tmp_path, "f0", upstream, agent=AgentConfig(kind="test", function="x"), migration=FAST),
    )
    state = tmp_path / "state"
    stored = state / "agents" / "f0.json"

    def dirty() -> bool | None:
        return json.loads(stored.read_text())["capabilities"]["dirty"] if stored.exists() else None

    async with serving(*config, agents={"test": agent}, state_directory=state):
        await until(lambda: dirty() is False)
    device.caps = ALL_CAPABILITIES
    agent.inject("open", Fails(Busy("not now")), count=None)
    async with serving(*config, agents={"test": agent}, state_directory=state) as daemon:
        engine = daemon.functions[1].migration
        assert engine is not None
        assert engine.link.facts is not None
        assert (Source.STORED, False) == (engine.link.facts.source, engine.link.facts.caps.dirty)
        client = Vmm((await connect(tmp_path / "f0.sock")).sock)
        await client.negotiate()
        agent.heal()
        await client.start_logging()
        assert device.log is not None
        await until(lambda: dirty() is True)
        client.close()
