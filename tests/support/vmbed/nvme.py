"""A minimal NVMe driver over qtest: enough to prove registers, DMA and interrupts through QEMU.

Queues are one page each and never wrap in a test; completions are found by their phase tag.

Spec: NVM Express Base 1.4: 3.1 (registers), 4.2 and 4.6 (queue entries), 5 (admin commands) and
6 (NVM commands).
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from vmbed.errors import BedError
from vmbed.pci import PciFunction
from vmbed.processes import deadline
from vmbed.qtest import Qtest

__all__ = ["Completion", "NvmeDriver", "until"]

CAP, VERSION, CONFIGURATION, STATUS, AQA, ASQ, ACQ = 0x00, 0x08, 0x14, 0x1C, 0x24, 0x28, 0x30
CMBLOC, CMBSZ, CMBMSC = 0x38, 0x3C, 0x50
CAP_CMBS = 1 << 57
CMB_REGISTERS_ENABLE, CMB_MEMORY_ENABLE = 0x1, 0x2
DOORBELLS = 0x1000
ENABLE = 6 << 16 | 4 << 20 | 1  # 64-byte submission, 16-byte completion entries
READY = 0x1
PAGE = 4096
SQE_BYTES, CQE_BYTES = 64, 16
BLOCK = 512
DEADLINE_S = 20.0

OP_CREATE_SQ, OP_CREATE_CQ, OP_IDENTIFY = 0x01, 0x05, 0x06
OP_WRITE, OP_READ = 0x01, 0x02
IDENTIFY_NAMESPACE, IDENTIFY_CONTROLLER = 0x00, 0x01
CONTIGUOUS, INTERRUPTS = 0x1, 0x2


async def until(what: str, condition: Callable[[], Awaitable[bool]], seconds: float = DEADLINE_S) -> None:
    """Ask for a state until it is there; a machine under qtest has no other way to tell.

    Raises:
        BedError: it did not come about in time.
    """
    with deadline(seconds, what):
        while not await condition():
            await trio.lowlevel.checkpoint()


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion queue entry: command specific result, command id, status field without phase."""

    result: int
    command: int
    status: int


class _QueuePair:
    """A submission and a completion queue of the same id, where the driver put them."""

    def __init__(self, queue: int, submissions: int, completions: int) -> None:
        self.queue = queue
        self.submissions = submissions
        self.completions = completions
        self.entries = PAGE // SQE_BYTES
        self.tail = 0
        self.head = 0
        self.phase = 1


