"""A vfio-user client of a few lines that shares no code with ours: what it sends is packed by hand."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from rawmessages import (
    CONFIG,
    DIRTY_PAGES,
    DMA_MAP,
    DMA_READ,
    DMA_UNMAP,
    DMA_WRITE,
    FEATURE,
    GET_INFO,
    HEADER,
    IO_FDS,
    IRQ_INFO,
    MIG_DATA_READ,
    MIG_DATA_WRITE,
    NO_REPLY,
    QEMU_CAPABILITIES,
    REGION_INFO,
    REGION_READ,
    REGION_WRITE,
    RESET,
    SET_IRQS,
    VERSION,
    WRITE_MULTI,
    Answer,
    map_request,
    memfd,
)

__all__ = [
    "CONFIG",
    "DIRTY_PAGES",
    "DMA_MAP",
    "DMA_READ",
    "DMA_UNMAP",
    "DMA_WRITE",
    "FEATURE",
    "GET_INFO",
    "HEADER",
    "IO_FDS",
    "IRQ_INFO",
    "MIG_DATA_READ",
    "MIG_DATA_WRITE",
    "NO_REPLY",
    "QEMU_CAPABILITIES",
    "REGION_INFO",
    "REGION_READ",
    "REGION_WRITE",
    "RESET",
    "SET_IRQS",
    "VERSION",
    "WRITE_MULTI",
    "Answer",
    "RawClient",
    "attached",
    "connect",
    "map_request",
    "memfd",
]


class RawClient:
    """One connection; `fds` of answers are closed with it unless taken out of `received`."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self.received: list[int] = []
        self._next_id = 0

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, descriptors with the first of them."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        sent = await self.sock.sendmsg([data], ancillary)
        while sent < len(data):
            sent += await self.sock.send(data[sent:])

    def pack(self, command: int, payload: bytes = b"", *, flags: int = 0, msg_id: int | None = None) -> bytes:
        """Pack a command."""
        if msg_id is None:
            msg_id, self._next_id = self._next_id, (self._next_id + 1) & 0xFFFF
        return HEADER.pack(msg_id, command, 16 + len(payload), flags, 0) + payload

    async def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more, ancillary, _, _ = await self.sock.recvmsg(
                count - len(data), socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC
            )
            for _level, _kind, content in ancillary:
                self.received.extend(struct.unpack(f"{len(content) // 4}i", content))
            if not more:
                raise EOFError(f"the stream ended after {len(data)} of {count} bytes")
            data += more
        return data

    async def receive(self) -> Answer:
        """Take the next message, reply or command."""
        first = len(self.received)
        msg_id, command, size, flags, error = HEADER.unpack(await self._exactly(16))
        payload = await self._exactly(size - 16) if size > 16 else b""
        return Answer(msg_id, command, size, flags, error, payload, self.received[first:])

    async def command(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0) -> Answer:
        """Send a command and take the next message, which must be its reply."""
        await self.send(self.pack(command, payload, flags=flags), fds)
        answer = await self.receive()
        assert (answer.command, answer.flags & 0xF) == (command, 1)
        return answer

    async def succeed(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Answer:
        """Send a command that has to succeed."""
        answer = await self.command(command, payload, fds)
        assert (answer.flags, answer.error) == (1, 0), f"command {command} failed with errno {answer.error}"
        return answer

    async def errno(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a command that has to fail; returns its error number."""
        answer = await self.command(command, payload, fds)
        assert (answer.flags, answer.size) == (0x21, 16), f"command {command} did not fail"
        return answer.error

    async def negotiate(self, data: bytes = QEMU_CAPABILITIES, minor: int = 0) -> Answer:
        """Send VERSION and take its reply."""
        return await self.command(VERSION, struct.pack("<HH", 0, minor) + data)

    # Everyday commands

    async def read(self, region: int, offset: int, count: int) -> bytes:
        """REGION_READ."""
        answer = await self.succeed(REGION_READ, struct.pack("<QII", offset, region, count))
        assert struct.unpack_from("<QII", answer.payload) == (offset, region, count)
        return answer.payload[16:]

    async def write(self, region: int, offset: int, data: bytes) -> None:
        """REGION_WRITE."""
        request = struct.pack("<QII", offset, region, len(data))
        assert (await self.succeed(REGION_WRITE, request + data)).payload == request

    async def read32(self, region: int, offset: int) -> int:
        """Read a 32-bit register."""
        return int.from_bytes(await self.read(region, offset, 4), "little")

    async def write32(self, region: int, offset: int, value: int) -> None:
        """Write a 32-bit register."""
        await self.write(region, offset, struct.pack("<I", value))

    async def dma_map(self, address: int, size: int, fd: int | None = None, *, offset: int = 0, flags: int = 3) -> None:
        """DMA_MAP."""
        await self.succeed(DMA_MAP, map_request(address, size, offset, flags), () if fd is None else (fd,))

    async def dma_unmap(self, address: int, size: int) -> None:
        """DMA_UNMAP."""
        request = struct.pack("<IIQQ", 24, 0, address, size)
        assert (await self.succeed(DMA_UNMAP, request)).payload == request

    async def set_irqs(self, index: int, start: int, count: int, fds: Sequence[int] = (), flags: int = 0x24) -> None:
        """SET_IRQS."""
        await self.succeed(SET_IRQS, struct.pack("<IIIII", 20, flags, index, start, count), fds)

    async def enable_bus_master(self) -> None:
        """Switch memory decoding and bus mastering on."""
        await self.write(CONFIG, 4, b"\x06\x00")

    def close(self) -> None:
        """End the connection and close every descriptor that came."""
        self.sock.close()
        for fd in self.received:
            os.close(fd)
        self.received.clear()


async def connect(path: Path | str) -> RawClient:
    """Connect without saying anything yet."""
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.connect(os.fspath(path))
    return RawClient(sock)


@asynccontextmanager
async def attached(path: Path | str, data: bytes = QEMU_CAPABILITIES) -> AsyncIterator[RawClient]:
    """A connection that has negotiated."""
    client = await connect(path)
    try:
        answer = await client.negotiate(data)
        assert answer.flags == 1
        yield client
    finally:
        client.close()
