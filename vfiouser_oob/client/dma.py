"""DMA_READ and DMA_WRITE that the server sends: who answers them, in which order and when."""

from __future__ import annotations

import abc
import errno
from collections import deque
from collections.abc import Callable

import trio

from vfiouser_oob.transport.message_socket import MessageSocket
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command
from vfiouser_protocol.errors import CommandError, DmaFault, StreamError, VfioUserError
from vfiouser_protocol.header import Header
from vfiouser_protocol.messages import DmaRead, DmaReadReply, DmaWrite, DmaWriteReply
from vfiouser_protocol.session import ProtocolSession

#: Commands that may wait to be served. A server that sends more without waiting for replies has lost its
#: senses, and what it sends is not buffered without end.
_MAX_WAITING = 4096
#: Bytes of them that may wait before nothing more is read; a server that waits for replies rarely has as many.
_HIGH_WATER = 8 << 20
#: The same where reading has to go on, since the reply that is waited for comes behind them.
_MAX_WAITING_BYTES = 64 << 20


class DmaServer(abc.ABC):
    """Serves the memory that the device reaches by messages. Raise `DmaFault` with the reply's errno."""

    @abc.abstractmethod
    async def read(self, address: int, count: int) -> bytes:
        """Return exactly `count` bytes of memory.

        Args:
            address: DMA address.
            count: bytes.

        Raises:
            DmaFault: the access is not allowed or failed.
        """

    @abc.abstractmethod
    async def write(self, address: int, data: bytes) -> None:
        """Store bytes in memory.

        Args:
            address: DMA address.
            data: what the device writes.

        Raises:
            DmaFault: the access is not allowed or failed.
        """


class NoMemory(DmaServer):
    """A client without memory: every access is refused with ENODEV, QEMU's answer for an unmapped address."""

    async def read(self, address: int, count: int) -> bytes:
        """Refuse.

        Args:
            address: DMA address.
            count: bytes.

        Raises:
            DmaFault: always.
        """
        raise DmaFault(f"nothing is mapped at {address:#x}", errno.ENODEV)

    async def write(self, address: int, data: bytes) -> None:
        """Refuse.

        Args:
            address: DMA address.
            data: what the device writes.

        Raises:
            DmaFault: always.
        """
        raise DmaFault(f"nothing is mapped at {address:#x}", errno.ENODEV)


class DmaService:
    """Answers the server's commands one after the other, in the order of their arrival.

    The order matters beyond the replies: a device may send the data of a transfer and then its completion
    without waiting in between, and memory must never show the second without the first.

    Args:
        server: whose memory it is.
        session: the protocol's rules, shared with the connection.
        max_data_xfer_size: bytes of the largest transfer that we announced.
        trace: takes every reply that is sent.
    """

    def __init__(
        self,
        server: DmaServer,
        session: ProtocolSession,
        max_data_xfer_size: int,
        trace: Callable[[bytes], None],
    ) -> None:
        self._trace = trace
        self._server = server
        self._session = session
        self._max_size = max_data_xfer_size
        self._waiting: deque[tuple[MessageSocket, Header | None, bytes]] = deque()
        self._waiting_bytes = 0
        self._holds = 0
        self._closed = False
        self._work = trio.Event()
        self._served = trio.Event()

    def hold(self) -> None:
        """Serve nothing until `release`: a region access of our own is under way."""
        self._holds += 1
        self._served.set()

    def release(self) -> None:
        """Take back one `hold`."""
        self._holds -= 1
        if not self._holds and self._waiting:
            self._work.set()

    @property
    def full(self) -> bool:
        """Whether so much waits that nothing more should be read before some of it is served."""
        return self._waiting_bytes > _HIGH_WATER and not self._holds

    async def room(self) -> None:
        """Wait until that has changed."""
        while self.full:
            self._served = trio.Event()
            await self._served.wait()

    def close(self) -> None:
        """Drop what waits and what still comes: no answer can reach the server any more."""
        self._closed = True
        self._waiting.clear()
        self._waiting_bytes = 0
        self._served.set()

    def take(self, channel: MessageSocket, header: Header, payload: bytes) -> None:
        """Queue a command of the server.

        Args:
            channel: where it came from and its reply goes.
            header: its header.
            payload: what follows the header.

        Raises:
            StreamError: too many are waiting.
        """
        self._put(channel, header, payload)

    def refuse(self, channel: MessageSocket, reply: bytes) -> None:
        """Queue the finished reply to a command that will not be executed: it has its turn like the others.

        Raises:
            StreamError: too many are waiting.
        """
        self._put(channel, None, reply)

    def _put(self, channel: MessageSocket, header: Header | None, payload: bytes) -> None:
        if self._closed:
            return
        self._waiting_bytes += len(payload)
        if len(self._waiting) >= _MAX_WAITING or self._waiting_bytes > _MAX_WAITING_BYTES:
            raise StreamError(
                f"the server sent more than {_MAX_WAITING} commands, or {_MAX_WAITING_BYTES} bytes in them, without "
                f"waiting for replies; the connection ends"
            )
        self._waiting.append((channel, header, payload))
        if not self._holds:
            self._work.set()

    async def run(self) -> None:
        """Serve until cancelled.

        Raises:
            EndOfStream: the channel is gone.
        """
        while True:
            while self._waiting and not self._holds:
                channel, header, payload = self._waiting.popleft()
                self._waiting_bytes -= len(payload)
                self._served.set()
                reply = payload if header is None else await self._answer(header, payload)
                if reply:
                    self._trace(reply)
                channel.answer(reply)
                if channel.congested:
                    await channel.flushed()
            self._work = trio.Event()
            await self._work.wait()

    async def _answer(self, header: Header, payload: bytes) -> bytes:
        try:
            result = await self._perform(header.command, payload)
        except VfioUserError as error:
            return self._session.error_reply(header, error.errno)
        return self._session.reply(header, result)

    async def _perform(self, command: int, payload: bytes) -> bytes:
        if command == Command.DMA_READ:
            read = decode(DmaRead, payload)
            self._check_size(read.count)
            data = await self._server.read(read.address, read.count)
            return encode(DmaReadReply(read.address, read.count, data))
        write = decode(DmaWrite, payload)
        self._check_size(write.count)
        await self._server.write(write.address, write.data)
        return encode(DmaWriteReply(write.address, write.count))

    def _check_size(self, count: int) -> None:
        if count > self._max_size:
            raise CommandError(
                f"the server wants {count} bytes in one transfer, {self._max_size} were announced",
                errno.E2BIG,
            )
