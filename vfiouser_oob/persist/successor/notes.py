"""What a device says of its client, for whoever goes on with that client; and what it is told of it afterwards."""

from __future__ import annotations

import socket as socket_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vfiouser_oob.persist.stream_memory import StreamMemory
from vfiouser_oob.persist.successor.things import LineThing, RangeThing, SnapshotThing, VectorThing, VfioThing
from vfiouser_oob.transport.fds import HasFileno, OwnedFd, close_fds
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
        regions: memory of the device, by the index of its region, or what else the device called it.
        eventfds: the client's eventfds, each with what it is for.
        lines: what IRQ indices remember beside them.
        snapshot: what the device has left of its state; None if it had no time to.
        kernel: what the kernel has opened of the device.
    """

    agreed: Negotiated | None = None
    streams: Sequence[KeptStream] = ()
    ranges: Sequence[tuple[RangeThing, OwnedFd | None]] = ()
    assigned: Mapping[int, bytes] = field(default_factory=dict)
    regions: Mapping[int, OwnedFd] = field(default_factory=dict)
    eventfds: Sequence[tuple[VectorThing, OwnedFd]] = ()
    lines: Sequence[LineThing] = ()
    snapshot: SnapshotThing | None = None
    kernel: Sequence[tuple[VfioThing, OwnedFd]] = ()

    def close(self) -> None:
        """Close what nobody took."""
        for stream in self.streams:
            stream.close()
        close_fds([file for _, file in self.ranges if file is not None])
        close_fds(self.regions.values())
        close_fds([fd for _, fd in self.eventfds])
        close_fds([fd for _, fd in self.kernel])


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

    def region(self, index: int, memory: HasFileno) -> None:
        """Memory of the device, by the index of its region, or what else the device calls it."""

    def kernel_handle(self, number: int, fd: HasFileno, space: int) -> None:
        """What the kernel has opened of the device, by a number that the device knows."""

    def eventfd(self, index: int, vector: int, action: int, fd: HasFileno | None) -> None:
        """The eventfd that a vector has for an action from now on; None for none."""

    def line(self, thing: LineThing) -> None:
        """What an IRQ index remembers."""

    def snapshot(self, thing: SnapshotThing | None) -> None:
        """The device's state is in its memory; None: that is old from now on."""

    def config_written(self, offset: int, data: bytes) -> None:
        """A doubleword of configuration space: its bytes, and one byte for each that says whether it was written."""

    def config_forgotten(self) -> None:
        """Nothing of it counts any more."""
