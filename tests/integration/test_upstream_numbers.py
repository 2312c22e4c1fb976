"""Upstream servers whose numbers cannot be true: their client is turned away, and nothing is made as large."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from daemonkit import function, serving
from fakeserver import OFFER, Answer, Handler
from openfds import open_fds
from rawclient import DMA_MAP, IO_FDS, REGION_WRITE, RawClient, attached, connect, map_request
from upstreambed import REGION_SIZE, upstream
from vfiouser_oob.config.schema import UpstreamDevice
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command, RegionFlags
from vfiouser_protocol.messages import DeviceInfo, IoFdEntry, IrqInfo, RegionInfo, RegionIoFds, RegionWrite
from vfiouser_protocol.session import CommandReceived

ACCESS = RegionFlags.READ | RegionFlags.WRITE
MAPPED = ACCESS | RegionFlags.MMAP | RegionFlags.CAPS


def vectors(event: CommandReceived) -> Answer:
    """2^26 vectors of every kind: 2 GB of state, and seconds to make it, if they were believed."""
    return Answer(encode(IrqInfo(16, 0, decode(IrqInfo, event.payload).index, 1 << 26)))


def regions(flags: int, size: int, offset: int, chain: bytes = b"", argsz: int | None = None) -> Handler:
    """Every region is described like this."""

    def answer(event: CommandReceived) -> Answer:
        index = decode(RegionInfo, event.payload).index
        claimed = 32 + len(chain) if argsz is None else argsz
        cap = 32 if chain else 0
        return Answer(struct.pack("<IIIIQQ", claimed, flags, index, cap, size, offset) + chain)

    return answer


def endless_chain() -> bytes:
    """Unknown capabilities, one behind the other, up to the end of the message."""
    count = 100_000
    return b"".join(struct.pack("<HHI", 77, 1, 32 + 8 * (n + 1) if n + 1 < count else 0) for n in range(count))


def areas(count: int) -> bytes:
    """So many areas of a page that may be mapped."""
    head = struct.pack("<HHIII", 1, 1, 0, count, 0)
    return head + b"".join(struct.pack("<QQ", 8192 * n, 4096) for n in range(count))


LIES: dict[str, dict[int, Handler]] = {
    "vectors": {Command.DEVICE_GET_IRQ_INFO: vectors},
    "regions": {Command.DEVICE_GET_INFO: lambda _: Answer(encode(DeviceInfo(16, 2, 1 << 31, 5)))},
    "irq kinds": {Command.DEVICE_GET_INFO: lambda _: Answer(encode(DeviceInfo(16, 2, 9, 1 << 31)))},
    "config size": {Command.DEVICE_GET_REGION_INFO: regions(ACCESS, 1 << 40, 0)},
    "file offset": {Command.DEVICE_GET_REGION_INFO: regions(ACCESS | RegionFlags.MMAP, 4096, (1 << 64) - 4096)},
    "region size": {Command.DEVICE_GET_REGION_INFO: regions(ACCESS, (1 << 64) - 1, 0)},
    "argsz": {Command.DEVICE_GET_REGION_INFO: regions(MAPPED, 4096, 0, argsz=(1 << 32) - 1)},
    "capabilities": {Command.DEVICE_GET_REGION_INFO: regions(MAPPED, 4096, 0, endless_chain())},
    "areas": {Command.DEVICE_GET_REGION_INFO: regions(MAPPED, 1 << 40, 0, areas(60_000))},
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_turns_the_client_away(tmp_path: Path, lie: str) -> None:
    """The client reads ENODEV at once, `status` the reason, no memory was spent and no descriptor is left."""
    before = open_fds()
    path = tmp_path / "up.sock"
    async with upstream(path, LIES[lie]), serving(function(tmp_path, "f0", UpstreamDevice(socket=path))) as daemon:
        start = trio.current_time()
        client = await connect(tmp_path / "f0.sock")
        answer = await client.negotiate()
        assert errno.ENODEV == answer.error
        client.close()
        assert trio.current_time() - start < 2
        assert f"{path} is unusable" in str(daemon.functions[0].last_error)
    assert before == open_fds()


async def test_limits_of_an_upstream_are_no_more_than_ours(tmp_path: Path) -> None:
    """An upstream that takes 2^64 - 1 mappings does not make us keep as many: the limit that we announce holds."""
    path = tmp_path / "up.sock"
    offer = OFFER._replace(max_dma_maps=(1 << 64) - 1, max_data_xfer_size=(1 << 64) - 1)
    config = function(tmp_path, "f0", UpstreamDevice(socket=path))
    async with upstream(path, offer=offer), serving(config) as daemon, attached(tmp_path / "f0.sock") as client:
        served = daemon.functions[0].attached
        assert served is not None
        assert 65535 == served.backend.limits.max_dma_maps
        assert 65535 == served.backend.memory.map.max_regions
        await client.succeed(DMA_MAP, map_request(0, 4096))


@pytest.mark.parametrize(("max_write", "pieces"), [(None, [128 << 10] * 4), (1 << 20, [512 << 10])])
async def test_writes_go_upstream_in_pieces(tmp_path: Path, max_write: int | None, pieces: list[int]) -> None:
    """A write of 512 KiB arrives in pieces of 128 KiB, or in one if the configuration says that the server takes it."""
    path = tmp_path / "up.sock"
    seen: list[int] = []

    def take(event: CommandReceived) -> Answer:
        write = decode(RegionWrite, event.payload)
        seen.append(write.count)
        return Answer(event.payload[:16])

    handlers: dict[int, Handler] = {
        Command.DEVICE_GET_REGION_INFO: big_bar,
        Command.REGION_WRITE: take,
    }
    device = UpstreamDevice(socket=path) if max_write is None else UpstreamDevice(socket=path, max_write=max_write)
    config = function(tmp_path, "f0", device)
    async with upstream(path, handlers), serving(config), attached(tmp_path / "f0.sock") as client:
        size = 512 << 10
        answer = await client.succeed(REGION_WRITE, struct.pack("<QII", 0, 2, size) + bytes(size))
        assert struct.pack("<QII", 0, 2, size) == answer.payload
        assert pieces == seen


def big_bar(event: CommandReceived) -> Answer:
    """Region 2 has a megabyte, the others a page."""
    index = decode(RegionInfo, event.payload).index
    return Answer(encode(RegionInfo(32, ACCESS, index, 0, 1 << 20 if index == 2 else REGION_SIZE, 0)))


async def io_fds(client: RawClient, argsz: int, region: int = 0) -> tuple[tuple[int, ...], bytes, list[int]]:
    """Ask for a region's ioeventfds: argsz, flags, index and count, then the entries and descriptors."""
    answer = await client.succeed(IO_FDS, struct.pack("<4I", argsz, 0, region, 0))
    return struct.unpack_from("<4I", answer.payload), answer.payload[16:], answer.fds


