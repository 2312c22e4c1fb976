"""Datagrams to the service manager, with descriptors attached, in order; whoever sends never waits.

A manager that is busy gets what it missed as soon as it reads again. What it cannot get any more is counted and said:
nothing is lost in silence.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Sequence

import trio

from vfiouser_oob.observability import log
from vfiouser_oob.transport.fds import HasFileno, OwnedFd, close_fds

#: The kernel has too many descriptors of this user under way; it does not tell when that has changed.
_CROWDED_S = 0.02


class Mailbox:
    """What is to be sent to one socket of the manager.

    Args:
        address: path of its datagram socket, or ``@name`` in the abstract namespace; None = nobody listens.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address
        self._log = log.get("systemd.notify")
        self._waiting: deque[tuple[bytes, Sequence[OwnedFd]]] = deque()
        self._put_off = trio.Event()
        #: Messages that the manager will never get.
        self.lost = 0

    @property
    def waiting(self) -> int:
        """Messages that were not sent yet."""
        return len(self._waiting)

    def send(self, data: bytes, fds: Sequence[HasFileno] = ()) -> bool:
        """Send a message, now or as soon as the manager takes it.

        Args:
            data: the message.
            fds: descriptors that go with it; they stay the caller's and may be closed at once.

        Returns:
            Whether it was sent.
        """
        if self.address is None:
            return False
        try:
            self._waiting.append((data, _copies(fds)))
        except OSError as error:
            self.lost += 1
            self._warn([data], error)
            return False
        try:
            with _connected(self.address) as sock:
                self._send_waiting(sock)
        except OSError as error:
            self._lose(error)
            return False
        if self._waiting:
            self._put_off.set()
        return not self._waiting

    async def run(self) -> None:
        """Send what the manager did not take at once, until cancelled."""
        while True:
            await self._put_off.wait()
            try:
                with _connected(self.address or "") as sock:
                    while self._waiting:
                        await trio.lowlevel.wait_writable(sock)
                        if self._send_waiting(sock):
                            await trio.sleep(_CROWDED_S)
            except OSError as error:
                self._lose(error)
            self._put_off = trio.Event()

    def _send_waiting(self, sock: socket.socket) -> bool:
        """Send in order until the manager's queue is full; returns whether the kernel has too many descriptors."""
        while self._waiting:
            data, fds = self._waiting[0]
            try:
                if fds:
                    socket.send_fds(sock, [data], [fd.fileno() for fd in fds], socket.MSG_NOSIGNAL)
                else:
                    sock.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    return True
                raise
            self._waiting.popleft()
            close_fds(fds)
        return False

    def _lose(self, error: OSError) -> None:
        waiting, self._waiting = list(self._waiting), deque()
        self.lost += len(waiting)
        for _, fds in waiting:
            close_fds(fds)
        self._warn([data for data, _ in waiting], error)

    def _warn(self, messages: Sequence[bytes], error: OSError) -> None:
        text = b",".join(messages[:10]).decode(errors="replace")
        self._log.warning(
            "the service manager could not be told", fields=text, messages=len(messages), error=error.strerror
        )

    def close(self) -> None:
        """Drop what was not sent."""
        while self._waiting:
            _, fds = self._waiting.popleft()
            close_fds(fds)


def _connected(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        # A leading @ stands for the NUL of the abstract namespace.
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
    except BaseException:
        sock.close()
        raise
    return sock


def _copies(fds: Sequence[HasFileno]) -> Sequence[OwnedFd]:
    """Own descriptors of the same files: whoever sends them may close theirs before their turn comes."""
    copies: list[OwnedFd] = []
    try:
        for fd in fds:
            copy = fd.duplicate() if isinstance(fd, OwnedFd) else OwnedFd(os.dup(fd.fileno()))
            copies.append(copy)
    except OSError:
        close_fds(copies)
        raise
    return copies
