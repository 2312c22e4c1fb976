"""The server behind a function goes while a client uses it, and another one comes."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from daemonkit import function, serving
from restartbed import COUNTED, COUNTING, CountingDevice, memory
from upstreambed import upstream
from vfiouser_oob.client.client import Client
from vfiouser_oob.config.devices import UpstreamLoss
from vfiouser_oob.config.schema import UpstreamDevice
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.constants import Command, IrqIndex
from vfiouser_protocol.errors import ReplyError


@asynccontextmanager
async def device(path: Path) -> AsyncIterator[tuple[CountingDevice, list[int]]]:
    """A device behind a server that lives as long as the block; and the commands that it got."""
    counting = CountingDevice()
    async with upstream(path / "device.sock", counting.handlers) as servers:
        commands: list[int] = []
        try:
            yield counting, commands
        finally:
            commands += [event.header.command for server in servers for event in server.received]
            counting.close()


async def answered(client: Client) -> None:
    """Wait until the function answers again."""
    with trio.fail_after(10):
        while True:
            try:
                await client.region_read(0, COUNTING, 4)
            except ReplyError:
                await trio.sleep(0.01)  # nobody tells a client
            else:
                return


class Replaceable:
    """A server that goes when it is told to.

    Args:
        path: its directory.
        nursery: where it runs.
    """

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        self._path = path
        self._nursery = nursery
        self._stop, self._gone = trio.Event(), trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until told to go."""
        async with device(self._path):
            task_status.started()
            await self._stop.wait()
        self._gone.set()

    async def begin(self) -> None:
        """Come."""
        await self._nursery.start(self.run)

    async def go(self) -> None:
        """Go."""
        self._stop.set()
        await self._gone.wait()


async def test_a_client_stays_while_its_server_is_replaced(tmp_path: Path) -> None:
    """With `reset`: the device is reset, has the client's memory and interrupts, and the client goes on."""
    config = UpstreamDevice(socket=tmp_path / "device.sock", on_upstream_lost=UpstreamLoss.RESET)
    with OwnedFd(memory(1 << 20)) as file, OwnedFd(os.eventfd(0)) as event:
        async with trio.open_nursery() as nursery, serving(function(tmp_path, device=config)):
            first = Replaceable(tmp_path, nursery)
            await first.begin()
            async with Client.connect(tmp_path / "f0.sock") as client:
                await client.dma_map(0, 1 << 20, fd=file)
                await client.set_eventfds(IrqIndex.MSIX, [event], start=3)
                await first.go()
                with pytest.raises(ReplyError):
                    await client.region_write(0, COUNTED, struct.pack("<I", 1))
                async with device(tmp_path) as (second, commands):
                    await answered(client)
                    assert second.maps == {0: 1 << 20}
                    assert set(second.eventfds) == {3}
                    await client.region_write(0, COUNTED, struct.pack("<I", 7))
                    assert second.written == [7]
                assert Command.DEVICE_RESET in commands


async def test_without_that_it_stays_lost(tmp_path: Path) -> None:
    """With `fail`, as ever: EIO until the client connects anew."""
    config = UpstreamDevice(socket=tmp_path / "device.sock")
    async with trio.open_nursery() as nursery, serving(function(tmp_path, device=config)):
        first = Replaceable(tmp_path, nursery)
        await first.begin()
        async with Client.connect(tmp_path / "f0.sock") as client:
            await client.region_read(0, COUNTING, 4)
            await first.go()
            async with device(tmp_path):
                with pytest.raises(ReplyError):
                    await client.region_read(0, COUNTING, 4)
                client.close()
                async with Client.connect(tmp_path / "f0.sock") as again:
                    await again.region_read(0, COUNTING, 4)
