"""What a device says of its client, for whoever goes on with that client; and what it is told of it afterwards."""

from __future__ import annotations

import socket as socket_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vfiouser_oob.persist.stream_memory import StreamMemory
from vfiouser_oob.persist.successor.things import RangeThing
from vfiouser_oob.transport.fds import HasFileno, OwnedFd
from vfiouser_protocol.capabilities import Negotiated


@dataclass(eq=False)
class KeptStream:
    """A socket and its memory, as another process has left them.

    Args:
        socket: the socket; whoever uses it takes it.
        memory: its memory; likewise. None if it has none yet.
    """

    socket: OwnedFd
    memory: OwnedFd | None

    def take_socket(self) -> socket_module.socket:
        """Take the socket alone."""
        return socket_module.socket(fileno=self.socket.detach())

    def take(self) -> tuple[socket_module.socket, StreamMemory]:
        """Take both; what cannot be used is closed.

        Raises:
            UnusableRecord: the stream cannot be followed.
            OSError: there is no memory.
        """
        assert self.memory is not None
        memory = StreamMemory.resume(self.memory)
        return self.take_socket(), memory

    def close(self) -> None:
        """Close what was not taken."""
        self.socket.close()
        if self.memory is not None:
            self.memory.close()


@dataclass(eq=False)
class Inheritance:
    """What a device needs of a client that another process has served.

    Args:
        agreed: what was negotiated with the server behind; None if there is none.
        streams: the connection to that: its socket, and its twin if there is one.
        ranges: the client's memory, each with its file.
        assigned: vectors with eventfds by IRQ index, one byte each.
    """

    agreed: Negotiated | None = None
    streams: Sequence[KeptStream] = ()
    ranges: Sequence[tuple[RangeThing, OwnedFd | None]] = ()
    assigned: Mapping[int, bytes] = field(default_factory=dict)


class DeviceNotes(Protocol):
    """Takes down what a device says of its client."""

    def server_connected(self, sock: HasFileno) -> StreamMemory:
        """A connection to the server behind the function; its memory is the caller's.

        Raises:
            OSError: there is none.
        """

    def server_lost(self) -> None:
        """The connection to it has ended; there may be another one."""

    def server_agreed(self, agreed: Negotiated, twin: HasFileno | None) -> StreamMemory | None:
        """What was negotiated with it, and the twin socket that it gave; returns that one's memory."""

    def mapped(self, thing: RangeThing, file: HasFileno | None) -> None:
        """The device may use a range from now on."""

    def unmapped(self, address: int) -> None:
        """It does not use it any more."""

    def assigned(self, index: int, vectors: bytes) -> None:
        """Which vectors have eventfds; one byte each."""

    def config_written(self, offset: int, data: bytes) -> None:
        """A doubleword of configuration space: its bytes, and one byte for each that says whether it was written."""

    def config_forgotten(self) -> None:
        """Nothing of it counts any more."""
