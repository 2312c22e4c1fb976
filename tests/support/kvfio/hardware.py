"""More of what is proven in the guest: config space, MSI, permissions, limits, and a client that dies at work."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from kvfio import bed
from kvfio.bed import EDU, NVME, client, daemon
from kvfio.scenarios import IOVA, MIB, MODEL, admin_queue, eventfd, fired, refusal, verified_io, wait_until
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.client.mapping import MappedRegion
from vfiouser_oob.lab.nvme.driver import NvmeDriver
from vfiouser_oob.transport.fds import LentFd
from vfiouser_protocol.constants import IrqIndex, IrqSetFlags, RegionIndex

CONFIG = RegionIndex.CONFIG
LOOP_BACK = IrqSetFlags.DATA_BOOL | IrqSetFlags.ACTION_TRIGGER
CAP_PM, CAP_MSIX = 0x01, 0x11
READ_ONLY = 1
HUGE_PAGE = 2 * MIB


# Config space


async def config_value(connected: Client, offset: int, count: int) -> int:
    """Read a register of config space."""
    return int.from_bytes(await connected.region_read(CONFIG, offset, count), "little")


async def capability(connected: Client, wanted: int) -> int:
    """Where a capability starts."""
    config = await connected.region_read(CONFIG, 0, 256)
    offset = config[0x34]
    while config[offset] != wanted:
        offset = config[offset + 1]
        assert offset, f"there is no capability {wanted:#x}"
    return offset


async def config_work(path: Path) -> None:
    """Identity, base addresses and MSI-X are the kernel's; what is off is EIO by message, and nothing dies of it."""
    hardware = bed.config_space(NVME)
    async with Client.connect(path) as connected:
        await connected.region_write(CONFIG, 0, b"\xff\xff")
        assert hardware[0:4] == await connected.region_read(CONFIG, 0, 4)
        await connected.region_write(CONFIG, 0x10, b"\xff\xff\xff\xff")
        assert 0xFFFF_C004 == await config_value(connected, 0x10, 4), "the size of BAR 0 is not to be learned"
        msix = await capability(connected, CAP_MSIX)
        await connected.region_write(CONFIG, msix + 2, b"\x40\x80")
        assert 0 == await config_value(connected, msix + 2, 2) & 0x8000, "MSI-X was switched on past SET_IRQS"
        after = bed.config_space(NVME)
        assert hardware[0:4] == after[0:4]
        assert hardware[0x10:0x28] == after[0x10:0x28], "a client moved the BAR of the machine"
        assert hardware[msix : msix + 12] == after[msix : msix + 12]

        async def cap_register() -> bytes:
            return await connected.region_read(0, 0, 8)

        await connected.region_write(CONFIG, 4, b"\x00\x00")
        assert errno.EIO == await refusal(cap_register), "memory is off"
        await connected.region_write(CONFIG, 4, b"\x02\x00")
        awake = await cap_register()
        power = await capability(connected, CAP_PM) + 4
        await connected.region_write(CONFIG, power, b"\x03\x00")
        assert errno.EIO == await refusal(cap_register), "the function sleeps"
        await connected.region_write(CONFIG, power, b"\x00\x00")
        await connected.region_write(CONFIG, 4, b"\x02\x00")
        assert awake == await cap_register()


def config_space() -> None:
    """Config space is filtered as the kernel filters it."""
    with daemon(NVME) as served:
        client(config_work, served)


# Interrupts


async def signals_work(path: Path) -> None:
    """ERR and REQ are the client's eventfds; each can be set, signalled, and taken away."""
    async with Client.connect(path) as connected:
        for index in (IrqIndex.ERR, IrqIndex.REQ):
            assert 1 == (await connected.get_irq_info(index)).count
            fd = eventfd()
            await connected.set_eventfds(index, [LentFd(fd)])
            await connected.set_irqs(index, LOOP_BACK, data=b"\x01")
            assert 1 == await fired(fd)
            await connected.disable_irqs(index)
            await connected.set_eventfds(index, [LentFd(fd)])
            await connected.set_irqs(index, LOOP_BACK, data=b"\x01")
            assert 1 == await fired(fd)


