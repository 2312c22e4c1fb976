"""The documented test device (docs/reference/test-device.md)."""

from __future__ import annotations

import struct
import time

from vfiouser_conformance import wire
from vfiouser_conformance.case import CaseFailed, NotApplicable, check, same
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.memory import ServedMemory
from vfiouser_conformance.stimulus.base import NoStimulus
from vfiouser_protocol.constants import Command, RegionIndex

MAGIC = 0x75666F76
_SCRATCH32, _SCRATCH64, _INTERRUPT, _LINE = 0x04, 0x08, 0x10, 0x14
_ADDRESS, _COUNT, _START, _STATUS, _ERRNO, _FAIL, _FAILING = 0x18, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x34
_BUSY, _DONE, _FAULT = 1, 2, 3
_FROM_CLIENT, _TO_CLIENT = 1, 2
_POLL_S = 0.002
#: Between two DMA commands of one transfer nothing has to come for longer than this, in seconds.
_QUIET_S = 0.01
_BAR0, _BAR1 = 0, 1


class TestProfile(NoStimulus):
    """Drives the registers of the test device.

    Args:
        timeout: how long to wait for the end of a transfer, in seconds.
    """

    __test__ = False
    name = "test"
    granule = 1
    largest = 1 << 20

    def __init__(self, timeout: float = 5.0) -> None:
        self._timeout = timeout
        #: What was ordered last, and the bytes that had been moved by messages before.
        self._address = self._count = self._direction = self._moved = 0

    def prepare(self, link: RawLink) -> None:
        """Check the magic number and switch bus mastering on."""
        if (magic := self._get(link, 0)) != MAGIC:
            raise NotApplicable(f"magic number {magic:#x}: the device is not the test device (--device-profile)")
        link.ok(Command.REGION_WRITE, wire.access(RegionIndex.CONFIG, 4, 2, b"\x06\x00"))

    def start_read(self, link: RawLink, address: int, count: int) -> None:
        """Copy client memory to BAR1."""
        self._start(link, address, count, _FROM_CLIENT)

    def start_write(self, link: RawLink, address: int, count: int) -> None:
        """Copy BAR1 to client memory."""
        self._start(link, address, count, _TO_CLIENT)

    def finish(self, link: RawLink) -> int:
        """Serve what the server asks for, then poll the status register.

        A server that serves one message at a time takes no command while it waits for the reply to its own.
        """
        self._serve_first(link)
        deadline = time.monotonic() + self._timeout
        while (status := self._get(link, _STATUS)) == _BUSY:
            check(time.monotonic() < deadline, f"the device's DMA did not end within {self._timeout:g} s")
            link.serve(_POLL_S)
        if status == _DONE:
            return 0
        same(_FAULT, status, "DMA status")
        return self._get(link, _ERRNO) or 5

    def load(self, link: RawLink, data: bytes) -> None:
        """Fill the beginning of BAR1."""
        link.ok(Command.REGION_WRITE, wire.access(_BAR1, 0, len(data), data))

    def taken(self, link: RawLink, count: int) -> bytes:
        """Read the beginning of BAR1."""
        return link.ok(Command.REGION_READ, wire.access(_BAR1, 0, count)).payload[16:]

    def raise_irq(self, link: RawLink, index: int, vector: int) -> None:
        """Write the interrupt register."""
        self._set(link, _INTERRUPT, index << 16 | vector)

    def set_intx(self, link: RawLink, asserted: bool) -> None:
        """Write the line register."""
        self._set(link, _LINE, int(asserted))

    def failing_access(self, link: RawLink, number: int) -> tuple[int, int]:
        """Say with what the failing register fails."""
        self._set(link, _FAIL, number)
        return _BAR0, _FAILING

    def scratch(self) -> tuple[int, int, int]:
        """The 64-bit scratch register."""
        return _BAR0, _SCRATCH64, 8

    def change_state(self, link: RawLink, seed: int) -> None:
        """Fill the scratch registers and the beginning of BAR1."""
        self._set(link, _SCRATCH32, seed * 0x01010101 & 0xFFFFFFFF)
        link.ok(
            Command.REGION_WRITE,
            wire.access(_BAR0, _SCRATCH64, 8, struct.pack("<Q", seed * 0x11223344556677 & wire.U64)),
        )
        self.load(link, bytes((seed + n) & 0xFF for n in range(256)))

    def state(self, link: RawLink) -> bytes:
        """The scratch registers and the beginning of BAR1."""
        narrow = link.ok(Command.REGION_READ, wire.access(_BAR0, _SCRATCH32, 4)).payload[16:]
        wide = link.ok(Command.REGION_READ, wire.access(_BAR0, _SCRATCH64, 8)).payload[16:]
        return narrow + wide + self.taken(link, 256)

    def _serve_first(self, link: RawLink) -> None:
        """Answer the DMA commands that have to come, until all bytes are moved or no more commands come."""
        memory = link.on_command
        if not isinstance(memory, ServedMemory):
            return
        if memory.takes(self._address, self._count, writes=self._direction == _TO_CLIENT):
            wait = self._timeout / 4
        else:
            wait = _QUIET_S  # a part of it, or nothing
        while memory.moved - self._moved < self._count and link.serve(wait):
            wait = _QUIET_S

    def _start(self, link: RawLink, address: int, count: int, direction: int) -> None:
        self._address, self._count, self._direction = address, count, direction
        self._moved = link.on_command.moved if isinstance(link.on_command, ServedMemory) else 0
        link.ok(Command.REGION_WRITE, wire.access(_BAR0, _ADDRESS, 8, struct.pack("<Q", address)))
        self._set(link, _COUNT, count)
        self._set(link, _START, direction)

    def _get(self, link: RawLink, offset: int) -> int:
        payload = link.ok(Command.REGION_READ, wire.access(_BAR0, offset, 4)).payload
        if len(payload) != 20:
            raise CaseFailed(f"a read of a register gave {len(payload) - 16} bytes")
        return int(struct.unpack_from("<I", payload, 16)[0])

    def _set(self, link: RawLink, offset: int, value: int) -> None:
        link.ok(Command.REGION_WRITE, wire.access(_BAR0, offset, 4, struct.pack("<I", value)))
