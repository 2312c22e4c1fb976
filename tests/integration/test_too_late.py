"""A command that waited so long that its reply could not be in time is not begun: its client reads the truth."""

from __future__ import annotations

import errno
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from fakeserver import FakeServer
from openfds import open_fds
from rawclient import DMA_MAP, NO_REPLY, REGION_WRITE, RESET, RawClient, attached, map_request, memfd
from slowupstream import slow_upstream
from vfiouser_protocol.constants import Command

BUDGET_S = 0.6


@asynccontextmanager
async def behind_another(directory: Path) -> AsyncIterator[tuple[RawClient, FakeServer]]:
    """A client of a function whose device is another vfio-user server, which never answers a reset."""
    async with slow_upstream(directory, BUDGET_S) as servers, attached(directory / "f0.sock") as client:
        servers[-1].received.clear()
        yield client, servers[-1]


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
