"""A VM moves between two functions of a real daemon: monitor, carrier and client are real sockets, QEMU is the test."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import trio

from carrierbed.busclient import BusClient, BusError
from daemonkit import function, serving
from vfiouser_agents.api import AgentState
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.dma import DmaServer
from vfiouser_oob.config.schema import AgentConfig, CarrierChoice, DaemonConfig, VmConfig
from vfiouser_oob.server.daemon import Daemon
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.constants import RegionIndex
from vfiouser_protocol.errors import ReplyError

ECAM, SLOT = 0xB000_0000, 5
PLACE = ECAM + (SLOT << 15)
BAR0, TABLE, TABLE_SIZE = 0xFE00_0000, 0xFE00_0800, 16 * 16
RAM, RAM_SIZE = 0x10_0000, 0x10_0000
GREETING = {"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": ""}, "capabilities": []}}
#: Offsets of what the guest has written, and the bytes.
WRITTEN = {0x10: BAR0.to_bytes(4, "little"), 0x04: b"\x06\0", 0x3C: b"\x0b"}


class Machine(DmaServer):
    """What QEMU has of a function: configuration space behind ECAM, and the MSI-X table."""

    def __init__(self) -> None:
        self.config = bytearray(4096)
        self.table = bytearray(TABLE_SIZE)
        self.client: Client

    def _place(self, address: int) -> tuple[bytearray, int]:
        return (self.table, address - TABLE) if address < ECAM or address >= TABLE else (self.config, address - PLACE)

    async def read(self, address: int, count: int) -> bytes:
        """Give what is there."""
        place, at = self._place(address)
        return bytes(place[at : at + count])

    async def write(self, address: int, data: bytes) -> None:
        """Take it; configuration writes are forwarded to the server, as QEMU does."""
        place, at = self._place(address)
        place[at : at + len(data)] = data
        if place is self.config:
            await self.client.region_write(RegionIndex.CONFIG, at, data)


class Qemu:
    """A QEMU: its monitor, which answers by itself, and its end of the carrier."""

    def __init__(self, runstate: str) -> None:
        self.machine = Machine()
        self.bus: BusClient
        self.heard: list[str] = []
        self._runstate = runstate
        self._sending = trio.Lock()
        self._stream: trio.SocketStream

    def _answer(self, command: str, arguments: dict[str, Any]) -> Any:
        device = {"qdev_id": "f0", "bus": 0, "slot": SLOT, "function": 0}
        properties = {"addr": SLOT << 3, "parent_bus": "/machine/q35/pcie.0", "MCFG": ECAM}
        children = {"/objects": "dbus-vmstate", "/machine/peripheral": "vfio-user-pci"}
        answers: dict[str, Callable[[], Any]] = {
            "query-status": lambda: {"status": self._runstate},
            "query-migrate-capabilities": lambda: [{"capability": "return-path", "state": True}],
            "query-pci": lambda: [{"devices": [device]}],
            "qom-get": lambda: properties[arguments["property"]],
            "qom-list": lambda: [{"name": "f0", "type": f"child<{children[arguments['path']]}>"}],
            "human-monitor-command": lambda: "",
        }
        return answers.get(command, dict)()

    async def come(self, directory: Path, *, task_status: trio.TaskStatus[None]) -> None:
        """Connect everything, and answer until the daemon closes the monitor."""
        self.bus = await (await BusClient.connect(directory / "vmstate")).open()
        self._stream = await trio.open_unix_socket(str(directory / "monitor"))
        await self._send(GREETING)
        task_status.started()
        buffer = b""
        try:
            while data := await self._stream.receive_some(65536):
                *lines, buffer = (buffer + data).split(b"\n")
                for line in filter(None, lines):
                    heard = json.loads(line)
                    self.heard.append(heard["execute"])
                    result = self._answer(heard["execute"], heard.get("arguments", {}))
                    await self._send({"return": result, "id": heard["id"]})
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def _send(self, message: Any) -> None:
        async with self._sending:
            await self._stream.send_all(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """End."""
        for stream in (self._stream, self.bus.stream):
            stream.socket.close()

    async def says(self, name: str, status: str = "") -> None:
        """Tell an event."""
        if name in ("STOP", "RESUME"):
            self._runstate = {"STOP": "finish-migrate", "RESUME": "running"}[name]
        now = {"seconds": int(time.time()), "microseconds": 0}
        await self._send({"event": name, "data": {"status": status} if status else {}, "timestamp": now})


class Side:
    """A daemon with its agent, and the QEMU before it.

    Args:
        daemon: the daemon.
        agent_function: the function, as its agent knows it.
        directory: of its sockets.
    """

    def __init__(self, daemon: Daemon, agent_function: MemoryFunction, directory: Path) -> None:
        self.daemon = daemon
        self.agent_function = agent_function
        self.directory = directory
        self.qemu: Qemu

    @property
    def phase(self) -> str:
        """Where its VM is."""
        return self.daemon.status()["vms"][0]["phase"]

    def runs(self) -> bool:
        """Whether its agent has the function run."""
        return self.agent_function.state is AgentState.RUNNING

    async def until(self, phase: str) -> None:
        """Wait for a phase."""
        with trio.fail_after(10):
            while self.phase != phase:  # noqa: ASYNC110 - it is looked at from outside
                await trio.sleep(0.01)

    @asynccontextmanager
    async def attached(self, runstate: str) -> AsyncIterator[Qemu]:
        """A QEMU with the function."""
        self.qemu = Qemu(runstate)
        with closing(OwnedFd(os.memfd_create("guest"))) as memory, closing(self.qemu):
            os.ftruncate(memory.fileno(), RAM_SIZE)
            async with Client.connect(self.directory / "f0.sock", dma_server=self.qemu.machine) as client:
                self.qemu.machine.client = client
                await client.dma_map(RAM, RAM_SIZE, fd=memory)
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.qemu.come, self.directory)
                    try:
                        yield self.qemu
                    finally:
                        nursery.cancel_scope.cancel()


@asynccontextmanager
async def side(directory: Path, seed: int) -> AsyncIterator[Side]:
    """A daemon with one VM of one function."""
    os.mkdir(directory)
    agent_function = MemoryFunction(seed=seed)
    vm = VmConfig(
        name="vm",
        functions=("f0",),
        monitor=directory / "monitor",
        carrier=CarrierChoice.DBUS_VMSTATE,
        dbus_vmstate=directory / "vmstate",
    )
    config = DaemonConfig(functions=(function(directory, agent=AgentConfig(kind="memory", function="f0")),), vms=(vm,))
    async with serving(config=config, agents={"memory": MemoryAgent([agent_function])}) as daemon:
        yield Side(daemon, agent_function, directory)


async def test_a_vm_moves(tmp_path: Path) -> None:
    """State, configuration, table and memory arrive; the source stands, and the destination runs at RESUME."""
    async with side(tmp_path / "a", 1) as a, side(tmp_path / "b", 2) as b:
        assert (tmp_path / "a" / "monitor").is_socket()
        async with a.attached("running") as source, b.attached("inmigrate") as destination:
            await a.until("running")
            await b.until("incoming")
            for offset, data in WRITTEN.items():
                await source.machine.client.region_write(RegionIndex.CONFIG, offset, data)
            source.machine.table[:] = bytes(range(16)) * 16
            await source.says("MIGRATION", "setup")
            await a.until("armed")
            await source.says("STOP")
            await a.until("stopped")
            pieces = await source.bus.save()
            assert a.phase == "saved"
            assert not a.runs()
            await destination.says("MIGRATION", "active")
            await destination.bus.load(pieces)
            await b.until("ready")
            found = {at: bytes(destination.machine.config[at : at + len(data)]) for at, data in WRITTEN.items()}
            assert found == WRITTEN
            assert destination.machine.table[:12] == source.machine.table[:12]
            assert not b.runs()
            await destination.says("RESUME")
            await b.until("running")
            with trio.fail_after(5):
                while not b.runs():  # noqa: ASYNC110 - as above
                    await trio.sleep(0.01)
            assert b.agent_function.digest() == a.agent_function.digest()
            await source.says("MIGRATION", "completed")
            await a.until("away")
            assert not a.runs()


async def test_a_vm_that_comes_without_a_state_gets_errors(tmp_path: Path) -> None:
    """Its function never runs, and every access to it fails."""
    async with side(tmp_path / "b", 2) as b, b.attached("inmigrate") as qemu:
        await b.until("incoming")
        await qemu.says("MIGRATION", "completed")
        await b.until("barred")
        with trio.fail_after(10):
            while b.daemon.status()["vms"][0]["functions"][0]["place"] != "barred":  # noqa: ASYNC110 - as above
                await trio.sleep(0.01)
        with pytest.raises(ReplyError):
            await qemu.machine.client.region_read(0, 0, 4)
        assert "without its functions' state" in str(b.daemon.status()["vms"][0]["last_error"])


async def test_a_state_that_is_not_the_vms_is_refused(tmp_path: Path) -> None:
    """QEMU is told why."""
    async with side(tmp_path / "b", 2) as b, b.attached("inmigrate") as qemu:
        await b.until("incoming")
        await qemu.says("MIGRATION", "active")
        source = next(iter(await qemu.bus.proxies()))
        with pytest.raises(BusError, match="not a piece of a state"):
            await qemu.bus.load({source: b"rubbish"})