class NvmeDriver:
    """Drives one controller. Guest RAM from `memory` upwards is the driver's, page by page."""

    def __init__(self, function: PciFunction, memory: int = 0x20_0000) -> None:
        self._function = function
        self._qtest: Qtest = function.qtest
        self._next_page = memory
        self._stride = 4
        self._command = 0
        self._admin = _QueuePair(0, self.allocate(), self.allocate())
        self._io: _QueuePair | None = None

    @property
    def registers(self) -> int:
        """Where BAR 0 is."""
        return self._function.addresses[0]

    def allocate(self, pages: int = 1) -> int:
        """Return the address of fresh guest pages."""
        address = self._next_page
        self._next_page += pages * PAGE
        return address

    def move_to(self, function: PciFunction) -> None:
        """Go on with the controller that has come to another machine, with all of the memory."""
        self._function, self._qtest = function, function.qtest

    async def ready(self) -> bool:
        """Whether the controller says that it is."""
        return await self._ready_is(True)

    async def enable(self) -> None:
        """Reset the controller, give it admin queues and wait until it is ready."""
        qtest, base = self._qtest, self.registers
        await qtest.store(base + CONFIGURATION, 0)
        await until("controller to stop", lambda: self._ready_is(False))
        self._stride = 4 << (await qtest.load(base + CAP, 8) >> 32 & 0xF)
        for page in (self._admin.submissions, self._admin.completions):
            await qtest.fill(page, PAGE)
        last = self._admin.entries - 1
        await qtest.store(base + AQA, last << 16 | last)
        await qtest.store(base + ASQ, self._admin.submissions, 8)
        await qtest.store(base + ACQ, self._admin.completions, 8)
        await qtest.store(base + CONFIGURATION, ENABLE)
        await until("controller to become ready", lambda: self._ready_is(True))

    async def _ready_is(self, wanted: bool) -> bool:
        return bool(await self._qtest.load(self.registers + STATUS) & READY) == wanted

    async def version(self) -> int:
        """Return the version register: major << 16 | minor << 8 | tertiary."""
        return await self._qtest.load(self.registers + VERSION)

    async def identify(self, what: int = IDENTIFY_CONTROLLER, namespace: int = 0) -> bytes:
        """Return an identify data structure, as the controller wrote it to guest RAM."""
        page = self.allocate()
        await self.admin(OP_IDENTIFY, namespace=namespace, prp1=page, dwords=(what,))
        return await self._qtest.read(page, PAGE)

    async def enable_cmb(self) -> tuple[int, int]:
        """Turn the controller memory buffer on at its BAR's own address; returns (address, bytes).

        Raises:
            BedError: the controller has none.
        """
        qtest, base = self._qtest, self.registers
        if await qtest.load(base + CAP, 8) & CAP_CMBS:
            await qtest.store(base + CMBMSC, CMB_REGISTERS_ENABLE, 8)
        size, location = await qtest.load(base + CMBSZ), await qtest.load(base + CMBLOC)
        unit = 4096 << (4 * (size >> 8 & 0xF))
        if size >> 12 == 0:
            raise BedError("the controller has no memory buffer (CMBSZ is 0)")
        address = self._function.addresses[location & 7] + (location >> 12) * unit
        if await qtest.load(base + CAP, 8) & CAP_CMBS:
            await qtest.store(base + CMBMSC, address | CMB_MEMORY_ENABLE | CMB_REGISTERS_ENABLE, 8)
        return address, (size >> 12) * unit

    async def create_io_queues(self, vector: int, submissions: int | None = None) -> None:
        """Make I/O queue pair 1, its completions signalled on an MSI-X vector.

        Args:
            vector: MSI-X vector number.
            submissions: where the submission queue is, if not in guest RAM (a memory buffer, say).
        """
        pair = _QueuePair(1, submissions or self.allocate(), self.allocate())
        await self._qtest.fill(pair.submissions, PAGE)
        await self._qtest.fill(pair.completions, PAGE)
        size_and_id = (pair.entries - 1) << 16 | pair.queue
        flags = vector << 16 | INTERRUPTS | CONTIGUOUS
        await self.admin(OP_CREATE_CQ, prp1=pair.completions, dwords=(size_and_id, flags))
        flags = pair.queue << 16 | CONTIGUOUS
        await self.admin(OP_CREATE_SQ, prp1=pair.submissions, dwords=(size_and_id, flags))
        self._io = pair

    async def write_blocks(self, block: int, data: bytes) -> None:
        """Write one page or less to namespace 1, from a fresh guest page."""
        page = self.allocate()
        await self._qtest.write(page, data)
        await self._transfer(OP_WRITE, block, len(data), page)

    async def read_blocks(self, block: int, length: int) -> bytes:
        """Read one page or less from namespace 1 into a fresh guest page; `length` in bytes."""
        page = self.allocate()
        await self._transfer(OP_READ, block, length, page)
        return await self._qtest.read(page, length)

    async def _transfer(self, opcode: int, block: int, length: int, page: int) -> None:
        if self._io is None:
            raise BedError("no I/O queues yet: call create_io_queues")
        dwords = (block & 0xFFFF_FFFF, block >> 32, length // BLOCK - 1)
        _succeeded(opcode, await self._run(self._io, opcode, 1, page, dwords))

    async def admin(
        self, opcode: int, *, namespace: int = 0, prp1: int = 0, dwords: tuple[int, ...] = ()
    ) -> Completion:
        """Run an admin command that must succeed; `dwords` are CDW10 and up."""
        return _succeeded(opcode, await self._run(self._admin, opcode, namespace, prp1, dwords))

    async def _run(
        self, pair: _QueuePair, opcode: int, namespace: int, prp1: int, dwords: tuple[int, ...]
    ) -> Completion:
        self._command += 1
        padded = (*dwords, *(0,) * (6 - len(dwords)))
        entry = struct.pack("<BBHIQQQQ6I", opcode, 0, self._command, namespace, 0, 0, prp1, 0, *padded)
        await self._qtest.write(pair.submissions + pair.tail * SQE_BYTES, entry)
        pair.tail = (pair.tail + 1) % pair.entries
        await self._ring(2 * pair.queue, pair.tail)
        completion = await self._completion(pair)
        if completion.command != self._command:
            raise BedError(f"completion of command {completion.command}, expected {self._command}")
        return completion

    async def _completion(self, pair: _QueuePair) -> Completion:
        """Wait for the next entry of the completion queue and take it."""
        address = pair.completions + pair.head * CQE_BYTES

        async def arrived() -> bool:
            return await self._qtest.load(address + 14, 2) & 1 == pair.phase

        await until(f"completion on queue {pair.queue}", arrived)
        result, _, _, _, command, status = struct.unpack("<IIHHHH", await self._qtest.read(address, CQE_BYTES))
        pair.head += 1
        if pair.head == pair.entries:
            pair.head, pair.phase = 0, pair.phase ^ 1
        await self._ring(2 * pair.queue + 1, pair.head)
        return Completion(result, command, status >> 1)

    async def _ring(self, doorbell: int, value: int) -> None:
        await self._qtest.store(self.registers + DOORBELLS + doorbell * self._stride, value)


def _succeeded(opcode: int, completion: Completion) -> Completion:
    if completion.status != 0:
        raise BedError(f"NVMe command {opcode:#04x} failed with status {completion.status:#06x}")
    return completion