def error_and_request() -> None:
    """The eventfds of errors and of the kernel's wish for the device."""
    with daemon(NVME) as served:
        client(signals_work, served)


class Edu:
    """QEMU's educational device: a DMA engine and one MSI vector, and no reset.

    Args:
        bar: its BAR.
    """

    IDENTITY, RAISE, ACKNOWLEDGE, SOURCE, DESTINATION, COUNT, COMMAND = 0x00, 0x60, 0x64, 0x80, 0x88, 0x90, 0x98
    BUFFER = 0x40000
    TO_MEMORY, INTERRUPT = 2, 4

    def __init__(self, bar: MappedRegion) -> None:
        self._bar = bar

    async def transfer(self, source: int, destination: int, count: int, direction: int) -> None:
        """Start to copy."""
        for register, value in ((self.SOURCE, source), (self.DESTINATION, destination), (self.COUNT, count)):
            await self._bar.write(register, 4, value)
        await self._bar.write(self.COMMAND, 4, 1 | direction | self.INTERRUPT)

    async def interrupt(self, number: int) -> None:
        """Raise an interrupt, and take it back."""
        await self._bar.write(self.RAISE, 4, number)
        await self._bar.write(self.ACKNOWLEDGE, 4, number)


async def msi_work(path: Path) -> None:
    """MSI by the device's own doing and at the end of DMA in both directions; no reset, and the client is told so."""
    low = 0x100_0000
    async with Client.connect(path) as connected:
        assert 0 == (await connected.get_info()).flags & 1, "a reset is offered that the kernel has not"
        assert errno.EINVAL == await refusal(connected.reset)
        info = await connected.get_irq_info(IrqIndex.MSI)
        assert 1 == info.count
        fd = eventfd()
        await connected.region_write(CONFIG, 4, b"\x06\x00")
        await connected.set_eventfds(IrqIndex.MSI, [LentFd(fd)])
        with ClientMemory(MIB, low) as memory, await MappedRegion.open(connected, 0) as bar:
            await memory.map(connected)
            edu = Edu(bar)
            assert 0xED == await bar.read(edu.IDENTITY, 4) & 0xFF
            await edu.interrupt(1)
            assert 1 == await fired(fd)
            memory.store(low, b"data by DMA")
            await edu.transfer(low, edu.BUFFER, 11, 0)
            assert 1 == await fired(fd)
            await edu.transfer(edu.BUFFER, low + 4096, 11, edu.TO_MEMORY)
            assert 1 == await fired(fd)
            with memory.view(low + 4096, 11) as view:
                assert b"data by DMA" == bytes(view)
            assert 0 == bar.trapped
        await connected.disable_irqs(IrqIndex.MSI)


def msi_without_reset() -> None:
    """A conventional PCI device: MSI, DMA, and the end of a client where there is no reset."""
    bed.bind(EDU)
    with daemon(EDU) as served:
        for _ in range(2):
            client(msi_work, served)
            wait_until(lambda: served.status()["client"] is None)
            assert 0 == bed.command_register(EDU) & 4, "bus mastering is still on"
        assert "cannot reset this function" in served.log.read_text()
    bed.unbind(EDU)


# Memory


@asynccontextmanager
async def nvme_driver(path: Path) -> AsyncIterator[tuple[Client, NvmeDriver]]:
    """A driver at work on the controller."""
    async with Client.connect(path) as connected:
        with ClientMemory(8 * MIB, IOVA) as memory:
            await memory.map(connected)
            async with NvmeDriver.open(connected, memory) as driver:
                yield connected, driver


