"""What a device leaves to the process after it, kept in the test's own."""

from __future__ import annotations

import os
from collections.abc import Callable

from vfiouser_oob.persist.stream_memory import StreamMemory
from vfiouser_oob.persist.successor.notes import DeviceNotes, Inheritance
from vfiouser_oob.persist.successor.things import LineThing, RangeThing, SnapshotThing, VectorThing, VfioThing
from vfiouser_oob.transport.fds import HasFileno, OwnedFd, close_fds
from vfiouser_protocol.capabilities import Negotiated


class Notes(DeviceNotes):
    """What was taken down, kept as a journal and a service manager would.

    Args:
        copy_of_handle: copies a descriptor of the kernel's, where that is a played one.
    """

    def __init__(self, copy_of_handle: Callable[[HasFileno], OwnedFd] | None = None) -> None:
        self._copy_of_handle = copy_of_handle or _copy
        self.kernel: dict[int, tuple[VfioThing, OwnedFd]] = {}
        self.vectors: dict[int, bytes] = {}
        self.ranges: dict[int, tuple[RangeThing, OwnedFd | None]] = {}
        self.memories: dict[int, OwnedFd] = {}
        self.eventfds: dict[tuple[int, int, int], OwnedFd] = {}
        self.lines: dict[int, LineThing] = {}
        self.left: SnapshotThing | None = None

    def mapped(self, thing: RangeThing, file: HasFileno | None) -> None:
        """A range."""
        self.ranges[thing.address] = thing, None if file is None else _copy(file)

    def unmapped(self, address: int) -> None:
        """A range is gone."""
        _, file = self.ranges.pop(address)
        if file is not None:
            file.close()

    def region(self, index: int, memory: HasFileno) -> None:
        """Memory."""
        self.memories[index] = _copy(memory)

    def eventfd(self, index: int, vector: int, action: int, fd: HasFileno | None) -> None:
        """An eventfd."""
        close_fds([old for old in [self.eventfds.pop((index, vector, action), None)] if old is not None])
        if fd is not None:
            self.eventfds[index, vector, action] = _copy(fd)

    def line(self, thing: LineThing) -> None:
        """An index."""
        self.lines[thing.index] = thing

    def snapshot(self, thing: SnapshotThing | None) -> None:
        """A snapshot."""
        self.left = thing

    def kernel_handle(self, number: int, fd: HasFileno, space: int) -> None:
        """What the kernel has opened."""
        self.kernel[number] = VfioThing(number, "", space), self._copy_of_handle(fd)

    def inherited(self) -> Inheritance:
        """What the next process is given."""
        return Inheritance(
            ranges=[(thing, None if fd is None else fd.duplicate()) for thing, fd in self.ranges.values()],
            regions={index: memory.duplicate() for index, memory in self.memories.items()},
            eventfds=[(VectorThing(*place, ""), fd.duplicate()) for place, fd in self.eventfds.items()],
            lines=list(self.lines.values()),
            snapshot=self.left,
            assigned=self.vectors,
            kernel=[(thing, self._copy_of_handle(fd)) for thing, fd in self.kernel.values()],
        )

    def close(self) -> None:
        """The manager keeps nothing any more, but for the kernel's handles: those are the caller's."""
        close_fds([*self.memories.values(), *self.eventfds.values()])
        close_fds([fd for _, fd in self.ranges.values() if fd is not None])

    # There is no server behind these devices, and nobody asks about their config space.

    def server_connected(self, sock: HasFileno) -> StreamMemory:
        """Never."""
        raise NotImplementedError

    def server_lost(self) -> None:
        """Never."""

    def server_agreed(self, agreed: Negotiated, twin: HasFileno | None) -> StreamMemory | None:
        """Never."""

    def assigned(self, index: int, vectors: bytes) -> None:
        """Vectors with eventfds."""
        self.vectors[index] = vectors

    def config_written(self, offset: int, data: bytes) -> None:
        """Never."""

    def config_forgotten(self) -> None:
        """Never."""


def _copy(fd: HasFileno) -> OwnedFd:
    return OwnedFd(os.dup(fd.fileno()))
