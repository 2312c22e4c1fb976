"""Listening sockets that systemd passed, for as long as the daemon runs: functions come and go, their sockets stay."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import FunctionConfig


@dataclass(frozen=True, slots=True)
class PassedSocket:
    """A listening socket that the service manager opened.

    Args:
        name: what its unit calls it.
        sock: the socket; owned from now on.
    """

    name: str
    sock: socket.socket

    @property
    def path(self) -> str:
        """Where it listens; empty for one without a path."""
        address = self.sock.getsockname()
        return str(Path(address)) if isinstance(address, str) and address else ""

    def __str__(self) -> str:
        return f"{self.name!r}" + (f" at {self.path}" if self.path else "")


class SocketShelf:
    """The sockets that were passed. Each function that fits gets a descriptor of its own of them, whenever it comes.

    Args:
        passed: descriptors by name; owned from now on.
        known: the names of all functions that are configured; whoever comes later is known from then on.
    """

    def __init__(self, passed: Mapping[str, Sequence[int]], known: Iterable[str] = ()) -> None:
        self._known = set(known)
        self._lent: list[PassedSocket] = []
        self._sockets = [PassedSocket(name, socket.socket(fileno=fd)) for name, fds in passed.items() for fd in fds]

    def _fitting(self, config: FunctionConfig) -> list[PassedSocket]:
        """The sockets for a function.

        A socket belongs to the function of its name, or else to the one that is configured with its path (a unit with
        several ListenStream= lines gives all of them one name), or else to the only function there is.
        """
        if len(self._sockets) == 1 and self._known <= {config.name}:
            return list(self._sockets)
        path = None if config.socket is None else str(config.socket)
        return [
            each
            for each in self._sockets
            if each.name == config.name or (each.name not in self._known and each.path == path)
        ]

    def take(self, config: FunctionConfig) -> list[int]:
        """Descriptors of the sockets for a function.

        Args:
            config: the function.

        Returns:
            New descriptors, the caller's; none if the function makes its own socket.

        Raises:
            ConfigError: it has neither a socket of its own nor one of these.
        """
        self._known.add(config.name)
        fitting = self._fitting(config)
        if not fitting and config.socket is None and config.fd is None:
            others = ", ".join(map(str, self._sockets))
            raise ConfigError(
                f"function {config.name!r} has no socket configured, and systemd passed none for it"
                f"{f' (came: {others})' if others else ''}; give it the line `socket = "
                f'"/run/vfio-user/{config.name}.sock"`'
            )
        return [os.dup(each.sock.fileno()) for each in fitting]

    def lend(self, name: str, path: Path) -> int | None:
        """A descriptor of a socket that is no function's.

        Args:
            name: what its unit would call it.
            path: where it would listen.

        Returns:
            A new descriptor, the caller's; None if none such was passed.
        """
        found = next((each for each in self._sockets if each.name == name or each.path == str(path)), None)
        if found is None:
            return None
        self._lent.append(found)
        return os.dup(found.sock.fileno())

    def unclaimed(self, configs: Sequence[FunctionConfig]) -> Iterator[PassedSocket]:
        """Sockets that fit none of these functions, and were not lent."""
        claimed = {id(each) for config in configs for each in self._fitting(config)} | set(map(id, self._lent))
        return (each for each in self._sockets if id(each) not in claimed)

    def close(self) -> None:
        """Close them; systemd goes on listening."""
        for each in self._sockets:
            each.sock.close()
