"""QEMU's real vfio-user client without any CPU: the test itself is what a guest would be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from vmbed.assets import Assets
from vmbed.nvme import BLOCK, IDENTIFY_NAMESPACE, PAGE, NvmeDriver, until
from vmbed.pci import CAP_MSIX, CAP_PCIE, PciFunction
from vmbed.qemu import TRACE_EVENTS, Qemu, QemuConfig, VfioUserDevice, start_qemu
from vmbed.stack import MIB, SocConfig, Stack, soc_and_daemon

pytestmark = pytest.mark.vm

SLOT = 5
MESSAGES = 0x10_0000  # guest RAM where the test has MSI-X messages land
VECTOR = 1


class Rig:
    """A machine under qtest with the daemon's function in it."""

    def __init__(self, stack: Stack, qemu: Qemu) -> None:
        self.stack = stack
        self.qemu = qemu
        self.function = PciFunction(qemu.qtest, SLOT)
        self.driver = NvmeDriver(self.function)

    async def message(self, vector: int) -> int:
        """The MSI-X message last seen for a vector; 0 for none."""
        return await self.qemu.qtest.load(MESSAGES + 4 * vector)

    async def trapped_writes(self) -> tuple[int, int]:
        """Register writes by message so far, as the daemon and as QEMU count them."""
        return await self.stack.messages("REGION_WRITE"), len(self.qemu.traced("vfio_region_write"))


@asynccontextmanager
async def rig(
    assets: Assets, workdir: Path, config: SocConfig | None = None, *, shared_memory: bool = True
) -> AsyncIterator[Rig]:
    """Start simulator, daemon and QEMU; no register has been touched when this yields."""
    async with soc_and_daemon(workdir, config) as stack:
        device = VfioUserDevice(stack.socket, slot=SLOT)
        machine = QemuConfig(
            [device],
            accel="qtest",
            memory_mib=64,
            shared_memory=shared_memory,
            trace=(*TRACE_EVENTS, "vfio_msi_interrupt"),
        )
        async with start_qemu(assets, machine, workdir) as qemu:
            yield Rig(stack, qemu)


async def write_and_read_back(rig: Rig) -> None:
    """One page to block 8 and back through other memory, each completion signalled by its message."""
    data = bytes(index * 7 % 251 for index in range(PAGE))
    await rig.driver.write_blocks(8, data)
    assert await rig.driver.read_blocks(8, PAGE) == data
    assert await rig.driver.read_blocks(9, BLOCK) == data[BLOCK : 2 * BLOCK]


async def start_driver(rig: Rig) -> None:
    """Place the BARs, program MSI-X and enable the controller; I/O queues are the test's to make."""
    await rig.function.place_bars()
    msix = await rig.function.msix()
    for vector in (0, VECTOR):
        await msix.program(vector, MESSAGES + 4 * vector, 0xCAFE0000 + vector)
    await msix.enable()
    await rig.driver.enable()


async def test_config_space_and_bar_sizing(assets: Assets, workdir: Path) -> None:
    """Identity, capability list and BAR sizes come through as those of an NVMe function."""
    async with rig(assets, workdir) as bed:
        function = bed.function
        assert await function.config_read(0x08) >> 8 == 0x010802
        assert await function.config_read(0x00, 2) not in {0, 0xFFFF}
        assert {CAP_MSIX, CAP_PCIE} <= (await function.capabilities()).keys()
        bars = await function.size_bars()
        assert bars[0].index == 0
        assert not bars[0].is_io
        assert bars[0].size >= 0x2000
        assert all(bar.size & (bar.size - 1) == 0 for bar in bars)


async def test_registers_dma_and_msix(assets: Assets, workdir: Path) -> None:
    """Identify and block I/O land in guest RAM by DMA, and completions signal their MSI-X vectors."""
    async with rig(assets, workdir, SocConfig(size=64 * MIB)) as bed:
        await start_driver(bed)
        assert await bed.driver.version() >= 0x0001_0400
        controller = await bed.driver.identify()
        assert controller[24:64].strip(), "no model number"
        await until("admin completion's MSI-X message", lambda: arrived(bed, 0))

        namespace = await bed.driver.identify(IDENTIFY_NAMESPACE, 1)
        assert int.from_bytes(namespace[0:8], "little") == 64 * MIB // BLOCK
        assert await bed.message(VECTOR) == 0
        await bed.driver.create_io_queues(VECTOR)
        await write_and_read_back(bed)
        await until("I/O completion's MSI-X message", lambda: arrived(bed, VECTOR))


