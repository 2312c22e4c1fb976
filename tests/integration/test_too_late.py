"""A command that waited so long that its reply could not be in time is not begun: its client reads the truth."""

from __future__ import annotations

import errno
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from daemonkit import function, serving
from fakeserver import Answer, FakeServer, Handler
from openfds import open_fds
from rawclient import DMA_MAP, NO_REPLY, REGION_WRITE, RESET, RawClient, attached, map_request, memfd
from vfiouser_oob.config.schema import UpstreamDevice
from vfiouser_oob.transport.listener import listen_on_path
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command, DeviceInfoFlags, RegionFlags
from vfiouser_protocol.messages import DeviceInfo, IrqInfo, RegionInfo
from vfiouser_protocol.session import CommandReceived

BUDGET_S = 0.6


def region(event: CommandReceived) -> Answer:
    """Every region is plain memory of one page."""
    index = decode(RegionInfo, event.payload).index
    return Answer(encode(RegionInfo(32, RegionFlags.READ | RegionFlags.WRITE, index, 0, 4096, 0)))


def irq(event: CommandReceived) -> Answer:
    """There are no interrupts."""
    return Answer(encode(IrqInfo(16, 0, decode(IrqInfo, event.payload).index, 0)))


HANDLERS: dict[int, Handler] = {
    Command.DEVICE_GET_INFO: lambda _: Answer(
        encode(DeviceInfo(16, DeviceInfoFlags.PCI | DeviceInfoFlags.RESET, 9, 5))
    ),
    Command.DEVICE_GET_REGION_INFO: region,
    Command.DEVICE_GET_IRQ_INFO: irq,
    # Never answered, while everything else is.
    Command.DEVICE_RESET: lambda _: Answer(raw=b""),
}


@asynccontextmanager
async def behind_another(directory: Path) -> AsyncIterator[tuple[RawClient, FakeServer]]:
    """A client of a function whose device is another vfio-user server, which never answers a reset."""
    path = directory / "up.sock"
    servers: list[FakeServer] = []
    listener = listen_on_path(path, 0o600)

    async def accept(nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener.sock)
            sock, _ = listener.sock.accept()
            sock.setblocking(False)
            servers.append(FakeServer(sock, handlers=dict(HANDLERS)))
            await nursery.start(servers[-1].run)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept, nursery)
        # Else it would be reset for its client, before anything else.
        config = replace(function(directory, "f0", UpstreamDevice(socket=path)), retain_state=True)
        async with serving(config, reply_budget_s=BUDGET_S), attached(directory / "f0.sock") as client:
            servers[-1].received.clear()
            yield client, servers[-1]
        nursery.cancel_scope.cancel()
    listener.close()


def write(client: RawClient, value: int, flags: int = 0) -> bytes:
    """A REGION_WRITE."""
    return client.pack(REGION_WRITE, struct.pack("<QIII", 0x10, 0, 4, value), flags=flags)


def written(server: FakeServer) -> list[int]:
    """What was written to the device."""
    events = [event for event in server.received if event.header.command == Command.REGION_WRITE]
    return [
        int.from_bytes(event.payload[16:], "little") for event in events if event.payload[:8] == bytes((16, *bytes(7)))
    ]


async def test_a_write_behind_a_slow_command(tmp_path: Path) -> None:
    """A write that gets its turn when its own time is up is answered ETIMEDOUT, and was not done."""
    async with behind_another(tmp_path) as (client, server):
        await client.send(client.pack(RESET) + write(client, 1) + write(client, 2))
        answers = [await client.receive() for _ in range(3)]
        assert [errno.ETIMEDOUT] * 3 == [answer.error for answer in answers]
        await client.succeed(REGION_WRITE, struct.pack("<QIII", 0x10, 0, 4, 3))
        assert [3] == written(server)


async def test_a_write_that_has_time_left(tmp_path: Path) -> None:
    """A write that came later than the slow command before it is done and answered."""
    async with behind_another(tmp_path) as (client, server):
        await client.send(client.pack(RESET))
        await trio.sleep(BUDGET_S / 2)
        await client.send(write(client, 4))
        answers = [await client.receive() for _ in range(2)]
        assert [errno.ETIMEDOUT, 0] == [answer.error for answer in answers]
        assert [4] == written(server)


async def test_a_write_that_nobody_waits_for(tmp_path: Path) -> None:
    """A doorbell without reply has no deadline to miss: it is rung, if late, and in its place."""
    async with behind_another(tmp_path) as (client, server):
        await client.send(client.pack(RESET) + write(client, 5, NO_REPLY) + write(client, 6))
        assert [errno.ETIMEDOUT] * 2 == [(await client.receive()).error for _ in range(2)]
        await client.succeed(REGION_WRITE, struct.pack("<QIII", 0x10, 0, 4, 7))
        assert [5, 7] == written(server)


async def test_descriptors_of_what_was_not_begun(tmp_path: Path) -> None:
    """Those that came with a command that was not begun are closed."""
    async with behind_another(tmp_path) as (client, server):
        fd = memfd(4096)
        before = len(open_fds())
        await client.send(client.pack(RESET))
        for index in range(4):
            await client.send(client.pack(DMA_MAP, map_request(index << 12, 4096, 0, 3)), [fd])
        answers = [await client.receive() for _ in range(5)]
        assert [errno.ETIMEDOUT] * 2 == [answer.error for answer in answers[:2]]
        done = sum(not answer.error for answer in answers)
        assert done == [event.header.command for event in server.received].count(Command.DMA_MAP)
        assert before + done == len(open_fds())
