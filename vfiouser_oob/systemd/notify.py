"""Telling the service manager how far we are, as sd_notify(3) does.

Without NOTIFY_SOCKET nobody wants to know, and every call does nothing. A manager that is busy gets what it missed as
soon as it reads again, in order: a unit whose READY=1 was lost would run into its start time-out.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from vfiouser_oob.systemd.mailbox import Mailbox

ENVIRONMENT_VARIABLE = "NOTIFY_SOCKET"


class Notifier:
    """Sends state changes to the service manager.

    Args:
        address: path of its datagram socket, or ``@name`` in the abstract namespace; None = nobody listens.
    """

    def __init__(self, address: str | None) -> None:
        #: Where the messages go; what else is sent by it keeps its place among them.
        self.mailbox = Mailbox(address)

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
        await self.mailbox.run()

    def _send(self, *fields: str) -> bool:
        return self.mailbox.send("\n".join(fields).encode(errors="surrogateescape"))


def _status_field(text: str | None) -> tuple[str, ...]:
    return () if text is None else ("STATUS=" + " ".join(text.split()),)
