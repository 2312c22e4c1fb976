"""Clients that answer DMA_READ and DMA_WRITE without a socket, each in a way of its own, and a link to one of them."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TypeAlias

from vfiouser_oob.server.dma_link import DmaLink
from vfiouser_protocol.dma_layout import DmaLayout
from vfiouser_protocol.session import CommandReceived, ProtocolSession, ReplyReceived
from wire_pair import joined

DMA_READ, DMA_WRITE = 11, 12
#: What answers a request: its command and payload; the reply's payload, or an error number.
Answering: TypeAlias = Callable[[int, bytes], "bytes | int"]


class GuestRam:
    """Memory of a client that does as the specification says; addresses begin at 0.

    Args:
        content: what it holds.
    """

    def __init__(self, content: bytes) -> None:
        self.bytes = bytearray(content)

    def read_reply(self, address: int, count: int) -> bytes:
        """The payload of a reply to DMA_READ."""
        return struct.pack("<QQ", address, count) + self.bytes[address : address + count]

    def written(self, payload: bytes) -> bytes | int:
        """Take a DMA_WRITE; returns the payload of its reply, or an error number."""
        address, count = struct.unpack_from("<QQ", payload)
        if len(payload) != 16 + count:
            return errno.E2BIG
        self.bytes[address : address + count] = payload[16:]
        return payload[:16]

    def __call__(self, command: int, payload: bytes) -> bytes | int:
        """Answer a request."""
        address, count = struct.unpack_from("<QQ", payload)
        if command == DMA_READ:
            return self.read_reply(address, count)
        return self.written(payload)


class NarrowRam(GuestRam):
    """Memory of QEMU 10.1 and 10.2: structures with a 32-bit count and the data behind it.

    Written as `vfio_user_dma_read` and `vfio_user_dma_write` are there: the reply is a zeroed buffer as long as the
    padded structure and the data, and a request has to be as long.
    """

    def read_reply(self, address: int, count: int) -> bytes:
        """The payload of a reply to DMA_READ."""
        buffer = bytearray(16 + count)
        struct.pack_into("<QI", buffer, 0, address, count)
        buffer[12 : 12 + count] = self.bytes[address : address + count]
        return bytes(buffer)

    def written(self, payload: bytes) -> bytes | int:
        """Take a DMA_WRITE; its reply has no payload."""
        if len(payload) < 16:
            return errno.EINVAL
        address, count = struct.unpack_from("<QI", payload)
        if count > len(payload) - 16:
            return errno.E2BIG
        self.bytes[address : address + count] = payload[12 : 12 + count]
        return b""


class TerseRam(GuestRam):
    """Memory of a client that answers DMA_WRITE by the header alone, and is right in all else."""

    def written(self, payload: bytes) -> bytes | int:
        """Take a DMA_WRITE."""
        answer = super().written(payload)
        return answer if isinstance(answer, int) else b""


class LinkedClient:
    """A `DmaLink` to a client that answers at once.

    Args:
        answering: the client.
        max_transfer: what it takes at once, in bytes.
    """

    def __init__(self, answering: Answering, max_transfer: int = 1 << 20) -> None:
        self.pair = joined()
        self.answering = answering
        self.requests: list[tuple[int, bytes]] = []
        self.learned: list[DmaLayout] = []
        self.link = DmaLink(
            self.pair.server, self._sent, lambda *_: None, max_transfer, 4.0, learned=self.learned.append
        )

    def _sent(self, message: bytes) -> None:
        server, client = self.pair.server, self.pair.client
        self.pair.send(server, message)
        for command in self.pair.receive(client):
            assert isinstance(command, CommandReceived)
            self.requests.append((command.header.command, command.payload))
            self.pair.send(client, self._reply(client, command))
        for reply in self.pair.receive(server):
            assert isinstance(reply, ReplyReceived)
            reply.token.resolve(reply.header, reply.payload)

    def _reply(self, client: ProtocolSession, command: CommandReceived) -> bytes:
        answer = self.answering(command.header.command, command.payload)
        if isinstance(answer, int):
            return client.error_reply(command.header, answer)
        return client.reply(command.header, answer)

    @property
    def commands(self) -> list[int]:
        """What was asked, by command."""
        return [command for command, _ in self.requests]
