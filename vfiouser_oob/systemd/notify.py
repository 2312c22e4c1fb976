"""Telling the service manager how far we are, as sd_notify(3) does.

Without NOTIFY_SOCKET nobody wants to know, and every call does nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

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

    def _send(self, *fields: str) -> bool:
        if self._address is None:
            return False
        # A leading @ stands for the NUL of the abstract namespace.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        data = "\n".join(fields).encode(errors="surrogateescape")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                # The event loop must not wait for a manager that does not read.
                sock.setblocking(False)
                sock.sendto(data, address)
        except OSError as error:
            self._log.warning("the service manager could not be told", fields=",".join(fields), error=error)
            return False
        return True


def _status_field(text: str | None) -> tuple[str, ...]:
    return () if text is None else ("STATUS=" + " ".join(text.split()),)
