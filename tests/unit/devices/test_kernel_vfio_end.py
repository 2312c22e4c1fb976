"""The end of a client: what the device is told, in which order, before the next client may have it."""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from fakevfio import FakeKernel
from fakevfio.bed import NoMessages, answer, eventfds, given, irq_request, map_request, running
from fakevfio.device import MSIX_INDEX
from fakevfio.iommu import fail
from fakevfio.kernel import BASE
from vfiouser_protocol.constants import IrqIndex

CONFIG = 7
ASSIGN = 0x24
MIB = 1 << 20
COMMAND_OFFSET = (CONFIG << 40) + 4
CALLS: Mapping[int, str] = {BASE + 10: "interrupts off", BASE + 11: "reset", BASE + 14: "unmap"}


class RecordingKernel(FakeKernel):
    """Writes down what is done to the device and its descriptors, and fails what it is told to.

    Attributes:
        calls: what was done, in order.
        failing: whether interrupts, registers, reset and unmap fail, as of a device that was pulled out.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: list[str] = []
        self.failing = False

    def _note(self, what: str) -> None:
        self.calls.append(what)
        if self.failing:
            raise fail(errno.EIO)

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """Note what ends something."""
        if request in CALLS:
            index = f" {struct.unpack_from('<I', argument, 8)[0]}" if isinstance(argument, bytearray) else ""
            self._note(CALLS[request] + (index if request == BASE + 10 else ""))
        return super().ioctl(fd, request, argument)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Note a write of the command register."""
        if offset == COMMAND_OFFSET and not data[0] & 4:
            self._note("bus master off")
        return super().pwrite(fd, data, offset)

    def close(self, fd: int) -> None:
        """Note which descriptor."""
        self.calls.append(f"close {self.nodes[fd].kind}")
        super().close(fd)


async def used(kernel: RecordingKernel, *, gone: bool = False) -> list[str]:
    """Let a client use all that a device has and go, perhaps after the device; returns what was done after that."""
    memory = os.memfd_create("client")
    os.ftruncate(memory, MIB)
    async with running(kernel) as backend:
        client = await backend.open(NoMessages())
        await answer(client.region_write(CONFIG, 4, b"\x06\x00", posted=False))
        await answer(client.dma_map(map_request(0, MIB), given(memory)))
        for index in (MSIX_INDEX, IrqIndex.REQ):
            await answer(client.set_irqs(irq_request(index, ASSIGN, 0, 1), given(*eventfds(1))))
        kernel.calls.clear()
        kernel.failing = gone
        await client.close()
        done = list(kernel.calls)
        kernel.failing = False
        again = await backend.open(NoMessages())
        assert [] == kernel.iommu.ranges
        await again.close()
    return done


ORDER = [
    f"interrupts off {MSIX_INDEX}",
    f"interrupts off {int(IrqIndex.REQ)}",
    "bus master off",
    "reset",
    "unmap",
    "close device",
    "close container",
    "close group",
]


async def test_the_order_of_the_end(tmp_path: Path) -> None:
    """Interrupts, bus master, reset, and only then the memory, which nothing writes any more; then all descriptors."""
    kernel = RecordingKernel(tmp_path)
    assert ORDER == await used(kernel)


async def test_a_device_that_is_gone_is_given_back_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where every step fails, each one is tried and told, and every descriptor is closed."""
    kernel = RecordingKernel(tmp_path)
    assert ORDER == await used(kernel, gone=True)
    told = [record.__dict__["fields"]["step"] for record in caplog.records if record.levelno == logging.WARNING]
    assert 5 == len(told)
    assert "unmapping all memory" == told[-1]


async def test_a_device_without_reset_is_told_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its next client finds what this one left: everything else is done, and the log says so once per client."""
    kernel = RecordingKernel(tmp_path)
    kernel.device.has_reset = False
    assert [step for step in ORDER if step != "reset"] == await used(kernel)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert 2 == len(told)
    assert all("cannot reset this function" in text for text in told)
