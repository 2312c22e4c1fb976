"""Models in a daemon that is restarted and killed: their client stays connected, and nothing goes wrong unsaid."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from restartbed import PATIENT, KeptDaemon, memory
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.lab.nvme.driver import NvmeDriver
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.constants import IrqIndex
from vfiouser_protocol.errors import ReplyError

pytestmark = pytest.mark.slow  # each starts the daemon several times, one after the other
_SCRATCH, _RAISE, _DMA_ADDRESS, _DMA_COUNT, _DMA_START, _DMA_STATUS = 0x04, 0x10, 0x18, 0x20, 0x24, 0x28
_COMMAND = 4
_BAR2 = 64 << 10


@asynccontextmanager
async def kept(place: Path, device: str = "model:test") -> AsyncIterator[KeptDaemon]:
    """A daemon under a keeper, with a model."""
    daemon = KeptDaemon(place, device, ("--stop-timeout", "60"), PATIENT)
    try:
        await daemon.lives(1)
        yield daemon
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(daemon.close)


class Guest:
    """A client with memory, an eventfd and a mapped BAR.

    Args:
        client: its connection.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.memory = OwnedFd(memory(1 << 16))
        self.eventfd = OwnedFd(os.eventfd(0, os.EFD_NONBLOCK))

    async def set_up(self) -> None:
        """Do what a driver does."""
        client = self.client
        await client.region_write(7, _COMMAND, struct.pack("<H", 0x6))
        await client.dma_map(0x10000, 1 << 16, fd=self.memory)
        await client.set_eventfds(IrqIndex.MSIX, [self.eventfd] * 2)
        region = await client.get_region_info(2)
        assert region.fd is not None
        self.bar = mmap.mmap(region.fd.fileno(), _BAR2)
        region.close()
        self.bar[:4] = b"mine"
        await client.region_write(0, _SCRATCH, b"abcd")

    async def fetch(self) -> bytes:
        """Have the device read memory, and read that from BAR1."""
        os.pwrite(self.memory.fileno(), b"by DMA", 0)
        await self.client.region_write(0, _DMA_ADDRESS, struct.pack("<Q", 0x10000))
        await self.client.region_write(0, _DMA_COUNT, struct.pack("<I", 6))
        await self.client.region_write(0, _DMA_START, struct.pack("<I", 0x101))
        with trio.fail_after(10):
            while await self.client.region_read(0, _DMA_STATUS, 4) == b"\1\0\0\0":
                pass
        return await self.client.region_read(1, 0, 6)

    async def raised(self) -> int:
        """Raise vector 1, and count what came."""
        await self.client.region_write(0, _RAISE, struct.pack("<I", IrqIndex.MSIX << 16 | 1))
        return os.eventfd_read(self.eventfd.fileno())

    def close(self) -> None:
        """Close what was lent."""
        self.bar.close()
        self.memory.close()
        self.eventfd.close()


@asynccontextmanager
async def guest(daemon: KeptDaemon) -> AsyncIterator[Guest]:
    """A guest that has set up its device."""
    async with Client.connect(daemon.socket) as client:
        guest = Guest(client)
        await guest.set_up()
        yield guest
        assert client.failure is None
        guest.close()


def test_a_restart_leaves_everything_as_it_is(tmp_path: Path) -> None:
    """Registers, config space, memory, interrupts and the mapped BAR go on, several times."""

    async def main() -> None:
        async with kept(tmp_path) as daemon, guest(daemon) as each:
            for number in range(3):
                daemon.restart()
                await daemon.lives(number + 2)
                assert await each.client.region_read(0, _SCRATCH, 4) == b"abcd"
                assert await each.client.region_read(7, _COMMAND, 2) == b"\6\0"
                assert await each.client.region_read(2, 0, 4) == b"mine"
                each.bar[4:8] = b"more"
                assert await each.client.region_read(2, 4, 4) == b"more"
                assert await each.raised() == 1
                assert await each.fetch() == b"by DMA"
                assert os.eventfd_read(each.eventfd.fileno()) == 1
        assert "Traceback" not in daemon.log.read_text()

    trio.run(main)


def test_a_crash_is_seen_and_a_reset_mends_it(tmp_path: Path) -> None:
    """Registers read as EIO until DEVICE_RESET; memory, interrupts and the mapped BAR are the same behind it."""

    async def main() -> None:
        async with kept(tmp_path) as daemon, guest(daemon) as each:
            daemon.kill()
            await daemon.lives(2)
            for access in (each.client.region_read(0, _SCRATCH, 4), each.client.region_write(7, _COMMAND, b"\6\0")):
                with pytest.raises(ReplyError) as caught:
                    await access
                assert caught.value.errno == errno.EIO
            await each.client.dma_map(0x40000, 4096, fd=each.memory)
            await each.client.reset()
            assert await each.client.region_read(0, _SCRATCH, 4) == bytes(4)
            assert each.bar[:4] == bytes(4)
            await each.client.region_write(7, _COMMAND, b"\6\0")
            assert await each.raised() == 1
            assert await each.fetch() == b"by DMA"
        assert "lost its state" in daemon.log.read_text()

    trio.run(main)


@pytest.mark.parametrize("doorbells", ["trapped", "polled"])
def test_an_nvme_function_goes_on_under_io(tmp_path: Path, doorbells: str) -> None:
    """Every write is read back, whatever happens meanwhile; after a crash and a reset the blocks are still there."""

    async def main() -> None:
        device = f"model:nvme,size=4M,doorbells={doorbells}"
        async with kept(tmp_path, device) as daemon, Client.connect(daemon.socket) as client:
            with ClientMemory(8 << 20, 0x1000_0000) as memory:
                await memory.map(client)
                async with NvmeDriver.open(client, memory) as driver, trio.open_nursery() as nursery:
                    over = trio.Event()
                    nursery.start_soon(write_and_read_back, driver, over)
                    daemon.restart()
                    await daemon.lives(2)
                    over.set()
                daemon.kill()
                await daemon.lives(3)
                with pytest.raises(ReplyError) as caught:
                    await client.region_read(0, 0, 4)
                assert caught.value.errno == errno.EIO
                await client.reset()
                async with NvmeDriver.open(client, memory) as driver:
                    assert await driver.read(0, 8) == b"last" * 1024

    trio.run(main)


async def write_and_read_back(driver: NvmeDriver, over: trio.Event) -> None:
    """Do I/O until it is over, and once more behind that."""
    number = 0
    while not over.is_set():
        number += 1
        data = number.to_bytes(4, "little") * 1024
        await driver.write(8, data)
        assert data == await driver.read(8, 8)
    await driver.write(0, b"last" * 1024)
    assert number > 1
