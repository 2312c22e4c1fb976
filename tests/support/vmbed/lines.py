"""A UNIX socket that a peer process connects to, and that carries lines.

The test listens and the peer connects, so that there is nothing to retry: the connection is there
once `accept` returns.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from vmbed.errors import BedError
from vmbed.processes import LoggedProcess

__all__ = ["LineListener", "LineStream"]

CHUNK = 65536


class LineStream:
    """Lines in both directions over one stream; a peer that closes is an error."""

    def __init__(self, stream: trio.SocketStream, peer: LoggedProcess) -> None:
        self._stream = stream
        self._peer = peer
        self._buffer = bytearray()

    async def send(self, line: str) -> None:
        """Send one line."""
        try:
            await self._stream.send_all(line.encode() + b"\n")
        except trio.BrokenResourceError as error:
            raise await self._peer.gone(f"sending {line[:60]!r}") from error

    async def receive(self) -> str:
        """Return the next line, without its end.

        Raises:
            BedError: the peer closed the connection; the message has its log's end.
        """
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            try:
                chunk = await self._stream.receive_some(CHUNK)
            except trio.BrokenResourceError as error:
                raise await self._peer.gone("reading a line") from error
            if not chunk:
                raise await self._peer.gone("it closed the connection")
            self._buffer += chunk
        line = self._buffer[:end].decode(errors="replace").rstrip("\r")
        del self._buffer[: end + 1]
        return line

    def close(self) -> None:
        """Close the connection."""
        self._stream.socket.close()


class LineListener:
    """Listens on one path for the one connection of a peer that is yet to be started."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket: trio.socket.SocketType | None = None
        self._accepted: list[LineStream] = []

    async def __aenter__(self) -> Self:
        """Bind and listen."""
        self._socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await self._socket.bind(str(self.path))
        self._socket.listen(1)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening, and close what was accepted."""
        for stream in self._accepted:
            stream.close()
        if self._socket is not None:
            self._socket.close()
        self.path.unlink(missing_ok=True)

    async def accept(self, peer: LoggedProcess) -> LineStream:
        """Wait for the peer's connection.

        Raises:
            BedError: the peer ended instead.
        """
        listening = self._socket
        if listening is None:
            raise BedError(f"not listening on {self.path}")
        connection, _ = await peer.unless_it_ends(listening.accept, f"before it connected to {self.path.name}")
        stream = LineStream(trio.SocketStream(connection), peer)
        self._accepted.append(stream)
        return stream
