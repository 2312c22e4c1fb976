"""The NVMe model in a real daemon, driven by our client's own NVMe driver over a socket."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from daemonkit import function, serving
from openfds import open_fds
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.config.schema import DmaMode, ModelDevice
from vfiouser_oob.lab.nvme.driver import NvmeDriver
from vfiouser_soc.nvme.options import Doorbells, NvmeOptions

SIZE = 4 << 20


async def transfer(path: Path, seed: int, *, with_fd: bool, use_mapping: bool) -> None:
    """Enumerate, write and read 256 KiB with eight commands at a time, and compare."""
    data = random.Random(seed).randbytes(256 << 10)
    with ClientMemory(8 << 20, base=0x100000) as memory, trio.fail_after(30):
        async with Client.connect(path, dma_server=memory) as client:
            await memory.map(client, with_fd=with_fd)
            async with NvmeDriver.open(client, memory, io_queues=2, use_mapping=use_mapping) as driver:
                async with trio.open_nursery() as nursery:
                    for start in range(0, len(data), 32 << 10):
                        nursery.start_soon(driver.write, start >> 9, data[start : start + (32 << 10)])
                await driver.flush()
                assert data == b"".join([await driver.read(lba, 128) for lba in range(0, 512, 128)])
                assert all(driver.interrupts)


@pytest.mark.parametrize("doorbells", list(Doorbells))
@pytest.mark.parametrize("with_fd", [True, False])
@pytest.mark.parametrize("use_mapping", [True, False])
async def test_verified_io(tmp_path: Path, doorbells: Doorbells, with_fd: bool, use_mapping: bool) -> None:
    """Data is right whichever way memory and doorbells take, with an image that blocks and a memory buffer."""
    options = NvmeOptions(size=SIZE, image=tmp_path / "image", cmb=2 << 20, doorbells=doorbells)
    async with serving(function(tmp_path, device=ModelDevice(model="nvme", options=options))):
        await transfer(tmp_path / "f0.sock", 1, with_fd=with_fd, use_mapping=use_mapping)


async def test_one_client_after_the_other(tmp_path: Path) -> None:
    """Each new client finds a controller that works; messages are used where the configuration asks for them."""
    options = NvmeOptions(size=SIZE)
    async with serving(function(tmp_path, device=ModelDevice(model="nvme", options=options), dma=DmaMode.MESSAGES)):
        for seed in range(4):
            await transfer(tmp_path / "f0.sock", seed, with_fd=True, use_mapping=True)


async def test_client_that_vanishes_under_io(tmp_path: Path) -> None:
    """A client that goes with commands in flight and its controller enabled harms no successor, and leaks nothing."""
    options = NvmeOptions(size=SIZE)
    async with serving(function(tmp_path, device=ModelDevice(model="nvme", options=options))):
        path = tmp_path / "f0.sock"
        await transfer(path, 1, with_fd=True, use_mapping=True)
        before = open_fds()
        for seed in range(5):
            with ClientMemory(8 << 20, base=0x100000) as memory, trio.fail_after(30):
                async with Client.connect(path, dma_server=memory) as client:
                    await memory.map(client, with_fd=bool(seed & 1))
                    with trio.CancelScope() as scope:
                        async with (
                            NvmeDriver.open(client, memory) as driver,
                            trio.open_nursery() as nursery,
                        ):
                            for number in range(16):
                                nursery.start_soon(driver.read, number * 8, 8)
                            await driver.read(0, 1)
                            scope.cancel()  # the driver does not stop the controller, it is just gone
            await transfer(path, seed, with_fd=True, use_mapping=True)
        assert len(before) == len(open_fds())
