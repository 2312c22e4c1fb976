"""What carries the bytes of a connection: a socket of the system's, used without a copy in between, or any stream."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import trio

from .messages import Buffer, Codec, Message

#: Bytes read at once where the codec does not say how many are to come: room for many messages, or the head of a large
#: one whose rest is then read to where it stays.
HEAD_SIZE = 16 << 10
#: Bytes read at once from a stream that has no descriptor.
READ_SIZE = 256 << 10
#: Bytes that a TCP socket shall take at once, if the system permits: a message with a large value. Within one machine
#: less, so that the peer finds most of them in a processor's cache: what has left it costs half as much again.
_UNSENT = 2 << 20
_UNSENT_NEAR = 512 << 10
_MOST_UNSENT = Path("/proc/sys/net/core/wmem_max")
#: Bytes of a large value that have to be there before we look.
_WAKE_AT = 256 << 10
#: Buffers that one system call takes.
_MOST_BUFFERS = 64


class Carrier(Protocol):
    """A connection's bytes."""

    async def receive(self, codec: Codec) -> tuple[int, Iterable[Message]]:
        """Wait for bytes and give them to a codec.

        Returns:
            How many came, 0 at the end, and the messages that are complete with them.

        Raises:
            trio.BrokenResourceError: the connection broke.
            trio.ClosedResourceError: it was closed on this side.
            OSError: the same.
        """

    def send_now(self, pieces: Sequence[Buffer]) -> Sequence[Buffer]:
        """Send what can be sent at once; nobody else may be sending. Returns the rest.

        Raises:
            OSError: the connection broke.
        """

    async def send(self, pieces: Sequence[Buffer]) -> None:
        """Send everything.

        Raises:
            trio.BrokenResourceError: the connection broke.
            trio.ClosedResourceError: it was closed on this side.
            OSError: the same.
        """


class StreamCarrier:
    """Any stream, such as TLS.

    Args:
        stream: the stream.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def receive(self, codec: Codec) -> tuple[int, Iterable[Message]]:
        """See `Carrier`."""
        data = bytes(await self._stream.receive_some(READ_SIZE))
        return len(data), codec.feed(data) if data else ()

    def send_now(self, pieces: Sequence[Buffer]) -> Sequence[Buffer]:
        """Nothing: a stream may always have to wait."""
        return pieces

    async def send(self, pieces: Sequence[Buffer]) -> None:
        """See `Carrier`."""
        for piece in pieces:
            await self._stream.send_all(piece)


class SocketCarrier:
    """A socket.

    Args:
        stream: the socket's stream; nobody else reads or writes it.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket
        self._head = memoryview(bytearray(HEAD_SIZE))
        self._least = 1
        if self._socket.family in (socket.AF_INET, socket.AF_INET6):
            size = _UNSENT_NEAR if _is_near(self._socket) else _UNSENT
            if _most_unsent() >= size:
                # Left alone, the system begins with room for a tenth of a piece of state.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    @property
    def _fd(self) -> int:
        fd = self._socket.fileno()
        # Its number may belong to another file by now.
        if fd < 0:
            raise trio.ClosedResourceError("the socket was closed on this side")
        return fd

    async def receive(self, codec: Codec) -> tuple[int, Iterable[Message]]:
        """See `Carrier`."""
        head, room = self._head, codec.room()
        while True:
            # Each waking costs more than copying what it is for.
            self._wake_at(1 if room is None else min(len(room), _WAKE_AT))
            try:
                if room is None:
                    count = os.readv(self._fd, (head,))
                    return count, codec.feed(bytes(head[:count])) if count else ()
                count = os.readv(self._fd, (room, head))
                break
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._fd)
        size = len(room)
        if count <= size:
            return count, codec.filled(count) if count else ()
        return count, _both(codec, size, bytes(head[: count - size]))

    def _wake_at(self, least: int) -> None:
        """Have us woken once so many bytes are there, or the end is."""
        if least != self._least:
            self._least = least
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)

    def send_now(self, pieces: Sequence[Buffer]) -> Sequence[Buffer]:
        """See `Carrier`."""
        fd = self._fd
        left = pieces
        try:
            while left:
                left = _behind(left, os.writev(fd, left[:_MOST_BUFFERS]))
        except BlockingIOError:
            pass
        return left

    async def send(self, pieces: Sequence[Buffer]) -> None:
        """See `Carrier`."""
        while pieces := self.send_now(pieces):
            await trio.lowlevel.wait_writable(self._fd)


def _is_near(sock: trio.socket.SocketType) -> bool:
    """Whether the peer is on this machine."""
    try:
        return bool(sock.getpeername()[0] == sock.getsockname()[0])
    except OSError:  # gone already, which the first use will find
        return False


def _most_unsent() -> int:
    """Bytes that the system lets a socket hold when told to; 0 if that is not known."""
    try:
        return int(_MOST_UNSENT.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _both(codec: Codec, size: int, more: bytes) -> Iterable[Message]:
    yield from codec.filled(size)
    yield from codec.feed(more)


def _behind(pieces: Sequence[Buffer], count: int) -> Sequence[Buffer]:
    """What follows the first bytes of buffers."""
    for number, piece in enumerate(pieces):
        if count < len(piece):
            return [memoryview(piece)[count:], *pieces[number + 1 :]]
        count -= len(piece)
    return ()


def carrier(stream: trio.abc.Stream) -> Carrier:
    """The best way to use a stream.

    Args:
        stream: the stream.
    """
    return SocketCarrier(stream) if isinstance(stream, trio.SocketStream) else StreamCarrier(stream)
