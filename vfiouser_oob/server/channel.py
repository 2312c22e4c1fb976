"""One socket of a connection: what goes through is traced, and what breaks it ends the connection."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from vfiouser_oob.observability.log import Logger
from vfiouser_oob.transport.fds import HasFileno
from vfiouser_oob.transport.message_socket import EndOfStream, MessageSocket
from vfiouser_oob.transport.pieces import Pieces
from vfiouser_protocol.codec import describe
from vfiouser_protocol.constants import HEADER_SIZE
from vfiouser_protocol.framing import Message
from vfiouser_protocol.header import unpack_header


class Channel:
    """A message socket of a client.

    Args:
        stream: the socket; owned from now on.
        log: a logger with the function's fields; messages are traced at debug level.
        broken: cancelled when nothing can be sent any more.
    """

    def __init__(self, stream: MessageSocket, log: Logger, broken: trio.CancelScope) -> None:
        self.stream = stream
        self._log = log
        #: Whether messages are traced; asked once per message, so it is no look-up.
        self.tracing = log.debug_enabled
        self._broken = broken

    def level_changed(self) -> None:
        """Another log level counts from now on."""
        self.tracing = self._log.debug_enabled

    def send(self, data: bytes, fds: Sequence[HasFileno] = ()) -> None:
        """Send one message; nothing, for a command that wants no reply.

        Args:
            data: the whole message.
            fds: descriptors that go with it; they stay the caller's and may be closed at once.
        """
        if not data:
            return
        if self.tracing:
            header = unpack_header(data[:HEADER_SIZE])
            self._log.debug(describe(header, data[HEADER_SIZE:], len(fds), ">"))
        try:
            self.stream.send(data, fds)
        except EndOfStream:
            self._broken.cancel()

    def send_pieces(self, head: bytes, payload: Pieces) -> None:
        """Send one message whose payload lies in several places; nothing, for a command that wants no reply.

        Args:
            head: its header.
            payload: its payload, of the size that the header says.
        """
        if self.stream.kept:
            self.answer(b"".join([head, *payload.pieces]) if head else b"")
            return
        if not head:
            return
        if self.tracing:
            self._log.debug(describe(unpack_header(head), b"".join(payload.pieces), 0, ">"))
        try:
            self.stream.send_pieces([head, *payload.pieces])
        except EndOfStream:
            self._broken.cancel()

    def answer(self, data: bytes, fds: Sequence[HasFileno] = ()) -> None:
        """Answer the first command that was not.

        Args:
            data: the whole message; empty for a command that wants no reply.
            fds: descriptors that go with it; they stay the caller's and may be closed at once.
        """
        if self.tracing and data:
            header = unpack_header(data[:HEADER_SIZE])
            self._log.debug(describe(header, data[HEADER_SIZE:], len(fds), ">"))
        try:
            self.stream.answer(data, fds)
        except EndOfStream:
            self._broken.cancel()

    def trace_received(self, message: Message) -> None:
        """Log a message at debug level, as one readable line."""
        if self.tracing:
            self._log.debug(describe(message.header, bytes(message.payload), len(message.fds), "<"))

    async def run_sender(self) -> None:
        """Send what the socket did not take at once, until cancelled."""
        try:
            await self.stream.run_sender()
        except EndOfStream:
            self._broken.cancel()

    def end(self) -> None:
        """End the connection: the socket cannot be used any more."""
        self._broken.cancel()

    def close(self) -> None:
        """Close the socket."""
        self.stream.close()