def with_io_fds(entries: tuple[IoFdEntry, ...], fds: list[int]) -> Handler:
    """A region whose sub-regions are these."""

    def answer(event: CommandReceived) -> Answer:
        request = decode(RegionIoFds, event.payload)
        needed = 16 + 40 * len(entries)
        if request.argsz < needed:
            return Answer(struct.pack("<4I", needed, 0, request.index, len(entries)))
        return Answer(encode(RegionIoFds(needed, 0, request.index, len(entries), entries)), fds)

    return answer


async def test_ioeventfds_of_an_upstream_are_passed_on(tmp_path: Path) -> None:
    """Four doorbells with two eventfds: the client's write to one of them arrives at the upstream server itself."""
    fds = [os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)]
    entries = tuple(IoFdEntry(0x100 + 4 * n, 4, n % 2, 0) for n in range(4))
    path = tmp_path / "up.sock"
    handlers: dict[int, Handler] = {Command.DEVICE_GET_REGION_IO_FDS: with_io_fds(entries, fds)}
    config = function(tmp_path, "f0", UpstreamDevice(socket=path))
    before = open_fds()
    async with upstream(path, handlers) as servers, serving(config), attached(tmp_path / "f0.sock") as client:
        assert ((176, 0, 0, 4), b"", []) == await io_fds(client, 16)
        head, body, received = await io_fds(client, 176)
        assert (176, 0, 0, 4) == head
        assert [(0x100 + 4 * n, 4, n % 2) for n in range(4)] == [
            struct.unpack_from("<QQI", body, 40 * n) for n in range(4)
        ]
        assert 2 == len(received)
        os.eventfd_write(received[1], 5)
        assert 5 == os.eventfd_read(fds[1])
        # Asked for once, then kept; and config space never has any, so that its writes are seen.
        asked = [event for event in servers[0].received if event.header.command == Command.DEVICE_GET_REGION_IO_FDS]
        assert 1 == len(asked)
        assert ((16, 0, 7, 0), b"", []) == await io_fds(client, 176, region=7)
    assert before == open_fds()
    for fd in fds:
        os.close(fd)


BAD_ENTRIES: dict[str, Callable[[], tuple[IoFdEntry, ...]]] = {
    "outside": lambda: (IoFdEntry(REGION_SIZE - 2, 4, 0, 0),),
    "wraps": lambda: (IoFdEntry((1 << 64) - 4, 8, 0, 0),),
    "no such descriptor": lambda: (IoFdEntry(0, 4, 7, 0),),
    "no such type": lambda: (IoFdEntry(0, 4, 0, 99),),
    "too many": lambda: tuple(IoFdEntry(4 * n, 4, 0, 0) for n in range(700)),
}


@pytest.mark.parametrize("lie", BAD_ENTRIES)
async def test_ioeventfds_that_cannot_be_are_not_passed_on(tmp_path: Path, lie: str) -> None:
    """The client reads EPROTO, the descriptors are closed, and the connection goes on."""
    fd = os.eventfd(0)
    path = tmp_path / "up.sock"
    handlers: dict[int, Handler] = {Command.DEVICE_GET_REGION_IO_FDS: with_io_fds(BAD_ENTRIES[lie](), [fd])}
    config = function(tmp_path, "f0", UpstreamDevice(socket=path))
    before = open_fds()
    async with upstream(path, handlers), serving(config), attached(tmp_path / "f0.sock") as client:
        assert errno.EPROTO == await client.errno(IO_FDS, struct.pack("<4I", 65536, 0, 0, 0))
        assert b"\0" * 4 == await client.read(0, 0, 4)
    assert before == open_fds()
    os.close(fd)


async def test_a_client_is_shown_no_more_ioeventfds_than_it_takes(tmp_path: Path) -> None:
    """A client that takes one descriptor is shown the sub-regions that need no other."""
    fds = [os.eventfd(0), os.eventfd(0)]
    entries = tuple(IoFdEntry(4 * n, 4, n % 2, 0) for n in range(4))
    path = tmp_path / "up.sock"
    handlers: dict[int, Handler] = {Command.DEVICE_GET_REGION_IO_FDS: with_io_fds(entries, fds)}
    config = function(tmp_path, "f0", UpstreamDevice(socket=path))
    few = b'{"capabilities":{"max_msg_fds":1}}\0'
    async with (
        upstream(path, handlers),
        serving(config),
        attached(tmp_path / "f0.sock", few) as client,
    ):
        head, _, received = await io_fds(client, 4096)
        assert (96, 0, 0, 2) == head
        assert 1 == len(received)
    for fd in fds:
        os.close(fd)
