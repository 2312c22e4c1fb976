"""DMA by messages over a real socket, with clients of both layouts and one that mixes them."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from daemonkit import TEST_DEVICE, function, serving
from dmaclients import GuestRam, NarrowRam, TerseRam
from rawclient import GET_INFO, HEADER, REGION_READ, RawClient, attached
from vfiouser_oob.config.schema import FunctionConfig, UpstreamDevice

DONE, FAULT = 2, 3
READ, WRITE = 1, 2
CONTENT = bytes(range(1, 256)) * 4
Answering = Callable[[int, bytes], "bytes | int"]


def functions(directory: Path, backend: str) -> list[FunctionConfig]:
    """A model, or the same behind the `vfio-user` backend."""
    if backend == "model":
        return [function(directory)]
    upstream = UpstreamDevice(socket=directory / "up.sock")
    return [function(directory, "up", TEST_DEVICE), function(directory, "f0", upstream)]


async def reply_of(client: RawClient, request: bytes, ram: Answering) -> bytes:
    """Send a request and wait for its reply, answering what the device asks of memory meanwhile."""
    await client.send(request)
    while True:
        message = await client.receive()
        if message.flags & 0xF:
            return message.payload
        answer = ram(message.command, message.payload)
        payload, flags, error = (b"", 0x21, answer) if isinstance(answer, int) else (answer, 1, 0)
        await client.send(HEADER.pack(message.msg_id, message.command, 16 + len(payload), flags, error) + payload)


async def transfer(client: RawClient, ram: Answering, address: int, count: int, direction: int) -> int:
    """Let the test device transfer; returns how it ended."""
    registers = (
        (0x18, struct.pack("<Q", address)),
        (0x20, struct.pack("<I", count)),
        (0x24, struct.pack("<I", direction)),
    )
    for offset, data in registers:
        await reply_of(client, client.pack(10, struct.pack("<QII", offset, 0, len(data)) + data), ram)
    with trio.fail_after(20):
        while True:
            request = client.pack(REGION_READ, struct.pack("<QII", 0x28, 0, 4))
            status = int.from_bytes((await reply_of(client, request, ram))[16:], "little")
            if status != 1:
                return status


@pytest.mark.parametrize("backend", ["model", "vfio-user"])
@pytest.mark.parametrize("kind", [GuestRam, NarrowRam, TerseRam])
@pytest.mark.parametrize("first", [READ, WRITE], ids=["read first", "write first"])
async def test_each_layout(tmp_path: Path, backend: str, kind: type[GuestRam], first: int) -> None:
    """What the device reads is the guest's, and what it writes arrives where it belongs, whichever comes first."""
    ram = kind(CONTENT + bytes(len(CONTENT)))
    size = len(CONTENT)
    async with serving(*functions(tmp_path, backend)), attached(tmp_path / "f0.sock") as client:
        await client.enable_bus_master()
        await client.dma_map(0, 0x1000)
        if first == READ:
            assert DONE == await transfer(client, ram, 0, size, READ)
            assert CONTENT == await client.read(1, 0, size)
        await client.write(1, 0, CONTENT[::-1])
        assert DONE == await transfer(client, ram, size, size, WRITE)
        assert CONTENT + CONTENT[::-1] == ram.bytes
        assert DONE == await transfer(client, ram, 0, size, READ)
        assert CONTENT == await client.read(1, 0, size)


async def test_a_client_that_mixes_them(tmp_path: Path) -> None:
    """Replies of both layouts: a fault for each that is not the first one's, and the function goes on."""
    replies = itertools.cycle((NarrowRam(CONTENT), GuestRam(CONTENT)))

    def mixing(command: int, payload: bytes) -> bytes | int:
        return next(replies)(command, payload)

    async with serving(*functions(tmp_path, "model")), attached(tmp_path / "f0.sock") as client:
        await client.enable_bus_master()
        await client.dma_map(0, 0x1000)
        ends = [await transfer(client, mixing, 0, 64, READ) for _ in range(6)]
        assert [DONE, FAULT] * 3 == ends
        await client.succeed(GET_INFO, struct.pack("<4I", 16, 0, 0, 0))
        assert CONTENT[:64] == await client.read(1, 0, 64)
