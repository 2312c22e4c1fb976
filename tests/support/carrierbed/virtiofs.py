"""The driver of a virtio-fs device, played over qtest: what Linux does when it binds, and what a mount sends.

Spec: VIRTIO 1.2, 4.1.4 (virtio over PCI), 2.7 (split virtqueues), 5.11 (file system device).
"""

from __future__ import annotations

import struct

from vmbed.errors import BedError
from vmbed.pci import PciFunction
from vmbed.qtest import Qtest

__all__ = ["VirtioFs"]

VENDOR_CAPABILITY = 9
COMMON, NOTIFY = 1, 2
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
QUEUES, QUEUE_SIZE = 2, 16
#: Where the queues are in the guest's memory; each has 4 KiB for each of its parts.
RINGS = 0x0100_0000
PART = 0x1000
BUFFERS = 0x0110_0000
NEXT, WRITE = 1, 2


class VirtioFs:
    """A companion as its driver sees it.

    Args:
        qtest: the machine's buses.
        slot: where it is.
    """

    def __init__(self, qtest: Qtest, slot: int = 0x10) -> None:
        self._qtest = qtest
        self._function = PciFunction(qtest, slot)
        self._common = 0
        self._notify = 0
        self._multiplier = 0
        self._sent = [0] * QUEUES

    async def bind(self) -> None:
        """Do what a driver does until the device runs."""
        await self._function.place_bars()
        await self._find()
        for status in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            await self._qtest.store(self._common + 20, status, 1)
        for half in (0, 1):  # nothing but VERSION_1, which is bit 32
            await self._qtest.store(self._common + 8, half)
            await self._qtest.store(self._common + 12, half)
        await self._qtest.store(self._common + 20, ACKNOWLEDGE | DRIVER | FEATURES_OK, 1)
        for queue in range(QUEUES):
            await self._set_up(queue)
        await self._qtest.store(self._common + 20, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, 1)

    def move(self, qtest: Qtest) -> None:
        """Go on in the machine that this one was migrated to."""
        self._qtest = qtest

    async def unbind(self) -> None:
        """Reset the device."""
        await self._qtest.store(self._common + 20, 0, 1)

    async def _find(self) -> None:
        offset = await self._function.config_read(0x34, 1)
        while offset:
            if await self._function.config_read(offset, 1) == VENDOR_CAPABILITY:
                kind = await self._function.config_read(offset + 3, 1)
                bar = await self._function.config_read(offset + 4, 1)
                place = self._function.addresses.get(bar, 0) + await self._function.config_read(offset + 8)
                if kind == COMMON:
                    self._common = place
                elif kind == NOTIFY:
                    self._notify, self._multiplier = place, await self._function.config_read(offset + 16)
            offset = await self._function.config_read(offset + 1, 1)
        if not self._common or not self._notify:
            raise BedError("this is no virtio device")

    async def _set_up(self, queue: int) -> None:
        base = RINGS + queue * 3 * PART
        await self._qtest.fill(base, 3 * PART)
        await self._qtest.store(self._common + 22, queue, 2)
        await self._qtest.store(self._common + 24, QUEUE_SIZE, 2)
        for part in range(3):
            await self._qtest.store(self._common + 32 + 8 * part, base + part * PART)
            await self._qtest.store(self._common + 36 + 8 * part, 0)
        await self._qtest.store(self._common + 28, 1, 2)
        self._sent[queue] = 0

    async def request(self, queue: int, opcode: int, unique: int, room: int = 80) -> None:
        """Send a request of FUSE, with room for its answer."""
        base = RINGS + queue * 3 * PART
        at = BUFFERS + queue * PART
        await self._qtest.write(at, struct.pack("<IIQQIIII", 40, opcode, unique, 0, 0, 0, 0, 0))
        await self._qtest.fill(at + 0x800, room)
        descriptors = struct.pack("<QIHH", at, 40, NEXT if room else 0, 1)
        descriptors += struct.pack("<QIHH", at + 0x800, room, WRITE, 0)
        await self._qtest.write(base, descriptors)
        await self._qtest.store(base + PART + 4 + 2 * (self._sent[queue] % QUEUE_SIZE), 0, 2)
        self._sent[queue] += 1
        await self._qtest.store(base + PART + 2, self._sent[queue], 2)
        await self._qtest.store(self._notify + queue * self._multiplier, queue, 2)

    async def used(self, queue: int) -> int:
        """How many requests the device has given back."""
        return await self._qtest.load(RINGS + queue * 3 * PART + 2 * PART + 2, 2)

    async def answer(self, queue: int) -> tuple[int, int, int]:
        """The head of an answer: its length, its error, and which request it is to."""
        return struct.unpack("<IiQ", await self._qtest.read(BUFFERS + queue * PART + 0x800, 16))
