"""Writes of the guest that are on their way to the device, while nobody knows whether it runs."""

from __future__ import annotations

from collections import deque

import trio

from vfiouser_protocol.session import CommandReceived

#: Writes without reply that are held at most, and their bytes; what is more is lost, and said to be.
MAX_HELD = 4096
MAX_HELD_BYTES = 4 << 20


class HeldWrites:
    """Writes that want no reply, in the order of their arrival; `server.holding` decides which."""

    __slots__ = ("_bytes", "_drained", "_writes")

    def __init__(self) -> None:
        self._writes: deque[CommandReceived] = deque()
        self._bytes = 0
        self._drained = trio.Event()

    def __len__(self) -> int:
        return len(self._writes)

    @property
    def first(self) -> CommandReceived | None:
        """The one that is next."""
        return self._writes[0] if self._writes else None

    def add(self, write: CommandReceived) -> bool:
        """Hold one more.

        Args:
            write: what the client asked for.

        Returns:
            Whether there was room.
        """
        if len(self._writes) >= MAX_HELD or self._bytes + len(write.payload) > MAX_HELD_BYTES:
            return False
        self._writes.append(write)
        self._bytes += len(write.payload)
        return True

    def done(self, write: CommandReceived) -> None:
        """The first one is at the device, unless it has been made void meanwhile.

        Args:
            write: which.
        """
        if self.first is write:
            self._writes.popleft()
            self._bytes -= len(write.payload)
            if not self._writes:
                self._tell()

    def void(self) -> int:
        """Drop all.

        Returns:
            How many there were.
        """
        count = len(self._writes)
        self._writes.clear()
        self._bytes = 0
        self._tell()
        return count

    async def drained(self) -> None:
        """Wait until what was held back is at the device, or void."""
        while self._writes:
            await self._drained.wait()

    def _tell(self) -> None:
        self._drained.set()
        self._drained = trio.Event()
