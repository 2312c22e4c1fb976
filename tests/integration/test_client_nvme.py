"""The client and its NVMe driver against the real simulator and daemon, in every way of reaching memory and
doorbells.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from openfds import open_fds
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.errors import ServerGone
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.lab.demo.children import Child, ChildFailed, running
from vfiouser_oob.lab.nvme.driver import NvmeDriver
from vfiouser_oob.lab.nvme.layout import DriverError
from vfiouser_protocol.constants import RegionIndex
from vfiouser_protocol.errors import ReplyError

pytestmark = pytest.mark.slow


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path leaves room for socket names."""
    with tempfile.TemporaryDirectory(prefix="vt-") as name:
        yield Path(name)


@asynccontextmanager
async def simulator(place: Path, *options: str) -> AsyncIterator[Child]:
    """A simulator with one function, f0.sock."""
    arguments = ["simulate-soc", f"--socket-dir={place}", "--size=8M", *options]
    async with running("simulate-soc", arguments, place) as child:
        yield child


@asynccontextmanager
async def daemon(place: Path) -> AsyncIterator[Path]:
    """A daemon in front of the simulator's function; returns its socket."""
    path = place / "d.sock"
    device = f"vfio-user:{place / 'f0.sock'}"
    arguments = ["serve", f"--socket-path={path}", f"--device={device}", "--control-socket=none"]
    async with running("serve", arguments, place):
        yield path


@asynccontextmanager
async def driver(
    path: Path, *, with_fd: bool = True, twin_socket: bool = True
) -> AsyncIterator[tuple[NvmeDriver, ClientMemory, Client]]:
    """A driver bound to the function at a socket, with a client that serves DMA as late as QEMU does."""
    with ClientMemory(16 << 20, base=0x2_0000_0000) as memory:
        async with Client.connect(path, dma_server=memory, serve_dma_when_idle=True, twin_socket=twin_socket) as client:
            await memory.map(client, with_fd=with_fd)
            async with NvmeDriver.open(client, memory, io_queues=2) as nvme:
                yield nvme, memory, client


async def write_and_verify(nvme: NvmeDriver) -> None:
    """Write and read transfers of one block to the largest, several at a time, and compare."""
    block = nvme.namespace.block_size
    sizes = [block, 4096, 8192, 12288, 65536 + block, 300 * 1024, nvme.max_transfer]

    async def exchange(lba: int, data: bytes) -> None:
        await nvme.write(lba, data)
        assert data == await nvme.read(lba, len(data) // block)

    async with trio.open_nursery() as nursery:
        lba = 7
        for size in sizes:
            nursery.start_soon(exchange, lba, os.urandom(size))
            lba += size // block
    await nvme.flush()


@pytest.mark.parametrize("doorbells", ["trapped", "polled"])
@pytest.mark.parametrize("with_fd", [True, False])
@pytest.mark.parametrize("twin_socket", [True, False])
async def test_io_through_the_daemon(place: Path, doorbells: str, with_fd: bool, twin_socket: bool) -> None:
    """Data survives the way through both processes, whether memory is a file or messages, on one socket or
    two.
    """
    async with (
        simulator(place, f"--doorbells={doorbells}"),
        daemon(place) as path,
        driver(path, with_fd=with_fd, twin_socket=twin_socket) as (nvme, memory, _),
    ):
        await write_and_verify(nvme)
        assert all(nvme.interrupts)
        assert with_fd == (memory.message_reads == memory.message_writes == 0)
        assert (doorbells == "polled") == (nvme.bar.direct > 0)


async def test_data_outlives_client_and_daemon(place: Path) -> None:
    """The function belongs to the simulator: what one client wrote, the next reads, also through a new
    daemon.
    """
    data = os.urandom(8192)
    async with simulator(place):
        async with daemon(place) as path:
            async with driver(path) as (nvme, _, _):
                await nvme.write(5, data)
            async with driver(path) as (nvme, _, _):
                assert data == await nvme.read(5, 16)
        async with daemon(place) as path, driver(path) as (nvme, _, _):
            assert data == await nvme.read(5, 16)


async def test_command_beyond_the_namespace(place: Path) -> None:
    """An NVMe error is that command's alone, and its pages are used again."""
    async with simulator(place), driver(place / "f0.sock") as (nvme, _, _):
        for _ in range(100):
            with pytest.raises(DriverError) as caught:
                await nvme.read(nvme.namespace.blocks, 64)
            assert 0x080 == caught.value.status
        await write_and_verify(nvme)


async def test_refused_commands_leave_the_connection_usable(place: Path) -> None:
    """The real daemon's refusals arrive as errnos, and later commands work."""
    async with simulator(place), daemon(place) as path, Client.connect(path) as client:
        with pytest.raises(ReplyError):
            await client.region_read(RegionIndex.CONFIG, 1 << 20, 4)
        with pytest.raises(ReplyError):
            await client.dma_unmap(0x1000, 0x1000)
        assert await client.region_read(RegionIndex.CONFIG, 0, 2)


async def test_simulator_that_dies_ends_the_io(place: Path) -> None:
    """Killing the simulator under the driver's feet is an error, not a hang."""
    async with (
        simulator(place) as child,
        driver_expecting_the_end(place / "f0.sock") as nvme,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(read_until_the_end, nvme)
        child.process.kill()


async def read_until_the_end(nvme: NvmeDriver) -> None:
    """Read again and again until the device has gone."""
    try:
        while True:
            await nvme.read(0, 8)
    except ServerGone:
        return


@asynccontextmanager
async def driver_expecting_the_end(path: Path) -> AsyncIterator[NvmeDriver]:
    """A driver whose orderly shutdown fails, because its device has gone."""
    with pytest.raises(ServerGone):
        async with driver(path) as (nvme, _, _):
            yield nvme


async def test_process_that_cannot_start(place: Path) -> None:
    """A child that ends instead of becoming ready is reported with its own words."""
    with pytest.raises(ChildFailed, match="ended with status 2"):
        async with running("bad", ["simulate-soc", "--functions=0"], place):
            pytest.fail("it cannot be ready")


async def test_nothing_is_left_behind(place: Path) -> None:
    """Clients, drivers and child processes give back every descriptor of ours."""
    async with simulator(place):
        async with driver(place / "f0.sock") as (nvme, _, _):
            await nvme.flush()
        before = open_fds()
        for _ in range(3):
            async with driver(place / "f0.sock") as (nvme, _, _):
                await nvme.flush()
        assert before.keys() == open_fds().keys()
