"""Telling the service manager how far we are, as sd_notify(3) does.

Without NOTIFY_SOCKET nobody wants to know, and every call does nothing. A manager that is busy gets what it missed as
soon as it reads again, in order: a unit whose READY=1 was lost would run into its start time-out.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import MutableMapping

import trio

from vfiouser_oob.observability import log

ENVIRONMENT_VARIABLE = "NOTIFY_SOCKET"


class Notifier:
    """Sends state changes to the service manager.

    Args:
        address: path of its datagram socket, or ``@name`` in the abstract namespace; None = nobody listens.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._log = log.get("systemd.notify")
        self._waiting: deque[bytes] = deque()
        self._put_off = trio.Event()

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ, *, unset: bool = True) -> Notifier:
        """The notifier that the service manager asked for.

        Args:
            environ: the environment that names the socket.
            unset: whether to remove the name, so that our child processes do not speak for us.
        """
        address = environ.pop(ENVIRONMENT_VARIABLE, None) if unset else environ.get(ENVIRONMENT_VARIABLE)
        return cls(address or None)

    def ready(self, status: str | None = None) -> bool:
        """Start-up is complete: every socket listens.

        Args:
            status: one line for ``systemctl status``.

        Returns:
            Whether the message was sent.
        """
        return self._send("READY=1", *_status_field(status))

    def stopping(self, status: str | None = None) -> bool:
        """Shutdown has begun.

        Args:
            status: one line for ``systemctl status``.

        Returns:
            Whether the message was sent.
        """
        return self._send("STOPPING=1", *_status_field(status))

    def status(self, text: str) -> bool:
        """Change the line that ``systemctl status`` shows.

        Args:
            text: the line.

        Returns:
            Whether the message was sent.
        """
        return self._send(*_status_field(text))

    async def run(self) -> None:
        """Send what the manager did not take at once, until cancelled."""
        while True:
            await self._put_off.wait()
            try:
                with self._connected() as sock:
                    while self._waiting:
                        await trio.lowlevel.wait_writable(sock)
                        self._send_waiting(sock)
            except OSError as error:
                self._warn(error)
                self._waiting.clear()
            self._put_off = trio.Event()

    def _send(self, *fields: str) -> bool:
        if self._address is None:
            return False
        self._waiting.append("\n".join(fields).encode(errors="surrogateescape"))
        try:
            with self._connected() as sock:
                self._send_waiting(sock)
        except OSError as error:
            self._warn(error)
            self._waiting.clear()
            return False
        if self._waiting:
            self._put_off.set()
        return not self._waiting

    def _connected(self) -> socket.socket:
        assert self._address is not None
        # A leading @ stands for the NUL of the abstract namespace.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock

    def _send_waiting(self, sock: socket.socket) -> None:
        """Send in order until the manager's queue is full."""
        while self._waiting:
            try:
                sock.send(self._waiting[0])
            except BlockingIOError:
                return
            self._waiting.popleft()

    def _warn(self, error: OSError) -> None:
        text = b",".join(self._waiting).decode(errors="replace")
        self._log.warning("the service manager could not be told", fields=text, error=error.strerror)


def _status_field(text: str | None) -> tuple[str, ...]:
    return () if text is None else ("STATUS=" + " ".join(text.split()),)
