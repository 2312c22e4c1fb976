"""A small function for testing servers and clients: every kind of region, DMA on demand, interrupts on demand.

BAR0, 4 KiB, trapped, little-endian registers of their natural size:

    0x00  u32  ro  magic 0x75666f76
    0x04  u32  rw  scratch
    0x08  u64  rw  scratch
    0x10  u32  wo  interrupt: (IRQ index << 16) | vector is raised once
    0x14  u32  rw  INTx line: 1 asserted, 0 not
    0x18  u64  rw  DMA address
    0x20  u32  rw  DMA count in bytes, at most the size of BAR1
    0x24  u32  wo  DMA start: 1 client memory to BAR1, 2 BAR1 to client memory; with 0x100 added MSI-X vector 0 is
                   raised at the end
    0x28  u32  ro  DMA status: 0 idle, 1 busy, 2 done, 3 fault
    0x2c  u32  ro  error number of the last fault
    0x30  u32  rw  written: error number E, then every access to 0x34 fails with E
    0x34  u32  rw  see 0x30
    0x38  u32  ro  resets since this client came

BAR1, 1 MiB, trapped memory. BAR2, 64 KiB, shared memory: the first half may be mapped, the rest is trapped. Config
space has 4096 bytes with MSI (4 vectors), MSI-X (16 vectors, table at 0x800 and PBA at 0xc00 of BAR0) and PCI Express
with FLR.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

import trio

from vfiouser_oob.config.models import model
from vfiouser_oob.config.tables import section
from vfiouser_oob.devices.memfd import SharedMemory
from vfiouser_oob.devices.model import DeviceModel, ModelHost, ModelRegion, ResetKind
from vfiouser_protocol.constants import IrqIndex
from vfiouser_protocol.errors import CommandError, DmaFault
from vfiouser_protocol.irq import INTX, IrqDescription
from vfiouser_protocol.pci import BarSpec, ConfigSpace, Msi, Msix, PciExpress, PciIdentity
from vfiouser_protocol.regions import SparseArea

MAGIC = 0x75666F76
BAR0_SIZE = 0x1000
BAR1_SIZE = 1 << 20
BAR2_SIZE = 64 << 10
MSI_VECTORS = 4
MSIX_VECTORS = 16
_DMA_IDLE, _DMA_BUSY, _DMA_DONE, _DMA_FAULT = range(4)
_FROM_CLIENT, _TO_CLIENT, _DMA_IRQ = 1, 2, 0x100
_SNAPSHOT = struct.Struct(f"<II{BAR0_SIZE}s{BAR1_SIZE}s")


class TestDevice(DeviceModel):
    """The function described above.

    Args:
        name: the function's name, for its shared memory.
    """

    snapshot_version: int | None = 1
    __test__ = False  # its name looks like a test case to pytest

    def __init__(self, name: str) -> None:
        self.summary = "model:test"
        self.config = ConfigSpace(
            PciIdentity(vendor=0x1B36, device=0x00F0, class_code=0xFF0000),
            bars=[BarSpec(0, BAR0_SIZE), BarSpec(1, BAR1_SIZE), BarSpec(2, BAR2_SIZE)],
            interrupt_pin=1,
            capabilities=[
                Msi(vectors=MSI_VECTORS),
                Msix(vectors=MSIX_VECTORS, table_bar=0, table_offset=0x800, pba_bar=0, pba_offset=0xC00),
                PciExpress(flr=True),
            ],
            size=4096,
        )
        self._shared = SharedMemory(f"vfiouser-{name}-bar2", BAR2_SIZE)
        self.regions: Mapping[int, ModelRegion] = {
            0: ModelRegion(0, BAR0_SIZE),
            1: ModelRegion(1, BAR1_SIZE),
            2: ModelRegion(2, BAR2_SIZE, memory=self._shared, areas=(SparseArea(0, BAR2_SIZE // 2),)),
        }
        self.irqs: Sequence[IrqDescription] = (
            INTX,
            IrqDescription(MSI_VECTORS),
            IrqDescription(MSIX_VECTORS),
            IrqDescription(1),
            IrqDescription(1),
        )
        self._buffer = bytearray(BAR1_SIZE)
        self._host: ModelHost | None = None
        self._resets = 0
        self._start = trio.Event()
        self._idle = trio.Event()
        self._idle.set()
        self._resting = False
        self._power_on()
        self._hooks: Mapping[int, Callable[[int], None]] = {
            0x10: self._interrupt,
            0x14: self._set_line,
            0x24: self._start_dma,
        }

    def _power_on(self) -> None:
        self._registers = bytearray(BAR0_SIZE)
        self._set(0x00, MAGIC)
        self._set(0x38, self._resets)
        self._command = 0

    def attach(self, host: ModelHost) -> None:
        """Take the host's services."""
        self._host = host

    @property
    def _services(self) -> ModelHost:
        assert self._host is not None
        return self._host

    # Registers

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Read a register or memory."""
        if index == 1:
            return bytes(self._buffer[offset : offset + count])
        if index == 2:
            return bytes(self._shared.view[offset : offset + count])
        self._fail_if_asked(offset, count)
        return bytes(self._registers[offset : offset + count])

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write a register or memory."""
        if index == 1:
            self._buffer[offset : offset + len(data)] = data
        elif index == 2:
            self._shared.view[offset : offset + len(data)] = data
        else:
            self._fail_if_asked(offset, len(data))
            if offset in _WRITABLE and len(data) == _WRITABLE[offset]:
                self._registers[offset : offset + len(data)] = data
                hook = self._hooks.get(offset)
                if hook is not None:
                    hook(int.from_bytes(data, "little"))

    def _fail_if_asked(self, offset: int, count: int) -> None:
        number = self._get(0x30)
        if number and offset < 0x38 and offset + count > 0x34:
            raise CommandError("the access fails as asked for", number & 0xFFF)

    def _get(self, offset: int) -> int:
        return int.from_bytes(self._registers[offset : offset + 4], "little")

    def _set(self, offset: int, value: int) -> None:
        struct.pack_into("<I", self._registers, offset, value)

    # What writes cause

    def _interrupt(self, value: int) -> None:
        index, vector = value >> 16, value & 0xFFFF
        if index < len(self.irqs) and index != IrqIndex.INTX and vector < self.irqs[index].count:
            self._services.trigger(IrqIndex(index), vector)

    def _set_line(self, value: int) -> None:
        self._services.set_intx(bool(value & 1))

    def _start_dma(self, value: int) -> None:
        if self._get(0x28) != _DMA_BUSY:
            self._command = value
            self._set(0x28, _DMA_BUSY)
            self._start.set()

    async def run(self) -> None:
        """Do DMA when asked to; never from a register handler."""
        while True:
            await self._start.wait()
            if self._resting:
                await trio.sleep_forever()
            self._start, self._idle = trio.Event(), trio.Event()
            registers, command = self._registers, self._command
            address, count = struct.unpack_from("<QI", registers, 0x18)
            try:
                await self._transfer(command & 0xFF, address, min(count, BAR1_SIZE))
                outcome, number = _DMA_DONE, 0
            except DmaFault as fault:
                outcome, number = _DMA_FAULT, fault.errno
            self._idle.set()
            if registers is not self._registers:
                continue  # a reset came in between: this transfer never happened
            self._set(0x2C, number)
            self._set(0x28, outcome)
            if command & _DMA_IRQ:
                self._services.trigger(IrqIndex.MSIX, 0)

    async def _transfer(self, direction: int, address: int, count: int) -> None:
        memory = self._services.memory
        if direction == _FROM_CLIENT:
            self._buffer[:count] = await memory.read(address, count)
        elif direction == _TO_CLIENT:
            await memory.write(address, bytes(self._buffer[:count]))

    def reset(self, kind: ResetKind) -> None:
        """Go to the power-on state."""
        self._resets = 0 if kind is ResetKind.NEW_CLIENT else self._resets + 1
        self._buffer = bytearray(BAR1_SIZE)
        self._shared.clear()
        self._power_on()

    # For the process after this one

    async def quiesce(self) -> None:
        """Finish the transfer under way; one that is asked for now is the next process's."""
        self._resting = True
        await self._idle.wait()

    def snapshot(self) -> bytes:
        """Registers, the transfer that was asked for, and the memory of BAR1."""
        return _SNAPSHOT.pack(self._resets, self._command, bytes(self._registers), bytes(self._buffer))

    async def restore(self, state: bytes) -> None:
        """Take them over."""
        if len(state) != _SNAPSHOT.size:
            raise ValueError(f"a snapshot of {len(state)} bytes; it has {_SNAPSHOT.size}")
        self._resets, self._command, registers, buffer = _SNAPSHOT.unpack(state)
        self._registers, self._buffer = bytearray(registers), bytearray(buffer)
        if self._get(0x28) == _DMA_BUSY:
            self._start.set()

    def close(self) -> None:
        """Give the shared memory back."""
        self._shared.close()


#: Registers that can be written, and their sizes.
_WRITABLE: Mapping[int, int] = {
    0x04: 4,
    0x08: 8,
    0x10: 4,
    0x14: 4,
    0x18: 8,
    0x20: 4,
    0x24: 4,
    0x30: 4,
    0x34: 4,
}


@section
class TestDeviceOptions:
    """A [function for testing](test-device.md) servers and clients."""


@model(TestDeviceOptions)
def build(name: str, options: TestDeviceOptions) -> DeviceModel:
    """Build the model for a function of this name."""
    return TestDevice(name)
