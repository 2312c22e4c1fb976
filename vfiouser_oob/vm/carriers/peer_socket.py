"""A connected UNIX socket whose peer may send anything, descriptors too.

Descriptors are received even where none are wanted: what the kernel discards it closes in the middle of our call, and
that may take as long as their owner likes (`transport/reaper.py`).
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Protocol

import trio

from vfiouser_oob.transport.fds import ForeignFd, close_fds
from vfiouser_oob.transport.reaper import Account

#: The kernel carries at most 253 descriptors per message (SCM_MAX_FD).
_ANCILLARY = socket.CMSG_SPACE(253 * 4)
_RECEIVE = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
_LOOK = _RECEIVE | socket.MSG_PEEK
_SEND = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
#: Seconds that a peer may take until it reads what is sent to it.
SEND_S = 30.0


class PeerGone(Exception):
    """The peer has closed the connection, or it is to be closed; the text says why."""


class Pauses(Protocol):
    """Told when a socket is read."""

    def reads(self) -> None:
        """Bytes may be taken out of it from now on."""

    def rests(self) -> None:
        """There are none, and those that come are waited for."""


class PeerSocket:
    """A stream whose reads and writes never block the event loop.

    Args:
        sock: a connected socket; owned from now on.
        account: where the peer's descriptors are counted.
    """

    def __init__(self, sock: socket.socket, account: Account) -> None:
        self._sock = sock
        self._account = account
        self._sending = trio.Lock()
        #: What is received also stays in the socket, until it is taken.
        self.held = False
        self._looked = 0

    async def receive(
        self, size: int, pauses: Pauses | None = None, held_size: int = 0
    ) -> tuple[bytes, list[ForeignFd]]:
        """Wait for bytes.

        Args:
            size: how many at most.
            pauses: told when the socket is read.
            held_size: how many at most if they also stay in the socket.

        Returns:
            The bytes, and the descriptors that came with them, owned by the caller.

        Raises:
            PeerGone: there are no more, or descriptors were lost.
        """
        while True:
            # Also with data at hand, so that a peer that always has some does not keep the others waiting.
            await trio.lowlevel.checkpoint()
            if pauses is not None:
                pauses.reads()
            try:
                way = (held_size, _LOOK) if self.held else (size, _RECEIVE)
                data, ancillary, flags, _ = self._sock.recvmsg(way[0], _ANCILLARY, way[1])
            except BlockingIOError:
                if pauses is not None:
                    pauses.rests()
                await trio.lowlevel.wait_readable(self._sock)
                continue
            except OSError as error:
                raise PeerGone(f"the connection broke: {error.strerror}") from error
            fds = self._owned(ancillary)
            if flags & socket.MSG_CTRUNC or self._account.held_up:
                close_fds(fds)
                raise PeerGone("its descriptors were lost, or earlier ones cannot be closed")
            if not data:
                close_fds(fds)
                raise PeerGone("it closed the connection")
            self._looked = len(data) if self.held else 0
            return data, fds

    def take(self) -> None:
        """Take out of the socket what was received last, if it is still there; it is received again otherwise."""
        while self._looked:
            data, ancillary, _, _ = self._sock.recvmsg(self._looked, _ANCILLARY, _RECEIVE)
            close_fds(self._owned(ancillary))
            self._looked = self._looked - len(data) if data else 0

    def fileno(self) -> int:
        """Return the descriptor's number; it stays this object's."""
        return self._sock.fileno()

    def leave(self) -> None:
        """Close our descriptor and leave the connection to who has another one."""
        trio.lowlevel.notify_closing(self._sock)
        ForeignFd(self._sock.detach(), self._account).close()

    async def receive_alone(self, size: int, held_size: int = 0) -> bytes:
        """Wait for bytes; descriptors that come with them are closed."""
        data, fds = await self.receive(size, held_size=held_size)
        close_fds(fds)
        return data

    def _owned(self, ancillary: list[tuple[int, int, bytes]]) -> list[ForeignFd]:
        fds: list[ForeignFd] = []
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(data) - len(data) % 4
                fds += [ForeignFd(number, self._account) for number in memoryview(data)[:whole].cast("i")]
        return fds

    async def send(self, data: bytes) -> None:
        """Send bytes, whole before those of anybody else.

        Raises:
            PeerGone: the peer has gone, or does not read.
        """
        if not data:
            return
        with trio.move_on_after(SEND_S) as patience:
            async with self._sending:
                await self._send_all(memoryview(data))
        if patience.cancelled_caught:
            raise PeerGone(f"it has not read an answer for {SEND_S:g} s")

    async def _send_all(self, view: memoryview) -> None:
        while view:
            try:
                view = view[self._sock.send(view, _SEND) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)
            except OSError as error:
                raise PeerGone(f"the connection broke: {error.strerror}") from error

    def close(self) -> None:
        """Close the connection; what is still unread goes with it, elsewhere than on the event loop."""
        if self._sock.fileno() < 0:
            return
        trio.lowlevel.notify_closing(self._sock)
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        ForeignFd(self._sock.detach(), self._account).close()
