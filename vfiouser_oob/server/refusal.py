"""Turning a client away so that it learns why: its VERSION is answered with an errno, then the connection ends."""

from __future__ import annotations

import socket

import trio

from vfiouser_oob.transport.fds import close_fds
from vfiouser_oob.transport.message_socket import EndOfStream, MessageSocket
from vfiouser_oob.transport.reaper import Account
from vfiouser_protocol.errors import StreamError
from vfiouser_protocol.limits import Limits
from vfiouser_protocol.session import CommandReceived, ConnectionEnd, ProtocolSession

#: Seconds that a client which is not wanted may take for its first message.
_PATIENCE_S = 1.0


class TurnedAway(Exception):
    """A client cannot be served now.

    Args:
        reason: why, for log and status.
        number: the errno that its VERSION is answered with.
    """

    def __init__(self, reason: str, number: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.errno = number


async def turn_away(sock: socket.socket, number: int, account: Account) -> None:
    """Answer the first command with an error and close.

    Args:
        sock: the connected socket; owned from now on.
        number: the errno.
        account: where its descriptors are counted.
    """
    limits = Limits()
    session = ProtocolSession(ConnectionEnd.SERVER, limits)
    stream = MessageSocket(sock, limits.max_message_size, account=account)
    try:
        with trio.move_on_after(_PATIENCE_S):
            message = await stream.receive()
            close_fds(message.fds)
            event = session.receive(message._replace(fds=[]))
            if isinstance(event, CommandReceived):
                stream.send(session.error_reply(event.header, number))
    except (EndOfStream, StreamError):
        pass
    finally:
        stream.close()
