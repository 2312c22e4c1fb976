"""The plan of a replay on real QEMUs: a function whose registers are written as planned is what it was at the source.

What the function itself will write by DMA, the test writes by qtest; QEMU cannot tell the two apart.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from vfiouser_oob.migration.config_shadow import ConfigShadow
from vfiouser_oob.transport.listener import listen_on_path
from vfiouser_oob.vm.monitor import Monitor, MonitorPort
from vfiouser_oob.vm.preflight import FunctionFacts, Moment, judge
from vfiouser_oob.vm.record import VmPhase, VmRecord
from vfiouser_oob.vm.replay import (
    FunctionShape,
    MemoryWrite,
    SourceView,
    checks,
    plan_replay,
    table_at,
    through_ecam,
    written_bytes,
)
from vfiouser_oob.vm.survey import survey
from vfiouser_oob.vm.topology import find_device
from vmbed.assets import Assets
from vmbed.nvme import NvmeDriver, until
from vmbed.pci import PciFunction
from vmbed.qemu import Qemu, QemuConfig, VfioUserDevice, start_qemu
from vmbed.qtest import Qtest
from vmbed.stack import soc_and_daemon

pytestmark = pytest.mark.vm
SLOT = 5
ECAM = 0xB000_0000
MESSAGES = 0x10_0000
VECTOR = 1


class NotedFunction(PciFunction):
    """A function whose configuration writes are noted, as the daemon notes them."""

    def __init__(self, qtest: Qtest, slot: int) -> None:
        super().__init__(qtest, slot)
        self.shadow = ConfigShadow()

    async def config_write(self, offset: int, value: int, size: int = 4) -> None:
        """Write, and note it."""
        self.shadow.note(offset, value.to_bytes(size, "little"))
        await super().config_write(offset, value, size)

    async def view(self) -> bytes:
        """The first 256 bytes, as a guest reads them."""
        words = [await self.config_read(offset) for offset in range(0, 256, 4)]
        return b"".join(word.to_bytes(4, "little") for word in words)


@dataclass
class Sides:
    """A function at the source, and another one behind a QEMU that waits."""

    source: Qemu
    destination: Qemu


@asynccontextmanager
async def sides(assets: Assets, workdir: Path) -> AsyncIterator[Sides]:
    """Two QEMUs, each with a daemon and a simulated controller of its own."""
    for name in "ab":
        (workdir / name).mkdir()
    async with soc_and_daemon(workdir / "a") as first, soc_and_daemon(workdir / "b") as second:
        source = QemuConfig([VfioUserDevice(first.socket, slot=SLOT)], accel="qtest", memory_mib=64)
        destination = QemuConfig(
            [VfioUserDevice(second.socket, slot=SLOT)],
            accel="qtest",
            memory_mib=64,
            extra=["-incoming", "defer", "-S"],
        )
        async with (
            start_qemu(assets, source, workdir, name="src") as one,
            start_qemu(assets, destination, workdir, name="dst") as other,
        ):
            yield Sides(one, other)


async def move(both: Sides, uri: str) -> None:
    """Migrate, and wait until it is complete."""
    on = [{"capability": name, "state": True} for name in ("return-path", "events")]
    for qemu in (both.source, both.destination):
        await qemu.qmp.execute("migrate-set-capabilities", capabilities=on)
    await both.destination.qmp.execute("migrate-incoming", uri=uri)
    await both.source.qmp.execute("migrate", uri=uri)
    for qemu in (both.source, both.destination):
        while (await qemu.qmp.event("MIGRATION"))["data"]["status"] != "completed":
            pass


async def write(qemu: Qemu, writes: list[MemoryWrite]) -> None:
    """Carry a plan out."""
    for each in writes:
        await qemu.qtest.write(each.address, each.data)


async def failures(qemu: Qemu, writes: list[MemoryWrite]) -> list[str]:
    """What is not as planned."""
    found = [each.failure(await qemu.qtest.read(each.address, len(each.data))) for each in checks(writes)]
    return list(filter(None, found))


@pytest.mark.parametrize("memory_on", [True, False])
async def test_replay(assets: Assets, workdir: Path, memory_on: bool) -> None:
    """After the replay configuration space and table are as they were, and interrupts arrive where they were aimed."""
    async with sides(assets, workdir) as both:
        qtest = both.source.qtest
        for offset, value in ((0x60, ECAM | 1), (0x64, 0)):  # the host bridge's ECAM, as firmware turns it on
            await qtest.port_out(0xCF8, 0x8000_0000 | offset)
            await qtest.port_out(0xCFC, value)
        function = NotedFunction(qtest, SLOT)
        sizes = {bar.index: bar.size for bar in await function.place_bars()}
        msix = await function.msix()
        for vector in (0, VECTOR):
            await msix.program(vector, MESSAGES + 4 * vector, 0xCAFE0000 + vector, masked=False)
        await msix.enable()
        await function.config_write(0x3C, 0x0B, 1)
        table = await qtest.read(msix.table, 16 * msix.vectors)
        if not memory_on:
            await function.config_write(0x04, 0x0400, 2)
        view = await function.view()
        shape = FunctionShape(view, sizes)
        written = written_bytes(function.shadow.writes())
        assert table_at(written, shape) == (msix.table, 16 * msix.vectors)

        await move(both, f"unix:{workdir / 'mig'}")
        place = find_device(await both.destination.qmp.execute("query-pci"), "f0")
        plan = plan_replay(SourceView(written, table), shape)
        steps = through_ecam(plan.steps, place, ECAM)
        assert len(await failures(both.destination, steps)) >= 3  # stock QEMU has brought nothing
        await write(both.destination, steps)
        assert [] == await failures(both.destination, steps)
        await write(both.destination, through_ecam(plan.closing, place, ECAM))

        moved = NotedFunction(both.destination.qtest, SLOT)
        assert view == await moved.view()
        await both.destination.qmp.execute("cont")
        await moved.config_write(0x04, 0x0406, 2)
        assert table == await both.destination.qtest.read(msix.table, len(table))
        moved.addresses = function.addresses
        driver = NvmeDriver(moved)
        await driver.enable()
        await driver.create_io_queues(VECTOR)
        await driver.write_blocks(8, bytes(4096))

        async def arrived() -> bool:
            return await both.destination.qtest.load(MESSAGES + 4 * VECTOR) == 0xCAFE0000 + VECTOR

        await until("the message of the replayed vector", arrived)


async def test_survey(assets: Assets, workdir: Path) -> None:
    """What QEMU answers is judged: what is there is found, and what is missing is told."""
    came, come = trio.open_memory_channel[Monitor](1)

    async def attend(monitor: Monitor) -> None:
        came.send_nowait(monitor)
        await monitor.gone()

    async with soc_and_daemon(workdir) as stack, trio.open_nursery() as nursery:
        await nursery.start(MonitorPort("vm", attend).serve, listen_on_path(workdir / "oob"))
        config = QemuConfig(
            [VfioUserDevice(stack.socket, slot=SLOT)],
            accel="qtest",
            memory_mib=64,
            extra=[
                *("-chardev", f"socket,id=oob,path={workdir / 'oob'},server=off,reconnect-ms=100"),
                *("-object", "monitor-qmp,id=oobmon,chardev=oob"),
            ],
        )
        async with start_qemu(assets, config, workdir) as qemu:
            with trio.fail_after(30):
                monitor = await come.receive()
            record = VmRecord(phase=VmPhase.RUNNING)

            async def codes(*names: str) -> list[str]:
                facts = await survey(record, monitor, tuple(map(FunctionFacts, names)))
                return [reason.code for reason in judge(facts, Moment.SETUP)]

            assert ["no-return-path", "no-carrier"] == await codes("f0")
            on = [{"capability": "return-path", "state": True}]
            await qemu.qmp.execute("migrate-set-capabilities", capabilities=on)
            assert ["no-carrier", "function-missing"] == await codes("f0", "f1")
            assert ["no-carrier", "function-missing", "stranger"] == await codes("f1")
        nursery.cancel_scope.cancel()
