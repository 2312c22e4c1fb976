"""A driver as small as it can be, written from the specification and not from the model."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TypedDict, Unpack

import trio

from nvmebed.host import RAM_START, Host
from vfiouser_soc.nvme.function import NvmeFunction

PAGE = 4096
CC_ENABLE = 6 << 16 | 4 << 20 | 1
READY, FATAL = 1, 2


class CommandFailed(Exception):
    """A command was completed with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status & 0x7FF:#05x}")
        #: Type and code.
        self.status = status & 0x7FF
        self.do_not_retry = bool(status >> 14)


@dataclass
class Queue:
    """A queue pair."""

    qid: int
    size: int
    sq: int
    cq: int
    tail: int = 0
    head: int = 0
    phase: int = 1
    next_cid: int = 0
    #: Results by command id: (status, dword 0).
    done: dict[int, tuple[int, int]] = field(default_factory=dict)
    sq_head: int = 0
    order: list[int] = field(default_factory=list)
    automatic: bool = True


class Fields(TypedDict, total=False):
    """What a command may say besides its opcode."""

    nsid: int
    prp1: int
    prp2: int
    cdw10: int
    cdw11: int
    cdw12: int
    cdw13: int
    cid: int
    flags: int


class Driver:
    """Drives one function through its regions."""

    def __init__(self, function: NvmeFunction, host: Host) -> None:
        self.function = function
        self.host = host
        self.queues: dict[int, Queue] = {}
        self._next = RAM_START
        self.cc = CC_ENABLE

    # Registers

    def read32(self, offset: int) -> int:
        """Read a register."""
        return int.from_bytes(self.function.region_read(0, offset, 4), "little")

    def read64(self, offset: int) -> int:
        """Read a wide register."""
        return int.from_bytes(self.function.region_read(0, offset, 8), "little")

    def write32(self, offset: int, value: int) -> None:
        """Write a register."""
        self.function.region_write(0, offset, value.to_bytes(4, "little"))

    def write64(self, offset: int, value: int) -> None:
        """Write a wide register."""
        self.function.region_write(0, offset, value.to_bytes(8, "little"))

    def pci_command(self, value: int) -> None:
        """Write the PCI command register."""
        self.function.config_changed(self.function.config.write(4, value.to_bytes(2, "little")))

    def enable_msix(self, *, masked: bool = False) -> None:
        """Enable MSI-X in config space."""
        at = self.function.config.capability_offset(0x11)
        assert at is not None
        control = 0x8000 | 0x4000 * masked
        self.function.config_changed(self.function.config.write(at + 2, control.to_bytes(2, "little")))

    async def status(self, mask: int, value: int) -> None:
        """Wait for bits of CSTS."""
        with trio.fail_after(10):
            while self.read32(0x1C) & mask != value:
                await trio.lowlevel.checkpoint()

    def alloc(self, count: int, align: int = PAGE) -> int:
        """Take guest memory that nothing else uses."""
        address = -(-self._next // align) * align
        self._next = address + count
        assert self._next <= self.host.memory.end
        return address

    # Life

    async def enable(self, entries: int = 32, page_shift: int = 12) -> None:
        """Enable the controller with a new admin queue."""
        admin = self._new_queue(0, entries, 1 << page_shift)
        self.write32(0x24, (entries - 1) << 16 | entries - 1)
        self.write64(0x28, admin.sq)
        self.write64(0x30, admin.cq)
        self.cc = CC_ENABLE | (page_shift - 12) << 7
        self.write32(0x14, self.cc)
        await self.status(READY, READY)

    async def disable(self) -> None:
        """Reset the controller."""
        self.write32(0x14, self.cc & ~1)
        await self.status(READY, 0)
        self.queues.clear()

    def _new_queue(self, qid: int, entries: int, align: int = PAGE) -> Queue:
        queue = Queue(qid, entries, self.alloc(entries * 64, align), self.alloc(entries * 16, align))
        self.host.memory.poke(queue.cq, bytes(entries * 16))
        self.queues[qid] = queue
        return queue

    async def create_queue(self, qid: int = 1, entries: int = 64, *, vector: int | None = None) -> Queue:
        """Create an I/O queue pair."""
        queue = self._new_queue(qid, entries)
        vector = qid if vector is None else vector
        await self.admin(0x05, prp1=queue.cq, cdw10=(entries - 1) << 16 | qid, cdw11=vector << 16 | 3)
        await self.admin(0x01, prp1=queue.sq, cdw10=(entries - 1) << 16 | qid, cdw11=qid << 16 | 1)
        return queue

    # Commands

    def submit(
        self,
        queue: Queue,
        opcode: int,
        *,
        nsid: int = 0,
        prp1: int = 0,
        prp2: int = 0,
        cdw10: int = 0,
        cdw11: int = 0,
        cdw12: int = 0,
        cdw13: int = 0,
        cid: int | None = None,
        flags: int = 0,
        ring: bool = True,
    ) -> int:
        """Put a command into a queue."""
        if cid is None:
            cid = queue.next_cid
            queue.next_cid = (cid + 1) & 0xFFFF
        words = (cdw10, cdw11, cdw12, cdw13, 0, 0)
        entry = struct.pack("<BBHIQQQQ6I", opcode, flags, cid, nsid, 0, 0, prp1, prp2, *words)
        self.put_entry(queue, entry)
        queue.tail = (queue.tail + 1) % queue.size
        if ring:
            self.ring(queue)
        return cid

    def put_entry(self, queue: Queue, entry: bytes) -> None:
        """Write a submission queue entry where the next one belongs."""
        self.host.memory.poke(queue.sq + queue.tail * 64, entry)

    def ring(self, queue: Queue) -> None:
        """Tell the controller of what was submitted."""
        self.doorbell(2 * queue.qid, queue.tail)

    def doorbell(self, number: int, value: int) -> None:
        """Write a doorbell."""
        self.write32(0x1000 + 4 * number, value)

    def collect(self, queue: Queue, *, acknowledge: bool = True) -> int:
        """Take new completion entries; returns how many there were."""
        count = 0
        while True:
            entry = self.completion_entry(queue)
            result, _, sq_head, sqid, cid, status = struct.unpack("<IIHHHH", entry)
            if status & 1 != queue.phase:
                break
            assert sqid == queue.qid
            assert cid not in queue.done, "completed twice"
            queue.done[cid] = status >> 1, result
            queue.order.append(cid)
            queue.sq_head = sq_head
            queue.head += 1
            count += 1
            if queue.head == queue.size:
                queue.head, queue.phase = 0, queue.phase ^ 1
        if count and acknowledge:
            self.doorbell(2 * queue.qid + 1, queue.head)
        return count

    def completion_entry(self, queue: Queue) -> bytes:
        """Read the completion queue entry at the head."""
        return self.host.memory.peek(queue.cq + queue.head * 16, 16)

    async def wait(self, queue: Queue, cid: int) -> int:
        """Wait for a command; returns dword 0."""
        with trio.fail_after(10):
            while True:
                self.collect(queue)
                if cid in queue.done:
                    break
                await self.host.interrupt()
        status, result = queue.done.pop(cid)
        if status:
            raise CommandFailed(status)
        return result

    async def admin(self, opcode: int, **fields: Unpack[Fields]) -> int:
        """Execute an admin command."""
        queue = self.queues[0]
        return await self.wait(queue, self.submit(queue, opcode, **fields))

    async def io(self, opcode: int, queue: Queue | None = None, **fields: Unpack[Fields]) -> int:
        """Execute a command on namespace 1."""
        queue = queue or self.queues[1]
        fields.setdefault("nsid", 1)
        return await self.wait(queue, self.submit(queue, opcode, **fields))

    # Data

    def prps(self, count: int, offset: int = 0) -> tuple[int, int, list[tuple[int, int]]]:
        """Take memory for a transfer, page by page in an order that cannot be merged.

        Returns:
            PRP1, PRP2, and (address, bytes) in order.
        """
        pages = -(-(offset + count) // PAGE)
        addresses = [self.alloc(PAGE) for _ in range(pages)][::-1]
        pieces = []
        for number, address in enumerate(addresses):
            start = offset if number == 0 else 0
            size = min(PAGE - start, count)
            pieces.append((address + start, size))
            count -= size
        if pages <= 2:
            return pieces[0][0], pieces[1][0] if pages == 2 else 0, pieces
        table = self.alloc(8 * (pages - 1))
        self.host.memory.poke(table, struct.pack(f"<{pages - 1}Q", *addresses[1:]))
        return pieces[0][0], table, pieces

    def gather(self, pieces: list[tuple[int, int]]) -> bytes:
        """Read pieces of memory."""
        return b"".join(self.host.memory.peek(address, count) for address, count in pieces)

    def scatter(self, pieces: list[tuple[int, int]], data: bytes) -> None:
        """Write pieces of memory."""
        for address, count in pieces:
            self.host.memory.poke(address, data[:count])
            data = data[count:]

    async def write_blocks(self, slba: int, data: bytes, *, offset: int = 0, fua: bool = False) -> None:
        """Write whole blocks of 512 bytes."""
        prp1, prp2, pieces = self.prps(len(data), offset)
        self.scatter(pieces, data)
        await self.io(0x01, prp1=prp1, prp2=prp2, **_blocks(slba, len(data) // 512, fua=fua))

    async def read_blocks(self, slba: int, count: int, *, offset: int = 0) -> bytes:
        """Read whole blocks of 512 bytes."""
        prp1, prp2, pieces = self.prps(count * 512, offset)
        await self.io(0x02, prp1=prp1, prp2=prp2, **_blocks(slba, count))
        return self.gather(pieces)

    async def identify(self, cns: int, nsid: int = 0, cntid: int = 0) -> bytes:
        """Read an identify structure."""
        page = self.alloc(PAGE)
        await self.admin(0x06, nsid=nsid, prp1=page, cdw10=cntid << 16 | cns)
        return self.host.memory.peek(page, PAGE)

    async def log_page(self, number: int, count: int, *, offset: int = 0, retain: bool = False) -> bytes:
        """Read a log page."""
        prp1, prp2, pieces = self.prps(count)
        dwords = count // 4 - 1
        await self.admin(
            0x02,
            nsid=0xFFFFFFFF,
            prp1=prp1,
            prp2=prp2,
            cdw10=(dwords & 0xFFFF) << 16 | retain << 15 | number,
            cdw11=dwords >> 16,
            cdw12=offset,
        )
        return self.gather(pieces)

    async def set_feature(self, feature: int, value: int, *, nsid: int = 0, save: bool = False) -> int:
        """Set a feature."""
        return await self.admin(0x09, nsid=nsid, cdw10=save << 31 | feature, cdw11=value)

    async def get_feature(self, feature: int, *, select: int = 0, nsid: int = 0, selector: int = 0) -> int:
        """Get a feature."""
        return await self.admin(0x0A, nsid=nsid, cdw10=select << 8 | feature, cdw11=selector)


class _Blocks(TypedDict):
    """The fields that say which blocks a command is about."""

    cdw10: int
    cdw11: int
    cdw12: int


def _blocks(slba: int, count: int, *, fua: bool = False) -> _Blocks:
    return {"cdw10": slba & 0xFFFFFFFF, "cdw11": slba >> 32, "cdw12": (count - 1) | fua << 30}