async def arrived(bed: Rig, vector: int) -> bool:
    """Whether the vector's message is in guest RAM."""
    return await bed.message(vector) == 0xCAFE0000 + vector


async def fired(bed: Rig, vector: int) -> bool:
    """Whether QEMU has seen the vector's eventfd, masked or not."""
    return any(f" vector {vector} " in line for line in bed.qemu.traced("vfio_msi_interrupt"))


async def test_masked_vector_is_delivered_when_unmasked(assets: Assets, workdir: Path) -> None:
    """QEMU keeps masks to itself: the server signals all the same, the message comes on unmasking."""
    async with rig(assets, workdir) as bed:
        await start_driver(bed)
        msix = await bed.function.msix()
        await bed.driver.create_io_queues(VECTOR)
        await msix.mask(VECTOR, masked=True)
        await write_and_read_back(bed)
        await until("interrupt on the masked vector", lambda: fired(bed, VECTOR))
        assert await bed.message(VECTOR) == 0
        await msix.mask(VECTOR, masked=False)
        await until("message of the unmasked vector", lambda: arrived(bed, VECTOR))


async def test_dma_by_message_without_shared_memory(assets: Assets, workdir: Path) -> None:
    """With guest RAM that has no fd, Identify and block I/O are right all the same."""
    async with rig(assets, workdir, shared_memory=False) as bed:
        await start_driver(bed)
        await bed.driver.create_io_queues(VECTOR)
        await write_and_read_back(bed)
        await until("I/O completion's MSI-X message", lambda: arrived(bed, VECTOR))


async def test_trapped_doorbells_are_messages(assets: Assets, workdir: Path) -> None:
    """With trapped doorbells each ring is a message: what the next test's zero is measured against."""
    async with rig(assets, workdir) as bed:
        await start_driver(bed)
        await bed.driver.create_io_queues(VECTOR)
        daemon, qemu = await bed.trapped_writes()
        await write_and_read_back(bed)
        daemon_after, qemu_after = await bed.trapped_writes()
        assert qemu_after - qemu == 6  # three commands: a submission and a completion doorbell each
        assert daemon_after - daemon == 6


async def test_mapped_doorbells_and_cmb_are_shared_memory(assets: Assets, workdir: Path) -> None:
    """The doorbells and the memory buffer, holding a queue, are mapped: using them sends no message."""
    async with rig(assets, workdir, SocConfig(cmb=2 * MIB, doorbells="polled")) as bed:
        await start_driver(bed)
        assert len(bed.qemu.traced("vfio_region_mmap")) >= 2
        address, size = await bed.driver.enable_cmb()
        assert size == 2 * MIB
        await bed.driver.create_io_queues(VECTOR, submissions=address)
        before = await bed.trapped_writes()
        await write_and_read_back(bed)
        last_page = bytes(range(256)) * (PAGE // 256)
        await bed.qemu.qtest.write(address + size - PAGE, last_page)
        assert await bed.qemu.qtest.read(address + size - PAGE, PAGE) == last_page
        assert await bed.trapped_writes() == before


async def test_second_qemu_after_sigkill(assets: Assets, workdir: Path) -> None:
    """A killed QEMU's successor gets the function with bus mastering off, and then does I/O."""
    async with soc_and_daemon(workdir) as stack:
        machine = QemuConfig([VfioUserDevice(stack.socket, slot=SLOT)], accel="qtest", memory_mib=64)
        async with start_qemu(assets, machine, workdir, name="first") as qemu:
            first = Rig(stack, qemu)
            await start_driver(first)
            await first.driver.create_io_queues(VECTOR)
            await qemu.kill()
        async with start_qemu(assets, machine, workdir, name="second") as qemu:
            second = Rig(stack, qemu)
            assert await second.function.config_read(0x04, 2) & 0x4 == 0
            await start_driver(second)
            await second.driver.create_io_queues(VECTOR)
            await write_and_read_back(second)
