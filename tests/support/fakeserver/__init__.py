"""A vfio-user server whose answers a test writes: real protocol over a real socket, no device behind it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from vfiouser_oob.client.client import Client
from vfiouser_oob.client.nursery import background_nursery
from vfiouser_oob.transport.fds import LentFd, close_fds
from vfiouser_oob.transport.message_socket import EndOfStream, MessageSocket
from vfiouser_protocol.capabilities import MigrationCapability, VersionCapabilities
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command
from vfiouser_protocol.limits import Limits
from vfiouser_protocol.messages import (
    DmaRead,
    DmaReadReply,
    DmaWrite,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    RegionWriteReply,
)
from vfiouser_protocol.session import CommandReceived, ConnectionEnd, MessageRefused, ProtocolSession, ReplyReceived

OFFER = VersionCapabilities(
    max_msg_fds=8, max_data_xfer_size=1 << 20, write_multiple=True, migration=MigrationCapability()
)


@dataclass
class Answer:
    """What a handler wants to be sent.

    Args:
        payload: payload of the success reply.
        fds: descriptors to attach.
        errno: not 0: an error reply instead.
        raw: sent as it is instead of a reply.
    """

    payload: bytes = b""
    fds: Sequence[int] = ()
    errno: int = 0
    raw: bytes | None = None


Handler = Callable[[CommandReceived], "Answer | Awaitable[Answer]"]


@dataclass
class FakeServer:
    """The server; put handlers into `handlers`, look at `received` and `replies`.

    Args:
        sock: its end of the connection.
        offer: what it announces.
        grant_twin: whether it grants a twin socket.
    """

    sock: socket.socket
    offer: VersionCapabilities = OFFER
    grant_twin: bool = False
    handlers: dict[int, Handler] = field(default_factory=dict)
    received: list[CommandReceived] = field(default_factory=list)
    replies: list[ReplyReceived] = field(default_factory=list)
    memory: bytearray = field(default_factory=lambda: bytearray(8192))

    def __post_init__(self) -> None:
        limits = Limits()
        self.session = ProtocolSession(ConnectionEnd.SERVER, limits)
        self.main = MessageSocket(self.sock, limits.max_message_size)
        self.twin: MessageSocket | None = None
        self.nursery: trio.Nursery | None = None
        self.handlers = {
            Command.REGION_READ: self.region_read,
            Command.REGION_WRITE: self.region_write,
        } | self.handlers

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until the client goes or the task is cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                nursery.start_soon(self.main.run_sender)
                task_status.started()
                await self.read(self.main)
                nursery.cancel_scope.cancel()
        except* EndOfStream:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Go away."""
        self.main.close()
        if self.twin is not None:
            self.twin.close()

    async def read(self, channel: MessageSocket) -> None:
        """Take messages from one channel until it ends."""
        try:
            while True:
                message = await channel.receive()
                event = self.session.receive(message, twin=channel is self.twin)
                if isinstance(event, ReplyReceived):
                    self.take_reply(event)
                elif isinstance(event, MessageRefused):
                    close_fds(event.fds)
                    if event.reply is not None:
                        channel.send(event.reply)
                else:
                    await self.take_command(event)
        except EndOfStream:
            return

    async def take_command(self, event: CommandReceived) -> None:
        """Answer a command as the test wants it."""
        if event.header.command == Command.VERSION:
            self.accept(event)
            return
        self.received.append(event)
        handler = self.handlers.get(event.header.command)
        answer = handler(event) if handler is not None else Answer()
        if not isinstance(answer, Answer):
            answer = await answer
        close_fds([*event.fds, *event.surplus_fds])
        if answer.errno:
            data = self.session.error_reply(event.header, answer.errno)
        else:
            data = self.session.reply(event.header, answer.payload)
        if answer.raw is not None:
            data = answer.raw
        if data:
            self.main.send(data, [LentFd(fd) for fd in answer.fds])

    def accept(self, event: CommandReceived) -> None:
        """Answer VERSION."""
        data = self.session.accept(event.header, self.offer, grant_twin=self.grant_twin)
        assert self.session.negotiated is not None
        if not self.session.negotiated.twin:
            self.main.send(data)
            return
        ours, theirs = socket.socketpair()
        with theirs:
            self.main.send(data, [theirs])
        self.twin = MessageSocket(ours, Limits().max_message_size)
        assert self.nursery is not None
        self.nursery.start_soon(self.read, self.twin)

    # The server's own commands

    def submit(self, command: int, payload: bytes, **options: Any) -> Callable[[], Awaitable[ReplyReceived]]:
        """Send a command; the result waits for its reply."""
        done = trio.Event()
        replies: list[ReplyReceived] = []
        _, data = self.session.command(command, payload, (done, replies), **options)
        (self.twin or self.main).send(data)

        async def wait() -> ReplyReceived:
            await done.wait()
            return replies[0]

        return wait

    def take_reply(self, event: ReplyReceived) -> None:
        """Hand a reply to whoever waits for it."""
        self.replies.append(event)
        done, replies = event.token
        replies.append(event)
        done.set()

    async def dma_read(self, address: int, count: int) -> bytes:
        """Read client memory by message."""
        reply = await self.submit(Command.DMA_READ, encode(DmaRead(address, count)))()
        if reply.error is not None:
            raise reply.error
        return decode(DmaReadReply, reply.payload).data

    async def dma_write(self, address: int, data: bytes) -> None:
        """Write client memory by message."""
        reply = await self.submit(Command.DMA_WRITE, encode(DmaWrite(address, len(data), data)))()
        if reply.error is not None:
            raise reply.error

    # A device of one region of plain memory

    def region_read(self, event: CommandReceived) -> Answer:
        """Read from `memory`."""
        offset, region, count = decode(RegionRead, event.payload)
        data = bytes(self.memory[offset : offset + count])
        return Answer(encode(RegionReadReply(offset, region, count, data)))

    def region_write(self, event: CommandReceived) -> Answer:
        """Write to `memory`."""
        offset, region, count, data = decode(RegionWrite, event.payload)
        self.memory[offset : offset + count] = data
        return Answer(encode(RegionWriteReply(offset, region, count)))


@asynccontextmanager
async def connected(
    *,
    offer: VersionCapabilities = OFFER,
    grant_twin: bool = False,
    handlers: dict[int, Handler] | None = None,
    **client_options: Any,
) -> AsyncIterator[tuple[Client, FakeServer]]:
    """Run a fake server and a client that is connected to it."""
    ours, theirs = socket.socketpair()
    server = FakeServer(theirs, offer, grant_twin, handlers or {})
    async with background_nursery() as nursery:
        await nursery.start(server.run)
        async with Client.from_socket(ours, **client_options) as client:
            yield client, server