async def churn_work(path: Path) -> None:
    """Other ranges come and go while verified reads and writes are under way; none of these is disturbed."""
    transfers = 0
    async with nvme_driver(path) as (connected, driver), trio.open_nursery() as nursery:
        fd = os.memfd_create("churn")
        os.ftruncate(fd, MIB)

        async def transfer() -> None:
            nonlocal transfers
            while True:
                data = bytes((i + transfers) * 7 % 251 for i in range(16 * 1024))
                await driver.write(16, data)
                assert data == await driver.read(16, len(data) // driver.namespace.block_size)
                transfers += 1

        nursery.start_soon(transfer)
        for number in range(15):
            base = 0x1_0000_0000 + number % 4 * MIB
            await connected.dma_map(base, MIB, fd=LentFd(fd))
            await connected.dma_unmap(base, MIB)
        nursery.cancel_scope.cancel()
    assert transfers >= 5, f"only {transfers} transfers while memory was mapped and unmapped"
    print(f"verified transfers during 15 maps and unmaps: {transfers}")


def map_under_io() -> None:
    """Mapping and unmapping beside I/O in flight."""
    with daemon(NVME) as served:
        client(churn_work, served)


async def permissions_work(path: Path) -> None:
    """Memory that was mapped for reading cannot be written by the device, whatever the device is told."""
    readable = os.memfd_create("read-only")
    os.pwrite(readable, b"\xa5" * 4096, 0)
    async with admin_queue(path) as queue:
        await queue.client.dma_map(0x1_0000_0000, 4096, fd=LentFd(readable), flags=READ_ONLY)
        await queue.enable()
        assert MODEL in await queue.identify()
        own, queue.data = queue.data, 0x1_0000_0000
        await queue.submit()
        await queue.status()  # this controller does not tell that its write was refused
        assert b"\xa5" * 4096 == os.pread(readable, 4096, 0), "read-only memory was written"
        queue.data = own
        await queue.client.reset()
        await queue.enable()
        assert MODEL in await queue.identify()


def read_only_memory() -> None:
    """The client's permissions are the IOMMU's."""
    with daemon(NVME) as served:
        client(permissions_work, served)


async def huge_work(path: Path) -> None:
    """Parts of a file of huge pages are mapped, at offsets that no huge page begins at, and the device writes there."""
    fd = os.memfd_create("huge", os.MFD_HUGETLB)
    os.ftruncate(fd, 4 * HUGE_PAGE)
    async with admin_queue(path) as queue:
        await queue.client.dma_map(0x1_0000_0000, 4 * HUGE_PAGE, fd=LentFd(fd))
        await queue.client.dma_map(0x2_0000_0000, HUGE_PAGE, fd=LentFd(fd), offset=HUGE_PAGE + 0x3000)
        await queue.enable()
        for address, place in ((0x1_0000_1000, 0x1000), (0x2_0000_5000, HUGE_PAGE + 0x8000)):
            assert MODEL not in os.pread(fd, 4096, place)
            queue.data = address
            await queue.submit()
            assert 0 == await queue.status()
            assert MODEL in os.pread(fd, 4096, place)
        await queue.client.dma_unmap(0x2_0000_0000, HUGE_PAGE)
        await queue.client.dma_unmap(0x1_0000_0000, 4 * HUGE_PAGE)


def huge_pages() -> None:
    """A VM's memory of huge pages."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    pool.write_text("4")
    assert "4" == pool.read_text().strip(), "the guest has too little memory in one piece"
    try:
        with daemon(NVME) as served:
            client(huge_work, served)
    finally:
        pool.write_text("0")


# The end


def killed_client() -> None:
    """A client that is killed with I/O and interrupts under way leaves a quiet device, which the next one can use."""
    marker = bed.RUN / "busy"
    marker.unlink(missing_ok=True)

    async def work(path: Path) -> None:
        async with nvme_driver(path) as (_, driver):
            for number in range(1_000_000):
                await driver.write(16, bytes([number % 251]) * 65536)
                if number == 2:
                    marker.touch()

    with daemon(NVME) as served:
        with bed.doomed_client(work, served) as pid:
            wait_until(marker.exists)
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: served.status()["client"] is None)
        wait_until(lambda: 0 == bed.command_register(NVME) & 4)
        assert served.status()["unavailable"] is None
        client(verified_io, served)


MORE_SCENARIOS: Mapping[str, Callable[[], None]] = {
    scenario.__name__: scenario
    for scenario in (
        config_space,
        error_and_request,
        msi_without_reset,
        map_under_io,
        read_only_memory,
        huge_pages,
        killed_client,
    )
}
