"""Guest memory and registers of a function that moves with stock QEMU: what QEMU brings, what it cannot, and the rest.

A daemon in the test's event loop serves both sides; the function is behind a root port of a machine under qtest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from daemonkit import function, serving
from vfiouser_oob.devices.base import BackendSession, ClientLink
from vfiouser_oob.devices.model_backend import ModelBackend
from vfiouser_oob.migration.no_migration import Port
from vfiouser_oob.server.function import Function
from vfiouser_oob.vm.page_contents import PageContents
from vfiouser_oob.vm.registers import FunctionRegisters, RegisterReader
from vfiouser_oob.vm.replaying import ReplayUnderWay, prepare, replay_of
from vfiouser_oob.vm.untracked import FunctionMemory
from vfiouser_protocol.constants import IrqIndex
from vmbed.assets import Assets
from vmbed.nvme import until
from vmbed.pci import PciFunction
from vmbed.qemu import Qemu, QemuConfig, VfioUserDevice, start_qemu

pytestmark = pytest.mark.vm
ROOT_PORT, BUS = 4, 1
ECAM = 0xB000_0000
PAGE = 4096
EARLY, GAP, KNOWN, LAST, MESSAGES = (0x20_0000 + index * 0x10_0000 for index in range(5))
VECTOR = 2


@dataclass
class Side:
    """One host: its function, and its QEMU."""

    function: Function
    qemu: Qemu

    @property
    def session(self) -> BackendSession:
        """The device as QEMU has it."""
        assert self.function.attached is not None
        return self.function.attached.backend

    @property
    def port(self) -> Port:
        """The client's way into the function's migration."""
        assert self.function.attached is not None
        return self.function.attached.port

    @property
    def bus(self) -> ClientLink:
        """The client."""
        assert self.function.connection is not None
        return self.function.connection.link

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """As a monitor of ours would."""
        return await self.qemu.qmp.execute(command, **(arguments or {}))

    async def hmp(self, line: str) -> str:
        """As a monitor of ours would."""
        return await self.qemu.qmp.hmp(line)

    async def status(self, wanted: str) -> dict[str, Any]:
        """Wait for what a migration does; returns the event."""
        while True:
            event = await self.qemu.qmp.event("MIGRATION")
            if event["data"]["status"] == wanted:
                return event


@asynccontextmanager
async def sides(assets: Assets, workdir: Path) -> AsyncIterator[tuple[Side, Side]]:
    """A source, and a destination that waits."""

    def config(name: str, *extra: str) -> QemuConfig:
        device = VfioUserDevice(workdir / f"{name}.sock", properties={"bus": "rp1", "addr": "0x0"})
        early = ("-device", f"pcie-root-port,id=rp1,bus=pcie.0,addr={ROOT_PORT:#x},chassis=1")
        return QemuConfig([device], accel="qtest", memory_mib=64, early=early, extra=extra)

    async with serving(function(workdir, "a"), function(workdir, "b")) as daemon:
        for each in daemon.functions:
            each.recorded = True
        async with (
            start_qemu(assets, config("a"), workdir, name="src") as one,
            start_qemu(assets, config("b", "-incoming", "defer", "-S"), workdir, name="dst") as other,
        ):
            first, second = daemon.functions
            yield Side(first, one), Side(second, other)


async def turn_on(qemu: Qemu) -> PciFunction:
    """Do what firmware does: ECAM, the root port's numbers and window, BARs; and what a driver does."""
    host, port = PciFunction(qemu.qtest, 0), PciFunction(qemu.qtest, ROOT_PORT)
    await host.config_write(0x60, ECAM | 1)
    await host.config_write(0x64, 0)
    await port.config_write(0x18, BUS << 16 | BUS << 8)
    await port.config_write(0x20, 0xE0F0_E000)
    await port.config_write(0x04, 0x6, 2)
    found = PciFunction(qemu.qtest, BUS << 5)
    await found.place_bars()
    msix = await found.msix()
    for vector in range(VECTOR + 1):
        await msix.program(vector, MESSAGES + 4 * vector, 0xCAFE0000 + vector)
    await msix.enable()
    return found


async def view(found: PciFunction) -> bytes:
    """The first 256 bytes, as a guest reads them."""
    words = [await found.config_read(offset) for offset in range(0, 256, 4)]
    return b"".join(word.to_bytes(4, "little") for word in words)


async def until_before_the_last_pass(source: Side, destination: Side, uri: str) -> float:
    """Migrate until all of the memory was sent once, and the processors stand; returns when it began."""
    wanted = ("return-path", "events", "pause-before-switchover")
    on = [{"capability": name, "state": True} for name in wanted]
    for side in (source, destination):
        await side.qemu.qmp.execute("migrate-set-capabilities", capabilities=on)
    await destination.qemu.qmp.execute("migrate-incoming", uri=uri)
    await source.qemu.qmp.execute("migrate", uri=uri)
    stamp = (await source.status("setup"))["timestamp"]
    await source.status("pre-switchover")
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


async def pages(qemu: Qemu) -> list[bytes]:
    """The first byte of each page that the function has written."""
    return [await qemu.qtest.read(address, 1) for address in (EARLY, GAP, KNOWN, LAST)]


async def test_memory_and_registers_move(assets: Assets, workdir: Path) -> None:
    """What went by messages QEMU brings; what went into files travels; registers are replayed and interrupts arrive."""
    async with sides(assets, workdir) as (source, destination):
        await prepare(destination, ["f0"])
        found = await turn_on(source.qemu)
        memory = FunctionMemory("f0", source.session)
        reader = RegisterReader("f0", source.session, source.port.shadow, source.bus)
        device = source.session.memory
        await device.write(EARLY, b"1" * PAGE)
        await reader.locate(source)

        began = await until_before_the_last_pass(source, destination, f"unix:{workdir / 'mig'}")
        await device.write(GAP, b"2" * PAGE)  # nobody has told us of the migration yet
        await memory.arm(began)
        await device.write(KNOWN, b"3" * PAGE)
        memory.hold()
        await device.write(LAST, b"4" * PAGE)
        await memory.stands()
        registers = FunctionRegisters.from_bytes((await reader.collect(5)).to_bytes())
        seen = await view(found)
        contents = PageContents.from_bytes((await memory.take(1 << 20)).to_bytes())
        assert {GAP, LAST} <= {address for address, _ in contents.parts}
        assert KNOWN not in {address for address, _ in contents.parts}

        await source.qemu.qmp.execute("migrate-continue", state="pre-switchover")
        for side in (source, destination):
            await side.status("completed")
        assert [b"1", b"\0", b"3", b"\0"] == await pages(destination.qemu)
        arrived = FunctionMemory("f0", destination.session)
        await arrived.apply(contents)
        assert [b"1", b"2", b"3", b"4"] == await pages(destination.qemu)
        under_way = ReplayUnderWay(replay_of("f0", registers, destination.session), destination.bus)
        with trio.fail_after(30):
            await under_way.finish(lambda: True)
        moved = PciFunction(destination.qemu.qtest, BUS << 5)
        assert seen == await view(moved)
        await destination.qemu.qmp.execute("cont")
        backend = destination.function.backend
        assert isinstance(backend, ModelBackend)
        backend.trigger(IrqIndex.MSIX, VECTOR)

        async def came() -> bool:
            return await destination.qemu.qtest.load(MESSAGES + 4 * VECTOR) == 0xCAFE0000 + VECTOR

        await until("the message of the replayed vector", came)
