"""An NVMe controller whose first namespace may be used: its last two pages are scratch, and are put back.

Queues and a bounce buffer live in memory of our own that is mapped with a descriptor at a high address. A device write
is an NVMe Read of the scratch pages to the address, a device read is an NVMe Write of them from the address.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

from vfiouser_conformance import wire
from vfiouser_conformance.case import CaseFailed, NotApplicable, check, same
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.stimulus.base import NoStimulus
from vfiouser_protocol.constants import Command, IrqIndex, RegionIndex

QUEUES = 0x7F_0000_0000
_PAGE = 4096
_SIZE = 8 * _PAGE
#: Pages of that memory: admin SQ and CQ, I/O SQ and CQ, then the bounce buffer.
_BOUNCE = 4 * _PAGE
_ENTRIES = 32
_CC, _CSTS, _AQA, _ASQ, _ACQ, _DOORBELLS = 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
_CREATE_SQ, _CREATE_CQ, _IDENTIFY = 0x01, 0x05, 0x06
_IO_WRITE, _IO_READ = 0x01, 0x02
_SCRATCH = 2 * _PAGE
_POLL_S = 0.002
_IO_ERROR = 5


class _Queue:
    """A submission queue and its completion queue.

    Args:
        number: 0 = admin.
        submissions: offset of the submission queue in our memory.
        completions: offset of the completion queue.
    """

    def __init__(self, number: int, submissions: int, completions: int) -> None:
        self.number = number
        self.submissions = submissions
        self.completions = completions
        self.tail = self.head = 0
        self.phase = 1


class NvmeProfile(NoStimulus):
    """Drives an NVMe controller.

    Args:
        timeout: how long to wait for the controller, in seconds.
    """

    name = "nvme"
    granule = _PAGE
    largest = _SCRATCH

    def __init__(self, timeout: float = 5.0) -> None:
        self._timeout = timeout
        self._saved: bytes | None = None
        self._memory = mmap.mmap(-1, _SIZE)
        self._admin = self._io = _Queue(0, 0, 0)
        self._block = 512
        self._first = 0

    # Bringing it up

    def prepare(self, link: RawLink) -> None:
        """Reset and enable the controller, make an I/O queue, keep what the scratch pages hold."""
        code = link.ok(Command.REGION_READ, wire.access(RegionIndex.CONFIG, 9, 3)).payload[16:]
        if code != b"\x02\x08\x01":
            raise NotApplicable(f"class code {code[::-1].hex()}: the device is no NVMe controller (--device-profile)")
        link.ok(Command.REGION_WRITE, wire.access(RegionIndex.CONFIG, 4, 2, b"\x06\x00"))
        self._set(link, _CC, 0)
        self._wait(link, 0)
        self._map(link)
        self._admin = _Queue(0, 0, _PAGE)
        self._io = _Queue(1, 2 * _PAGE, 3 * _PAGE)
        self._set(link, _AQA, (_ENTRIES - 1) << 16 | (_ENTRIES - 1))
        for register, address in ((_ASQ, QUEUES), (_ACQ, QUEUES + _PAGE)):
            link.ok(Command.REGION_WRITE, wire.access(0, register, 8, struct.pack("<Q", address)))
        self._set(link, _CC, 4 << 20 | 6 << 16 | 1)
        self._wait(link, 1)
        size = (_ENTRIES - 1) << 16 | 1
        self._now(link, self._admin, _CREATE_CQ, QUEUES + self._io.completions, 0, 0, size, 3)
        self._now(link, self._admin, _CREATE_SQ, QUEUES + self._io.submissions, 0, 0, size, 1 << 16 | 1)
        self._find_scratch(link)
        if self._saved is None:
            self._now(link, self._io, _IO_READ, *self._data(QUEUES + _BOUNCE, _SCRATCH))
            self._saved = self._memory[_BOUNCE : _BOUNCE + _SCRATCH]

    def _map(self, link: RawLink) -> None:
        fd = os.memfd_create("conformance-nvme", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, _SIZE)
            # A map that is there already, after a reset on the same connection, goes first.
            link.call(Command.DMA_UNMAP, wire.dma_unmap(QUEUES, _SIZE))
            link.ok(Command.DMA_MAP, wire.dma_map(QUEUES, _SIZE), [fd])
            self._memory.close()
            self._memory = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)

    @property
    def in_use(self) -> bool:
        """Whether the scratch pages were used."""
        return self._saved is not None

    def _find_scratch(self, link: RawLink) -> None:
        self._now(link, self._admin, _IDENTIFY, QUEUES + _BOUNCE, 0, 1)
        blocks = struct.unpack_from("<Q", self._memory, _BOUNCE)[0]
        format_ = self._memory[_BOUNCE + 26] & 15
        self._block = 1 << self._memory[_BOUNCE + 128 + 4 * format_ + 2]
        used = _SCRATCH // self._block
        if blocks < used:
            raise NotApplicable(f"namespace 1 of the controller has {blocks} blocks")
        self._first = blocks - used

    def release(self, link: RawLink) -> None:
        """Put the scratch pages back."""
        if self._saved is not None:
            self.load(link, self._saved)

    # What cases ask for

    def load(self, link: RawLink, data: bytes) -> None:
        """Write to the scratch pages."""
        whole = data.ljust(-(-len(data) // _PAGE) * _PAGE, b"\0")
        self._memory[_BOUNCE : _BOUNCE + len(whole)] = whole
        self._now(link, self._io, _IO_WRITE, *self._data(QUEUES + _BOUNCE, len(whole)))

    def taken(self, link: RawLink, count: int) -> bytes:
        """Read the scratch pages."""
        size = -(-count // _PAGE) * _PAGE
        self._now(link, self._io, _IO_READ, *self._data(QUEUES + _BOUNCE, size))
        return self._memory[_BOUNCE : _BOUNCE + count]

    def start_write(self, link: RawLink, address: int, count: int) -> None:
        """An NVMe Read of the scratch pages to the address."""
        self._submit(link, self._io, _IO_READ, *self._data(address, count))

    def start_read(self, link: RawLink, address: int, count: int) -> None:
        """An NVMe Write of the scratch pages from the address."""
        self._submit(link, self._io, _IO_WRITE, *self._data(address, count))

    def finish(self, link: RawLink) -> int:
        """Wait for the command; one that failed is an I/O error."""
        return self._complete(link, self._io)

    def raise_irq(self, link: RawLink, index: int, vector: int) -> None:
        """A completion of the admin queue raises vector 0 of MSI-X."""
        if (index, vector) != (IrqIndex.MSIX, 0):
            raise NotApplicable("an NVMe controller's admin queue raises vector 0 of MSI-X only")
        self._enable_msix(link)
        self._now(link, self._admin, _IDENTIFY, QUEUES + _BOUNCE, 0, 0, 1)

    # Below

    def _enable_msix(self, link: RawLink) -> None:
        config = link.ok(Command.REGION_READ, wire.access(RegionIndex.CONFIG, 0, 256)).payload[16:]
        at, seen = config[0x34], 0
        while at >= 0x40 and seen < 48:
            if config[at] == 0x11:
                link.ok(Command.REGION_WRITE, wire.access(RegionIndex.CONFIG, at + 2, 2, b"\x00\x80"))
                return
            at, seen = config[at + 1], seen + 1

    def _data(self, address: int, count: int) -> tuple[int, ...]:
        """Arguments of an I/O command on the scratch pages: PRPs, namespace, block, number of blocks."""
        second = address + _PAGE if count > _PAGE else 0
        return address, second, 1, self._first & 0xFFFFFFFF, self._first >> 32, count // self._block - 1

    def _now(self, link: RawLink, queue: _Queue, opcode: int, *arguments: int) -> None:
        self._submit(link, queue, opcode, *arguments)
        same(0, self._complete(link, queue), f"error of NVMe command {opcode:#x} of queue {queue.number}")

    def _submit(
        self, link: RawLink, queue: _Queue, opcode: int, first: int, second: int = 0, namespace: int = 0, *words: int
    ) -> None:
        rest = (*words, *(0,) * (6 - len(words)))
        entry = struct.pack("<BBHIQQQQ6I", opcode, 0, queue.tail, namespace, 0, 0, first, second, *rest)
        at = queue.submissions + 64 * queue.tail
        self._memory[at : at + 64] = entry
        queue.tail = (queue.tail + 1) % _ENTRIES
        self._set(link, _DOORBELLS + 8 * queue.number, queue.tail)

    def _complete(self, link: RawLink, queue: _Queue) -> int:
        deadline = time.monotonic() + self._timeout
        at = queue.completions + 16 * queue.head + 14
        while (status := struct.unpack_from("<H", self._memory, at)[0]) & 1 != queue.phase:
            check(time.monotonic() < deadline, f"no completion within {self._timeout:g} s")
            self._get(link, _CSTS)  # the server's DMA commands are answered while we wait for a reply of its
            time.sleep(_POLL_S)
        queue.head += 1
        if queue.head == _ENTRIES:
            queue.head, queue.phase = 0, queue.phase ^ 1
        self._set(link, _DOORBELLS + 8 * queue.number + 4, queue.head)
        return _IO_ERROR if status >> 1 else 0

    def _wait(self, link: RawLink, ready: int) -> None:
        deadline = time.monotonic() + self._timeout
        while self._get(link, _CSTS) & 1 != ready:
            if time.monotonic() > deadline:
                raise CaseFailed(f"CSTS.RDY is not {ready} within {self._timeout:g} s")
            time.sleep(_POLL_S)

    def _get(self, link: RawLink, offset: int) -> int:
        return int(struct.unpack_from("<I", link.ok(Command.REGION_READ, wire.access(0, offset, 4)).payload, 16)[0])

    def _set(self, link: RawLink, offset: int, value: int) -> None:
        link.ok(Command.REGION_WRITE, wire.access(0, offset, 4, struct.pack("<I", value)))
