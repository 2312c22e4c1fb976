"""A PCI function on the root bus of a machine under qtest, by configuration mechanism #1.

Spec: PCI Local Bus 3.0, 3.2.2.3.2 (configuration mechanism), 6.2.5.1 (base address registers),
6.7 (capabilities), 6.8.2 (MSI-X).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmbed.errors import BedError
from vmbed.qtest import Qtest

__all__ = ["Bar", "Msix", "PciFunction"]

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
COMMAND, STATUS, HEADER_BARS, CAPABILITIES = 0x04, 0x06, 0x10, 0x34
COMMAND_MEMORY, COMMAND_BUS_MASTER, COMMAND_INTX_OFF = 0x2, 0x4, 0x400
CAP_MSIX, CAP_PCIE = 0x11, 0x10
MSIX_ENABLE, MSIX_MASK_ALL = 0x8000, 0x4000
MSIX_ENTRY_BYTES = 16
WINDOW = 0xE000_0000  # inside q35's PCI hole for every RAM size the tests use
BAR_COUNT = 6


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register after sizing: index, size in bytes, and its kind bits."""

    index: int
    size: int
    is_io: bool
    is_64bit: bool
    is_prefetchable: bool


class PciFunction:
    """One function's configuration space, BARs and MSI-X table."""

    def __init__(self, qtest: Qtest, slot: int) -> None:
        self.qtest = qtest
        self._slot = slot
        self._next_address = WINDOW
        self.addresses: dict[int, int] = {}

    async def config_read(self, offset: int, size: int = 4) -> int:
        """Read configuration space with one access of 1, 2 or 4 bytes."""
        await self._select(offset)
        return await self.qtest.port_in(CONFIG_DATA + offset % 4, size)

    async def config_write(self, offset: int, value: int, size: int = 4) -> None:
        """Write configuration space with one access of 1, 2 or 4 bytes."""
        await self._select(offset)
        await self.qtest.port_out(CONFIG_DATA + offset % 4, value, size)

    async def _select(self, offset: int) -> None:
        await self.qtest.port_out(CONFIG_ADDRESS, 0x8000_0000 | self._slot << 11 | offset & 0xFC)

    async def capabilities(self) -> dict[int, int]:
        """Return the capability list as {id: offset}.

        Raises:
            BedError: the list has a loop.
        """
        found: dict[int, int] = {}
        offset = await self.config_read(CAPABILITIES, 1) & 0xFC
        while offset:
            if offset in found.values():
                raise BedError(f"the capability list comes back to {offset:#x}")
            header = await self.config_read(offset & 0xFC, 2)
            found[header & 0xFF] = offset
            offset = header >> 8 & 0xFC
        return found

    async def size_bars(self) -> list[Bar]:
        """Size every BAR as firmware does: all ones in, the mask out, the old value back."""
        bars: list[Bar] = []
        indexes: Iterator[int] = iter(range(BAR_COUNT))
        for index in indexes:
            low = await self._probe(index)
            if low == 0:
                continue
            is_io = bool(low & 1)
            is_64bit = not is_io and low & 6 == 4
            mask = low & (~0x3 if is_io else ~0xF)
            if is_64bit:
                mask |= await self._probe(next(indexes)) << 32
            else:
                mask |= 0xFFFF_FFFF << 32
            size = (~mask & 0xFFFF_FFFF_FFFF_FFFF) + 1
            bars.append(Bar(index, size, is_io, is_64bit, not is_io and bool(low & 8)))
        return bars

    async def _probe(self, index: int) -> int:
        offset = HEADER_BARS + 4 * index
        before = await self.config_read(offset)
        await self.config_write(offset, 0xFFFF_FFFF)
        mask = await self.config_read(offset)
        await self.config_write(offset, before)
        return mask

    async def place_bars(self) -> list[Bar]:
        """Size all memory BARs, give each an address (see `addresses`) and turn memory and DMA on."""
        bars = await self.size_bars()
        for bar in bars:
            if bar.is_io:
                continue
            address = (self._next_address + bar.size - 1) & ~(bar.size - 1)
            self._next_address = address + bar.size
            await self.config_write(HEADER_BARS + 4 * bar.index, address)
            if bar.is_64bit:
                await self.config_write(HEADER_BARS + 4 * bar.index + 4, 0)
            self.addresses[bar.index] = address
        await self.config_write(COMMAND, COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_OFF, 2)
        return bars

    async def msix(self) -> Msix:
        """Find the MSI-X capability; the BARs must have been placed."""
        offset = (await self.capabilities())[CAP_MSIX]
        control = await self.config_read(offset + 2, 2)
        table = await self.config_read(offset + 4)
        return Msix(
            function=self,
            capability=offset,
            vectors=(control & 0x7FF) + 1,
            table=self.addresses[table & 7] + (table & ~7),
        )


@dataclass(frozen=True, slots=True)
class Msix:
    """A function's MSI-X: where its capability and its table are, and its number of vectors.

    The table is QEMU's own; the pending bits are not, QEMU's vfio-user client reads them from the server.
    """

    function: PciFunction
    capability: int
    vectors: int
    table: int

    async def program(self, vector: int, address: int, data: int, *, masked: bool = False) -> None:
        """Fill in a table entry: the message's address and data."""
        entry = self.table + vector * MSIX_ENTRY_BYTES
        qtest = self.function.qtest
        await qtest.store(entry, address & 0xFFFF_FFFF)
        await qtest.store(entry + 4, address >> 32)
        await qtest.store(entry + 8, data)
        await qtest.store(entry + 12, int(masked))

    async def mask(self, vector: int, *, masked: bool) -> None:
        """Mask or unmask one vector."""
        await self.function.qtest.store(self.table + vector * MSIX_ENTRY_BYTES + 12, int(masked))

    async def enable(self, *, enabled: bool = True) -> None:
        """Turn MSI-X on or off."""
        control = await self.function.config_read(self.capability + 2, 2)
        bits = control & ~(MSIX_ENABLE | MSIX_MASK_ALL) | (MSIX_ENABLE if enabled else 0)
        await self.function.config_write(self.capability + 2, bits, 2)
