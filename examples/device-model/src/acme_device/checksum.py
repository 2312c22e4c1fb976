"""A PCI device that computes the CRC-32 of guest memory: one BAR, one interrupt, DMA.

BAR0, little-endian: 0x00 u64 address, 0x08 u32 count, 0x0c u32 any write starts, 0x10 u32 status (0 idle, 1 busy,
2 done, 3 the memory cannot be read), 0x14 u32 the checksum. MSI-X vector 0 is raised at the end.
"""

import struct
import zlib

import trio

from vfiouser_oob.devices import model

SIZE = 0x1000


class Checksum(model.DeviceModel):
    """The device."""

    @model.section
    class Options:
        """What the configuration may say."""

        limit: int = model.key(model.values.SIZE, "most bytes of one checksum", default=1 << 20)

    def __init__(self, name: str, options: Options) -> None:
        self.limit = options.limit
        msix = model.Msix(vectors=1, table_bar=0, table_offset=0x800, pba_bar=0, pba_offset=0xC00)
        self.config = model.ConfigSpace(
            model.PciIdentity(vendor=0x1B36, device=0x00F1, class_code=0xFF0000),
            bars=[model.BarSpec(0, SIZE)],
            capabilities=[msix, model.PciExpress(flr=True)],
        )
        self.registers = bytearray(SIZE)
        self.wanted, self.work = trio.open_memory_channel[tuple[int, int]](1)

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Answer a read."""
        return bytes(self.registers[offset : offset + count])

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Take a write; a start is only noted, since the guest gets no DMA before its write is answered."""
        if offset + len(data) <= 0x0C:
            self.registers[offset : offset + len(data)] = data
        elif offset == 0x0C and self.registers[0x10] != 1:
            self.registers[0x10] = 1
            self.wanted.send_nowait(struct.unpack_from("<QI", self.registers))

    async def run(self) -> None:
        """Compute what was asked for."""
        async for address, count in self.work:
            registers = self.registers
            try:
                data = await self.host.memory.read(address, min(count, self.limit))
                struct.pack_into("<II", registers, 0x10, 2, zlib.crc32(data))
            except model.DmaFault:
                struct.pack_into("<II", registers, 0x10, 3, 0)
            if registers is self.registers:
                self.host.trigger(model.IrqIndex.MSIX, 0)

    def reset(self, kind: model.ResetKind) -> None:
        """Go to the power-on state; what is under way then ends unnoticed."""
        self.registers = bytearray(SIZE)
