"""The receiving end of sd_notify, for waiting until a service says that it is ready.

Spec: sd_notify(3): datagrams of `NAME=VALUE` lines to the socket named by $NOTIFY_SOCKET.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from vmbed.processes import LoggedProcess, deadline

__all__ = ["NotifySocket"]

MAX_DATAGRAM = 4096


class NotifySocket:
    """What systemd would be to one service."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM)
        self.seen: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        """Bind the socket."""
        await self._socket.bind(str(self._path))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it and remove its file."""
        self._socket.close()
        self._path.unlink(missing_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        """What the service must find in its environment."""
        return {"NOTIFY_SOCKET": str(self._path)}

    async def wait_for(self, name: str, value: str, process: LoggedProcess, seconds: float) -> None:
        """Wait until the service has said `NAME=VALUE`; fails at once when it ends instead."""

        async def listen() -> None:
            while self.seen.get(name) != value:
                for line in (await self._socket.recv(MAX_DATAGRAM)).decode(errors="replace").splitlines():
                    key, _, said = line.partition("=")
                    self.seen[key] = said

        with deadline(seconds, f"{name}={value} from {process.name}", process.log):
            await process.unless_it_ends(listen, f"before it said {name}={value}")

    async def ready(self, process: LoggedProcess, seconds: float = 20.0) -> None:
        """Wait for READY=1."""
        await self.wait_for("READY", "1", process, seconds)
