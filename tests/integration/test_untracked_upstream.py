"""An upstream server's writes to guest memory, while its client's VM migrates: by messages, into files, and back."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from daemonkit import function, serving
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.config.schema import UpstreamDevice
from vfiouser_oob.server.daemon import Daemon
from vfiouser_oob.vm.untracked import FunctionMemory, UntrackedRefused
from vfiouser_protocol.constants import RegionIndex
from vfiouser_protocol.pci_header import CommandBits, ConfigOffset

BASE, SIZE = 0x10_0000, 0x10_0000
ADDRESS, COUNT, START, STATUS = 0x18, 0x20, 0x24, 0x28
TO_CLIENT, BUSY, DONE = 2, 1, 2


@dataclass
class Bed:
    """A client of a function whose device is another server."""

    daemon: Daemon
    client: Client
    guest: ClientMemory
    memory: FunctionMemory

    async def write(self, address: int, data: bytes) -> None:
        """Have the device write."""
        client = self.client
        await client.region_write(RegionIndex.BAR1, 0, data)
        await client.region_write(RegionIndex.BAR0, ADDRESS, struct.pack("<Q", address))
        await client.region_write(RegionIndex.BAR0, COUNT, struct.pack("<I", len(data)))
        await client.region_write(RegionIndex.BAR0, START, struct.pack("<I", TO_CLIENT))
        while (status := await self._status()) == BUSY:
            await trio.lowlevel.checkpoint()
        assert status == DONE

    async def _status(self) -> int:
        return int.from_bytes(await self.client.region_read(RegionIndex.BAR0, STATUS, 4), "little")

    @property
    def messages(self) -> int:
        """How many writes came to the client by messages."""
        attached = self.daemon.functions[1].attached
        assert attached is not None
        return attached.dma.writes


@asynccontextmanager
async def bed(directory: Path) -> AsyncIterator[Bed]:
    """The client has mapped its memory with its file, and lets the device do DMA."""
    behind = function(directory, "f1", UpstreamDevice(socket=directory / "f0.sock"))
    async with serving(function(directory), behind) as daemon:
        daemon.functions[1].recorded = True
        with ClientMemory(SIZE, BASE) as guest:
            async with Client.connect(directory / "f1.sock", dma_server=guest) as client:
                await guest.map(client)
                await client.region_write(
                    RegionIndex.CONFIG, ConfigOffset.COMMAND, struct.pack("<H", CommandBits.BUS_MASTER)
                )
                attached = daemon.functions[1].attached
                assert attached is not None
                yield Bed(daemon, client, guest, FunctionMemory("f1", attached.backend))


async def test_there_and_back(tmp_path: Path) -> None:
    """By the file, by messages once armed, into the file by us once held, and by the file again in the end."""
    async with bed(tmp_path) as it:
        await it.write(BASE, b"a" * 8192)
        assert it.messages == 0
        now = it.memory._wall_clock()
        await it.memory.arm(now)
        await it.memory.arm(it.memory._wall_clock())  # the migration begins after it was armed
        assert it.memory.refusal == ""
        await it.write(BASE + 0x4000, b"b" * 5000)
        seen = it.messages
        assert seen > 0
        it.memory.hold()
        await it.write(BASE + 0x8123, b"c" * 4096)
        assert it.messages == seen
        await it.memory.stands()
        contents = await it.memory.take(1 << 20)
        assert [(BASE + 0x8000, 8192)] == [(address, len(data)) for address, data in contents.parts]
        assert contents.parts[0][1][0x123 : 0x123 + 4096] == b"c" * 4096
        await it.memory.disarm()
        it.memory.runs()
        await it.write(BASE + 0xC000, b"d" * 4096)
        assert it.messages == seen
        for offset, byte in ((0, b"a"), (0x4000, b"b"), (0x8123, b"c"), (0xC000, b"d")):
            assert it.guest.view(BASE + offset, 4096) == byte * 4096


async def test_a_gap_is_a_reason_not_to_migrate(tmp_path: Path) -> None:
    """What it wrote between the beginning and our hearing of it nobody knows; QEMU's log heals that."""
    async with bed(tmp_path) as it:
        began = it.memory._wall_clock()
        await it.write(BASE, b"a" * 4096)
        await it.memory.arm(began)
        await it.memory.stands()
        with pytest.raises(UntrackedRefused, match="what f1 wrote between the start of the migration"):
            await it.memory.take(1 << 30)
        marked: list[tuple[int, int]] = []

        class Log:
            """QEMU's."""

            def mark(self, address: int, length: int) -> None:
                """Note it."""
                marked.append((address, length))

        it.memory.use_log(Log())
        assert [(BASE, SIZE)] == marked
        assert () == (await it.memory.take(1 << 30)).parts


async def test_memory_that_comes_and_goes_meanwhile(tmp_path: Path) -> None:
    """What the client maps while messages are used is mapped without its file, and found again when that is over."""
    async with bed(tmp_path) as it, trio.open_nursery() as nursery:
        with ClientMemory(SIZE, BASE + SIZE) as more:
            nursery.start_soon(it.memory.arm, it.memory._wall_clock())
            await more.map(it.client)
            await it.guest.unmap(it.client)
            await trio.testing.wait_all_tasks_blocked()
            await it.guest.map(it.client)
            before = it.messages
            await it.write(BASE, b"e" * 4096)
            assert it.messages > before
            await it.memory.disarm()
            before = it.messages
            await it.write(BASE, b"f" * 4096)
            await it.write(BASE + SIZE, b"g" * 4096)
            assert (before, b"f" * 4096, b"g" * 4096) == (
                it.messages,
                bytes(it.guest.view(BASE, 4096)),
                bytes(more.view(BASE + SIZE, 4096)),
            )
