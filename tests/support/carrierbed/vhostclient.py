"""QEMU's vhost-user front-end, played by a test and packed by hand."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import trio

__all__ = ["VhostClient", "sealed_file"]

WAIT_S = 30.0
VERSION = 1
REPLY = 4
NEED_REPLY = 8
GET_FEATURES, SET_FEATURES, SET_OWNER, SET_LOG_BASE = 1, 2, 3, 6
SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE = 8, 10, 11, 18
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES = 15, 16
SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE = 42, 43
LOG_ALL = 1 << 26


def sealed_file(size: int, *, sealed: bool = True) -> int:
    """A memory file as QEMU's log is; returns its descriptor."""
    number = os.memfd_create("log", os.MFD_ALLOW_SEALING)
    os.ftruncate(number, size)
    if sealed:
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return number


class VhostClient:
    """One connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Connect, and say nothing yet."""
        return cls(await trio.open_unix_socket(path))

    async def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = VERSION) -> None:
        """Send a message."""
        data = struct.pack("<III", request, flags, len(payload)) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        await self.stream.socket.sendmsg([data], rights)

    async def reply(self) -> tuple[int, bytes]:
        """Wait for a reply; returns what it answers, and its payload."""
        with trio.fail_after(WAIT_S):
            request, flags, size = struct.unpack("<III", await self._exactly(12))
            assert flags == VERSION | REPLY
            return request, await self._exactly(size)

    async def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await self.stream.receive_some(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    async def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a message with a reply of its own, and wait for it."""
        await self.send(request, payload, fds)
        answered, body = await self.reply()
        assert answered == request
        return body

    async def do(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a message whose result is waited for; returns the result."""
        await self.send(request, payload, fds, VERSION | NEED_REPLY)
        answered, body = await self.reply()
        assert answered == request
        return int.from_bytes(body, "little")

    async def begin(self, queues: int = 2) -> list[int]:
        """Start the device as QEMU does when a driver is bound; returns the results of the last messages."""
        for index in range(queues):
            await self.send(SET_VRING_NUM, struct.pack("<II", index, 16))
            await self.send(SET_VRING_BASE, struct.pack("<II", index, 7 + index))
        return [await self.do(SET_VRING_ENABLE, struct.pack("<II", index, 1)) for index in range(queues)]

    async def end(self, queues: int = 2) -> list[bytes]:
        """Stop the device as QEMU does; returns where the vrings were."""
        for index in range(queues):
            await self.send(SET_VRING_ENABLE, struct.pack("<II", index, 0))
        return [await self.ask(GET_VRING_BASE, struct.pack("<II", index, 0)) for index in range(queues)]

    async def begin_log(self, number: int, size: int, offset: int = 0) -> None:
        """Have written pages logged into a file."""
        assert await self.ask(SET_LOG_BASE, struct.pack("<QQ", size, offset), [number]) == b""
        await self.send(SET_FEATURES, (LOG_ALL | 1 << 30 | 1 << 32).to_bytes(8, "little"))

    async def transfer(self, direction: int, number: int) -> int:
        """Begin to move a state through a descriptor; returns the answer."""
        answer = await self.ask(SET_DEVICE_STATE_FD, struct.pack("<II", direction, 0), [number])
        return int.from_bytes(answer, "little")

    async def check(self) -> int:
        """Ask how that went; 0 is good."""
        return int.from_bytes(await self.ask(CHECK_DEVICE_STATE), "little")

    async def save(self) -> bytes:
        """Collect a state, as QEMU does.

        Raises:
            OSError: it was refused at once.
        """
        reader, writer = os.pipe()
        try:
            answer = await self.transfer(0, writer)
        finally:
            os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            if answer != 1 << 8:
                raise OSError("refused")
            data: bytes = await trio.to_thread.run_sync(pipe.read)
        assert await self.check() == 0
        return data

    async def load(self, data: bytes) -> int:
        """Give a state, as QEMU does; returns the result of the check.

        Raises:
            OSError: it was refused at once.
        """
        reader, writer = os.pipe()
        try:
            answer = await self.transfer(1, reader)
        finally:
            os.close(reader)
        with os.fdopen(writer, "wb") as pipe:
            if answer != 1 << 8:
                raise OSError("refused")
            await trio.to_thread.run_sync(pipe.write, data)
            await trio.to_thread.run_sync(pipe.flush)
        return await self.check()
