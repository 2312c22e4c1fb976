"""A blocking vfio-user client for attacks: whatever it is asked to send, it sends."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from rawmessages import (
    DMA_MAP,
    DMA_UNMAP,
    HEADER,
    QEMU_CAPABILITIES,
    REGION_READ,
    REGION_WRITE,
    SET_IRQS,
    VERSION,
    Answer,
    map_request,
)

#: Payloads that each command accepts, or nearly so.
PAYLOADS: dict[int, bytes] = {
    1: struct.pack("<HH", 0, 0) + QEMU_CAPABILITIES,
    2: map_request(0x100_0000, 4096),
    3: struct.pack("<IIQQ", 24, 0, 0x100_0000, 4096),
    4: struct.pack("<4I", 16, 0, 0, 0),
    5: struct.pack("<IIIIQQ", 32, 0, 0, 0, 0, 0),
    6: struct.pack("<4I", 16, 0, 0, 0),
    7: struct.pack("<4I", 16, 0, 2, 0),
    8: struct.pack("<5I", 20, 0x24, 2, 0, 1),
    9: struct.pack("<QII", 4, 0, 4),
    10: struct.pack("<QIII", 8, 0, 4, 1),
    11: struct.pack("<QQ", 0, 4),
    12: struct.pack("<QQI", 0, 4, 0),
    13: b"",
    14: struct.pack("<II", 8, 4),
    15: struct.pack("<Q", 0),
    16: struct.pack("<II", 8, 0x1_0001),
    17: struct.pack("<II", 8, 4),
    18: struct.pack("<III", 12, 4, 0),
}


class Peer:
    """One connection.

    Args:
        path: the function's socket, or a connected socket.
        timeout: seconds that anything may take.
    """

    def __init__(self, path: Path | str | socket.socket, timeout: float = 10.0) -> None:
        if isinstance(path, socket.socket):
            self.sock = path
        else:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(timeout)
            self.sock.connect(os.fspath(path))
        self.sock.settimeout(timeout)
        self.received: list[int] = []
        self._next_id = 0

    def pack(self, command: int, payload: bytes = b"", flags: int = 0, size: int | None = None) -> bytes:
        """Pack a command; `size` is what the header says, if that is to be wrong."""
        self._next_id = (self._next_id + 1) & 0xFFFF
        return HEADER.pack(self._next_id, command, 16 + len(payload) if size is None else size, flags, 0) + payload

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, descriptors with the first of them."""
        if fds:
            data = data[socket.send_fds(self.sock, [data], list(fds)) :]
        self.sock.sendall(data)

    def receive(self) -> Answer:
        """Take the next message."""
        first = len(self.received)
        msg_id, command, size, flags, error = HEADER.unpack(self._exactly(16))
        return Answer(msg_id, command, size, flags, error, self._exactly(size - 16), self.received[first:])

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more, fds, _, _ = socket.recv_fds(self.sock, count - len(data), 64)
            self.received += fds
            if not more:
                raise EOFError("the daemon ended the connection")
            data += more
        return data

    def command(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Answer:
        """Send a command and take its reply; commands of the server that come before it are passed over."""
        self.send(self.pack(command, payload), fds)
        while not (answer := self.receive()).flags & 1:
            pass
        assert answer.msg_id == self._next_id
        return answer

    def succeed(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Answer:
        """Send a command that has to succeed."""
        answer = self.command(command, payload, fds)
        assert answer.flags == 1, f"command {command} failed with errno {answer.error}"
        return answer

    def negotiate(self, capabilities: bytes = QEMU_CAPABILITIES) -> Peer:
        """Send VERSION; returns this client."""
        self.succeed(VERSION, struct.pack("<HH", 0, 0) + capabilities)
        return self

    def read(self, region: int, offset: int, count: int) -> bytes:
        """REGION_READ."""
        return self.succeed(REGION_READ, struct.pack("<QII", offset, region, count)).payload[16:]

    def write(self, region: int, offset: int, data: bytes) -> None:
        """REGION_WRITE."""
        self.succeed(REGION_WRITE, struct.pack("<QII", offset, region, len(data)) + data)

    def dma_map(self, address: int, size: int, fd: int | None = None, offset: int = 0) -> None:
        """DMA_MAP."""
        self.succeed(DMA_MAP, map_request(address, size, offset), () if fd is None else (fd,))

    def dma_unmap(self, address: int, size: int) -> None:
        """DMA_UNMAP."""
        self.succeed(DMA_UNMAP, struct.pack("<IIQQ", 24, 0, address, size))

    def set_irqs(self, flags: int, index: int, start: int, count: int, fds: Sequence[int] = ()) -> Answer:
        """SET_IRQS; the reply may be a refusal."""
        return self.command(SET_IRQS, struct.pack("<5I", 20, flags, index, start, count), fds)

    def close(self) -> None:
        """End the connection, and close what came."""
        self.sock.close()
        for fd in self.received:
            os.close(fd)
        self.received.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
