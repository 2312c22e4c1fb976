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
        watchdog_s: seconds within which it wants to hear that we live, again and again; None if it does not care.
    """

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        self.watchdog_s = watchdog_s
        #: Where the messages go; what else is sent by it keeps its place among them.
        self.mailbox = Mailbox(address)

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ, *, unset: bool = True) -> Notifier:
        """The notifier that the service manager asked for.

        Args:
            environ: the environment that names the socket.
            unset: whether to remove the name, so that our child processes do not speak for us.
        """
        names = (ENVIRONMENT_VARIABLE, "WATCHDOG_USEC", "WATCHDOG_PID")
        address, microseconds, pid = (environ.pop(name, "") if unset else environ.get(name, "") for name in names)
        wanted = microseconds.isdecimal() and int(microseconds[:18]) > 0 and pid in ("", str(os.getpid()))
        return cls(address or None, int(microseconds[:18]) / 1e6 if wanted else None)

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

    def alive(self) -> bool:
        """We live, and the watchdog may begin to count anew.

        Returns:
            Whether the message was sent.
        """
        return self._send("WATCHDOG=1")

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
