"""A pair of NVMe queues in client memory, and the pages that commands transfer to and from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import trio

from vfiouser_oob.client.errors import ServerGone
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.client.mapping import MappedRegion
from vfiouser_oob.lab.nvme.layout import (
    CQE,
    CQE_SIZE,
    CQE_STATUS,
    CQE_STATUS_OFFSET,
    DOORBELLS,
    PAGE_SIZE,
    PRP_ENTRY,
    PRPS_PER_PAGE,
    SQE,
    SQE_SIZE,
    DriverError,
)
from vfiouser_oob.lab.nvme.processors import Processors


class NvmeCommand(NamedTuple):
    """A command without what the queue adds.

    Args:
        opcode: what to do.
        nsid: namespace id.
        prp1: first page or 0.
        prp2: second page, PRP list or 0.
        dwords: command dwords 10 to 15; missing ones are 0.
    """

    opcode: int
    nsid: int = 0
    prp1: int = 0
    prp2: int = 0
    dwords: tuple[int, ...] = ()


class _Slot:
    """A command id in use."""

    __slots__ = ("done", "result", "status")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.result = 0
        self.status = 0


class QueuePair:
    """A submission queue with its completion queue.

    Args:
        memory: where the queues lie.
        bar: where the doorbells are.
        queue_id: id of both queues.
        entries: entries of each.
        doorbell_stride: bytes between two doorbells.
        processors: what executes the driver.
    """

    def __init__(
        self,
        memory: ClientMemory,
        bar: MappedRegion,
        queue_id: int,
        entries: int,
        doorbell_stride: int,
        processors: Processors | None = None,
    ) -> None:
        self._processors = processors or Processors()
        self._memory = memory
        self._bar = bar
        self.queue_id = queue_id
        self.entries = entries
        self.sq_address = memory.allocate(entries * SQE_SIZE)
        self.cq_address = memory.allocate(entries * CQE_SIZE)
        self._sq_doorbell = DOORBELLS + 2 * queue_id * doorbell_stride
        self._cq_doorbell = DOORBELLS + (2 * queue_id + 1) * doorbell_stride
        self._tail = 0
        self._rung_tail = 0
        self._head = 0
        self._phase = 1
        self._slots: dict[int, _Slot] = {}
        self._free_ids = list(range(entries - 1))
        # One entry stays empty, so that full and empty queues can be told apart.
        self._room = trio.Semaphore(entries - 1)
        self._ringing = trio.Lock()
        self._failure: str | None = None
        self.completed = 0

    async def execute(self, command: NvmeCommand) -> int:
        """Execute a command; returns dword 0 of its completion.

        Raises:
            NvmeError: it completed with an error status.
            ServerGone: the device has gone.
        """
        await self._room.acquire()
        self._check_device()
        async with self._processors.running:
            slot = await self._submit(command)
        await slot.done.wait()
        self._check_device()
        if slot.status:
            raise DriverError(
                f"opcode {command.opcode:#04x} on queue {self.queue_id} failed, status {slot.status:#05x}",
                slot.status,
            )
        return slot.result

    async def _submit(self, command: NvmeCommand) -> _Slot:
        command_id = self._free_ids.pop()
        slot = self._slots[command_id] = _Slot()
        dwords = command.dwords + (0,) * (6 - len(command.dwords))
        self._memory.pack(
            SQE,
            self.sq_address + self._tail * SQE_SIZE,
            command.opcode,
            0,
            command_id,
            command.nsid,
            0,
            0,
            command.prp1,
            command.prp2,
            *dwords,
        )
        self._tail = (self._tail + 1) % self.entries
        await self._ring_tail()
        return slot

    def move(self, memory: ClientMemory, bar: MappedRegion) -> None:
        """Go on with other memory and registers: heads, tails, phase and outstanding commands stay.

        Args:
            memory: holds what the old memory held.
            bar: where the doorbells are.
        """
        self._memory = memory
        self._bar = bar

    @property
    def position(self) -> tuple[int, int, int]:
        """Submission tail, completion head and phase bit."""
        return self._tail, self._head, self._phase

    @property
    def outstanding(self) -> int:
        """How many commands wait for their completion."""
        return len(self._slots)

    def fail(self, reason: str) -> None:
        """The device has gone: every command fails, those under way and later ones."""
        self._failure = reason
        slots, self._slots = list(self._slots.values()), {}
        for slot in slots:
            slot.done.set()

    def _check_device(self) -> None:
        if self._failure is not None:
            raise ServerGone(f"the NVMe device has gone: {self._failure}")

    async def _ring_tail(self) -> None:
        # One doorbell write may cover the commands of several tasks, and an old tail must never follow a
        # newer one.
        async with self._ringing:
            if self._rung_tail != self._tail:
                self._rung_tail = self._tail
                await self._bar.write(self._sq_doorbell, 4, self._tail)

    async def process(self) -> int:
        """Take every completion that is there; returns how many. The processors have to run."""
        found = 0
        while True:
            entry = self.cq_address + self._head * CQE_SIZE
            (status,) = self._memory.unpack(CQE_STATUS, entry + CQE_STATUS_OFFSET)
            if status & 1 != self._phase:
                break
            result, _, _, _, command_id, status = self._memory.unpack(CQE, entry)
            self._complete(command_id, result, status >> 1 & 0x7FF)
            found += 1
            self._head += 1
            if self._head == self.entries:
                self._head = 0
                self._phase ^= 1
        if found:
            await self._bar.write(self._cq_doorbell, 4, self._head)
        return found

    def _complete(self, command_id: int, result: int, status: int) -> None:
        slot = self._slots.pop(command_id, None)
        if slot is None:
            raise DriverError(f"queue {self.queue_id} completed command {command_id}, which is not outstanding")
        slot.result, slot.status = result, status
        self._free_ids.append(command_id)
        self._room.release()
        self.completed += 1
        slot.done.set()


class PagePool:
    """Pages for transfers; they come back in any order, so that PRP lists are really scattered.

    Args:
        memory: where the pages lie.
        pages: how many.
    """

    def __init__(self, memory: ClientMemory, pages: int) -> None:
        start = memory.allocate(pages * PAGE_SIZE)
        self._memory = memory
        self._free = [start + number * PAGE_SIZE for number in range(pages)]
        self._total = pages
        self._returned = trio.Condition()

    def move(self, memory: ClientMemory) -> None:
        """Go on with other memory, which holds what the old one held."""
        self._memory = memory

    @asynccontextmanager
    async def take(self, count: int) -> AsyncIterator[list[int]]:
        """Borrow pages, waiting until enough are free.

        They come back when the block ends well or by an `DriverError`, that is when the device is done with
        them. After a cancellation it may still use them, so they are lost.
        """
        if count > self._total:
            raise MemoryError(f"a transfer needs {count} pages, the pool has {self._total}")
        async with self._returned:
            while len(self._free) < count:
                await self._returned.wait()
            pages = [self._free.pop() for _ in range(count)]
        try:
            yield pages
        except DriverError:
            await self._give_back(pages)
            raise
        await self._give_back(pages)

    async def _give_back(self, pages: list[int]) -> None:
        self._free.extend(pages)
        with trio.CancelScope(shield=True):
            async with self._returned:
                self._returned.notify_all()

    def fill(self, pages: Sequence[int], data: bytes | memoryview) -> None:
        """Copy data into pages."""
        for number, page in enumerate(pages):
            part = data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
            self._memory.store(page, part)

    def collect(self, pages: Sequence[int], count: int) -> bytes:
        """Copy `count` bytes out of pages."""
        data = b"".join([bytes(self._memory.view(page, PAGE_SIZE)) for page in pages])
        return data[:count]

    def describe(self, pages: Sequence[int], lists: Sequence[int]) -> tuple[int, int]:
        """Return PRP 1 and PRP 2 for a transfer.

        Args:
            pages: the data's pages.
            lists: pages for PRP lists, as many as `list_pages` says.
        """
        first, rest = pages[0], pages[1:]
        if not rest:
            return first, 0
        if len(rest) == 1:
            return first, rest[0]
        entry = 0
        for number, page in enumerate(rest):
            last_of_list = entry % PRPS_PER_PAGE == PRPS_PER_PAGE - 1
            if last_of_list and number < len(rest) - 1:
                # The list's last entry points to the next list.
                self._put(lists, entry, lists[entry // PRPS_PER_PAGE + 1])
                entry += 1
            self._put(lists, entry, page)
            entry += 1
        return first, lists[0]

    def _put(self, lists: Sequence[int], entry: int, value: int) -> None:
        address = lists[entry // PRPS_PER_PAGE] + entry % PRPS_PER_PAGE * PRP_ENTRY.size
        self._memory.pack(PRP_ENTRY, address, value)


def list_pages(data_pages: int) -> int:
    """How many pages of PRP lists a transfer of so many data pages needs."""
    entries = data_pages - 1
    if entries <= 1:
        return 0
    # Every list but the last has one entry less for data.
    return 1 if entries <= PRPS_PER_PAGE else -(-(entries - 1) // (PRPS_PER_PAGE - 1))
