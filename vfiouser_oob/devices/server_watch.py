"""What is known of a server that we connect to for each client: whether it was there when somebody last looked."""

from __future__ import annotations

import os
import time
from pathlib import Path


class ServerWatch:
    """Remembers that a server could not be used, until it can, or another socket has taken its place.

    Nobody connects to find out: the server may serve one client at a time, and that is not us.

    Args:
        path: its socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reason: str | None = None
        self._since: float | None = None
        self._seen: tuple[int, int] | None = None

    def lost(self, reason: str) -> None:
        """It cannot be used.

        Args:
            reason: why.
        """
        if self._reason is None:
            self._since = time.time()
        self._reason, self._seen = reason, self._socket()

    def found(self) -> None:
        """It was used."""
        self._reason = self._since = None

    @property
    def reason(self) -> str | None:
        """Why it cannot be used, as far as is known; None if it can."""
        if self._reason is None and self._socket() is None:
            self.lost(f"no vfio-user server's socket is at {self.path}")
        # An orderly end takes the socket away after the connection; only another one is worth a try.
        if self._reason is not None and self._socket() not in (None, self._seen):
            self.found()
        return self._reason

    @property
    def since(self) -> float | None:
        """Since when, in seconds since 1970."""
        return None if self.reason is None else self._since

    def _socket(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_ino, status.st_ctime_ns
