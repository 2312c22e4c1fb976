"""Writes and reads of what a client has not mapped as memory: sent at once, carried out in order, waited for later."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from daemonkit import function, serving
from rawclient import DMA_READ, DMA_WRITE, HEADER, Answer, RawClient, attached
from vfiouser_oob.devices.base import ClientLink
from vfiouser_oob.server.daemon import Daemon
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.errors import DmaFault
from vfiouser_protocol.messages import DmaRead, DmaReadReply, DmaWrite, DmaWriteReply

ECAM = 0xB000_0000
REPLY, ERROR = 1, 0x21


async def reply(client: RawClient, request: Answer, payload: bytes, error: int = 0) -> None:
    """Answer a command of the server."""
    flags = ERROR if error else REPLY
    await client.send(HEADER.pack(request.msg_id, request.command, 16 + len(payload), flags, error) + payload)


@asynccontextmanager
async def client_of(directory: Path) -> AsyncIterator[tuple[Daemon, ClientLink, RawClient]]:
    """A client that has mapped nothing."""
    async with serving(function(directory)) as daemon, attached(directory / "f0.sock") as client:
        connection = daemon.functions[0].connection
        assert connection is not None
        yield daemon, connection.link, client


async def test_sent_at_once_and_answered_later(tmp_path: Path) -> None:
    """All of it is with the client before anything is answered, in order; what it reads is what the client says."""
    async with client_of(tmp_path) as (_, link, client):
        write = link.bus_write(ECAM, b"\6\0")
        read = link.send_read(ECAM, 2)
        last = link.bus_write(ECAM + 4, b"\1")
        came = [await client.receive() for _ in range(3)]
        assert [DMA_WRITE, DMA_READ, DMA_WRITE] == [each.command for each in came]
        assert (DmaWrite(ECAM, 2, b"\6\0"), DmaRead(ECAM, 2)) == (
            decode(DmaWrite, came[0].payload),
            decode(DmaRead, came[1].payload),
        )
        assert write.answered is False
        await reply(client, came[0], encode(DmaWriteReply(ECAM, 2)))
        await reply(client, came[1], encode(DmaReadReply(ECAM, 2, b"\7\0")))
        await reply(client, came[2], b"")  # as older clients do
        with trio.fail_after(5):
            await write.wait()
            assert b"\7\0" == await read.wait()
            await last.wait()
        assert (write.answered, last.answered) == (True, True)


async def test_a_refusal_is_told_to_whoever_waits(tmp_path: Path) -> None:
    """With the client's own error number; nonsense is told as such."""
    async with client_of(tmp_path) as (_, link, client):
        write, read = link.bus_write(ECAM, b"\6"), link.send_read(ECAM, 2)
        await reply(client, await client.receive(), b"", error=errno.ENODEV)
        await reply(client, await client.receive(), encode(DmaReadReply(ECAM, 1, b"\7")))
        with trio.fail_after(5):
            with pytest.raises(DmaFault, match="refused DMA_WRITE") as fault:
                await write.wait()
            assert errno.ENODEV == fault.value.errno
            with pytest.raises(DmaFault, match="answered DMA_READ"):
                await read.wait()


async def test_a_client_that_goes_answers_nothing_any_more(tmp_path: Path) -> None:
    """Whoever waits learns it, and nothing more can be sent."""
    async with client_of(tmp_path) as (_, link, client):
        write, read = link.bus_write(ECAM, b"\6"), link.send_read(ECAM, 2)
        client.close()
        with trio.fail_after(5):
            for sent in (write, read):
                with pytest.raises(DmaFault, match="the client has gone"):
                    await sent.wait()
        with pytest.raises(DmaFault, match="accepts no reads of 1048577 bytes"):
            link.send_read(0, (1 << 20) + 1)
        for again in (lambda: link.bus_write(ECAM, b"\6"), lambda: link.send_read(ECAM, 2)):
            with pytest.raises(DmaFault, match="the client has gone"):
                again()
