"""A VM's memory on two hosts, in one process: what QEMU's migration of it brings along, and what it does not.

`Guest` is a QEMU as far as memory goes: it marks what comes by messages, sends what is marked, and answers no message
while it waits for somebody.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

import trio

from vfiouser_oob.devices.base import Answer, BackendSession, ClientLink, DeviceDescription
from vfiouser_oob.memory.guest import GuestMemory
from vfiouser_oob.memory.recorder import WriteRecorder
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.dirty import DirtyLog
from vfiouser_protocol.errors import CommandError, DmaFault
from vfiouser_protocol.messages import DmaMap, DmaUnmap, SetIrqs

PAGE = 4096
READ_WRITE = 3


class Clock:
    """Time that passes when it is told to; both clocks show the same."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """What it shows."""
        return self.now


class Posted:
    """A message that waits for its answer."""

    def __init__(self, address: int, data: bytes) -> None:
        self.address = address
        self.data = data
        self.done = trio.Event()
        self.fault: DmaFault | None = None

    @property
    def answered(self) -> bool:
        """Whether it was answered."""
        return self.done.is_set()

    async def wait(self) -> None:
        """Wait for the answer."""
        await self.done.wait()
        if self.fault is not None:
            raise DmaFault(str(self.fault), self.fault.errno)


class Guest(ClientLink):
    """A QEMU's side of guest memory.

    Args:
        pages: how many there are.
        pages_without_file: how many more there are behind them that no file has.
    """

    def __init__(self, pages: int, pages_without_file: int = 0) -> None:
        self.pages = pages
        self.size = pages * PAGE
        self.fd = OwnedFd(os.memfd_create("guest", os.MFD_ALLOW_SEALING))
        os.ftruncate(self.fd.fileno(), self.size)
        self.private = bytearray(pages_without_file * PAGE)
        #: Pages that are still to be sent; None while there is no migration.
        self.dirty: set[int] | None = None
        self.queue: list[Posted] = []
        #: Whether messages are answered as they come.
        self.free = True

    async def dma_read(self, address: int, count: int) -> bytes:
        """Answer a read, once everything before it is carried out."""
        await self.bus_write(0, b"").wait()
        return self.peek(address, count)

    async def dma_write(self, address: int, data: bytes) -> None:
        """Carry a write out, when its turn comes."""
        await self.bus_write(address, data).wait()

    def bus_write(self, address: int, data: bytes) -> Posted:
        """Take a write."""
        posted = Posted(address, data)
        self.queue.append(posted)
        if self.free:
            self.work()
        return posted

    def work(self, most: int = 1 << 30) -> None:
        """The main loop: carry out what waits.

        Args:
            most: how many messages.
        """
        for _ in range(min(most, len(self.queue))):
            posted = self.queue.pop(0)
            self.poke(posted.address, posted.data)
            if posted.data:
                self.mark(posted.address, len(posted.data))
            posted.done.set()

    def mark(self, address: int, length: int) -> None:
        """A page was written, and QEMU knows; it is a log that a carrier has, too."""
        if self.dirty is not None and length:
            self.dirty.update(range(address // PAGE, (address + length - 1) // PAGE + 1))

    def poke(self, address: int, data: bytes) -> None:
        """Put bytes into memory, as somebody whom QEMU does not see."""
        in_file = max(0, min(len(data), self.size - address))
        if in_file:
            os.pwrite(self.fd.fileno(), data[:in_file], address)
        if in_file < len(data):
            start = address + in_file - self.size
            self.private[start : start + len(data) - in_file] = data[in_file:]

    def peek(self, address: int, count: int) -> bytes:
        """Look at memory."""
        in_file = max(0, min(count, self.size - address))
        found = os.pread(self.fd.fileno(), in_file, address) if in_file else b""
        start = address + in_file - self.size
        return found + (bytes(self.private[start : start + count - in_file]) if in_file < count else b"")

    # Migration

    def begin(self) -> None:
        """A migration begins: everything is to be sent."""
        self.dirty = set(range(self.pages + len(self.private) // PAGE))

    def send(self, other: Guest, most: int = 1 << 30) -> None:
        """Send what is marked.

        Args:
            other: to whom.
            most: how many pages.
        """
        assert self.dirty is not None
        for page in sorted(self.dirty)[:most]:
            self.dirty.discard(page)
            other.poke(page * PAGE, self.peek(page * PAGE, PAGE))

    @property
    def content(self) -> bytes:
        """All of the memory."""
        return self.peek(0, self.size) + bytes(self.private)

    def fail(self, reason: str) -> None:
        """Not used."""
        raise AssertionError(reason)

    def close(self) -> None:
        """Give the memory back."""
        self.fd.close_at_once()


class MemoryOnly(BackendSession):
    """A device that is nothing but its client's memory.

    Args:
        guest: the client.
        clock: of its recorder.
        seen: whether we see all that it writes.
        disturbs: whether it has to stand when its way changes.
        routable: whether it can write by messages.
    """

    def __init__(
        self, guest: Guest, clock: Clock, *, seen: bool = True, disturbs: bool = False, routable: bool = True
    ) -> None:
        self.device_seen = seen
        self.routing_disturbs = disturbs
        self.guest = guest
        self.by_message = False
        self._routable = routable
        self._unreported = DirtyLog(PAGE)
        self.description = DeviceDescription((), (), 0)
        self.memory = GuestMemory(guest, 64, by_message=False, check_files=True)
        self.memory.recorder = WriteRecorder(clock)
        copy = guest.fd.duplicate()
        self.dma_map(DmaMap(32, READ_WRITE, 0, 0, guest.size), [copy])
        copy.close()
        if guest.private:
            self.dma_map(DmaMap(32, READ_WRITE, 0, guest.size, len(guest.private)), [])

    async def route_dma(self, *, by_message: bool) -> None:
        """Note the way."""
        await trio.lowlevel.checkpoint()
        if by_message and not self._routable:
            raise CommandError("it cannot", errno.ENOTSUP)
        self.by_message = by_message

    async def write(self, address: int, data: bytes) -> None:
        """The device writes: past us, or to us, as a model or an upstream server does."""
        if self.device_seen:
            await self.memory.write(address, data)
        elif self.by_message or address >= self.guest.size:
            await self.memory.relay_write(address, data)
        else:
            self.guest.poke(address, data)
            self._unreported.mark(address, len(data))

    async def collect(self) -> DirtyLog:
        """As its agent: report what it wrote past us."""
        await trio.lowlevel.checkpoint()
        found, self._unreported = self._unreported, DirtyLog(PAGE)
        return found

    def dma_map(self, request: DmaMap, fds: Sequence[OwnedFd]) -> None:
        """Map a range."""
        self.memory.add(request, fds, self.memory.examine(fds))

    def dma_unmap(self, request: DmaUnmap) -> Answer[None]:
        """Unmap a range."""
        self.memory.remove(request)
        return None

    def dma_unmap_all(self) -> Answer[None]:
        """Unmap everything."""
        self.memory.remove_all()
        return None

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """It has no registers."""
        return bytes(count)

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool) -> Any:
        """It has no registers."""

    def set_irqs(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> Any:
        """It has no interrupts."""

    def reset(self) -> Any:
        """It has nothing to reset."""

    async def close(self) -> None:
        """Give its memory up."""
        self.memory.close()
        await trio.lowlevel.checkpoint()
