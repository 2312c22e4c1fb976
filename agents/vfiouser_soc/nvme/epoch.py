"""One enabled life of the controller, from CC.EN = 1 to the next reset, and the only way to memory during it.

Every task that works for the host lives in the epoch's nursery, and every DMA access goes through its
`DmaPort`. When the epoch ends, its tasks are cancelled; a task that does not notice (an access to a
client's file does not yield to trio) is stopped by the port at its next access. So nothing that a guest
asked for before a reset touches memory after it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import trio

from vfiouser_soc.nvme.command import SubmissionEntry
from vfiouser_soc.nvme.prp import Segment, walk_prps

if TYPE_CHECKING:
    from vfiouser_oob.devices.model import ModelMemory
    from vfiouser_soc.nvme.cmb import ControllerMemoryBuffer


class Epoch:
    """The tasks of one enabled life; they may be asked for before the nursery is open."""

    def __init__(self) -> None:
        self.alive = True
        self._nursery: trio.Nursery | None = None
        self._early: list[Callable[[], Awaitable[None]]] = []

    async def run(self, on_open: Callable[[], None]) -> None:
        """Hold the tasks until `end` is called.

        Args:
            on_open: called once tasks can run.
        """
        if not self.alive:
            return
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(trio.sleep_forever)
            for task in self._early:
                nursery.start_soon(task)
            self._early.clear()
            on_open()
        self._nursery = None

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        """Start a task, now or as soon as the nursery is open; after the end nothing is started."""
        if not self.alive:
            return
        if self._nursery is None:
            self._early.append(task)
        else:
            self._nursery.start_soon(task)

    def end(self) -> None:
        """Cancel every task and refuse all further memory accesses."""
        self.alive = False
        self._early.clear()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()


class DmaPort:
    """Memory as one epoch may use it: the client's and, inside its window, the controller memory buffer.

    Args:
        epoch: whose accesses these are.
        memory: the client's memory.
        page_size: memory page size that the host chose, in bytes.
        cmb: the controller memory buffer, if there is one.
        written: told (address, bytes) of every write to the client's memory.
    """

    def __init__(
        self,
        epoch: Epoch,
        memory: ModelMemory,
        page_size: int,
        cmb: ControllerMemoryBuffer | None,
        written: Callable[[int, int], None] = lambda address, count: None,
    ) -> None:
        self._epoch = epoch
        self._memory = memory
        self._cmb = cmb
        self._written = written
        self.page_size = page_size

    async def read(self, address: int, count: int) -> bytes:
        """Read `count` bytes.

        Raises:
            DmaFault: no mapping allows it.
        """
        if not self._epoch.alive:
            await _stop()
        if self._cmb is None or not self._cmb.touches(address, count):
            return await self._memory.read(address, count)
        parts = []
        for piece in self._cmb.split(address, count):
            if piece.local:
                parts.append(self._cmb.read(piece.start, piece.length))
            else:
                parts.append(await self._memory.read(piece.start, piece.length))
        return b"".join(parts)

    async def write(self, address: int, data: bytes | memoryview) -> None:
        """Write bytes.

        Raises:
            DmaFault: no mapping allows it.
        """
        if not self._epoch.alive:
            await _stop()
        if self._cmb is None or not self._cmb.touches(address, len(data)):
            await self._write_client(address, data)
            return
        view = memoryview(data)
        for piece in self._cmb.split(address, len(data)):
            part, view = view[: piece.length], view[piece.length :]
            if not self._epoch.alive:  # an earlier piece may have waited, and the buffer may be the next client's
                await _stop()
            if piece.local:
                self._cmb.write(piece.start, part)
            else:
                await self._write_client(piece.start, part)

    async def _write_client(self, address: int, data: bytes | memoryview) -> None:
        # Before, since a write that is cancelled while the client carries it out may still take place; and after, since
        # a report meanwhile may have taken the mark before the data was there.
        self._written(address, len(data))
        await self._memory.write(address, data)
        self._written(address, len(data))

    async def segments(self, command: SubmissionEntry, length: int) -> list[Segment]:
        """Find where the data of a command is.

        Args:
            command: with PRP1 and PRP2.
            length: bytes, > 0.

        Raises:
            NvmeError: an entry has an offset that it must not have.
            DmaFault: a PRP list cannot be read.
        """
        return await walk_prps(self.read, command.prp1, command.prp2, length, self.page_size)

    async def fetch(self, segments: Iterable[Segment]) -> bytes:
        """Read a command's data from the host."""
        parts = [await self.read(address, count) for address, count in segments]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def deliver(self, segments: Iterable[Segment], data: bytes) -> None:
        """Write a command's data to the host; data longer than the segments is cut."""
        view = memoryview(data)
        done = 0
        for address, count in segments:
            await self.write(address, view[done : done + count])
            done += count

    async def from_host(self, command: SubmissionEntry, length: int) -> bytes:
        """Read `length` bytes of data that a command points to."""
        return await self.fetch(await self.segments(command, length))

    async def to_host(self, command: SubmissionEntry, data: bytes) -> None:
        """Write data to where a command points to."""
        if data:
            await self.deliver(await self.segments(command, len(data)), data)


async def _stop() -> None:
    """End the calling task, whose epoch is over and whose cancel scope is cancelled."""
    await trio.lowlevel.checkpoint_if_cancelled()
    raise AssertionError("an epoch's memory is used from outside its tasks")
