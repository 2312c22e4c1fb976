"""Guests that give an NVMe controller all the work that they can."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from hostilekit.case import Scene, Stage, attack
from hostilekit.wire import Peer
from rawmessages import DMA_MAP, REGION_WRITE, RESET, map_request, memfd

PAGE = 4096
RAM = 0x10_0000
RAM_SIZE = 16 << 20
CC, CSTS, AQA, ASQ, ACQ, DOORBELLS = 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
ENABLE = 6 << 16 | 4 << 20 | 1
WRITE, READ, COMPARE, WRITE_ZEROES, DEALLOCATE, VERIFY = 0x01, 0x02, 0x05, 0x08, 0x09, 0x0C
CREATE_SQ, CREATE_CQ = 0x01, 0x05
ENTRIES = 64
QUEUES = 31
#: 64 MiB of 512 bytes.
BLOCKS = (64 << 20) >> 9
#: Blocks of the largest transfer.
LARGEST = 1024


@dataclass
class Ring:
    """A pair of queues."""

    sq: int
    cq: int
    tail: int = 0
    head: int = 0
    phase: int = 1


class Guest(Peer):
    """A client with memory and an enabled controller."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.first, timeout=30.0)
        self.fd = memfd(RAM_SIZE)
        self.ram = mmap.mmap(self.fd, RAM_SIZE)
        self.rings: dict[int, Ring] = {}
        self.negotiate()
        self.dma_map(RAM, RAM_SIZE, self.fd)
        self.enable()

    def close(self) -> None:
        """End the connection, and forget the memory."""
        super().close()
        self.ram.close()
        os.close(self.fd)

    def allocate(self, count: int) -> int:
        """Take pages; returns where they are in memory."""
        at = self._next
        self._next += -(-count // PAGE) * PAGE
        return at

    def enable(self) -> None:
        """Enable the controller, which was reset, with an admin queue."""
        self._next = 0
        self.write(7, 4, b"\6\0")
        admin = self._ring(0)
        for register, data in (
            (AQA, struct.pack("<I", (ENTRIES - 1) * 0x10001)),
            (ASQ, struct.pack("<Q", RAM + admin.sq)),
            (ACQ, struct.pack("<Q", RAM + admin.cq)),
            (CC, struct.pack("<I", ENABLE)),
        ):
            self.write(0, register, data)
        while not self.read(0, CSTS, 1)[0] & 1:
            pass

    def _ring(self, number: int) -> Ring:
        ring = self.rings[number] = Ring(self.allocate(ENTRIES * 64), self.allocate(ENTRIES * 16))
        self.ram[ring.cq : ring.cq + ENTRIES * 16] = bytes(ENTRIES * 16)
        return ring

    def create_queues(self, count: int = QUEUES) -> None:
        """Create I/O queues."""
        for number in range(1, count + 1):
            ring = self._ring(number)
            size = (ENTRIES - 1) << 16 | number
            self.execute(0, CREATE_CQ, prp1=RAM + ring.cq, dwords=(size, 1))
            self.execute(0, CREATE_SQ, prp1=RAM + ring.sq, dwords=(size, number << 16 | 1))

    def put(self, number: int, opcode: int, *, prp1: int = 0, prp2: int = 0, dwords: tuple[int, ...] = ()) -> None:
        """Put a command into a queue."""
        ring = self.rings[number]
        rest = dwords + (0,) * (6 - len(dwords))
        entry = struct.pack("<BBHIQQQQ6I", opcode, 0, ring.tail, bool(number), 0, 0, prp1, prp2, *rest)
        self.ram[ring.sq + 64 * ring.tail : ring.sq + 64 * ring.tail + 64] = entry
        ring.tail = (ring.tail + 1) % ENTRIES

    def ring(self, number: int) -> None:
        """Tell the controller."""
        self.write(0, DOORBELLS + 8 * number, struct.pack("<I", self.rings[number].tail))

    def collect(self, number: int) -> int:
        """Take completions; returns how many there were."""
        ring, count = self.rings[number], 0
        while struct.unpack_from("<H", self.ram, ring.cq + 16 * ring.head + 14)[0] & 1 == ring.phase:
            count += 1
            ring.head = (ring.head + 1) % ENTRIES
            ring.phase ^= ring.head == 0
        if count:
            self.write(0, DOORBELLS + 8 * number + 4, struct.pack("<I", ring.head))
        return count

    def execute(self, number: int, opcode: int, **fields: object) -> None:
        """Execute one command."""
        self.put(number, opcode, **fields)  # type: ignore[arg-type]
        self.ring(number)
        while not self.collect(number):
            time.sleep(0.001)

    def buffer(self, address: int | None = None) -> tuple[int, int]:
        """PRP1 and PRP2 of the largest transfer, whose pages cannot be joined."""
        base = RAM + self.allocate(LARGEST << 9) if address is None else address
        pages = [base + PAGE * number for number in range(LARGEST * 512 // PAGE)][::-1]
        at = self.allocate(PAGE)
        self.ram[at : at + 8 * len(pages) - 8] = struct.pack(f"<{len(pages) - 1}Q", *pages[1:])
        return pages[0], RAM + at

    def fill_namespace(self) -> None:
        """Write all of it, so that it is real memory."""
        prp1, prp2 = self.buffer()
        for first in range(0, BLOCKS, LARGEST):
            self.execute(1, WRITE, prp1=prp1, prp2=prp2, dwords=(first, 0, LARGEST - 1))

    def flood(self, going: Callable[[], bool], opcode: int, queues: int = QUEUES, **fields: object) -> None:
        """Keep all queues full of a command."""
        waiting = dict.fromkeys(range(1, queues + 1), 0)
        while going():
            for number in waiting:
                waiting[number] -= self.collect(number)
                if not waiting[number]:
                    for _ in range(ENTRIES - 1):
                        self.put(number, opcode, **fields)  # type: ignore[arg-type]
                    self.ring(number)
                    waiting[number] = ENTRIES - 1
            time.sleep(0.005)


def _flood(stage: Stage, opcode: int, blocks: int) -> None:
    with Guest(stage) as guest:
        guest.create_queues()
        guest.fill_namespace()
        prp1, prp2 = guest.buffer()
        guest.flood(stage.clock(), opcode, prp1=prp1, prp2=prp2, dwords=(0, 0, blocks - 1))


@attack(Scene.NVME, spare_mb=96.0)
def nvme_verify_flood(stage: Stage) -> None:
    """31 queues full of Verifies of 65,536 blocks."""
    _flood(stage, VERIFY, 65536)


@attack(Scene.SOC, spare_mb=96.0)
def nvme_verify_flood_of_one_simulator(stage: Stage) -> None:
    """The same, against the other function of one simulator."""
    _flood(stage, VERIFY, 65536)


@attack(Scene.NVME, spare_mb=96.0)
def nvme_compare_flood(stage: Stage) -> None:
    """31 queues full of the largest Compares."""
    _flood(stage, COMPARE, LARGEST)


@attack(Scene.NVME, spare_mb=96.0)
def nvme_write_zeroes_flood(stage: Stage) -> None:
    """31 queues full of the largest Write Zeroes."""
    _flood(stage, WRITE_ZEROES, 65536)


@attack(Scene.SOC, spare_mb=96.0)
def nvme_deallocations(stage: Stage) -> None:
    """Deallocations of 256 times the whole namespace, which is full each time."""
    going = stage.clock()
    with Guest(stage) as guest:
        guest.create_queues(1)
        ranges = guest.allocate(PAGE)
        guest.ram[ranges : ranges + PAGE] = struct.pack("<IIQ", 0, BLOCKS, 0) * 256
        while going():
            guest.fill_namespace()
            guest._next = ranges + PAGE
            guest.execute(1, DEALLOCATE, prp1=RAM + ranges, dwords=(255, 4))


@attack(Scene.NVME, seconds=4.0, spare_mb=160.0)
def nvme_transfers_over_windows_of_a_few_bytes(stage: Stage) -> None:
    """The largest transfers, to memory that is mapped in 32,768 ranges of 16 bytes."""
    going = stage.clock()
    base, width, count = 1 << 32, 16, (LARGEST << 9) // 16
    with Guest(stage) as guest:
        guest.create_queues(4)
        for first in range(0, count, 64):
            for number in range(first, first + 64):
                request = map_request(base + width * number, width, (8 << 20) + width * number)
                guest.send(guest.pack(DMA_MAP, request), [guest.fd])
            for _ in range(64):
                assert guest.receive().flags == 1
        prp1, prp2 = guest.buffer(base)
        guest.flood(going, READ, 4, prp1=prp1, prp2=prp2, dwords=(0, 0, LARGEST - 1))


@attack(Scene.NVME)
def nvme_doorbell_page_flood(stage: Stage) -> None:
    """Writes of the whole doorbell page, as fast as they are taken."""
    going = stage.clock()
    with Guest(stage) as guest:
        guest.create_queues()
        data = struct.pack("<QII", DOORBELLS, 0, PAGE) + b"\1\0\0\0" * (PAGE // 4)
        while going():
            for _ in range(32):
                guest.send(guest.pack(REGION_WRITE, data))
            for _ in range(32):
                guest.receive()


@attack(Scene.NVME, spare_mb=96.0)
def nvme_resets_under_load(stage: Stage) -> None:
    """A reset while 2,000 long commands are under way, again and again."""
    going = stage.clock()
    with Guest(stage) as guest:
        while going():
            guest.create_queues()
            until = time.monotonic() + 0.2
            guest.flood(lambda: time.monotonic() < until, VERIFY, dwords=(0, 0, 65535))  # noqa: B023  called at once
            guest.succeed(RESET)
            guest.enable()
